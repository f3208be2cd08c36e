"""Images with labels of every kind: a class, a number, both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image


def labeled_images(count: int = 24, size: int = 8, **columns: Any) -> datasets.Dataset:
    """Return gray images with the columns `kind`, `light` (a number, the mean of the image) and further ones.

    Images are of one value with a little noise, which rises from image to image.
    """
    rng = np.random.default_rng(0)
    values = np.linspace(40, 215, count)
    pixels = [np.clip(value + rng.normal(0, 4, (size, size)), 0, 255).astype(np.uint8) for value in values]
    table = {
        "image": [Image.fromarray(each) for each in pixels],
        "kind": [("even", "odd")[i % 2] for i in range(count)],
        "light": [float(value) / 255 for value in values],
        **columns,
    }
    return datasets.Dataset.from_dict(table).cast_column("image", datasets.Image())


def save_labeled(folder: Path, count: int = 24, **columns: Any) -> str:
    """Save such images as `datasets` does, and return the name of the folder."""
    labeled_images(count, **columns).save_to_disk(str(folder))
    return str(folder)
