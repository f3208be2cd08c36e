"""The command line: forms of flags, errors in one line with their exit codes, help, completion."""

import os
import pty
import subprocess
import sys
from dataclasses import fields
from textwrap import dedent

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from hf_ddpm.cli import app
from hf_ddpm.runtime.command_line import split_commas, split_numbers
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.training.config import TUNING_SETTINGS, TrainingConfig
from tests.support import forks

COMMANDS = get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]


def hf_ddpm(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--resoluton", "8"], "error: no such option: --resoluton; did you mean --resolution?\n"),
        (["train", "--qqqq"], "error: no such option: --qqqq; see hf-ddpm train --help\n"),
        (["train", "--resolution"], "error: Option '--resolution' requires an argument.\n"),
        (["train", "--resolution", "eight"], "error: resolution must be a whole number, got 'eight'\n"),
        (["train", "--train_batch_size", "0"], "error: train_batch_size must be at least 1, got 0\n"),
        (["sample", "model", "--out", "x", "--num_image", "4"], "did you mean --num_images?\n"),
        (["sample", "model", "--out", "x", "--scheduler", "euler"], "scheduler must be one of ddpm, ddim,"),
        (["evaluate", "model", "--scheduler", "ddim,unpic"], "got 'unpic'; did you mean unipc?\n"),
        (["train", "--batch_size", "8"], "no such option: --batch_size; did you mean --train_batch_size?\n"),
        (["train", "--ddpm_beta_schedule", "cosine"], "got 'cosine'; did you mean squaredcos_cap_v2?\n"),
        (["push", "run", "name", "--publc"], "did you mean --public?\n"),
        (["evaluate", "model", "--center_crop"], "center_crop needs --dataset_name, got none"),
        (
            ["reference", "digits", "--out", "x", "--channels", "2"],
            "channels must be 1 or 3, as networks take, got 2: --channels 3, or 1\n",
        ),
        (["schedule", "model", "--steps", "five"], "steps must be whole numbers, got 'five'\n"),
        (["info", "nothing/at/all"], "model must be a folder with model_index.json"),
        (["trian"], "No such command 'trian'"),
    ],
)
def test_wrong_usage_is_one_line_and_code_2(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        app(arguments, prog_name="hf-ddpm")
    said = capsys.readouterr()
    assert end.value.code == 2
    assert message in said.err
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    assert said.out == ""


@pytest.mark.slow
def test_usage_errors_come_before_torch():
    code = """
import sys
from hf_ddpm.cli import app
wrong = [["train", "--resoluton", "8"], ["train", "--seed", "-1"], ["train", "--ddpm_beta_schedule", "cosine"]]
wrong += [["sample", "m", "--out", "x", *flag] for flag in (["--scheduler", "heun"], ["--format", "jpg"])]
wrong += [["evaluate", "m", *flag] for flag in (["--metrics", "fid"], ["--scheduler", "heun"], ["--dtype", "fp16"])]
wrong += [["schedule", "m", *flag] for flag in (["--steps", "5-8"], ["--steps", "1"], ["--scheduler", "heun"])]
wrong += [["reference", "digits", "--out", "x", "--network", "vgg"]]
for arguments in (["--help"], ["train", "--help"], *wrong):
    try:
        app(arguments)
    except SystemExit as error:
        assert error.code == (0 if "--help" in arguments else 2), arguments
heavy = {"torch", "transformers", "diffusers", "accelerate", "datasets", "numpy", "psutil"} & sys.modules.keys()
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "usage: " not in done.stderr


def test_process_does_not_collect_garbage_as_it_ends():
    code = """
        import atexit, gc
        atexit.register(lambda: print("frozen:", gc.get_freeze_count() > 0))
        from hf_ddpm.cli import app
        app(["--help"])
    """
    ended = subprocess.run([sys.executable, "-c", dedent(code)], capture_output=True, text=True, check=True)
    assert ended.stdout.endswith("frozen: True\n")


@pytest.mark.slow
def test_command_at_a_terminal_says_that_it_loads(tmp_path):
    terminal, its_end = pty.openpty()
    process = forks.python(["-m", "hf_ddpm", "sample", "nothing", "--out", "x"], tmp_path, None, os.ttyname(its_end))
    process.start()
    process.join()
    os.close(its_end)
    lines = os.read(terminal, 4096).decode().splitlines()
    os.close(terminal)
    assert lines[0] == "loading torch and diffusers"
    assert lines[1].startswith("error: model must be")


def test_help_of_train_groups_each_setting():
    done = hf_ddpm("train", "--help")
    assert done.exit_code == 0
    for field in fields(TrainingConfig):
        assert (f"--{field.name}" in done.stdout) == (field.name not in TUNING_SETTINGS)
    headings = [line[:-1] for line in done.stdout.splitlines() if line.endswith(":") and not line.startswith(" ")]
    groups = ["Data", "Model", "Objective", "Optimization", "Averages", "Output", "Sharing", "Machine"]
    assert headings == ["Options", *groups]


def test_help_names_each_command():
    done = hf_ddpm()
    assert (done.exit_code, hf_ddpm("--help").stdout) == (0, done.stdout)
    assert list(COMMANDS) == [line.split()[0] for line in done.stdout.partition("Commands:\n")[2].splitlines()]


@pytest.mark.parametrize("name", COMMANDS)
def test_switches_have_both_forms_and_options_underscores(name):
    for param in COMMANDS[name].params:
        if param.param_type_name == "option":
            assert not any("-" in option[2:] for option in (*param.opts, *param.secondary_opts)), param.name
        if getattr(param, "is_flag", False):
            assert param.secondary_opts == [f"--no_{param.name}"]


def test_hyphens_are_taken_for_underscores():
    group = get_command(app)
    with group.make_context("hf-ddpm", ["sample"]) as parent:
        words = ["model", "--out", "x", "--num-images", "4", "--no-compile", "--num-inference-steps=3"]
        params = COMMANDS["sample"].make_context("sample", words, parent=parent).params
    assert (params["num_images"], params["compile"], params["num_inference_steps"]) == (4, False, 3)


def completions(*words: str) -> list[str]:
    """Return what a shell offers for the last of the words."""
    environment = {"COMP_WORDS": " ".join(["hf-ddpm", *words]), "COMP_CWORD": str(len(words))}
    environment["_HF_DDPM_COMPLETE"] = "complete_bash"
    done = CliRunner().invoke(app, [], prog_name="hf-ddpm", env=environment)
    assert done.exit_code == 0, done.output
    return done.stdout.split()


@pytest.mark.slow
def test_shell_completes_commands_flags_and_values():
    assert completions("s") == ["sample", "schedule", "space"]
    assert completions("train", "--rec") == ["--recipe"]
    assert completions("train", "--recipe", "") == ["cifar10-ddpm", "digits", "fashion-mnist"]
    assert completions("train", "--prediction_type", "v") == ["v_prediction"]
    assert "--no_use_ema" in completions("train", "--no_")
    assert completions("train", "--use_ema", "False", "--optimizer", "a") == ["adamw"]
    assert completions("sample", "--num_im") == ["--num_images"]


def test_split_commas_and_numbers():
    assert split_commas(" a, b,,c ") == ["a", "b", "c"]
    assert split_commas(None) == []
    assert split_numbers("steps", "5, 8") == [5, 8]
    for text in ("5,many", "2.5", "-5"):
        with pytest.raises(UsageError, match=f"steps must be whole numbers, got '{text}'"):
            split_numbers("steps", text)
