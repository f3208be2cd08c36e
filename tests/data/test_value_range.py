"""What the values of a file stand for, what of a file is not read, and how a run says so."""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hf_ddpm.data.batches import to_x_0
from hf_ddpm.data.description import describe_images
from hf_ddpm.data.images import load_images
from hf_ddpm.data.shards import open_stream
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.runtime.settings import check_values
from tests.support.image_data import cache_config, load_one, noise, save_grays


def tiff(image: Image.Image, old: bytes = b"", new: bytes = b"") -> bytes:
    """Return an image as a TIFF file, of which a directory entry is replaced."""
    buffer = io.BytesIO()
    image.save(buffer, "TIFF")
    assert old in buffer.getvalue()
    return buffer.getvalue().replace(old, new)


def png16(pixels: np.ndarray) -> bytes:
    """Return (H, W, C) uint16 as a PNG file, which Pillow does not write for more than one channel."""
    height, width, channels = pixels.shape
    color_type = {2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, color_type, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    parts = [struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def lines_of(folder: Path, **settings: Any) -> list[str]:
    """Return what a run says of a folder, read beforehand and streamed; the two are the same."""
    config = cache_config(folder, **settings)
    of_cache = describe_images(config, load_images(config))
    stream = replace(config, streaming=True)
    of_stream = describe_images(stream, open_stream(stream))
    assert [line.replace(" of the first 16", "") for line in of_stream[1:]] == of_cache[1:]
    return of_cache


# Value ranges


@pytest.mark.parametrize(("bits", "high"), [(12, 4095), (16, 65535)])
def test_value_range_of_deep_images_becomes_minus_one_to_one(folder: Path, bits: int, high: int) -> None:
    values = noise(8, 8, high=high + 1)
    values[0, :2] = 0, high
    planes = load_one(folder, Image.fromarray(values.astype(np.uint16)), value_range=[0, high])
    x_0 = to_x_0_of(planes, 65535)
    assert np.abs(x_0[0] - (values * (2 / high) - 1)).max() <= 1 / 65535
    assert (x_0.min(), x_0.max()) == (-1, 1)


def to_x_0_of(planes: np.ndarray, max_value: int) -> np.ndarray:
    """Return planes as x_0."""
    return to_x_0(torch.from_numpy(planes.astype(np.int32)), max_value).numpy()


def test_value_range_begins_where_the_values_do(folder: Path) -> None:
    values = np.array([[1000, 1500], [2000, 3000]], np.uint16)
    planes = load_one(folder, Image.fromarray(values), value_range=[1000, 3000])
    assert np.allclose(to_x_0_of(planes, 65535)[0], [[-1, -0.5], [0, 1]], atol=1 / 65535)


def test_value_range_of_a_mask_becomes_black_and_white_before_it_is_resized(folder: Path) -> None:
    mask = np.kron(np.eye(4, dtype=np.uint8), np.ones((2, 2), np.uint8))
    planes = load_one(folder, Image.fromarray(mask), value_range=[0, 1])
    assert np.array_equal(planes[0], mask * 255)
    halved = load_one(folder, Image.fromarray(np.eye(8, dtype=np.uint8)), value_range=[0, 1], resolution=4)
    assert 0 < halved[0, 0, 0] < 255


def test_value_range_leaves_transparency_as_it_is(folder: Path) -> None:
    pixels = np.full((4, 4, 4), 10, np.uint8)
    pixels[0, 0] = 0, 20, 5, 128
    planes = load_one(folder, Image.fromarray(pixels), value_range=[0, 20], channels=4)
    assert planes[:, 0, 0].tolist() == [0, 255, 64, 128]


@pytest.mark.parametrize("value", [np.uint16(4096), np.uint8(200)])
def test_value_outside_value_range_is_named(folder: Path, value: Any) -> None:
    Image.fromarray(np.full((4, 4), value)).save(folder / "a.png")
    with pytest.raises(UsageError, match=rf"value_range must hold all values, got 0 100 and .*a\.png.* {value}"):
        load_images(cache_config(folder, value_range=[0, 100]))


def test_value_range_is_that_of_all_images(folder: Path) -> None:
    Image.fromarray(noise(4, 4, high=4096)).save(folder / "a.png")
    Image.fromarray(noise(4, 4)).save(folder / "b.png")
    with pytest.raises(UsageError, match=r"other images have 16 bits, .*b\.png.* has 8"):
        load_images(cache_config(folder, value_range=[0, 4095]))


@pytest.mark.parametrize("values", [[1], [1, 1], [2, 1], [0, 1, 2], [0, float("inf")]])
def test_value_range_must_be_two_rising_numbers(values: list[float]) -> None:
    with pytest.raises(UsageError, match="value_range must be 2 rising numbers"):
        check_values(cache_config(None, value_range=values))


@pytest.mark.parametrize(
    ("largest", "smallest", "dtype", "wanted"),
    [
        (4095, 0, np.uint16, "0 4095"),
        (4000, 0, np.uint16, "0 4095"),
        (1, 0, np.uint8, "0 1"),
        (36000, 33000, np.uint16, "33000 36000"),
    ],
)
def test_run_warns_of_values_that_fill_little_of_their_range(
    folder: Path, largest: int, smallest: int, dtype: type, wanted: str
) -> None:
    values = np.full((4, 4), smallest, dtype)
    values[0] = largest
    Image.fromarray(values).save(folder / "a.png")
    (warning,) = lines_of(folder)[1:]
    assert f"they go from {smallest} to {largest}, " in warning
    assert f"--value_range {wanted} stretches" in warning
    low, high = map(float, wanted.split())
    assert len(lines_of(folder, value_range=[low, high])) == 1


def test_run_does_not_warn_of_values_that_fill_their_range(folder: Path) -> None:
    Image.fromarray(noise(8, 8)).save(folder / "a.png")
    assert len(lines_of(folder)) == 1


# What of a file is not read


def test_sixteen_bits_of_color_are_said_to_be_lost(folder: Path) -> None:
    pixels = noise(4, 4, 3, high=65536)
    (folder / "a.png").write_bytes(png16(pixels))
    assert lines_of(folder)[1] == (
        "not read in 1 images: the lower 8 of 16 bits of color or transparency, which Pillow drops"
    )
    assert len(lines_of(folder, preserve_input_precision=False)) == 1
    Image.fromarray(noise(4, 4, 3)).save(folder / "b.bmp")  # in a folder of PNG files alone they are kept
    with pytest.raises(UsageError, match=r"preserve_input_precision can keep .* got another format in .*b\.bmp"):
        load_images(cache_config(folder, preserve_input_precision=True))


def test_sixteen_bits_of_gray_with_transparency_are_gray(folder: Path) -> None:
    pixels = noise(4, 4, 2, high=65536)
    pixels[..., 1] = 65535
    (folder / "a.png").write_bytes(png16(pixels))
    images = load_images(cache_config(folder))
    assert images.channels == 1
    assert np.abs(images.image(0)[0] - pixels[..., 0] / 257).max() <= 1


def test_sixteen_bits_of_a_color_ppm_are_said_to_be_lost(folder: Path) -> None:
    (folder / "a.ppm").write_bytes(b"P6 2 2 65535\n" + noise(2, 6, high=65536).tobytes())
    assert "the lower 8 of 16 bits" in lines_of(folder)[1]
    (folder / "a.ppm").write_bytes(b"P6 2 2 255\n" + noise(2, 6).tobytes())
    assert not any("16 bits" in line for line in lines_of(folder))


def test_frames_after_the_first_are_said_to_be_left(folder: Path) -> None:
    frames = [Image.fromarray(noise(4, 4, seed=i)) for i in range(3)]
    for name in ("a.gif", "b.tif", "c.png", "d.webp"):
        frames[0].save(folder / name, save_all=True, append_images=frames[1:])
    frames[0].save(folder / "e.png")
    assert lines_of(folder)[1] == "not read in 4 images: frames after the first of an animation or a stack"


def test_transparency_is_read_into_a_fourth_channel_alone(folder: Path) -> None:
    save_grays(folder, 2)
    Image.fromarray(noise(8, 8, 4)).save(folder / "b.png")
    opaque = noise(8, 8, 4)
    opaque[..., 3] = 255
    Image.fromarray(opaque).save(folder / "c.png")
    assert lines_of(folder, channels=3)[1] == "not read in 1 images: transparency, which becomes white"
    assert len(lines_of(folder, channels=4)) == 1


def test_decode_inverts_sixteen_bits_whose_zero_is_white(folder: Path) -> None:
    values = noise(4, 4, high=65536)
    entry = struct.Struct("<HHIHH")  # tag, type, count, value
    min_is_black, min_is_white = entry.pack(262, 3, 1, 1, 0), entry.pack(262, 3, 1, 0, 0)
    (folder / "a.tif").write_bytes(tiff(Image.fromarray(values), min_is_black, min_is_white))
    assert np.array_equal(load_images(cache_config(folder)).image(0)[0], 65535 - values)


@pytest.mark.parametrize("is_unspecified", [True, False])
def test_fourth_band_that_is_no_transparency_is_not_blended(folder: Path, is_unspecified: bool) -> None:
    pixels = noise(4, 4, 4)
    old = struct.pack("<HHI", 338, 3, 1)  # ExtraSamples
    new = old if is_unspecified else struct.pack("<HHI", 65000, 3, 1)
    (folder / "a.tif").write_bytes(tiff(rgbx(pixels), old, new))
    images = load_images(cache_config(folder))
    assert np.array_equal(images.image(0), pixels[..., :3].transpose(2, 0, 1))
    assert "bands beyond the colors" in lines_of(folder)[1]
    if is_unspecified:
        with pytest.raises(UsageError, match=r"channels must not be 4: Pillow drops the fourth band of .*a\.tif"):
            load_images(cache_config(folder, channels=4))
    else:
        of_four = load_images(cache_config(folder, channels=4))
        assert np.array_equal(of_four.image(0), pixels.transpose(2, 0, 1))
        assert len(lines_of(folder, channels=4)) == 1


def rgbx(pixels: np.ndarray) -> Image.Image:
    """Return (H, W, 4) as an image whose fourth band means nothing."""
    return Image.frombytes("RGBX", pixels.shape[1::-1], pixels.tobytes())
