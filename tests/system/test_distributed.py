"""One process, two and four compute the same, joined by gloo on the CPU."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageChops
from safetensors.torch import load_file
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from hf_ddpm.cli import app
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.loop import train
from hf_ddpm.training.parsing import load_config, save_config
from tests.support.forks import Process, write_output_to
from tests.support.networks import ATTENTION, smallest_unet_config
from tests.support.runs import child, differences, log_of, said, start, trace

ROOT = Path(__file__).parents[2]
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_AUTO_WRAP_POLICY": "NO_WRAP",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same 12 steps of 8 images, by one process at once, by one in four parts, by two in two and by four."""
    divisions = {
        "whole": (1, 8, 1, {}),
        "1 by 4": (1, 2, 4, {}),
        "4 by 1": (4, 2, 1, {}),
        "2 by 2": (2, 2, 2, {}),
        "2 by 2, FSDP": (2, 2, 2, FSDP),
    }
    root = tmp_path_factory.mktemp("distributed")
    train_divided(root, divisions)
    return root, {path.name: trace(path) for path in root.iterdir() if (path / "metrics.jsonl").exists()}


def train_divided(root: Path, divisions: dict, **settings) -> TrainingConfig:
    """The runs in `root`, and the config of one that two processes divide in two, which is config.yaml there."""
    model = root / "unet.json"
    model.write_text(json.dumps(smallest_unet_config(channels=1, num_class_embeds=11, **ATTENTION)))
    config = TrainingConfig(
        dataset_name="digits",
        label_column="label",
        class_dropout=0.3,
        model_config_name_or_path=str(model),
        max_train_steps=12,
        ddpm_num_steps=20,
        logging_steps=1,
        ddpm_num_inference_steps=4,
        checkpointing_steps=6,
        ema_snapshots=2,
        eval_batch_size=3,
        random_flip=True,
        stable_target_images=100,
        cache_dir=str(root / "cache"),
        lr_warmup_steps=5,
        save_figures=False,
        cpu_threads_per_process=1,
        **settings,
    )
    for name, (num_processes, batch_size, accumulation, variables) in divisions.items():
        divided = replace(config, train_batch_size=batch_size, gradient_accumulation_steps=accumulation)
        divided = replace(divided, output_dir=str(root / name))
        assert start(divided, num_processes, **variables) == [0] * num_processes, said(divided)
    divided = replace(config, train_batch_size=2, gradient_accumulation_steps=2)
    save_config(divided, root / "config.yaml")
    return divided


@pytest.mark.slow
@pytest.mark.parametrize("name", ["1 by 4", "2 by 2", "4 by 1", "2 by 2, FSDP"])
def test_every_division_of_the_global_batch_trains_the_same_model(runs, name):
    root, traces = runs
    assert_same(root / "whole", root / name)
    assert len(traces["whole"]) == 12


@pytest.mark.slow
def test_processes_tune_the_same_model(runs, tmp_path):
    """Also with FSDP, where each process has a teacher of its own."""
    root, _ = runs
    tuned = {"init_from": str(root / "whole"), "tuned_steps": [1, 2], "guidance_scale": 1.5}
    tuned |= {"model_config_name_or_path": None, "stable_target_images": 0, "ddpm_num_inference_steps": None}
    divisions = {"one": (1, 8, 1, {}), "two": (2, 4, 1, {}), "two, FSDP": (2, 2, 2, FSDP)}
    config = replace(load_config(str(root / "config.yaml")), **tuned)
    for name, (num_processes, batch_size, accumulation, variables) in divisions.items():
        divided = replace(config, train_batch_size=batch_size, gradient_accumulation_steps=accumulation)
        divided = replace(divided, output_dir=str(tmp_path / name))
        assert start(divided, num_processes, **variables) == [0] * num_processes, said(divided)
        assert_same(tmp_path / "one", tmp_path / name)


@pytest.mark.slow
def test_processes_divide_an_automatic_batch_alike(runs, tmp_path):
    root, _ = runs
    config = load_config(str(root / "config.yaml"), output_dir=str(tmp_path / "run"))
    auto = {"train_batch_size": "auto", "gradient_accumulation_steps": 1, "global_batch_size": 8}
    config = replace(config, **auto)
    assert start(config, 2) == [0, 0], said(config)
    assert "train_batch_size auto is 4, gradient_accumulation_steps 1, for 8 images per step" in said(config)
    assert_same(root / "whole", tmp_path / "run")


def assert_same(*folders):
    """Loss, learning rate, average and previews."""
    whole, parts = map(trace, folders)
    assert [m["loss"] for m in parts] == pytest.approx([m["loss"] for m in whole], abs=1e-5)
    for key in ("lr", "ema_decay", "images"):
        assert [m[key] for m in parts] == [m[key] for m in whole]
    for file in ("unet/diffusion_pytorch_model.safetensors", f"ema/snapshot-{96:012d}.safetensors"):
        a, b = (load_file(folder / file) for folder in folders)
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=0, atol=1e-4)
    pictures = [Image.open(folder / "previews/step-0000012.png").convert("L") for folder in folders]
    assert ImageChops.difference(*pictures).getextrema()[1] <= 1


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [("2 by 2", 1), ("2 by 2", 4), ("4 by 1", 3), ("2 by 2, FSDP", 1)])
def test_resume_with_another_number_of_processes(runs, before, after, tmp_path):
    """The same run as far as the global batch can be kept; else one whose schedule follows the images seen."""
    resume_elsewhere(runs, before, after, tmp_path)


