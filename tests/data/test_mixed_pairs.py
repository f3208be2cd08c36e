"""Pairs of a picture and an array: each column is read as what it holds, and the two stay together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from hf_ddpm.condition import Condition
from hf_ddpm.data.conditions import pairs_of, with_conditions_of_model
from hf_ddpm.data.config import DataConfig
from hf_ddpm.data.description import describe_images
from hf_ddpm.data.images import dtype_of_conditions, load_images
from hf_ddpm.data.sources import check_source, find_source, kind_of_conditions
from hf_ddpm.data.splits import open_split
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.value_range import ValueRange
from tests.data.test_array_conditions import conditions_in
from tests.support.image_data import cache_config, micro_batches, noise


def depth_of(photo: np.ndarray) -> np.ndarray:
    """Return the depth, (1, H, W) float32 in other units, that belongs to a photograph, (H, W, 3) uint8."""
    return photo[None, :, :, 0].astype(np.float32) / 10 - 5


def photos(count: int, height: int = 8, width: int = 8, first: int = 0) -> list[np.ndarray]:
    return [noise(height, width, 3, seed=first + i) for i in range(count)]


def save_files(folder: Path, pictures: list[np.ndarray], suffix: str = "npy") -> Path:
    """Save photographs and their depths, which metadata name as `image` and `depth`."""
    (folder / "photos").mkdir(parents=True)
    (folder / "depths").mkdir()
    lines = ["file_name,depth_file_name"]
    for i, photo in enumerate(pictures):
        Image.fromarray(photo).save(folder / f"photos/{i}.png")
        if suffix == "npy":
            np.save(folder / f"depths/{i}.npy", depth_of(photo))
        else:
            tifffile.imwrite(folder / f"depths/{i}.tif", depth_of(photo)[0])
        lines.append(f"photos/{i}.png,depths/{i}.{suffix}")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return folder


def table_of(pictures: list[np.ndarray]) -> datasets.Dataset:
    """Return the same as a table."""
    features = {"image": datasets.Image(), "depth": datasets.Array2D(pictures[0].shape[:2], "float32")}
    rows = {"image": [*map(Image.fromarray, pictures)], "depth": [depth_of(photo)[0] for photo in pictures]}
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


def save_table(folder: Path, pictures: list[np.ndarray], split: str = "train") -> Path:
    """Save the same as a table of parquet files."""
    table_of(pictures).to_parquet(str(folder / f"{split}.parquet"))
    return folder


def settings_of(direction: str) -> dict[str, str]:
    """Return which column is made from which."""
    image, condition = direction.split(" from ")
    return {"image_column": image, "condition_column": condition}


@pytest.mark.parametrize("direction", ["depth from image", "image from depth"])
@pytest.mark.parametrize("kind", ["npy", "tif", "table"])
def test_both_directions_are_read_in_their_own_values(tmp_path: Path, kind: str, direction: str) -> None:
    pictures = photos(6, 8, 12)
    save = save_table if kind == "table" else save_files
    folder = save(tmp_path / "pairs", pictures) if kind != "tif" else save_files(tmp_path / "pairs", pictures, kind)
    config = cache_config(folder, **settings_of(direction), resolution=8)
    check_source(config)
    images = load_images(config)
    conditions = conditions_in(images)
    depths = np.stack([depth_of(photo) for photo in pictures])
    of_arrays, of_pictures = (images, conditions) if direction.startswith("depth") else (conditions, images)
    assert of_arrays.value_range == ValueRange(float(depths.min()), float(depths.max()), "float32")
    assert of_pictures.scale == 255
    assert dtype_of_conditions(config) == (conditions.value_range and conditions.value_range.dtype)
    said = describe_images(config, images)
    assert f"made from the column {config.condition_column}, channels {conditions.channels}" in said[0]
    assert "not read" not in said[0]
    for i, photo in enumerate(pictures):
        assert np.array_equal(of_pictures.image(i), photo.transpose(2, 0, 1))
        assert np.array_equal(of_arrays.image(i), depths[i])
    # One crop and one mirroring for both, in every batch.
    whole = micro_batches(images, random_flip=True)
    for k in range(4):
        pair = whole[k]["pixels"], whole[k]["conditions"]
        depth, picture = pair if direction.startswith("depth") else pair[::-1]
        assert picture.shape == (4, 3, 8, 8)
        assert torch.equal(depth, picture[:, :1].float() / 10 - 5)


@pytest.mark.slow
def test_the_column_of_images_is_the_other_one(tmp_path: Path) -> None:
    table = save_table(tmp_path / "table", photos(2))
    files = save_files(tmp_path / "files", photos(2))
    for folder in (table, files):
        for condition, channels in (("image", 1), ("depth", 3)):
            if folder == files and condition == "image":
                continue  # `image` is the column of images of metadata unless another is named
            assert load_images(cache_config(folder, condition_column=condition)).channels == channels
    assert find_source(cache_config(files, condition_column="depth")).kind == "images"
    assert find_source(cache_config(files, condition_column="image")).kind == "arrays"


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["depth from image", "image from depth"])
def test_held_out_pairs_have_the_values_of_training(tmp_path: Path, direction: str) -> None:
    files = save_files(tmp_path / "files", photos(10))
    table = save_table(tmp_path / "table", photos(4))
    save_table(tmp_path / "table", photos(3, first=20), "test")
    for config in (
        cache_config(files, **settings_of(direction), eval_fraction=0.3, cache_dir=str(tmp_path / "a")),
        cache_config(table, **settings_of(direction), cache_dir=str(tmp_path / "b")),
    ):
        trained = load_images(config)
        condition = Condition(
            conditions_in(trained).channels,
            column=config.condition_column,
            value_range=conditions_in(trained).value_range,
        )
        with open_split(config, "test") as held_out:
            assert len(held_out) == 3
            seen = with_conditions_of_model(held_out, condition, "test_split", "test")
            seen = seen if trained.value_range is None else seen.in_range(trained.value_range)
            assert conditions_in(seen).value_range == condition.value_range
            pairs = pairs_of(condition, seen, np.array([2, 0]))
            for i, row in enumerate((2, 0)):
                parts = [held_out.image(row), conditions_in(held_out).image(row)]
                depth, picture = parts if direction.startswith("depth") else parts[::-1]
                assert np.array_equal(depth, depth_of(picture.transpose(1, 2, 0)))
                values = trained.value_range or condition.value_range
                assert values is not None
                shares = values.to_unit_interval(torch.tensor(depth))
                got = (pairs.images, pairs.conditions)[not direction.startswith("depth")][i]
                assert torch.allclose(got, shares, atol=1e-6)


def test_settings_of_arrays_are_for_the_column_that_holds_them(tmp_path: Path) -> None:
    pictures = photos(5)
    folder = save_files(tmp_path / "pairs", pictures)
    for path in (folder / "depths").iterdir():
        np.save(path, np.load(path).transpose(1, 2, 0))
    depths = np.stack([depth_of(photo) for photo in pictures])
    for direction in ("depth from image", "image from depth"):
        config = cache_config(folder, **settings_of(direction), channel_axis=-1, value_quantiles=[0.1, 0.9])
        check_source(config)
        images = load_images(config)
        values = images.value_range or conditions_in(images).value_range
        assert values is not None
        assert (values.low, values.high) == pytest.approx([*np.quantile(depths, [0.1, 0.9])])
    # Pictures have no channels to display, whatever they are made from.
    config = replace(config, display_channels=[0])
    with pytest.raises(UsageError, match=r"display_channels = \[0\] has no effect: it is for arrays"):
        load_images(config)


def test_a_folder_of_tiff_files_alone_is_of_one_kind(tmp_path: Path) -> None:
    """A setting that says that they are arrays says it of both columns."""
    (folder := tmp_path / "pairs").mkdir()
    lines = ["file_name,radar_file_name"]
    for i in range(3):
        tifffile.imwrite(folder / f"{i}.tif", np.stack([noise(8, 8, seed=i)] * 5), photometric="minisblack")
        tifffile.imwrite(folder / f"radar-{i}.tif", noise(8, 8, seed=i).astype(np.uint16) * 9)  # which Pillow reads
        lines.append(f"{i}.tif,radar-{i}.tif")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    config = cache_config(folder, condition_column="radar", display_channels=[1])
    own = conditions_in(load_images(config)).value_range
    assert own is not None
    assert own.dtype == "uint16"


def test_settings_of_arrays_need_an_array_before_anything_is_decoded(tmp_path: Path) -> None:
    pictures = photos(3)
    features = datasets.Features({name: datasets.Image() for name in ("a", "b")})
    rows = {name: [*map(Image.fromarray, pictures)] for name in ("a", "b")}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "table/train.parquet"))
    config = cache_config(tmp_path / "table", **settings_of("a from b"), stack_axis=0)
    with pytest.raises(UsageError, match="stack_axis = 0 has no effect: it is for arrays, and the data are images"):
        load_images(config)
    assert not [*tmp_path.rglob("pixels.bin")]
    folder = save_files(tmp_path / "files", pictures)
    (folder / "metadata.csv").write_text("file_name,other_file_name\nphotos/0.png,photos/1.png\n")
    with pytest.raises(UsageError, match="stack_axis = 0 has no effect"):
        check_source(cache_config(folder, condition_column="other", stack_axis=0))


def test_a_stack_of_arrays_is_no_pair_of_one_picture(tmp_path: Path) -> None:
    folder = save_files(tmp_path / "pairs", photos(2))
    np.save(folder / "depths/0.npy", np.zeros((3, 8, 8), np.float32))
    config = cache_config(folder, condition_column="depth", stack_axis=0)
    with pytest.raises(
        UsageError, match=r"as many images, got 1 in 'image' and 3 in 'depth' in row 0 of the metadata"
    ):
        load_images(config)


def test_what_is_not_read_beside_pairs_is_said(tmp_path: Path) -> None:
    folder = save_files(tmp_path / "pairs", photos(2))
    np.save(folder / "depths/other.npy", depth_of(photos(1)[0]))
    Image.fromarray(photos(1)[0]).save(folder / "photos/other.png")
    for direction in ("depth from image", "image from depth"):
        config = cache_config(folder, **settings_of(direction))
        said = describe_images(config, load_images(config))[0]
        assert said.endswith("; not read: 1 .npy, 1 images that no row of the metadata names")


def test_a_column_of_both_kinds_of_files_is_one_line(tmp_path: Path) -> None:
    folder = save_files(tmp_path / "pairs", photos(2))
    lines = ["file_name,depth_file_name", "photos/0.png,depths/0.npy", "photos/1.png,photos/0.png"]
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    with pytest.raises(UsageError, match="the files of a column must all be pictures, or all arrays; repair"):
        load_images(cache_config(folder, condition_column="depth"))


def test_conditions_of_another_shape_are_named(tmp_path: Path) -> None:
    folder = save_files(tmp_path / "pairs", photos(2, 8, 12))
    np.save(folder / "depths/1.npy", np.zeros((1, 8, 8), np.float32))
    settings: dict[str, Any] = {**settings_of("image from depth"), "resolution": 8}
    with pytest.raises(UsageError, match="of the shape of their images, got 8x8 for 8x12 in row 1"):
        load_images(cache_config(folder, **settings))
    assert len(load_images(cache_config(folder, **settings, center_crop=True))) == 2


def test_passed_data_sets_hold_mixed_pairs(tmp_path: Path) -> None:
    table = table_of(photos(3))
    for condition in ("image", "depth"):
        config = DataConfig(condition_column=condition, cache_dir=str(tmp_path / "cache"))
        images = load_images(config, dataset=table)
        assert (images.value_range is None) is (condition == "depth")
        assert (conditions_in(images).value_range is None) is (condition == "image")


def test_splits_are_those_of_images_wherever_their_conditions_are(tmp_path):
    """A folder of pictures beside splits of arrays hides neither the splits nor what the pictures are."""
    lines = ["file_name,photo_file_name"]
    (tmp_path / "photos").mkdir()
    for i, photo in enumerate(photos(4)):
        split = "train" if i < 3 else "test"
        (tmp_path / split).mkdir(exist_ok=True)
        np.save(tmp_path / f"{split}/{i}.npy", depth_of(photo))
        Image.fromarray(photo).save(tmp_path / f"photos/{i}.png")
        lines.append(f"{split}/{i}.npy,photos/{i}.png")
    (tmp_path / "metadata.csv").write_text("\n".join(lines) + "\n")
    config = cache_config(tmp_path, condition_column="photo")
    source = find_source(config)
    assert source.kind == "arrays"
    assert {"test", "train"} <= {*source.splits}
    for chosen in (
        config,
        replace(config, train_split="train"),
        replace(config, dataset_name=str(tmp_path / "train")),
    ):
        assert kind_of_conditions(chosen) == "images"
    images = load_images(config)
    assert len(images) == 3
    assert images.conditions is not None
    assert images.conditions.value_range is None  # pictures, not arrays of uint8
