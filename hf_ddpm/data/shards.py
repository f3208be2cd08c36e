"""A data set too large to decode beforehand: opened, not read, and of each image decoded only what is asked for.

shard      a file of images, or a part of a file; the unit that is opened
row        number of an image in its shard, in the order of the file
fingerprint  what a run that goes on compares: names, sizes and settings, for the images themselves are not read

In which order a run reads, and how it finds its place again, is in lanes.py.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import numpy as np

from hf_ddpm.data import decoding
from hf_ddpm.data.config import DataConfig
from hf_ddpm.data.decoding import (
    ImageFormat,
    NeedsSixteenBits,
    NotFetchedError,
    fetched,
    infer_format,
    is_transient,
    unreadable,
)
from hf_ddpm.data.sources import (
    IMAGE_NAME,
    Source,
    choose_columns,
    files_below,
    find_source,
    license_of,
    loading,
    no_rows,
    open_dataset,
)
from hf_ddpm.runtime.errors import RunError, UsageError

STREAM_FORMAT = 1  # a change of the order of the stream is a change of this number
ROWS_PER_TABLE = 256
# Local files that `datasets` maps into memory have no shards of their own; a shard costs about a millisecond.
ROWS_PER_SHARD = 64


class Example(NamedTuple):
    """A row that is read, and not decoded."""

    cell: Any
    label: Any
    shard: int
    row: int


def examples_in(table: Any, shard: int, first_row: int, rows: Iterable[int]) -> Iterator[Example]:
    """Some rows of a shard, in an Arrow table of it that begins with its row `first_row`."""
    columns = table.columns
    for row in rows:
        cell, *label = (column[row - first_row].as_py() for column in columns)
        yield Example(cell, label[0] if label else None, shard, row)


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
    form: ImageFormat
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
        """All of them, in the order of the files."""
        for shard in range(len(self.files)):
            first_row = 0
            for table in self.tables(shard, 0):
                yield from examples_in(table, shard, first_row, range(first_row, first_row + len(table)))
                first_row += len(table)

    def tables(self, shard: int, first_row: int) -> Iterator[Any]:
        """The rows of a shard from `first_row` on, as Arrow tables; raises RunError for whatever goes wrong."""
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
            raise self._lost(self._name_of_shard(shard), error) from error

    def decode(self, example: Example) -> np.ndarray | None:
        """(C, h, w), uint8 or uint16; None for an unreadable image with `on_bad_image` "skip".

        Raises:
            UsageError: the image is unreadable, or not of the form that the first images have.
            RunError: its file cannot be read.
        """
        is_skipped = self.form.config.on_bad_image == "skip"
        try:
            cell = fetched(example.cell)
        except (FileNotFoundError, NotFetchedError) as error:
            # What a network or a disk fails to give now it may give later: another image in its place would be chance.
            if is_skipped and isinstance(error, FileNotFoundError):
                return None
            remedy = "; with --on_bad_image skip a run passes over images that vanish while it goes on"
            raise self._lost(self.name_of(example), error, "" if is_skipped else remedy) from error
        try:
            planes = decoding.decode(cell, self.name_of(example), self.form)
        except NeedsSixteenBits:
            raise UsageError(
                "preserve_input_precision must be off: the first images have 8 bits, "
                f"{self.name_of(example)} has 16; --no_preserve_input_precision, or leave out --streaming"
            ) from None
        except UsageError:
            raise
        except Exception as error:  # Pillow's decoders raise nearly anything on broken files
            if is_skipped and not is_transient(error):
                return None
            raise unreadable(self.name_of(example), error) from error
        return np.ascontiguousarray(planes, np.uint16 if self.max_value > 255 else np.uint8)

    def check_count(self, shard: int, expected: int, found: int) -> None:
        if expected not in (-1, found):
            error = EOFError(f"it has {found} rows and had {expected}")
            raise self._lost(self._name_of_shard(shard), error)

    def label(self, example: Example) -> int | None:
        """Its class; raises UsageError if it has none."""
        if self.class_names is None:
            return None
        if example.label is None or not 0 <= example.label < len(self.class_names):
            raise UsageError(
                f"label_column must give each image a class, got {example.label} in {self.name_of(example)} of "
                f"{self.form.config.label_column!r}"
            )
        return int(example.label)

    def name_of(self, example: Example) -> str:
        """For messages: the row in its file, or in all data, the path in the cell and the file."""
        path, file = example.cell and example.cell["path"], self.files[example.shard]
        row = example.row if file else example.row + int(self.counts[: example.shard].clip(0).sum())
        where = " in ".join(part for part in (path, file) if part)
        return decoding.name_of({"path": where or None}, row)

    def _name_of_shard(self, shard: int) -> str:
        return self.files[shard] or f"shard {shard} of {self.name!r}"

    def _lost(self, what: str, error: Exception, remedy: str = "") -> RunError:
        if isinstance(error, RunError):
            return error
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return RunError(f"{what} cannot be read any more: {reason}; put it back as it was{remedy}")


def open_stream(config: DataConfig) -> ImageStream:
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
        num_shards = max(1, num_images // ROWS_PER_SHARD)
        counts = np.array([num_images // num_shards + (i < num_images % num_shards) for i in range(num_shards)])
        files, identity = ("",) * num_shards, _identity(source)
    columns: list[str] = list(dataset.column_names)
    class_names = getattr(dataset.features[columns[1]], "names", None) if len(columns) > 1 else None
    if len(columns) > 1 and class_names is None:
        raise UsageError(
            f"label_column must be a ClassLabel of `datasets` to be streamed, got {columns[1]!r} of "
            f"{dataset.features[columns[1]]}: cast it with cast_column, or leave out --streaming"
        )
    stream = ImageStream(
        dataset=dataset.with_format("arrow"),
        counts=counts,
        files=files,
        form=ImageFormat(config, 0, 0, 0),
        class_names=class_names,
        fingerprint="",
        name=source.name,
        license=license_of(source, dataset),
        num_images=num_images,
    )
    examples = stream.examples()
    first = next(examples, None)
    if first is None:
        raise no_rows(source)
    form = infer_format(((stream.name_of(e), e.cell) for e in chain([first], examples)), config)
    decisive = [STREAM_FORMAT, source.kind, identity, len(files), columns, config.dataset_config_name]
    decisive += [form.resolution, form.channels, form.max_value, config.center_crop, config.preserve_input_precision]
    fingerprint = hashlib.sha256(json.dumps(decisive).encode()).hexdigest()
    return replace(stream, form=form, fingerprint=fingerprint)


def _open_iterable(source: Source, config: DataConfig) -> tuple[Any, np.ndarray, tuple[str, ...], Any, int | None]:
    """The data set, its rows per shard, the files that are its shards, what identifies it, and its rows."""
    import datasets
    from pyarrow.dataset import ParquetFragmentScanOptions

    path = str(source.folder or source.name)
    with loading(source, config):
        builder = datasets.load_dataset_builder(path, config.dataset_config_name, cache_dir=config.cache_dir)
        if hasattr(builder.config, "decode_num_threads"):
            builder.config.decode_num_threads = 0  # pyright: ignore[reportAttributeAccessIssue]
        if hasattr(builder.config, "fragment_scan_options"):
            # Else pyarrow keeps all that it has read of a file until the end of the file (apache/arrow#39808).
            options = ParquetFragmentScanOptions(pre_buffer=False)
            builder.config.fragment_scan_options = options  # pyright: ignore[reportAttributeAccessIssue]
        dataset: Any = builder.as_streaming_dataset(split="train")
    if dataset.features is None:
        raise UsageError(
            "dataset_name must name data whose columns are declared, to be streamed: leave out --streaming"
        )
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
    return choose_columns(dataset, config), counts, files, identity, num_images


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
