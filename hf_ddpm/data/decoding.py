"""Decoding of one image: from the bytes of a file to an array of planes.

encoded image   what a row of a data set holds: {"bytes": ..., "path": ...}, either of which may be None
header          the beginning of an image file, which tells its size and mode without decoding its pixels

image_format.py says what format it gets, and planes.py how the array is made.
"""

from __future__ import annotations

import contextlib
import errno
import io
import threading
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from hf_ddpm.data.array_files import ARRAY_FILES, TIFF
from hf_ddpm.data.arrays import array_format, decode_array, is_array, require_no_array_settings
from hf_ddpm.data.config import DataConfig, remedy_of_skipping
from hf_ddpm.data.image_folder import readable_formats
from hf_ddpm.data.image_format import (
    ImageFormat,
    check_keeps_precision,
    check_matches_format,
    has_deep_colors,
    is_gray,
    losses_of,
    size_of,
    unequal_sizes_error,
    upright_size,
    without_opaque,
)
from hf_ddpm.data.planes import TooSmallError, to_planes
from hf_ddpm.image_size import Size
from hf_ddpm.runtime.errors import UsageError, in_one_line

NUM_HEADERS = 64  # The first so many headers decide what resolution=None and channels=None mean.
_LIMIT = threading.Lock()  # Pillow's limit is one for the process.


class Decoded(NamedTuple):
    """A decoded image.

    Args:
        planes: (C, h, w) in [0, max_value], of the format's type; arrays have their own values.
        losses: What the file holds and the planes do not, see `losses_of`.
    """

    planes: np.ndarray
    losses: list[str]


class NotFetchedError(Exception):
    """The failure of a disk or a network to give a file that it may give later."""


class _Header(NamedTuple):
    name: str
    size: Size
    mode: str
    is_gray: bool


def with_bytes(encoded: Any) -> Any:
    """Return an encoded image with the bytes of the file that its path names, on a disk, in an archive or on the Hub.

    Raises:
        FileNotFoundError: When there is no such file.
        NotFetchedError: When reading the file fails for any other reason.
    """
    if encoded is None or is_array(encoded) or encoded["bytes"] is not None or encoded["path"] is None:
        return encoded
    path: str = encoded["path"]
    try:
        if "://" not in path:
            return {"bytes": Path(path).read_bytes(), "path": path}
        import fsspec  # which the demo page does without

        with fsspec.open(path, "rb") as file:  # A path in an archive reads zip://a.png::b.zip.
            return {"bytes": file.read(), "path": path}  # pyright: ignore[reportAttributeAccessIssue]
    except FileNotFoundError:
        raise
    except Exception as error:  # File systems and clients share no base class of errors.
        if isinstance(error, OSError) and error.errno == errno.ELOOP:  # a link to itself leads to no file
            raise FileNotFoundError(*error.args) from error
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
    if image_format.array_dtype is not None:
        return Decoded(*decode_array(with_bytes(encoded), name, image_format))
    with open_image(encoded, image_format.config.max_image_pixels) as image:
        # Loading forgets how many bits and bands there were.
        losses = losses_of(image, image_format)
        check_keeps_precision(image, name, image_format.config)
        check_matches_format(image, name, image_format)
        image.load()
        return Decoded(to_planes(image, image_format, name), without_opaque(losses, image))


def is_transient(error: Exception) -> bool:
    """Return whether an error tells nothing about the image itself, so that a later try may succeed."""
    return isinstance(error, NotFetchedError | MemoryError)


def name_of(encoded: Any, row: int) -> str:
    """Return what error messages call an image: its row, and its path if it has one."""
    path = encoded["path"] if isinstance(encoded, dict) else None
    if path is None:
        return f"row {row}"
    path = "".join(c if c.isprintable() else repr(c)[1:-1] for c in path)  # a name may hold a line break
    number = encoded.get("slice")
    return f"row {row} ({path})" if number is None else f"row {row} ({path}, image {number})"


