"""The pipelines that edit images with a model that was trained without any thought of it.

    image to image   noise an image to x_t, and denoise it from there: SDEdit (Meng et al. 2022, arXiv 2108.01073)
    inpainting       fill the white part of a mask so that it fits the rest, which stays as it is; see `inpainting`
    strength         the share of the steps that are taken: with strength s, the last s n of n steps

Both sample as the commands do, in 20 steps of UniPC, or of a model that was tuned for few steps in 4 of LCM, unless
`use` or another scheduler says otherwise. They are saved as the `DDPMPipeline` that they were made from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from diffusers import LCMScheduler
from PIL import Image
from torch import Tensor

from hf_ddpm.guidance import Guidance
from hf_ddpm.image_inputs import images_to_tensor, masks_to_tensor
from hf_ddpm.inpainting import METHODS, repaint_levels
from hf_ddpm.measurements import Operator, posterior_mean
from hf_ddpm.pipeline import (
    ClassLabels,
    Conditions,
    DDPMPipeline,
    DDPMPipelineOutput,
    StepCallback,
    _decode,
    as_output_type,
)
from hf_ddpm.runtime.settings import require_choice
from hf_ddpm.scheduler import DDPMScheduler, as_our_scheduler, is_tuned
from hf_ddpm.solvers import Sampler

# The schedulers whose x_t has the scale of `add_noise`, whose timesteps are whole numbers, and which can begin in the
# middle of their list.
EDITING_SCHEDULERS = (
    *("DDIMParallelScheduler", "DDIMScheduler", "DDPMParallelScheduler", "DDPMScheduler", "DEISMultistepScheduler"),
    *("DPMSolverMultistepScheduler", "LCMScheduler", "UniPCMultistepScheduler"),
)
# What RePaint's authors use (Lugmayr et al. 2022, Sec. 5.1).
REPAINT_STEPS = 250
# The gradients of each step of `posterior`.
NUM_GRADIENTS = 2


@dataclass(frozen=True, kw_only=True)
class MeasuredConditions(Conditions):
    """The conditions of a network for images of which a linear measurement is given.

    Args:
        measurement: y, (B, ...), of x_0 in [-1, 1].
        operator: A.
        noise_std: sigma_y, in the units of x_0.
        num_gradients: See `posterior_mean`; with 0, `fit` is all.
        fit: What each x_0_hat is put through in the end.
        scheduler: The formulas of the model's prediction.
        scheduler_of_x_0: The same for a prediction of x_0.
    """

    measurement: Tensor
    operator: Operator
    noise_std: float
    num_gradients: int
    fit: Callable[[Tensor], Tensor]
    scheduler: DDPMScheduler
    scheduler_of_x_0: DDPMScheduler


class EditingPipeline(DDPMPipeline):
    """The base of the pipelines of this module, which `restoration` uses, too."""

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Save the pipeline as the plain `DDPMPipeline` that it was made from."""
        DDPMPipeline.from_pipe(self).save_pretrained(*args, **kwargs)

    @contextmanager
    def _editing_scheduler(self, num_inference_steps: int | None, default: Sampler | None = None) -> Iterator[int]:
        """Put the scheduler of this call in the place of the pipeline's own, and give the number of steps.

        Args:
            num_inference_steps: The number of steps of the call, if it gives one.
            default: How to sample where neither `use` nor a scheduler of another class says it; None: by `use()`.
        """
        chosen = self.sampler, self._scheduler_of_sampler
        is_chosen = self.sampler is not None and self.scheduler is self._scheduler_of_sampler
        if not is_chosen and isinstance(self.scheduler, DDPMScheduler | LCMScheduler):
            self.use(default and default.scheduler, num_inference_steps or (default and default.num_inference_steps))
        try:
            with self._sampling_scheduler(num_inference_steps) as num_steps:
                name = type(self.scheduler).__name__
                if name not in EDITING_SCHEDULERS:
                    # A network that was trained by flow matching has no schedule of betas that a solver could take.
                    has_betas = "beta_schedule" in self.scheduler.config
                    remedy = "call use('unipc') before" if has_betas else "load a model with a beta_schedule"
                    raise ValueError(f"scheduler must be one that edits images, got {name}: {remedy}")
                yield num_steps
        finally:
            self.sampler, self._scheduler_of_sampler = chosen

    def _begin(self, num_steps: int, strength: float) -> int:
        """Set the list of timesteps, and return the index of the one that `strength` begins at.

        It is that of diffusers' pipelines for images, but there is always a step to take.
        """
        self._set_timesteps(num_steps, None)
        begin = first_index(self, self.scheduler, strength, num_steps)
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(begin)
        return begin

    def _noised(self, x_0: Tensor, generator: Any, begin: int) -> Tensor:
        """Return x_t at the timestep with the index `begin`, (B, C, H, W)."""
        noise = self._draw_noise(len(x_0), generator, x_0.device)
        t = self.scheduler.timesteps[begin].to(x_0.device)
        return self.scheduler.add_noise(x_0, noise, t.expand(len(x_0)))

    def _measured(
        self,
        conditions: Conditions,
        measurement: Tensor,
        operator: Operator,
        noise_std: float,
        num_gradients: int,
        fit: Callable[[Tensor], Tensor],
    ) -> MeasuredConditions:
        """Return conditions of a network whose images were measured, too; see `MeasuredConditions`."""
        config = {**self.scheduler.config, "variance_type": None}
        return MeasuredConditions(
            **{field.name: getattr(conditions, field.name) for field in fields(conditions)},
            measurement=measurement,
            operator=operator,
            noise_std=noise_std,
            num_gradients=num_gradients,
            fit=fit,
            scheduler=as_our_scheduler(config),
            scheduler_of_x_0=as_our_scheduler({**config, "prediction_type": "sample"}),
        )

    def _predict(self, network_input: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """Return the network's output with x_0_hat changed to fit the measurement, if there is any."""
        if not isinstance(conditions, MeasuredConditions):
            return super()._predict(network_input, t, conditions)
        given, channels, step = conditions, network_input.shape[1], t.long()
        with torch.set_grad_enabled(given.num_gradients > 0):
            x_t = network_input.clone().requires_grad_(given.num_gradients > 0)
            output = super()._predict(x_t, t, given)
            x_0_hat = given.scheduler.predict_original(output, x_t, step)
            if given.scheduler.config.clip_sample:
                limit = given.scheduler.config.clip_sample_range
                # The derivative stays that of the network's own estimate.
                x_0_hat = x_0_hat + (x_0_hat.clamp(-limit, limit) - x_0_hat).detach()
        if given.num_gradients > 0:
            alpha_bar = float(given.scheduler.alpha_bar[step.cpu()])
            measured = given.measurement, given.operator, given.noise_std
            x_0_hat = posterior_mean(x_0_hat, x_t, *measured, alpha_bar, given.num_gradients)
        x_0_hat = given.fit(x_0_hat)
        # The noise that goes with it: x_t stays what it is.
        eps_hat = given.scheduler_of_x_0.predict_noise(x_0_hat, x_t.detach(), step)
        prediction = given.scheduler.training_target(x_0_hat, eps_hat, step)
        return torch.cat([prediction, output[:, channels:].detach()], dim=1)

    def _output(self, images: Any, return_dict: bool) -> DDPMPipelineOutput | tuple:
        self.maybe_free_model_hooks()
        return DDPMPipelineOutput(images=images) if return_dict else (images,)


class DDPMImg2ImgPipeline(EditingPipeline):
    """A pipeline that draws images that resemble given ones.

    `DDPMImg2ImgPipeline.from_pipe(pipeline)` makes one of a `DDPMPipeline`, and `from_pretrained` loads one from
    wherever a `DDPMPipeline` is. The arguments and attributes are those of `DDPMPipeline`.
    """

    @torch.no_grad()
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        image: Image.Image | np.ndarray | Tensor | Sequence[Any],
        strength: float = 0.5,
        num_inference_steps: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        class_labels: ClassLabels = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        guidance: Guidance | None = None,
    ) -> DDPMPipelineOutput | tuple:
        """Noise images to the timestep that `strength` names, and denoise them from there: SDEdit.

        Args:
            image: B images of the model's size: PIL images, arrays (H, W, C) or tensors (C, H, W), uint8 or in [0, 1].
            strength: In (0, 1]. Near 0 the images come back almost as they are. With 1 nearly nothing of them is left.
            num_inference_steps: n, of which the last `strength` n are taken, but at least one. None: 20 for a solver,
                T for `ddpm`, 4 for `lcm`, or what `use` chose.
            generator: The generator of all noise. A list of B generators gives each image its own; the result then
                depends on its batch by rounding alone.
            output_type: `pil`, `np` or `pt`.
            return_dict: Return a `DDPMPipelineOutput` rather than a tuple.
            class_labels: For a model that is conditioned on classes, one class for all images or B of them.
            callback_on_step_end: See `DDPMPipeline.__call__`.
            callback_on_step_end_tensor_inputs: See `DDPMPipeline.__call__`.
            guidance_scale: See `DDPMPipeline.__call__`.
            guidance_interval: See `DDPMPipeline.__call__`.
            guidance: See `DDPMPipeline.__call__`.

        Returns:
            A `DDPMPipelineOutput`, or the tuple (images,).

        Raises:
            ValueError: When an argument cannot work, before the first network evaluation.
        """
        require_strength(strength)
        with self._editing_scheduler(num_inference_steps) as num_steps:
            device = self._execution_device
            x_0 = images_to_tensor(image, *self._image_shape()).to(device) * 2 - 1
            batch_size = len(x_0)
            self._check_inputs(batch_size, generator, output_type, callback_on_step_end_tensor_inputs, False)
            guidance = self._guidance(guidance_scale, guidance_interval, guidance)
            conditions = self._conditions(class_labels, batch_size, device, guidance)
            begin = self._begin(num_steps, strength)
            x_0, _ = self._denoise(
                self._noised(x_0, generator, begin),
                conditions,
                self._step_arguments(generator, False),
                set(),
                callback_on_step_end,
                callback_on_step_end_tensor_inputs,
                begin,
            )
            return self._output(_decode(x_0, output_type), return_dict)


