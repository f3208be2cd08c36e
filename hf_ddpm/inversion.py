"""The noise that an image comes from, and the images between two noises.

DDIM        x_s = sqrt(alpha_bar_s) x_0_hat + sqrt(1 - alpha_bar_s) eps_hat for the next timestep s of the list; no
        noise is added, so that x_T decides the image (Song et al. 2021, arXiv 2010.02502, Eq. 12 with sigma = 0)
inversion   the same list from its end: x_0 -> x_T
slerp       the way from one noise to another on a great circle, on which the noise keeps its norm
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hf_ddpm.image_inputs import images_to_tensor
from hf_ddpm.pipeline import DDPMPipeline
from hf_ddpm.prediction import Conditions
from hf_ddpm.scheduler import DDPMScheduler, as_our_scheduler, is_tuned

# Up to this angle between two vectors, in radians, the straight line and the arc are the same within float64.
_SMALLEST_ANGLE = 1e-6


@torch.no_grad()
def invert(
    pipeline: DDPMPipeline,
    image: Image.Image | np.ndarray | Tensor | Sequence[Any],
    num_inference_steps: int = 50,
    class_labels: Any = None,
    num_iterations: int = 3,
) -> Tensor:
    """Return the noise x_T from which DDIM makes given images.

    It goes over DDIM's own timesteps from the last to the first. Each step solves that of DDIM, from t to s, for x_t::

        x_t = sqrt(alpha_bar_t / alpha_bar_s) (x_s - sqrt(1 - alpha_bar_s) eps_hat(x_t, t))
              + sqrt(1 - alpha_bar_t) eps_hat(x_t, t)

    x_t stands on both sides. The first iteration puts x_s in its place on the right, which is DDIM inversion as it is
    usually done. Further ones put in the last result (Pan et al. 2023, arXiv 2309.04907).

    Args:
        pipeline: A pipeline whose model DDIM can sample.
        image: B images of the model's size: PIL images, arrays (H, W, C) or tensors (C, H, W), uint8 or in [0, 1].
        num_inference_steps: The number of steps, which `reconstruct` must be given, too.
        class_labels: One class for all images or B of them, if the model has classes.
        num_iterations: Evaluations of the network for each step.

    Returns:
        x_T, (B, C, H, W), what `DDPMPipeline.__call__` takes as `latents`.

    Raises:
        ValueError: When an argument cannot work.
    """
    if not isinstance(num_iterations, int) or num_iterations < 1:
        raise ValueError(f"num_iterations must be a whole number of at least 1, got {num_iterations!r}")
    with _using_ddim(pipeline, num_inference_steps) as num_steps:
        device = pipeline._execution_device
        x_s = images_to_tensor(image, *pipeline._image_shape()).to(device) * 2 - 1
        pipeline._check_inputs(len(x_s), None, "pt", ("latents",), False)
        conditions = pipeline._conditions(class_labels, len(x_s), device)
        pipeline._set_timesteps(num_steps, None)
        timesteps = pipeline.scheduler.timesteps
        ours = as_our_scheduler({**pipeline.scheduler.config, "variance_type": None})
        of_x_0 = as_our_scheduler({**ours.config, "prediction_type": "sample"})
        alpha_bar = [1.0, *(float(ours.alpha_bar[t]) for t in timesteps.flip(0))]
        for t, (alpha_bar_s, alpha_bar_t) in zip(timesteps.flip(0), pairwise(alpha_bar), strict=True):
            x_t, ratio = x_s, math.sqrt(alpha_bar_t / alpha_bar_s)
            for _ in range(num_iterations):
                eps_hat = _predict_noise(pipeline, x_t, t, conditions, ours, of_x_0)
                x_t = ratio * x_s + (math.sqrt(1 - alpha_bar_t) - ratio * math.sqrt(1 - alpha_bar_s)) * eps_hat
            x_s = x_t
        pipeline.maybe_free_model_hooks()
        return x_s


def reconstruct(
    pipeline: DDPMPipeline,
    latents: Tensor,
    num_inference_steps: int = 50,
    class_labels: Any = None,
    output_type: str = "pil",
) -> Any:
    """Return the images that DDIM makes of noise.

    Args:
        pipeline: A pipeline whose model DDIM can sample.
        latents: x_T, (B, C, H, W), from `invert` or `slerp`, or of one's own.
        num_inference_steps: The number of steps, that of `invert`.
        class_labels: One class for all images or B of them, if the model has classes.
        output_type: `pil`, `np` or `pt`.

    Raises:
        ValueError: When an argument cannot work.
    """
    with _using_ddim(pipeline, num_inference_steps) as num_steps:
        plain = DDPMPipeline.from_pipe(pipeline)  # `pipeline` may be one that edits, whose call takes other arguments
        (images,) = plain(
            len(latents),
            num_inference_steps=num_steps,
            output_type=output_type,
            return_dict=False,
            class_labels=class_labels,
            latents=latents,
        )
        return images


def reconstruction_error(
    pipeline: DDPMPipeline,
    image: Image.Image | np.ndarray | Tensor | Sequence[Any],
    num_inference_steps: int = 50,
    class_labels: Any = None,
    num_iterations: int = 3,
) -> Tensor:
    """Return how far images are from what comes of them by `invert` and `reconstruct`.

    Returns:
        The root of the mean squared difference of pixels in [0, 1], (B,).
    """
    latents = invert(pipeline, image, num_inference_steps, class_labels, num_iterations)
    images = reconstruct(pipeline, latents, num_inference_steps, class_labels, "pt").cpu()
    given = images_to_tensor(image, *pipeline._image_shape())
    return (images - given).square().mean(dim=(1, 2, 3)).sqrt()


def interpolate(
    pipeline: DDPMPipeline,
    start: Any,
    end: Any,
    num_images: int = 8,
    num_inference_steps: int = 50,
    class_labels: Any = None,
    output_type: str = "pil",
) -> Any:
    """Return images on the way from one image to another, or from the image of one seed to that of another.

    Args:
        pipeline: A pipeline whose model DDIM can sample.
        start: An image, which `invert` makes noise of, or a whole number, the seed of the noise.
        end: As `start`.
        num_images: The number of images, `start` and `end` among them.
        num_inference_steps: The number of steps.
        class_labels: One class for all images, if the model has classes.
        output_type: `pil`, `np` or `pt`.

    Returns:
        The images, in order. The first and the last are those that DDIM makes of the two noises.

    Raises:
        ValueError: When an argument cannot work.
    """
    if not isinstance(num_images, int) or num_images < 2:
        raise ValueError(f"num_images must be a whole number of at least 2, got {num_images!r}")
    first, last = (_noise_of(pipeline, each, num_inference_steps, class_labels) for each in (start, end))
    latents = torch.cat([slerp(first, last, i / (num_images - 1)) for i in range(num_images)])
    return reconstruct(pipeline, latents, num_inference_steps, class_labels, output_type)


def slerp(start: Tensor, end: Tensor, fraction: float) -> Tensor:
    """Return what lies between two vectors on the arc between them (Shoemake 1985).

    With the angle theta between x and y::

        sin((1 - f) theta) / sin(theta) x + sin(f theta) / sin(theta) y

    Vectors of one norm keep it. Parallel vectors have no angle, and are joined by a straight line.

    Args:
        start: x, (B, ...): B vectors.
        end: y, (B, ...).
        fraction: f in [0, 1]; 0 gives x, and 1 gives y.

    Returns:
        The vectors, (B, ...), in the type of `start`.

    Raises:
        ValueError: When the shapes differ, f is not in [0, 1], or two vectors are opposite, between which no arc is
            the shortest.
    """
    if start.shape != end.shape:
        raise ValueError(f"start and end must have one shape, got {tuple(start.shape)} and {tuple(end.shape)}")
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction must be in [0, 1], got {fraction}")
    if fraction in (0, 1):
        return (start, end)[int(fraction)].clone()
    device = torch.device("cpu") if start.device.type == "mps" else start.device  # which has no float64
    x, y = (each.to(device, torch.float64).flatten(1) for each in (start, end))
    x_unit, y_unit = (each / each.norm(dim=1, keepdim=True).clamp(min=1e-300) for each in (x, y))
    # Unlike acos of their inner product, this is exact for small angles, too (Kahan).
    difference, total = ((x_unit + sign * y_unit).norm(dim=1, keepdim=True) for sign in (-1, 1))
    theta = 2 * torch.atan2(difference, total)
    if bool((theta > math.pi - _SMALLEST_ANGLE).any()):
        raise ValueError("start and end must not be opposite, got vectors with an angle of pi: choose another end")
    is_parallel = theta < _SMALLEST_ANGLE
    angle = torch.where(is_parallel, 1.0, theta)
    weight_x = torch.where(is_parallel, 1 - fraction, ((1 - fraction) * angle).sin() / angle.sin())
    weight_y = torch.where(is_parallel, fraction, (fraction * angle).sin() / angle.sin())
    return (weight_x * x + weight_y * y).view(start.shape).to(start)


@contextmanager
def _using_ddim(pipeline: DDPMPipeline, num_inference_steps: int) -> Iterator[int]:
    """Let a pipeline sample by DDIM for the duration of a `with` block, and give the number of steps."""
    if is_tuned(pipeline.scheduler.config):
        raise ValueError(
            "pipeline must have a model that DDIM can sample, got one that was tuned for few steps, which add noise: "
            "take the model before it was tuned"
        )
    chosen = pipeline.sampler, pipeline._scheduler_of_sampler
    try:
        pipeline.use("ddim", num_inference_steps)
        with pipeline._sampling_scheduler(num_inference_steps) as num_steps:
            yield num_steps
    finally:
        pipeline.sampler, pipeline._scheduler_of_sampler = chosen


def _predict_noise(
    pipeline: DDPMPipeline, x_t: Tensor, t: Tensor, conditions: Conditions, ours: DDPMScheduler, of_x_0: DDPMScheduler
) -> Tensor:
    """Return the noise that DDIM sees in x_t: that beside x_0_hat, which is clipped where DDIM clips it."""
    output = pipeline._predict(x_t, t, conditions)
    x_0_hat = ours.predict_original(output, x_t, t)
    if ours.config.thresholding:
        x_0_hat = pipeline.scheduler._threshold_sample(x_0_hat)
    return of_x_0.predict_noise(x_0_hat, x_t, t)


def _noise_of(pipeline: DDPMPipeline, start: Any, num_inference_steps: int, class_labels: Any) -> Tensor:
    """Return the noise of a seed or an image, (1, C, H, W)."""
    if not isinstance(start, int):
        return invert(pipeline, start, num_inference_steps, class_labels)[:1]
    generator = torch.Generator("cpu").manual_seed(start)
    return pipeline._draw_noise(1, generator, pipeline._execution_device)
