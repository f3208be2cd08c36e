"""The statistics of real images, which samples are compared with; they are computed once and stored.

statistics    moments of the features of all images, and the features of the first n images in a fixed random order
reference     the statistics of one split of a data set, with everything that determines them; a folder, see
              reference_files.py, whose tensors are count, mean and scatter, float64, and features (n, d) float32
real vs real  the distance between two sets of real images, which a model as good as the data would get
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from torch import Tensor

from hf_ddpm.data.batches import MicroBatches
from hf_ddpm.data.cache import ImageCache
from hf_ddpm.data.config import DataConfig
from hf_ddpm.data.sources import check_source, find_source
from hf_ddpm.data.splits import describe_split, open_split
from hf_ddpm.evaluation.array_features import ArrayFeatureNetwork
from hf_ddpm.evaluation.distances import Moments
from hf_ddpm.evaluation.feature_weights import NETWORKS
from hf_ddpm.evaluation.features import FeatureNetwork
from hf_ddpm.evaluation.reference_files import FORMAT, read_files, versions_of, write_files
from hf_ddpm.image_size import Size, format_size, to_resolution
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.runtime.files import look_at, require_writable_folder

NUM_FEATURES = 10_000  # rows that are stored, for distances that need the features themselves
TOO_FEW_IMAGES = (
    "{count:,} images are not more than the {dimensions:,} dimensions of {network}: a Fréchet distance is then mostly "
    "bias; take 5,000 images or more, or the kernel distance (KID), which has no bias"
)


@dataclass(frozen=True, eq=False)
class Statistics:
    """The statistics of a set of images, from which distances are computed.

    Args:
        moments: The moments of the features of all images.
        features: The features of the first n images, (n, d) float32.
    """

    moments: Moments
    features: Tensor

    @property
    def count(self) -> int:
        """The number of images."""
        return int(self.moments.count)


@dataclass(frozen=True, eq=False)
class Reference(Statistics):
    """The statistics of one split of a data set.

    Args:
        metadata: The content of reference.json without the checksum.
    """

    metadata: dict[str, Any]

    @property
    def metric(self) -> str:
        """The name of the Fréchet distance from it."""
        return NETWORKS[self.metadata["network"]["network"]].frechet_name

    @property
    def dimensions(self) -> int:
        """The length of a feature, d."""
        return self.features.shape[1]


def collect(network: FeatureNetwork, batches: Iterable[Tensor], num_features: int = NUM_FEATURES) -> Statistics:
    """Compute the statistics of images.

    Args:
        batches: Each (B, C, H, W) uint8.
        num_features: The number of images whose features are returned, at most; the first ones are.

    Raises:
        UsageError: When there are no images, or the network refuses them.
    """
    moments = Moments.empty(network.dimensions)
    first_features: list[Tensor] = []
    num_missing = num_features
    for features in map(network, batches):
        moments = moments.update(features)
        # A view would keep the whole batch in memory.
        first_features.append(features[:num_missing].clone())
        num_missing -= len(first_features[-1])
    if not first_features:
        raise UsageError("batches must hold images, got none: give a data set or samples")
    return Statistics(moments, torch.cat(first_features))


def frechet_warnings(count: int, network: FeatureNetwork) -> list[str]:
    """Return the warnings that belong to a Fréchet distance of so many images."""
    if count > network.dimensions:
        return []
    return [TOO_FEW_IMAGES.format(count=count, dimensions=network.dimensions, network=network.name)]


def make_reference(
    config: DataConfig,
    split: str,
    network: FeatureNetwork,
    out: str | Path,
    *,
    num_features: int = NUM_FEATURES,
    batch_size: int = 64,
) -> Reference:
    """Compute the reference of a split and write it to the new folder `out`, completely or not at all.

    Images are decoded and resized as for training, with 8 bits. With `center_crop` they are also cropped as for
    training. Without it, images of another shape are cropped at random once, as in the first epoch of seed 0, and so
    are larger ones with `random_crop`. The features stand in the order of that epoch.

    Args:
        config: The settings of the data. Its labels and `preserve_input_precision` are ignored.
        split: train, test, ...
        num_features: The number of images whose features are stored, at most.
        batch_size: Images per network evaluation.

    Raises:
        UsageError: When `out` exists or `channels` is not 1 or 3, both before an image is read, or when the images
            cannot be loaded.
    """
    out = check_new_reference(config, out)
    # The networks take 8 bits. Labels would change the fingerprint.
    config = replace(config, preserve_input_precision=False, label_column=None)
    with open_split(config, split) as images:
        for line in describe_split(config, split, images):
            tqdm.write(line, file=sys.stderr)
        return write_reference(images, config, split, network, out, num_features=num_features, batch_size=batch_size)


def write_reference(
    images: ImageCache,
    config: DataConfig,
    split: str,
    network: FeatureNetwork,
    out: Path,
    *,
    num_features: int = NUM_FEATURES,
    batch_size: int = 64,
) -> Reference:
    """Do what `make_reference` does, with the images of a split that is open.

    Args:
        images: What `open_split` provides, with 8 bits and without labels, or arrays for an `ArrayFeatureNetwork`.

    Raises:
        UsageError: When images are arrays, and the network takes none.
    """
    if images.value_range is not None and not isinstance(network, ArrayFeatureNetwork):
        raise UsageError(
            f"a reference must be of images, got arrays ({images.value_range}): `hf-ddpm evaluate MODEL` makes one of "
            "arrays by itself"
        )
    statistics = collect(network, _batches(images, batch_size), num_features)
    data = describe_images(images, config, split, oblong_crop="random, seed 0")
    height, width = images.size
    covers = f"the shorter side to {height}" if height == width else f"to cover {format_size(images.size)}"
    data["resize"] = "none" if images.random_crop else f"bilinear by Pillow, {covers}"
    if config.center_crop:
        data["crop"] = "center"
    packages = ("torch", "datasets", "Pillow", "numpy")
    metadata = {
        "format": FORMAT,
        "data": data,
        "network": network.identity,
        "num_features": len(statistics.features),
        "warnings": frechet_warnings(statistics.count, network),
        "versions": versions_of(*packages),
    }
    reference = Reference(statistics.moments, statistics.features, metadata)
    write_files(out, {**vars(reference.moments), "features": reference.features}, metadata)
    return reference


def check_new_reference(config: DataConfig, out: str | Path) -> Path:
    """Check what can be known of a reference before its network is loaded, and return its folder.

    Raises:
        UsageError: When `out` exists or cannot be made, no source can be meant, or `channels` is not 1 or 3.
    """
    out = look_at("out", out)
    if out.exists():
        raise UsageError(f"out must be a new folder, got {str(out)!r}, which exists: delete it or name another")
    require_writable_folder("out", out)
    if find_source(config).kind != "arrays" and config.channels not in (None, 1, 3):
        raise UsageError(f"channels must be 1 or 3, as networks take, got {config.channels}: --channels 3, or 1")
    check_source(config)
    return out


def describe_images(images: ImageCache, config: DataConfig, split: str, oblong_crop: str = "center") -> dict[str, Any]:
    """Return everything that determines the images of a split.

    Args:
        oblong_crop: How images of another shape are cropped without `random_crop`, in words.
    """
    crop = "random, seed 0" if images.random_crop else oblong_crop
    return {
        "name": find_source(config).name,
        "config": config.dataset_config_name,
        "split": split,
        "count": len(images),
        "num_bad": images.num_bad,
        "fingerprint": images.fingerprint,
        "resolution": to_resolution(images.size),
        "channels": images.channels,
        "crop": "none" if images.is_uniform else crop,
    }


def load_reference(path: str | Path) -> Reference:
    """Read the reference in the folder `path`.

    Raises:
        UsageError: When there is none, or it is damaged.
    """
    metadata, tensors = read_files(path)
    if "network" not in metadata:
        raise UsageError(
            f"reference must be of features for this metric, got {str(path)!r}, which is of values: give --metrics "
            "values, or make another of images"
        )
    features = tensors.pop("features")
    return Reference(Moments(**tensors), features, metadata)


def check_comparable(reference: Reference, network: FeatureNetwork, size: Size, channels: int) -> None:
    """Check that samples can be compared with the reference.

    Args:
        network: The network that computes the samples' features.
        size: Height and width of the samples.
        channels: The samples' channels.

    Raises:
        UsageError: When they cannot; the message lists what differs.
    """
    samples = _comparable_settings(network.identity, to_resolution(size), channels)
    require_equal("the reference", _settings_of(reference), "the samples", samples)


def real_vs_real(reference: Reference, other: Reference | None = None) -> tuple[Statistics, Statistics]:
    """Return two sets of real images; their distance is what a model as good as the data would get.

    Args:
        other: Another split, which is compared with the whole reference. Default: the stored features are divided into
            halves. They are fewer images than the reference holds, and so have a larger bias in a Fréchet distance.

    Raises:
        UsageError: When the two cannot be compared or are the same images, or there are less than 4 features.
    """
    if other is not None:
        require_equal("one reference", _settings_of(reference), "the other", _settings_of(other))
        if reference.metadata["data"]["fingerprint"] == other.metadata["data"]["fingerprint"]:
            raise UsageError("the references must be of different images, got the same twice: give another split")
        return reference, other
    if len(reference.features) < 4:
        raise UsageError(f"halves need at least 4 features, got {len(reference.features)}: give another split")
    first, second = (reference.features[start::2].contiguous() for start in (0, 1))
    return Statistics(Moments.of(first), first), Statistics(Moments.of(second), second)


def _batches(images: ImageCache, batch_size: int) -> Iterator[Tensor]:
    """Yield each image once, in the order and with the crops of the first epoch of seed 0."""
    num_batches = -(-len(images) // batch_size)
    stream = MicroBatches(
        images,
        seed=0,
        random_flip=False,
        batch_size=batch_size,
        accumulation_steps=1,
        rank=0,
        num_processes=1,
        first_position=0,
        num_steps=num_batches,
    )
    for k in tqdm(range(num_batches), "Features", unit="batch", disable=len(images) < 2000):
        # The stream has no end: the last batch continues with images of the next epoch.
        yield stream[k]["pixels"][: len(images) - k * batch_size]


def _settings_of(reference: Reference) -> dict[str, str]:
    data = reference.metadata["data"]
    return _comparable_settings(reference.metadata["network"], data["resolution"], data["channels"])


def _comparable_settings(identity: dict[str, Any], resolution: int | list[int], channels: int) -> dict[str, str]:
    """Return all settings that must be equal for two sets of features to compare."""
    settings = {"resolution": resolution, "channels": channels, **identity}
    del settings["information"]
    return {key: str(value) for key, value in settings.items()}


def require_equal(left: str, left_settings: dict[str, str], right: str, right_settings: dict[str, str]) -> None:
    """Raise a UsageError with a table of the settings that differ, if there are any."""
    keys = [key for key in {**left_settings, **right_settings} if left_settings.get(key) != right_settings.get(key)]
    if not keys:
        return
    rows = [("", left, right)]
    rows += [(key, left_settings.get(key, "-"), right_settings.get(key, "-")) for key in keys]
    widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
    table = "\n".join(f"  {a:{widths[0]}}  {b:{widths[1]}}  {c}" for a, b, c in rows)
    raise UsageError(
        f"{left} and {right} must have equal settings, or their distance means nothing; they differ in\n{table}\n"
        "make a reference with the other settings with `hf-ddpm reference`"
    )
