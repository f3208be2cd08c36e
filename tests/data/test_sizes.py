"""Images of any shape, and crops of images that are larger than x_0."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image

from hf_ddpm.data.batches import MicroBatches, fixed_pixels
from hf_ddpm.data.config import DataConfig
from hf_ddpm.data.given import open_given
from hf_ddpm.data.images import load_images
from hf_ddpm.data.shard_batches import StreamBatches
from hf_ddpm.data.shards import open_stream
from hf_ddpm.evaluation import statistics
from hf_ddpm.runtime.errors import UsageError
from tests.support.image_data import cache_config, load_one, noise

SIZE = (6, 10)
LARGE = [(9, 13), (6, 10), (20, 11), (8, 30)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of gray images of noise, all at least as large as SIZE."""
    (tmp_path / "images").mkdir()
    for i, size in enumerate(LARGE):
        Image.fromarray(noise(*size, seed=i)).save(tmp_path / f"images/{i}.png")
    return tmp_path / "images"


def crops_config(folder: Path, **settings) -> DataConfig:
    return cache_config(folder, **{"resolution": [*SIZE], "random_crop": True, **settings})


def batches_of(images, batch_size: int, num_steps: int, cls=MicroBatches, **settings) -> np.ndarray:
    """Return the pixels of the first steps of seed 3, one image after the other."""
    common = {"seed": 3, "accumulation_steps": 1, "rank": 0, "num_processes": 1, "first_position": 0}
    settings = {"random_flip": False, **common, **settings}
    batches = cls(images, batch_size=batch_size, num_steps=num_steps, **settings)
    return np.concatenate([batch["pixels"].numpy() for batch in batches])


def is_part(pixels: np.ndarray, whole: np.ndarray) -> bool:
    """Return whether pixels, (h, w), stand in a larger image as they are."""
    fits = all(side <= of_whole for side, of_whole in zip(pixels.shape, whole.shape, strict=True))
    return fits and bool((sliding_window_view(whole, pixels.shape) == pixels).all(axis=(2, 3)).any())


@pytest.mark.parametrize(("height", "width"), [(30, 50), (50, 30), (12, 20), (7, 31), (6, 11)])
def test_resized_image_covers_the_size_and_keeps_its_ratio(tmp_path, height, width):
    values = noise(height, width)
    planes = load_one(tmp_path, Image.fromarray(values), resolution=[*SIZE])[0]
    scale = max(SIZE[0] / height, SIZE[1] / width)
    expected = [int(height * scale + 1e-9), int(width * scale + 1e-9)]
    assert [*planes.shape] == expected
    assert any(side == wanted for side, wanted in zip(planes.shape, SIZE, strict=True))
    assert all(side >= wanted for side, wanted in zip(planes.shape, SIZE, strict=True))
    resized = Image.fromarray(values).resize(expected[::-1], Image.Resampling.BILINEAR)
    assert np.array_equal(planes, np.asarray(resized))


def test_center_crop_is_the_middle_of_the_longer_side(tmp_path):
    planes = load_one(tmp_path, Image.fromarray(noise(6, 14)), resolution=[*SIZE], center_crop=True)[0]
    assert np.array_equal(planes, noise(6, 14)[:, 2:12])