class DDPMInpaintPipeline(EditingPipeline):
    """A pipeline that fills a part of images so that it fits the rest.

    `DDPMInpaintPipeline.from_pipe(pipeline)` makes one of a `DDPMPipeline`, and `from_pretrained` loads one from
    wherever a `DDPMPipeline` is. The arguments and attributes are those of `DDPMPipeline`.
    """

    @torch.no_grad()
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        image: Image.Image | np.ndarray | Tensor | Sequence[Any],
        mask_image: Image.Image | np.ndarray | Tensor | Sequence[Any],
        strength: float = 1.0,
        num_inference_steps: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        class_labels: ClassLabels = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        guidance: Guidance | None = None,
        method: str = "posterior",
        jump_length: int = 10,
        jump_n_sample: int = 10,
    ) -> DDPMPipelineOutput | tuple:
        """Repaint the white part of masks, and keep the black part, bit for bit.

        By method, with n steps, and the cost of a gradient being about that of two evaluations::

            posterior   the default: each step pulls the whole image to fit what is known; 1 evaluation, 2 gradients
            replace     each step only puts what is known in its place; 1 evaluation, and fills that fit worse
            repaint     RePaint, which goes back and forth; for `ddpm` only, about 10 evaluations for each of 250 steps

        Args:
            image: B images of the model's size: PIL images, arrays (H, W, C) or tensors (C, H, W), uint8 or in [0, 1].
            mask_image: One mask for all images, or B of them, in the same forms with one channel, or bool. What is at
                least 0.5 is white.
            strength: In (0, 1]. With 1 nothing of what is under the white part counts; with less it is repainted in
                the manner of `DDPMImg2ImgPipeline`.
            num_inference_steps: n. None: 20 for a solver, T for `ddpm`, 4 for `lcm`, 250 for `repaint`, or what `use`
                chose.
            generator: See `DDPMImg2ImgPipeline`.
            output_type: `pil`, `np` or `pt`.
            return_dict: Return a `DDPMPipelineOutput` rather than a tuple.
            class_labels: For a model that is conditioned on classes, one class for all images or B of them.
            callback_on_step_end: See `DDPMPipeline.__call__`.
            callback_on_step_end_tensor_inputs: See `DDPMPipeline.__call__`.
            guidance_scale: See `DDPMPipeline.__call__`.
            guidance_interval: See `DDPMPipeline.__call__`.
            guidance: See `DDPMPipeline.__call__`.
            method: `posterior`, `replace` or `repaint`.
            jump_length: For `repaint`: how many steps a jump goes back, fewer than n.
            jump_n_sample: For `repaint`: how often each part is denoised.

        Returns:
            A `DDPMPipelineOutput`, or the tuple (images,).

        Raises:
            ValueError: When an argument cannot work, before the first network evaluation.
        """
        require_strength(strength)
        require_choice("method", method, METHODS)
        is_repaint = method == "repaint"
        if is_repaint:
            _require_jumps(jump_length, jump_n_sample, strength)
        default = None
        if is_repaint and not is_tuned(self.scheduler.config):
            default = Sampler("ddpm", min(REPAINT_STEPS, self.scheduler.config.num_train_timesteps))
        with self._editing_scheduler(num_inference_steps, default) as num_steps:
            device, shape = self._execution_device, self._image_shape()
            given = images_to_tensor(image, *shape).to(device)
            is_known = ~masks_to_tensor(mask_image, len(given), *shape[1:]).to(device)
            self._check_inputs(len(given), generator, output_type, callback_on_step_end_tensor_inputs, False)
            self._check_method(method, num_steps, jump_length)
            guidance = self._guidance(guidance_scale, guidance_interval, guidance)
            conditions = self._conditions(class_labels, len(given), device, guidance)
            # What is under the white part must not show through, as it would from x_T of some noise schedules.
            x_0 = torch.where(is_known | (strength < 1), given * 2 - 1, 0)
            begin = self._begin(num_steps, strength)
            x_t, step_arguments = self._noised(x_0, generator, begin), self._step_arguments(generator, False)
            callback, tensors = callback_on_step_end, callback_on_step_end_tensor_inputs
            if is_repaint:
                levels = repaint_levels(num_steps, jump_length, jump_n_sample)
                filled = self._repaint(x_t, x_0, is_known, conditions, step_arguments, levels, callback, tensors)
            else:
                known = self._known(conditions, x_0, is_known, NUM_GRADIENTS if method == "posterior" else 0)
                filled, _ = self._denoise(x_t, known, step_arguments, set(), callback, tensors, begin)
            decoded: Any = _decode(filled, "pt")
            images = torch.where(is_known, given, decoded)
            return self._output(as_output_type(images, output_type), return_dict)

    def _known(self, conditions: Conditions, x_0: Tensor, is_known: Tensor, num_gradients: int) -> MeasuredConditions:
        """Return conditions of a network whose known pixels are a measurement without noise."""
        return self._measured(
            conditions,
            torch.where(is_known, x_0, 0),
            lambda x: torch.where(is_known, x, 0),
            noise_std=0.0,
            num_gradients=num_gradients,
            fit=lambda x_0_hat: torch.where(is_known, x_0, x_0_hat),
        )

    def _check_method(self, method: str, num_steps: int, jump_length: int) -> None:
        if method == "repaint" and not isinstance(self.scheduler, DDPMScheduler):
            is_lcm = isinstance(self.scheduler, LCMScheduler)
            remedy = "take the model before it was tuned" if is_lcm else "call use('ddpm', num_inference_steps=250)"
            raise ValueError(
                f"method must be 'posterior' or 'replace' for {type(self.scheduler).__name__}, got 'repaint', which "
                f"goes back and forth in steps of ddpm: {remedy}"
            )
        if method == "posterior" and torch.is_inference_mode_enabled():
            raise ValueError(
                "method must be 'replace' within torch.inference_mode, got 'posterior', which takes gradients: "
                "torch.no_grad needs no such change"
            )
        if method == "repaint" and jump_length >= num_steps:
            raise ValueError(
                f"jump_length must be less than the number of steps, {num_steps}, for method='repaint', got "
                f"{jump_length}, so that there would be no jump: give a smaller one, or more steps"
            )

    def _repaint(
        self,
        x_t: Tensor,
        x_0: Tensor,
        is_known: Tensor,
        conditions: Conditions,
        step_arguments: dict[str, Any],
        levels: Sequence[int],
        callback: StepCallback | None,
        callback_tensors: Sequence[str],
    ) -> Tensor:
        """Take the steps of RePaint, Lugmayr et al. 2022, Algorithm 1, and return x_0."""
        scheduler, timesteps = self.scheduler, [*self.scheduler.timesteps, self.scheduler.timesteps.new_tensor(-1)]

        def noise() -> Tensor:
            return self._draw_noise(len(x_t), step_arguments["generator"], x_t.device)

        steps = [*pairwise(levels)]
        self._num_timesteps, self._interrupt = sum(after > before for before, after in steps), False
        progress: Any = self.progress_bar(steps)  # pyright: ignore[reportCallIssue, reportArgumentType]
        i = 0
        for before, after in progress:
            t, s = timesteps[before], timesteps[after]
            if after < before:
                x_t = scheduler.forward_step(x_t, noise(), int(s), int(t))
                continue
            if self._interrupt:
                break
            model_output = self._predict(self._network_input(x_t, t), t, conditions)
            unknown = scheduler.step(model_output, t, x_t, **step_arguments).prev_sample
            known = x_0 if s < 0 else scheduler.add_noise(x_0, noise(), int(s))
            x_t = torch.where(is_known, known, unknown)
            if callback is not None:
                returned = callback(self, i, t, {name: x_t for name in callback_tensors}) or {}
                x_t = returned.get("latents", x_t)
            i += 1
        return x_t


