"""The sources of images: which of them a user means, and how `datasets` loads it.

source     `digits`, a folder of images, of parquet files or of WebDataset shards (.tar), a folder saved by `datasets`,
           or a Hub id
split      a named part of a source, `train` unless something else is said
column     the images of a source stand in one column of its table, and perhaps their classes in another
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from hf_ddpm.data.array_files import is_array_file, is_hdf5, require_package
from hf_ddpm.data.arrays import (
    check_array_settings,
    is_read_as_arrays,
    require_no_array_settings,
)
from hf_ddpm.data.config import DataConfig
from hf_ddpm.data.held_out import HELD_OUT_SPLIT
from hf_ddpm.data.image_folder import (
    UNPACK,
    ImageFolder,
    list_images,
    split_folders,
    split_kind,
)
from hf_ddpm.data.metadata import Metadata, column_of_files
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.runtime.files import look_at, naming_damage, read_mapping

if TYPE_CHECKING:
    pass


SPLIT_NAME = r"\w+([.-]\w+)*"


@dataclass(frozen=True)
class Source:
    """A source of images.

    Args:
        option: The setting by which the user named the source: "dataset_name" or "train_data_dir".
        kind: "digits", "images" (a folder of them), "arrays" (a folder of their files), "parquet", "tar" or "hdf5" (a
            folder of tables), "saved" (by `datasets`) or "hub". Where metadata pair images and arrays, it is that of
            the column of images.
        name: The name of the folder without the folders above it, or the Hub id.
        folder: The folder; None for the Hub. Of a folder of images with splits, that of the split to train on.
        splits: The folders of images that are splits, by their names.
    """

    option: str
    kind: str
    name: str
    folder: Path | None
    splits: Mapping[str, Path] = field(default_factory=dict)


def check_source(config: DataConfig, output_dir: str | None = None) -> None:
    """Check by file names alone, without a network, that the settings name a possible source.

    Args:
        config: The settings of the data.
        output_dir: The folder that a run would write to; None if nothing is written.

    Raises:
        UsageError: When no source can be meant, or `output_dir` lies in the folder of images.
    """
    source = find_source(config)
    check_array_settings(config)
    kinds = {source.kind, *([] if config.condition_column is None else [kind_of_conditions(config)])}
    if kinds <= {"digits", "images"}:
        require_no_array_settings(config)
    if source.folder is None or output_dir is None:
        return
    # Beside splits its pictures would make another folder of images.
    folder = Path(config.dataset_name or config.train_data_dir or "").expanduser() if source.splits else source.folder
    if Path(output_dir).resolve().is_relative_to(folder.resolve()):
        raise UsageError(
            f"output_dir must not be in the folder of images, where its pictures would be trained on, "
            f"got {output_dir!r} in {str(folder)!r}: give another --output_dir"
        )


def find_source(config: DataConfig) -> Source:
    """Find the source that the settings name.

    Raises:
        UsageError: When there is no such folder, it holds no images, two settings contradict each other, or no request
            can carry the token of the Hub.
    """
    name, train_data_dir = config.dataset_name, config.train_data_dir
    if name and train_data_dir:
        raise UsageError(
            f"dataset_name and train_data_dir exclude each other, got {name!r} and {train_data_dir!r}: give only one"
        )
    if name is None and train_data_dir is None:
        name = "digits"
    given = name or train_data_dir
    if not given:
        raise UsageError(
            "dataset_name must be a name, a folder or a Hub id, got '': leave it out, or give --dataset_name digits"
        )
    option = "dataset_name" if name else "train_data_dir"
    folder = look_at(option, given)
    if name == "digits":
        source = Source(option, "digits", name, Path(str(resources.files("hf_ddpm.data") / "digits")))
    elif folder.is_dir():
        source = _folder_source(option, folder, config)
    elif folder.is_file() or given.endswith((".tar", ".zip")):
        raise UsageError(
            f"{option} must be a folder, got {given!r}: name the folder of shards (.tar) by --dataset_name, unpack "
            "other archives, and put an image into a folder"
        )
    elif train_data_dir or folder.exists() or given.startswith((".", "/", "~")) or given.count("/") > 1:
        raise UsageError(f"{option} must be a folder, got {given!r}: there is no folder {str(folder.absolute())!r}")
    else:
        from hf_ddpm.hub.token import check_token

        check_token()
        source = Source(option, "hub", given, None)
    if config.train_split not in (None, "train") and source.kind == "digits":
        raise UsageError(f"train_split must be train, which is all that digits has, got {config.train_split!r}")
    if config.dataset_config_name and source.kind not in ("hub", "parquet", "tar", "hdf5"):
        raise UsageError(
            f"dataset_config_name has no effect on {given!r}, got {config.dataset_config_name!r}: leave it out"
        )
    _check_eval_fraction(config, source)
    return source


def kind_of_conditions(config: DataConfig) -> str:
    """Return the kind of the source, see `Source`, where it is that of the column of conditions."""
    return find_source(replace(config, image_column=config.condition_column)).kind


def _check_eval_fraction(config: DataConfig, source: Source) -> None:
    """Refuse `eval_fraction` beside a split that has the name of what it would hold out."""
    if config.eval_fraction is None:
        return
    splits = [*source.splits]
    if source.kind == "saved" and source.folder is not None and (source.folder / HELD_OUT_SPLIT).is_dir():
        splits = [HELD_OUT_SPLIT]
    taken = [name for name in splits if split_kind(name) == HELD_OUT_SPLIT]
    if taken or config.train_split == HELD_OUT_SPLIT:
        raise UsageError(
            f"eval_fraction must be left out where there is a split {HELD_OUT_SPLIT!r}, got {config.eval_fraction:g} "
            f"and {(taken or [config.train_split])[0]!r} of {source.name!r}: evaluate on that, or name the folder to "
            "train on alone"
        )


def _folder_source(option: str, folder: Path, config: DataConfig) -> Source:
    train_split = config.train_split
    if train_split is not None and not re.fullmatch(SPLIT_NAME, train_split):
        raise UsageError(f"train_split must be a name such as train or test, got {train_split!r}")
    name = Path(os.path.abspath(folder)).name  # of the link, where it is one
    if option == "dataset_name" and (folder / "dataset_dict.json").is_file():
        _check_saved_splits(option, folder, train_split or "train")
        return Source(option, "saved", name, folder)
    if option == "dataset_name" and (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        if train_split is not None:
            raise UsageError(
                f"train_split has no effect on {str(folder)!r}, which holds one split, got {train_split!r}"
            )
        return Source(option, "saved", name, folder)
    listed = list_images(folder)
    if (tables := _kind_of_tables(option, folder, listed)) is not None:
        return Source(option, tables, name, folder)
    kind = "arrays" if is_read_as_arrays(listed.images, listed.arrays, config) else "images"
    if train_split is not None:
        return _with_kind_of_column(Source(option, kind, name, *_chosen_split(folder, listed, train_split)), config)
    files = listed.images or listed.arrays
    splits = split_folders(folder, files)
    if not splits:
        _refuse_splits_in_classes(option, folder, files)
    trained = [path for split, path in splits.items() if split_kind(split) == "train"]
    if splits and len(trained) != 1:
        raise UsageError(
            f"{option} must hold one folder to train on beside those of other splits, got {[*splits]} in "
            f"{str(folder)!r}: give --train_split NAME"
        )
    return _with_kind_of_column(Source(option, kind, name, trained[0] if splits else folder, splits), config)


def _with_kind_of_column(source: Source, config: DataConfig) -> Source:
    """Return a folder of images as one of arrays where metadata pair these, and the files of the images are arrays."""
    metadata = None
    if source.kind == "images" and source.folder is not None and config.condition_column is not None:
        metadata = list_images(source.folder).metadata
    if metadata is None:
        return source
    column = column_of_files(metadata, config)
    paths = [Path(path) for path in metadata.columns[column] if path is not None] if column else []
    arrays = [path for path in paths if is_array_file(path)]
    images = [path for path in paths if not is_array_file(path)]
    return replace(source, kind="arrays") if is_read_as_arrays(images, arrays, config) else source


def _refuse_splits_in_classes(option: str, folder: Path, files: list[Path]) -> None:
    """Refuse folders of splits in each of the folders of classes: all images would be trained on."""
    names = {path.parent.name for path in files if path.parent != folder}
    kinds = {split_kind(name) for name in names}
    if None not in kinds and "train" in kinds and len(kinds) > 1:
        last = files[-1].parent
        raise UsageError(
            f"{option} must hold folders of splits above those of classes, got "
            f"{last.relative_to(folder).as_posix()!r} in {str(folder)!r}: move the images to "
            f"{last.name}/{last.parent.name}"
        )


def _chosen_split(folder: Path, listed: ImageFolder, train_split: str) -> tuple[Path, dict[str, Path]]:
    """Return the folder of a split that the user named, and all folders beside it."""
    path = next((level / train_split for level in (folder, folder / "images") if (level / train_split).is_dir()), None)
    if path is None:
        raise UsageError(f"train_split must be a folder in {str(folder)!r}, got {train_split!r}, which is none")
    chosen = list_images(path)
    if not chosen.images and not chosen.arrays:
        raise UsageError(f"train_split must be a folder of images, got {str(path)!r}, which holds none")
    beside = {each.name: each for each in sorted(path.parent.iterdir()) if each.is_dir() and each.name[0] != "."}
    return path, beside


def _check_saved_splits(option: str, folder: Path, train_split: str) -> None:
    with naming_damage(f"{folder / 'dataset_dict.json'} cannot be read", "save the data set again"):
        splits = [*map(str, read_mapping(folder / "dataset_dict.json", "save the data set again")["splits"])]
    if train_split not in splits:
        raise UsageError(
            f"{option} must hold a split `{train_split}`, got {str(folder)!r} with {splits}: give --train_split, or "
            "name a folder in it"
        )


def _kind_of_tables(option: str, folder: Path, listed: ImageFolder) -> str | None:
    """Return "parquet", "tar" or "hdf5" for a folder of tables, which only `dataset_name` may name; else None.

    `datasets` reads the rows of HDF5 files along the first axis of all arrays in them. As `train_data_dir` each file
    is an image.
    """
    is_named = option == "dataset_name"
    has_images, has_parquet = bool(listed.images), is_named and ".parquet" in listed.unread
    if has_images and has_parquet:
        raise UsageError(f"{option} must hold images or parquet files, got both in {str(folder)!r}: name a sub-folder")
    if is_named and not has_images and listed.arrays and all(is_hdf5(path) for path in listed.arrays):
        require_package(listed.arrays[0])
        return "hdf5"
    has_files = has_images or has_parquet or bool(listed.arrays)
    if not has_files and is_named and f".tar {UNPACK}" in listed.unread:
        return "tar"
    if not has_files:
        wanted = "images, parquet files or shards (.tar)"
        if not is_named:
            wanted = "images (parquet files and shards, .tar: --dataset_name)"
        unread = ", ".join(f"{count:,} {kind}" for kind, count in sorted(listed.unread.items()))
        others = f", but {unread}" if unread else ""
        raise UsageError(
            f"{option} must be a folder of {wanted}, got {str(folder)!r}: nothing below it is one{others}"
        )
    return "parquet" if has_parquet else None


def folder_of_images(source: Source) -> Path | None:
    """Return the folder of a folder of images, or of files of arrays; None for other sources."""
    return source.folder if source.kind in ("images", "arrays") else None


def metadata_of(source: Source, config: DataConfig) -> Metadata | None:
    """Return the metadata whose rows a run reads: of images any, of arrays those that name conditions.

    Raises:
        UsageError: As `read_metadata` raises it.
    """
    is_read = source.kind == "images" or (source.kind == "arrays" and config.condition_column is not None)
    return list_images(source.folder).metadata if is_read and source.folder is not None else None


def files_of_arrays(source: Source) -> list[Path]:
    """Return the files of a folder of arrays: TIFF files that are read as values, or those of other formats."""
    assert source.folder is not None
    listed = list_images(source.folder)
    return listed.images or listed.arrays
