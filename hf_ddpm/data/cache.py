"""The cache: all images of a data set, decoded and resized once, back to back in one file that is mapped into memory.

cache folder   <cache_dir>/hf_ddpm/<key>; the key is a hash of the images' files and of the settings that shape them
pixels.bin     the planes of all images, one image after the other: uint8 or uint16, or arrays in their own type
index.npy      for each image, where it begins in pixels.bin, its height and its width
labels.npy     the label of each image, if there are labels
meta.json      everything else that `ImageCache` holds
fingerprint    a hash of pixels, shapes and labels: what a resumed run compares
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
import uuid
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from mmap import mmap
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from huggingface_hub.utils import tqdm

from hf_ddpm.data.arrays import (
    SETTINGS_OF_BOTH,
    count_outside,
    quantiles,
    require_no_array_settings,
    value_range_of,
)
from hf_ddpm.data.columns import choose_columns, encoded_images
from hf_ddpm.data.config import DataConfig, cache_folder
from hf_ddpm.data.decoding import (
    Decoded,
    decode,
    infer_format,
    is_transient,
    name_of,
    unreadable_image_error,
)
from hf_ddpm.data.given import NAME
from hf_ddpm.data.held_out import HELD_OUT_FORMAT
from hf_ddpm.data.image_folder import files_below, list_images
from hf_ddpm.data.image_format import ImageFormat
from hf_ddpm.data.labels import LabelColumn, RawLabels, find_labels
from hf_ddpm.data.planes import NeedsSixteenBits
from hf_ddpm.data.sources import Source, find_source, metadata_of
from hf_ddpm.data.tables import license_of, open_dataset
from hf_ddpm.data.volumes import with_slices
from hf_ddpm.image_size import Size, format_size, to_resolution, to_size
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.runtime.files import lock
from hf_ddpm.runtime.format import format_amount
from hf_ddpm.value_range import Scale, ValueRange, check_display_channels

if TYPE_CHECKING:
    from datasets import Dataset

CACHE_FORMAT = 5  # Increase it when the content of a cache changes, so that no older cache is read.
ROWS_PER_TASK = 16
ROWS_PER_TASK_OF_CROPS = 1  # Whole images are large, and those of all tasks are in memory at once.
Accept = Callable[[Size, int, str | None], None]
# The settings that decide what a cache holds.
CACHED_SETTINGS = (
    "dataset_config_name",
    "train_split",
    "image_column",
    "label_column",
    "resolution",
    "channels",
    "center_crop",
    "value_range",
    "preserve_input_precision",
    "on_bad_image",
    "max_image_pixels",
)


@dataclass(frozen=True, eq=False)
class ImageCache:
    """N decoded images, each at least as large as `size`; all of that size if they were cropped.

    Args:
        pixels: All values back to back, uint8 or uint16, of arrays in their own type, mapped from the file.
        index: (N, 3) int64; for each image the offset of its first value, its height and its width. It is mapped, too.
        channels: The number of planes of each image: 1, 3 or 4, of arrays any number.
        max_value: 255, or 65535 where 16-bit images keep their precision.
        size: Height and width of x_0, to which larger images are cropped when they are read.
        labels: The raw labels of data/labels.py, or what `with_network_labels` makes of them; None without labels.
        class_names: The names of the classes of one column of classes; None where the data do not tell them.
        num_bad: The number of unreadable images that were left out.
        losses: What files hold and the planes do not -> of how many images, see `losses_of`.
        limits: The smallest and the largest value of all planes.
        file_max: The largest value that the files can hold: 255 or 65535.
        fingerprint: The sha256 of pixels, shapes and labels; it is the same wherever the images lie.
        name: The name of the source.
        license: The license of the data; None if unknown.
        conditions: With `condition_column`, the image that each image is made from: N images, each of the height and
            width of its image, or arrays as the images are; then `fingerprint` is one of both.
        label_columns: What the columns of raw labels hold; None for one column of classes, for none, and for labels
            of a network.
        random_crop: Whether images have the size of their files, for `random_crop`.
        value_range: The values of arrays that become -1 and 1; None for images.
        num_clipped: How many values of arrays lie outside, and are clipped.
    """

    pixels: np.ndarray
    index: np.ndarray
    channels: int
    max_value: int
    size: Size
    labels: np.ndarray | None
    class_names: list[str] | None
    num_bad: int
    losses: dict[str, int]
    limits: tuple[float, float]
    file_max: int
    fingerprint: str
    name: str
    license: str | None
    conditions: ImageCache | None = None
    label_columns: list[LabelColumn] | None = None
    random_crop: bool = False
    value_range: ValueRange | None = None
    num_clipped: int = 0

    def __len__(self) -> int:
        return len(self.index)

    @property
    def scale(self) -> Scale:
        """The largest value of a pixel, or the range of values, that -1 and 1 stand for."""
        return self.value_range or self.max_value

    @property
    def num_images(self) -> int:
        """The number of images, N."""
        return len(self)

    @property
    def num_classes(self) -> int | None:
        """The number of classes of one column of classes; None without it."""
        if self.labels is None or self.labels.dtype != np.int64:
            return None
        return len(self.class_names) if self.class_names else int(self.labels.max()) + 1

    @cached_property
    def is_uniform(self) -> bool:
        """True if all images are of the size of x_0."""
        return bool((self.index[:, 1:] == self.size).all())

    def image(self, i: int) -> np.ndarray:
        """Return the planes of image i, (C, h, w), as a read-only view of the file."""
        offset, height, width = self.index[i].tolist()
        shape = (self.channels, height, width)
        return np.asarray(self.pixels[offset : offset + self.channels * height * width]).reshape(shape)

    def in_range(self, values: ValueRange) -> ImageCache:
        """Return the same arrays, of which -1 and 1 stand for other values; what lies outside is counted."""
        is_inside = values.low <= self.limits[0] and self.limits[1] <= values.high
        return replace(self, value_range=values, num_clipped=0 if is_inside else count_outside(self.pixels, values))

    def __getstate__(self) -> dict[str, Any]:
        return {name: _as_file(value) for name, value in self.__dict__.items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            self.__dict__[name] = np.memmap(*value) if isinstance(value, _MappedFile) else value


class _MappedFile(NamedTuple):
    """The arguments with which `np.memmap` maps a file."""

    filename: str
    dtype: np.dtype
    mode: Literal["r"]
    offset: int
    shape: tuple[int, ...]


def _as_file(value: Any) -> Any:
    """Return the file of a mapped array, which would be pickled with all its values; another value as it is."""
    if isinstance(value, np.memmap) and isinstance(value.base, mmap):  # a part of one has the filename, too
        return _MappedFile(str(value.filename), value.dtype, "r", value.offset, value.shape)
    return value


def files_of(source: Source, config: DataConfig) -> Any:
    """Return what tells that a file of a source changed; None for the Hub."""
    if source.folder is None:
        return None
    elsewhere = [] if metadata_of(source, config) is None else list_images(source.folder).files_elsewhere
    return _names_sizes_times([*files_below(source.folder), *elsewhere])


def load_column(
    config: DataConfig,
    accept: Accept | None,
    dataset: Dataset | None,
    files: Any = None,
) -> ImageCache:
    """Return the images of the column of images; the first call decodes and resizes them, later ones map the file.

    Args:
        config: The settings of the data.
        accept: As of `load_images`.
        dataset: As of `load_images`.
        files: Of a `dataset` whose rows name files, what tells that one of these changed.
    """
    source = find_source(config) if dataset is None else Source("dataset", "given", NAME, None)
    if dataset is not None:
        dataset = choose_columns(with_slices(dataset, config), config)
        identity: Any = getattr(dataset, "_fingerprint", None)
        identity = identity if files is None else [identity, files]
    elif source.folder is None:
        dataset = open_dataset(config)
        identity = dataset._fingerprint
    else:
        dataset = None
        identity = files_of(source, config)
    root = cache_folder(config)
    folder = root / _cache_key(config, source, identity)
    if not folder.is_dir():
        dataset = open_dataset(config) if dataset is None else dataset
        _create_cache(folder, dataset, source, config, accept)
        accept = None
    images = read_cache(folder, source.name)
    if images.value_range is None:
        require_no_array_settings(config, is_alone=config.condition_column is None)
    else:
        channels = check_display_channels(config.display_channels, images.channels)
        images = replace(images, value_range=replace(images.value_range, display_channels=channels))
    if accept is not None:
        accept(images.size, images.channels, images.value_range and images.value_range.dtype)
    # A run writes the resolution and channels that were decided here into its config.yaml. Those settings have another
    # key, which only a link can lead to this folder: to hash what is decided, each call would have to open the images.
    decided = replace(config, resolution=to_resolution(images.size), channels=images.channels)
    link = root / _cache_key(decided, source, identity)
    if not link.exists():
        with contextlib.suppress(OSError):  # Some file systems have no links.
            link.symlink_to(folder.name, target_is_directory=True)
    return images


def _names_sizes_times(files: Iterable[Path]) -> list[tuple[str, int, int]]:
    """Return path, size and time of change of each file: if all are equal, the images are taken to be."""
    # A link whose target is missing has no size of its own.
    stats = ((path, path.stat() if path.exists() else path.lstat()) for path in files)
    return [(str(path.absolute()), stat.st_size, stat.st_mtime_ns) for path, stat in stats]


def _cache_key(config: DataConfig, source: Source, identity: Any) -> str:
    settings = [getattr(config, name) for name in CACHED_SETTINGS]
    if config.condition_column not in (None, config.image_column):  # which leaves fewer columns to choose from
        settings.append(config.condition_column)
    if config.random_crop:
        settings.append("random_crop")
    if config.eval_fraction is not None:
        settings.append([HELD_OUT_FORMAT, config.eval_fraction, config.group_column])
    of_arrays = [getattr(config, name) for name in SETTINGS_OF_BOTH]
    if any(value is not None for value in of_arrays):
        settings.append(of_arrays)
    content = json.dumps([CACHE_FORMAT, source.kind, identity, *settings])
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def _create_cache(
    folder: Path, dataset: Dataset, source: Source, config: DataConfig, accept: Accept | None = None
) -> None:
    """Decode all images into a new folder, which gets its name when it is whole."""
    root = folder.parent
    new = root / f"{folder.name}.{uuid.uuid4().hex}.new"
    try:
        new.mkdir(parents=True)
    except OSError as error:
        raise UsageError(f"cache_dir must be a folder to write to, got {str(root.parent)!r}: {error}") from error
    _delete_abandoned(root)
    with lock(new):  # before it has a name under which another process would look for an abandoned one
        part = new.rename(new.with_suffix(".part"))
        _fill_cache(part, folder, dataset, source, config, accept)


def _delete_abandoned(root: Path) -> None:
    """Delete what processes that were killed have left of their decoding: nobody holds its lock."""
    for part in root.glob("*.part"):
        with contextlib.suppress(OSError), lock(part) as is_locked:
            if is_locked:
                shutil.rmtree(part)


def _fill_cache(
    part: Path, folder: Path, dataset: Dataset, source: Source, config: DataConfig, accept: Accept | None
) -> None:
    """Decode all images into `part`, and rename it to `folder`."""
    root = folder.parent
    try:
        image_format = format_of_column(dataset, config)
        if accept is not None:
            accept(image_format.size, image_format.channels, image_format.array_dtype)
        _require_room(root, len(dataset), image_format)
        try:
            meta = _write_images(part, dataset, image_format)
        except NeedsSixteenBits:
            meta = _write_images(part, dataset, replace(image_format, max_value=65535, file_max=65535))
        meta["license"] = license_of(source, dataset)
        (part / "meta.json").write_text(json.dumps(meta))
        (part / ".lock").unlink(missing_ok=True)
        _rename_unless_present(part, folder)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UsageError(
            f"the decoded images do not fit on the disk of {str(root)!r}: {error}; {_remedy_of_full_disk(config)}"
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _require_room(root: Path, num_images: int, image_format: ImageFormat) -> None:
    """Check that the disk holds the decoded images, of which none is smaller than x_0."""
    height, width = image_format.size
    size = num_images * image_format.channels * height * width * np.dtype(image_format.dtype).itemsize
    free = shutil.disk_usage(root).free
    if size > free:
        raise UsageError(
            f"{num_images:,} images of {format_size(image_format.size)} pixels take "
            f"{format_amount(size, 'B')}, got {format_amount(free, 'B')} free on the disk of {str(root)!r}: "
            f"{_remedy_of_full_disk(image_format.config)}"
        )


def _remedy_of_full_disk(config: DataConfig) -> str:
    smaller = "" if config.random_crop else " a smaller --resolution,"  # whole images are cached for crops
    return f"free space, or give another --cache_dir,{smaller} or --streaming, which keeps none"


def _rename_unless_present(part: Path, folder: Path) -> None:
    try:
        if folder.is_symlink():  # It leads to a cache that has been deleted.
            folder.unlink()
        part.rename(folder)
    except OSError:
        if not folder.is_dir():  # Otherwise another process was faster, and wrote the same.
            raise


def read_cache(folder: Path, name: str) -> ImageCache:
    """Read a folder of the cache, whose files are mapped into memory.

    Args:
        folder: The folder.
        name: The name of the source.

    Raises:
        UsageError: When a file is damaged.
    """
    try:
        meta = json.loads((folder / "meta.json").read_text())
        # Mapped, as the pixels are: processes and workers share them, and hold none that they do not read.
        index = np.load(folder / "index.npy", mmap_mode="r")
        labels = np.load(folder / "labels.npy", mmap_mode="r") if (folder / "labels.npy").exists() else None
        dtype, size = np.dtype(meta.pop("dtype")), meta.pop("size")
        image_size = to_size(meta.pop("resolution"))
        if meta["label_columns"] is not None:
            meta["label_columns"] = [LabelColumn(*column) for column in meta["label_columns"]]
        if "value_range" in meta:
            meta["value_range"] = ValueRange(**meta["value_range"])
        pixels = np.memmap(folder / "pixels.bin", dtype=dtype, mode="r", shape=(size,))
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"cache_dir must hold whole files, got a damaged {str(folder)!r}: delete it") from error
    return ImageCache(pixels=pixels, index=index, labels=labels, name=name, size=image_size, **meta)


def format_of_column(dataset: Dataset, config: DataConfig) -> ImageFormat:
    """Return the format of the images in the first column of a table; see `infer_format`."""
    encoded = ((row, encoded_images(dataset, slice(row, row + 1))[0]) for row in range(len(dataset)))
    return infer_format(((name_of(each, row), each) for row, each in encoded), config)


def _write_images(folder: Path, dataset: Dataset, image_format: ImageFormat) -> dict[str, Any]:
    """Write pixels, index and labels, and return the content of meta.json but for the license."""
    labels, class_names, label_columns = _find_labels(dataset)
    dtype = image_format.dtype.newbyteorder("<")
    # The crops of whole images, which a model and a reference are of, have a size that the pixels do not tell.
    crop = f" {image_format.size}" if image_format.config.random_crop else ""
    depth = image_format.array_dtype or image_format.max_value
    digest = hashlib.sha256(f"{image_format.channels} {depth}{crop}".encode())
    entries, rows, size = array("q"), array("q"), 0
    losses: Counter[str] = Counter()
    smallest, largest = math.inf, -math.inf
    decoded = tqdm(
        _decode_all(dataset, image_format), "Decoding", len(dataset), unit="image", disable=len(dataset) < 2000
    )
    with open(folder / "pixels.bin", "wb") as file:
        for row, image in enumerate(decoded):
            if image is None:
                continue
            planes = image.planes
            losses.update(image.losses)
            smallest, largest = min(smallest, planes.min().item()), max(largest, planes.max().item())
            content = np.ascontiguousarray(planes, dtype).tobytes()
            file.write(content)
            digest.update(content)
            entries.extend((size, planes.shape[1], planes.shape[2]))
            rows.append(row)
            size += planes.size
    if not rows:
        raise UsageError(
            f"on_bad_image='skip' must leave some images, got {len(dataset)} unreadable ones only: "
            "repair or replace them"
        )
    index = np.array(entries, "<i8").reshape(-1, 3)
    np.save(folder / "index.npy", index)
    digest.update(index.tobytes())
    if labels is not None:
        labels = labels[np.array(rows)]
        np.save(folder / "labels.npy", labels)
        digest.update(labels.tobytes())
    of_arrays: dict[str, Any] = {}
    if image_format.array_dtype is not None:
        of_arrays = _describe_values(np.memmap(folder / "pixels.bin", dtype, "r"), image_format, smallest, largest)
        digest.update(json.dumps(of_arrays["value_range"]).encode())
    return {
        **of_arrays,
        "channels": image_format.channels,
        "max_value": image_format.max_value,
        "resolution": to_resolution(image_format.size),
        "random_crop": image_format.config.random_crop,
        "class_names": class_names,
        "label_columns": label_columns,
        "num_bad": len(dataset) - len(rows),
        "losses": losses,
        "limits": [smallest, largest],
        "file_max": image_format.file_max,
        "fingerprint": digest.hexdigest(),
        "dtype": dtype.str,
        "size": size,
    }


def _describe_values(pixels: np.ndarray, image_format: ImageFormat, smallest: float, largest: float) -> dict[str, Any]:
    """Return the content of meta.json that arrays have beside that of images."""
    levels = image_format.config.value_quantiles
    limits = (smallest, largest) if levels is None else quantiles(pixels, levels)
    values = value_range_of(image_format, limits)
    content = {"low": values.low, "high": values.high, "dtype": values.dtype}
    return {"value_range": content, "num_clipped": count_outside(pixels, values)}


def _find_labels(dataset: Dataset) -> RawLabels:
    """Return the labels of each row, from all columns but the first."""
    names = dataset.column_names[1:]
    cells = dataset.select_columns(names)[:] if names else {}
    return find_labels({name: cells[name] for name in names}, dataset.features)


def _decode_all(dataset: Dataset, image_format: ImageFormat) -> Iterator[Decoded | None]:
    """Yield the image of each row in order, decoded by several threads; None for an image that is left out."""
    num_threads = max(2, min(8, os.cpu_count() or 2))
    tasks = deque()
    rows_per_task = ROWS_PER_TASK_OF_CROPS if image_format.config.random_crop else ROWS_PER_TASK
    with ThreadPoolExecutor(num_threads) as pool:
        for row in range(0, len(dataset), rows_per_task):
            encoded = encoded_images(dataset, slice(row, row + rows_per_task))
            tasks.append(pool.submit(_decode_rows, encoded, row, image_format))
            if len(tasks) > 2 * num_threads:
                yield from tasks.popleft().result()
        while tasks:
            yield from tasks.popleft().result()


def _decode_rows(encoded_rows: list[Any], first_row: int, image_format: ImageFormat) -> list[Decoded | None]:
    decoded: list[Decoded | None] = []
    for row, encoded in enumerate(encoded_rows, first_row):
        try:
            decoded.append(decode(encoded, name_of(encoded, row), image_format))
        except (UsageError, NeedsSixteenBits):
            raise
        except Exception as error:  # Pillow's decoders raise nearly any class for broken files.
            if image_format.config.on_bad_image == "raise" or is_transient(error):
                raise unreadable_image_error(name_of(encoded, row), error, image_format.config) from error
            decoded.append(None)
    return decoded
