"""The arrays that a command reads for a model of arrays, and the new ones that it writes.

values   an image in the units and the type of the data, (C, H, W)
share    (values - low) / (high - low), in [0, 1]: what pipelines take; values beyond the range are clipped
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from hf_ddpm.condition import read_condition
from hf_ddpm.data.array_files import is_array_file, is_tiff, open_arrays, require_package
from hf_ddpm.data.arrays import count_outside, read_array, slices_of
from hf_ddpm.data.batches import as_tensor
from hf_ddpm.data.config import DataConfig
from hf_ddpm.data.decoding import name_of
from hf_ddpm.data.image_format import has_deep_colors
from hf_ddpm.hub.download import find_model
from hf_ddpm.image_inputs import masks_to_tensor
from hf_ddpm.names import ARRAY_FILE_FORMATS
from hf_ddpm.runtime.errors import UsageError, in_one_line
from hf_ddpm.runtime.files import network_folder, read_mapping
from hf_ddpm.runtime.settings import require_choice
from hf_ddpm.sampling.image_files import read_image
from hf_ddpm.sampling.set_files import file_content
from hf_ddpm.value_range import ValueRange, read_value_range


@dataclass(frozen=True, eq=False)
class GivenArrays:
    """The arrays in the files that a command was given.

    Args:
        value_range: The values of the model, or those of its conditions.
        names: What the new file of each is called, without its suffix.
        rows: Where each is, as `read_array` takes it.
        configs: Which axes of its file are images and channels, by the settings of the data.
    """

    value_range: ValueRange
    names: list[Path]
    rows: list[dict[str, Any]]
    configs: list[DataConfig]

    def read(self, i: int, is_unknown: np.ndarray | None = None) -> np.ndarray:
        """Read array i, (C, H, W).

        Args:
            i: Its number.
            is_unknown: What need not be finite, (1, H, W) bool; None: all must be.

        Raises:
            UsageError: When it cannot be read, is of another type, or has values that are not finite.
        """
        name, dtype = name_of(self.rows[i], i), self.value_range.dtype
        values = _read(self.rows[i], name, self.configs[i])
        if values.dtype != dtype:
            raise UsageError(f"image must be of the model's type, {dtype}, got {values.dtype} in {name}: convert it")
        is_bad = ~np.isfinite(values)
        if is_unknown is not None and is_unknown.shape[1:] == values.shape[1:]:
            is_bad &= ~is_unknown
        if is_bad.any():
            raise UsageError(
                f"image must hold finite values but for what a mask repaints with strength 1, got {is_bad.sum():,} "
                f"others in {name}: give --mask, or fill them in"
            )
        return values

    def shares(self, values: np.ndarray) -> Tensor:
        """Return values as shares of the range, float32 in [0, 1]; what is not finite becomes 0."""
        finite = np.where(np.isfinite(values), values, values.dtype.type(self.value_range.low))
        return self.value_range.to_unit_interval(as_tensor(finite))

    def describe_clipped(self, values: Sequence[np.ndarray]) -> None:
        """Say how many values lie outside of the range, and are clipped."""
        count, total = sum(count_outside(each, self.value_range) for each in values), sum(each.size for each in values)
        if count:
            low, high = self.value_range.low, self.value_range.high
            text = f"clipped: {count:,} values ({count / total:.2%}) lie outside of {low:g} to {high:g}"
            tqdm.write(text, file=sys.stderr)


def given_arrays(names: Sequence[Path], files: Sequence[Path], model: str) -> GivenArrays | None:
    """Return the arrays in files, for a model that takes arrays; None where the files are pictures.

    Args:
        names: The names of the files.
        files: The files.
        model: The model, a folder or a Hub id.

    Raises:
        UsageError: When the files are none for the model.
    """
    are_arrays = [_holds_array(file) for file in files]
    value_range, channels = _form_of(find_model(model)[0]) if any(are_arrays) else (None, 0)
    if value_range is None:
        return None
    if not all(are_arrays):
        name = files[are_arrays.index(False)].name
        raise UsageError(f"image must hold arrays or pictures, got both, as {name}: name a folder of one kind")
    new, rows, configs = [], [], []
    for name, path in zip(names, files, strict=True):
        config = _config_of(path, channels)
        of_file = slices_of(path, config)
        rows += of_file
        configs += [config] * len(of_file)
        new += [name if row["slice"] is None else name / f"{row['slice']:06d}" for row in of_file]
    return GivenArrays(value_range, new, rows, configs)


def format_of_new_files(value_range: ValueRange | None, format: str | None) -> str:
    """Return the format of new files, which is the end of their names.

    Args:
        value_range: The values of new arrays; None for pictures.
        format: The setting; None: .npy for arrays.

    Raises:
        UsageError: When the format is none for them, or its package is missing.
    """
    if value_range is None:
        if format not in (None, "png"):
            raise UsageError(f"format must be png for pictures, got {format!r}: leave it out")
        return "png"
    format = format or "npy"
    require_choice("format", format, ARRAY_FILE_FORMATS)
    require_package(Path(f"a file .{format}"))
    return format


def file_contents(values: np.ndarray, format: str) -> list[bytes]:
    """Return the content of a file of each array, (B, C, H, W), in one of ARRAY_FILE_FORMATS."""
    return [file_content(image, format) for image in values.transpose(0, 2, 3, 1)]


def _form_of(folder: Path) -> tuple[ValueRange | None, int]:
    """Return the values and the channels of the arrays that a model takes; 0 channels for those of a column.

    An array of the channels of the images, in the place of one of the column, would count as several.
    """
    condition = read_condition(folder)
    if condition is not None and condition.super_resolution is None:
        return condition.value_range, 0
    if condition is not None:
        return read_value_range(folder), condition.channels
    return read_value_range(folder), read_mapping(network_folder(folder) / "config.json").get("in_channels", 0)


def _config_of(path: Path, channels: int) -> DataConfig:
    """Return the settings of a file: the first of three axes counts images where the model has one channel."""
    with contextlib.suppress(Exception), open_arrays(path, []) as (array,):  # what is wrong is named when it is read
        shape = tuple(array.values.shape)
        if channels == 1 and len(shape) == 3 and shape[0] > 1 and not {*array.axes} & {*"SCZT"}:
            return DataConfig(stack_axis=0)
    return DataConfig()


def _holds_array(path: Path) -> bool:
    """Return whether a file is read as an array for a model of arrays: also a PNG file of 16-bit color."""
    if is_array_file(path) or is_tiff(path) or path.suffix.lower() != ".png":
        return is_array_file(path) or is_tiff(path)
    try:
        with Image.open(path) as image:
            return has_deep_colors(image)
    except (OSError, ValueError):  # what reads it as a picture will name it
        return False


def read_mask(path: Path, height: int, width: int) -> Tensor:
    """Return the mask in a file, (1, 1, H, W) bool: what is white in a picture, and not 0 in an array, is repainted.

    Raises:
        UsageError: When it cannot be read, or has another size.
    """
    if not is_array_file(path):
        return read_image(path, lambda picture: masks_to_tensor(picture, 1, height, width))
    values = _read({"bytes": None, "path": str(path), "slice": None}, path.name, DataConfig())
    if values.shape != (1, height, width) or not values.any():
        what = "zeros alone" if values.shape == (1, height, width) else f"the shape {values.shape}"
        raise UsageError(
            f"mask must be ({height}, {width}) as the model's images, and not 0 where it is to be repainted, got "
            f"{what} in {path.name}"
        )
    return torch.from_numpy(values != 0)[None]


def _read(row: dict[str, Any], name: str, config: DataConfig) -> np.ndarray:
    try:
        return read_array(row, name, config).values
    except UsageError:
        raise
    except Exception as error:  # readers raise nearly any class
        raise UsageError(f"{name} cannot be taken: {in_one_line(error, with_type=True)}: give another file") from error