@pytest.mark.slow
def test_fsdp_resumes_a_run_of_one_process(runs, tmp_path):
    resume_elsewhere(runs, "1 by 4", 2, tmp_path, **FSDP)


def resume_elsewhere(runs, before, after, tmp_path, **variables):
    root, traces = runs
    folder = tmp_path / "run"
    shutil.copytree(root / before, folder)
    shutil.rmtree(folder / "checkpoint-12")
    (folder / "run.json").unlink()
    config = load_config(str(folder / "config.yaml"), output_dir=str(folder), resume_from_checkpoint="latest")
    save_config(config, folder / "config.yaml")
    assert start(config, after, **variables) == [0] * after, said(config)
    whole, now = traces["whole"], trace(folder)
    assert now[:6] == traces[before][:6]
    if after != 3:
        assert [m["images"] for m in now] == [m["images"] for m in whole]
        assert [m["loss"] for m in now] == pytest.approx([m["loss"] for m in whole], abs=1e-5)
        assert [m["lr"] for m in now] == [m["lr"] for m in whole]
        return
    # 8 images per step are not for 3 processes of 2: now 6 are, from image 48 on, until 96 are seen.
    assert "the global batch changes from 8 to 6 images" in said(config)
    assert [m["images"] for m in now[6:]] == [*range(54, 97, 6)]
    # The step after 72 images has the learning rate of the whole run's step after 72 images.
    assert now[10]["lr"] == whole[9]["lr"]
    assert now[10]["ema_decay"] ** (8 / 6) == pytest.approx(whole[9]["ema_decay"])


@pytest.mark.slow
def test_torchrun_restarts_a_process_that_died(runs, tmp_path):
    """torchrun's elastic restart, of all processes; the run is the one in which none died."""
    root, _ = runs
    config = load_config(str(root / "2 by 2" / "config.yaml"), output_dir=str(tmp_path / "run"))
    agent = Process(target=run_agent, args=(replace(config, resume_from_checkpoint="latest"),))
    agent.start()
    agent.join()
    assert agent.exitcode == 0, said(config)
    assert "the run resumes from checkpoint-6" in said(config)
    assert not differences(tmp_path / "run", root / "2 by 2")


def run_agent(config):
    """Do what torchrun does, but fork the processes that train, which need not import all anew."""
    write_output_to(log_of(config))
    os.environ |= {"ACCELERATE_USE_CPU": "true", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    settings: dict[str, Any] = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "run_id": "test"}
    one_machine = LaunchConfig(1, 1, 2, start_method="fork", max_restarts=2, monitor_interval=0.1, **settings)
    elastic_launch(one_machine, train_and_die_once)(config)


def train_and_die_once(config):
    dies = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "1"
    child(config, "step" if dies else None, 8, signal.SIGKILL, {})


def test_launcher_of_unknown_process_count_is_refused(tmp_path, monkeypatch, capsys):
    """What `accelerate launch` on the CPU leaves of several processes asked for in its config file."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as end:
        app(["train", "--output_dir", str(tmp_path / "run")])
    assert end.value.code == 2
    assert "torchrun --nproc_per_node N" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_run_json_records_two_processes(runs):
    root, _ = runs
    training = json.loads((root / "2 by 2/run.json").read_text())["training"]
    assert (training["num_processes"], training["global_batch_size"]) == (2, 8)


@pytest.mark.slow
def test_fsdp_on_a_cpu_is_refused(runs, tmp_path):
    root, _ = runs
    config = load_config(str(root / "config.yaml"), output_dir=str(tmp_path / "run"))
    assert start(config, 1, ACCELERATE_USE_FSDP="true") == [1]
    assert "FSDP must run on an accelerator, got cpu" in said(config)


@pytest.mark.slow
@pytest.mark.parametrize("script", [["train_accelerate.py"], ["-m", "hf_ddpm", "sample", "model", "--out", "samples"]])
def test_launch_with_deepspeed_is_refused_in_one_line(script, tmp_path):
    """Whoever has an Accelerate config with DeepSpeed, whose launcher sets this variable in each process."""
    command = [
        sys.executable,
        "-W",
        "ignore",
        *(str(ROOT / word) if word.endswith(".py") else word for word in script),
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "ACCELERATE_USE_DEEPSPEED": "true",
            "RANK": "0",
            "WORLD_SIZE": "2",
        },
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: distributed_type must not be DEEPSPEED")
    assert "use FSDP 2" in line
    assert not list(tmp_path.iterdir())


def test_train_with_deepspeed_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UsageError, match="distributed_type must not be DEEPSPEED"):
        train(TrainingConfig(output_dir=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()
