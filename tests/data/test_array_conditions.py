"""Arrays and the arrays that they are made from: they stay together, and each has its own values."""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
import pytest
import tifffile
import torch

from hf_ddpm.condition import Condition
from hf_ddpm.data.cache import ImageCache
from hf_ddpm.data.conditions import pairs_of, with_conditions_of_model
from hf_ddpm.data.description import describe_images
from hf_ddpm.data.images import load_images
from hf_ddpm.data.splits import describe_split, open_split
from hf_ddpm.data.tables import open_dataset
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.training.conditions import condition_of as condition_of_run
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.value_range import ValueRange
from tests.support.array_models import fields
from tests.support.image_data import cache_config, micro_batches


def condition_of(values: np.ndarray) -> np.ndarray:
    """Return what fields are made from in these tests: the first channel in other units, as integers."""
    return (-10 * values[:, :1]).astype(np.int16)


def save_array_pairs(folder: Path, values: np.ndarray, split: str | None = None) -> Path:
    """Save fields, (N, C, H, W), in a file each, beside the files that they are made from."""
    root = folder / split if split else folder
    for name in ("fields", "inputs"):
        (root / name).mkdir(parents=True)
    lines = ["file_name,coarse_file_name,station"]
    for i, (image, condition) in enumerate(zip(values, condition_of(values), strict=True)):
        np.save(root / f"fields/{i}.npy", image)
        np.save(root / f"inputs/{i}.npy", condition)
        lines.append(f"fields/{i}.npy,inputs/{i}.npy,{i % 2}")
    (root / "metadata.csv").write_text("\n".join(lines) + "\n")
    return folder


def conditions_in(images: ImageCache) -> ImageCache:
    """Return the conditions of images, which have some."""
    assert images.conditions is not None
    return images.conditions


def test_pairs_of_files_stay_together_under_crops_and_flips(tmp_path: Path) -> None:
    values = fields(6, size=12)
    folder = save_array_pairs(tmp_path / "pairs", values)
    config = cache_config(folder, condition_column="coarse", resolution=8, random_crop=True, label_column="station")
    images = load_images(config)
    low, high = condition_of(values).min(), condition_of(values).max()  # not those of the type, as of images
    assert describe_images(config, images)[0].startswith(
        f"pairs: 6 images, crops of 8 x 8, channels 2; values float32, {values.min():g} to {values.max():g}; "
        f"2 classes; made from the column coarse, channels 1, values int16, {low} to {high}"
    )
    assert conditions_in(images).value_range == ValueRange(low, high, "int16")
    batches = [micro_batches(images, random_flip=True)[k] for k in range(4)]
    for batch in batches:
        assert torch.equal(batch["conditions"], (-10 * batch["pixels"][:, :1]).to(torch.int16))


def test_what_is_clipped_and_lost_of_conditions_is_said(tmp_path: Path) -> None:
    folder = save_array_pairs(tmp_path / "pairs", fields(10))
    for path in (folder / "inputs").iterdir():
        np.save(path, np.load(path).astype(np.float64))
    config = cache_config(folder, condition_column="coarse", value_quantiles=[0.1, 0.9])
    own = conditions_in(images := load_images(config))
    assert own.value_range is not None
    said = describe_images(config, images)[1:]
    assert said[0].startswith(f"clipped: {images.num_clipped} values")
    assert said[1].startswith(f"clipped: {own.num_clipped} values (19.53%) of the column coarse lie outside of ")
    assert said[2].startswith("not read in 10 images of the column coarse: the lower 29 of 53 bits")


def test_held_out_conditions_are_described_in_the_range_of_the_model(tmp_path: Path) -> None:
    images = load_images(
        config := cache_config(save_array_pairs(tmp_path / "pairs", fields(4)), condition_column="coarse")
    )
    low = int(np.median(conditions_in(images).pixels))
    condition = Condition(1, column="coarse", value_range=ValueRange(low, 0.0, "int16"))
    seen = with_conditions_of_model(images, condition, "test_split", "test")
    said, clipped = describe_split(config, "train", seen)
    assert f"made from the column coarse, channels 1, values int16, {low} to 0" in said
    assert clipped.startswith(f"clipped: {int((conditions_in(images).pixels < low).sum())} values")


def test_remedies_are_none_that_conditions_refuse(tmp_path: Path) -> None:
    folder = save_array_pairs(tmp_path / "pairs", fields(4))
    config = cache_config(folder, condition_column="coarse")
    (folder / "inputs/3.npy").unlink()
    with pytest.raises(UsageError, match=r"got 1 that do not, as '.*inputs/3.npy': correct the rows$"):
        load_images(config)
    for path in ("inputs/3.npy", "fields/3.npy"):
        (folder / path).write_bytes(b"damaged")
        with pytest.raises(UsageError, match=r"every image must be readable, got row 3 .*repair or remove it$"):
            load_images(config)
    with pytest.raises(UsageError, match=r"repair or remove it, or leave out all such images with --on_bad_image"):
        load_images(cache_config(folder))


def test_folders_of_arrays_say_how_they_are_paired(tmp_path: Path) -> None:
    folder = save_array_pairs(tmp_path / "pairs", fields(2))
    with pytest.raises(UsageError, match="--stack_axis; where metadata name pairs of arrays, --condition_column"):
        load_images(cache_config(folder))
    (folder / "metadata.csv").unlink()
    with pytest.raises(UsageError, match=r"--stack_axis$"):
        load_images(cache_config(folder))
    message = r"got 'coarse', none of \['image'\]: .* metadata.csv with file_name,coarse_file_name names both files"
    with pytest.raises(UsageError, match=message):
        load_images(cache_config(folder, condition_column="coarse"))


