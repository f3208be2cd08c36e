"""Small models, data and settings that the tests share.

What takes seconds to import is imported where it is used: the process that hands out the tests needs none of it.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from tests.support.networks import smallest_unet_config, tiny_unet_config

if TYPE_CHECKING:
    from diffusers import UNet2DModel

gc.disable()  # until all is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop():
    """Fork the process from which others fork before anything happens here; if these tests need any."""
    gc.freeze()  # else each full collection visits all that was imported, which is a million objects
    gc.enable()
    if "PYTEST_XDIST_WORKER" in os.environ:
        # All is reported by then. Python would take seconds to delete what the tests imported, object by object.
        atexit.register(os._exit, 0)
    forks = sys.modules.get("tests.support.forks")
    if forks is None:
        return (yield)
    with forks.mother_of_processes():
        return (yield)


@pytest.fixture(scope="session", autouse=True)
def one_thread_at_first():
    """Several test processes on a few cores are slower with more threads."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def one_thread():
    """Training sets the number of threads, on which the last bits of results depend."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def make_unet():
    """A function: channels, size and config changes -> a small random UNet2DModel in eval mode."""
    import torch
    from diffusers import UNet2DModel

    def make(channels: int = 3, size: int = 8, seed: int = 0, **changes) -> UNet2DModel:
        torch.manual_seed(seed)
        return UNet2DModel(**tiny_unet_config(channels, size, **changes)).eval()

    return make


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory) -> Path:
    """24 gray images of 8x8 pixels."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(24):
        Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(folder / f"{i:02d}.png")
    return folder


@pytest.fixture
def tiny_settings(tmp_path, image_folder) -> dict:
    """Settings of a run that takes a second."""
    model = tmp_path / "unet.json"
    model.write_text(json.dumps(smallest_unet_config(channels=1)))
    return {
        "train_data_dir": str(image_folder),
        "cache_dir": str(image_folder.parent / "cache"),
        "model_config_name_or_path": str(model),
        "output_dir": str(tmp_path / "run"),
        "ddpm_num_steps": 20,
        "ddpm_num_inference_steps": 4,
        "train_batch_size": 4,
        "max_train_steps": 6,
        "lr_warmup_steps": 2,
        "checkpointing_steps": 3,
        "eval_batch_size": 4,
        "logging_steps": 1,
        "ema_snapshots": 2,
        "save_figures": False,
        "cpu_threads_per_process": 1,
    }
