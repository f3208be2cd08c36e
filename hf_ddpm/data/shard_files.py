"""The shards of a source: which files, or parts of files, a stream opens one after the other.

A file of parquet is a shard; its footer tells how many rows it has, without an image. A tar file is one, too. What
`datasets` maps into memory is divided into shards of nearly equal size.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import numpy as np

from hf_ddpm.data.columns import check_label_column, choose_columns, label_columns
from hf_ddpm.data.config import DataConfig
from hf_ddpm.data.image_folder import files_below, list_images
from hf_ddpm.data.metadata import METADATA_NAMES
from hf_ddpm.data.sources import Source, files_of_arrays
from hf_ddpm.data.tables import as_usage_errors, open_dataset
from hf_ddpm.data.tar_shards import label_table, read_columns
from hf_ddpm.runtime.errors import UsageError, in_one_line

# Local files that `datasets` maps into memory have no shards of their own. To open a shard takes about a millisecond.
ROWS_PER_SHARD = 64
UNKNOWN = -1  # the number of rows of a shard that has not been read to its end


class Shards(NamedTuple):
    """An opened source.

    Args:
        dataset: The columns of images and classes, not decoded.
        rows_per_shard: As in `ImageStream` of shards.py.
        files: As in `ImageStream`.
        identity: What identifies the data for the fingerprint: names and sizes of files, or names with their commit.
        num_images: The number of rows; None if unknown.
        labels: The columns of labels, where the data set has none of them; see data/tar_shards.py.
    """

    dataset: Any
    rows_per_shard: np.ndarray
    files: tuple[str, ...]
    identity: Any
    num_images: int | None
    labels: Any = None


def open_mapped(source: Source, config: DataConfig) -> Shards:
    """Open a source that `datasets` maps into memory, and divide it into shards of nearly equal size.

    `datasets` keeps only the names of the files of an image folder, in the order of the names.
    """
    dataset = open_dataset(config)
    num_images = len(dataset)
    num_shards = max(1, num_images // ROWS_PER_SHARD)
    smaller, num_larger = divmod(num_images, num_shards)
    rows_per_shard = np.array([smaller + (shard < num_larger) for shard in range(num_shards)])
    return Shards(dataset, rows_per_shard, ("",) * num_shards, _names_and_sizes(source), num_images)


def open_iterable(source: Source, config: DataConfig) -> Shards:
    """Open a source whose files are read in passing; each file is a shard where `datasets` can do so."""
    import datasets
    from pyarrow.dataset import ParquetFragmentScanOptions

    path = str(source.folder or source.name)
    with as_usage_errors(source, config):
        builder = datasets.load_dataset_builder(path, config.dataset_config_name, cache_dir=config.cache_dir)
        if hasattr(builder.config, "decode_num_threads"):
            builder.config.decode_num_threads = 0  # pyright: ignore[reportAttributeAccessIssue]
        if hasattr(builder.config, "fragment_scan_options"):
            # Otherwise pyarrow keeps all that it has read of a file until the end of the file (apache/arrow#39808).
            options = ParquetFragmentScanOptions(pre_buffer=False)
            builder.config.fragment_scan_options = options  # pyright: ignore[reportAttributeAccessIssue]
        dataset: Any = builder.as_streaming_dataset(split=config.train_split or "train")
    if dataset.features is None:
        raise UsageError(
            f"dataset_name must name data whose columns are declared, to be streamed, got {source.name!r}: "
            "leave out --streaming"
        )
    paths = [str(file) for file in (builder.config.data_files or {}).get(config.train_split or "train", [])]
    files = tuple(paths) if len(paths) == dataset.num_shards else ("",) * dataset.num_shards
    rows_per_shard = np.full(len(files), UNKNOWN)
    split = (builder.info.splits or {}).get(config.train_split or "train")
    num_images = split.num_examples if split else None
    identity: Any = paths or builder.hash
    if source.folder is not None:
        identity = [(_relative_name(path, source.folder), Path(path).stat().st_size) for path in paths]
        if all(path.endswith(".parquet") for path in files):
            rows_per_shard = np.array([_count_rows(source, path) for path in files])
            num_images = int(rows_per_shard.sum())
    labels = None
    if source.kind == "tar" and config.label_column is not None:
        rows_per_shard, labels = _read_labels(files, config.label_column, dataset.features)
        num_images = len(labels)
        config = replace(config, label_column=None)
    return Shards(choose_columns(dataset, config), rows_per_shard, files, identity, num_images, labels)


def _read_labels(files: tuple[str, ...], label_column: str, features: Any) -> tuple[np.ndarray, Any]:
    """Read the columns of labels of WebDataset shards.

    Returns:
        The number of rows of each shard, and the columns as a table of `datasets`.

    Raises:
        UsageError: When a column is not there, or holds no labels.
    """
    nested = [f"{name}.{key}" for name, feature in features.items() if isinstance(feature, dict) for key in feature]
    there = [name for name, feature in features.items() if not isinstance(feature, dict)] + nested
    names = label_columns(label_column, there)
    for name in names:
        if name not in there:
            raise UsageError(f"label_column must be one of {there}, got {name!r}: --label_column")
    rows_per_shard, cells = read_columns(files, names)
    table = label_table(cells)
    for name in names:
        check_label_column(table, name, image_column="")
    return rows_per_shard, table


def _relative_name(path: str, folder: Path) -> str:
    """Return the path of a file as seen from a folder; the file itself may be a link to elsewhere."""
    parent = os.path.relpath(os.path.realpath(Path(path).parent), os.path.realpath(folder))
    return f"{parent}/{Path(path).name}"


def _names_and_sizes(source: Source) -> list[tuple[str, int]]:
    """Return path and size of each file that holds data, in a folder that may hold other files, too."""
    assert source.folder is not None
    if source.kind == "images":
        paths = [path for path in files_below(source.folder) if path.name in METADATA_NAMES]
        paths += list_images(source.folder).images + list_images(source.folder).files_elsewhere
    elif source.kind == "arrays":
        paths = files_of_arrays(source)
    else:
        ends = {"digits": (".parquet",), "saved": (".arrow", "state.json")}[source.kind]
        paths = [path for path in files_below(source.folder) if path.name.endswith(ends)]
    return [(_name_from(path, source.folder), path.stat().st_size) for path in paths if path.exists()]


def _name_from(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path, folder)).as_posix()


def row_groups_from(dataset: Any, file: str, first_row: int) -> tuple[list[Any], int]:
    """Divide a parquet file into its row groups, and leave out those before `first_row`.

    `skip` alone would read all rows that it skips.

    Returns:
        A data set for each row group that is left, and the row of the first of them that `first_row` is.
    """
    group, group_sizes = 0, _row_group_sizes(file)
    while group < len(group_sizes) and first_row >= group_sizes[group]:
        first_row -= group_sizes[group]
        group += 1
    resharded = dataset.reshard()
    return [resharded.shard(len(group_sizes), i) for i in range(group, len(group_sizes))], first_row


def _count_rows(source: Source, file: str) -> int:
    try:
        return sum(_row_group_sizes(file))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{source.option} must hold whole parquet files, got {file!r}: {in_one_line(error, with_type=True)}; "
            "replace it"
        ) from error


def _row_group_sizes(file: str) -> list[int]:
    """Return the number of rows of each row group of a parquet file, here or on the Hub; only its footer is read."""
    from pyarrow import parquet

    with fsspec.open(file, "rb") as opened:
        metadata = parquet.ParquetFile(opened).metadata
        return [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
