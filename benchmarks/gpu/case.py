"""What all parts share: the device, the networks and images at two sizes, a run that is ready to take steps."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hf_ddpm.data.image_folder import listed_once
from hf_ddpm.runtime.processes import Processes
from hf_ddpm.training.checkpoint import Progress
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.parsing import load_config
from hf_ddpm.training.parts import Parts
from hf_ddpm.training.run import Run
from hf_ddpm.training.setup import LONGEST_WAIT, build_run, make_accelerator, restored_process
from tests.support.networks import tiny_unet_config


@dataclass(frozen=True)
class Measured:
    """What was measured: a number with its unit, or a word: equal, differs, passed."""

    what: str
    value: float | str
    unit: str = ""
    note: str = ""


@dataclass(frozen=True)
class Case:
    """The device, and whether networks are tiny."""

    device: str
    is_small: bool

    @property
    def side(self) -> int:
        return 16 if self.is_small else 32

    @property
    def batch(self) -> int:
        return 8 if self.is_small else 128

    @property
    def precisions(self) -> tuple[str, ...]:
        """The precisions of training; fp16 needs a GPU."""
        return ("bf16", "no", "fp16") if self.device == "cuda" else ("bf16", "no")


@contextmanager
def settings_of(name: str, case: Case) -> Iterator[dict[str, Any]]:
    """Write random images and give the settings of a run on them, for the duration of a `with` block.

    Args:
        name: `recipe` for cifar10-ddpm, `default` for the network that is sized for the data.
        case: The device and the size.
    """
    with tempfile.TemporaryDirectory() as folder:
        pixels = np.random.default_rng(0).integers(0, 256, (512, case.side, case.side, 3), dtype=np.uint8)
        Path(folder, "images").mkdir()
        for i, image in enumerate(pixels):
            Image.fromarray(image).save(f"{folder}/images/{i:03d}.png")
        settings: dict[str, Any] = {
            "train_data_dir": f"{folder}/images",
            "cache_dir": f"{folder}/cache",
            "output_dir": f"{folder}/run",
            "resolution": case.side,
            "random_flip": True,
            "train_batch_size": case.batch,
        }
        if case.device == "cpu":  # tiny networks are slower with more, most of all beside other work
            settings["cpu_threads_per_process"] = 1
        if name == "recipe":
            settings["recipe"] = "cifar10-ddpm"
        if case.is_small:
            Path(folder, "unet.json").write_text(json.dumps(tiny_unet_config(3, case.side)))
            settings["model_config_name_or_path"] = f"{folder}/unet.json"
        yield settings


@contextmanager
def open_run(settings: dict[str, Any], precision: str, compile: bool = False) -> Iterator[tuple[Run, Progress]]:
    """Build a run that takes steps and writes nothing, for the duration of a `with` block."""
    config: TrainingConfig = load_config(mixed_precision=precision, compile=compile, **settings)
    with restored_process():
        accelerator = make_accelerator(config)
        with listed_once():
            run, progress = build_run(config, accelerator, Processes(LONGEST_WAIT), Parts())
        yield run, progress
        accelerator.state.destroy_process_group()
