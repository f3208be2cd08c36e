"""Planes: the array that a loaded image becomes, and crops of it.

planes          an image, (C, h, w) uint8 or uint16 in [0, max_value]. It is resized so that it covers the size of x_0,
                (H, W): one side is equal, and the other at least. With `random_crop` it keeps its own size.
value range     the values of a file that become 0 and max_value: [0, 255] or [0, 65535], or the setting `value_range`
"""

from __future__ import annotations

import contextlib

import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin

from hf_ddpm.data.config import DataConfig
from hf_ddpm.data.image_format import GRAY_MODES, ImageFormat, has_unnamed_bands
from hf_ddpm.image_size import Size, format_size
from hf_ddpm.runtime.errors import UsageError

MAX_ASPECT_RATIO = 100


class NeedsSixteenBits(Exception):
    """The signal that a 16-bit image came after the first headers had promised 8 bits."""


class TooSmallError(ValueError):
    """The failure of an image to hold a crop."""


def to_planes(image: Image.Image, image_format: ImageFormat, name: str) -> np.ndarray:
    """Convert a loaded image to planes.

    The EXIF orientation is applied. Transparency is composited over white unless there are 4 channels. A value v of a
    value range [low, high] becomes round((v - low) * max_value / (high - low)). Without `value_range`, values of 8
    bits become 16 bits by v * 257.

    Returns:
        The planes, (C, h, w) in [0, max_value], of the format's type; (C, H, W) with `center_crop`.

    Raises:
        UsageError: When a value lies outside `value_range`, or 4 channels are asked for and Pillow drops the fourth.
        ValueError: When the range of the pixels is unknown, the image is too oblong, or too small for `random_crop`.
        NeedsSixteenBits: When the image has 16 bits and the format has 8, though the settings would preserve 16.
    """
    max_value, config = image_format.max_value, image_format.config
    with contextlib.suppress(Exception):  # Damaged text beside pixels that are whole; Pillow raises nearly any class.
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "F":
        raise ValueError("pixels of mode F are 32-bit floats, whose range is unknown")
    is_deep = image.mode.startswith("I")
    low, high = config.value_range or (0, 65535)
    if is_deep:
        image = _deep_to_float(image, low, high, name)
        if config.preserve_input_precision is not False and max_value == 255:
            raise NeedsSixteenBits
    else:
        image = _to_mode(image, config, image_format.channels, name)
    values = np.asarray(resized(image, image_format))
    if is_deep:
        scaled = (values.astype(np.float64) - low) * max_value / (high - low)
        values = np.clip(np.rint(scaled), 0, max_value).astype(image_format.dtype)
    elif max_value == 65535:
        values = values.astype(np.uint16) * 257
    planes = _gray_to_channels(values, image_format) if values.ndim == 2 else values.transpose(2, 0, 1)
    return center_crop(planes, image_format.size) if config.center_crop else planes


def random_crop(planes: np.ndarray, size: Size, u: float, v: float) -> np.ndarray:
    """Return the crop of `planes` that two random numbers choose; every possible crop is equally likely.

    Args:
        planes: (C, h, w).
        size: (H, W) of the crop, at most (h, w).
        u: A number in [0, 1); the crop's top is floor(u (h - H + 1)).
        v: A number in [0, 1); the crop's left is floor(v (w - W + 1)).

    Returns:
        A view of `planes`, (C, H, W).
    """
    (height, width), (H, W) = planes.shape[1:], size
    top, left = int(u * (height - H + 1)), int(v * (width - W + 1))
    return planes[:, top : top + H, left : left + W]


def center_crop(planes: np.ndarray, size: Size) -> np.ndarray:
    """Return the central crop of `planes`, which begins at round((h - H) / 2), as torchvision's does.

    Args:
        planes: (C, h, w).
        size: (H, W) of the crop, at most (h, w).

    Returns:
        A view of `planes`, (C, H, W).
    """
    (height, width), (H, W) = planes.shape[1:], size
    top, left = round((height - H) / 2), round((width - W) / 2)
    return planes[:, top : top + H, left : left + W]


def _gray_to_channels(values: np.ndarray, image_format: ImageFormat) -> np.ndarray:
    planes = np.repeat(values[None], image_format.channels, axis=0)
    if image_format.channels == 4:
        planes[3] = image_format.max_value  # opaque
    return planes


