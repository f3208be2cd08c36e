"""What a run reads, and what it does not, in lines for the person who started it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_ddpm.data.array_files import is_tiff
from hf_ddpm.data.cache import ImageCache
from hf_ddpm.data.config import DataConfig
from hf_ddpm.data.given import NAME, GivenImages
from hf_ddpm.data.image_folder import METADATA_NAMES, files_below, is_image, list_images
from hf_ddpm.data.labels import LabelColumn
from hf_ddpm.data.shards import NUM_FIRST_IMAGES, ImageStream
from hf_ddpm.data.sources import find_source

# Values that fill less of their range than this are warned of: photographs fill nearly all of it.
SMALLEST_SHARE = 0.5


def describe_images(config: DataConfig, images: ImageCache | ImageStream | GivenImages) -> list[str]:
    """Return what was read, what was not, and a warning where the values fill little of their range.

    Args:
        config: The settings of the data.
        images: The images that they led to.
    """
    count = "images" if images.num_images is None else f"{images.num_images:,} images"
    parts = [f"{images.name}: {count}, {images.resolution} x {images.resolution}, channels {images.channels}"]
    if images.value_range is not None:
        parts.append(f"values {images.value_range}")
    elif images.max_value > 255:
        parts.append("16 bits")
    if not isinstance(images, GivenImages) and images.label_columns is not None:
        parts.append(f"labels {', '.join(_describe_labels(images.label_columns, images.labels))}")
    if images.num_classes:
        parts.append(f"{images.num_classes:,} classes")
    if isinstance(images, ImageCache) and images.conditions is not None:
        parts.append(f"made from the column {config.condition_column}, channels {images.conditions.channels}")
    if images.num_bad:
        parts.append(f"{images.num_bad:,} unreadable ones left out")
    if images.name != NAME:
        parts.append(describe_unread(config, (images.num_images or 0) + images.num_bad))
    lines = ["; ".join(filter(None, parts))]
    among = {ImageStream: f" of the first {NUM_FIRST_IMAGES}", GivenImages: ", of which the first was read,"}
    among = among.get(type(images), "")
    if isinstance(images, ImageCache) and images.num_clipped:
        assert images.value_range is not None
        low, high, share = images.value_range.low, images.value_range.high, images.num_clipped / images.pixels.size
        lines.append(f"clipped: {images.num_clipped:,} values ({share:.2%}) lie outside of {low:g} to {high:g}")
    lines += [f"not read in {n:,} images{among}: {loss}" for loss, n in sorted(images.losses.items())]
    if any(loss.startswith("frames") for loss in images.losses) and _has_tiff_files(config):
        lines.append("--stack_axis 0 reads each page of a TIFF file as an image, --channel_axis 0 as a channel")
    return lines + _describe_range(config, images, among)


def _has_tiff_files(config: DataConfig) -> bool:
    """Return whether the source is a folder of TIFF files, which can be read as arrays."""
    source = find_source(config)
    if source.kind != "images" or source.folder is None:
        return False
    return all(map(is_tiff, list_images(source.folder).images))


def _describe_labels(columns: Sequence[LabelColumn], values: Any) -> list[str]:
    """Return in words what each column of raw labels holds."""
    texts = []
    for (name, class_names), of_column in zip(columns, values.reshape(len(values), -1).T, strict=True):
        what = (
            f"{of_column.min():g} to {of_column.max():g}" if class_names is None else f"{len(class_names):,} classes"
        )
        texts.append(f"{name}: {what}")
    return texts


def _describe_range(config: DataConfig, images: ImageCache | ImageStream | GivenImages, among: str) -> list[str]:
    """Return a warning, with the setting that mends it, where values fill less than SMALLEST_SHARE of their range."""
    if images.value_range is not None:
        (low, high), (smallest, largest) = (images.value_range.low, images.value_range.high), images.limits
    else:
        low, high = config.value_range or (0, images.file_max)
        smallest, largest = (low + value * (high - low) / images.max_value for value in images.limits)
    if smallest >= largest or largest - smallest >= SMALLEST_SHARE * (high - low):
        return []
    # What a camera or a mask can hold is mostly a power of two less one, and begins at 0.
    wanted = (0, 2 ** round(largest).bit_length() - 1)
    form = ".0f"
    if images.value_range is not None and not images.value_range.is_integer:
        form = ".3g"
        wanted = (float(f"{smallest:.3g}"), float(f"{largest:.3g}"))
    elif smallest < 0 or largest - smallest < SMALLEST_SHARE * wanted[1]:
        wanted = (round(smallest), round(largest))
    text = (
        f"warning: the values of the images{among} fill little of their range: they go from {smallest:{form}} to "
        f"{largest:{form}}, and -1 and 1 stand for {low:g} and {high:g}; --value_range {wanted[0]} {wanted[1]} "
        "stretches them, if no image can hold others"
    )
    return [text]


def describe_unread(config: DataConfig, num_images: int) -> str:
    """Return in words which files of a folder of images are not read, or "" if all are.

    Args:
        config: The settings of the data.
        num_images: The number of images that were read or were unreadable.
    """
    source = find_source(config)
    if source.kind not in ("images", "arrays") or source.folder is None:
        return ""
    listed = list_images(source.folder)
    held_out = [split for split, path in source.splits.items() if path != source.folder]
    unread = [f"the folder {split!r}" for split in held_out]
    if source.splits:
        root = Path(config.dataset_name or config.train_data_dir or "").expanduser()
        starts = tuple(f"{path}{os.sep}" for path in source.splits.values())
        above = [path for path in files_below(root) if not str(path).startswith(starts)]
        num_beside = sum(is_image(path) for path in above)
        unread += [f"{num_beside:,} images beside the splits"] if num_beside else []
        unread += [f"{path.name} beside the splits" for path in above if path.name in METADATA_NAMES]
    unread += [f"{count:,} {kind}" for kind, count in sorted(listed.unread.items())]
    num_named = num_images if config.condition_column is None else 2 * num_images
    if source.kind == "arrays":
        unread += ["metadata, which are read beside images only"] if listed.has_metadata else []
    elif listed.has_metadata and len(listed.images) > num_named:
        unread.append(f"{len(listed.images) - num_named:,} images that no row of the metadata names")
    return f"not read: {', '.join(unread)}" if unread else ""
