"""The conditions of images: the images that a model makes them from, beside the images themselves.

pair   an image of the data and its condition, both cropped alike: in the middle, or of a cache as `fixed_pixels` does
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_ddpm.condition import Condition
from hf_ddpm.conditional import enlarged, low_resolution
from hf_ddpm.data.batches import as_tensor, epoch_order, fixed_pixels, to_x_0
from hf_ddpm.data.cache import ImageCache
from hf_ddpm.data.labels import label_list, network_label
from hf_ddpm.data.planes import center_crop
from hf_ddpm.data.shards import ImageStream
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.value_range import Scale, ValueRange


@dataclass(frozen=True, eq=False)
class Pairs:
    """Images and their conditions.

    Args:
        images: (N, C, H, W) float32 in [0, 1].
        conditions: (N, C', H, W) float32 in [0, 1].
        labels: The label of each image, as a pipeline takes it; None without labels.
    """

    images: Tensor
    conditions: Tensor
    labels: list[Any] | None


def low_resolution_conditions(pixels: Tensor, factor: int, scale: Scale) -> Tensor:
    """Return the conditions of super-resolution: images in a low resolution, enlarged again.

    Args:
        pixels: Images as of `to_x_0`, (B, C, H, W); x_0 counts as an image of 8 bits.
        factor: The factor of super-resolution.
        scale: The largest value of a pixel, or the range of arrays.

    Returns:
        c, (B, C, H, W) float32 in [-1, 1].
    """
    height, width = pixels.shape[2:]
    if isinstance(scale, ValueRange):
        shares = scale.to_unit_interval(low_resolution(pixels, factor, scale))
        return 2 * enlarged(shares, height, width) - 1
    max_value = scale
    if pixels.is_floating_point():
        pixels = (pixels + 1) * (max_value / 2)
    low = low_resolution(pixels, factor, max_value)
    return to_conditions(enlarged(low, height, width, max_value), max_value)


def to_conditions(values: Tensor, scale: Scale) -> Tensor:
    """Return values in [0, max_value] or of a range, of any type, as conditions in [-1, 1], float32."""
    if isinstance(scale, ValueRange):
        return scale.to_x_0(values)
    return values.to(torch.float32) * (2 / scale) - 1


def with_conditions_of_model(images: ImageCache, condition: Condition | None, option: str, split: str) -> ImageCache:
    """Return the images of a split, of whose conditions -1 and 1 stand for what they do in a model.

    Args:
        images: The images; without conditions of a column they stay as they are.
        condition: What the model makes images from; None: from noise alone.
        option: The setting that names the split, for the message.
        split: The name of the split.

    Raises:
        UsageError: When they have other channels than those of the model, or another type.
    """
    conditions = images.conditions
    if conditions is None or condition is None or condition.super_resolution is not None:
        return images
    of_split, of_model = (
        f"{each.channels} channels of {'pictures' if each.value_range is None else each.value_range.dtype}"
        for each in (conditions, condition)
    )
    if of_split != of_model:
        raise UsageError(
            f"{option} must hold conditions like those of training, {of_model}, got {of_split} in {split!r}: save "
            "them in the same form"
        )
    if condition.value_range is None:
        return images
    return replace(images, conditions=conditions.in_range(condition.value_range))


def pairs_of(condition: Condition, images: Any, indices: np.ndarray) -> Pairs:
    """Return some images with their conditions, without noise.

    Args:
        condition: What the images are made from.
        images: An `ImageCache` or `GivenImages`.
        indices: Which of them, (N,).
    """
    if not isinstance(images, ImageCache):
        return _pairs_of_low_resolution(condition, images, [images.read(int(i)) for i in indices])
    labels = label_list(images, indices)
    pixels = as_tensor(fixed_pixels(images, indices))
    if condition.super_resolution is not None:
        conditions = low_resolution_conditions(pixels, condition.super_resolution, images.scale)
    else:
        assert images.conditions is not None
        of_column = images.conditions
        conditions = to_conditions(as_tensor(fixed_pixels(of_column, indices)), of_column.scale)
    return Pairs((to_x_0(pixels, images.scale) + 1) / 2, (conditions + 1) / 2, labels)


def example_pairs(condition: Condition, images: Any, count: int) -> Pairs:
    """Return the first `count` images, or all if there are fewer, with their conditions; see `pairs_of`.

    They are the first ones in the order of the seed 0, or of the files where only these tell an order.

    Args:
        condition: What the images are made from.
        images: An `ImageCache`, `GivenImages` or `ImageStream`.
        count: How many.
    """
    if isinstance(images, ImageStream):
        return _pairs_of_low_resolution(condition, images, images.first_images(count))
    return pairs_of(condition, images, epoch_order(0, 0, len(images))[:count])


def _pairs_of_low_resolution(
    condition: Condition, images: Any, read: Sequence[tuple[np.ndarray, int | None]]
) -> Pairs:
    """Return images that were read, with their classes, and the conditions that super-resolution makes of them."""
    assert condition.super_resolution is not None
    pixels = as_tensor(np.stack([center_crop(planes, images.size) for planes, _ in read]))
    conditions = low_resolution_conditions(pixels, condition.super_resolution, images.scale)
    labels = [network_label(np.asarray(label)) for _, label in read if label is not None] or None
    return Pairs((to_x_0(pixels, images.scale) + 1) / 2, (conditions + 1) / 2, labels)
