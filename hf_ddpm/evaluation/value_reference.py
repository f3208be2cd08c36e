"""The values of real images, which those of samples are compared with: computed from the images, or kept in a folder.

reference of values   the statistics of each image of a split of arrays, without a network; a folder, see
                      reference_files.py, whose tensors are those of `ValueStatistics`
range                 what lies outside was clipped before the statistics were computed, as a model clips its data
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub.utils import tqdm

from hf_ddpm.data.arrays import require_range_of_type
from hf_ddpm.data.batches import as_tensor, fixed_pixels
from hf_ddpm.data.cache import ImageCache
from hf_ddpm.data.config import DataConfig
from hf_ddpm.data.sources import find_source
from hf_ddpm.data.splits import describe_split, open_split
from hf_ddpm.evaluation.features import check_network, load_network
from hf_ddpm.evaluation.names import VALUES_NAME
from hf_ddpm.evaluation.reference_files import FORMAT, read_files, versions_of, write_files
from hf_ddpm.evaluation.statistics import (
    Reference,
    check_new_reference,
    describe_images,
    make_reference,
    require_equal,
    write_reference,
)
from hf_ddpm.evaluation.value_statistics import ValueStatistics, joined, num_components, value_statistics
from hf_ddpm.image_size import Size, to_resolution, to_size
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.value_range import ValueRange

STATISTICS_BATCH = 64  # images of which statistics of values are computed at once
DEFAULT_NETWORK = "inception"


@dataclass(frozen=True, eq=False)
class ValueReference:
    """The statistics of the values of a split of arrays.

    Args:
        statistics: One row for each image, in the order of the data.
        metadata: The content of reference.json without the checksum.
    """

    statistics: ValueStatistics
    metadata: dict[str, Any]

    @property
    def count(self) -> int:
        """The number of images."""
        return len(self.statistics.means)

    @property
    def metric(self) -> str:
        """The name of the distance from it."""
        return VALUES_NAME

    @property
    def dimensions(self) -> int:
        """The length of the vector of statistics of an image."""
        data = self.metadata["data"]
        return num_components(data["channels"], *to_size(data["resolution"]))


def statistics_of_values(images: ImageCache, value_range: ValueRange | None) -> ValueStatistics:
    """Compute the statistics of the values of images.

    Args:
        images: The images.
        value_range: The range to which values are clipped; None: they are not.
    """
    pixels = clipped(fixed_pixels(images), value_range)
    firsts = range(0, len(pixels), STATISTICS_BATCH)
    return joined([value_statistics(as_tensor(np.array(pixels[i : i + STATISTICS_BATCH]))) for i in firsts])


def clipped(pixels: np.ndarray, value_range: ValueRange | None) -> np.ndarray:
    """Return pixels as a model learned them, without the values that its range clips."""
    if value_range is None:
        return pixels
    return np.clip(pixels, value_range.low, value_range.high).astype(pixels.dtype)


def make_reference_of_data(
    config: DataConfig,
    split: str,
    out: str | Path,
    *,
    network: str | None = None,
    network_path: str | None = None,
    device: str = "cpu",
    **settings: Any,
) -> Reference | ValueReference:
    """Compute the reference of a split, and write it to the new folder `out`: of images features, of arrays values.

    Args:
        config: The settings of the data. The `value_range` of arrays clips their values, and color of 16 bits is
            arrays with `preserve_input_precision`.
        split: train, test, ...
        out: The folder.
        network: The feature network for images. None: DEFAULT_NETWORK. There is none for arrays.
        network_path: Its file; see `load_network`.
        device: The device of the network.
        settings: `num_features` and `batch_size` of `make_reference`.

    Raises:
        UsageError: When the data, the network or `out` cannot work.
    """
    out = check_new_reference(config, out)
    config = replace(config, label_column=None, preserve_input_precision=bool(config.preserve_input_precision))
    name, kind = network or DEFAULT_NETWORK, find_source(config).kind
    if kind == "arrays":
        _require_no_network(network, network_path)
    elif kind in ("images", "digits"):  # a table may hold either, and is opened before
        _require_8_bits(config)
        check_network(name, network_path)
        if find_source(replace(config, preserve_input_precision=True)).kind == "arrays":
            text = "not read: the lower 8 of 16 bits of color, which feature networks do not see; "
            tqdm.write(f"{text}--preserve_input_precision compares values of 16 bits instead", file=sys.stderr)
        return make_reference(config, split, load_network(name, network_path, device), out, **settings)
    with open_split(replace(config, value_range=None), split) as images:
        if images.value_range is not None:
            _require_no_network(network, network_path)
            images = _in_given_range(images, config)
        if images.value_range is not None or config.value_range is None:
            for line in describe_split(config, split, images):
                tqdm.write(line, file=sys.stderr)
        if images.value_range is not None:
            return write_value_reference(images, config, split, out)
        _require_8_bits(config)
        loaded = load_network(name, network_path, device)
        if config.value_range is None:
            return write_reference(images, config, split, loaded, out, **settings)
    return make_reference(config, split, loaded, out, **settings)


def _require_no_network(network: str | None, network_path: str | None) -> None:
    for name, value in (("network", network), ("network_path", network_path)):
        if value is not None:
            raise UsageError(
                f"{name} has no effect on a reference of arrays, which is of their values, got {value!r}: leave it "
                "out; `hf-ddpm evaluate MODEL` makes references of features by itself"
            )


def _require_8_bits(config: DataConfig) -> None:
    """Check that images whose features are compared need not keep 16 bits.

    Raises:
        UsageError: When the settings ask for that.
    """
    if config.preserve_input_precision:
        raise UsageError(
            "preserve_input_precision must be left out for images whose features are compared, got True: feature "
            "networks see 8 bits; it is for color of 16 bits, whose values are compared"
        )


def _in_given_range(images: ImageCache, config: DataConfig) -> ImageCache:
    """Return arrays in the range that the settings give, with the number of values that it clips."""
    assert images.value_range is not None
    if config.value_range is None:
        return images
    dtype = images.value_range.dtype
    require_range_of_type(config.value_range, np.dtype(dtype), images.name)
    low, high = config.value_range
    return images.in_range(ValueRange(float(low), float(high), dtype))


def write_value_reference(images: ImageCache, config: DataConfig, split: str, out: Path) -> ValueReference:
    """Compute the reference of the values of arrays, and write it to the new folder `out`.

    Args:
        images: What `open_split` provides.
        config: The settings of the data.
        split: train, test, ...
        out: The folder.
    """
    values = images.value_range
    assert values is not None
    statistics = statistics_of_values(images, values)
    limits = [min(max(float(limit), values.low), values.high) for limit in images.limits]
    metadata = {
        "format": FORMAT,
        "data": describe_images(images, config, split),
        "values": {"low": values.low, "high": values.high, "dtype": values.dtype},
        "limits": limits,
        "num_clipped": images.num_clipped,
        "warnings": [],
        "versions": versions_of("torch", "datasets", "Pillow", "numpy"),
    }
    write_files(out, statistics._asdict(), metadata)
    return ValueReference(statistics, metadata)


def load_value_reference(path: str | Path) -> ValueReference:
    """Read the reference of values in a folder.

    Raises:
        UsageError: When there is none, it is damaged, or it is of features.
    """
    metadata, tensors = read_files(path)
    if "values" not in metadata:
        raise UsageError(
            f"reference must be of values for the metric values alone, got {str(path)!r}, which is of features: make "
            "one of arrays with `hf-ddpm reference`, or leave it out"
        )
    return ValueReference(ValueStatistics(**tensors), metadata)


def check_values_comparable(
    reference: ValueReference, value_range: ValueRange | None, channels: int, size: Size
) -> None:
    """Check that the values of samples can be compared with a reference.

    Args:
        reference: The reference.
        value_range: The values of the model.
        channels: The channels of its images.
        size: Height and width of its images.

    Raises:
        UsageError: When they are of another form, or the model cannot make all values of the reference.
    """
    data, values = reference.metadata["data"], reference.metadata["values"]
    own = "pictures" if value_range is None else value_range.dtype
    require_equal(
        "the reference",
        {name: str(data[name]) for name in ("resolution", "channels")} | {"type": values["dtype"]},
        "the samples",
        {"resolution": str(to_resolution(size)), "channels": str(channels), "type": own},
    )
    assert value_range is not None
    low, high = value_range.low, value_range.high
    smallest, largest = reference.metadata["limits"]
    is_same = (values["low"], values["high"]) == (low, high)
    if low <= smallest and largest <= high and (is_same or not reference.metadata["num_clipped"]):
        return
    raise UsageError(
        f"reference must hold values in the model's range, {low!r} to {high!r}, or be clipped to it, got "
        f"{smallest!r} to {largest!r}: make it with --value_range {low!r} {high!r}"
    )


def require_enough_images(name: str, count: int, channels: int, size: Size, random_crop: bool = False) -> None:
    """Check that there are more images than components of their statistics.

    Args:
        name: What holds the images.
        count: The number of images.
        channels: Their channels.
        size: (H, W).
        random_crop: Whether the images are parts of larger ones, which are cropped at random.

    Raises:
        UsageError: When there are not.
    """
    least = num_components(channels, *size) + 1
    if count < least:
        remedy = "; of an image that is cropped at random one part is compared: cut it into tiles"
        raise UsageError(
            f"{name} must be at least {least} for values, got {count:,}: a covariance of {least - 1} statistics "
            f"needs more images{remedy if random_crop else ''}"
        )
