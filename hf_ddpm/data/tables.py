"""The tables of sources: how `datasets` opens a split of one, and what is wrong where it cannot."""

from __future__ import annotations

import contextlib
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_ddpm.data.array_pairs import open_array_pairs
from hf_ddpm.data.arrays import open_array_files
from hf_ddpm.data.columns import choose_columns
from hf_ddpm.data.config import DataConfig
from hf_ddpm.data.held_out import HELD_OUT_SPLIT, Parts, divide, is_held_out
from hf_ddpm.data.image_folder import ImageFolder, list_images, open_images
from hf_ddpm.data.metadata import column_of_files, require_files
from hf_ddpm.data.sources import (
    Source,
    files_of_arrays,
    find_source,
    folder_of_images,
    kind_of_conditions,
    metadata_of,
)
from hf_ddpm.data.volumes import with_slices
from hf_ddpm.runtime.errors import MissingSplitError, UsageError, in_one_line

if TYPE_CHECKING:
    from datasets import Dataset


def _check_no_test_split(config: DataConfig, source: Source) -> None:
    """Refuse `eval_fraction` for tables that have a split of the name of what it would hold out."""
    if source.kind not in ("parquet", "tar", "hdf5", "hub"):
        return
    import datasets

    name = source.name if source.folder is None else str(source.folder)
    with as_usage_errors(source, config):
        splits = datasets.get_dataset_split_names(name, config.dataset_config_name)
    if HELD_OUT_SPLIT in splits:
        raise UsageError(
            f"eval_fraction must be left out where there is a split {HELD_OUT_SPLIT!r}, got {config.eval_fraction:g} "
            f"and the splits {', '.join(splits)} of {source.name!r}: evaluate on that"
        )


def open_dataset(
    config: DataConfig, split: str | None = None, split_option: str = "split", with_conditions: bool = False
) -> Dataset:
    """Open a split: the column of encoded images, and after it those of labels if `label_column` is given.

    Args:
        config: The settings of the data.
        split: The name of the split; only a parquet folder and a data set on the Hub have others than that of
            training, which is the default, and what `eval_fraction` holds out of it.
        split_option: The setting by which the user named the split, for error messages.
        with_conditions: Whether the column that `condition_column` names comes last.

    Raises:
        UsageError: When the source cannot be loaded, has no such split, is empty, or lacks the columns that the
            settings name.
    """
    source = find_source(config)
    loaded = open_table(config, split, split_option)
    if config.eval_fraction is not None and split in (None, "train", config.train_split, HELD_OUT_SPLIT):
        _check_no_test_split(config, source)
        parts = divide(loaded, folder_of_images(source), config)
        loaded = loaded.select(parts.held_out if split == HELD_OUT_SPLIT else parts.trained)
    if config.label_column == "label" and source.kind == "images" and "label" not in loaded.column_names:
        assert source.folder is not None
        _explain_uneven_classes(list_images(source.folder))
    dataset: Any = choose_columns(loaded, config, with_conditions)
    if len(dataset) == 0:
        raise no_images_error(source)
    return dataset


def open_table(config: DataConfig, split: str | None = None, split_option: str = "split") -> Any:
    """Open a split with all its columns, and all its rows: what is held out is still in the split to train on.

    Args:
        config: The settings of the data.
        split: As of `open_dataset`.
        split_option: As of `open_dataset`.

    Raises:
        UsageError: When the source cannot be loaded, or has no such split.
    """
    trained = config.train_split or "train"
    split = trained if split is None or is_held_out(config, split) else split
    source = find_source(config)
    with as_usage_errors(source, config, split, split_option):
        table = _load_split(source, config, split)
    return with_slices(table, config)


def divide_training(config: DataConfig) -> Parts:
    """Divide the rows of the split that is trained on by `eval_fraction`; see `divide`."""
    return divide(open_table(config), folder_of_images(find_source(config)), config)


def _explain_uneven_classes(listed: ImageFolder) -> None:
    """Name two images because of which folders are no classes, if there are any.

    Raises:
        UsageError: When not all images are equally deep.
    """
    by_depth = {len(path.parts): path.relative_to(listed.folder).as_posix() for path in listed.images}
    if len(by_depth) > 1:
        shallow, deep = by_depth[min(by_depth)], by_depth[max(by_depth)]
        raise UsageError(
            f"label_column 'label' is the folder of each image, and all must be equally deep, got {shallow!r} beside "
            f"{deep!r}: move one, or name the classes in metadata.csv"
        )


