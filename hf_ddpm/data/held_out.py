"""Images that are held out of the split that is trained on: `eval_fraction` of them, in whole groups.

group      the images with one value of `group_column`, as the slices of one volume; without it, those of one identity
identity   of an image: its path in the folder of images, of arrays with its number in the file; in other sources its
           content, so that copies stay together
order      of the groups: that of a hash of their names, which neither a seed nor the order of the images changes

Groups are held out in their order until they hold `eval_fraction` of the images. One that would overshoot by more than
is missing without it is passed over; if all would, the smallest is held out. A new run holds out more than
MAX_UNASKED_SHARE of the images only where `eval_fraction` is more.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hf_ddpm.data.arrays import is_array
from hf_ddpm.data.columns import choose_columns, encoded_images, holds_slices, image_column
from hf_ddpm.data.config import DataConfig, cache_folder
from hf_ddpm.data.volumes import VOLUMES
from hf_ddpm.runtime.errors import UsageError

HELD_OUT_FORMAT = 3  # Increase it when other images are held out, so that no older cache is read.
HELD_OUT_SPLIT = "test"  # what the images that are held out are called, wherever a split is named
MAX_UNASKED_SHARE = 0.5
ROWS_PER_BLOCK = 64
# The group columns that every folder of images has. The slices of a volume are in one file.
FOLDER, FILE = "folder", "file"


class Parts(NamedTuple):
    """The rows of a table that are trained on and those that are held out.

    Args:
        trained: The numbers of the rows that are trained on.
        held_out: Those of the others.
        num_groups: The number of groups that are held out.
        group_sizes: The number of images of each group, held out or not.
    """

    trained: list[int]
    held_out: list[int]
    num_groups: int
    group_sizes: list[int]

    @property
    def share(self) -> float:
        """The share of the rows that is held out."""
        return len(self.held_out) / (len(self.trained) + len(self.held_out))


def is_held_out(config: DataConfig, split: str) -> bool:
    """Return whether a split is held out of the one that is trained on."""
    return config.eval_fraction is not None and split == HELD_OUT_SPLIT


def divide(table: Any, folder: Path | None, config: DataConfig) -> Parts:
    """Divide the rows of the split that is trained on by `eval_fraction`.

    Args:
        table: The split, a data set of `datasets` with all its columns.
        folder: The folder, of a folder of images; else None.
        config: The settings of the data, with `eval_fraction`.

    Raises:
        UsageError: When `group_column` is no column, or nothing is left to train on.
    """
    assert config.eval_fraction is not None
    groups = groups_of(table, folder, config) if config.group_column else _identities(table, folder, config)
    sizes = Counter(groups)
    held_out: set[str] = set()
    num_held_out = 0
    wanted = config.eval_fraction * len(groups)
    for name in sorted(sizes, key=_hash):
        # A group that would overshoot by more than is missing without it stays.
        if num_held_out + sizes[name] / 2 < wanted:
            held_out.add(name)
            num_held_out += sizes[name]
    if not held_out:  # each group is too large: the smallest one
        name = min(sizes, key=lambda name: (sizes[name], _hash(name)))
        held_out.add(name)
    what = f"groups of {config.group_column!r}" if config.group_column else "images"
    if len(held_out) == len(sizes):
        raise UsageError(
            f"eval_fraction must leave {what} to train on, got {config.eval_fraction:g} of {len(sizes):,}: give a "
            "smaller one, or leave it out"
        )
    rows: tuple[list[int], list[int]] = ([], [])
    for row, name in enumerate(groups):
        rows[name in held_out].append(row)
    return Parts(*rows, num_groups=len(held_out), group_sizes=[*sizes.values()])


def require_share(parts: Parts, config: DataConfig) -> None:
    """Check that no more than MAX_UNASKED_SHARE of the images is held out unasked; a run that exists may go on.

    Raises:
        UsageError: When more is, since groups are large.
    """
    assert config.eval_fraction is not None
    if config.eval_fraction <= MAX_UNASKED_SHARE < parts.share:
        sizes, num_images = parts.group_sizes, len(parts.trained) + len(parts.held_out)
        what = f"groups of {config.group_column!r}" if config.group_column else "images"
        raise UsageError(
            f"eval_fraction must be near a share of whole {what}, got {config.eval_fraction:g} of {len(sizes):,} "
            f"with {min(sizes):,} to {max(sizes):,} of {num_images:,} images, of which {parts.share:.0%} would be "
            "held out: give smaller groups, or a split of your own"
        )


def groups_of(table: Any, folder: Path | None, config: DataConfig) -> list[str]:
    """Return the group of each row of a table, the value of `group_column` as a text.

    Args:
        table: A data set of `datasets` with all its columns.
        folder: The folder, of a folder of images; else None.
        config: The settings of the data, with `group_column`.

    Raises:
        UsageError: When there is no such column, or a cell is empty.
    """
    name = config.group_column
    assert name is not None
    if name not in table.column_names:
        if name == FILE and folder is None and holds_slices(table.features[image_column(table.features, config)]):
            return [_file_of(encoded, row, config) for row, encoded in enumerate(_encoded_images(table, config))]
        if name in (FOLDER, FILE) and folder is not None:
            paths = _paths(table, folder, config)
            return paths if name == FILE else [Path(path).parent.as_posix() for path in paths]
        own = f", or {FOLDER!r} or {FILE!r}, those of each image" if folder is not None else ""
        raise UsageError(f"group_column must be one of {table.column_names}{own}, got {name!r}: --group_column")
    cells = table.select_columns([name])[:][name]
    if hasattr(table.features[name], "int2str"):  # classes: their numbers differ from split to split
        cells = [None if cell is None else table.features[name].int2str(cell) for cell in cells]
    if None in cells:
        raise UsageError(
            f"group_column must give each image a group, got an empty cell in row {cells.index(None)} of {name!r}: "
            "fill it, or leave the row out"
        )
    return [*map(str, cells)]


def require_disjoint(trained: Sequence[str], others: Sequence[str], option: str, split: str, column: str) -> None:
    """Check that no group has images in training and in a split that is held out.

    Args:
        trained: The group of each image that is trained on.
        others: The group of each image of the split.
        option: The setting that names the split, for the message.
        split: The name of the split.
        column: The group column.

    Raises:
        UsageError: When one has, with the first of them.
    """
    if common := sorted({*trained} & {*others}):
        some = ", ".join([*map(repr, common[:3]), *["..."][: len(common) > 3]])
        raise UsageError(
            f"{option} must share no group of {column!r} with training, got {split!r} with {len(common):,} that do, "
            f"{some}: move all images of a group to one side, or leave out group_column"
        )


def _identities(table: Any, folder: Path | None, config: DataConfig) -> list[str]:
    if folder is not None:
        numbers = ((encoded or {}).get("slice") for encoded in _encoded_images(table, config))
        paths = _paths(table, folder, config)
        return [path if n is None else f"{path}:{n}" for path, n in zip(paths, numbers, strict=True)]
    return [_content_of(encoded, row, config) for row, encoded in enumerate(_encoded_images(table, config))]


def _file_of(encoded: Any, row: int, config: DataConfig) -> str:
    """Return the path of the file of a slice, as seen from the data or from the cache that it lies in.

    So it is the same wherever these are. Of a file that lies elsewhere it is the whole path.
    """
    if encoded is None:
        return f"row {row}"
    from huggingface_hub import constants

    path = Path(encoded["path"])
    data = config.dataset_name or config.train_data_dir
    named = (cache_folder(config) / VOLUMES, data, config.cache_dir, constants.HF_HUB_CACHE, constants.HF_HOME)
    roots = (Path(root).expanduser().absolute() for root in named if root is not None)
    root = next((root for root in roots if path.is_relative_to(root)), None)
    return (path if root is None else path.relative_to(root)).as_posix()


def _paths(table: Any, folder: Path, config: DataConfig) -> list[str]:
    """Return the path of each image as seen from the folder."""
    start = folder.absolute()
    return [
        # An empty cell is named, or left out, when it is decoded.
        f"row {row}" if encoded is None else Path(os.path.relpath(encoded["path"], start)).as_posix()
        for row, encoded in enumerate(_encoded_images(table, config))
    ]


def _encoded_images(table: Any, config: DataConfig) -> Any:
    """Yield the encoded image of each row."""
    images = choose_columns(table, replace(config, label_column=None))
    blocks = (slice(row, row + ROWS_PER_BLOCK) for row in range(0, len(images), ROWS_PER_BLOCK))
    return chain.from_iterable(encoded_images(images, rows) for rows in blocks)


def _content_of(encoded: Any, row: int, config: DataConfig) -> str:
    if isinstance(encoded, dict) and "slice" in encoded:  # a file is named by its content, or by the user
        return f"{_file_of(encoded, row, config)}:{encoded['slice']}"
    if is_array(encoded):
        values = np.asarray(encoded)
        return hashlib.sha256(f"{values.dtype} {values.shape}".encode() + values.tobytes()).hexdigest()
    content = b"" if encoded is None else encoded["bytes"] or str(encoded["path"]).encode()
    return hashlib.sha256(content).hexdigest()


def _hash(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()
