"""The images of an evaluation, opened and checked, and the labels of its samples."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np

from hf_ddpm.classes import Classes
from hf_ddpm.conditional import ConditionalDDPMPipeline
from hf_ddpm.data.batches import epoch_order, fixed_pixels
from hf_ddpm.data.cache import ImageCache
from hf_ddpm.data.conditions import Pairs, example_pairs
from hf_ddpm.data.labels import label_list, with_network_labels
from hf_ddpm.evaluation.comparison import Comparison
from hf_ddpm.evaluation.likelihood import inclusion_probabilities
from hf_ddpm.evaluation.memorization import MIN_SAMPLES
from hf_ddpm.evaluation.model_data import Splits
from hf_ddpm.evaluation.request import Request
from hf_ddpm.pipeline import DDPMPipeline
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.sampling.loading import require_known_labels
from hf_ddpm.sampling.sampler import labels_in_turn
from hf_ddpm.scheduler import DDPMScheduler

MEMORIZATION_QUANTILE = 0.01


def choose_labels(pipeline: DDPMPipeline, splits: Splits, request: Request) -> tuple[list[Any] | None, str | None]:
    """Choose a label for each sample of a model with labels: those of the data in a random order, or each in turn.

    Returns:
        The labels as the pipeline takes them, and in words how they were chosen; None and None for a model without.
    """
    labels, num_images, split = pipeline.labels, request.num_images, request.split
    if labels is not None and not isinstance(labels, Classes):
        if not splits.has_labels:
            return labels_in_turn(labels, range(request.seed, request.seed + num_images)), "each in turn"
        images = with_network_labels(splits.open(split, is_labeled=True), labels)
        order = np.resize(epoch_order(0, 0, len(images)), num_images)
        return label_list(images, order), f"as in {split}"
    classes = labels
    if classes is None:
        require_known_labels(pipeline)
        return None, None
    num_classes = len(classes)
    if not splits.has_labels:
        if num_images < num_classes:
            raise UsageError(f"num_images must be at least {num_classes}, as many as classes, got {num_images}")
        return labels_in_turn(classes, range(request.seed, request.seed + num_images)), "each in turn"
    images = splits.open(split, is_labeled=True)
    assert images.labels is not None
    if images.num_classes != num_classes:
        raise UsageError(f"the data must have the model's {num_classes} classes, got {images.num_classes} in {split}")
    names = tuple(images.class_names or classes.names)
    if classes.is_named and names != classes.names:
        raise UsageError(f"the data must have the model's classes, {classes.names}, in this order, got {names}")
    counts = np.bincount(images.labels, minlength=num_classes)
    if not counts.all():
        name = names[int(counts.argmin())]
        raise UsageError(f"each class must have images in {split}, got none of {name!r}")
    order = epoch_order(0, 0, len(images))
    return images.labels[np.resize(order, num_images)].tolist(), f"as in {split}"


def reference_labels(
    request: Request, comparison: Comparison | None, splits: Splits, has_classes: bool
) -> np.ndarray | None:
    """Return the class of each image whose features the reference keeps, if it was made of the model's own data."""
    has_labels = has_classes and request.reference is None and splits.has_labels
    if not has_labels or comparison is None or comparison.reference is None:
        return None
    labels = splits.open(request.split, is_labeled=True).labels
    assert labels is not None
    return labels[epoch_order(0, 0, len(labels))][: len(comparison.reference.features)]


def num_terms(request: Request, scheduler: DDPMScheduler) -> int:
    """Return K, the number of terms of the bound for each image."""
    given = request.timesteps_per_image
    return min(20, len(scheduler)) if given is None else given


def open_images(
    request: Request, pipeline: DDPMPipeline, splits: Splits
) -> tuple[ImageCache | None, ImageCache | None]:
    """Return the held-out images and those of training, as far as nll and memorization need them."""
    held_out = training = None
    if "nll" in request.metrics:
        inclusion_probabilities(pipeline.scheduler, num_terms(request, pipeline.scheduler))
        held_out = _open_held_out(request, pipeline, splits, "the nll of a model of labels")
        if len(held_out) < 2 or request.num_images < 2:
            raise UsageError(f"nll needs 2 images or more, got {min(len(held_out), request.num_images)}")
        if held_out.labels is not None and pipeline.classes is not None:
            _check_class_names(held_out, splits.open(request.split, is_labeled=True), request)
        held_out = with_network_labels(held_out, pipeline.labels)
    if "memorization" in request.metrics:
        training = splits.open(request.split)
        held_out = held_out or splits.open(request.test_split, "test_split")
        _check_memorization(training, held_out, request.num_images)
    return held_out, training


def open_pairs(request: Request, pipeline: ConditionalDDPMPipeline, splits: Splits) -> tuple[ImageCache, Pairs]:
    """Return the held-out images, and as many of them as are asked for with their conditions."""
    images = _open_held_out(request, pipeline, splits, "a model of labels")
    images = with_network_labels(images, pipeline.labels)
    condition = pipeline.condition
    if condition.super_resolution is None and images.conditions is None:
        raise UsageError("condition_column must name the images that the model makes images from: --condition_column")
    return images, example_pairs(condition, images, request.num_images)


def _open_held_out(request: Request, pipeline: DDPMPipeline, splits: Splits, purpose: str) -> ImageCache:
    """Return the images of the test split, with labels if the model has labels."""
    has_labels = pipeline.labels is not None
    images = splits.open(request.test_split, "test_split", is_labeled=has_labels)
    if has_labels and images.labels is None:
        raise UsageError(f"label_column must name the labels for {purpose}: --label_column")
    return images


def _check_class_names(held_out: ImageCache, training: ImageCache, request: Request) -> None:
    """Check that the classes of the test split are those of training."""
    if held_out.class_names != training.class_names or held_out.num_classes != training.num_classes:
        raise UsageError(
            f"the classes of {request.test_split} must be those of {request.split}, got {held_out.class_names} and "
            f"{training.class_names}"
        )


def _check_memorization(training: ImageCache, held_out: ImageCache, num_images: int) -> None:
    """Check what `memorization` would refuse only after sampling."""
    least_held_out = math.ceil(1 / MEMORIZATION_QUANTILE) - 1
    if num_images < MIN_SAMPLES:
        raise UsageError(f"num_images must be at least {MIN_SAMPLES} for memorization, got {num_images}")
    if len(held_out) < least_held_out:
        raise UsageError(f"memorization needs at least {least_held_out} held-out images, got {len(held_out)}")
    digests = {hashlib.sha256(image.tobytes()).digest() for image in fixed_pixels(training)}
    num_same = sum(hashlib.sha256(image.tobytes()).digest() in digests for image in fixed_pixels(held_out))
    if num_same >= math.floor(MEMORIZATION_QUANTILE * (len(held_out) + 1) + 1e-9):
        raise UsageError(
            f"held-out images must not be training images, got {num_same} of {len(held_out)} that are: remove them"
        )