def _load_split(source: Source, config: DataConfig, split: str) -> Any:
    import datasets

    options: dict[str, Any] = {"split": split, "cache_dir": config.cache_dir}
    folder = source.folder
    if folder is None:
        return datasets.load_dataset(source.name, config.dataset_config_name, **options)
    if source.kind == "digits":
        return datasets.load_dataset("parquet", data_files={"train": str(folder / "digits.parquet")}, **options)
    if source.kind in ("images", "arrays"):
        return _open_files(source, config)
    if source.kind in ("parquet", "tar", "hdf5"):
        loaded = datasets.load_dataset(str(folder), config.dataset_config_name, **options)
        return loaded.flatten() if source.kind == "tar" else loaded  # of a JSON file, each key is a column
    saved = datasets.load_from_disk(str(folder))
    return saved[split] if isinstance(saved, datasets.DatasetDict) else saved


def _open_files(source: Source, config: DataConfig) -> Dataset:
    """Open a folder of images or of arrays, or the pairs of them that its metadata name.

    Raises:
        UsageError: When a file cannot be opened, or metadata name no conditions.
    """
    assert source.folder is not None
    listed, metadata, of_arrays = list_images(source.folder), metadata_of(source, config), {}
    if metadata is not None and config.condition_column in metadata.file_columns:
        kinds = {column_of_files(metadata, config): source.kind, config.condition_column: kind_of_conditions(config)}
        of_arrays = {name: kind == "arrays" for name, kind in kinds.items() if name in metadata.file_columns}
    if source.kind == "images" and not any(of_arrays.values()):
        return open_images(listed, config)
    if metadata is None:
        return open_array_files(files_of_arrays(source), config)
    if not of_arrays:
        raise UsageError(
            f"condition_column must name a second column of files, got {config.condition_column!r}, none of "
            f"{metadata.file_columns}: --condition_column, without the ending _file_name"
        )
    require_files(metadata, source.folder, [*listed.images, *listed.arrays], config)
    return open_array_pairs(metadata, of_arrays, config)


@contextlib.contextmanager
def as_usage_errors(
    source: Source, config: DataConfig, split: str | None = None, split_option: str = "split"
) -> Iterator[None]:
    """Turn what `datasets` raises for a source into a UsageError for the duration of a `with` block.

    In the block, `datasets` uses no network for a local folder.
    """
    from datasets import config as hf_config
    from datasets.exceptions import DatasetsError

    updates_counts = hf_config.HF_UPDATE_DOWNLOAD_COUNTS
    try:
        if source.folder is not None:
            # Otherwise `datasets` reports local folders over the network too, and waits for seconds without one.
            hf_config.HF_UPDATE_DOWNLOAD_COUNTS = False
        yield
    except UsageError:
        raise
    except IndexError as error:  # `datasets` raises it for a folder that it saved without rows.
        raise no_images_error(source) from error
    except (OSError, ValueError, RuntimeError, DatasetsError, zipfile.BadZipFile, tarfile.TarError) as error:
        cause = _first_cause(error)
        reason = in_one_line(cause, with_type=True)
        if (problem := _cache_problem(cause, config)) is not None:
            raise UsageError(problem) from error
        if split not in (None, config.train_split or "train"):
            # `datasets` raises a ValueError for an unknown split.
            raise (MissingSplitError if isinstance(error, ValueError) else UsageError)(
                f"{split_option} must be a split of {source.option} {source.name!r}, got {split!r}: {reason}"
            ) from error
        if source.folder is None and isinstance(error, OSError):
            raise UsageError(
                f"dataset_name must be `digits`, a folder or a data set on the Hub, got {source.name!r}: it is "
                f"neither a folder here nor reachable on the Hub; check name, network and login ({reason})"
            ) from error
        raise UsageError(
            f"{source.option} must be loadable with a split `{config.train_split or 'train'}` (--train_split), and "
            "with --dataset_config_name if there are several configurations, got "
            f"{source.name!r} with {config.dataset_config_name!r}: {reason}"
        ) from error
    finally:
        hf_config.HF_UPDATE_DOWNLOAD_COUNTS = updates_counts


def _first_cause(error: BaseException) -> BaseException:
    """Return the error that others followed: `datasets` says of most that "an error occurred"."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _cache_problem(error: BaseException, config: DataConfig) -> str | None:
    """Return the message of an error that is none of the data, but of the folder that `datasets` keeps them in."""
    from datasets import config as hf_config

    if not isinstance(error, OSError) or error.filename is None:
        return None
    folder = Path(config.cache_dir or hf_config.HF_DATASETS_CACHE).expanduser().resolve()
    if not Path(str(error.filename)).resolve().is_relative_to(folder):
        return None
    name = "cache_dir" if config.cache_dir else "HF_HOME, the default of cache_dir,"
    return (
        f"{name} must be a folder that can be written, got {str(folder)!r}: {error.strerror}; give another --cache_dir"
    )


def no_images_error(source: Source) -> UsageError:
    """Return the error for a source without rows."""
    return UsageError(f"{source.option} must hold images, got {source.name!r} with 0 rows: name another")


def license_of(source: Source, dataset: Any) -> str | None:
    """Return the license of a data set as its metadata state it; None if they state none."""
    return "cc-by-4.0" if source.kind == "digits" else dataset.info.license or None
