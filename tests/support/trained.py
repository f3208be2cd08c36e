"""What tests of runs read from them."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.support.networks import smallest_unet_config


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
