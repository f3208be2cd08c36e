"""A data set too large to decode beforehand -> batches of x_0, read on the fly and resumed where it was left.

position   p = 0, 1, 2, ... in the endless stream of images, as in data.py
chunk      c positions in a row: p lies in chunk q = p // c
lane       chunk q is of lane l = q % L; p is element j = (q // L) c + p % c of its lane
epoch      e of lane l: shards (l + e) % L, ... + L, ... of the e-th order of all shards; with fewer shards than lanes,
           of the examples of all shards in that order each L-th. The e-th epochs of all lanes hold each image once
block      `shuffle_buffer_images` examples in a row of a lane's epoch, permuted; the last one of an epoch is shorter
place      where a block begins: (l, j of its first element, e, number of the shard in the lane's order, row in it)

So element (l, j) is a function of (data set, seed, L, c, block size). A run keeps L and c, whatever number of
processes and workers it goes on with; with that of its start each worker reads one lane, and only that lane's shards.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import numpy as np
import torch

from hf_ddpm.config import TrainingConfig, UsageError
from hf_ddpm.data import NUM_HEADERS
from hf_ddpm.decoding import (
    GRAY_MODES,
    Form,
    NeedsSixteenBits,
    check_guesses,
    name_of,
    open_image,
    to_planes,
    unreadable,
)
from hf_ddpm.sources import IMAGE_NAME, Source, files_below, find_source, open_dataset

STREAM_FORMAT = 1  # a change of the order of the stream is a change of this number
NUM_PLACE_COLUMNS = 5
ROWS_PER_TABLE = 256
# Local files that `datasets` maps into memory have no shards of their own; a shard costs about a millisecond.
ROWS_PER_SHARD, MAX_SHARDS = 64, 1000
_SHARD_ORDER, _BLOCK_ORDER, _UNIFORM = 11, 12, 13  # what random numbers are for
_FLIP, _TOP, _LEFT = 1, 2, 3


class DataError(RuntimeError):
    """Data that were there when the run began cannot be read any more: the message names the file and the remedy."""


class Example(NamedTuple):
    """A row that is read, and not decoded; its shard is the `nth` of the order in which it was read."""

    cell: Any
    label: Any
    nth: int
    shard: int
    row: int


@dataclass(frozen=True, eq=False)
class ImageStream:
    """Images that are decoded when they are taken; as `data.ImageCache`, but without a length.

    Args:
        dataset: the column of images, not decoded, and perhaps that of labels, as Arrow tables; of `datasets`, mapped
            from a file or iterable.
        counts: (num_shards,) int64, the rows of each shard, -1 where only reading would tell.
        files: (num_shards,) the file that is a shard, "" where shards are parts of files.
        num_bad: 0; unreadable images are counted as they come, in the batches.
        fingerprint: sha256 of file names, sizes and settings, the same wherever the folder lies; of a data set on the
            Hub, of file names with their commit.
        num_images: None where only reading would tell.
    """

    dataset: Any
    counts: np.ndarray
    files: tuple[str, ...]
    form: Form
    class_names: list[str] | None
    fingerprint: str
    name: str
    license: str | None
    num_images: int | None
    num_bad: int = 0

    @property
    def channels(self) -> int:
        return self.form.channels

    @property
    def max_value(self) -> int:
        return self.form.max_value

    @property
    def resolution(self) -> int:
        return self.form.resolution

    @property
    def num_classes(self) -> int | None:
        """Labels are in [0, num_classes); None without labels."""
        return None if self.class_names is None else len(self.class_names)

    def image(self, i: int) -> np.ndarray:
        """Readable image i in the order of the files: (C, h, w). The images before it are read, too."""
        for example in self.examples():
            planes = self.decode(example)
            if planes is not None:
                if i == 0:
                    return planes
                i -= 1
        raise UsageError("on_bad_image='skip' must leave some images, got unreadable ones only")

    def examples(self) -> Iterator[Example]:
        rows = _Rows(self, range(len(self.files)))
        while examples := rows.take(16):
            yield from examples

    def tables(self, shard: int, first_row: int) -> Iterator[Any]:
        """The rows of a shard from `first_row` on, as Arrow tables; raises DataError for whatever goes wrong."""
        try:
            part = self.dataset.shard(len(self.files), shard)
            if hasattr(part, "to_iterable_dataset"):
                part = part.to_iterable_dataset()
            parts = [part]
            if first_row and self.files[shard].endswith(".parquet") and hasattr(part, "reshard"):
                # `skip` would read all that it skips; row groups that are left out are not read.
                groups, part = _row_groups(self.files[shard]), part.reshard()
                group = 0
                while group < len(groups) and first_row >= groups[group]:
                    first_row -= groups[group]
                    group += 1
                parts = [part.shard(len(groups), g) for g in range(group, len(groups))]
            for part in parts:
                yield from (part.skip(first_row) if first_row else part).iter(ROWS_PER_TABLE)
                first_row = 0
        except Exception as error:  # datasets, pyarrow and file systems raise nearly anything
            raise self._lost(self.files[shard] or f"shard {shard} of {self.name!r}", error) from error

    def decode(self, example: Example) -> np.ndarray | None:
        """(C, h, w), uint8 or uint16; None for an unreadable image with `on_bad_image` "skip".

        Raises:
            UsageError: the image is unreadable, or not of the form that the first images have.
            DataError: its file cannot be read.
        """
        where, row = self.where(example)
        is_skipped = self.form.config.on_bad_image == "skip"
        try:
            cell = _fetch(example.cell)
        except Exception as error:  # of file systems
            # What a network or a disk fails to give now it may give later: another image in its place would be chance.
            if is_skipped and isinstance(error, FileNotFoundError):
                return None
            remedy = "" if is_skipped else ", or leave out images that are not there with --on_bad_image skip"
            raise self._lost(name_of(where, row), error, remedy) from error
        try:
            with open_image(cell) as image:
                image.load()
                check_guesses(image, name_of(where, row), self.form)
                planes = to_planes(image, self.form)
                return np.ascontiguousarray(planes, np.uint16 if self.max_value > 255 else np.uint8)
        except NeedsSixteenBits:
            raise UsageError(
                f"preserve_input_precision must be off: the first images have 8 bits, {name_of(where, row)} has 16; "
                "--no_preserve_input_precision, or leave out --streaming"
            ) from None
        except UsageError:
            raise
        except Exception as error:  # Pillow's decoders raise nearly anything on broken files
            if is_skipped:
                return None
            raise unreadable(where, row, error) from error

    def check_count(self, shard: int, expected: int, found: int) -> None:
        if expected not in (-1, found):
            error = EOFError(f"it has {found} rows and had {expected}")
            raise self._lost(self.files[shard] or f"shard {shard} of {self.name!r}", error)

    def label(self, example: Example) -> int | None:
        """Its class; raises UsageError if it has none."""
        if self.class_names is None:
            return None
        if example.label is None or not 0 <= example.label < len(self.class_names):
            where, row = self.where(example)
            raise UsageError(
                f"label_column must give each image a class, got {example.label} in {name_of(where, row)} of "
                f"{self.form.config.label_column!r}"
            )
        return int(example.label)

    def where(self, example: Example) -> tuple[dict[str, Any], int]:
        """What `name_of` takes: the path in the cell, the file of the shard, and the row in that or in all data."""
        path, file = example.cell and example.cell["path"], self.files[example.shard]
        row = example.row if file else example.row + int(self.counts[: example.shard].clip(0).sum())
        return {"path": " in ".join(part for part in (path, file) if part) or None}, row

    def _lost(self, what: str, error: Exception, remedy: str = "") -> DataError:
        if isinstance(error, DataError):
            return error
        reason = f"{type(error).__name__}: {error}"
        return DataError(
            f"{what} cannot be read any more: {reason}; put it back as it was, and the same command with "
            f"--resume_from_checkpoint latest goes on{remedy}"
        )


def open_stream(config: TrainingConfig) -> ImageStream:
    """The images of `config`, of which only the first are looked at; settings mean what they do for `load_images`.

    Raises:
        UsageError: as `load_images`, as far as the first images show; labels are not a column of named classes.
    """
    source = find_source(config)
    if source.kind in ("hub", "parquet"):
        dataset, counts, files, identity, num_images = _open_iterable(source, config)
    else:
        # `datasets` keeps only the names of an image folder, and streams them as one shard in the order of the names.
        dataset = open_dataset(config)
        num_images = len(dataset)
        num_shards = min(max(1, num_images // ROWS_PER_SHARD), MAX_SHARDS)
        counts = np.array([num_images // num_shards + (i < num_images % num_shards) for i in range(num_shards)])
        files, identity = ("",) * num_shards, _identity(source)
    columns: list[str] = list(dataset.column_names)
    class_names = getattr(dataset.features[columns[1]], "names", None) if len(columns) > 1 else None
    if len(columns) > 1 and class_names is None:
        raise UsageError(
            f"label_column must be a ClassLabel of `datasets` to be streamed, got {columns[1]!r} of "
            f"{dataset.features[columns[1]]}: cast it with cast_column, or leave out --streaming"
        )
    license = "cc-by-4.0" if source.kind == "digits" else dataset.info.license or None
    stream = ImageStream(
        dataset=dataset.with_format("arrow"),
        counts=counts,
        files=files,
        form=Form(config, 0, 0, 0),
        class_names=class_names,
        fingerprint="",
        name=source.name,
        license=license,
        num_images=num_images,
    )
    form = _find_form(stream, config)
    decisive = [STREAM_FORMAT, source.kind, identity, len(files), columns, config.dataset_config_name]
    decisive += [form.resolution, form.channels, form.max_value, config.center_crop, config.preserve_input_precision]
    fingerprint = hashlib.sha256(json.dumps(decisive).encode()).hexdigest()
    return replace(stream, form=form, fingerprint=fingerprint)


def _open_iterable(source: Source, config: TrainingConfig) -> tuple[Any, np.ndarray, tuple[str, ...], Any, int | None]:
    """The data set, its rows per shard, the files that are its shards, what identifies it, and its rows."""
    import datasets
    from datasets import config as hf_config
    from datasets.exceptions import DatasetsError

    path, counts_downloads = str(source.folder or source.name), hf_config.HF_UPDATE_DOWNLOAD_COUNTS
    try:
        if source.folder is not None:  # else `datasets` reports local folders over the network too
            hf_config.HF_UPDATE_DOWNLOAD_COUNTS = False
        builder = datasets.load_dataset_builder(path, config.dataset_config_name, cache_dir=config.cache_dir)
        if hasattr(builder.config, "decode_num_threads"):
            builder.config.decode_num_threads = 0  # pyright: ignore[reportAttributeAccessIssue]
        dataset: Any = builder.as_streaming_dataset(split="train")
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        reason = f"{type(error).__name__}: {error}"
        if source.folder is None and isinstance(error, OSError):
            raise UsageError(
                f"dataset_name must be `digits`, a folder or a data set on the Hub, got {source.name!r}: it is "
                f"neither a folder here nor reachable on the Hub; check name, network and login ({reason})"
            ) from error
        raise UsageError(
            f"{source.option} must be loadable with a split `train`, and with --dataset_config_name if there are "
            f"several configurations, got {source.name!r} with {config.dataset_config_name!r}: {reason}"
        ) from error
    finally:
        hf_config.HF_UPDATE_DOWNLOAD_COUNTS = counts_downloads
    names = [str(file) for file in (builder.config.data_files or {}).get("train", [])]
    files = tuple(names) if len(names) == dataset.num_shards else ("",) * dataset.num_shards
    counts = np.full(len(files), -1)
    split = (builder.info.splits or {}).get("train")
    num_images = split.num_examples if split else None
    identity: Any = names or builder.hash
    if source.folder is not None:
        folder = os.path.realpath(source.folder)
        within = [os.path.relpath(os.path.realpath(Path(name).parent), folder) for name in names]
        identity = [(f"{w}/{Path(n).name}", Path(n).stat().st_size) for w, n in zip(within, names, strict=True)]
        if all(name.endswith(".parquet") for name in files):
            counts = np.array([_count_rows(source, name) for name in files])
            num_images = int(counts.sum())
    return _choose_columns(dataset, config), counts, files, identity, num_images


def _choose_columns(dataset: Any, config: TrainingConfig) -> Any:
    import datasets

    features, column, label = dataset.features, config.image_column, config.label_column
    if features is None:
        raise UsageError(
            "dataset_name must name data whose columns are declared, to be streamed: leave out --streaming"
        )
    images = [
        name
        for name, feature in features.items()
        if type(feature).__name__ == "Image" or (isinstance(feature, dict) and set(feature) == {"bytes", "path"})
    ]
    if column is None:
        if len(images) != 1:
            found = f"several columns of images, {images}" if images else f"no column of images among {list(features)}"
            raise UsageError(f"image_column must name the images, got None: there are {found}; give --image_column")
        column = images[0]
    elif column not in features:
        raise UsageError(f"image_column must be one of {images or list(features)}, got {column!r}: --image_column")
    elif column not in images and getattr(features[column], "dtype", None) not in ("binary", "large_binary"):
        raise UsageError(f"image_column must hold images, got {column!r} of {features[column]}: --image_column")
    if label is not None and label not in features:
        raise UsageError(f"label_column must be one of {list(features)}, got {label!r}: --label_column")
    columns = [column] if label is None else [column, label]
    return dataset.select_columns(columns).cast_column(column, datasets.Image(decode=False))


def _find_form(stream: ImageStream, config: TrainingConfig) -> Form:
    headers: list[tuple[str, tuple[int, int], str]] = []
    num_rows = 0
    for example in stream.examples():
        num_rows += 1
        where, row = stream.where(example)
        try:
            with open_image(_fetch(example.cell)) as image:
                headers.append((name_of(where, row), image.size, image.mode))
        except Exception as error:
            if config.on_bad_image == "raise":
                raise unreadable(where, row, error) from error
        if len(headers) == NUM_HEADERS:
            break
    if not num_rows:
        option = "dataset_name" if config.dataset_name else "train_data_dir"
        raise UsageError(f"{option} must hold images, got {stream.name!r} with 0 rows: name another")
    if not headers:
        raise UsageError(f"on_bad_image='skip' must leave some images, got {num_rows} unreadable ones only")
    resolution = config.resolution
    if resolution is None:
        resolution = headers[0][1][0]
        odd = [f"{name} is {w}x{h}" for name, (w, h), _ in headers if (w, h) != (resolution, resolution)]
        if odd:
            raise UsageError(f"resolution must be given unless all are one square size: {odd[-1]}; --resolution")
    channels = config.channels or (1 if all(mode in GRAY_MODES for _, _, mode in headers) else 3)
    is_deep = config.preserve_input_precision and any(mode.startswith("I;") for _, _, mode in headers)
    return Form(config, resolution, channels, 65535 if is_deep else 255)


def _identity(source: Source) -> list[tuple[str, int]]:
    """Names and sizes of the files that hold the data, of a folder with other files beside them."""
    assert source.folder is not None
    wanted = {
        "digits": lambda name: name.endswith(".parquet"),
        "images": lambda name: IMAGE_NAME.fullmatch(name) or name.startswith("metadata.") or name.endswith(".zip"),
        "saved": lambda name: name.endswith((".arrow", "state.json")),
    }[source.kind]
    paths = [path for path in files_below(source.folder) if wanted(path.name)]
    return [(path.relative_to(source.folder).as_posix(), path.stat().st_size) for path in paths if path.exists()]


def _count_rows(source: Source, file: str) -> int:
    try:
        return sum(_row_groups(file))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{source.option} must hold whole parquet files, got {file!r}: {type(error).__name__}: {error}; replace it"
        ) from error


def _row_groups(file: str) -> list[int]:
    """Rows of each row group of a parquet file, here or on the Hub; only its footer is read."""
    from pyarrow import parquet

    with fsspec.open(file, "rb") as opened:
        metadata = parquet.ParquetFile(opened).metadata
        return [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]


def _fetch(cell: Any) -> Any:
    """The cell with the bytes of the file that it names, here, in an archive or on the Hub."""
    if cell is None or cell["bytes"] is not None or cell["path"] is None:
        return cell
    path: str = cell["path"]
    if "://" not in path:
        return {"bytes": Path(path).read_bytes(), "path": path}
    with fsspec.open(path, "rb") as file:
        return {"bytes": file.read(), "path": path}  # pyright: ignore[reportAttributeAccessIssue]


def hashed_uniform(seed: int, positions: np.ndarray, stream: int) -> np.ndarray:
    """Uniform numbers in [0, 1) that are a hash of (seed, stream, position), of 53 bits each.

    Args:
        seed: at least 0.
        positions: (B,) integers of at least 0.
        stream: numbers of different streams are independent.
    Returns:
        (B,) float64.
    """
    start = np.random.SeedSequence((seed, _UNIFORM, stream)).generate_state(1, np.uint64)
    x = start + positions.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    # The finalizer of SplitMix64 (Steele et al. 2014).
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((x ^ (x >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53


class _Rows:
    """Each `stride`-th row of some shards, in their order, from row `first` of shard order[index] on.

    `row` is the next row, counted from the beginning of shard order[index]; it may be set further to pass over rows,
    of which only those are read whose number is not known. At the end it is counted from the end.
    """

    def __init__(
        self,
        stream: ImageStream,
        order: Sequence[int] | np.ndarray,
        stride: int = 1,
        row: int = 0,
        index: int = 0,
        first: int = 0,
    ):
        self.stream, self.order, self.stride, self.row = stream, order, stride, row
        self.index, self.first = index, first
        self.counts = stream.counts
        self.tables: Iterator[Any] | None = None
        self.table: Any = None
        self.table_row = self.end = 0  # the table holds the rows [table_row, end) of its shard

    def take(self, number: int) -> list[Example]:
        """The next examples; fewer only at the end."""
        examples: list[Example] = []
        while len(examples) < number and self._find_table():
            columns = self.table.columns
            rows = range(self.row, self.end, self.stride)[: number - len(examples)]
            shard = int(self.order[self.index])
            for row in rows:
                cell, *label = (column[row - self.table_row].as_py() for column in columns)
                examples.append(Example(cell, label[0] if label else None, self.index, shard, row))
            self.row += len(rows) * self.stride
        return examples

    def _find_table(self) -> bool:
        while self.index < len(self.order):
            shard = int(self.order[self.index])
            count = int(self.counts[shard])
            if self.tables is None and not 0 <= count <= self.row:
                self.end = self.first if count < 0 else self.row
                self.tables = self.stream.tables(shard, self.end)
            if self.tables is not None:
                while self.row >= self.end:
                    self.table = next(self.tables, None)
                    if self.table is None:
                        break
                    self.table_row, self.end = self.end, self.end + len(self.table)
                else:
                    return True
                # An epoch that is shorter than the one before must not pass for a whole one.
                self.stream.check_count(shard, count, self.end)
                if self.first and self.end == self.first:
                    self.stream.check_count(shard, self.first + 1, self.first)
                self.counts[shard] = count = self.end
            self.row -= count
            self.index, self.first, self.tables = self.index + 1, 0, None
        return False


class _Lane:
    """One lane, of which the block that was asked for last is kept."""

    def __init__(self, batches: StreamBatches, lane: int):
        self.batches, self.lane = batches, lane
        # With fewer shards than lanes each lane reads all of them.
        self.by_example = len(batches.stream.files) < batches.num_lanes
        self.stride = batches.num_lanes if self.by_example else 1
        self.block: list[Example] = []
        self.place: tuple[int, ...] | None = None

    def find(self, j: int) -> tuple[list[Example], int]:
        """The block that holds element j, and where in it."""
        if self.place is None or j < self.place[1]:
            places = self.batches.places
            usable = places[(places[:, 0] == self.lane) & (places[:, 1] <= j)]
            nearest = usable[usable[:, 1].argmax()].tolist() if len(usable) else (self.lane, 0, 0, 0, None)
            _, self.start, epoch, index, row = nearest
            self.block, self.num_empty = [], 0
            self._begin(epoch, index, row)
        while j >= self.start + len(self.block):
            self._next(j)
        return self.block, j - self.start

    def pick(self, j: int) -> tuple[np.ndarray, int | None, bool]:
        """The image and label of element j, and whether they are another's: if it is unreadable, the next one's.

        That is the next of its block, in a circle, else the first of the blocks after it.
        """
        block, k = self.find(j)
        stream, reader, after, num_tried = self.batches.stream, self, self.start + len(block), 0
        while True:
            for i in range(len(block)):
                example = block[(k + i) % len(block)]
                planes = stream.decode(example)
                if planes is not None:
                    return planes, stream.label(example), num_tried > 0
                num_tried += 1
            if num_tried >= max(100, self.batches.shuffle_buffer_images):
                where, row = stream.where(block[-1])
                raise UsageError(
                    f"on_bad_image='skip' must leave some images, got {num_tried} unreadable ones in a row, up to "
                    f"{name_of(where, row)}: repair or remove them"
                )
            if reader is self:  # which stays where it is
                reader = _Lane(replace(self.batches, places=np.array([self.place])), self.lane)
            block, k = reader.find(after)
            after += len(block)

    def _begin(self, epoch: int, index: int = 0, row: int | None = None) -> None:
        stream, num_lanes = self.batches.stream, self.batches.num_lanes
        order = np.random.default_rng((self.batches.seed, _SHARD_ORDER, epoch)).permutation(len(stream.files))
        turn = (self.lane + epoch) % num_lanes  # in turns, for parts that differ in size
        if not self.by_example:
            order = order[turn::num_lanes]
        first_row = turn if self.by_example else 0
        self.epoch, self.is_empty = epoch, row is None
        self.rows = _Rows(stream, order, self.stride, first_row if row is None else row, index, row or 0)

    def _next(self, j: int) -> None:
        """Goes on to the block that holds element j, or to the end of the epoch if that comes first."""
        size = self.batches.shuffle_buffer_images
        self.start += len(self.block)
        ahead = (j - self.start) // size * size  # whole blocks to pass over
        self.rows.row += ahead * self.stride
        self.block = []  # before the next is read, so that there are never two
        block = self.rows.take(size)
        if block:
            self.start += ahead
            self.is_empty, self.num_empty = False, 0
            self.place = (self.lane, self.start, self.epoch, block[0].nth, block[0].row)
            order = np.random.default_rng((self.batches.seed, _BLOCK_ORDER, self.lane, self.start))
            self.block = [block[i] for i in order.permutation(len(block))]
            return
        passed = ahead - self.rows.row // self.stride
        self.start += passed
        # A lane may have to wait for its turn, but not forever.
        self.num_empty = self.num_empty + 1 if self.is_empty and not passed else 0
        if self.num_empty > 100 * self.batches.num_lanes:
            raise DataError(f"{self.batches.stream.name!r} has no images any more: put them back")
        self._begin(self.epoch + 1)


@dataclass(frozen=True, eq=False)
class StreamBatches(torch.utils.data.IterableDataset[dict[str, torch.Tensor]]):
    """The micro-batches of one process for its next steps, for `DataLoader(..., batch_size=None)` with any workers.

    The batch for accumulation a of step k, both counted from `first_position`, holds the positions first_position +
    ((k A + a) P + rank) B + [0, B): `pixels` (B, C, R, R), uint8 or int32, of 16-bit images; `positions` (B,) int64;
    `labels` (B,) int64, if the images have labels; `num_bad`, int64, how many positions show another image than their
    own, which is unreadable; and `places` (n, 5) int64, of each lane that this worker has read from, where the block
    begins that it read from last. Crops and flips are functions of (seed, position).

    Args:
        random_flip: mirror each image with probability 1/2, drawn anew each epoch.
        batch_size: B, images per micro-batch.
        accumulation_steps: A, micro-batches per step and process.
        rank: this process, in [0, num_processes).
        first_position: images that the run has consumed.
        num_steps: steps to yield batches for.
        num_lanes: L, kept for a whole run; best num_processes * max(1, workers) of its start.
        chunk_size: c, kept for a whole run; best the batch size of its start.
        shuffle_buffer_images: images of a block, kept for a whole run.
        places: (n, 5) int64, what batches said before, of any lanes, workers and processes; without them, the lanes
            are read from their beginning, which changes nothing but the time it takes.
    """

    stream: ImageStream
    _: KW_ONLY
    seed: int
    random_flip: bool
    batch_size: int
    accumulation_steps: int
    rank: int
    num_processes: int
    first_position: int
    num_steps: int
    num_lanes: int
    chunk_size: int
    shuffle_buffer_images: int
    places: np.ndarray

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        worker = torch.utils.data.get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        lanes: dict[int, _Lane] = {}
        for k in range(first, self.num_steps * self.accumulation_steps, step):
            start = self.first_position + (k * self.num_processes + self.rank) * self.batch_size
            yield self._batch(lanes, start + np.arange(self.batch_size))

    def _batch(self, lanes: dict[int, _Lane], positions: np.ndarray) -> dict[str, torch.Tensor]:
        size = self.stream.resolution
        dtype = np.uint8 if self.stream.max_value == 255 else np.uint16
        pixels = np.empty((len(positions), self.stream.channels, size, size), dtype)
        labels, num_bad = [], 0
        u, v = (hashed_uniform(self.seed, positions, side) for side in (_TOP, _LEFT))
        for i, position in enumerate(positions.tolist()):
            chunk, rest = divmod(position, self.chunk_size)
            lane = chunk % self.num_lanes
            if lane not in lanes:
                lanes[lane] = _Lane(self, lane)
            planes, label, is_bad = lanes[lane].pick(chunk // self.num_lanes * self.chunk_size + rest)
            top, left = int(u[i] * (planes.shape[1] - size + 1)), int(v[i] * (planes.shape[2] - size + 1))
            pixels[i] = planes[:, top : top + size, left : left + size]
            labels.append(label)
            num_bad += is_bad
        if self.random_flip:
            flipped = hashed_uniform(self.seed, positions, _FLIP) < 0.5
            pixels[flipped] = pixels[flipped, :, :, ::-1]
        places = np.array([lanes[lane].place for lane in sorted(lanes)], np.int64)
        batch = {
            "pixels": torch.from_numpy(pixels.astype(np.int32) if dtype == np.uint16 else pixels),
            "positions": torch.from_numpy(positions),
            "num_bad": torch.tensor(num_bad),
            "places": torch.from_numpy(places),
        }
        if self.stream.class_names is not None:
            batch["labels"] = torch.tensor(labels)
        return batch