def test_open_resolution_is_the_shape_of_the_data(tmp_path):
    (tmp_path / "images").mkdir()
    Image.fromarray(noise(*SIZE)).save(tmp_path / "images/a.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn: the pixels of the file lie on their side
    Image.fromarray(noise(*SIZE[::-1])).save(tmp_path / "images/b.jpg", exif=exif)
    images = load_images(cache_config(tmp_path / "images"))
    assert (images.size, images.is_uniform) == (SIZE, True)
    Image.fromarray(noise(*SIZE[::-1])).save(tmp_path / "images/c.png")
    with pytest.raises(UsageError, match=r"resolution must be given.*c\.png\) is 10 x 6"):
        load_images(cache_config(tmp_path / "images"))


def test_a_square_has_one_spelling():
    assert DataConfig(resolution=[8, 8]) == DataConfig(resolution=8)
    assert DataConfig(resolution=(8, 12)) == DataConfig(resolution=[8, 12])


def test_random_crops_are_parts_of_the_files_and_change_with_the_epoch(folder):
    images = load_images(crops_config(folder))
    crops = batches_of(images, 4, 12)
    order = [[is_part(crop[0], noise(*size, seed=i)) for i, size in enumerate(LARGE)] for crop in crops]
    assert (np.array(order).reshape(12, 4, 4).sum(axis=1) == 1).all()  # each image once in each epoch
    of_first = [crop.tobytes() for crop, found in zip(crops, order, strict=True) if found[0]]
    assert len({*of_first}) > 3
    # The position alone decides, however the stream is cut, and wherever it begins.
    assert np.array_equal(crops, batches_of(images, 3, 16))
    assert np.array_equal(crops[20:], batches_of(images, 4, 7, first_position=20))


def test_streamed_crops_are_parts_of_the_files_whatever_the_batch_size(folder):
    stream = open_stream(crops_config(folder, streaming=True))
    settings = {"num_substreams": 1, "chunk_size": 4, "shuffle_buffer_images": 4}
    crops = batches_of(stream, 4, 6, StreamBatches, **settings)
    assert all(any(is_part(crop[0], noise(*size, seed=i)) for i, size in enumerate(LARGE)) for crop in crops)
    assert np.array_equal(crops, batches_of(stream, 2, 12, StreamBatches, **settings))
    mirrored = batches_of(stream, 4, 6, StreamBatches, **{**settings, "random_flip": True})
    is_flipped = [not np.array_equal(*pair) for pair in zip(crops, mirrored, strict=True)]
    assert 0 < sum(is_flipped) < len(crops)
    assert np.array_equal(mirrored[is_flipped], crops[is_flipped][..., ::-1])


def test_conditions_get_the_crops_of_their_images(folder, tmp_path):
    rows = []
    for i, size in enumerate(LARGE):
        Image.fromarray(255 - noise(*size, seed=i)).save(folder / f"negative{i}.png")
        rows.append(f"{i}.png,negative{i}.png\n")
    (folder / "metadata.csv").write_text("file_name,negative_file_name\n" + "".join(rows))
    images = load_images(crops_config(folder, condition_column="negative"))
    assert images.conditions is not None
    assert np.array_equal(fixed_pixels(images), 255 - fixed_pixels(images.conditions))
    common = {"accumulation_steps": 1, "rank": 0, "num_processes": 1, "first_position": 0, "num_steps": 3}
    for batch in MicroBatches(images, seed=3, random_flip=True, batch_size=4, **common):
        assert np.array_equal(batch["pixels"], 255 - batch["conditions"])


def test_fixed_crops_are_those_of_a_reference(folder):
    """Likelihood, validation and distances look at the same crops, which lie anywhere."""
    images = load_images(crops_config(folder))
    of_reference = np.concatenate([batch.numpy() for batch in statistics._batches(images, 4)])
    fixed = fixed_pixels(images)
    assert sorted(crop.tobytes() for crop in fixed) == sorted(crop.tobytes() for crop in of_reference)
    assert all(is_part(crop[0], noise(*size, seed=i)) for i, (crop, size) in enumerate(zip(fixed, LARGE, strict=True)))
    assert np.array_equal(fixed_pixels(images, np.array([3, 1])), fixed[[3, 1]])


def test_images_smaller_than_the_crop_are_named_or_left_out(folder):
    Image.fromarray(noise(5, 40)).save(folder / "low.png")
    with pytest.raises(UsageError, match=r"random_crop, got .*low\.png\): 5 x 40.* is smaller than 6 x 10"):
        load_images(crops_config(folder))
    images = load_images(crops_config(folder, on_bad_image="skip"))
    assert (len(images), images.num_bad) == (len(LARGE), 1)


def test_crops_need_a_resolution_and_have_their_own_fingerprint(folder):
    with pytest.raises(UsageError, match="resolution must be given with random_crop"):
        load_images(crops_config(folder, resolution=None))
    fingerprints = [load_images(crops_config(folder, resolution=side)).fingerprint for side in (4, 5)]
    assert fingerprints[0] != fingerprints[1]


def test_a_given_data_set_has_any_shape(folder):
    pictures = [Image.fromarray(noise(*size, seed=i)) for i, size in enumerate(LARGE)]
    crops = batches_of(open_given(pictures, DataConfig(resolution=[*SIZE], random_crop=True)), 4, 3)
    assert all(any(is_part(crop[0], noise(*size, seed=i)) for i, size in enumerate(LARGE)) for crop in crops)
    x_0 = [np.zeros((1, *SIZE), np.float32)]
    assert open_given(x_0, DataConfig()).size == SIZE
    with pytest.raises(UsageError, match=r"resolution must be that of the data set's x_0, \[6, 10\], got 6"):
        open_given(x_0, DataConfig(resolution=6))
    with pytest.raises(UsageError, match="random_crop must be left out"):
        open_given(x_0, DataConfig(resolution=[*SIZE], random_crop=True))
