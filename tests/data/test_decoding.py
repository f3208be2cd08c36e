"""Decoding of every mode, depth and size of image."""

from __future__ import annotations

import io
import re
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from hf_ddpm.data import decoding
from hf_ddpm.data.batches import fixed_pixels
from hf_ddpm.data.config import DataConfig
from hf_ddpm.data.decoding import decode, unreadable_image_error
from hf_ddpm.data.image_format import GRAY_MODES, ImageFormat
from hf_ddpm.data.images import load_images
from hf_ddpm.data.planes import NeedsSixteenBits, to_planes
from hf_ddpm.runtime.errors import UsageError
from tests.support.image_data import cache_config, load_one, micro_batches, noise, png, save_grays

# Modes


@pytest.mark.parametrize("channels", [None, 1, 3])
@pytest.mark.parametrize("mode", ["1", "L", "RGB", "P"])
def test_decode_keeps_values_of_opaque_modes(folder: Path, mode: str, channels: int | None) -> None:
    gray = noise(8, 8)
    source = {
        "1": Image.fromarray(gray > 127),
        "L": Image.fromarray(gray),
        "RGB": Image.fromarray(noise(8, 8, 3)),
        "P": Image.fromarray(noise(8, 8, 3)).quantize(64),
    }[mode]
    assert source.mode == mode
    values = load_one(folder, source, channels=channels)
    wanted_channels = channels or (1 if mode in ("1", "L") else 3)
    wanted = np.asarray(source.convert("RGB").convert("L" if wanted_channels == 1 else "RGB"))
    assert np.array_equal(values, wanted[None] if wanted_channels == 1 else wanted.transpose(2, 0, 1))


def test_decode_composites_transparent_gray_over_white(folder: Path) -> None:
    values = np.array([[[100, 255], [100, 0]], [[0, 51], [200, 255]]], np.uint8)
    assert load_one(folder, Image.fromarray(values)).tolist() == [[[100, 255], [204, 200]]]


def test_decode_composites_transparent_color_over_white(folder: Path) -> None:
    values = np.array([[[10, 20, 30, 255], [10, 20, 30, 0]], [[0, 100, 255, 51], [1, 2, 3, 255]]], np.uint8)
    planes = load_one(folder, Image.fromarray(values))
    assert planes.transpose(1, 2, 0).tolist() == [[[10, 20, 30], [255, 255, 255]], [[204, 224, 255], [1, 2, 3]]]


def test_decode_keeps_transparency_in_four_channels(folder: Path) -> None:
    values = noise(4, 4, 4)
    assert np.array_equal(load_one(folder, Image.fromarray(values), channels=4), values.transpose(2, 0, 1))


def test_decode_makes_opaque_images_opaque_in_four_channels(folder: Path) -> None:
    Image.fromarray(noise(4, 4)).save(folder / "a.png")
    Image.fromarray(noise(4, 4, high=65536)).save(folder / "b.png")
    images = load_images(cache_config(folder, channels=4))
    assert (images.image(0)[3] == 65535).all()
    assert (images.image(1)[3] == 65535).all()


