"""Images from measurements of them: y = A image + noise, for any linear A that is given as a function.

measurement    y: a small image, a blurred one, one with holes, or numbers of another kind
operator       A; `hf_ddpm.measurements` has some, and any linear function of torch will do
noise_std      the standard deviation of the noise in y, where pixels are in [0, 1]

Each step asks the network for x_0_hat, and moves it to the mean of the images that fit y; see `posterior_mean`.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hf_ddpm.editing import NUM_GRADIENTS, EditingPipeline
from hf_ddpm.guidance import Guidance
from hf_ddpm.measurements import Operator, measurements_to_tensor, project
from hf_ddpm.pipeline import ClassLabels, DDPMPipeline, _decode
from hf_ddpm.scheduler import is_tuned


@torch.no_grad()
def restore(
    pipeline: DDPMPipeline,
    measurement: Any,
    operator: Operator,
    noise_std: float = 0.0,
    num_inference_steps: int | None = None,
    generator: torch.Generator | list[torch.Generator] | None = None,
    output_type: str = "pil",
    class_labels: ClassLabels = None,
    guidance_scale: float | None = None,
    guidance_interval: tuple[float, float] | None = None,
    guidance: Guidance | None = None,
    num_gradients: int = NUM_GRADIENTS,
) -> Any:
    """Return images of which y = A image + N(0, noise_std^2 I) may be the measurement: samples of p(image | y).

    The pipeline samples from noise, and each step fits x_0_hat to y by moment matching (Rozet et al. 2024, arXiv
    2405.13712). Where A A^T is a multiple of the identity, as that of `mask` and `downsample`, and `noise_std` is 0,
    the measurement of each x_0_hat is y.

    Args:
        pipeline: The pipeline whose model knows what images look like. It samples as those of `hf_ddpm.editing`.
        measurement: y of B images: a floating-point tensor (B, ...) of any values. Where A gives images, PIL images
            and arrays (H, W, C) will do, uint8 or in [0, 1]. To get several samples, give y several times.
        operator: A, a function (B, C, H, W) -> (B, ...) of images in [0, 1] that is linear, measures each image of the
            batch alone, and is made of operations of torch, which have gradients.
        noise_std: The standard deviation of the noise in y, at least 0. Rounding to 8 bits is noise of about 0.001,
            which counts where A is as hard to invert as a blur. A model that was tuned for few steps takes 0 alone.
        num_inference_steps: The number of steps. None: 20 for a solver, T for `ddpm`, 4 for `lcm`, or what `use`
            chose.
        generator: The generator of all noise. A list of B generators gives each image its own.
        output_type: `pil`, `np` or `pt`.
        class_labels: For a model that is conditioned on classes, one class for all images or B of them.
        guidance_scale: See `DDPMPipeline.__call__`.
        guidance_interval: See `DDPMPipeline.__call__`.
        guidance: See `DDPMPipeline.__call__`.
        num_gradients: The gradients of each step, each about as costly as two evaluations. More of them fit y better.

    Returns:
        B images.

    Raises:
        ValueError: When an argument cannot work, before the first network evaluation.
    """
    _require_noise_std(noise_std)
    if isinstance(num_gradients, bool) or not isinstance(num_gradients, int) or num_gradients < 1:
        raise ValueError(f"num_gradients must be a whole number of at least 1, got {num_gradients!r}")
    if torch.is_inference_mode_enabled():
        raise ValueError("restore takes gradients, got a call within torch.inference_mode: use torch.no_grad instead")
    if noise_std > 0 and is_tuned(pipeline.scheduler.config):
        # Its x_0_hat is no mean of the images that x_t may come from, as moment matching takes it to be.
        raise ValueError(
            f"noise_std must be 0 for a model that was tuned for few steps, got {noise_std}: take the model before it "
            "was tuned"
        )
    editor = EditingPipeline.from_pipe(pipeline)
    with editor._editing_scheduler(num_inference_steps) as num_steps:
        device, shape = editor._execution_device, editor._image_shape()
        y = measurements_to_tensor(measurement, operator, shape, device)
        editor._check_inputs(len(y), generator, output_type, (), False)
        chosen = editor._guidance(guidance_scale, guidance_interval, guidance)
        conditions = editor._conditions(class_labels, len(y), device, chosen)
        # An image is (x_0 + 1) / 2, and A is linear: 2 y = A x_0 + A 1 + 2 noise.
        y = 2 * y - operator(torch.ones(1, *shape, device=device))
        fit = _unchanged if noise_std > 0 else partial(project, measurement=y, operator=operator)
        measured = editor._measured(conditions, y, operator, 2 * noise_std, num_gradients, fit)
        editor._set_timesteps(num_steps, None)
        x_T = editor._initial_noise(len(y), generator, None, device)
        x_0, _ = editor._denoise(x_T, measured, editor._step_arguments(generator, False), set(), None, ())
        images = _decode(x_0, output_type)
        editor.maybe_free_model_hooks()
        return images


def _unchanged(x_0_hat: Tensor) -> Tensor:
    return x_0_hat


def _require_noise_std(noise_std: Any) -> None:
    is_number = isinstance(noise_std, int | float) and not isinstance(noise_std, bool)
    if not is_number or not (math.isfinite(noise_std) and noise_std >= 0):
        raise ValueError(
            f"noise_std must be finite and at least 0, got {noise_std!r}: it is in the units of the measurement, "
            "whose images are in [0, 1]"
        )
