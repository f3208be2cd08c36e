"""One process, two and four compute the same, through Accelerate's launcher and torchrun with gloo on the CPU."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from PIL import Image, ImageChops
from safetensors.torch import load_file

from .conftest import tiny_unet_config
from .runs import differences

ROOT = Path(__file__).parents[1]


def launch(processes, output_dir, *arguments):
    command = [
        *(sys.executable, "-W", "ignore", "-m", "accelerate.commands.launch", "--cpu"),
        *("--num_processes", str(processes)),
        *(str(ROOT / "train_accelerate.py"), "--output_dir", str(output_dir), *map(str, arguments)),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same 20 steps of 8 images, by one process at once, by one in four parts, by two in two and by four."""
    root = tmp_path_factory.mktemp("distributed")
    model = root / "unet.json"
    model.write_text(json.dumps(tiny_unet_config(channels=1)))
    common = [
        *("--dataset_name", "digits", "--model_config_name_or_path", model, "--max_train_steps", 20),
        *("--ddpm_num_steps", 20, "--logging_steps", 1, "--checkpointing_steps", 10, "--eval_batch_size", 3),
        *("--random_flip", "--cache_dir", root / "cache", "--lr_warmup_steps", 5),
    ]
    parts = ["--train_batch_size", 2, "--gradient_accumulation_steps"]
    traces = {
        "whole": launch(1, root / "whole", "--train_batch_size", 8, *common),
        "1 by 4": launch(1, root / "1 by 4", *parts, 4, *common),
        "2 by 2": launch(2, root / "2 by 2", *parts, 2, *common),
        "4 by 1": launch(4, root / "4 by 1", *parts, 1, *common),
    }
    return root, traces


@pytest.mark.parametrize("name", ["1 by 4", "2 by 2", "4 by 1"])
def test_every_way_to_divide_a_step_is_the_same_run(runs, name):
    """Loss, learning rate, average and previews."""
    root, traces = runs
    whole, parts = traces["whole"], traces[name]
    assert len(whole) == 20
    assert [m["loss"] for m in parts] == pytest.approx([m["loss"] for m in whole], abs=1e-5)
    for key in ("lr", "ema_decay", "images"):
        assert [m[key] for m in parts] == [m[key] for m in whole]
    for file in ("unet/diffusion_pytorch_model.safetensors", f"ema/snapshot-{160:012d}.safetensors"):
        a, b = (load_file(root / run / file) for run in ("whole", name))
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=0, atol=1e-4)
    pictures = [Image.open(root / run / "previews/step-0000020.png").convert("L") for run in ("whole", name)]
    assert ImageChops.difference(*pictures).getextrema()[1] <= 1


@pytest.mark.parametrize(("before", "after"), [("2 by 2", 1), ("2 by 2", 4), ("4 by 1", 3)])
def test_another_number_of_processes_goes_on(runs, before, after, tmp_path):
    """The same run as far as the global batch can be kept; else one whose schedule follows the images seen."""
    root, traces = runs
    folder = tmp_path / "run"
    shutil.copytree(root / before, folder)
    shutil.rmtree(folder / "checkpoint-20")
    (folder / "run.json").unlink()
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump({**settings, "output_dir": str(folder)}))
    trace = launch(after, folder, "--config", folder / "config.yaml", "--resume_from_checkpoint", "latest")
    whole = traces["whole"]
    assert trace[:10] == traces[before][:10]
    if after in (1, 4):
        assert [m["images"] for m in trace] == [m["images"] for m in whole]
        assert [m["loss"] for m in trace] == pytest.approx([m["loss"] for m in whole], abs=1e-5)
        assert [m["lr"] for m in trace] == [m["lr"] for m in whole]
    else:
        # 8 images per step are not for 3 processes of 2: now 6 are, from image 80 on to at least 160.
        assert [m["images"] for m in trace[10:]] == [*range(86, 165, 6)]
        lr = {m["images"]: m["lr"] for m in whole}
        assert trace[13]["lr"] == pytest.approx(lr[104] - (lr[104] - lr[112]) * (98 + 0 - 96) / 8, rel=1e-2)


def test_a_worker_that_dies_is_restarted(runs, tmp_path):
    """torchrun's elastic restart, of all processes; the run is the one in which none died."""
    root, _ = runs
    settings = yaml.safe_load((root / "2 by 2" / "config.yaml").read_text())
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**settings, "output_dir": str(tmp_path / "run")}))
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["--max_restarts", "2", str(ROOT / "train_accelerate.py")]
    command += ["--config", str(tmp_path / "config.yaml"), "--resume_from_checkpoint", "latest"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, env={**environment, "OMP_NUM_THREADS": "1"}) as torchrun:
        said = b""
        while b"| 13/20" not in said:
            said += os.read(torchrun.stderr.fileno(), 4096)
        victim = [c for c in psutil.Process(torchrun.pid).children(recursive=True) if "--config" in c.cmdline()][-1]
        victim.kill()
        said += torchrun.stderr.read()
    assert torchrun.returncode == 0, said.decode()
    assert b"the run goes on from checkpoint-10" in said
    assert not differences(tmp_path / "run", root / "2 by 2")


def test_a_number_of_processes_that_cannot_be_known_is_refused(tmp_path):
    """What `accelerate launch` on the CPU leaves of several processes asked for in its config file."""
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    environment |= {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "train_accelerate.py"), "--output_dir", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 1
    assert "torchrun --nproc_per_node N" in done.stderr
    assert not (tmp_path / "run").exists()


def test_two_processes_are_recorded(runs):
    root, _ = runs
    training = json.loads((root / "2 by 2/run.json").read_text())["training"]
    assert (training["num_processes"], training["global_batch_size"]) == (2, 8)