def test_conditions_of_another_kind_of_files_count_as_read(tmp_path: Path) -> None:
    (folder := tmp_path / "pairs").mkdir()
    lines = ["file_name,coarse_file_name"]
    for i, image in enumerate(fields(3)):
        tifffile.imwrite(folder / f"{i}.tif", image[0])
        np.save(folder / f"{i}.npy", image[1])
        lines.append(f"{i}.tif,{i}.npy")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    np.save(folder / "other.npy", fields(1)[0])
    config = cache_config(folder, condition_column="coarse")
    assert describe_images(config, load_images(config))[0].endswith("; not read: 1 .npy")


def test_files_of_one_image_are_not_opened_before_they_are_read(tmp_path: Path) -> None:
    folder = save_array_pairs(tmp_path / "pairs", fields(3))
    config = cache_config(folder, condition_column="coarse")
    (folder / "inputs/1.npy").write_bytes(b"damaged")
    assert len(open_dataset(config, with_conditions=True)) == 3
    np.save(folder / "inputs/1.npy", condition_of(fields(2)))
    with pytest.raises(
        UsageError, match=r"each file where the first is one image, must be one image, got \(2, 1, 8, 8\)"
    ):
        load_images(config)


def test_files_of_many_images_give_a_pair_for_each(tmp_path: Path) -> None:
    values = fields(7)
    (tmp_path / "pairs").mkdir()
    for name, part in (("a", values[:3]), ("b", values[3:])):
        np.save(tmp_path / f"pairs/{name}.npy", part)
        np.save(tmp_path / f"pairs/{name}-in.npy", part[:, :1] / 2)
    metadata = tmp_path / "pairs/metadata.csv"
    metadata.write_text("file_name,in_file_name\nb.npy,b-in.npy\na.npy,a-in.npy\n")
    images = load_images(cache_config(tmp_path / "pairs", condition_column="in"))
    conditions = conditions_in(images)
    assert len(images) == len(conditions) == 7
    assert all(np.array_equal(conditions.image(i), images.image(i)[:1] / 2) for i in range(7))
    assert np.array_equal(images.image(4), values[0])
    with pytest.raises(UsageError, match=r"second column of files, got 'in_file_name', none of \['image', 'in'\]"):
        load_images(cache_config(tmp_path / "pairs", condition_column="in_file_name"))
    metadata.write_text("file_name,in_file_name\na.npy,b-in.npy\n")
    with pytest.raises(UsageError, match="as many images, got 3 in 'image' and 4 in 'in' in row 0"):
        load_images(cache_config(tmp_path / "pairs", condition_column="in"))


@pytest.mark.slow
def test_columns_of_arrays_have_conditions_and_their_own_quantiles(tmp_path: Path) -> None:
    values = fields(20)
    columns = {"x": datasets.Array3D((2, 8, 8), "float32"), "y": datasets.Array2D((8, 8), "float32")}
    rows = {"x": [*values], "y": [*(values[:, 0] / 100)]}
    table = datasets.Dataset.from_dict(rows, features=datasets.Features(columns))
    (tmp_path / "table").mkdir()
    for split in ("train", "test"):
        table.to_parquet(str(tmp_path / f"table/{split}.parquet"))
    settings = {"condition_column": "y", "cache_dir": str(tmp_path / "cache")}
    images = load_images(cache_config(tmp_path / "table", **settings, value_quantiles=[0.1, 0.9]))
    own = conditions_in(images).value_range
    assert own is not None
    assert (own.low, own.high) == pytest.approx([*np.quantile(values[:, 0] / 100, [0.1, 0.9])])
    with open_split(cache_config(tmp_path / "table", **settings), "test") as held_out:
        condition = Condition(1, column="y", value_range=own)
        pairs = pairs_of(condition, held_out, np.array([4, 1]))
        low, high = (values[:, 0] / 100).min(), (values[:, 0] / 100).max()
    shares = (values[[4, 1], :1] / 100 - low) / (high - low)
    assert torch.allclose(pairs.conditions, torch.from_numpy(shares), atol=1e-5)


@pytest.mark.slow
def test_held_out_arrays_have_their_conditions(tmp_path: Path) -> None:
    folder = save_array_pairs(tmp_path / "pairs", fields(10))
    config = cache_config(folder, condition_column="coarse", eval_fraction=0.3, cache_dir=str(tmp_path / "cache"))
    trained = load_images(config)
    with open_split(config, "test") as held_out:
        assert (len(trained), len(held_out)) == (7, 3)
        for images in (trained, held_out):
            for i in range(len(images)):
                assert np.array_equal(conditions_in(images).image(i), (-10 * images.image(i)[:1]).astype(np.int16))


@pytest.mark.parametrize("dtype", ["float32", "int16"])
def test_constant_conditions_train_no_model_and_are_seen_in_its_range(tmp_path: Path, dtype: str) -> None:
    folder = save_array_pairs(tmp_path / "pairs", fields(4))
    for path in (folder / "inputs").iterdir():
        np.save(path, np.full((1, 8, 8), 7, dtype))
    config = cache_config(folder, condition_column="coarse")
    images = load_images(config)
    with pytest.raises(UsageError, match="must hold values that differ, got 7 for all of 'coarse': name another"):
        condition_of_run(TrainingConfig(condition_column="coarse"), images)
    condition = Condition(1, column="coarse", value_range=ValueRange(0.0, 14.0, dtype))
    seen = with_conditions_of_model(images, condition, "test_split", "test")
    assert (pairs_of(condition, seen, np.arange(4)).conditions == 0.5).all()
    with pytest.raises(UsageError, match="value_range must be given where the values do not differ, got 7 for all"):
        load_images(cache_config(folder, image_column="coarse", condition_column="image", value_quantiles=[0, 1]))
