"""What a run reads, and what it does not, in lines for the person who started it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hf_ddpm.data.array_files import is_png, is_tiff
from hf_ddpm.data.cache import ImageCache
from hf_ddpm.data.config import DataConfig
from hf_ddpm.data.given import NAME, GivenImages
from hf_ddpm.data.held_out import HELD_OUT_SPLIT
from hf_ddpm.data.image_folder import files_below, is_image, kind_of, list_images, split_kind
from hf_ddpm.data.image_format import LOWER_BITS
from hf_ddpm.data.labels import LabelColumn
from hf_ddpm.data.metadata import METADATA_NAMES, Metadata, column_of_files
from hf_ddpm.data.shards import NUM_FIRST_IMAGES, ImageStream
from hf_ddpm.data.sources import find_source, metadata_of
from hf_ddpm.data.tables import divide_training
from hf_ddpm.image_size import format_size

# Values that fill less of their range than this are warned of: photographs fill nearly all of it.
SMALLEST_SHARE = 0.5


def describe_images(config: DataConfig, images: ImageCache | ImageStream | GivenImages) -> list[str]:
    """Return what was read, what was not, and a warning where the values fill little of their range.

    Args:
        config: The settings of the data.
        images: The images that they led to.
    """
    count = "images" if images.num_images is None else f"{images.num_images:,} images"
    size = f"{'crops of ' * config.random_crop}{format_size(images.size)}"
    parts = [f"{images.name}: {count}, {size}, channels {images.channels}"]
    if images.value_range is not None:
        parts.append(f"values {images.value_range}")
    elif images.max_value > 255:
        parts.append("16 bits")
    if not isinstance(images, GivenImages) and images.label_columns is not None:
        parts.append(f"labels {', '.join(_describe_labels(images.label_columns, images.labels))}")
    if images.num_classes:
        parts.append(f"{images.num_classes:,} classes")
    if isinstance(images, ImageCache) and images.conditions is not None:
        of_column = images.conditions
        values = "" if of_column.value_range is None else f", values {of_column.value_range}"
        parts.append(f"made from the column {config.condition_column}, channels {of_column.channels}{values}")
    if images.num_bad:
        parts.append(f"{images.num_bad:,} unreadable ones left out")
    if images.name != NAME:
        parts.append(describe_unread(config))
        parts.insert(-1, _describe_held_out(config))
        parts.insert(-1, _describe_repeated(config))
    lines = ["; ".join(filter(None, parts))]
    lines += _describe_parts(config) if images.name != NAME else []
    among = {ImageStream: f" of the first {NUM_FIRST_IMAGES}", GivenImages: ", of which the first was read,"}
    among = among.get(type(images), "")
    lines += _describe_lost(images, among)
    conditions = images.conditions if isinstance(images, ImageCache) else None
    if conditions is not None:
        lines += _describe_lost(conditions, f" of the column {config.condition_column}")
    is_table = find_source(config).kind not in ("images", "arrays", "digits")
    # Beside other images they are no arrays of one type, and conditions must be arrays, too.
    are_deep = all(each.losses.get(LOWER_BITS) == _num_read(each) for each in (images, conditions or images))
    if are_deep and (is_table or _has_files(config, is_png) or _has_files(config, is_tiff)):
        lines.append("--preserve_input_precision reads 16 bits of color, as arrays")
    if any(loss.startswith("frames") for loss in images.losses) and _has_files(config, is_tiff):
        lines.append("--stack_axis 0 reads each page of a TIFF file as an image, --channel_axis 0 as a channel")
    return lines + _describe_range(config, images, among)


def _describe_lost(images: ImageCache | ImageStream | GivenImages, among: str) -> list[str]:
    """Return in lines what of images is clipped, and what is not read.

    Args:
        images: The images, or the conditions of some.
        among: Which images these are, for the lines.
    """
    lines = []
    if isinstance(images, ImageCache) and images.num_clipped:
        assert images.value_range is not None
        low, high, share = images.value_range.low, images.value_range.high, images.num_clipped / images.pixels.size
        lines.append(f"clipped: {images.num_clipped:,} values ({share:.2%}){among} lie outside of {low:g} to {high:g}")
    return lines + [f"not read in {n:,} images{among}: {loss}" for loss, n in sorted(images.losses.items())]


def _num_read(images: ImageCache | ImageStream | GivenImages) -> int:
    """Return how many images the losses were counted in, at most."""
    if isinstance(images, ImageStream):
        return NUM_FIRST_IMAGES if images.num_images is None else min(NUM_FIRST_IMAGES, images.num_images)
    return 1 if isinstance(images, GivenImages) else len(images)


def _has_files(config: DataConfig, is_of_kind: Callable[[Path], bool]) -> bool:
    """Return whether the source is a folder of files of one kind, which can be read as arrays."""
    source = find_source(config)
    if source.kind != "images" or source.folder is None:
        return False
    return all(map(is_of_kind, list_images(source.folder).images))


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


def describe_unread(config: DataConfig) -> str:
    """Return in words what of a folder of images is not read, or "" if all is."""
    source = find_source(config)
    if source.kind not in ("images", "arrays") or source.folder is None:
        return ""
    listed, metadata = list_images(source.folder), metadata_of(source, config)
    held_out = [split for split, path in source.splits.items() if path != source.folder]
    unread = [f"the folder {split!r}" for split in held_out]
    if source.splits:
        root = Path(config.dataset_name or config.train_data_dir or "").expanduser()
        starts = tuple(f"{path}{os.sep}" for path in source.splits.values())
        above = [path for path in files_below(root) if not str(path).startswith(starts)]
        num_beside = sum(is_image(path) for path in above)
        unread += [f"{num_beside:,} images beside the splits"] if num_beside else []
        read = set() if metadata is None else {*listed.metadata_files}
        files = [path for path in above if path.name in METADATA_NAMES and path.absolute() not in read]
        unread += [f"{path.name} beside the splits" for path in files]
    paired = Counter[str]()
    if metadata is not None and listed.images:  # files of arrays beside pictures or TIFF files
        named = _named_by_read_columns(config, metadata)
        paired.update(kind_of(path) for path in listed.arrays if str(path.absolute()) in named)
    unread += [f"{count:,} {kind}" for kind, count in sorted((listed.unread - paired).items())]
    if metadata is not None:
        unread += _unread_beside_metadata(config, metadata, listed.images or listed.arrays)
    elif source.kind == "arrays" and listed.metadata_files:
        unread.append("metadata, which of arrays are read for --condition_column only")
    return f"not read: {', '.join(unread)}" if unread else ""


def _unread_beside_metadata(config: DataConfig, metadata: Metadata, files: Sequence[Path]) -> list[str]:
    """Return in words which files of a folder its metadata leave out, and what the run leaves out of the metadata."""
    unread, paths = [], {str(path.absolute()) for path in files}
    columns, read = metadata.columns, _named_by_read_columns(config, metadata)
    for name in metadata.file_columns:
        if others := paths & {*columns[name]} - read:
            unread.append(f"{len(others):,} images of the column {name!r}")
    if unnamed := paths - metadata.named:
        unread.append(f"{len(unnamed):,} images that no row of the metadata names")
    if "split" in columns and {*columns["split"]} - {None}:
        unread.append("the column 'split' of the metadata (splits are folders)")
    return unread


def _named_by_read_columns(config: DataConfig, metadata: Metadata) -> set[str]:
    """Return the paths that the columns of the images and of their conditions name."""
    read = (column_of_files(metadata, config), config.condition_column)
    return {path for name in read if name is not None for path in metadata.columns.get(name, ())}


def _describe_held_out(config: DataConfig) -> str:
    """Return in words what `eval_fraction` holds out, or ""."""
    if config.eval_fraction is None:
        return ""
    parts = divide_training(config)
    groups = f" in {parts.num_groups:,} groups of {config.group_column!r}" if config.group_column else ""
    return f"{len(parts.held_out):,} more{groups} held out as the split {HELD_OUT_SPLIT!r}, {parts.share:.1%} of all"


def _describe_repeated(config: DataConfig) -> str:
    """Return in words how many rows of metadata name an image again, or ""."""
    metadata = metadata_of(find_source(config), config)
    if metadata is None:
        return ""
    names = filter(None, [column_of_files(metadata, config), config.condition_column])
    rows = [*zip(*(metadata.columns[name] for name in names), strict=True)]
    num_again = len(rows) - len({*rows})
    return f"{num_again:,} rows name an image again" if num_again else ""


def _describe_parts(config: DataConfig) -> list[str]:
    """Return a line for folders of which one is named as a split, and all are read."""
    source = find_source(config)
    if source.kind != "images" or source.folder is None or source.splits or config.label_column is not None:
        return []
    places = sorted({path.relative_to(source.folder).parts[0] for path in list_images(source.folder).images})
    folders = [name for name in places if (source.folder / name).is_dir()]
    named = [name for name in folders if split_kind(name) is not None]
    if not named:
        return []
    others = "folders" if len(folders) == len(places) else "images"
    return [f"read with all {others} beside it: the folder {named[0]!r}; --train_split {named[0]} reads it alone"]
