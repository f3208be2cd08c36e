"""What tests of runs read from them."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from hf_ddpm.training.config import TrainingConfig
from tests.support.networks import smallest_unet_config


def pair_settings(folder: Path, channels: int, conditions: int) -> dict[str, Any]:
    """Write the smallest network for images of these channels that are made from others, and return the settings of a
    short run of it that validates, but for its data."""
    config = smallest_unet_config(channels, in_channels=channels + conditions)
    (folder / "unet.json").write_text(json.dumps(config))
    return {
        "eval_steps": 4,
        "eval_num_images": 4,
        "eval_network": "efficientnet-lite0",
        "model_config_name_or_path": str(folder / "unet.json"),
        "output_dir": str(folder / "run"),
        "cache_dir": str(folder / "cache"),
        "train_batch_size": 2,
        "max_train_steps": 4,
        "checkpointing_steps": 2,
        "ddpm_num_steps": 10,
        "ddpm_num_inference_steps": 2,
        "lr_warmup_steps": 0,
        "eval_batch_size": 2,
        "cpu_threads_per_process": 1,
        "ema_snapshots": 0,
    }


def metrics(folder):
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def losses(folder):
    return [line["loss"] for line in metrics(folder)]


def weights(folder):
    return load_file(Path(folder) / "unet/diffusion_pytorch_model.safetensors")


def assert_same_weights(a, b):
    a, b = weights(a), weights(b)
    assert all(torch.equal(a[name], b[name]) for name in a)


def model_file(tmp_path, **changes):
    path = tmp_path / "other_unet.json"
    path.write_text(json.dumps(smallest_unet_config(channels=1, **changes)))
    return str(path)


def part(whole: TrainingConfig) -> TrainingConfig:
    """Return a copy of a run that lost what came after its first checkpoint, as a kill leaves it."""
    parted = replace(whole, output_dir=f"{whole.output_dir}-parted")
    shutil.copytree(whole.output_dir, parted.output_dir)
    for path in (Path(parted.output_dir) / name for name in (f"checkpoint-{whole.max_train_steps}", "unet")):
        shutil.rmtree(path)
    Path(parted.output_dir, "model_index.json").unlink()
    return parted
