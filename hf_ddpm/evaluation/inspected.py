"""The images that are inspected for anomalies, as a model takes them, and what is known about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from hf_ddpm.data.cache import ImageCache
from hf_ddpm.data.config import DataConfig
from hf_ddpm.data.splits import describe_split, image_names
from hf_ddpm.evaluation.model_data import in_range_of_model
from hf_ddpm.image_size import format_size, to_resolution, to_size
from hf_ddpm.labels import describe_labels
from hf_ddpm.pipeline import DDPMPipeline
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.runtime.files import NETWORK_FOLDERS
from hf_ddpm.runtime.run_files import read_run, run_folder_of
from hf_ddpm.runtime.settings import did_you_mean
from hf_ddpm.sampling.loading import require_known_labels


@dataclass(frozen=True, eq=False)
class Inspected:
    """The images that are inspected.

    Attributes:
        images: The images.
        names: The name of each, which is a path in the folder of images.
        labels: The name of the class of each; None if nobody tells it.
        is_anomalous: Whether each is of a class that is not normal, (N,) bool; None if nobody tells it.
        class_labels: The class of each for a model with classes; None for others.
    """

    images: ImageCache
    names: list[str]
    labels: list[str] | None
    is_anomalous: np.ndarray | None
    class_labels: list[int] | None


def fit_to_model(data: DataConfig, pipeline: DDPMPipeline, folder: Path) -> DataConfig:
    """Return the settings of the data for images as the model's own are."""
    unet = pipeline.unet.config
    values = pipeline.value_range
    if values is None and unet.in_channels not in (1, 3, 4):
        raise UsageError(f"model must be one of images with 1, 3 or 4 channels, got {unet.in_channels}")
    if data.channels not in (None, unet.in_channels):
        raise UsageError(f"channels must be the model's, {unet.in_channels}, got {data.channels}: leave it out")
    own = _facts_of_training(folder)
    if values is not None:
        if data.value_range is not None:
            low, high = data.value_range
            raise UsageError(
                f"value_range must be left out for a model of arrays, which has its own ({values}), got {low:g} "
                f"{high:g}"
            )
        size = to_resolution(to_size(unet.sample_size, "sample_size"))
        # 16-bit color would be pictures without it.
        precision = True if values.dtype == "uint16" else data.preserve_input_precision
        random_crop = bool(own.get("random_crop"))
        return replace(data, resolution=size, random_crop=random_crop, preserve_input_precision=precision)
    return replace(
        data,
        resolution=to_resolution(to_size(unet.sample_size, "sample_size")),
        random_crop=bool(own.get("random_crop")),
        # Images with an alpha channel are not told from others by their own channels, which are 1 or 3.
        channels=4 if unet.in_channels == 4 else data.channels,
        value_range=data.value_range or own.get("value_range"),
        preserve_input_precision=None if own.get("max_value", 255) > 255 else False,
    )


def inspect(
    images: ImageCache, data: DataConfig, split: str, normal: Sequence[str], pipeline: DDPMPipeline, folder: Path
) -> Inspected:
    """Return the images with what is known about them, after checking that they fit the model."""
    images = in_range_of_model(images, pipeline.value_range, split)
    channels = pipeline.unet.config.in_channels
    if images.channels != channels:
        raise UsageError(
            f"the data must have the model's channels, {channels}, got {images.channels} in {images.name!r}: "
            f"--channels {channels} converts them"
        )
    if images.random_crop and not images.is_uniform:
        raise UsageError(
            f"the data must be images of {format_size(images.size)}, as the model knows crops of that size, without "
            f"resizing (random_crop), got larger ones in {images.name!r}: cut them into such tiles"
        )
    labels, is_anomalous = None, None
    if images.label_columns is not None:
        raise UsageError(
            f"label_column must be one column of classes, which are normal or not, got {data.label_column}: give "
            "another, or leave it out"
        )
    if images.labels is not None:
        names = _class_names(images)
        labels = [names[number] for number in images.labels.tolist()]
        is_anomalous = _find_anomalous(labels, names, normal) if normal else None
    return Inspected(
        images=images,
        names=image_names(data, split, images),
        labels=labels,
        is_anomalous=is_anomalous,
        class_labels=_classes_for(pipeline, images, labels),
    )


def _find_anomalous(labels: list[str], names: list[str], normal: Sequence[str]) -> np.ndarray:
    """Return whether each image is of a class that is not normal, (N,) bool."""
    chosen = []
    for each in normal:
        if each not in names and each.isdecimal() and int(each) < len(names):
            chosen.append(names[int(each)])
        elif each in names:
            chosen.append(each)
        else:
            shown = ", ".join([*names[:20], *["..."][: len(names) > 20]])
            raise UsageError(f"normal must be classes of the data, {shown}, got {each!r}{did_you_mean(each, names)}")
    is_anomalous = ~np.isin(labels, chosen)
    if is_anomalous.all() or not is_anomalous.any():
        kind = "anomalous" if is_anomalous.all() else "normal"
        raise UsageError(
            f"normal must leave normal and anomalous images, got {', '.join(normal)}, by which all {len(labels):,} "
            f"images are {kind}: there is no AUROC; name other classes, or leave normal out"
        )
    return is_anomalous


def _classes_for(pipeline: DDPMPipeline, images: ImageCache, labels: list[str] | None) -> list[int] | None:
    """Return the class of each image in the model's numbers; None if they are reconstructed without a class.

    A model that was trained with `class_dropout` does without where it does not know the class of each image.
    """
    classes = pipeline.classes
    if classes is None and pipeline.labels is not None:
        if pipeline.labels.has_unconditional:
            return None
        raise UsageError(
            f"the model must do without a label, got one that needs {describe_labels(pipeline.labels)}: take a model "
            "that was trained without labels, with classes, or with class_dropout"
        )
    if classes is None:
        require_known_labels(pipeline)
        return None
    if labels is None:
        if classes.has_unconditional:
            return None
        raise UsageError(
            f"label_column must name the class of each image, which a model of {len(classes)} classes needs, got "
            "none: give --label_column, or a model that was trained without classes, or with class_dropout"
        )
    names = classes.names if classes.is_named else _class_names(images)[: len(classes)]
    number_of = {name: number for number, name in enumerate(names)}
    unknown = sorted({*labels} - number_of.keys())
    if unknown and classes.has_unconditional:
        return None
    if unknown:
        raise UsageError(
            f"the model must know the class of each image, got {unknown[0]!r}, which is none of its {len(classes)}: "
            "leave these images out, or take a model that was trained without classes, or with class_dropout"
        )
    return [number_of[label] for label in labels]


def _facts_of_training(folder: Path) -> dict[str, Any]:
    """Return what a run recorded of its images, for the model in `folder`; empty where no run did."""
    facts: dict[str, Any] = read_run(run_folder_of(folder.parent if folder.name in NETWORK_FOLDERS else folder)).get(
        "data", {}
    )
    return facts


def _class_names(images: ImageCache) -> list[str]:
    """Return the names of the classes of labeled images; numbers where the data do not tell them."""
    return images.class_names or [str(number) for number in range(images.num_classes or 0)]


def describe_inspected(data: DataConfig, split: str, images: ImageCache) -> list[str]:
    """Return what is read of a split, and what is not, in lines."""
    oblong = [] if images.is_uniform else ["of images of another shape the middle is scored"]
    return [*describe_split(data, split, images), *oblong]
