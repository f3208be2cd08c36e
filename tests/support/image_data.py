"""Images of every kind on disk, and the caches and batches that are made of them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hf_ddpm.data.batches import MicroBatches
from hf_ddpm.data.cache import ImageCache
from hf_ddpm.data.config import DataConfig
from hf_ddpm.data.images import load_images


def noise(height: int, width: int, channels: int = 0, seed: int = 0, high: int = 256) -> np.ndarray:
    """Return random pixels in [0, high): (height, width) or (height, width, channels), uint8 or uint16."""
    shape = (height, width, channels) if channels else (height, width)
    return np.random.default_rng(seed).integers(0, high, shape).astype(np.uint16 if high > 256 else np.uint8)


def png(values: np.ndarray) -> bytes:
    """Return an array of pixels as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


def save_grays(folder: Path, count: int, size: int = 8) -> list[np.ndarray]:
    """Save square gray images of noise, and return their pixels in the order of their names."""
    arrays = [noise(size, size, seed=i) for i in range(count)]
    folder.mkdir(parents=True, exist_ok=True)
    for i, values in enumerate(arrays):
        Image.fromarray(values).save(folder / f"{i:03}.png")
    return arrays


def sort_into_kinds(images: Path, folder: Path, names: Sequence[str]) -> Path:
    """Copy images in turn into folders of these names, which are their classes, and return `folder`."""
    for i, path in enumerate(sorted(images.iterdir())):
        kind = folder / names[i % len(names)]
        kind.mkdir(parents=True, exist_ok=True)
        (kind / path.name).write_bytes(path.read_bytes())
    return folder


def cache_config(path: Path | None, /, **settings: Any) -> DataConfig:
    """Return settings for a folder, with a cache beside it; further settings override them."""
    if path is not None:
        settings = {"dataset_name": str(path), "cache_dir": str(path.parent / "cache"), **settings}
    return DataConfig(**settings)


def load_one(folder: Path, image: Image.Image, suffix: str = "png", /, **settings: Any) -> np.ndarray:
    """Save an image, with the options `save` if they are given, and load it through a cache: (C, h, w)."""
    image.save(folder / f"a.{suffix}", **settings.pop("save", {}))
    images = load_images(cache_config(folder, **settings))
    assert len(images) == 1
    assert images.channels == images.image(0).shape[0]
    return images.image(0)


def micro_batches(images: ImageCache, **settings: Any) -> MicroBatches:
    """Return 10 micro-batches of 4 images on one process; settings override that."""
    defaults = {"seed": 0, "random_flip": False, "batch_size": 4, "accumulation_steps": 1, "rank": 0}
    return MicroBatches(images, **{**defaults, "num_processes": 1, "first_position": 0, "num_steps": 10, **settings})
