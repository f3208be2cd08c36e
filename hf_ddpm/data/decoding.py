"""Decoding of one image: from the bytes of a file to an array of planes.

encoded image   what a row of a data set holds: {"bytes": ..., "path": ...}, either of which may be None
header          the beginning of an image file, which tells its size and mode without decoding its pixels
mode            Pillow's name of what a pixel is: "L" is 8-bit gray, "I;16" 16-bit gray, "RGB" color, ...
image format    the resolution, the channels and the largest value that all images of a data set are brought to
planes          a decoded image, (C, h, w) uint8 or uint16 in [0, max_value], its shorter side being the resolution
value range     the values of a file that become 0 and max_value: [0, 255] or [0, 65535], or the setting `value_range`
loss            what a file holds and its planes do not: bits, bands or frames
"""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin

from hf_ddpm.data.config import DataConfig
from hf_ddpm.data.image_folder import readable_formats
from hf_ddpm.runtime.errors import UsageError, in_one_line

NUM_HEADERS = 64  # The first so many headers decide what resolution=None and channels=None mean.
MAX_ASPECT_RATIO = 100
TRANSPARENCY = "transparency, which becomes white"
_LIMIT = threading.Lock()  # Pillow's limit is one for the process.
GRAY_MODES = frozenset(("1", "L", "LA", "La", "I", "F", "I;16", "I;16L", "I;16B", "I;16N"))


@dataclass(frozen=True)
class ImageFormat:
    """The format that every image is converted to: the settings of the data, with those that were left open decided.

    Args:
        config: The settings as the user gave them.
        resolution: The shorter side in pixels.
        channels: 1, 3 or 4.
        max_value: 255, or 65535 for 16-bit images.
        file_max: The same of the files, of which `max_value` may be a reduction.
    """

    config: DataConfig
    resolution: int
    channels: int
    max_value: int
    file_max: int = 255

    @property
    def dtype(self) -> type[np.uint8] | type[np.uint16]:
        """The type of the planes: uint8, or uint16 for 16-bit images."""
        return np.uint8 if self.max_value == 255 else np.uint16


class InFormat:
    """The properties of images that were brought to one format, and whose classes have names or do not exist."""

    image_format: ImageFormat
    class_names: list[str] | None

    @property
    def channels(self) -> int:
        """The number of planes of each image."""
        return self.image_format.channels

    @property
    def max_value(self) -> int:
        """The largest value of a pixel: 255, or 65535."""
        return self.image_format.max_value

    @property
    def file_max(self) -> int:
        """The largest value that the files can hold: 255, or 65535."""
        return self.image_format.file_max

    @property
    def resolution(self) -> int:
        """The shorter side of each image in pixels."""
        return self.image_format.resolution

    @property
    def num_classes(self) -> int | None:
        """The number of classes; None without labels."""
        return None if self.class_names is None else len(self.class_names)


class Decoded(NamedTuple):
    """A decoded image.

    Args:
        planes: (C, h, w) in [0, max_value], of the format's type.
        losses: What the file holds and the planes do not, see `losses_of`.
    """

    planes: np.ndarray
    losses: list[str]


class NeedsSixteenBits(Exception):
    """The signal that a 16-bit image came after the first headers had promised 8 bits."""


class NotFetchedError(Exception):
    """The failure of a disk or a network to give a file that it may give later."""


class _Header(NamedTuple):
    name: str
    size: tuple[int, int]  # width, height
    mode: str
    is_gray: bool


def with_bytes(encoded: Any) -> Any:
    """Return an encoded image with the bytes of the file that its path names, on a disk, in an archive or on the Hub.

    Raises:
        FileNotFoundError: When there is no such file.
        NotFetchedError: When reading the file fails for any other reason.
    """
    if encoded is None or encoded["bytes"] is not None or encoded["path"] is None:
        return encoded
    path: str = encoded["path"]
    try:
        if "://" not in path:
            return {"bytes": Path(path).read_bytes(), "path": path}
        with fsspec.open(path, "rb") as file:  # A path in an archive reads zip://a.png::b.zip.
            return {"bytes": file.read(), "path": path}  # pyright: ignore[reportAttributeAccessIssue]
    except FileNotFoundError:
        raise
    except Exception as error:  # File systems and clients share no base class of errors.
        raise NotFetchedError(in_one_line(error, with_type=True)) from error


