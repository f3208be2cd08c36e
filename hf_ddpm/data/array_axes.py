"""The axes of arrays: which are the images of a stack, and which the channels.

Two axes of an array are the height and the width, in this order. `channel_axis` and `stack_axis` name the others; so
do TIFF and NIfTI files.
"""

from __future__ import annotations

from typing import NamedTuple

from hf_ddpm.data.array_files import FileArray
from hf_ddpm.data.config import DataConfig
from hf_ddpm.runtime.errors import UsageError


class Axes(NamedTuple):
    """The axes of an array that are neither height nor width, each at least 0; None for one that it does not have."""

    stack: int | None
    channel: int | None


def axes_of(array: FileArray, name: str, config: DataConfig) -> Axes:
    """Return which axes of an array are its images and its channels.

    Raises:
        UsageError: When settings, the file and the number of axes do not tell them.
    """
    shape = tuple(array.values.shape)
    rank = len(shape)
    stack, channel = (
        _axis(axis, value, shape, name)
        for axis, value in (("stack_axis", config.stack_axis), ("channel_axis", config.channel_axis))
    )
    if channel is None:
        channel = _named_axis(array.axes, "SC", stack)
    if stack is None:
        stack = _named_axis(array.axes, "ZT", channel)
    open_axes = [axis for axis in range(rank) if axis not in (stack, channel)]
    # Of three axes the first one is the channels; of four it is the images.
    names = array.axes or "?" * rank  # of named axes none is taken for another
    if len(open_axes) == 4 and stack is channel is None and not array.axes:
        stack, channel, *open_axes = open_axes
    is_other = len(open_axes) == 3 and names[open_axes[0]] not in "XYZT"
    if is_other and channel is None:
        channel, *open_axes = open_axes
    elif is_other and stack is None:
        stack, *open_axes = open_axes
    if len(open_axes) != 2 or 0 in shape:
        raise UsageError(
            f"an array must be (H, W), (C, H, W) or (N, C, H, W), got {shape} in {name}: --channel_axis and "
            "--stack_axis say what its other axes are"
        )
    return Axes(stack, channel)


def _axis(setting: str, value: int | None, shape: tuple[int, ...], name: str) -> int | None:
    if value is None:
        return None
    if not -len(shape) <= value < len(shape):
        raise UsageError(f"{setting} must be an axis of each array, got {value} for {shape} in {name}")
    return value % len(shape)


def _named_axis(axes: str, letters: str, taken: int | None) -> int | None:
    """Return the axis that a file calls by one of some letters; None if there is none, or several."""
    named = [axis for axis, letter in enumerate(axes) if letter in letters and axis != taken]
    return named[0] if len(named) == 1 else None
