"""The images that a training step makes images from: the condition of each image, with noise if that was asked for."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hf_ddpm.condition import Condition
from hf_ddpm.data.cache import ImageCache
from hf_ddpm.data.conditions import low_resolution_conditions, to_conditions
from hf_ddpm.data.given import GivenImages
from hf_ddpm.image_size import require_factor
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.runtime.seeds import CONDITION, image_draws
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.run import Run


def condition_of(config: TrainingConfig, images: Any) -> Condition | None:
    """Return what the images of a run are made from; None: from noise alone.

    Raises:
        UsageError: When the factor of super-resolution does not divide the resolution, or all conditions are alike.
    """
    if config.super_resolution is not None:
        require_factor(config.super_resolution, images.size)
        return Condition(images.channels, super_resolution=config.super_resolution, noise=config.condition_noise)
    if config.condition_column is None:
        return None
    assert isinstance(images, ImageCache)
    of_column = images.conditions
    assert of_column is not None
    values = of_column.value_range
    if values is not None and not values.low < values.high:
        remedy = "name another column" if config.value_quantiles is None else "widen --value_quantiles"
        raise UsageError(
            f"condition_column must hold values that differ, got {values.low:g} for all of "
            f"{config.condition_column!r}: {remedy}"
        )
    return Condition(
        of_column.channels,
        column=config.condition_column,
        noise=config.condition_noise,
        value_range=values,
    )


def conditions_of_batch(run: Run, batch: dict[str, Any], pixels: Tensor) -> Tensor | None:
    """Return the condition of each image of a micro-batch, (B, C', H, W) in [-1, 1] but for noise.

    Args:
        run: The run.
        batch: The micro-batch, an item of `MicroBatches`.
        pixels: Its pixels, on the device of the run.

    Returns:
        None where images are made from noise alone.
    """
    if run.condition is None:
        return None
    if run.condition.super_resolution is not None:
        scale = run.images.scale
        if isinstance(run.images, GivenImages) and run.images.value_range is not None:
            # A low resolution has the type of the data, as the arrays that the model will be given.
            scale = run.images.value_range
            pixels = scale.from_x_0(pixels)
        conditions = low_resolution_conditions(pixels, run.condition.super_resolution, scale)
    else:
        assert isinstance(run.images, ImageCache)
        assert run.images.conditions is not None
        on_device = batch["conditions"].to(run.device, non_blocking=True)
        conditions = to_conditions(on_device, run.images.conditions.scale)
    if not run.condition.noise:
        return conditions
    return with_noise(conditions, run.config.seed, batch["positions"], run.condition.noise)


def with_noise(conditions: Tensor, seed: int, positions: Tensor, max_std: float) -> Tensor:
    """Add noise to conditions (Ho et al. 2021, Sec. 4, arXiv 2106.15282, Gaussian conditioning augmentation).

    ::

        c + s eps,  s = max_std u,  u ~ U[0, 1),  eps ~ N(0, I)

    The paper draws the level of noise at random, too, and tells it to the network. Here the network is not told: it
    sees it, and learns to trust a condition as far as that is clean. So conditions without noise are among those that
    it knows.

    Args:
        conditions: c, (B, C', H, W).
        seed: The seed; with the position it decides u and eps.
        positions: Where each image is in the endless stream, (B,) integers.
        max_std: The largest standard deviation, at least 0.
    """
    uniform, eps = image_draws(seed, positions, conditions.shape[1:], conditions.device, CONDITION)
    return conditions + max_std * uniform[:, None, None, None] * eps