def open_image(encoded: Any, max_pixels: int | None = None) -> Image.Image:
    """Open an encoded image and read its header.

    Args:
        encoded: The encoded image.
        max_pixels: The most pixels that an image may have; None: Pillow's own limit. It is Pillow's only while the
            image is opened, and no longer that of the process.

    Raises:
        ValueError: When the row holds neither bytes nor a path, or the image has more pixels.
        Exception: When the file cannot be read or is no image; Pillow raises nearly any class.
    """
    encoded = with_bytes(encoded)
    if encoded is None or encoded["bytes"] is None:
        raise ValueError("the row is empty")
    content = io.BytesIO(encoded["bytes"])
    if max_pixels is None:
        return Image.open(content, formats=readable_formats())
    with _LIMIT:
        pillows, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            image = Image.open(content, formats=readable_formats())
        finally:
            Image.MAX_IMAGE_PIXELS = pillows
    if image.width * image.height > max_pixels:
        raise Image.DecompressionBombError(f"{image.width * image.height} pixels, more than {max_pixels}")
    return image


def decode(encoded: Any, name: str, image_format: ImageFormat) -> Decoded:
    """Decode an image, convert it to the given format and resize it.

    Args:
        encoded: The encoded image.
        name: What error messages call the image.
        image_format: The format to bring it to.

    Raises:
        UsageError: When the image differs from the first images, which decided the format, has values outside
            `value_range`, or has bits or bands that settings ask for and Pillow does not give.
        NeedsSixteenBits: When the image has 16 bits and the format has 8.
        Exception: When the file is broken; Pillow's decoders raise nearly any class.
    """
    with open_image(encoded, image_format.config.max_image_pixels) as image:
        # Loading forgets how many bits and bands there were.
        losses = losses_of(image, image_format)
        check_keeps_precision(image, name, image_format.config)
        check_matches_format(image, name, image_format)
        image.load()
        return Decoded(to_planes(image, image_format, name), without_opaque(losses, image))


def losses_of(image: Image.Image, image_format: ImageFormat) -> list[str]:
    """Return in words what an opened image holds and its planes will not, without what the settings give up."""
    losses = []
    # The further pictures of these two formats are previews, depth or layers of the first one.
    if getattr(image, "is_animated", False) and image.format not in ("MPO", "PSD"):
        losses.append("frames after the first of an animation or a stack")
    if _has_deep_colors(image) and image_format.config.preserve_input_precision is not False:
        losses.append("the lower 8 of 16 bits of color or transparency, which Pillow drops")
    if _has_unnamed_bands(image) and image_format.channels != 4:
        losses.append("bands beyond the colors that are no transparency")
    elif image_format.channels != 4 and image.has_transparency_data:
        losses.append(TRANSPARENCY)
    return losses


def without_opaque(losses: list[str], image: Image.Image) -> list[str]:
    """Return the losses of an image that is loaded now: without TRANSPARENCY where all its pixels are opaque."""
    if TRANSPARENCY in losses and image.mode in ("RGBA", "LA") and image.getchannel("A").getextrema()[0] == 255:
        return [loss for loss in losses if loss != TRANSPARENCY]
    return losses


def check_keeps_precision(image: Image.Image, name: str, config: DataConfig) -> None:
    """Check that an opened image keeps its bits if the settings ask for that.

    Raises:
        UsageError: When `preserve_input_precision` is True and Pillow will drop bits.
    """
    if config.preserve_input_precision and _has_deep_colors(image):
        raise UsageError(
            f"preserve_input_precision can keep 16 bits of gray images only, got 16-bit {image.mode} in {name}: leave "
            "it out, or convert the images to 8 bits"
        )


def is_transient(error: Exception) -> bool:
    """Return whether an error tells nothing about the image itself, so that a later try may succeed."""
    return isinstance(error, NotFetchedError | MemoryError)


def name_of(encoded: Any, row: int) -> str:
    """Return what error messages call an image: its row, and its path if it has one."""
    return f"row {row}" if encoded is None or encoded["path"] is None else f"row {row} ({encoded['path']})"


