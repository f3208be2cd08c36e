"""Statistics of real images, computed once and kept on the disk: what samples are compared with.

statistics  moments of the features of all images, and the features of the first of them in a fixed random order
reference   statistics of one split of a data set, with all that decides their value; a folder of two files:
              reference.safetensors   count, mean and scatter, float64; features (n, d) float32
              reference.json          the data, the network, versions, warnings, and the sha256 of the other file
floor       the distance between two sets of real images: what a model would get that is as good as the data
"""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from hf_ddpm._version import __version__
from hf_ddpm.data.batches import MicroBatches
from hf_ddpm.data.cache import ImageCache
from hf_ddpm.data.config import DataConfig
from hf_ddpm.data.sources import find_source
from hf_ddpm.data.splits import open_split
from hf_ddpm.evaluation.distances import Moments
from hf_ddpm.evaluation.features import FeatureNetwork, features_of
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.runtime.files import flush_folder, in_one_line, naming_damage, read_mapping, write_flushed

FORMAT = 1
NUM_FEATURES = 10_000  # rows kept for distances that need the features themselves
TOO_FEW_IMAGES = (
    "{count:,} images are not more than the {dimensions:,} dimensions of {network}: a Fréchet distance is then mostly "
    "bias; take 5,000 images or more, or the kernel distance (KID), which has no bias"
)


@dataclass(frozen=True, eq=False)
class Statistics:
    """What distances need to know of a set of images.

    Args:
        moments: of the features of all images.
        features: (n, d) float32 of the first n images.
    """

    moments: Moments
    features: Tensor

    @property
    def count(self) -> int:
        return int(self.moments.count)


@dataclass(frozen=True, eq=False)
class Reference(Statistics):
    """Statistics of a split of a data set; `about` is reference.json, without the checksum."""

    about: dict[str, Any]


def collect(network: FeatureNetwork, batches: Iterable[Tensor], num_features: int = NUM_FEATURES) -> Statistics:
    """The statistics of images.

    Args:
        batches: each (B, C, H, W) uint8.
        num_features: the first images whose features are kept.
    Raises: UsageError if there are no images, or as `FeatureNetwork` does.
    """
    moments, kept, left = Moments.empty(network.dimensions), [], num_features
    for features in features_of(network, batches):
        moments = moments.update(features)
        kept.append(features[:left].clone())  # a view would keep the rest in memory
        left -= len(kept[-1])
    if not kept:
        raise UsageError("batches must hold images, got none: give a data set or samples")
    return Statistics(moments, torch.cat(kept))


def warnings_of(count: int, network: FeatureNetwork) -> list[str]:
    """What has to be said beside a Fréchet distance of so many images."""
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
    """Computes the reference of a split and writes it to the new folder `out`, all of it or nothing.

    Images are decoded, resized and, with `center_crop`, cropped as for training, in 8 bits. Without it, oblong images
    are cropped at random once, as in the first epoch of seed 0, whose order is also that of the features.

    Args:
        config: of it the settings of the data: dataset_name or train_data_dir, dataset_config_name, image_column,
            resolution, channels, center_crop, on_bad_image, cache_dir.
        split: train, test, ...
        num_features: the images whose features are kept, at most.
    Raises: UsageError, before an image is read if `out` exists or `channels` is not 1 or 3; and as `load_images`.
    """
    out = Path(out).expanduser()
    if out.exists():
        raise UsageError(f"out must be a new folder, got {str(out)!r}, which exists: delete it or name another")
    if config.channels not in (None, 1, 3):
        raise UsageError(f"channels must be 1 or 3, as networks take, got {config.channels}: --channels 3, or 1")
    # The networks take 8 bits; labels would count in the fingerprint.
    config = replace(config, preserve_input_precision=False, label_column=None)
    with open_split(config, split) as images:
        statistics = collect(network, _batches(images, batch_size), num_features)
        data = about_images(images, config, split, oblong="random, seed 0")
        data["resize"] = f"bilinear by Pillow, the shorter side to {images.resolution}"
        if config.center_crop:
            data["crop"] = "center"
    packages = ("torch", "datasets", "Pillow", "numpy")
    about = {
        "format": FORMAT,
        "data": data,
        "network": network.identity,
        "num_features": len(statistics.features),
        "warnings": warnings_of(statistics.count, network),
        "versions": {"hf_ddpm": __version__, **{name: version(name) for name in packages}},
    }
    reference = Reference(statistics.moments, statistics.features, about)
    _write(reference, out)
    return reference


def about_images(images: ImageCache, config: DataConfig, split: str, oblong: str = "center") -> dict[str, Any]:
    """What decides the images of a split; `oblong` says how those that are not square are cropped."""
    return {
        "name": find_source(config).name,
        "config": config.dataset_config_name,
        "split": split,
        "count": len(images),
        "num_bad": images.num_bad,
        "fingerprint": images.fingerprint,
        "resolution": images.resolution,
        "channels": images.channels,
        "crop": "none" if images.is_uniform else oblong,
    }


