"""An encoded image -> an array (C, h, w): every mode that Pillow reads, and nothing lost by accident."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from PIL import Image, ImageOps

from hf_ddpm.data.config import DataConfig
from hf_ddpm.runtime.errors import UsageError

NUM_HEADERS = 64  # images whose headers decide what resolution=None and channels=None mean
GRAY_MODES = frozenset(("1", "L", "LA", "La", "I", "F", "I;16", "I;16L", "I;16B", "I;16N"))


@dataclass(frozen=True)
class ImageFormat:
    """What each image is brought to: `config` with what it leaves open decided."""

    config: DataConfig
    resolution: int
    channels: int
    max_value: int


class NeedsSixteenBits(Exception):
    """A 16-bit image came after the first headers had promised 8 bits."""


class NotFetchedError(Exception):
    """A disk or a network did not give a file that it may give later."""


def fetched(cell: Any) -> Any:
    """A cell of a column of images with the bytes of the file that it names: here, in an archive or on the Hub.

    Raises: FileNotFoundError if it is not there, and NotFetchedError for whatever else fails.
    """
    if cell is None or cell["bytes"] is not None or cell["path"] is None:
        return cell
    path: str = cell["path"]
    try:
        if "://" not in path:
            return {"bytes": Path(path).read_bytes(), "path": path}
        with fsspec.open(path, "rb") as file:  # zip://a.png::b.zip
            return {"bytes": file.read(), "path": path}  # pyright: ignore[reportAttributeAccessIssue]
    except FileNotFoundError:
        raise
    except Exception as error:  # file systems and clients have no common type
        raise NotFetchedError(f"{type(error).__name__}: {error}") from error


def open_image(cell: Any) -> Image.Image:
    cell = fetched(cell)
    if cell is None or cell["bytes"] is None:
        raise ValueError("the row is empty")
    return Image.open(io.BytesIO(cell["bytes"]))


def decode(cell: Any, name: str, form: ImageFormat) -> np.ndarray:
    """(C, h, w) in [0, max_value].

    Raises:
        UsageError: an image unlike the first ones, by which `form` was decided.
        NeedsSixteenBits: the same of its bits.
        Exception: nearly any, of Pillow's decoders for broken files.
    """
    with open_image(cell) as image:
        image.load()
        check_matches_format(image, name, form)
        return to_planes(image, form)


def is_transient(error: Exception) -> bool:
    """Whether it says nothing of the image."""
    return isinstance(error, NotFetchedError | MemoryError)


def name_of(cell: Any, row: int) -> str:
    return f"row {row}" if cell is None or cell["path"] is None else f"row {row} ({cell['path']})"


def unreadable(name: str, error: Exception) -> UsageError:
    reason = " ".join(str(error).split()) or type(error).__name__
    if type(error).__name__ == "UnidentifiedImageError":
        reason = "not an image that Pillow knows"
    if is_transient(error):
        return UsageError(f"every image must be readable, got {name}: {reason}; try again, or remove it")
    return UsageError(
        f"every image must be readable, got {name}: {reason}; "
        "repair or remove it, or leave out all such images with --on_bad_image skip"
    )


def infer_format(images: Iterable[tuple[str, Any]], config: DataConfig) -> ImageFormat:
    """What the headers of the first images decide.

    Args:
        images: the name of each, for messages, and its cell; at least one.
    """
    headers: list[tuple[str, tuple[int, int], str]] = []
    num_bad = 0
    for name, cell in images:
        try:
            with open_image(cell) as image:
                headers.append((name, image.size, image.mode))
        except Exception as error:
            if config.on_bad_image == "raise" or is_transient(error):
                raise unreadable(name, error) from error
            num_bad += 1
        if len(headers) == NUM_HEADERS:
            break
    if not headers:
        raise UsageError(f"on_bad_image='skip' must leave some images, got {num_bad} unreadable ones only")
    resolution = config.resolution
    if resolution is None:
        resolution = headers[0][1][0]
        odd = [f"{name} is {w}x{h}" for name, (w, h), _ in headers if (w, h) != (resolution, resolution)]
        if odd:
            raise UsageError(f"resolution must be given unless all are one square size: {odd[-1]}; --resolution")
    channels = config.channels or (1 if all(mode in GRAY_MODES for _, _, mode in headers) else 3)
    is_deep = config.preserve_input_precision and any(mode.startswith("I") for _, _, mode in headers)
    return ImageFormat(config, resolution, channels, 65535 if is_deep else 255)


def check_matches_format(image: Image.Image, name: str, form: ImageFormat) -> None:
    size, config = (form.resolution, form.resolution), form.config
    if config.resolution is None and image.size != size:
        got = f"{image.width}x{image.height}, others {form.resolution}x{form.resolution}"
        raise UsageError(f"resolution must be given unless all are one square size: {name} is {got}; --resolution")
    if config.channels is None and form.channels == 1 and image.mode not in GRAY_MODES:
        raise UsageError(
            f"channels must be given: the first images are gray, {name} has colors; --channels 3, or 1 for luma"
        )


def to_planes(image: Image.Image, form: ImageFormat) -> np.ndarray:
    """(C, h, w) in [0, max_value]."""
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "F":
        raise ValueError("pixels are 32-bit floats, whose range is unknown")
    is_deep = image.mode.startswith("I")
    image = _deep_to_float(image) if is_deep else _to_mode(image, form.channels)
    if is_deep and form.config.preserve_input_precision and form.max_value == 255:
        raise NeedsSixteenBits
    values = np.asarray(_fit(image, form))
    if is_deep:
        values = np.clip(np.rint(values if form.max_value == 65535 else values * 255 / 65535), 0, form.max_value)
    elif form.max_value == 65535:
        values = values.astype(np.uint16) * 257
    if values.ndim == 3:
        return values.transpose(2, 0, 1)
    planes = np.repeat(values[None], form.channels, axis=0)
    if form.channels == 4:
        planes[3] = form.max_value
    return planes


def _deep_to_float(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.float64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"pixels are 32-bit integers in [{values.min():.0f}, {values.max():.0f}], not in [0, 65535]")
    if "transparency" in image.info:
        values[values == image.info["transparency"]] = 65535
    return Image.fromarray(values.astype(np.float32))


def _to_mode(image: Image.Image, channels: int) -> Image.Image:
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if channels != 4:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    elif image.mode not in GRAY_MODES:
        image = image.convert("RGB")
    mode = {1: "L", 3: "RGB", 4: "RGBA"}[channels]
    return image if image.mode == mode else image.convert(mode)


def _fit(image: Image.Image, form: ImageFormat) -> Image.Image:
    size, (width, height) = form.resolution, image.size
    short, long = min(width, height), max(width, height)
    if long > 100 * short:
        raise ValueError(f"{width}x{height} pixels is too oblong: more than 100 to 1")
    if short != size:
        width, height = size * width // short, size * height // short
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    if form.config.center_crop and width != height:
        left, top = round((width - size) / 2), round((height - size) / 2)
        image = image.crop((left, top, left + size, top + size))
    return image
