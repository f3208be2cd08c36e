"""Where images come from: `digits`, a folder of images or of parquet files, a folder saved by `datasets`, a Hub id."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_ddpm.data.config import DataConfig
from hf_ddpm.runtime.errors import UsageError

if TYPE_CHECKING:
    from datasets import Dataset

IMAGE_NAME = re.compile(r".*\.(a?png|jpe?g|jpe|jfif|webp|bmp|dib|gif|tiff?|jp2|p[bgnp]m|tga|ico)", re.IGNORECASE)
SPLIT_NAMES = ("test", "validation", "valid", "val", "eval", "dev")


@dataclass(frozen=True)
class Source:
    option: str  # the setting that names it
    kind: str  # digits | images | parquet | saved | hub
    name: str
    folder: Path | None


def check_source(config: DataConfig, output_dir: str | None = None) -> None:
    """Check that the images can have such a source, from file names alone and without a network.

    Args:
        output_dir: The folder that a run would write to; None if nothing is written.

    Raises:
        UsageError: They cannot, or `output_dir` lies in the folder of images.
    """
    source = find_source(config)
    if source.folder is None or output_dir is None:
        return
    if Path(output_dir).resolve().is_relative_to(source.folder.resolve()):
        raise UsageError(
            f"output_dir must not be in the folder of images, where its pictures would be trained on, "
            f"got {output_dir!r} in {str(source.folder)!r}: give another --output_dir"
        )


def find_source(config: DataConfig) -> Source:
    name, train_data_dir = config.dataset_name, config.train_data_dir
    if name and train_data_dir:
        raise UsageError(
            f"dataset_name and train_data_dir exclude each other, got {name!r} and {train_data_dir!r}: give only one"
        )
    if name is None and train_data_dir is None:
        name = "digits"
    given = name or train_data_dir
    if not given:
        raise UsageError("dataset_name must be a name, a folder or a Hub id, got '': say, --dataset_name digits")
    option = "dataset_name" if name else "train_data_dir"
    folder = Path(given).expanduser()
    if name == "digits":
        source = Source(option, "digits", name, Path(str(resources.files("hf_ddpm.data") / "digits")))
    elif folder.is_dir():
        kind = _folder_kind(option, folder)
        has_splits = (folder / "train").is_dir() and any((folder / split).is_dir() for split in SPLIT_NAMES)
        label = folder.resolve().name
        # Of a folder with splits `train` is meant, as `datasets` loads it.
        source = Source(option, kind, label, folder / "train" if kind == "images" and has_splits else folder)
    elif train_data_dir or folder.exists() or given.startswith((".", "/", "~")) or given.count("/") > 1:
        raise UsageError(f"{option} must be a folder, got {given!r}: there is no folder {str(folder.absolute())!r}")
    else:
        source = Source(option, "hub", given, None)
    if config.dataset_config_name and source.kind not in ("hub", "parquet"):
        raise UsageError(
            f"dataset_config_name has no effect on {given!r}, got {config.dataset_config_name!r}: leave it out"
        )
    return source


def _folder_kind(option: str, folder: Path) -> str:
    if option == "dataset_name" and (folder / "dataset_dict.json").is_file():
        splits = json.loads((folder / "dataset_dict.json").read_text())["splits"]
        if "train" not in splits:
            raise UsageError(
                f"{option} must hold a split `train`, got {str(folder)!r} with {splits}: name a folder in it"
            )
        return "saved"
    if option == "dataset_name" and (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        return "saved"
    paths = [path for path in files_below(folder) if path.name != "metadata.parquet"]
    has_images = any(IMAGE_NAME.fullmatch(path.name) for path in paths)
    has_parquet = option == "dataset_name" and any(path.suffix == ".parquet" for path in paths)
    if has_images and has_parquet:
        raise UsageError(f"{option} must hold images or parquet files, got both in {str(folder)!r}: name a sub-folder")
    if not has_images and not has_parquet:
        wanted = "images or parquet files" if option == "dataset_name" else "images (parquet files: --dataset_name)"
        raise UsageError(f"{option} must be a folder of {wanted}, got {str(folder)!r}: nothing below it is one")
    return "images" if has_images else "parquet"


def files_below(folder: Path) -> Iterator[Path]:
    for root, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
        yield from (Path(root, name) for name in sorted(names) if not name.startswith("."))


def open_dataset(config: DataConfig) -> Dataset:
    """The split `train`: the column of images, not decoded, and after it that of labels if `label_column` is given.

    Raises:
        UsageError: the source cannot be loaded or is empty, or its columns are not what the settings say.
    """
    source = find_source(config)
    with loading(source, config):
        loaded = _load(source, config)
    dataset: Any = choose_columns(loaded, config)
    if len(dataset) == 0:
        raise no_rows(source)
    return dataset


def _load(source: Source, config: DataConfig) -> Any:
    import datasets

    options: dict[str, Any] = {"split": "train", "cache_dir": config.cache_dir}
    folder = source.folder
    if folder is None:
        return datasets.load_dataset(source.name, config.dataset_config_name, **options)
    if source.kind == "digits":
        return datasets.load_dataset("parquet", data_files={"train": str(folder / "digits.parquet")}, **options)
    if source.kind == "images":
        pattern = f"{glob.escape(str(folder))}/**"
        return datasets.load_dataset("imagefolder", data_files={"train": pattern}, **options)
    if source.kind == "parquet":
        return datasets.load_dataset(str(folder), config.dataset_config_name, **options)
    saved = datasets.load_from_disk(str(folder))
    return saved["train"] if isinstance(saved, datasets.DatasetDict) else saved


@contextlib.contextmanager
def loading(source: Source, config: DataConfig) -> Iterator[None]:
    """Within it, what `datasets` raises for a source becomes a UsageError, and a local folder needs no network."""
    from datasets import config as hf_config
    from datasets.exceptions import DatasetsError

    counts = hf_config.HF_UPDATE_DOWNLOAD_COUNTS
    try:
        if source.folder is not None:
            # else `datasets` reports local folders over the network too, and without one waits seconds for it
            hf_config.HF_UPDATE_DOWNLOAD_COUNTS = False
        yield
    except IndexError as error:  # what `datasets` raises for a folder that it saved without rows
        raise no_rows(source) from error
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
        hf_config.HF_UPDATE_DOWNLOAD_COUNTS = counts


def choose_columns(dataset: Any, config: DataConfig) -> Any:
    """The column of images, not decoded, and after it that of labels if `label_column` is given."""
    import datasets

    features, column, label = dataset.features, config.image_column, config.label_column
    images = [name for name, feature in features.items() if _holds_images(feature)]
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
    if label is not None and not _holds_classes(features[label]):
        raise UsageError(
            f"label_column must hold integers, classes or strings, got {label!r} of {features[label]}: --label_column"
        )
    columns = [column] if label is None else [column, label]
    return dataset.select_columns(columns).cast_column(column, datasets.Image(decode=False))


def no_rows(source: Source) -> UsageError:
    return UsageError(f"{source.option} must hold images, got {source.name!r} with 0 rows: name another")


def license_of(source: Source, dataset: Any) -> str | None:
    return "cc-by-4.0" if source.kind == "digits" else dataset.info.license or None


def _holds_images(feature: Any) -> bool:
    if isinstance(feature, dict):  # what an Image is in parquet files without `datasets`' metadata
        return set(feature) == {"bytes", "path"}
    return type(feature).__name__ == "Image"


def _holds_classes(feature: Any) -> bool:
    dtype = str(getattr(feature, "dtype", ""))
    return dtype in ("string", "large_string", "bool") or dtype.startswith(("int", "uint"))
