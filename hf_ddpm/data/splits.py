"""Any split of any source of images, decoded into a cache as the split `train` is."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from hf_ddpm.data.cache import ImageCache
from hf_ddpm.data.config import DataConfig
from hf_ddpm.data.description import describe_images
from hf_ddpm.data.held_out import FILE, groups_of, is_held_out, require_disjoint
from hf_ddpm.data.image_folder import split_kind
from hf_ddpm.data.images import load_images
from hf_ddpm.data.sources import SPLIT_NAME, Source, find_source, folder_of_images
from hf_ddpm.data.tables import open_dataset, open_table
from hf_ddpm.runtime.errors import MissingSplitError, UsageError, in_one_line


@contextlib.contextmanager
def open_split(config: DataConfig, split: str, option: str = "split") -> Iterator[ImageCache]:
    """Provide the images of a split for the duration of a `with` block; afterwards their files may be deleted.

    "train" is the split that is trained on, whatever its name.

    Args:
        config: The settings of the data.
        split: The name of the split.
        option: The setting by which the user named the split, for error messages.

    Raises:
        MissingSplitError: When there is no such split.
        UsageError: As `load_images` raises it.
    """
    check_split(config, split, option)
    check_groups(config, split, option)
    source = find_source(config)
    if split in ("train", config.train_split):
        yield load_images(config)
    elif source.kind in ("images", "arrays", "saved") and not is_held_out(config, split):
        yield load_images(_config_of_split_folder(source, config, split, option))
    else:
        with tempfile.TemporaryDirectory(prefix="hf_ddpm-", ignore_cleanup_errors=True) as temporary:
            saved = Path(temporary) / "split"
            with _without_bars():
                _save_split(config, split, option, saved)
            whole: dict[str, Any] = {"dataset_config_name": None, "train_split": None, "cache_dir": temporary}
            whole.update(train_data_dir=None, eval_fraction=None, group_column=None)
            yield load_images(replace(config, dataset_name=str(saved), **whole))


def _save_split(config: DataConfig, split: str, option: str, folder: Path) -> None:
    """Save a split as a data set of its own, with the bytes of its images."""
    held_out = open_dataset(config, split, option, with_conditions=True)
    try:
        held_out.save_to_disk(folder)
    except FileNotFoundError as error:  # metadata may name it
        raise UsageError(
            f"{option} must hold images that are there, got {in_one_line(error)}: remove its row, or restore it"
        ) from error


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Switch the progress bars of `datasets` off for the duration of a `with` block."""
    from datasets import config as hf_config
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    # What the environment says of them cannot be changed.
    if are_progress_bars_disabled() or hf_config.HF_DATASETS_DISABLE_PROGRESS_BARS is not None:
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def check_groups(config: DataConfig, split: str, option: str = "split") -> None:
    """Check that no group of `group_column` has images in training and in a split that is held out.

    No image is decoded.

    Raises:
        UsageError: When one has, or there is no such column.
    """
    if config.group_column is None or split in ("train", config.train_split) or is_held_out(config, split):
        return
    source = find_source(config)
    table, folder = open_table(config), folder_of_images(source)
    if config.group_column == FILE and folder is not None and FILE not in table.column_names:
        return  # no file is in two splits, though two may have one name
    trained = groups_of(table, folder, config)
    if source.kind in ("images", "arrays", "saved"):
        of_split = _config_of_split_folder(source, config, split, option)
        others = groups_of(open_table(of_split), folder_of_images(find_source(of_split)), config)
    else:
        others = groups_of(open_table(config, split, option), None, config)
    require_disjoint(trained, others, option, split, config.group_column)


