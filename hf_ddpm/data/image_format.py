"""The format that all images of a data set are brought to, and what an opened image has of it.

mode            Pillow's name of what a pixel is: "L" is 8-bit gray, "I;16" 16-bit gray, "RGB" color, ...
image format    the size, the channels and the largest value that all images of a data set are brought to
array           what is not a picture: a file or a cell of any number of channels, see arrays.py
loss            what a file holds and its planes do not: bits, bands or frames
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import ExifTags, Image, TiffImagePlugin

from hf_ddpm.data.config import DataConfig
from hf_ddpm.image_size import Size, format_size, to_size
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.value_range import Scale, ValueRange

LOWER_BITS = "the lower 8 of 16 bits of color or transparency, which Pillow drops"
TRANSPARENCY = "transparency, which becomes white"
GRAY_MODES = frozenset(("1", "L", "LA", "La", "I", "F", "I;16", "I;16L", "I;16B", "I;16N"))


@dataclass(frozen=True)
class ImageFormat:
    """The format that every image is converted to: the settings of the data, with those that were left open decided.

    Args:
        config: The settings as the user gave them.
        size: Height and width of x_0, which an image covers after it was resized, or is cut from with `random_crop`.
        channels: 1, 3 or 4; of arrays any number.
        max_value: 255, or 65535 for 16-bit images.
        file_max: The same of the files, of which `max_value` may be a reduction.
        array_dtype: The type of arrays, one of `value_range.DTYPES`; None for images.
    """

    config: DataConfig
    size: Size
    channels: int
    max_value: int
    file_max: int = 255
    array_dtype: str | None = None

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of the planes: uint8, uint16 for 16-bit images, or that of arrays."""
        return np.dtype(self.array_dtype or ("uint8" if self.max_value == 255 else "uint16"))


class InFormat:
    """The properties of images that were brought to one format, and whose classes have names or do not exist."""

    image_format: ImageFormat
    class_names: list[str] | None
    value_range: ValueRange | None

    @property
    def scale(self) -> Scale:
        """The largest value of a pixel, or the range of values, that -1 and 1 stand for."""
        return self.value_range or self.max_value

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
    def size(self) -> Size:
        """Height and width of x_0; images may be larger, and are cropped."""
        return self.image_format.size

    @property
    def num_classes(self) -> int | None:
        """The number of classes; None without labels."""
        return None if self.class_names is None else len(self.class_names)


def losses_of(image: Image.Image, image_format: ImageFormat) -> list[str]:
    """Return in words what an opened image holds and its planes will not, without what the settings give up."""
    losses = []
    # The further pictures of these two formats are previews, depth or layers of the first one.
    if getattr(image, "is_animated", False) and image.format not in ("MPO", "PSD"):
        losses.append("frames after the first of an animation or a stack")
    if has_deep_colors(image) and image_format.config.preserve_input_precision is not False:
        losses.append(LOWER_BITS)
    if has_unnamed_bands(image) and image_format.channels != 4:
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
    if config.preserve_input_precision and has_deep_colors(image):
        raise UsageError(
            f"preserve_input_precision can keep 16 bits of color only where all images are PNG or TIFF files of it, "
            f"got 16-bit {image.mode} in {name} beside others: leave it out"
        )


def check_matches_format(image: Image.Image, name: str, image_format: ImageFormat) -> None:
    """Check that an image has the size and the colors that the first images promised.

    Raises:
        UsageError: When `resolution` was left open and the size differs, `channels` was and a color image follows
            gray ones, or `value_range` was given for 16-bit images and this one has 8 bits.
    """
    config = image_format.config
    if config.resolution is None and upright_size(image) != image_format.size:
        raise unequal_sizes_error(name, upright_size(image), image_format.size)
    if config.value_range and image_format.file_max == 65535 and not image.mode.startswith("I"):
        raise UsageError(
            f"value_range must be that of all images: other images have 16 bits, {name} has 8; convert it to 16 bits"
        )
    if config.channels is None and image_format.channels == 1 and not is_gray(image):
        raise UsageError(
            f"channels must be given: the first images are gray, {name} has colors; --channels 3, or 1 for luma"
        )


def upright_size(image: Image.Image) -> Size:
    """Return height and width of an opened image after its EXIF orientation was applied, without loading its pixels.

    A PNG file whose EXIF stands behind its pixels counts as upright.
    """
    if image.width == image.height or (image.format == "PNG" and "exif" not in image.info):
        return image.height, image.width
    try:
        is_turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    except Exception:  # Damaged text beside pixels that are whole; Pillow raises nearly any class.
        is_turned = False
    return (image.width, image.height) if is_turned else (image.height, image.width)


def size_of(config: DataConfig, first: Size) -> Size:
    """Return the size of x_0 by the settings, or else by the first image.

    Raises:
        UsageError: When crops at random have no size, or are to be crops of the center, too.
    """
    if config.resolution is None and config.random_crop:
        raise UsageError("resolution must be given with random_crop, as the size of the crops: give --resolution")
    if config.random_crop and config.center_crop:
        raise UsageError("random_crop and center_crop must not be given together: leave out one of them")
    return first if config.resolution is None else to_size(config.resolution)


def unequal_sizes_error(name: str, size: Size, other: Size) -> UsageError:
    """Return the error that names an image of another size than the first one."""
    return UsageError(
        f"resolution must be given unless all images are of one size: {name} is {format_size(size)}, others are "
        f"{format_size(other)}; give --resolution"
    )


def is_gray(image: Image.Image) -> bool:
    """Return whether an opened image has no colors."""
    # Pillow opens 16-bit gray with transparency as color.
    return image.mode in GRAY_MODES or any("LA;16" in str(arguments) for arguments in _decoder_arguments(image))


def has_deep_colors(image: Image.Image) -> bool:
    """Return whether an opened image has 16 bits of which Pillow will keep 8."""
    if image.mode.startswith(("I", "F")):
        return False
    if image.format == "PPM":  # The last of them is the largest value of a pixel.
        return any(isinstance(each, tuple) and each[-1] > 255 for each in _decoder_arguments(image))
    return any(";16" in str(each) for each in _decoder_arguments(image))


def _decoder_arguments(image: Image.Image) -> list[Any]:
    """Return what Pillow will decode the parts of an opened file with; it names the layout of the file's pixels."""
    return [tile.args for tile in getattr(image, "tile", ())]


def has_unnamed_bands(image: Image.Image) -> bool:
    """Return whether a TIFF file of color has further bands that it does not call transparency, such as infrared.

    ExtraSamples calls a band so by 1 or 2, and 0 leaves its meaning open (TIFF 6.0, Section 18); 999 is CorelDRAW's.
    """
    if image.format != "TIFF":
        return False
    tags: Any = image.tag_v2  # pyright: ignore[reportAttributeAccessIssue]
    is_rgb = tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 2
    extra_samples = tags.get(TiffImagePlugin.EXTRASAMPLES, ())
    return is_rgb and tags.get(TiffImagePlugin.SAMPLESPERPIXEL, 1) > 3 and not {1, 2, 999} & {*extra_samples}
