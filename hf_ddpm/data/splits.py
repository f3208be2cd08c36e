"""Any split of any source of images."""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from hf_ddpm.data.cache import ImageCache, load_images
from hf_ddpm.data.config import DataConfig
from hf_ddpm.data.sources import Source, find_source
from hf_ddpm.runtime.errors import UsageError


@contextlib.contextmanager
def open_split(config: DataConfig, split: str, option: str = "split") -> Iterator[ImageCache]:
    """The images of a split, as `load_images` gives those of `train`; they may be gone afterwards.

    Args:
        option: what the user named the split by, for errors.

    Raises: UsageError as `load_images`, or if there is no such split.
    """
    if not re.fullmatch(r"\w+([.-]\w+)*", split):
        raise UsageError(f"{option} must be a name such as train or test, got {split!r}")
    source = find_source(config)
    if split == "train":
        yield load_images(config)
    elif source.kind in ("images", "saved"):
        # Both keep a split in a folder of its name.
        root = Path(config.dataset_name or config.train_data_dir or "").expanduser()
        folder = root / split
        if not folder.is_dir():
            raise UsageError(f"{option} must be in {source.option} as a folder, got {split!r} of {source.name!r}")
        if option != "split" and source.kind == "images" and source.folder == root:
            raise UsageError(
                f"{option} must be held out, got {split!r} of {source.name!r}, all of which is trained on: put the "
                "others in a folder `train` beside it"
            )
        kind = "train_data_dir" if source.kind == "images" else "dataset_name"
        folders = {"dataset_name": None, "train_data_dir": None, kind: str(folder)}
        yield load_images(replace(config, **folders))
    elif source.kind == "digits":
        raise UsageError(f"{option} must be train, which is all that digits has, got {split!r}")
    else:
        with tempfile.TemporaryDirectory(prefix="hf_ddpm-", ignore_cleanup_errors=True) as temporary:
            saved = Path(temporary) / "split"
            _load_split(source, config, split, option).save_to_disk(saved)
            settings = {"dataset_name": str(saved), "dataset_config_name": None, "cache_dir": temporary}
            yield load_images(replace(config, **settings))


def _load_split(source: Source, config: DataConfig, split: str, option: str) -> Any:
    import datasets
    from datasets.exceptions import DatasetsError

    path = source.name if source.folder is None else str(source.folder)
    try:
        return datasets.load_dataset(path, config.dataset_config_name, split=split, cache_dir=config.cache_dir)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise UsageError(
            f"{option} must be one of {source.option} {source.name!r}, got {split!r}: {type(error).__name__}: {error}"
        ) from error
