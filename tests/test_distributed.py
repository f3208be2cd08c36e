"""Two processes and one compute the same, through Accelerate's launcher with gloo on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageChops
from safetensors.torch import load_file

from .conftest import tiny_unet_config

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
    """The same 20 steps of 8 images, by one process at once, and by two processes."""
    root = tmp_path_factory.mktemp("distributed")
    model = root / "unet.json"
    model.write_text(json.dumps(tiny_unet_config(channels=1)))
    common = [
        *("--dataset_name", "digits", "--model_config_name_or_path", model, "--max_train_steps", 20),
        *("--ddpm_num_steps", 20, "--logging_steps", 1, "--checkpointing_steps", 10, "--eval_batch_size", 3),
        *("--random_flip", "--cache_dir", root / "cache", "--lr_warmup_steps", 5),
    ]
    one = launch(1, root / "one", "--train_batch_size", 8, *common)
    two = launch(2, root / "two", "--train_batch_size", 4, *common)
    return root, one, two


def test_loss_traces_agree(runs):
    _, one, two = runs
    assert len(one) == 20
    assert [m["loss"] for m in two] == pytest.approx([m["loss"] for m in one], abs=1e-5)
    for key in ("lr", "ema_decay", "images"):
        assert [m[key] for m in two] == [m[key] for m in one]


def test_weights_and_previews_agree(runs):
    root, _, _ = runs
    a, b = (load_file(root / run / "unet/diffusion_pytorch_model.safetensors") for run in ("one", "two"))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-4)
    pictures = [Image.open(root / run / "previews/step-0000020.png").convert("L") for run in ("one", "two")]
    assert ImageChops.difference(*pictures).getextrema()[1] <= 1


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
    root, _, _ = runs
    training = json.loads((root / "two/run.json").read_text())["training"]
    assert (training["num_processes"], training["global_batch_size"]) == (2, 8)
