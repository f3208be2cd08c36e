"""The files of a set of images, by format, which any number of processes write.

metadata.jsonl  of a set of single files: the seed of each, and its class; of PNG files, `datasets` and
                `--dataset_name` read them
units           the values of a model of arrays, in the type of its data; a PNG file holds few of them
group           the images that one process writes together: one file, or a part file of many images
"""

from __future__ import annotations

import io
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hf_ddpm.data.columns import column_of_arrays
from hf_ddpm.figures import png_bytes
from hf_ddpm.names import ARRAY_FILE_FORMATS
from hf_ddpm.runtime.files import write_atomically
from hf_ddpm.sampling.sampler import FORWARD_BATCH

GRID_IMAGES = 64
# What a set calls its own columns, and numpy an argument.
_TAKEN_NAMES = ("file_name", "image", "seed", "seeds", "labels", "arr_0", "file", "allow_pickle")
# The formats of which a file holds one image.
FILE_FORMATS = ("png", *ARRAY_FILE_FORMATS)
# A set is written in at most MAX_PARTS part files, unless they would then hold more than MAX_PART_IMAGES each.
MAX_PARTS, MAX_PART_IMAGES = 64, 1024


class FileSet:
    """A set as one file per image.

    Args:
        out: The folder of the set.
        seed: The seed of the first image.
        labels: The label of each image in columns of a table, by their names; none if the model has no labels.
        num_images: The number of images in the set.
        format: One of FILE_FORMATS.
    """

    def __init__(self, out: Path, seed: int, labels: Mapping[str, Sequence[Any]], num_images: int, format: str):
        self.out, self.seed, self.labels, self.format = out, seed, labels, format
        self.names = [f"{seed + i:06d}.{format}" for i in range(num_images)]

    def existing(self) -> list[Path]:
        """Return the files of the set that exist."""
        names = set(os.listdir(self.out)) if self.out.is_dir() else set()
        return [self.out / name for name in ["grid.png", "metadata.jsonl", *self.names] if name in names]

    def missing_groups(self) -> list[int]:
        """Return the numbers of the images that have no file; an image is a group of its own."""
        existing = set(self.existing())
        return [i for i, name in enumerate(self.names) if self.out / name not in existing]

    def members(self, group: int) -> range:
        """Return the numbers of the images in a group."""
        return range(group, group + 1)

    def add(self, indices: Sequence[int], images: np.ndarray) -> None:
        """Write the images with these numbers, (B, H, W, C) uint8, uint16 or in the type of a model of arrays."""
        for i, image in zip(indices, images, strict=True):
            write_atomically(self.out / self.names[i], file_content(image, self.format))

    def finish(self) -> list[np.ndarray]:
        """Write the metadata, when all images are written, and return the first GRID_IMAGES of them."""
        rows = []
        for i, name in enumerate(self.names):
            label = {column: labels[i] for column, labels in self.labels.items()}
            rows.append(json.dumps({"file_name": name, "seed": self.seed + i, **label}) + "\n")
        write_atomically(self.out / "metadata.jsonl", "".join(rows))
        return [_read_file(self.out / name) for name in self.names[:GRID_IMAGES]]