def unreadable_image_error(name: str, error: Exception) -> UsageError:
    """Return the error that names an unreadable image, the reason and the remedy."""
    reason = in_one_line(error)
    if type(error).__name__ == "UnidentifiedImageError":
        reason = "not an image that Pillow knows"
    if isinstance(error, Image.DecompressionBombError):
        return UsageError(
            f"every image must be within the limit of pixels, got {name}: {reason}; if it is no attack on the memory, "
            "give --max_image_pixels, or leave out all such images with --on_bad_image skip"
        )
    if is_transient(error):
        return UsageError(f"every image must be readable, got {name}: {reason}; try again, or remove it")
    return UsageError(
        f"every image must be readable, got {name}: {reason}; "
        "repair or remove it, or leave out all such images with --on_bad_image skip"
    )


def infer_format(images: Iterable[tuple[str, Any]], config: DataConfig) -> ImageFormat:
    """Decide what the settings leave open by the headers of the first images.

    Args:
        images: The name of each image, for messages, and its encoded form; at least one.
        config: The settings of the data.

    Raises:
        UsageError: When an image is unreadable and `on_bad_image` is "raise", when none is readable, or when
            `resolution` is left open and the images are not all squares of one size.
    """
    return _format_of_headers(_read_headers(images, config), config)


def format_of(image: Image.Image, name: str, config: DataConfig) -> ImageFormat:
    """Decide what the settings leave open by one image; see `infer_format`."""
    return _format_of_headers([_Header(name, image.size, image.mode, _is_gray(image))], config)


def _format_of_headers(headers: list[_Header], config: DataConfig) -> ImageFormat:
    resolution = config.resolution
    if resolution is None:
        resolution = headers[0].size[0]
        unequal = [header for header in headers if header.size != (resolution, resolution)]
        if unequal:
            name, (width, height) = unequal[-1].name, unequal[-1].size
            raise UsageError(
                f"resolution must be given unless all images are squares of one size: {name} is {width}x{height}; "
                "give --resolution"
            )
    is_gray = all(header.is_gray for header in headers)
    file_max = 65535 if any(header.mode.startswith("I") for header in headers) else 255
    max_value = 255 if config.preserve_input_precision is False else file_max
    return ImageFormat(config, resolution, config.channels or (1 if is_gray else 3), max_value, file_max)


def _read_headers(images: Iterable[tuple[str, Any]], config: DataConfig) -> list[_Header]:
    headers: list[_Header] = []
    num_unreadable = 0
    for name, encoded in images:
        try:
            with open_image(encoded, config.max_image_pixels) as image:
                check_keeps_precision(image, name, config)
                headers.append(_Header(name, image.size, image.mode, _is_gray(image)))
        except UsageError:
            raise
        except Exception as error:
            if config.on_bad_image == "raise" or is_transient(error):
                raise unreadable_image_error(name, error) from error
            num_unreadable += 1
        if len(headers) == NUM_HEADERS:
            break
    if not headers:
        raise UsageError(
            f"on_bad_image='skip' must leave some images, got {num_unreadable} unreadable ones only: "
            "repair or replace them"
        )
    return headers


def check_matches_format(image: Image.Image, name: str, image_format: ImageFormat) -> None:
    """Check that an image has the size and the colors that the first images promised.

    Raises:
        UsageError: When `resolution` was left open and the size differs, `channels` was and a color image follows
            gray ones, or `value_range` was given for 16-bit images and this one has 8 bits.
    """
    side, config = image_format.resolution, image_format.config
    if config.resolution is None and image.size != (side, side):
        raise UsageError(
            f"resolution must be given unless all images are squares of one size: {name} is "
            f"{image.width}x{image.height}, others are {side}x{side}; give --resolution"
        )
    if config.value_range and image_format.file_max == 65535 and not image.mode.startswith("I"):
        raise UsageError(
            f"value_range must be that of all images: other images have 16 bits, {name} has 8; convert it to 16 bits"
        )
    if config.channels is None and image_format.channels == 1 and not _is_gray(image):
        raise UsageError(
            f"channels must be given: the first images are gray, {name} has colors; --channels 3, or 1 for luma"
        )