def load_reference(path: str | Path) -> Reference:
    """The reference in the folder `path`. Raises: UsageError if there is none, or if it is damaged."""
    folder = Path(path).expanduser()
    if not (folder / "reference.json").is_file():
        raise UsageError(
            f"reference must be a folder with reference.json, got {str(path)!r}: make one with `hf-ddpm reference`"
        )
    try:
        with naming_damage(f"{folder / 'reference.json'} cannot be read", "make it anew"):
            about = read_mapping(folder / "reference.json", "make it anew")
            if about["format"] != FORMAT:
                raise UsageError(f"reference must have the format {FORMAT}, got {about['format']}: make it anew")
            content = (folder / "reference.safetensors").read_bytes()
            expected, found = about.pop("sha256"), hashlib.sha256(content).hexdigest()
            if found != expected:
                raise UsageError(
                    f"reference must be as it was written, got {str(path)!r} with the sha256\n  {found} instead of\n"
                    f"  {expected}: make it anew with `hf-ddpm reference`"
                )
            tensors = load(content)
            features = tensors.pop("features")
            return Reference(Moments(**tensors), features, about)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{folder} cannot be read: {in_one_line(error)}: make it anew") from error


def check_comparable(reference: Reference, network: FeatureNetwork, resolution: int, channels: int) -> None:
    """Raises UsageError, with both sides, unless samples of this kind compare with the reference."""
    samples = _kind(network.identity, resolution, channels)
    _refuse_unlike("the reference", _kind_of(reference), "the samples", samples)


def real_floor(reference: Reference, other: Reference | None = None) -> tuple[Statistics, Statistics]:
    """Two sets of real images, the distance between which is the floor for a model's.

    Args:
        other: another split, to be compared with all of the reference. Default: two halves of the features kept, with
            fewer images and thus more bias, in a Fréchet distance, than the reference as a whole has.
    Raises: UsageError if the two are not alike, or are the same images; or there are less than 4 features.
    """
    if other is not None:
        _refuse_unlike("one reference", _kind_of(reference), "the other", _kind_of(other))
        if reference.about["data"]["fingerprint"] == other.about["data"]["fingerprint"]:
            raise UsageError("the references must be of different images, got the same twice: give another split")
        return reference, other
    if len(reference.features) < 4:
        raise UsageError(f"halves need at least 4 features, got {len(reference.features)}: give another split")
    first, second = (reference.features[start::2].contiguous() for start in (0, 1))
    return Statistics(Moments.of(first), first), Statistics(Moments.of(second), second)


def _batches(images: ImageCache, batch_size: int) -> Iterator[Tensor]:
    """Each image once, in the order and with the crops of the first epoch of seed 0."""
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
        yield stream[k]["pixels"][: len(images) - k * batch_size]  # the stream has no end


def _write(reference: Reference, out: Path) -> None:
    content = save({**vars(reference.moments), "features": reference.features})
    about = {**reference.about, "sha256": hashlib.sha256(content).hexdigest()}
    part = out.with_name(f".{out.name}.{uuid.uuid4().hex}.part")
    try:
        part.mkdir(parents=True)
        write_flushed(part / "reference.safetensors", content)
        write_flushed(part / "reference.json", json.dumps(about, indent=2, ensure_ascii=False) + "\n")
        part.rename(out)
        flush_folder(out.parent)
    except OSError as error:
        raise UsageError(f"out must be a folder to write to, got {str(out)!r}: {error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _kind_of(reference: Reference) -> dict[str, Any]:
    data = reference.about["data"]
    return _kind(reference.about["network"], data["resolution"], data["channels"])


def _kind(identity: dict[str, Any], resolution: int, channels: int) -> dict[str, Any]:
    """All in which two sets of features must agree."""
    kind = {"resolution": resolution, "channels": channels, **identity}
    del kind["information"]
    return {key: str(value) for key, value in kind.items()}


def _refuse_unlike(left: str, left_kind: dict[str, Any], right: str, right_kind: dict[str, Any]) -> None:
    keys = [key for key in {**left_kind, **right_kind} if left_kind.get(key) != right_kind.get(key)]
    if not keys:
        return
    rows = [("", left, right), *((key, left_kind.get(key, "-"), right_kind.get(key, "-")) for key in keys)]
    widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
    table = "\n".join(f"  {a:{widths[0]}}  {b:{widths[1]}}  {c}" for a, b, c in rows)
    raise UsageError(
        f"{left} and {right} must be of one kind, or their distance means nothing; they differ in\n{table}\n"
        "make a reference of the other kind with `hf-ddpm reference`"
    )
