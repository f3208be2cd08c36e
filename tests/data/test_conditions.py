"""Images and the images that they are made from: they stay together, and a wrong pair is one line."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image

from hf_ddpm.condition import Condition
from hf_ddpm.data.conditions import low_resolution_conditions, pairs_of
from hf_ddpm.data.description import describe_images
from hf_ddpm.data.images import load_images
from hf_ddpm.data.splits import open_split
from hf_ddpm.runtime.errors import UsageError
from tests.support.image_data import cache_config, micro_batches, noise


def save_pairs(folder, count=6, shape=(8, 12), other_shape=None, split=None):
    """A folder of pairs, as `datasets` reads it: the condition of an image is its negative."""
    root = folder / split if split else folder
    for name in ("images", "inputs"):
        (root / name).mkdir(parents=True)
    with open(root / "metadata.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "negative_file_name"])
        for i in range(count):
            values = noise(*shape, seed=i)
            other = 255 - values if other_shape is None else noise(*other_shape)
            Image.fromarray(values).save(root / f"images/{i}.png")
            Image.fromarray(other).save(root / f"inputs/{i}.png")
            writer.writerow([f"images/{i}.png", f"inputs/{i}.png"])
    return folder


def test_pairs_stay_together_under_crops_and_flips(tmp_path):
    config = cache_config(save_pairs(tmp_path / "pairs"), condition_column="negative", resolution=8)
    images = load_images(config)
    assert not images.is_uniform
    assert describe_images(config, images)[0] == (
        "pairs: 6 images, 8 x 8, channels 1; made from the column negative, channels 1"
    )
    whole = micro_batches(images, random_flip=True)
    batches = [whole[k] for k in range(len(whole))]
    assert len({batch["pixels"].numpy().tobytes() for batch in batches}) == len(batches)
    for batch in batches:
        assert batch["conditions"].shape == (4, 1, 8, 8)
        assert torch.equal(batch["conditions"], 255 - batch["pixels"])
    # Two processes with two micro-batches each cut the same stream.
    settings = {"random_flip": True, "batch_size": 1, "accumulation_steps": 2, "num_processes": 2}
    parts = [micro_batches(images, rank=rank, **settings) for rank in range(2)]
    cut = torch.cat([parts[k % 2][k // 2]["conditions"] for k in range(20)])
    assert torch.equal(cut, torch.cat([batch["conditions"] for batch in batches])[:20])


def test_fingerprint_is_of_both_columns(tmp_path):
    folder = save_pairs(tmp_path / "pairs", shape=(8, 8))
    with_negatives = load_images(cache_config(folder, condition_column="negative"))
    alone = load_images(cache_config(folder, image_column="image"))
    turned = load_images(cache_config(folder, condition_column="image"))
    assert len({with_negatives.fingerprint, alone.fingerprint, turned.fingerprint}) == 3
    assert alone.conditions is None
    assert with_negatives.conditions is not None
    assert np.array_equal(turned.image(2), with_negatives.conditions.image(2))


def test_held_out_splits_have_their_conditions(tmp_path):
    for split in ("train", "test"):
        save_pairs(tmp_path / "pairs", shape=(8, 8), split=split, count=2 + len(split))
    with open_split(cache_config(tmp_path / "pairs", condition_column="negative"), "test") as images:
        assert len(images) == 6
        pairs = pairs_of(Condition(1, column="negative"), images, np.array([4, 1]))
    assert torch.allclose(pairs.conditions, 1 - pairs.images)


def test_saved_data_sets_have_conditions_and_held_out_splits(tmp_path):
    import datasets

    pictures = {name: [Image.fromarray(noise(8, 8, seed=k + i)) for i in range(3)] for k, name in ((0, "x"), (9, "y"))}
    rows = datasets.Dataset.from_dict(pictures, features=datasets.Features(dict.fromkeys("xy", datasets.Image())))
    (tmp_path / "parquet").mkdir()
    for split in ("train", "test"):
        rows.to_parquet(tmp_path / f"parquet/{split}.parquet")
    config = cache_config(tmp_path / "parquet", condition_column="y", cache_dir=str(tmp_path / "cache"))
    with open_split(config, "test") as images:
        assert images.conditions is not None
        assert np.array_equal(images.image(1)[0], noise(8, 8, seed=1))
        assert np.array_equal(images.conditions.image(1)[0], noise(8, 8, seed=10))


def test_conditions_of_another_size_are_resized_to_the_resolution(tmp_path):
    folder = save_pairs(tmp_path / "pairs", shape=(8, 8), other_shape=(4, 4))
    images = load_images(cache_config(folder, condition_column="negative"))
    assert images.conditions is not None
    assert images.conditions.image(0).shape == (1, 8, 8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"condition_column": "depth"}, "second column of images, got 'depth', none of"),
        (
            {"condition_column": "image", "image_column": "image"},
            "column of images, got 'image', the first one",
        ),
        ({"condition_column": "negative", "resolution": 8}, "8x24 for 8x8 in row 0.*--center_crop"),
    ],
)
def test_wrong_conditions_are_one_line(tmp_path, settings, message):
    folder = save_pairs(tmp_path / "pairs", count=2, shape=(8, 8), other_shape=(8, 24))
    with pytest.raises(UsageError, match=message) as error:
        load_images(cache_config(folder, **settings))
    assert "\n" not in str(error.value)


def test_low_resolution_is_what_pillow_makes():
    values = noise(12, 8, seed=3)
    got = low_resolution_conditions(torch.from_numpy(values)[None, None], 4, 255)
    small = Image.fromarray(values).resize((2, 3), Image.Resampling.BICUBIC)
    large = np.asarray(small.resize((8, 12), Image.Resampling.BICUBIC))
    # Pillow rounds to 8 bits, and computes in whole numbers.
    assert np.abs((got[0, 0].numpy() + 1) * 127.5 - large).max() < 2.5
    # x_0 and 16 bits give the same condition, and a constant image is its own.
    x_0 = torch.from_numpy(values)[None, None].float() * (2 / 255) - 1
    assert torch.allclose(low_resolution_conditions(x_0, 4, 255), got, atol=1e-5)
    white = torch.full((1, 1, 8, 8), 65535, dtype=torch.int32)
    assert torch.allclose(low_resolution_conditions(white, 2, 65535), torch.ones(1, 1, 8, 8))