def test_decode_composites_transparent_palette_over_white(folder: Path) -> None:
    image = Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8)).convert("P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    planes = load_one(folder, image, save={"transparency": 1})
    assert planes.transpose(1, 2, 0).tolist() == [[[255, 0, 0], [255] * 3], [[0, 0, 255], [255] * 3]]


def test_decode_composites_transparent_gray_level_over_white(folder: Path) -> None:
    image = Image.fromarray(np.array([[7, 8], [9, 8]], np.uint8))
    assert load_one(folder, image, save={"transparency": 8}).tolist() == [[[7, 255], [9, 255]]]


def test_decode_converts_cmyk_to_rgb(folder: Path) -> None:
    image = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    assert np.abs(load_one(folder, image, "tif").astype(int)[:, 0, 0] - [0, 255, 255]).max() == 0


def test_decode_repeats_gray_among_color_images(folder: Path) -> None:
    Image.fromarray(noise(8, 8, 3)).save(folder / "a.png")
    Image.fromarray(noise(8, 8)).save(folder / "b.png")
    images = load_images(cache_config(folder))
    assert np.array_equal(images.image(1), np.repeat(noise(8, 8)[None], 3, axis=0))


def test_decode_applies_exif_orientation(folder: Path) -> None:
    values = np.zeros((8, 16), np.uint8)
    values[:, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise: the left half comes to the top
    planes = load_one(folder, Image.fromarray(values), save={"exif": exif}, resolution=8)
    assert planes.shape == (1, 16, 8)
    assert (planes[0, :8] == 255).all()
    assert (planes[0, 8:] == 0).all()


FILE_FORMATS = ("PNG", "TIFF", "IM", "WEBP", "JPEG", "GIF")


def encoded_in_mode(mode: str, width: int, height: int, rng: np.random.Generator, file_format: str) -> dict | None:
    """Return an encoded image of random bytes in a mode; None if the format of the file cannot hold it."""
    size = len(Image.new(mode, (width, height)).tobytes())
    image = Image.frombytes(mode, (width, height), rng.bytes(size))
    if mode == "P":
        image.putpalette(rng.bytes(768))
    buffer = io.BytesIO()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Pillow 13 no longer saves mode I as PNG.
            image.save(buffer, file_format)
        Image.open(buffer).load()  # Pillow cannot read every file that it writes, such as YCbCr in TIFF.
    except (OSError, ValueError, KeyError):
        return None
    return {"bytes": buffer.getvalue(), "path": None}


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(
    mode=st.sampled_from(Image.MODES),
    file_format=st.sampled_from(FILE_FORMATS),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    resolution=st.integers(1, 9),
    channels=st.sampled_from([1, 3, 4]),
    max_value=st.sampled_from([255, 65535]),
    center_crop=st.booleans(),
    preserve=st.booleans(),
    seed=st.integers(0, 2**32),
)
@example(
    mode="RGBX",
    file_format="TIFF",
    size=(1, 1),
    resolution=1,
    channels=4,
    max_value=255,
    center_crop=False,
    preserve=False,
    seed=0,
)
def test_decode_of_every_mode_gives_planes_or_an_error_that_names_the_mode(
    mode: str,
    file_format: str,
    size: tuple[int, int],
    resolution: int,
    channels: int,
    max_value: int,
    center_crop: bool,
    preserve: bool,
    seed: int,
) -> None:
    encoded = encoded_in_mode(mode, *size, np.random.default_rng(seed), file_format)
    if encoded is None:
        return
    config = DataConfig(
        resolution=resolution, channels=channels, center_crop=center_crop, preserve_input_precision=preserve
    )
    mode, problem = Image.open(io.BytesIO(encoded["bytes"])).mode, None
    try:
        planes = decode(encoded, "row 0", ImageFormat(config, (resolution, resolution), channels, max_value)).planes
    except NeedsSixteenBits:
        assert mode.startswith("I")
        assert preserve
        assert max_value == 255
        return
    except ValueError as error:
        problem = str(unreadable_image_error("row 0", error, config))
    if problem is not None and "Pillow drops the fourth band" in problem:
        assert (file_format, mode, channels) == ("TIFF", "RGB", 4)
        return
    if problem is not None:
        assert mode in ("F", "I")  # Their values may lie in a range that is not known.
        assert f"mode {mode} " in problem
        return
    assert planes.dtype == (np.uint8 if max_value == 255 else np.uint16)
    assert planes.shape[0] == channels
    assert min(planes.shape[1:]) == resolution
    assert planes.shape[1] == planes.shape[2] or not center_crop
    if mode in GRAY_MODES and mode != "LA" and channels > 1:
        assert (planes[:3] == planes[0]).all()
    if max_value == 65535 and not mode.startswith("I"):
        assert (planes % 257 == 0).all()  # 8 bits, repeated
    if channels == 4 and mode not in ("LA", "PA", "RGBA"):
        assert (planes[3] == max_value).all()


@pytest.mark.parametrize("mode", Image.MODES)
def test_to_planes_of_every_mode_gives_planes_or_an_error_that_names_the_mode(mode: str) -> None:
    """In memory Pillow has more modes than it can save."""
    image_format = ImageFormat(DataConfig(), (3, 3), 3, 65535)
    image, problem = Image.new(mode, (4, 3)), None
    try:
        planes = to_planes(image, image_format, "row 0")
    except ValueError as error:
        problem = str(error)
    if problem is None:
        assert (planes.shape, planes.dtype) == ((3, 3, 4), np.uint16)
    else:
        assert mode in ("F", "La")
        assert re.search(rf"\b{mode}\b", problem)


@settings(max_examples=60, deadline=None)
@given(
    gray=st.lists(st.integers(0, 255), min_size=12, max_size=12),
    channels=st.sampled_from([1, 3, 4]),
    max_value=st.sampled_from([255, 65535]),
)
def test_decode_gives_the_same_planes_for_gray_in_every_mode(gray: list[int], channels: int, max_value: int) -> None:
    image = Image.fromarray(np.array(gray, np.uint8).reshape(4, 3))
    as_palette = image.convert("P")
    as_palette.putpalette([value for level in range(256) for value in (level, level, level)])
    as_deep = Image.fromarray(np.array(gray, np.uint16).reshape(4, 3) * 257)
    config = DataConfig(resolution=3, channels=channels, preserve_input_precision=False)
    image_format = ImageFormat(config, (3, 3), channels, max_value)
    level = np.array(gray).reshape(1, 4, 3) * (max_value // 255)
    expected = np.repeat(level, channels, axis=0)
    if channels == 4:
        expected[3] = max_value
    variants = [image.convert(mode) for mode in ("L", "LA", "RGB", "RGBA")]
    for variant in (*variants, as_palette, as_deep):
        buffer = io.BytesIO()
        variant.save(buffer, "PNG")
        planes = decode({"bytes": buffer.getvalue(), "path": None}, "row 0", image_format).planes
        assert np.array_equal(planes, expected), variant.mode


# 16 bits


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_decode_preserves_sixteen_bits(folder: Path, suffix: str) -> None:
    values = noise(8, 8, high=65536)
    images = load_one(folder, Image.fromarray(values), suffix)
    assert images.dtype == np.uint16
    assert np.array_equal(images[0], values)


def test_decode_resizes_sixteen_bits_to_within_one_level(folder: Path) -> None:
    ramp = np.broadcast_to(np.arange(16, dtype=np.uint16) * 4001, (16, 16))
    planes = load_one(folder, Image.fromarray(np.ascontiguousarray(ramp)), resolution=8)
    # inside, halving a linear ramp by a symmetric kernel gives the mean of each pair
    wanted = ramp[0].astype(float).reshape(8, 2).mean(1)[1:-1]
    assert np.abs(planes[0, 3, 1:-1] - wanted).max() <= 1


def test_decode_reduces_sixteen_bits_to_eight_by_value(folder: Path) -> None:
    values = np.array([[0, 128, 129, 255], [256, 32767, 32768, 65535]] * 2, np.uint16)
    planes = load_one(folder, Image.fromarray(values), preserve_input_precision=False)
    assert planes.dtype == np.uint8
    assert planes[0, :2].tolist() == [[0, 0, 1, 1], [1, 127, 128, 255]]


def test_format_becomes_sixteen_bits_after_many_images_of_eight(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "NUM_HEADERS", 2)
    grays = save_grays(folder, 5)
    Image.fromarray(noise(8, 8, high=65536)).save(folder / "z.png")
    images = load_images(cache_config(folder))
    assert images.max_value == 65535
    assert np.array_equal(images.image(3)[0], grays[3].astype(int) * 257)
    assert np.array_equal(images.image(5)[0], noise(8, 8, high=65536))
    assert micro_batches(images)[0]["pixels"].dtype == torch.int32


def test_decode_makes_transparent_level_of_sixteen_bits_white(folder: Path) -> None:
    values = np.array([[7000, 8000], [9000, 8000]], np.uint16)
    content = png(values)
    chunk = b"tRNS" + (8000).to_bytes(2, "big")
    chunk = (2).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    chunk_start = content.index(b"IDAT") - 4
    (folder / "a.png").write_bytes(content[:chunk_start] + chunk + content[chunk_start:])
    assert load_images(cache_config(folder)).image(0)[0].tolist() == [[7000, 65535], [9000, 65535]]


@pytest.mark.parametrize(
    ("values", "reason"),
    [(np.full((4, 4), 0.5, np.float32), "32-bit floats"), (np.full((4, 4), 70000, np.int32), "70000")],
)
def test_decode_rejects_pixels_of_unknown_range(folder: Path, values: np.ndarray, reason: str) -> None:
    (folder / "z.png").write_bytes(
        png(np.zeros((4, 4), np.uint8))
    )  # a folder of TIFF files alone may be one of arrays
    with pytest.raises(UsageError, match=reason):
        load_one(folder, Image.fromarray(values), "tif")


# Sizes


def test_resize_makes_shorter_side_the_resolution_and_crops_are_random(folder: Path) -> None:
    image = Image.fromarray(noise(20, 31, 3))
    planes = load_one(folder, image, resolution=10)
    wanted = image.resize((15, 10), Image.Resampling.BILINEAR)
    assert np.array_equal(planes, np.asarray(wanted).transpose(2, 0, 1))
    batches = micro_batches(load_images(cache_config(folder, resolution=10)), batch_size=64)
    offsets = set()
    for pixels in batches[0]["pixels"].numpy():
        matches = [left for left in range(6) if np.array_equal(pixels, planes[:, :, left : left + 10])]
        assert len(matches) == 1
        offsets.add(matches[0])
    assert offsets == {0, 1, 2, 3, 4, 5}


def test_center_crop_is_square_and_central(folder: Path) -> None:
    image = Image.fromarray(noise(31, 20))
    planes = load_one(folder, image, resolution=10, center_crop=True)
    tall = np.asarray(image.resize((10, 15), Image.Resampling.BILINEAR))
    assert np.array_equal(planes[0], tall[2:12])
    image = Image.fromarray(noise(20, 31))
    planes = load_one(folder, image, resolution=10, center_crop=True)
    wide = np.asarray(image.resize((15, 10), Image.Resampling.BILINEAR))
    assert np.array_equal(planes[0], wide[:, 2:12])


def test_center_crop_is_the_same_before_and_after_the_cache(folder: Path) -> None:
    for i in range(12):  # excesses of even and of odd numbers of pixels, at either side
        size = (10 + i, 10) if i % 3 else (10, 10 + i)
        Image.fromarray(noise(*size, seed=i)).save(folder / f"{i:02}.png")
    whole = load_images(cache_config(folder, resolution=10))
    cropped = load_images(cache_config(folder, resolution=10, center_crop=True))
    assert cropped.is_uniform
    assert not whole.is_uniform
    assert np.array_equal(fixed_pixels(whole), fixed_pixels(cropped))
    assert np.array_equal(fixed_pixels(whole, np.array([7, 2])), fixed_pixels(cropped)[[7, 2]])


def test_open_resolution_is_that_of_the_data(folder: Path) -> None:
    save_grays(folder, 3, size=12)
    assert load_images(cache_config(folder)).size == (12, 12)


@pytest.mark.parametrize("num_headers", [1, 64])
def test_open_resolution_rejects_unequal_sizes(
    folder: Path, num_headers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "NUM_HEADERS", num_headers)
    save_grays(folder, 2)
    Image.fromarray(noise(8, 9)).save(folder / "odd.png")
    with pytest.raises(UsageError, match=r"odd\.png.* 8 x 9.*--resolution"):
        load_images(cache_config(folder))


def test_open_channels_reject_color_after_gray(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "NUM_HEADERS", 1)
    save_grays(folder, 2)
    Image.fromarray(noise(8, 8, 3)).save(folder / "red.png")
    with pytest.raises(UsageError, match=r"red\.png.*--channels 3"):
        load_images(cache_config(folder))
    luma = np.asarray(Image.fromarray(noise(8, 8, 3)).convert("L"))
    assert np.array_equal(load_images(cache_config(folder, channels=1)).image(2)[0], luma)


def test_decode_rejects_very_oblong_images(folder: Path) -> None:
    with pytest.raises(UsageError, match="1x101 pixels is too oblong"):
        load_one(folder, Image.fromarray(noise(101, 1)), resolution=4)
