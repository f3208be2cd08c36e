"""Wrong and unlucky input of commands and of Python: one line says what is wrong, and nothing was begun."""

import json
import os
import signal
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import hf_ddpm
from hf_ddpm import DDPMPipeline, DDPMScheduler, TrainingConfig, UsageError
from hf_ddpm.cli import app
from hf_ddpm.runtime.errors import in_one_line
from hf_ddpm.training.parsing import load_config

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def model(make_unet, tmp_path) -> Path:
    scheduler = DDPMScheduler(10, beta_schedule="squaredcos_cap_v2")
    DDPMPipeline(make_unet(channels=3), scheduler).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def said(*arguments) -> str:
    """The line that a command is refused with."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 2, done.output
    lines = [line for line in done.output.splitlines() if line and "Loading pipeline components" not in line]
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("LOCAL_RANK", "abc", "LOCAL_RANK in the environment must be a whole number, got 'abc'"),
        ("WORLD_SIZE", "abc", "WORLD_SIZE in the environment must be a whole number, got 'abc'"),
        ("RANK", "-1", "RANK in the environment must be a whole number, got '-1'"),
        ("ACCELERATE_MIXED_PRECISION", "fp8", "mixed_precision must be one of no, fp16, bf16, got 'fp8' of `accel"),
    ],
)
def test_environment_of_a_launcher(variable, value, message, monkeypatch):
    monkeypatch.setenv(variable, value)
    assert message in said("train", "--output_dir", "run")
    if variable != "ACCELERATE_MIXED_PRECISION":
        assert message in said("sample", "model", "--out", "x")
    with pytest.raises(UsageError) as error:
        hf_ddpm.train(TrainingConfig(output_dir="run"))
    assert message in str(error.value)
    assert not Path("run").exists()


def test_precision_of_the_environment_gives_way_to_that_of_a_flag(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    assert "there is no folder" in said("train", "--mixed_precision", "no", "--train_data_dir", "nothing")


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        ("sample model --out x --num_inference_steps 0", "num_inference_steps", "0"),
        ("sample model --out x --num_inference_steps some", "num_inference_steps", "some"),
        ("sample model --out x --guidance_scale strong", "guidance_scale", "strong"),
        ("demo model --port 99999", "port", "99999"),
    ],
)
def test_value_of_a_flag_is_named_beside_what_it_must_be(words, name, value):
    line = said(*words.split())
    assert line.startswith(f"error: {name} must be ")
    assert line.endswith(f", got {value!r}")


def test_seeds_are_those_that_torch_takes(model):
    for seed in (2**64, 2**63, -1):
        for command in (("sample", model, "--out", "x"), ("evaluate", model), ("schedule", model)):
            assert "seed" in said(*command, "--seed", seed)
        with pytest.raises(UsageError, match=r"seed must be in \[0, 2\*\*63\)"):
            hf_ddpm.sample(str(model), "x", num_images=2, seed=seed)
    with pytest.raises(UsageError, match=r"seed must be in .*, got 9223372036854775807 as the first of 2"):
        hf_ddpm.sample(str(model), "x", num_images=2, seed=2**63 - 1)
    assert not Path("x").exists()


def test_port_that_is_taken_is_named(model):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"port must be free, got {port}: Address already in use" in said("demo", model, "--port", port)


PYTHON = {
    "a dict": (lambda: {"output_dir": "run"}, "config must be a TrainingConfig, got a dict: hf_ddpm.load_config"),
    "text for a number": (
        lambda: TrainingConfig(train_batch_size="4"),
        "train_batch_size must be a whole number or auto",
    ),  # pyright: ignore[reportArgumentType]
    "half an image": (
        lambda: TrainingConfig(train_batch_size=1.5),
        "train_batch_size must be a whole number or auto, got 1.5",
    ),  # pyright: ignore[reportArgumentType]
    "truth for a number": (lambda: TrainingConfig(learning_rate=True), "learning_rate must be a number, got True"),
    "a number for a list": (
        lambda: TrainingConfig(ema_halflife_images=50.0),  # pyright: ignore[reportArgumentType]
        "ema_halflife_images must be a list of numbers, got 50.0",
    ),
    "a long number": (lambda: TrainingConfig(num_epochs=10**400), "num_epochs must fit in 64 bits, got 1000"),
    "too long to write": (lambda: TrainingConfig(num_epochs=10**5000), "got an integer of 16610 bits"),
    "too long for a float": (
        lambda: TrainingConfig(ema_halflife_images=[10**400]),
        "ema_halflife_images must be different numbers",
    ),
    "another choice": (lambda: TrainingConfig(optimizer=["adamw"]), "optimizer must be one of muon, adamw"),  # pyright: ignore[reportArgumentType]
    "nowhere": (lambda: TrainingConfig(output_dir=""), "output_dir must not be empty"),
}


@pytest.mark.parametrize("case", PYTHON)
def test_train_checks_types(case, tmp_path):
    make, message = PYTHON[case]
    with pytest.raises(UsageError) as error:
        hf_ddpm.train(make())  # pyright: ignore[reportArgumentType]
    assert message in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_train_takes_paths_of_pathlib_and_homes(tiny_settings, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    names = ("train_data_dir", "cache_dir", "model_config_name_or_path")
    paths = {name: Path(tiny_settings[name]) for name in names}
    hf_ddpm.train(TrainingConfig(**{**tiny_settings, **paths, "output_dir": Path("~/run"), "max_train_steps": 1}))
    assert f"output_dir: {tmp_path / 'run'}" in (tmp_path / "run" / "config.yaml").read_text()
    assert load_config(output_dir="~/x").output_dir == str(tmp_path / "x")


@pytest.mark.filterwarnings("ignore:alpha_bar_T")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"generator": 123}, "generator must be a torch.Generator, or one for each image, got 123"),
        ({"generator": [1]}, r"generator must be a torch.Generator, or one for each image, got \[1\]"),
        ({"batch_size": "4"}, "batch_size must be a whole number, got '4'"),
        ({"batch_size": 1.5}, r"batch_size must be a whole number, got 1\.5"),
        ({"num_inference_steps": "5"}, "num_inference_steps must be a whole number, got '5'"),
        ({"class_labels": "flags"}, "class_labels must name a class, got 'flags': the classes are 0, 1, 2"),
        ({"class_labels": 0.5}, "class_labels must be names or whole numbers, got 0.5"),
        ({"class_labels": [["a"]]}, "class_labels must be names or whole numbers"),
    ],
)
def test_pipeline_checks_types(arguments, message, make_unet):
    pipeline = DDPMPipeline(make_unet(num_class_embeds=3), DDPMScheduler(10))
    with pytest.raises(ValueError, match=message):
        pipeline(**{"class_labels": 0, **arguments})


def test_network_for_another_task_is_refused(model, make_unet):
    make_unet(channels=6, out_channels=3).save_pretrained(model / "unet")
    assert "got 3 for 6: it was trained for another task" in said("sample", model, "--out", "x", "--format", "npz")
    assert not Path("x").exists()


def test_files_of_settings_name_themselves(tmp_path):
    for text, message in (
        ("seed: 1\nresolution: 8\nseed: 2\n", "settings.yaml cannot be read: 'seed' stands in it twice"),
        ("", "config must hold settings, got 'settings.yaml', which holds none"),
        ("# nothing\n", "config must hold settings, got 'settings.yaml', which holds none"),
        ("resolution: [8, big]\n", "settings.yaml: resolution must be a whole number, got 'big'"),
        ("base: &a {x: 1}\nother:\n  <<: *a\n", "settings.yaml: unknown setting 'base'"),
    ):
        Path("settings.yaml").write_text(text)
        assert message in said("train", "--config", "settings.yaml")


def test_config_of_a_run_names_itself(model):
    (model / "config.yaml").write_text("dataset_name: digits\nresolution: large\n")
    assert f"{model / 'config.yaml'}: resolution must be a whole number, got 'large'" in said(
        "evaluate", model, "--metrics", "nll"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "dataset_dict.json cannot be read"),
        ("", "dataset_dict.json cannot be read"),
        ("[]", "dataset_dict.json cannot be read: it must be a mapping"),
        ("{}", "dataset_dict.json cannot be read: KeyError: 'splits'"),
        ('{"splits": 3}', "dataset_dict.json cannot be read: TypeError"),
        ('{"splits": ["test"]}', "dataset_name must hold a split `train`, got 'saved' with ['test']"),
        ('{"splits": ["train"]}', "dataset_name must be loadable with a split `train`"),
    ],
)
def test_damaged_saved_data_set(content, message):
    Path("saved").mkdir()
    Path("saved/dataset_dict.json").write_text(content)
    assert message in said("train", "--dataset_name", "saved")


def test_checkpoint_of_another_folder_is_not_taken_for_one_of_this(tmp_path):
    for name in ("run", "other"):
        (tmp_path / name / "checkpoint-5").mkdir(parents=True)
        (tmp_path / name / "config.yaml").write_text("seed: 0\n")
    message = "resume_from_checkpoint must be a checkpoint in output_dir, got 'other/checkpoint-5'"
    assert message in said("train", "--output_dir", "run", "--resume_from_checkpoint", "other/checkpoint-5")


def test_damaged_metrics_are_named_before_anything_is_deleted(tiny_settings):
    config = TrainingConfig(**{**tiny_settings, "max_train_steps": 3})
    hf_ddpm.train(config)
    run = Path(config.output_dir)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"loss": 1}\n{"step": ')
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    again = TrainingConfig(**{**tiny_settings, "max_train_steps": 4, "resume_from_checkpoint": "latest"})
    with pytest.raises(UsageError, match=r"metrics\.jsonl cannot be read: no step in line 4"):
        hf_ddpm.train(again)
    changed = [path.name for path, time in before.items() if not path.exists() or path.stat().st_mtime_ns != time]
    assert {*changed} - {".lock"} == {"config.yaml"}  # a lock names who holds it


def test_token_that_may_not_be_read_hides_no_error(monkeypatch):
    def refuse():
        raise PermissionError(13, "Permission denied", "/other/token")

    monkeypatch.setattr("huggingface_hub.get_token", refuse)
    assert in_one_line(ValueError("a reason")) == "a reason"
    message = "the token of hf auth login must be readable, got '/other/token': Permission denied"
    assert message in said("train", "--push_to_hub", "--output_dir", "run")


@pytest.mark.slow
def test_pipeline_of_a_run_has_bars_of_its_own_name(tiny_settings, capsys):
    pipeline = hf_ddpm.train(TrainingConfig(**{**tiny_settings, "max_train_steps": 3, "save_figures": True}))
    assert pipeline is not None
    assert "reverse chain" in capsys.readouterr().err
    pipeline(generator=torch.Generator().manual_seed(0), num_inference_steps=2)
    assert "reverse chain" not in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="Windows has other signals")
def test_interrupt_in_imports_ends_as_the_signal_does(tmp_path):
    code = f"""
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a program in the background ignores
class Interrupt:
    def find_spec(self, name, *_):
        if name == "torch":
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
from hf_ddpm.cli import app
app({["train", "--output_dir", str(tmp_path / "run")]!r})
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (128 + signal.SIGINT, "")
    assert json.dumps([path.name for path in tmp_path.iterdir()]) == "[]"


@pytest.mark.skipif(find_spec("gradio") is None, reason='needs pip install "hf_ddpm[demo]"')
def test_demo_for_agents_says_what_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "mcp", None)
    result = CliRunner().invoke(app, ["demo", "model", "--mcp_server"])
    assert result.exit_code == 2
    assert 'mcp_server needs the package mcp, which is not installed: pip install "gradio[mcp]"' in result.output
