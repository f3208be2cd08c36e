"""Arrays with the settings of images: oblong sizes, crops, and what is held out of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from hf_ddpm.data.batches import fixed_pixels
from hf_ddpm.data.config import DataConfig
from hf_ddpm.data.images import load_images
from hf_ddpm.data.splits import check_groups, open_split
from hf_ddpm.data.tables import divide_training
from hf_ddpm.runtime.errors import UsageError
from tests.support.image_data import cache_config, micro_batches

# Of each value the number of its image, its row and its column.
PLACES = np.stack([np.stack(np.broadcast_arrays(i, *np.mgrid[:9, :14])) for i in range(12)]).astype(np.float32)


def places_config(folder: Path, **settings: Any) -> DataConfig:
    """Return settings for a folder of one file that holds all images."""
    (folder / "places").mkdir()
    np.save(folder / "places" / "all.npy", PLACES)
    return cache_config(None, train_data_dir=str(folder / "places"), cache_dir=str(folder / "cache"), **settings)


def test_arrays_of_one_size_keep_it(tmp_path: Path) -> None:
    images = load_images(places_config(tmp_path))
    assert images.size == (9, 14)
    assert np.array_equal(fixed_pixels(images), PLACES)


def test_center_crop_of_arrays_is_their_middle(tmp_path: Path) -> None:
    images = load_images(places_config(tmp_path, resolution=[9, 10], center_crop=True))
    assert np.array_equal(fixed_pixels(images), PLACES[:, :, :, 2:12])


def test_random_crops_of_arrays_are_windows_of_all_their_channels(tmp_path: Path) -> None:
    images = load_images(places_config(tmp_path, resolution=[4, 6], random_crop=True))
    batches = micro_batches(images)
    drawn = [batches[step]["pixels"].numpy() for step in range(10)]
    for crops in (fixed_pixels(images), *drawn):
        assert crops.shape[1:] == (3, 4, 6)
        for number, rows, columns in crops:
            top, left = int(rows[0, 0]), int(columns[0, 0])
            assert np.array_equal(
                np.stack([number, rows, columns]), PLACES[int(number[0, 0]), :, top : top + 4, left : left + 6]
            )
    corners = {(int(rows[0, 0]), int(columns[0, 0])) for crops in drawn for _, rows, columns in crops}
    assert len(corners) > 4


def test_random_crops_of_arrays_need_arrays_as_large(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"every image must be as large as the crops of random_crop, got .*9 x 14"):
        load_images(places_config(tmp_path, resolution=[10, 6], random_crop=True))


def test_images_of_one_file_are_held_out_one_by_one(tmp_path: Path) -> None:
    config = places_config(tmp_path, eval_fraction=0.25)
    trained = fixed_pixels(load_images(config))[:, 0, 0, 0]
    with open_split(config, "test", "eval_split") as images:
        held_out = fixed_pixels(images)[:, 0, 0, 0]
    assert len(held_out) == 3
    assert sorted([*trained, *held_out]) == [*range(12)]


def test_volumes_in_folders_of_their_own_are_held_out_whole(tmp_path: Path) -> None:
    for i in range(4):
        (tmp_path / f"volumes/{i}").mkdir(parents=True)
        np.save(tmp_path / f"volumes/{i}/volume.npy", PLACES[3 * i : 3 * i + 3])
    config = cache_config(
        None,
        train_data_dir=str(tmp_path / "volumes"),
        cache_dir=str(tmp_path / "cache"),
        eval_fraction=0.5,
        group_column="folder",
    )
    parts = divide_training(config)
    assert parts.num_groups == 2
    assert not {row // 3 for row in parts.trained} & {row // 3 for row in parts.held_out}


def test_slices_of_a_file_are_held_out_together(tmp_path: Path) -> None:
    (tmp_path / "volumes").mkdir()
    for i in range(4):
        np.save(tmp_path / f"volumes/{i}.npy", PLACES[3 * i : 3 * i + 3])
    parts = divide_training(
        cache_config(None, train_data_dir=str(tmp_path / "volumes"), eval_fraction=0.5, group_column="file")
    )
    assert parts.num_groups == 2
    assert not {row // 3 for row in parts.trained} & {row // 3 for row in parts.held_out}


def test_splits_of_arrays_share_the_groups_that_both_have(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / split / "p1").mkdir(parents=True)
        np.save(tmp_path / split / "p1/volume.npy", PLACES[:3])
    (tmp_path / "test/p1").rename(tmp_path / "test/p2")
    config = cache_config(None, train_data_dir=str(tmp_path), group_column="folder")
    check_groups(config, "test")
    (tmp_path / "test/p2").rename(tmp_path / "test/p1")
    with pytest.raises(UsageError, match=r"must share no group of 'folder' with training, got 'test' with 1 that do"):
        check_groups(config, "test")
    check_groups(replace(config, group_column="file"), "test")  # one name, two files


@pytest.mark.parametrize("kind", ["saved", "parquet"])
def test_copies_of_an_array_in_a_table_stay_together(kind: str, tmp_path: Path) -> None:
    # Rows i and i + 12 are equal.
    features = datasets.Features({"field": datasets.Array3D((3, 9, 14), "float32")})
    table = datasets.Dataset.from_dict({"field": np.concatenate([PLACES, PLACES])}, features=features)
    if kind == "saved":
        table.save_to_disk(str(tmp_path / "table"))
    else:
        (tmp_path / "table").mkdir()
        table.to_parquet(str(tmp_path / "table/train.parquet"))
    config = cache_config(None, dataset_name=str(tmp_path / "table"), cache_dir=str(tmp_path / "cache"))
    parts = divide_training(DataConfig(**{**vars(config), "eval_fraction": 0.25}))
    assert len(parts.held_out) == 6
    assert not {row % 12 for row in parts.trained} & {row % 12 for row in parts.held_out}
