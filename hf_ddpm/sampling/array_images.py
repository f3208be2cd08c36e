"""The arrays that a command reads for a model of arrays, and the new ones that it writes; see data/given_files.py."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from hf_ddpm.condition import read_condition
from hf_ddpm.data.array_files import is_array_file, is_tiff, require_package
from hf_ddpm.data.arrays import count_outside, slices_of
from hf_ddpm.data.config import DataConfig
from hf_ddpm.data.decoding import name_of
from hf_ddpm.data.given_files import axes_config, read_values
from hf_ddpm.data.image_format import has_deep_colors
from hf_ddpm.hub.download import find_model
from hf_ddpm.names import ARRAY_FILE_FORMATS
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.runtime.files import network_folder, read_mapping
from hf_ddpm.runtime.settings import require_choice
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
        name = name_of(self.rows[i], i)
        return read_values(self.rows[i], name, self.configs[i], self.value_range, is_unknown)

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
        config = axes_config(path, channels)
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


def _holds_array(path: Path) -> bool:
    """Return whether a file is read as an array for a model of arrays: also a PNG file of 16-bit color."""
    if is_array_file(path) or is_tiff(path) or path.suffix.lower() != ".png":
        return is_array_file(path) or is_tiff(path)
    try:
        with Image.open(path) as image:
            return has_deep_colors(image)
    except (OSError, ValueError):  # what reads it as a picture will name it
        return False
