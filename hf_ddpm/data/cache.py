"""A data set -> batches of x_0, in an order that is a function of (seed, images seen).

source       `digits`, a folder of images or of parquet files, a folder saved by `datasets`, or a Hub id
cache        each image decoded and resized once: C*h*w values of uint8 or uint16, all back to back in one mapped file
stream       the N images without end: position p is image epoch_order(seed, p // N, N)[p % N]
micro-batch  B positions of the stream for one process; a step is A * P of them (A: accumulation steps, P: processes)
x_0          (B, C, R, R) float32 in [-1, 1], R being the resolution
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import uuid
from array import array
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub
import numpy as np
from huggingface_hub.utils import tqdm

from hf_ddpm.data.config import DataConfig
from hf_ddpm.data.decoding import (
    ImageFormat,
    NeedsSixteenBits,
    decode,
    infer_format,
    is_transient,
    name_of,
    unreadable,
)
from hf_ddpm.data.sources import files_below, find_source, license_of, open_dataset
from hf_ddpm.runtime.errors import UsageError

if TYPE_CHECKING:
    from datasets import Dataset

CACHE_FORMAT = 1


@dataclass(frozen=True, eq=False)
class ImageCache:
    """N images of `channels` planes, their shorter side equal to `resolution`; all square if they were cropped.

    Args:
        pixels: all values back to back, uint8 or uint16, mapped from the file.
        index: (N, 3) int64, for each image the offset of its first value, its height and its width.
        max_value: 255, or 65535 where 16-bit images keep their precision.
        labels: (N,) int64 in [0, num_classes), or None.
        class_names: what the labels stand for, where the data say it.
        num_bad: unreadable images that were left out.
        fingerprint: sha256 of pixels, shapes and labels, the same wherever the images lie.
    """

    pixels: np.ndarray
    index: np.ndarray
    channels: int
    max_value: int
    resolution: int
    labels: np.ndarray | None
    class_names: list[str] | None
    num_bad: int
    fingerprint: str
    name: str
    license: str | None

    def __len__(self) -> int:
        return len(self.index)

    @property
    def num_images(self) -> int:
        return len(self)

    @property
    def num_classes(self) -> int | None:
        """Labels are in [0, num_classes); None without labels."""
        if self.labels is None:
            return None
        return len(self.class_names) if self.class_names else int(self.labels.max()) + 1

    @cached_property
    def is_uniform(self) -> bool:
        """Whether all images are resolution x resolution."""
        return bool((self.index[:, 1:] == self.resolution).all())

    def image(self, i: int) -> np.ndarray:
        """Image i: (C, h, w), a read-only view of the file."""
        offset, height, width = self.index[i].tolist()
        shape = (self.channels, height, width)
        return np.asarray(self.pixels[offset : offset + self.channels * height * width]).reshape(shape)

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        if isinstance(self.pixels, np.memmap):  # it would be pickled with all its values
            state["pixels"] = (str(self.pixels.filename), self.pixels.dtype)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if isinstance(state["pixels"], tuple):
            path, dtype = state["pixels"]
            self.__dict__["pixels"] = np.memmap(path, dtype=dtype, mode="r")


def load_images(config: DataConfig) -> ImageCache:
    """The images of `config`, decoded and resized on the first call and mapped into memory on all later ones.

    Gray data have 1 channel, others 3; transparency is composited over white unless `channels` is 4. Images of 16 bits
    per channel keep them if they are gray and `preserve_input_precision`; Pillow reads 16-bit color as 8-bit. Of an
    animation the first frame counts. The shorter side becomes `resolution`; `center_crop` cuts the rest off.

    Raises:
        UsageError: as `open_dataset`; an image is unreadable and `on_bad_image` is "raise", or none is readable;
            `resolution` or `channels` is left open and the images do not decide it.
    """
    source = find_source(config)
    if source.folder is None:
        dataset = open_dataset(config)
        identity: Any = dataset._fingerprint
    else:
        dataset = None
        stats = ((path, path.stat() if path.exists() else path.lstat()) for path in files_below(source.folder))
        identity = [(str(path.absolute()), stat.st_size, stat.st_mtime_ns) for path, stat in stats]
    root = Path(config.cache_dir or huggingface_hub.constants.HF_HOME).expanduser() / "hf_ddpm"
    folder = root / _cache_key(config, source.kind, identity)
    if not folder.is_dir():
        dataset = open_dataset(config) if dataset is None else dataset
        part = root / f"{folder.name}.{uuid.uuid4().hex}.part"
        try:
            part.mkdir(parents=True)
        except OSError as error:
            raise UsageError(f"cache_dir must be a folder to write to, got {str(root.parent)!r}: {error}") from error
        try:
            form = _find_form(dataset, config)
            try:
                meta = _write_cache(part, dataset, form)
            except NeedsSixteenBits:
                form = ImageFormat(config, form.resolution, form.channels, 65535)
                meta = _write_cache(part, dataset, form)
            meta["license"] = license_of(source, dataset)
            (part / "meta.json").write_text(json.dumps(meta))
            try:
                if folder.is_symlink():  # to a folder that somebody has deleted
                    folder.unlink()
                part.rename(folder)
            except OSError:  # another process was first, and wrote the same
                if not folder.is_dir():
                    raise
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UsageError(
                f"the decoded images do not fit on the disk of {str(root)!r}: {error}; free space, or give another "
                "--cache_dir, a smaller --resolution, or --streaming, which keeps none"
            ) from error
        finally:
            shutil.rmtree(part, ignore_errors=True)
    images = _read_cache(folder, source.name)
    # A run writes what was decided here into its config: with that, too, nothing is decoded again.
    decided = replace(config, resolution=images.resolution, channels=images.channels)
    alias = root / _cache_key(decided, source.kind, identity)
    if not alias.exists():
        with contextlib.suppress(OSError):  # a file system without links
            alias.symlink_to(folder.name, target_is_directory=True)
    return images


def _cache_key(config: DataConfig, kind: str, identity: Any) -> str:
    """A hash of all that decides what a cache holds."""
    settings = ("dataset_config_name", "image_column", "label_column", "resolution", "channels", "center_crop")
    settings += ("preserve_input_precision", "on_bad_image")
    decisive = [CACHE_FORMAT, kind, identity, *(getattr(config, name) for name in settings)]
    return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:32]


def _read_cache(folder: Path, name: str) -> ImageCache:
    try:
        meta = json.loads((folder / "meta.json").read_text())
        index = np.load(folder / "index.npy")
        labels = np.load(folder / "labels.npy") if (folder / "labels.npy").exists() else None
        dtype, size = np.dtype(meta.pop("dtype")), meta.pop("size")
        pixels = np.memmap(folder / "pixels.bin", dtype=dtype, mode="r", shape=(size,))
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"cache_dir must hold whole files, got a damaged {str(folder)!r}: delete it") from error
    return ImageCache(pixels=pixels, index=index, labels=labels, name=name, **meta)


def _find_form(dataset: Dataset, config: DataConfig) -> ImageFormat:
    cells = ((row, dataset[row][dataset.column_names[0]]) for row in range(len(dataset)))
    return infer_format(((name_of(cell, row), cell) for row, cell in cells), config)


def _write_cache(folder: Path, dataset: Dataset, form: ImageFormat) -> dict[str, Any]:
    labels, class_names = _find_classes(dataset)
    dtype = np.dtype("<u2" if form.max_value == 65535 else "u1")
    digest = hashlib.sha256(f"{form.channels} {form.max_value}".encode())
    entries, rows, size = array("q"), array("q"), 0
    with open(folder / "pixels.bin", "wb") as file:
        progress = tqdm(_decoded(dataset, form), "Decoding", len(dataset), unit="image", disable=len(dataset) < 2000)
        for row, pixels in enumerate(progress):
            if pixels is None:
                continue
            content = np.ascontiguousarray(pixels, dtype).tobytes()
            file.write(content)
            digest.update(content)
            entries.extend((size, pixels.shape[1], pixels.shape[2]))
            rows.append(row)
            size += pixels.size
    if not rows:
        raise UsageError(f"on_bad_image='skip' must leave some images, got {len(dataset)} unreadable ones only")
    index = np.array(entries, "<i8").reshape(-1, 3)
    np.save(folder / "index.npy", index)
    digest.update(index.tobytes())
    if labels is not None:
        labels = labels[np.array(rows)]
        np.save(folder / "labels.npy", labels)
        digest.update(labels.tobytes())
    return {
        "channels": form.channels,
        "max_value": form.max_value,
        "resolution": form.resolution,
        "class_names": class_names,
        "num_bad": len(dataset) - len(rows),
        "fingerprint": digest.hexdigest(),
        "dtype": dtype.str,
        "size": size,
    }


def _find_classes(dataset: Dataset) -> tuple[np.ndarray | None, list[str] | None]:
    if len(dataset.column_names) == 1:
        return None, None
    column = dataset.column_names[1]
    values: list[Any] = dataset.select_columns([column])[:][column]
    names: list[str] | None = getattr(dataset.features[column], "names", None)
    allowed = set(range(len(names))) if names is not None else set(values) - {None}
    for row, value in enumerate(values):
        if value not in allowed:
            raise UsageError(f"label_column must give each image a class, got {value} in row {row} of {column!r}")
    if names is None:
        distinct = sorted(allowed)
        if distinct != list(range(len(distinct))):
            names, number = [str(value) for value in distinct], {value: i for i, value in enumerate(distinct)}
            values = [number[value] for value in values]
    return np.array(values, "<i8"), names


def _decoded(dataset: Dataset, form: ImageFormat, rows_per_task: int = 16) -> Iterator[np.ndarray | None]:
    num_threads = max(2, min(8, os.cpu_count() or 2))
    column, tasks = dataset.column_names[0], deque()
    with ThreadPoolExecutor(num_threads) as pool:
        for row in range(0, len(dataset), rows_per_task):
            tasks.append(pool.submit(_decode_rows, dataset[row : row + rows_per_task][column], row, form))
            if len(tasks) > 2 * num_threads:
                yield from tasks.popleft().result()
        while tasks:
            yield from tasks.popleft().result()


def _decode_rows(cells: list[Any], first_row: int, form: ImageFormat) -> list[np.ndarray | None]:
    decoded: list[np.ndarray | None] = []
    for row, cell in enumerate(cells, first_row):
        try:
            decoded.append(decode(cell, name_of(cell, row), form))
        except (UsageError, NeedsSixteenBits):
            raise
        except Exception as error:  # Pillow's decoders raise nearly anything on broken files
            if form.config.on_bad_image == "raise" or is_transient(error):
                raise unreadable(name_of(cell, row), error) from error
            decoded.append(None)
    return decoded