def _deep_to_float(image: Image.Image, low: float, high: float, name: str) -> Image.Image:
    """Convert a 16-bit or 32-bit integer image to mode "F", whose pixels Pillow resizes without rounding them."""
    values = np.asarray(image).astype(np.float64)
    if _is_white_zero(image):
        values = 65535 - values
    if (low, high) == (0, 65535) and (values.min() < 0 or values.max() > 65535):
        raise ValueError(
            f"pixels of mode {image.mode} must be in [0, 65535], got [{values.min():.0f}, {values.max():.0f}]"
        )
    transparent = values == image.info.get("transparency")
    visible = values[~transparent]
    if visible.size:
        _check_in_range(visible.min(), visible.max(), low, high, name)
    values[transparent] = high
    return Image.fromarray(values.astype(np.float32))


def _is_white_zero(image: Image.Image) -> bool:
    """Return whether 0 is white in a 16-bit TIFF file; Pillow inverts 8 bits by itself, and leaves 16 as they are."""
    return (
        image.format == "TIFF"
        and image.mode.startswith("I;16")
        and image.tag_v2.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0  # pyright: ignore[reportAttributeAccessIssue]
    )


def _check_in_range(smallest: float, largest: float, low: float, high: float, name: str) -> None:
    if smallest < low or largest > high:
        raise UsageError(
            f"value_range must hold all values, got {low:g} {high:g} and {name} with values from {smallest:g} to "
            f"{largest:g}: widen it"
        )


def _to_mode(image: Image.Image, config: DataConfig, channels: int, name: str) -> Image.Image:
    """Convert an image with 8 bits to gray, RGB or RGBA, its colors stretched from `value_range` to [0, 255]."""
    if has_unnamed_bands(image):
        if channels == 4 and image.mode != "RGBA":
            raise UsageError(
                f"channels must not be 4: Pillow drops the fourth band of {name}, which ExtraSamples calls unspecified"
            )
        image = image if channels == 4 else Image.merge("RGB", image.split()[:3])
        image = _stretched(image, config, name, num_bands=len(image.getbands()))
    elif image.has_transparency_data:
        image = _stretched(image.convert("RGBA"), config, name, num_bands=3)
        if channels != 4:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    else:
        image = image.convert("L" if image.mode in GRAY_MODES else "RGB")
        image = _stretched(image, config, name, num_bands=len(image.getbands()))
    mode = {1: "L", 3: "RGB", 4: "RGBA"}[channels]
    return image if image.mode == mode else image.convert(mode)


def _stretched(image: Image.Image, config: DataConfig, name: str, num_bands: int) -> Image.Image:
    """Stretch the first bands of an image from `value_range` to [0, 255]; without it, return the image as it is."""
    if config.value_range is None:
        return image
    low, high = config.value_range
    values = np.asarray(image).reshape(image.height, image.width, -1)[:, :, :num_bands]
    _check_in_range(values.min(), values.max(), low, high, name)
    table = np.clip(np.rint((np.arange(256) - low) * 255 / (high - low)), 0, 255).astype(int).tolist()
    bands = len(image.getbands())
    return image.point(table * num_bands + [*range(256)] * (bands - num_bands))


def resized(image: Image.Image, image_format: ImageFormat) -> Image.Image:
    """Resize an image so that it covers the size of x_0, with `random_crop` check that it does.

    Raises:
        ValueError: When it is too oblong, or with `random_crop` too small.
    """
    (width, height), (H, W) = image.size, image_format.size
    if image_format.config.random_crop:
        if height < H or width < W:
            raise TooSmallError(f"{format_size((height, width))} is smaller than {format_size((H, W))}")
        return image
    # H / height and W / width, without fractions: the larger one is the scale.
    by_height, by_width = H * width, W * height
    if max(by_height, by_width) > MAX_ASPECT_RATIO * min(by_height, by_width):
        beside = "" if H == W else f" beside {format_size((H, W))}"
        raise ValueError(f"{width}x{height} pixels is too oblong{beside}: more than {MAX_ASPECT_RATIO} to 1")
    size = (by_height // height, H) if by_height >= by_width else (W, by_width // width)
    return image if size == image.size else image.resize(size, Image.Resampling.BILINEAR)
