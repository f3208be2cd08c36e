"""Splits of every kind of source."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest
from PIL import Image

from hf_ddpm.data.cache import load_images
from hf_ddpm.data.config import DataConfig
from hf_ddpm.data.splits import open_split
from hf_ddpm.runtime.errors import UsageError
from tests.support.image_data import cache_config, noise, save_grays

COUNTS = {"train": 4, "test": 3}


def save_splits(folder: Path, kind: str) -> None:
    """Save `train` and `test` as a folder of images, as parquet files or by `datasets`."""
    if kind == "images":
        for split, count in COUNTS.items():
            save_grays(folder / split, count)
        return
    splits = {}
    for split, count in COUNTS.items():
        columns = {"image": [Image.fromarray(noise(8, 8, seed=i)) for i in range(count)], "kind": range(count)}
        splits[split] = datasets.Dataset.from_dict(columns)
    if kind == "saved":
        datasets.DatasetDict(splits).save_to_disk(str(folder))
    else:
        for split, content in splits.items():
            content.to_parquet(folder / f"{split}-00000-of-00001.parquet")


@pytest.mark.parametrize("kind", ["images", "parquet", "saved"])
def test_open_split_gives_the_images_of_the_split(folder: Path, kind: str) -> None:
    save_splits(folder, kind)
    label_column = None if kind == "images" else "kind"
    for split, count in COUNTS.items():
        save_grays(folder.parent / f"{split} alone", count)
        alone = load_images(cache_config(folder.parent / f"{split} alone"))
        with open_split(cache_config(folder, label_column=label_column), split) as images:
            assert (images.pixels == alone.pixels).all()
            assert images.labels is None or images.labels.tolist() == list(range(count))


@pytest.mark.parametrize("kind", ["images", "parquet", "saved"])
def test_open_split_rejects_unknown_splits(folder: Path, kind: str) -> None:
    save_splits(folder, kind)
    with (
        pytest.raises(UsageError, match=r"eval_split must be .*dataset_name.* got 'dev'"),
        open_split(cache_config(folder), "dev", "eval_split"),
    ):
        pass


def test_open_split_rejects_a_split_that_is_trained_on(folder: Path) -> None:
    save_grays(folder / "test", 2)
    with open_split(cache_config(folder), "test") as images:
        assert len(images) == 2
    with (
        pytest.raises(UsageError, match="eval_split must be held out, got 'test' of 'photos', all of which"),
        open_split(cache_config(folder), "test", "eval_split"),
    ):
        pass


def test_open_split_checks_the_name_of_the_split(folder: Path) -> None:
    save_grays(folder / "train", 1)
    with pytest.raises(UsageError, match="split must be a name"), open_split(cache_config(folder), "../test"):
        pass
    with (
        pytest.raises(UsageError, match="split must be train, which is all that digits has, got 'test'"),
        open_split(DataConfig(dataset_name="digits"), "test"),
    ):
        pass