def to_planes(image: Image.Image, image_format: ImageFormat, name: str) -> np.ndarray:
    """Convert a loaded image to planes.

    The EXIF orientation is applied. Transparency is composited over white unless there are 4 channels. A value v of a
    value range [low, high] becomes round((v - low) * max_value / (high - low)). Without `value_range`, values of 8
    bits become 16 bits by v * 257.

    Returns:
        The planes, (C, h, w) in [0, max_value], of the format's type; (C, R, R) with `center_crop`.

    Raises:
        UsageError: When a value lies outside `value_range`, or 4 channels are asked for and Pillow drops the fourth.
        ValueError: When the range of the pixels is unknown, or the image is too oblong.
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
    values = np.asarray(_resized(image, image_format.resolution))
    if is_deep:
        scaled = (values.astype(np.float64) - low) * max_value / (high - low)
        values = np.clip(np.rint(scaled), 0, max_value).astype(image_format.dtype)
    elif max_value == 65535:
        values = values.astype(np.uint16) * 257
    planes = _gray_to_channels(values, image_format) if values.ndim == 2 else values.transpose(2, 0, 1)
    return center_crop(planes, image_format.resolution) if config.center_crop else planes


def random_crop(planes: np.ndarray, size: int, u: float, v: float) -> np.ndarray:
    """Return the square of `planes` that two random numbers choose; every possible square is equally likely.

    Args:
        planes: (C, h, w).
        size: The side of the square, at most min(h, w).
        u: A number in [0, 1); the square's top is floor(u (h - size + 1)).
        v: A number in [0, 1); the square's left is floor(v (w - size + 1)).

    Returns:
        A view of `planes`, (C, size, size).
    """
    height, width = planes.shape[1:]
    top, left = int(u * (height - size + 1)), int(v * (width - size + 1))
    return planes[:, top : top + size, left : left + size]


def center_crop(planes: np.ndarray, size: int) -> np.ndarray:
    """Return the central square of `planes`, which begins at round((h - size) / 2), as torchvision's does.

    Args:
        planes: (C, h, w).
        size: The side of the square, at most min(h, w).

    Returns:
        A view of `planes`, (C, size, size).
    """
    height, width = planes.shape[1:]
    top, left = round((height - size) / 2), round((width - size) / 2)
    return planes[:, top : top + size, left : left + size]


def _gray_to_channels(values: np.ndarray, image_format: ImageFormat) -> np.ndarray:
    planes = np.repeat(values[None], image_format.channels, axis=0)
    if image_format.channels == 4:
        planes[3] = image_format.max_value  # opaque
    return planes


def _is_gray(image: Image.Image) -> bool:
    # Pillow opens 16-bit gray with transparency as color.
    return image.mode in GRAY_MODES or any("LA;16" in str(arguments) for arguments in _decoder_arguments(image))


def _has_deep_colors(image: Image.Image) -> bool:
    """Return whether an opened image has 16 bits of which Pillow will keep 8."""
    if image.mode.startswith(("I", "F")):
        return False
    if image.format == "PPM":  # The last of them is the largest value of a pixel.
        return any(isinstance(each, tuple) and each[-1] > 255 for each in _decoder_arguments(image))
    return any(";16" in str(each) for each in _decoder_arguments(image))


def _decoder_arguments(image: Image.Image) -> list[Any]:
    """Return what Pillow will decode the parts of an opened file with; it names the layout of the file's pixels."""
    return [tile.args for tile in getattr(image, "tile", ())]


def _has_unnamed_bands(image: Image.Image) -> bool:
    """Return whether a TIFF file of color has further bands that it does not call transparency, such as infrared.

    ExtraSamples calls a band so by 1 or 2, and 0 leaves its meaning open (TIFF 6.0, Section 18); 999 is CorelDRAW's.
    """
    if image.format != "TIFF":
        return False
    tags: Any = image.tag_v2  # pyright: ignore[reportAttributeAccessIssue]
    is_rgb = tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 2
    extra_samples = tags.get(TiffImagePlugin.EXTRASAMPLES, ())
    return is_rgb and tags.get(TiffImagePlugin.SAMPLESPERPIXEL, 1) > 3 and not {1, 2, 999} & {*extra_samples}


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
    if _has_unnamed_bands(image):
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


def _resized(image: Image.Image, resolution: int) -> Image.Image:
    width, height = image.size
    short, long = min(width, height), max(width, height)
    if long > MAX_ASPECT_RATIO * short:
        raise ValueError(f"{width}x{height} pixels is too oblong: more than {MAX_ASPECT_RATIO} to 1")
    if short == resolution:
        return image
    size = (resolution * width // short, resolution * height // short)
    return image.resize(size, Image.Resampling.BILINEAR)