class PartFiles:
    """A set as files of many images: Parquet files, or NumPy files that `finish` makes into one.

    Args:
        out: The folder of the set.
        seed: The seed of the first image.
        labels: The label of each image in columns of a table, by their names; none if the model has no labels.
        num_images: The number of images in the set.
        format: "parquet" or "npz".
        dtype: The type of the values of a model of arrays; None for other models.
    """

    def __init__(
        self,
        out: Path,
        seed: int,
        labels: Mapping[str, Sequence[Any]],
        num_images: int,
        format: str,
        dtype: str | None = None,
    ):
        self.out, self.seed, self.labels, self.num_images, self.format = out, seed, labels, num_images, format
        self.dtype = dtype
        # Whole forward passes, so that none is filled up.
        forward_passes_per_part = -(-num_images // (MAX_PARTS * FORWARD_BATCH))
        self.part_images = min(MAX_PART_IMAGES, FORWARD_BATCH * forward_passes_per_part)
        num_parts = -(-num_images // self.part_images)
        stem = "data/train" if format == "parquet" else "parts/part"
        self.files = [out / f"{stem}-{k:05d}-of-{num_parts:05d}.{format}" for k in range(num_parts)]
        self.whole_file = out / "samples.npz"
        self.unwritten: dict[int, np.ndarray] = {}

    def existing(self) -> list[Path]:
        """Return the files of the set that exist."""
        return [path for path in [self.out / "grid.png", self.whole_file, *self.files] if path.exists()]

    def missing_groups(self) -> list[int]:
        """Return the numbers of the parts that have no file."""
        existing = set(self.existing())
        if self.whole_file in existing:
            return []
        return [k for k, path in enumerate(self.files) if path not in existing]

    def members(self, group: int) -> range:
        """Return the numbers of the images in a part."""
        return range(group * self.part_images, min((group + 1) * self.part_images, self.num_images))

    def add(self, indices: Sequence[int], images: np.ndarray) -> None:
        """Take the images with these numbers, as of `FileSet.add`, and write each part that is then whole."""
        self.unwritten.update(zip(indices, images, strict=True))
        for part in sorted({i // self.part_images for i in self.unwritten}):
            members = self.members(part)
            if all(i in self.unwritten for i in members):
                pixels = np.stack([self.unwritten.pop(i) for i in members])
                encode = self._parquet if self.format == "parquet" else self._npz
                write_atomically(self.files[part], encode(members, pixels))

    def _npz(self, members: Sequence[int], pixels: np.ndarray) -> bytes:
        columns = {"arr_0": pixels, "seeds": np.array([self.seed + i for i in members])}
        for name, labels in self.labels.items():
            hidden = "" if _dtype(labels) == "string" else math.nan
            of_members = [hidden if labels[i] is None else labels[i] for i in members]
            columns["labels" if name == "label" else name] = np.array(of_members)
        content = io.BytesIO()
        np.savez(content, **columns)  # pyright: ignore[reportArgumentType]
        return content.getvalue()

    def _parquet(self, members: Sequence[int], pixels: np.ndarray) -> bytes:
        import pyarrow as pa
        import pyarrow.parquet as pq

        seeds = [self.seed + i for i in members]
        columns, features = {}, {}
        columns["image"], features["image"] = _cells(pixels, seeds, self.dtype is not None)
        columns["seed"], features["seed"] = pa.array(seeds, pa.int64()), {"dtype": "int64", "_type": "Value"}
        for name, labels in self.labels.items():
            dtype = _dtype(labels)
            columns[name] = pa.array([labels[i] for i in members], getattr(pa, dtype)())
            features[name] = {"dtype": dtype, "_type": "Value"}
        # `datasets` writes this metadata, too, and takes a column for images by it alone.
        metadata = {"huggingface": json.dumps({"info": {"features": features}})}
        content = io.BytesIO()
        pq.write_table(pa.table(columns).replace_schema_metadata(metadata), content)
        return content.getvalue()

    def finish(self) -> list[np.ndarray]:
        """Return the first GRID_IMAGES images of the set, when all parts are written; make NumPy parts into one."""
        if self.format == "parquet":
            return self._first_of_parquet()
        if not self.whole_file.exists():
            parts = [np.load(path)["arr_0"] for path in self.files]
            write_atomically(self.whole_file, self._npz(range(self.num_images), np.concatenate(parts)))
        shutil.rmtree(self.out / "parts", ignore_errors=True)
        return [*np.load(self.whole_file)["arr_0"][:GRID_IMAGES]]

    def _first_of_parquet(self) -> list[np.ndarray]:
        import pyarrow.parquet as pq

        images: list[np.ndarray] = []
        for path in self.files[: -(-GRID_IMAGES // self.part_images)]:
            for cell in pq.read_table(path, columns=["image"])["image"].to_pylist():
                if self.dtype is not None:
                    images.append(np.asarray(cell, self.dtype).transpose(1, 2, 0))
                    continue
                with Image.open(io.BytesIO(cell["bytes"])) as image:
                    images.append(_pixels(image))
        return images[:GRID_IMAGES]


def column_name(name: str) -> str:
    """Return the name of a column of labels beside those of a set."""
    return f"label_{name}" if name in _TAKEN_NAMES else name


def _dtype(labels: Sequence[Any]) -> str:
    """Return the type of a column of labels, as Arrow and `datasets` call it."""
    present = [label for label in labels if label is not None]
    if present and isinstance(present[0], str):
        return "string"
    return "int64" if present and isinstance(present[0], int) else "float64"


def file_content(image: np.ndarray, format: str) -> bytes:
    """Return the content of a file of one image, (H, W, C)."""
    if format == "png":
        return png_bytes(_picture(image))
    planes, content = np.ascontiguousarray(image.transpose(2, 0, 1)), io.BytesIO()
    if format == "npy":
        np.save(content, planes)
    else:
        import tifffile

        # A plane for each channel, which no reader takes for colors.
        layout = "separate" if len(planes) > 1 else None
        tifffile.imwrite(content, planes, photometric="minisblack", metadata=None, planarconfig=layout)
    return content.getvalue()


def _read_file(path: Path) -> np.ndarray:
    """Return the image of a file, (H, W, C)."""
    if path.suffix == ".png":
        with Image.open(path) as image:
            return _pixels(image)
    if path.suffix == ".npy":
        planes = np.load(path)
    else:
        import tifffile

        planes = tifffile.imread(path)
    return (planes[None] if planes.ndim == 2 else planes).transpose(1, 2, 0)


def _cells(pixels: np.ndarray, seeds: Sequence[int], is_of_arrays: bool) -> tuple[Any, dict[str, Any]]:
    """Return the column of images of a parquet file, and what `datasets` calls it: pictures, or arrays (C, H, W)."""
    import pyarrow as pa

    if not is_of_arrays:
        pictures = map(_picture, pixels)
        images = [{"bytes": png_bytes(p), "path": f"{s:06d}.png"} for s, p in zip(seeds, pictures, strict=True)]
        return pa.array(images, pa.struct({"bytes": pa.binary(), "path": pa.string()})), {"_type": "Image"}
    return column_of_arrays(pixels.transpose(0, 3, 1, 2))


def _picture(image: np.ndarray) -> Image.Image:
    """Return (H, W, C) uint8, or (H, W, 1) uint16, as a picture."""
    return Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else np.ascontiguousarray(image))


def _pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).reshape(image.height, image.width, -1)