def num_steps_of(strength: float, num_inference_steps: int) -> int:
    """Return how many of n steps of sampling a strength takes: floor(strength n), and at least one."""
    # 100 * 0.29 is 28.999999999999996, which means 29.
    return min(max(1, int(strength * num_inference_steps + 1e-6)), num_inference_steps)


def first_index(pipeline: DDPMPipeline, scheduler: Any, strength: float, num_steps: int) -> int:
    """Return the index of the timestep that a strength begins at, in the list that the scheduler has.

    Of a list that is even in t it leaves the last steps, as diffusers' pipelines for images do. A list that is even in
    log sigma begins at the noise that the same strength has there: at the first t of at most strength (T - 1).
    """
    if pipeline.default_timesteps(scheduler, num_steps) is None:
        return num_steps - num_steps_of(strength, num_steps)
    most = strength * (len(scheduler.alphas_cumprod) - 1) + 0.5
    return next((i for i, t in enumerate(scheduler.timesteps.tolist()) if t <= most), num_steps - 1)


def require_strength(strength: Any) -> None:
    """Check that a strength is one.

    Raises:
        ValueError: When it is not in (0, 1].
    """
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0 < strength <= 1:
        raise ValueError(
            f"strength must be in (0, 1], got {strength!r}: near 0 keeps the image, and 1 keeps almost nothing of it"
        )


def _require_jumps(jump_length: Any, jump_n_sample: Any, strength: float) -> None:
    for name, value in (("jump_length", jump_length), ("jump_n_sample", jump_n_sample)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
    if strength != 1:
        raise ValueError(f"strength must be 1 for method='repaint', got {strength}: use another method")
