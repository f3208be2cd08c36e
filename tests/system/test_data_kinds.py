"""Kinds of data that are no set of 8-bit squares, each from its files to samples in its own units, by the commands."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from typer.testing import CliRunner

from hf_ddpm import DDPMPipeline
from hf_ddpm.cli import app
from hf_ddpm.sampling.sampler import FORWARD_BATCH
from tests.support.networks import smallest_unet_config

pytestmark = pytest.mark.slow

RNG = np.random.default_rng(0)
NUM_IMAGES, NUM_SAMPLES = 12, 2
BANDS = RNG.integers(0, 2048, (NUM_IMAGES, 8, 8, 8)).astype(np.uint16)
FIELDS = RNG.normal(-1, 2, (NUM_IMAGES, 2, 8, 8)).astype(np.float32)


def write_png(folder: Path, images: np.ndarray) -> None:
    for i, pixels in enumerate(images):
        Image.fromarray(pixels).save(folder / f"{i}.png")


def write_tiff(folder: Path, images: np.ndarray) -> None:
    for i, planes in enumerate(images):
        tifffile.imwrite(folder / f"{i}.tif", planes, photometric="minisblack", planarconfig="separate")


def write_numpy(folder: Path, images: np.ndarray) -> None:
    np.save(folder / "all.npy", images)


@dataclass(frozen=True)
class Kind:
    """A kind of data.

    Args:
        images: (N, C, H, W), (N, H, W, C) of colors, or (N, H, W).
        write: A folder and images -> files.
        low: The value that 0 of stock diffusers stands for.
        high: The value that 1 of stock diffusers stands for.
        training: Options of `hf-ddpm train`.
        sampling: Options of `hf-ddpm sample`.
        is_validated: Whether training is validated, which takes as long as all else.
    """

    images: np.ndarray
    write: Callable[[Path, np.ndarray], None]
    low: float
    high: float
    training: Sequence[str] = ()
    sampling: Sequence[str] = ()
    is_validated: bool = False

    @property
    def is_of_arrays(self) -> bool:
        """True if a model of this kind returns values in their own units."""
        return self.write is not write_png


KINDS = {
    "oblong colors": Kind(RNG.integers(0, 256, (NUM_IMAGES, 48, 64, 3)).astype(np.uint8), write_png, 0, 255),
    "eight bands": Kind(
        BANDS,
        write_tiff,
        0,
        2047,
        ("--value_range", "0", "2047", "--display_channels", "4", "2", "1"),
        ("--format", "tif"),
        is_validated=True,
    ),
    "signed fields": Kind(
        FIELDS[:, 0], write_numpy, float(FIELDS[:, 0].min()), float(FIELDS[:, 0].max()), ("--stack_axis", "0")
    ),
    "gray of 16 bits": Kind(RNG.integers(0, 65536, (NUM_IMAGES, 8, 8)).astype(np.uint16), write_png, 0, 65535),
    "complex fields": Kind(FIELDS, write_numpy, float(FIELDS.min()), float(FIELDS.max())),
}


def call(*arguments: Any) -> None:
    """Call `hf-ddpm` in this process."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output


def train(kind: Kind, folder: Path) -> Path:
    """Train a model of a kind for two steps, and return its folder."""
    for split, images in (("train", kind.images[:8]), ("test", kind.images[8:])):
        (folder / "data" / split).mkdir(parents=True)
        kind.write(folder / "data" / split, images)
    shape = kind.images.shape[1:]
    if kind.images.ndim == 3:
        shape = (1, *shape)
    elif not kind.is_of_arrays:
        shape = (shape[2], *shape[:2])
    network = smallest_unet_config(channels=shape[0], sample_size=shape[1:])
    (folder / "unet.json").write_text(json.dumps(network))
    settings = {
        "train_data_dir": folder / "data",
        "cache_dir": folder / "cache",
        "model_config_name_or_path": folder / "unet.json",
        "output_dir": folder / "run",
        "ddpm_num_steps": 10,
        "ddpm_num_inference_steps": 1,
        "train_batch_size": 4,
        "max_train_steps": 2,
        "lr_warmup_steps": 1,
        "ema_snapshots": 0,
        "eval_batch_size": 1,
        "cpu_threads_per_process": 1,
        **({"eval_steps": 2, "eval_num_images": 4} if kind.is_validated else {}),
    }
    options = [part for name, value in settings.items() for part in (f"--{name}", value)]
    call("train", *options, "--no_save_figures", *kind.training)
    return folder / "run"


def read(path: Path) -> np.ndarray:
    """Return the sample of a file as numpy, tifffile or Pillow reads it, (H, W, C)."""
    if path.suffix == ".png":
        with Image.open(path) as image:
            pixels = np.asarray(image)
        return pixels if pixels.ndim == 3 else pixels[..., None]
    planes = np.load(path) if path.suffix == ".npy" else tifffile.imread(path)
    return planes.transpose(1, 2, 0)


def values_of(pipeline: Any, generator: Any, count: int, kind: Kind) -> np.ndarray:
    """Return what a pipeline makes, (count, H, W, C) float64, in the units of the data."""
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(count, generator, num_inference_steps=2, output_type="np").images.astype(np.float64)
    is_in_units = isinstance(pipeline, DDPMPipeline) and kind.is_of_arrays
    return images if is_in_units else kind.low + images * (kind.high - kind.low)


@pytest.mark.parametrize("name", KINDS)
def test_kind_comes_back_in_its_own_type_and_range_and_stock_makes_the_same(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    run = train(kind, tmp_path)
    if kind.is_validated:
        (validation,) = [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()]
        assert np.isfinite([validation["kid"], validation["val_loss"]]).all()

    steps = ("--num_inference_steps", 2)
    call("sample", run, "--out", tmp_path / "out", "--num_images", NUM_SAMPLES, *steps, *kind.sampling)
    files = sorted(path for path in (tmp_path / "out").iterdir() if path.stem.isdigit())
    samples = np.stack([read(path) for path in files])
    assert (len(samples), samples.dtype) == (NUM_SAMPLES, kind.images.dtype)
    assert kind.low <= samples.min() < samples.max() <= kind.high

    # A value of integers is rounded, and one that lies between two of them either way.
    rounding = 0.51 if kind.images.dtype.kind == "u" else 1e-5
    pipeline = DDPMPipeline.from_pretrained(run)
    assert (pipeline.value_range is not None) == kind.is_of_arrays
    ours = values_of(pipeline, torch.Generator().manual_seed(1), 2, kind)
    of_stock = values_of(diffusers.DDPMPipeline.from_pretrained(run), torch.Generator().manual_seed(1), 2, kind)
    assert np.abs(ours - of_stock).max() <= rounding
    # Equal bits come from equally large forward passes, of which rounding to pixels hides the difference.
    count = FORWARD_BATCH if kind.is_of_arrays else NUM_SAMPLES
    generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
    ours = values_of(pipeline.use(), generators, count, kind)[:NUM_SAMPLES]
    assert np.abs(ours - samples).max() <= (0 if kind.is_of_arrays else rounding)