def unreadable_image_error(name: str, error: Exception, config: DataConfig) -> UsageError:
    """Return the error that names an unreadable image, the reason and the remedy."""
    skipping = remedy_of_skipping(config)
    reason = in_one_line(error)
    if isinstance(error, TooSmallError):
        return UsageError(
            f"every image must be as large as the crops of random_crop, got {name}: {reason}; give a smaller "
            f"--resolution{skipping}"
        )
    if type(error).__name__ == "UnidentifiedImageError":
        reason = "not an image that Pillow knows"
        if name.lower().rstrip(")").endswith(ARRAY_FILES):
            reason += "; the files of a column must all be pictures, or all arrays"
        if name.lower().rstrip(")").endswith(TIFF):
            reason += "; bands or floats are read as an array in a folder of such TIFF files alone, with --channels"
    if isinstance(error, Image.DecompressionBombError):
        return UsageError(
            f"every image must be within the limit of pixels, got {name}: {reason}; if it is no attack on the memory, "
            f"give --max_image_pixels{skipping}"
        )
    if is_transient(error):
        return UsageError(f"every image must be readable, got {name}: {reason}; try again, or remove it")
    return UsageError(f"every image must be readable, got {name}: {reason}; repair or remove it{skipping}")


def infer_format(images: Iterable[tuple[str, Any]], config: DataConfig) -> ImageFormat:
    """Decide what the settings leave open by the headers of the first images.

    Args:
        images: The name of each image, for messages, and its encoded form; at least one.
        config: The settings of the data.

    Raises:
        UsageError: When an image is unreadable and `on_bad_image` is "raise", when none is readable, or when
            `resolution` is left open and the images are not all of one size, or are to be cropped at random.
    """
    images = iter(images)
    first = next(images, None)
    if first is not None and is_read_as_array(first[1], config):
        return _format_of_arrays(chain([first], images), config)
    require_no_array_settings(config, is_alone=config.condition_column is None)
    return _format_of_headers(_read_headers(chain([first] if first is not None else [], images), config), config)


def is_read_as_array(encoded: Any, config: DataConfig) -> bool:
    """Return whether an encoded image is an array, or color that is to keep 16 bits, which is read as one."""
    if is_array(encoded) or not config.preserve_input_precision:
        return is_array(encoded)
    with contextlib.suppress(Exception), open_image(encoded, config.max_image_pixels) as image:  # it is read again
        return image.format in ("PNG", "TIFF") and has_deep_colors(image)
    return False


def _format_of_arrays(arrays: Iterable[tuple[str, Any]], config: DataConfig) -> ImageFormat:
    """Decide what the settings leave open by the first array that can be read."""
    for name, encoded in arrays:
        try:
            return array_format(with_bytes(encoded), name, config)
        except UsageError:
            raise
        except Exception as error:  # readers raise nearly any class
            if config.on_bad_image == "raise" or is_transient(error):
                raise unreadable_image_error(name, error, config) from error
    raise UsageError("on_bad_image='skip' must leave some images, got unreadable ones only: repair or replace them")


def format_of(image: Image.Image, name: str, config: DataConfig) -> ImageFormat:
    """Decide what the settings leave open by one image; see `infer_format`."""
    return _format_of_headers([_Header(name, upright_size(image), image.mode, is_gray(image))], config)


def _format_of_headers(headers: list[_Header], config: DataConfig) -> ImageFormat:
    size = size_of(config, headers[0].size)
    unequal = [header for header in headers if config.resolution is None and header.size != size]
    if unequal:
        raise unequal_sizes_error(unequal[-1].name, unequal[-1].size, size)
    is_gray = all(header.is_gray for header in headers)
    file_max = 65535 if any(header.mode.startswith("I") for header in headers) else 255
    max_value = 255 if config.preserve_input_precision is False else file_max
    return ImageFormat(config, size, config.channels or (1 if is_gray else 3), max_value, file_max)


def _read_headers(images: Iterable[tuple[str, Any]], config: DataConfig) -> list[_Header]:
    headers: list[_Header] = []
    num_unreadable = 0
    for name, encoded in images:
        try:
            with open_image(encoded, config.max_image_pixels) as image:
                check_keeps_precision(image, name, config)
                headers.append(_Header(name, upright_size(image), image.mode, is_gray(image)))
        except UsageError:
            raise
        except Exception as error:
            if config.on_bad_image == "raise" or is_transient(error):
                raise unreadable_image_error(name, error, config) from error
            num_unreadable += 1
        if len(headers) == NUM_HEADERS:
            break
    if not headers:
        raise UsageError(
            f"on_bad_image='skip' must leave some images, got {num_unreadable} unreadable ones only: "
            "repair or replace them"
        )
    return headers
