"""Streaming: a data set that is too large to decode beforehand; an image is read and decoded when it is needed.

shard         a file of examples, or a part of a file: the unit that is opened
row           the number of an example in its shard, in the order of the file
row group     the part of a parquet file that can be read without the rest
table         some consecutive rows of a shard, as an Arrow table
example       a row that is read, and not decoded
fingerprint   a hash of file names, sizes and settings, which a resumed run compares, as the images are not read

In which order a run reads the examples, and where a resumed run continues, is the subject of shard_batches.py.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np

from hf_ddpm.data import decoding
from hf_ddpm.data.arrays import require_differing, value_range_of
from hf_ddpm.data.columns import cells_of, holds_numbers
from hf_ddpm.data.config import DataConfig
from hf_ddpm.data.decoding import (
    Decoded,
    NotFetchedError,
    infer_format,
    is_transient,
    unreadable_image_error,
    with_bytes,
)
from hf_ddpm.data.image_format import ImageFormat, InFormat
from hf_ddpm.data.labels import LabelColumn, RawLabels, find_labels
from hf_ddpm.data.planes import NeedsSixteenBits
from hf_ddpm.data.shard_files import UNKNOWN, Shards, open_iterable, open_mapped, row_groups_from
from hf_ddpm.data.sources import find_source
from hf_ddpm.data.tables import license_of, no_images_error
from hf_ddpm.image_size import to_resolution
from hf_ddpm.runtime.errors import RunError, UsageError, in_one_line
from hf_ddpm.value_range import ValueRange

STREAM_FORMAT = 1  # Increase it when the order of the stream changes, so that no older run is resumed.
ROWS_PER_TABLE = 256
NUM_FIRST_IMAGES = 16  # which are decoded when a stream is opened, for what they lose and how large their values are


class Example(NamedTuple):
    """A row that is read, and not decoded.

    Args:
        encoded: The encoded image (decoding.py).
        label: The class; None without classes, or where the row has none.
        shard: The number of its shard.
        row: The number of the row in the shard.
    """

    encoded: Any
    label: Any
    shard: int
    row: int


def examples_in(table: Any, shard: int, first_row: int, rows: Iterable[int]) -> Iterator[Example]:
    """Yield some rows of a table.

    Args:
        table: An Arrow table, of images and labels.
        shard: The number of the shard that it belongs to.
        first_row: The row of the shard with which the table begins.
        rows: Which rows of the shard to yield, all of them in the table.
    """
    columns = table.columns
    for row in rows:
        encoded, *label = (cells_of(column.slice(row - first_row, 1))[0] for column in columns[:2])
        yield Example(encoded, label[0] if label else None, shard, row)


@dataclass(frozen=True, eq=False)
class ImageStream(InFormat):
    """Images that are decoded when they are needed; as `ImageCache`, but without a length.

    Args:
        dataset: The column of encoded images, and perhaps that of classes, as Arrow tables: a data set of `datasets`,
            either mapped from a file or iterable.
        rows_per_shard: (num_shards,) int64, the number of rows of each shard; -1 where only reading would tell.
        files: (num_shards,) the file of each shard; "" where shards are parts of files.
        image_format: What each image is brought to.
        class_names: The names of the classes; None without classes.
        fingerprint: The sha256 of file names, sizes and settings, the same wherever the folder lies; for a data set
            on the Hub, of file names with their commit, and settings.
        name: The name of the source.
        license: The license of the data; None if unknown.
        num_images: The number of images; None where only reading would tell.
        num_bad: 0. Unreadable images are counted as they come, in the batches.
        losses: What the first images hold and their planes do not -> of how many of them.
        limits: The smallest and the largest value of the first images.
        labels: The labels of all rows, as of `ImageCache`, if they are numbers or stand in several columns. They were
            read when the stream was opened, and no image with them.
        label_columns: As of `ImageCache`.
        value_range: As of `ImageCache`.
    """

    dataset: Any
    rows_per_shard: np.ndarray
    files: tuple[str, ...]
    image_format: ImageFormat
    class_names: list[str] | None
    fingerprint: str
    name: str
    license: str | None
    num_images: int | None
    num_bad: int = 0
    losses: dict[str, int] = field(default_factory=dict)
    limits: tuple[float, float] = (0, 0)
    labels: np.ndarray | None = None
    label_columns: list[LabelColumn] | None = None
    value_range: ValueRange | None = None

    def image(self, i: int) -> np.ndarray:
        """Return readable image i in the order of the files, (C, h, w). The images before it are read, too.

        Raises:
            UsageError: When there are not so many readable images, or as `decode` raises it.
        """
        first = self.first_images(i + 1)
        if len(first) <= i:
            raise UsageError(
                "on_bad_image='skip' must leave some images, got unreadable ones only: repair or replace them"
            )
        return first[i][0]

    def first_images(self, count: int) -> list[tuple[np.ndarray, int | None]]:
        """Return the first readable images in the order of the files, or all: (C, h, w) and the class of each.

        Raises:
            UsageError: As `decode` and `label` raise it.
        """
        images: list[tuple[np.ndarray, int | None]] = []
        for example in self.examples():
            if len(images) == count:
                break
            decoded = self.decode(example)
            if decoded is not None:
                images.append((decoded.planes, self.label(example)))
        return images

    def examples(self) -> Iterator[Example]:
        """Yield all examples in the order of the files."""
        for shard in range(len(self.files)):
            first_row = 0
            for table in self.tables(shard, 0):
                yield from examples_in(table, shard, first_row, range(first_row, first_row + len(table)))
                first_row += len(table)

    def tables(self, shard: int, first_row: int) -> Iterator[Any]:
        """Yield the rows of a shard from `first_row` on, as Arrow tables.

        Raises:
            RunError: When the shard cannot be read.
        """
        try:
            part = self.dataset.shard(len(self.files), shard)
            if hasattr(part, "to_iterable_dataset"):
                part = part.to_iterable_dataset()
            parts = [part]
            if first_row and self.files[shard].endswith(".parquet") and hasattr(part, "reshard"):
                parts, first_row = row_groups_from(part, self.files[shard], first_row)
            for part in parts:
                yield from (part.skip(first_row) if first_row else part).iter(ROWS_PER_TABLE)
                first_row = 0
        except Exception as error:  # datasets, pyarrow and file systems raise nearly any class.
            raise self._reading_error(self._name_of_shard(shard), error) from error

    def decode(self, example: Example) -> Decoded | None:
        """Decode an example; None for an unreadable image if `on_bad_image` is "skip".

        Raises:
            UsageError: When the image is unreadable, or differs from the first images, which decided the format.
            RunError: When the file of the image cannot be read.
        """
        is_skipped = self.image_format.config.on_bad_image == "skip"
        try:
            encoded = with_bytes(example.encoded)
        except (FileNotFoundError, NotFetchedError) as error:
            # A network or disk that fails now may succeed later: it must not decide which images are trained on.
            if is_skipped and isinstance(error, FileNotFoundError):
                return None
            remedy = "" if is_skipped else "; with --on_bad_image skip a run continues without images that vanish"
            raise self._reading_error(self.name_of(example), error, remedy) from error
        try:
            decoded = decoding.decode(encoded, self.name_of(example), self.image_format)
        except NeedsSixteenBits:
            raise UsageError(
                "preserve_input_precision must be off: the first images have 8 bits, "
                f"{self.name_of(example)} has 16; --no_preserve_input_precision, or leave out --streaming"
            ) from None
        except UsageError:
            raise
        except Exception as error:  # Pillow's decoders raise nearly any class for broken files.
            if is_skipped and not is_transient(error):
                return None
            raise unreadable_image_error(self.name_of(example), error, self.image_format.config) from error
        return decoded._replace(planes=np.ascontiguousarray(decoded.planes))

    def check_row_count(self, shard: int, expected: int, actual: int) -> None:
        """Check that a shard has as many rows as it had before.

        Raises:
            RunError: When it has not; `expected` may be -1, unknown.
        """
        if expected not in (UNKNOWN, actual):
            error = EOFError(f"it has {actual} rows and had {expected}")
            raise self._reading_error(self._name_of_shard(shard), error)

    def label(self, example: Example) -> Any:
        """Return the label of an example; None if there are no labels.

        Raises:
            UsageError: When there are classes and the example has none.
        """
        if self.labels is not None:
            return self.labels[int(self.rows_per_shard[: example.shard].sum()) + example.row]
        if self.class_names is None:
            return None
        if example.label is None or not 0 <= example.label < len(self.class_names):
            raise UsageError(
                f"label_column must give each image a class, got {example.label} in {self.name_of(example)} of "
                f"{self.image_format.config.label_column!r}: give it one, or leave the row out"
            )
        return int(example.label)

    def name_of(self, example: Example) -> str:
        """Return what error messages call an example: its row in its file, its path and the file.

        Where shards are parts of files, the row is the number of the row in the whole data set.
        """
        encoded, file = example.encoded, self.files[example.shard]
        path, row = encoded["path"] if isinstance(encoded, dict) else None, example.row
        if not file:
            row += int(self.rows_per_shard[: example.shard].clip(0).sum())
        location = " in ".join(part for part in (path, file) if part)
        number = encoded.get("slice") if isinstance(encoded, dict) else None
        return decoding.name_of({"path": location or None, "slice": number}, row)

    def _name_of_shard(self, shard: int) -> str:
        return self.files[shard] or f"shard {shard} of {self.name!r}"

    def _reading_error(self, name: str, error: Exception, remedy: str = "") -> RunError:
        if isinstance(error, RunError):
            return error
        reason = in_one_line(error, with_type=True)
        return RunError(f"{name} cannot be read: {reason}; put it back as it was, or repair it{remedy}")


def open_stream(config: DataConfig, limits: Sequence[float] | None = None) -> ImageStream:
    """Open the split `train`, of which only the first images are read; the settings mean what they do for a cache.

    Args:
        config: The settings of the data.
        limits: The values of floats that become -1 and 1 without `value_range`; None: nothing tells them.

    Raises:
        UsageError: When `load_images` would raise it, as far as the first images show, or when the column of classes
            does not name its classes.
    """
    source = find_source(config)
    is_iterable = source.kind in ("hub", "parquet", "tar", "hdf5")
    shards = open_iterable(source, config) if is_iterable else open_mapped(source, config)
    columns: list[str] = list(shards.dataset.column_names)
    labels = _scan_labels(shards, columns[1:]) if _is_scanned(shards, columns[1:]) else RawLabels()
    stream = ImageStream(
        dataset=shards.dataset.with_format("arrow"),
        rows_per_shard=shards.rows_per_shard,
        files=shards.files,
        image_format=ImageFormat(config, (0, 0), 0, 0),
        class_names=_class_names(shards, columns[1:], labels),
        fingerprint="",
        name=source.name,
        license=license_of(source, shards.dataset),
        num_images=shards.num_images,
        labels=labels.values,
        label_columns=labels.columns,
    )
    examples = stream.examples()
    first = next(examples, None)
    if first is None:
        raise no_images_error(source)
    named_images = ((stream.name_of(example), example.encoded) for example in chain([first], examples))
    image_format = infer_format(named_images, config)
    content = [
        STREAM_FORMAT,
        source.kind,
        shards.identity,
        len(shards.files),
        columns,
        config.dataset_config_name,
        to_resolution(image_format.size),
        image_format.channels,
        image_format.max_value,
        config.center_crop,
        config.preserve_input_precision is not False,
        config.value_range,
    ]
    if config.random_crop:
        content.append("random_crop")
    values = None if image_format.array_dtype is None else value_range_of(image_format, limits)
    require_differing(values)
    if values is not None:
        content.append(
            [values.dtype, values.low, values.high, config.channel_axis, config.stack_axis, config.array_key]
        )
    if labels.values is not None:
        content.append(hashlib.sha256(labels.values.tobytes()).hexdigest())
    fingerprint = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    stream = replace(stream, image_format=image_format, fingerprint=fingerprint, value_range=values)
    losses, limits = _losses_and_limits(stream)
    return replace(stream, losses=losses, limits=limits)


def _losses_and_limits(stream: ImageStream) -> tuple[dict[str, int], tuple[float, float]]:
    """Decode the first images of a stream for what they lose and the limits of their values."""
    losses: Counter[str] = Counter()
    limits: tuple[float, float] = (math.inf, -math.inf)
    for decoded in filter(None, map(stream.decode, islice(stream.examples(), NUM_FIRST_IMAGES))):
        losses.update(decoded.losses)
        limits = (min(limits[0], decoded.planes.min().item()), max(limits[1], decoded.planes.max().item()))
    return losses, limits if limits[0] <= limits[1] else (stream.max_value, 0)


def _is_scanned(shards: Shards, columns: list[str]) -> bool:
    """Return whether the labels are read before the first step: all but one column of classes that has their names."""
    features = shards.dataset.features
    is_named = len(columns) == 1 and getattr(features[columns[0]], "names", None) is not None
    is_remote = not hasattr(shards.dataset, "num_rows") and (shards.rows_per_shard == UNKNOWN).any()
    if is_remote and len(columns) == 1 and not holds_numbers(features[columns[0]]):
        return False
    return shards.labels is not None or (bool(columns) and not is_named)


def _scan_labels(shards: Shards, columns: list[str]) -> RawLabels:
    """Read the columns of labels, without the images: the range of numbers must be known before the first step.

    Raises:
        UsageError: When only a pass over all images would tell them.
    """
    dataset = shards.dataset if shards.labels is None else shards.labels
    columns = columns if shards.labels is None else dataset.column_names
    if hasattr(dataset, "num_rows"):  # it is mapped into memory
        cells = dataset.select_columns(columns)[:]
    elif (shards.rows_per_shard != UNKNOWN).all():
        from pyarrow import parquet

        tables = [parquet.read_table(file, columns=columns) for file in shards.files]
        cells = {name: [cell for table in tables for cell in table[name].to_pylist()] for name in columns}
    else:
        raise UsageError(
            f"label_column must be one column of classes to be streamed from there, got {','.join(columns)}: numbers "
            "and several columns are read before the first step, from parquet files on this machine; download them, "
            "or leave out --streaming"
        )
    return find_labels({name: cells[name] for name in columns}, dataset.features)


def _class_names(shards: Shards, columns: list[str], labels: RawLabels) -> list[str] | None:
    """Return the names of the classes of one column of classes; None without it."""
    if labels.values is not None:
        is_of_classes = labels.columns is None
        return (labels.class_names or [*map(str, range(int(labels.values.max()) + 1))]) if is_of_classes else None
    if not columns:
        return None
    names = getattr(shards.dataset.features[columns[0]], "names", None)
    if names is None:
        raise UsageError(
            f"label_column must be a ClassLabel of `datasets` to be streamed from there, got {columns[0]!r} of "
            f"{shards.dataset.features[columns[0]]}: cast it with cast_column, download the data, or leave out "
            "--streaming"
        )
    return names