def image_names(config: DataConfig, split: str, images: ImageCache) -> list[str]:
    """Return the name of each image of a split: its path in the folder of images, or its number in other sources.

    The name of one of several images in a file of arrays ends with its number in the file.

    Args:
        config: The settings of the data, none of whose images was left out.
        split: The name of the split.
        images: What `open_split` provides for it.
    """
    source = find_source(config)
    if source.kind not in ("images", "arrays"):
        return [f"{number:06d}" for number in range(len(images))]
    if split not in ("train", config.train_split) and not is_held_out(config, split):
        config, split = _config_of_split_folder(source, config, split, "split"), "train"
        source = find_source(config)
    dataset = open_dataset(config, split)
    assert source.folder is not None
    rows = dataset[:][dataset.column_names[0]]
    paths = [os.path.relpath(row["path"], source.folder.absolute()) for row in rows]
    # Metadata may name files elsewhere.
    names = [f"{i:06d}" if path.startswith(os.pardir) else Path(path).as_posix() for i, path in enumerate(paths)]
    numbers = (row.get("slice") for row in rows)
    return [name if k is None else f"{name}/{k:06d}" for name, k in zip(names, numbers, strict=True)]


def describe_split(config: DataConfig, split: str, images: ImageCache) -> list[str]:
    """Return what was read of a split, and what was not.

    Args:
        config: The settings of the data.
        split: The name of the split.
        images: What `open_split` provides for it.
    """
    source = find_source(config)
    if split in ("train", config.train_split):
        if (
            source.kind in ("images", "arrays") and source.splits
        ):  # what is in other folders is the business of other splits
            config = replace(config, dataset_name=None, train_data_dir=str(source.folder), train_split=None)
    elif is_held_out(config, split):
        config = replace(config, eval_fraction=None, group_column=None)
    elif source.kind in ("images", "arrays", "saved"):
        config = _config_of_split_folder(source, config, split, "split")
    first, *others = describe_images(config, replace(images, name=source.name))
    return [f"split {split} of {first}", *others]


def check_split(config: DataConfig, split: str, option: str = "split") -> None:
    """Check what names alone tell of a split, before any image is decoded.

    Raises:
        MissingSplitError: When there is no such split.
        UsageError: When it can be no name of one.
    """
    if not re.fullmatch(SPLIT_NAME, split):
        raise UsageError(f"{option} must be a name such as train or test, got {split!r}")
    source = find_source(config)
    if split == config.train_split and option != "split":
        raise MissingSplitError(f"{option} must be held out, got {split!r}, which is trained on (train_split)")
    if split in ("train", config.train_split) or is_held_out(config, split):
        return
    if source.kind == "digits":
        raise MissingSplitError(f"{option} must be train, which is all that digits has, got {split!r}")
    if source.kind in ("images", "arrays", "saved"):
        _config_of_split_folder(source, config, split, option)


def _config_of_split_folder(source: Source, config: DataConfig, split: str, option: str) -> DataConfig:
    """Return the settings that name the folder of a split: images and saved data sets keep each split in its own."""
    root = Path(config.dataset_name or config.train_data_dir or "").expanduser()
    of_kind = [path for name, path in source.splits.items() if split_kind(name) == split_kind(split) is not None]
    folder = source.splits.get(split) or (of_kind[0] if len(of_kind) == 1 else root / split)
    if not folder.is_dir():
        there = f", which has {', '.join(source.splits)}" if source.splits else ""
        raise MissingSplitError(
            f"{option} must be in {source.option} as a folder, got {split!r} of {source.name!r}{there}"
        )
    if option != "split" and source.kind in ("images", "arrays") and source.folder == root:
        raise MissingSplitError(
            f"{option} must be held out, got {split!r} of {source.name!r}, all of which is trained on: "
            + (
                "give --train_split train"
                if (root / "train").is_dir()
                else "put the others in a folder `train` beside it"
            )
        )
    whole: dict[str, Any] = {"train_split": None, "eval_fraction": None, "group_column": None}
    if source.kind in ("images", "arrays"):
        return replace(config, dataset_name=None, train_data_dir=str(folder), **whole)
    return replace(config, dataset_name=str(folder), train_data_dir=None, **whole)
