"""The values of a model of arrays, kept beside its scheduler in a file that stock diffusers does not read.

    value range       [low, high]: the values of the data that become -1 and 1 in x_0
    units             the values of the data themselves, in their own type
    display channels  the channels that a picture shows: one in gray, or three as red, green and blue

A model of image files has no such file: its values are those of its pictures.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.runtime.files import naming_damage, read_mapping, write_atomically

if TYPE_CHECKING:
    from torch import Tensor

# In the folder of the scheduler, all of whose files diffusers downloads.
VALUES_FILE = Path("scheduler", "values.json")
DTYPES = ("uint8", "uint16", "int16", "float16", "float32")
# Between channels that stand side by side in a picture, in pixels.
GAP = 1


@dataclass(frozen=True)
class ValueRange:
    """The values that -1 and 1 stand for in a model of arrays.

    Args:
        low: The value that becomes -1; of integers a whole number.
        high: The value that becomes 1, above `low`.
        dtype: The type of the data, one of DTYPES.
        display_channels: The channels that pictures show, one or three, the first being 0. None: all of them, side by
            side in gray, or as colors if there are three.
    """

    low: float
    high: float
    dtype: str
    display_channels: tuple[int, ...] | None = None

    def __str__(self) -> str:
        return f"{self.dtype}, {self.low:g} to {self.high:g}"

    @property
    def is_integer(self) -> bool:
        """True if the data are integers."""
        return not self.dtype.startswith("float")

    @property
    def num_steps(self) -> int | None:
        """The number of steps from `low` to `high`, one less than that of values; None for floats."""
        return round(self.high - self.low) if self.is_integer else None

    def to_x_0(self, values: Tensor) -> Tensor:
        """Return x_0 = (values - low) * 2 / (high - low) - 1, float32, clipped to [-1, 1]."""
        return self.scaled(values).clamp(-1, 1)

    def scaled(self, values: Tensor) -> Tensor:
        """Return what `to_x_0` does, without clipping what lies outside of the range."""
        return (values.float() - self.low) * (2 / (self.high - self.low)) - 1

    def from_x_0(self, x_0: Tensor) -> Tensor:
        """Return low + (x_0 + 1) (high - low) / 2, float32: values in the units of the data, not in their type."""
        return self.low + (x_0.float() + 1) * ((self.high - self.low) / 2)

    def to_units(self, images: Tensor) -> np.ndarray:
        """Return images in the units and the type of the data: low + image * (high - low), integers rounded.

        Args:
            images: Of any shape, in [0, 1].

        Returns:
            As many values, in the order of `images`.
        """
        values = self.low + images.detach().cpu().numpy().astype(np.float64) * (self.high - self.low)
        if self.is_integer:
            values = np.clip(np.rint(values), self.low, self.high)
        return values.astype(self.dtype)

    def to_unit_interval(self, values: Tensor) -> Tensor:
        """Return values of the data as images, float32 in [0, 1]; what lies outside of the range is clipped."""
        return ((values.float() - self.low) / (self.high - self.low)).clamp(0, 1)


# What -1 and 1 stand for: 0 and a largest value in image files, or a range.
Scale: TypeAlias = int | ValueRange


def pictured(images: Tensor, values: ValueRange | None) -> Tensor:
    """Return what a picture shows of images.

    Args:
        images: (N, C, H, W), of any type.
        values: The values of a model of arrays; None for other models.

    Returns:
        (N, c, H, W') with c = 1 for gray, 3 for RGB or, of image files, 4 for RGBA: the display channels; without
        them all channels, side by side where they are neither one nor colors.
    """
    if values is not None and values.display_channels is not None:
        return images[:, list(values.display_channels)]
    if images.shape[1] in ((1, 3, 4) if values is None else (1, 3)):
        return images
    import torch  # `hf-ddpm info` reads values without it

    white = 255 if images.dtype == torch.uint8 else 1
    gap = images.new_full((len(images), 1, images.shape[2], GAP), white)
    parts = [part for channel in images.split(1, dim=1) for part in (channel, gap)]
    return torch.cat(parts[:-1], dim=3)


def require_seen(value_range: ValueRange, num_channels: int) -> None:
    """Check that a feature network, which takes gray or colors, can see arrays.

    Raises:
        UsageError: When they have other channels, and nobody has chosen which are shown.
    """
    if value_range.display_channels is None and num_channels not in (1, 3):
        raise UsageError(
            f"feature networks see 1 or 3 channels, got arrays of {num_channels}: give --display_channels when "
            "training, or measure the values themselves, by `hf-ddpm evaluate --metrics values`"
        )


def check_display_channels(display_channels: Any, num_channels: int) -> tuple[int, ...] | None:
    """Return the channels that pictures show as whole numbers, after checking them.

    Args:
        display_channels: The setting, numbers from 0 on; None if it is not given.
        num_channels: The channels of the data.

    Raises:
        UsageError: When they are neither one nor three, or the data have no such channel.
    """
    if display_channels is None:
        return None
    channels = tuple(int(channel) for channel in display_channels)
    is_whole = all(channel == given for channel, given in zip(channels, display_channels, strict=True))
    if len(channels) not in (1, 3) or not is_whole or not all(0 <= each < num_channels for each in channels):
        shown = " ".join(f"{channel:g}" for channel in display_channels)
        raise UsageError(
            f"display_channels must be one channel, or three for red, green and blue, each in [0, {num_channels}), "
            f"got {shown}: the first channel is 0"
        )
    return channels


def read_value_range(folder: Path) -> ValueRange | None:
    """Read the values that are kept in a pipeline's folder; None if there are none.

    Raises:
        UsageError: When the file is damaged.
    """
    path = folder / VALUES_FILE
    content = read_mapping(path, "remove it")
    if not content:
        return None
    with naming_damage(f"{path} cannot be read", "remove it"):
        return value_range_from(content)


def value_range_from(content: Mapping[str, Any]) -> ValueRange:
    """Return the value range that a file of a model describes.

    Args:
        content: The attributes of the range by their names, as `asdict` returns them.

    Raises:
        Exception: When they are none of a range; KeyError, TypeError or ValueError.
    """
    low, high, dtype = float(content["low"]), float(content["high"]), content["dtype"]
    if dtype not in DTYPES or not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"it must hold a rising range of {', '.join(DTYPES)}, got {content}")
    channels = content["display_channels"]
    return ValueRange(low, high, dtype, None if channels is None else tuple(map(int, channels)))


def write_value_range(folder: Path, values: ValueRange) -> None:
    """Keep the values in a pipeline's folder."""
    write_atomically(folder / VALUES_FILE, json.dumps(asdict(values), indent=2) + "\n")
