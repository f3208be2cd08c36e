"""Arrays as images: of any number of channels, in the type and the units of the data.

array     what a file or a cell of a table holds: (H, W), or with channels (C, H, W), or with images (N, C, H, W)
planes    an image, (C, h, w) in the type of the data, which covers the size of x_0
cell      an array in a table of `datasets`, as nested lists or as an array
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from hf_ddpm.data.array_axes import axes_of
from hf_ddpm.data.array_files import FileArray, are_pictures, array_of_picture, is_png, is_tiff, open_arrays
from hf_ddpm.data.config import DataConfig, remedy_of_skipping
from hf_ddpm.data.image_folder import folder_classes, list_images
from hf_ddpm.data.image_format import ImageFormat, size_of, unequal_sizes_error
from hf_ddpm.data.planes import center_crop, resized
from hf_ddpm.runtime.errors import UsageError, in_one_line
from hf_ddpm.value_range import DTYPES, ValueRange, check_display_channels

if TYPE_CHECKING:
    from datasets import Dataset

# Settings that say something of arrays alone: of images and of the conditions beside them, or of images.
SETTINGS_OF_BOTH = ("value_quantiles", "channel_axis", "stack_axis", "array_key")
ARRAY_SETTINGS = (*SETTINGS_OF_BOTH, "display_channels")
# An image of a file of arrays, in a column of `datasets`.
SLICE_TYPES = {"bytes": "binary", "path": "string", "slice": "int64"}
MAX_QUANTILE_VALUES = 2**26
FLOAT64 = "the lower 29 of 53 bits of float64"
# Types -> the type that holds all of their values, or nearly all.
_KEPT_AS = {"bool": "uint8", "int8": "int16", "float64": "float32"}


class ArrayImage(NamedTuple):
    """An array with its axes in order.

    Args:
        values: (C, H, W), of one of DTYPES.
        losses: What the file holds and the values do not.
    """

    values: np.ndarray
    losses: list[str]


def has_array_settings(config: DataConfig) -> bool:
    """Return whether a setting says that the data are arrays."""
    return any(getattr(config, name) is not None for name in ARRAY_SETTINGS)


def check_array_settings(config: DataConfig) -> None:
    """Check the settings of arrays by themselves.

    Raises:
        UsageError: When one cannot work.
    """
    low, high = config.value_quantiles or (0, 1)
    if not 0 <= low < high <= 1:
        raise UsageError(f"value_quantiles must be two rising numbers in [0, 1], got {low:g} {high:g}")
    if config.channel_axis is not None and config.channel_axis == config.stack_axis:
        raise UsageError(f"channel_axis and stack_axis must be different axes, got {config.channel_axis} for both")
    if config.array_key is not None and not all(_keys(config)):
        raise UsageError(f"array_key must name arrays with commas between them, got {config.array_key!r}")


def require_no_array_settings(config: DataConfig, is_alone: bool = True) -> None:
    """Check that no setting asks for arrays, where there are images.

    Args:
        config: The settings of the data.
        is_alone: Whether no other column is read, which might hold arrays.

    Raises:
        UsageError: When one does.
    """
    for name in ARRAY_SETTINGS:
        if not is_alone and name in SETTINGS_OF_BOTH:
            continue
        if (value := getattr(config, name)) is not None:
            raise UsageError(
                f"{name} = {value} has no effect: it is for arrays, and the data are images; leave it out"
            )
    if config.channels not in (None, 1, 3, 4):
        raise UsageError(f"channels must be 1, 3 or 4 of images, got {config.channels}: arrays have any number")


def is_array(encoded: Any) -> bool:
    """Return whether an encoded row is an array: a cell, or a slice of a file."""
    return encoded is not None and (not isinstance(encoded, dict) or "slice" in encoded)


def open_array_files(paths: Sequence[Path], config: DataConfig) -> Dataset:
    """Open files of arrays as a data set with a column `image`, and `label` if their folders are classes.

    The header of each file is read where files hold several images.

    Raises:
        UsageError: When a file cannot be opened, or the axes of its arrays cannot be told.
    """
    import datasets

    classes = folder_classes(paths)
    rows: list[dict[str, Any]] = []
    labels: list[str] = []
    holds_one = False
    for i, path in enumerate(paths):
        # If the first file is one image, all are: one that is not will be named when it is read.
        of_file = [one_image(path)] if holds_one else slices_of(path, config)
        holds_one = of_file == [one_image(path)]
        rows += of_file
        labels += [] if classes is None else [classes[i]] * len(of_file)
    features: dict[str, Any] = {"image": slice_feature()}
    columns: dict[str, Any] = {"image": rows}
    if classes is not None:
        columns["label"], features["label"] = labels, datasets.ClassLabel(names=sorted(set(labels)))
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def slice_feature() -> dict[str, Any]:
    """Return the type of a column of slices of files, as `datasets` describes it."""
    import datasets

    return {name: datasets.Value(dtype) for name, dtype in SLICE_TYPES.items()}


def slices_of(path: Path, config: DataConfig) -> list[dict[str, Any]]:
    """Return the encoded images of a file.

    Raises:
        UsageError: When it cannot be opened, or the axes of its arrays cannot be told.
    """
    count = _num_slices(path, config)
    return [_slice(path, k) for k in range(count)] if count else [one_image(path)]


def one_image(path: Path) -> dict[str, Any]:
    """Return the encoded image of a file that holds one."""
    return _slice(path, None)


def _slice(path: Path, number: int | None) -> dict[str, Any]:
    return {"bytes": None, "path": str(path.absolute()), "slice": number}


def _num_slices(path: Path, config: DataConfig) -> int | None:
    """Return how many images a file holds along its stack axis; None if it is one image, 0 if it is unreadable.

    Raises:
        UsageError: When it cannot be opened, or the axes of its arrays cannot be told.
    """
    try:
        with open_arrays(path, _keys(config)) as arrays:
            stack = axes_of(arrays[0], path.name, config).stack
            return None if stack is None else int(arrays[0].values.shape[stack])
    except UsageError:
        raise
    except Exception as error:  # readers raise nearly any class
        if config.on_bad_image == "skip":
            return 0
        raise UsageError(
            f"each file must be readable, got {path.name}: {in_one_line(error, with_type=True)}; repair or remove it"
            f"{remedy_of_skipping(config)}"
        ) from error


def read_array(encoded: Any, name: str, config: DataConfig) -> ArrayImage:
    """Read one image of a file of arrays, or of a cell.

    Args:
        encoded: What a row holds, see `is_array`; or a picture of 16-bit color with its bytes.
        name: What error messages call it.
        config: The settings of the data.

    Raises:
        UsageError: When its axes cannot be told, or its type is none of DTYPES.
        Exception: When it is missing, or its file is damaged; readers raise nearly any class.
    """
    if encoded is None:
        raise ValueError("the row is empty")
    if isinstance(encoded, dict) and "slice" not in encoded:  # a picture of 16-bit color
        if encoded["bytes"] is None:
            raise ValueError("the row is empty")
        parts = [_image_of(array_of_picture(encoded["bytes"], name), None, name, config)]
    elif isinstance(encoded, dict):
        path = Path(encoded["path"])
        with open_arrays(path, _keys(config)) as arrays:
            parts = [_image_of(array, encoded["slice"], name, config) for array in arrays]
    else:
        if config.array_key is not None:
            raise UsageError(
                f"array_key takes effect only for .npz and .h5 files, got {config.array_key!r} for cells of a table: "
                "leave it out; --image_column names the column"
            )
        parts = [_image_of(FileArray(np.asarray(encoded)), None, name, config)]
    if len({part.dtype for part in parts}) > 1 or len({part.shape[1:] for part in parts}) > 1:
        shapes = ", ".join(f"{part.dtype} {part.shape}" for part in parts)
        raise UsageError(f"array_key must name arrays of one type and size, got {shapes} in {name}")
    return _in_known_type(np.concatenate(parts) if len(parts) > 1 else parts[0], name)


def array_format(encoded: Any, name: str, config: DataConfig) -> ImageFormat:
    """Decide what the settings leave open by one array; see `infer_format` of decoding.py.

    Raises:
        UsageError: When the settings ask for something else, or its axes cannot be told.
        Exception: When it cannot be read.
    """
    check_array_settings(config)
    values, _ = read_array(encoded, name, config)
    channels, height, width = values.shape
    if config.channels not in (None, channels):
        raise UsageError(
            f"channels must be those of the arrays, {channels} in {name}, got {config.channels} by --channels or by "
            "the model of --init_from: leave that out, or choose the channels by --channel_axis, --array_key"
        )
    size = size_of(config, (height, width))
    check_display_channels(config.display_channels, channels)
    if config.value_range is not None:
        require_range_of_type(config.value_range, values.dtype, name)
    largest = _largest(values.dtype)
    return ImageFormat(config, size, channels, largest, largest, str(values.dtype))


def decode_array(encoded: Any, name: str, image_format: ImageFormat) -> ArrayImage:
    """Decode an array, check it, and resize it as an image is resized; integers are rounded.

    Raises:
        UsageError: When it differs from the first array, or has values outside of `value_range`.
        ValueError: When a value is not finite.
        Exception: When its file is damaged.
    """
    config = image_format.config
    values, losses = read_array(encoded, name, config)
    channels, height, width = values.shape
    if values.dtype != image_format.dtype or channels != image_format.channels:
        raise UsageError(
            f"all arrays must have one type and as many channels, {image_format.dtype} and {image_format.channels} as "
            f"the first, got {values.dtype} and {channels} in {name}: convert it, or see --channel_axis, "
            f"--stack_axis{_hint_of_pairs(config)}"
        )
    size = image_format.size
    if config.resolution is None and (height, width) != size:
        raise unequal_sizes_error(name, (height, width), size)
    _require_finite(values)
    if config.value_range is not None:
        low, high = config.value_range
        if values.min() < low or values.max() > high:
            raise UsageError(
                f"value_range must hold all values, got {low:g} {high:g} and {name} with values from "
                f"{values.min():g} to {values.max():g}: widen it"
            )
    planes = values
    # Pillow resizes float32 without rounding, which holds all integers of 16 bits.
    parts = [np.asarray(resized(Image.fromarray(plane.astype(np.float32)), image_format)) for plane in values]
    if parts[0].shape != (height, width):
        planes = np.stack(parts)
        planes = np.rint(planes).astype(values.dtype) if values.dtype.kind in "iu" else planes.astype(values.dtype)
    planes = center_crop(planes, size) if config.center_crop else planes
    return ArrayImage(np.ascontiguousarray(planes), losses)


def _hint_of_pairs(config: DataConfig) -> str:
    """Return a hint that arrays may be pairs where metadata lie beside them, or ""."""
    folder = Path(config.train_data_dir or config.dataset_name or "").expanduser()
    is_named = bool(config.train_data_dir or config.dataset_name) and folder.is_dir()
    if config.condition_column is not None or not is_named or not list_images(folder).metadata_files:
        return ""
    return "; where metadata name pairs of arrays, --condition_column names the column that the others are made from"


def value_range_of(image_format: ImageFormat, limits: Sequence[float] | None) -> ValueRange:
    """Return the values that become -1 and 1 by the settings, the type and the data; they may be equal.

    Args:
        image_format: The format of arrays.
        limits: The smallest and the largest value of the training data, or their quantiles, or those of a model; None
            for a stream, which is not read before.

    Raises:
        UsageError: When nothing tells them.
    """
    config, dtype = image_format.config, image_format.dtype
    range_of_type = (np.iinfo(dtype).min, np.iinfo(dtype).max) if dtype.kind in "iu" else None
    if config.value_range is not None:
        low, high = config.value_range
    elif range_of_type is not None and config.value_quantiles is None:
        low, high = range_of_type
    elif limits is None:
        raise UsageError(
            f"value_range must be given to stream {dtype}, whose smallest and largest value are not known before: "
            "--value_range LOW HIGH, or leave out --streaming"
        )
    else:
        low, high = limits
        if range_of_type is not None:  # every value is one of the model's then
            low, high = math.floor(low), math.ceil(high)
    channels = check_display_channels(config.display_channels, image_format.channels)
    return ValueRange(float(low), float(high), str(dtype), channels)


def require_differing(values: ValueRange | None) -> None:
    """Check that not all values of images are the same; None: they are no arrays.

    Raises:
        UsageError: When they are.
    """
    if values is not None and not values.low < values.high:
        raise UsageError(
            f"value_range must be given where the values do not differ, got {values.low:g} for all of them"
        )


def quantiles(values: np.ndarray, levels: Sequence[float]) -> tuple[float, float]:
    """Return two quantiles of values; of more than MAX_QUANTILE_VALUES, those of so many evenly spaced ones."""
    step = -(-values.size // MAX_QUANTILE_VALUES)
    low, high = np.quantile(values.reshape(-1)[::step].astype(np.float32), levels)
    return float(low), float(high)


def count_outside(values: np.ndarray, value_range: ValueRange) -> int:
    """Return how many values lie outside of a range, which clips them."""
    parts = (values[first : first + MAX_QUANTILE_VALUES] for first in range(0, values.size, MAX_QUANTILE_VALUES))
    return sum(int(((part < value_range.low) | (part > value_range.high)).sum()) for part in parts)


def require_range_of_type(limits: Sequence[float], dtype: np.dtype[Any], name: str) -> None:
    """Check that a type can hold the two ends of a range of values.

    Args:
        limits: The setting `value_range`.
        dtype: The type of arrays.
        name: What has this type, for the message.

    Raises:
        UsageError: When it cannot.
    """
    low, high = limits
    info = np.iinfo(dtype) if dtype.kind in "iu" else np.finfo(dtype)
    is_whole = dtype.kind == "f" or (low == int(low) and high == int(high))
    if not (info.min <= low and high <= info.max and is_whole):
        wanted = "numbers" if dtype.kind == "f" else "whole numbers"
        raise UsageError(
            f"value_range must be two {wanted} that {dtype} can hold, as {name} does, got {low:g} {high:g}"
        )


def _keys(config: DataConfig) -> list[str]:
    return [] if config.array_key is None else [key.strip() for key in config.array_key.split(",")]


def _image_of(array: FileArray, number: int | None, name: str, config: DataConfig) -> np.ndarray:
    """Return one image of an array, (C, H, W)."""
    stack, channel = axes_of(array, name, config)
    values = array.values
    num_pixels = math.prod(n for axis, n in enumerate(values.shape) if axis not in (stack, channel))
    if config.max_image_pixels is not None and num_pixels > config.max_image_pixels:
        raise Image.DecompressionBombError(f"{num_pixels} pixels, more than {config.max_image_pixels}")
    if stack is not None:
        index = [slice(None)] * len(values.shape)
        if number is None:
            raise UsageError(
                f"an array of a table, and each file where the first is one image, must be one image, got "
                f"{values.shape} in {name}: leave out stack_axis, or save files alike"
            )
        index[stack] = number  # pyright: ignore[reportArgumentType, reportCallIssue]
        values = values[tuple(index)]
        channel = channel - 1 if channel is not None and channel > stack else channel
    planes = np.asarray(values[()] if values.shape else values)
    return planes[None] if channel is None else np.moveaxis(planes, channel, 0)


def _in_known_type(values: np.ndarray, name: str) -> ArrayImage:
    """Return values in one of DTYPES, in the byte order of this machine.

    Raises:
        UsageError: When there is none for them.
    """
    dtype = values.dtype.newbyteorder("=").name
    kept_as = _KEPT_AS.get(dtype, dtype)
    if kept_as not in DTYPES:
        remedy = "save real and imaginary part as two channels" if values.dtype.kind == "c" else "convert it"
        raise UsageError(f"an array must be of {', '.join(DTYPES)}, got {dtype} in {name}: {remedy}")
    return ArrayImage(values.astype(kept_as, copy=False), [FLOAT64] if dtype == "float64" else [])


def _require_finite(values: np.ndarray) -> None:
    """Check that all values are finite.

    Raises:
        ValueError: When one is not; the message names the first.
    """
    if values.dtype.kind != "f" or np.isfinite(values).all():
        return
    is_bad = ~np.isfinite(values)
    channel, row, column = (int(index[0]) for index in np.nonzero(is_bad))
    raise ValueError(
        f"{is_bad.sum():,} values are not finite, the first in channel {channel}, row {row}, column {column}: "
        f"{values[channel, row, column]}"
    )


def _largest(dtype: np.dtype[Any]) -> int:
    """Return one less than the number of values of a type; 255 for floats, which have no steps."""
    return 2 ** (8 * dtype.itemsize) - 1 if dtype.kind in "iu" else 255


def is_read_as_arrays(images: list[Path], arrays: list[Path], config: DataConfig) -> bool:
    """Return whether a folder is one of arrays: by its extensions, by a setting, or because Pillow cannot read it.

    Args:
        images: The files in it that Pillow may read.
        arrays: The files in it that are arrays alone.
        config: The settings of the data.
    """
    if not images:
        return bool(arrays)
    if all(map(is_png, images)):
        return bool(config.preserve_input_precision) and not are_pictures(images, keeps_precision=True)
    if not all(map(is_tiff, images)):
        return False
    if has_array_settings(config) or config.channels not in (None, 1, 3, 4):
        return True
    return not are_pictures(images, bool(config.preserve_input_precision))
