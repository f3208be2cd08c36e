"""The pictures, arrays and masks in files that a user gives to a model.

values   an image in the units and the type of the data, (C, H, W)
share    (values - low) / (high - low), in [0, 1]: what pipelines take; values beyond the range are clipped
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from hf_ddpm.data.array_files import is_array_file, open_arrays
from hf_ddpm.data.arrays import one_image, read_array
from hf_ddpm.data.config import DataConfig
from hf_ddpm.data.decoding import open_image
from hf_ddpm.image_inputs import masks_to_tensor
from hf_ddpm.runtime.errors import UsageError, in_one_line
from hf_ddpm.runtime.files import naming_damage
from hf_ddpm.value_range import ValueRange


def read_image(path: Path, convert: Callable[[Image.Image], Tensor]) -> Tensor:
    """Return what a function makes of the image in a file.

    Raises:
        UsageError: When the file cannot be read, or the function refuses the image; the message names the file.
    """
    with naming_damage(f"{path} cannot be taken", "change the file, or give another one"):
        try:
            with open_image({"bytes": None, "path": str(path)}) as opened:
                picture: Image.Image = ImageOps.exif_transpose(opened)
                picture.load()
        except (SyntaxError, EOFError, Image.DecompressionBombError) as error:  # that Pillow raises, too
            raise ValueError(str(error)) from error
        return convert(picture)


def read_mask(path: Path, height: int, width: int) -> Tensor:
    """Return the mask in a file, (1, 1, H, W) bool: what is white in a picture, and not 0 in an array, is repainted.

    Raises:
        UsageError: When it cannot be read, or has another size.
    """
    if not is_array_file(path):
        return read_image(path, lambda picture: masks_to_tensor(picture, 1, height, width))
    values = _read(one_image(path), path.name, DataConfig())
    if values.shape != (1, height, width) or not values.any():
        what = "zeros alone" if values.shape == (1, height, width) else f"the shape {values.shape}"
        raise UsageError(
            f"mask must be ({height}, {width}) as the model's images, and not 0 where it is to be repainted, got "
            f"{what} in {path.name}"
        )
    return torch.from_numpy(values != 0)[None]


def axes_config(path: Path, channels: int) -> DataConfig:
    """Return the settings of a file: the first of three axes counts images where the model has one channel."""
    with contextlib.suppress(Exception), open_arrays(path, []) as (array,):  # what is wrong is named when it is read
        shape = tuple(array.values.shape)
        if channels == 1 and len(shape) == 3 and shape[0] > 1 and not {*array.axes} & {*"SCZT"}:
            return DataConfig(stack_axis=0)
    return DataConfig()


def read_values(
    encoded: Any, name: str, config: DataConfig, value_range: ValueRange, is_unknown: np.ndarray | None = None
) -> np.ndarray:
    """Read an array for a model of arrays, (C, H, W).

    Args:
        encoded: Where it is, as `read_array` takes it.
        name: What error messages call it.
        config: Which axes of its file are images and channels, by the settings of the data.
        value_range: The values of the model.
        is_unknown: What need not be finite, (1, H, W) bool; None: all must be.

    Raises:
        UsageError: When it cannot be read, is of another type, or has values that are not finite.
    """
    values = _read(encoded, name, config)
    if values.dtype != value_range.dtype:
        raise UsageError(
            f"image must be of the model's type, {value_range.dtype}, got {values.dtype} in {name}: convert it"
        )
    is_bad = ~np.isfinite(values)
    if is_unknown is not None and is_unknown.shape[1:] == values.shape[1:]:
        is_bad &= ~is_unknown
    if is_bad.any():
        raise UsageError(
            f"image must hold finite values but for what a mask repaints with strength 1, got {is_bad.sum():,} others "
            f"in {name}: give a mask for them, or fill them in"
        )
    return values


def require_shape(values: np.ndarray, shape: tuple[int, int, int], name: str) -> None:
    """Check that an array has the shape of a model's images, (C, H, W).

    Raises:
        UsageError: When it has another one.
    """
    if values.shape != shape:
        raise UsageError(f"image must have the model's shape, {shape}, got {values.shape} in {name}: cut it so")


def shares_of(values: np.ndarray, value_range: ValueRange) -> Tensor:
    """Return values as shares of a range, float32 in [0, 1]; what is not finite becomes 0."""
    finite = np.where(np.isfinite(values), values, values.dtype.type(value_range.low))
    return value_range.to_unit_interval(torch.from_numpy(finite.astype(np.float32)))


def with_known_values(shares: Tensor, values: np.ndarray, masks: Tensor | None, value_range: ValueRange) -> np.ndarray:
    """Return edited images in the units and the type of the data; what was kept is what was given, to the last bit.

    Args:
        shares: The edited images, (B, C, H, W) in [0, 1].
        values: What was given, (B, C, H, W).
        masks: What was repainted, (B, 1, H, W) bool; None: all of it.
        value_range: The values of the model.
    """
    units = value_range.to_units(shares)
    return units if masks is None else np.where(masks.numpy(), units, values)


def _read(encoded: Any, name: str, config: DataConfig) -> np.ndarray:
    try:
        return read_array(encoded, name, config).values
    except UsageError:
        raise
    except Exception as error:  # readers raise nearly any class
        raise UsageError(f"{name} cannot be taken: {in_one_line(error, with_type=True)}: give another file") from error
