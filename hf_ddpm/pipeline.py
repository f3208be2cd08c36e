"""DDPMPipeline: noise -> images, for any scheduler of diffusers.

    x_T ~ N(0, I);  for t in scheduler.timesteps: x_t <- scheduler.step(unet(x_t, t), t, x_t);  image = (x_0 + 1) / 2

A pipeline is saved as a stock `diffusers.DDPMPipeline` with a stock `DDPMScheduler`, which any diffusers loads; on
loading, a stock `DDPMScheduler` becomes ours, which has the same config, and the timesteps that `hf-ddpm schedule` has
stored for these weights come with them. diffusers' name for x_t is `latents`.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline, UNet2DModel
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from hf_ddpm.figures import to_pil
from hf_ddpm.runtime.files import weights_sha256
from hf_ddpm.scheduler import DDPMScheduler, as_our_scheduler, complete_config, require_num_inference_steps
from hf_ddpm.timesteps import SearchedTimesteps, read_searched, solver_name, write_searched

logger = logging.getLogger(__name__)


@dataclass
class TrajectoryStep:
    """One step of sampling: t, x_t before the step and the x_0_hat seen from it, both (B, C, H, W) on the CPU."""

    timestep: int
    x_t: Tensor
    x_0_hat: Tensor


@dataclass
class DDPMPipelineOutput(BaseOutput):
    """
    images: PIL images, or (B, H, W, C) numpy or (B, C, H, W) torch values in [0, 1].
    trajectory: the chosen steps in the order of sampling, or None.
    """

    images: list[Image.Image] | np.ndarray | Tensor
    trajectory: list[TrajectoryStep] | None = None


class DDPMPipeline(DiffusionPipeline):
    """Generates images with a `UNet2DModel`.

    Args:
        unet: the network.
        scheduler: a `DDPMScheduler`, stock's being turned into ours, or any other scheduler of diffusers.

    Attributes:
        searched_timesteps: by solver and number of steps, the timesteps that take the place of the solver's own;
            empty it to do without.
    """

    model_cpu_offload_seq = "unet"
    _callback_tensor_inputs = ("latents",)

    def __init__(self, unet: UNet2DModel, scheduler: Any):
        super().__init__()
        if type(scheduler) is diffusers.DDPMScheduler:
            scheduler = as_our_scheduler(scheduler.config)
        self.register_modules(unet=unet, scheduler=scheduler)
        self.searched_timesteps: dict[tuple[str, int], SearchedTimesteps] = {}
        self._searched_weights: str | None = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """As of `diffusers.DiffusionPipeline`, with the searched timesteps that lie beside the network's weights."""
        pipeline: Any = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        folder = _folder_of(pipeline.unet)
        if searched := read_searched(folder):
            pipeline.searched_timesteps, pipeline._searched_weights = searched, weights_sha256(folder)
        return pipeline

    def save_config(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """As of `diffusers.DiffusionPipeline`, which calls it when the weights are saved; adds searched timesteps."""
        super().save_config(save_directory, push_to_hub, **kwargs)
        if not self.searched_timesteps:
            return
        if weights_sha256(Path(save_directory)) == self._searched_weights:
            write_searched(Path(save_directory), [*self.searched_timesteps.values()], self._searched_weights)
        else:
            logger.warning("searched timesteps are not saved: they were found for other weights or another dtype")

    def register_to_config(self, **kwargs: Any) -> None:
        # model_index.json names our scheduler as the stock one: diffusers loads no other name from the Hub.
        ours = (DDPMScheduler.__module__, DDPMScheduler.__name__)
        stock = ("diffusers", diffusers.DDPMScheduler.__name__)
        super().register_to_config(**{name: stock if value == ours else value for name, value in kwargs.items()})

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        class_labels: int | Sequence[int] | Tensor | None = None,
        latents: Tensor | None = None,
        callback_on_step_end: Callable[[DDPMPipeline, int, Tensor, dict[str, Any]], dict[str, Any] | None]
        | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        trajectory: bool | Sequence[int] = False,
        deterministic: bool = False,
        timesteps: Sequence[int] | None = None,
    ) -> DDPMPipelineOutput | tuple:
        """Samples images.

        Args:
            batch_size: B.
            generator: of the initial noise and of each step's; a list of B gives each image its own, and the image
                then depends on the batch it is in by rounding alone.
            num_inference_steps: steps of the scheduler; default: T, the steps of training.
            output_type: `pil`, `np` or `pt`.
            return_dict: a `DDPMPipelineOutput`, or else a tuple.
            class_labels: for a model conditioned on classes, one for all images or B of them.
            latents: x_T, (B, C, H, W), instead of noise from `generator`.
            callback_on_step_end: called after each step as `callback(pipeline, i, t, {"latents": x_t})`; what it
                returns under "latents" replaces x_t.
            callback_on_step_end_tensor_inputs: which tensors the callback gets; there is only "latents".
            trajectory: True to return each step, or the indices of the chosen ones, 0 the first and -1 the last.
            deterministic: take the mean of each reverse step and add no noise; a step denoiser is then iterated
                alone, x_{t-1} = f(x_t). For our scheduler only.
            timesteps: t_1 > t_2 > ... in [0, T), instead of `num_inference_steps`; for schedulers that take them.

        Returns: `DDPMPipelineOutput`, or the tuple (images,) or (images, trajectory).

        Raises:
            ValueError: before the first network evaluation, an argument that cannot work; PIL images that are NaN.
        """
        device, channels = self._execution_device, self.unet.config.in_channels
        num_train = self.scheduler.config.num_train_timesteps
        steps = num_train if num_inference_steps is None else num_inference_steps
        # Not all of diffusers' solvers look: some repeat timesteps then and return NaN.
        steps = require_num_inference_steps(steps, num_train)
        self._check_inputs(batch_size, generator, output_type, callback_on_step_end_tensor_inputs, deterministic)
        conditions = self._conditions(class_labels, batch_size, device)

        if timesteps is not None:
            self._check_timesteps(timesteps, num_inference_steps)
            self.scheduler.set_timesteps(timesteps=[*timesteps])
        elif (found := self.searched(steps)) is not None:
            self.scheduler.set_timesteps(timesteps=[*found.timesteps])
        else:
            self.scheduler.set_timesteps(steps)
        visited = self.scheduler.timesteps
        levels = getattr(self.scheduler, "sigmas", visited)[:steps]
        if len(visited) == steps and len(levels.unique()) < steps and self.scheduler.config.get("solver_order") != 1:
            raise ValueError(
                f"{type(self.scheduler).__name__} visits a noise level twice for num_inference_steps={steps}, which "
                "makes images NaN: use fewer steps or timestep_spacing='trailing'"
            )
        if visited.min() < 0 and not visited.is_floating_point():
            raise ValueError(
                f"{type(self.scheduler).__name__} gave timestep {visited.min():g} for num_inference_steps={steps}, "
                "rounding amiss in its 'trailing' spacing: use another number of steps or timestep_spacing='linspace'"
            )
        chosen = _chosen_steps(trajectory, len(visited))
        if chosen and "beta_schedule" not in self.scheduler.config:
            raise ValueError(f"trajectory must be False for {type(self.scheduler).__name__}, which has no x_0_hat")

        size = self.unet.config.sample_size
        shape = (batch_size, channels, *((size, size) if isinstance(size, int) else size))
        network_dtype = self.unet.dtype  # once: reading it walks through all modules
        # x_t and the scheduler's arithmetic stay in float32 when the network is in half precision.
        dtype = torch.promote_types(network_dtype, torch.float32)
        if latents is None:
            # randn is not reproducible on MPS.
            noise_device = torch.device("cpu") if device.type == "mps" else device
            latents = randn_tensor(shape, generator=generator, device=noise_device, dtype=dtype)
        elif latents.shape != shape:
            raise ValueError(f"latents must have the shape {shape}, got {tuple(latents.shape)}")
        x_t = latents.to(device, dtype) * getattr(self.scheduler, "init_noise_sigma", 1.0)

        # Flow matching has neither this nor `init_noise_sigma`.
        scaled = getattr(self.scheduler, "scale_model_input", None)
        accepted = inspect.signature(self.scheduler.step).parameters
        step_arguments: dict[str, Any] = {"generator": generator} if "generator" in accepted else {}
        if deterministic:
            step_arguments["deterministic"] = True
        # Of the schedulers that use a learned variance this takes DDPM's; the others get the first half of the output.
        splits_output = isinstance(self.scheduler, diffusers.DDPMScheduler)
        self._num_timesteps, self._interrupt = len(visited), False
        recorded: list[TrajectoryStep] = []
        for i, t in enumerate(self.progress_bar(visited)):  # pyright: ignore[reportCallIssue, reportArgumentType]
            if self._interrupt:
                break
            network_input = x_t if scaled is None else scaled(x_t, t)
            model_output = self.unet(network_input.to(network_dtype), t, **conditions).sample.to(dtype)
            # Infinity would be clipped to an extreme image; NaN stays until the image is refused.
            model_output = torch.where(model_output.isfinite(), model_output, math.nan)
            if not splits_output:
                model_output = model_output[:, :channels]
            result = self.scheduler.step(model_output, t, x_t, **step_arguments)
            if i in chosen:
                x_0_hat = getattr(result, "pred_original_sample", None)
                if x_0_hat is None:
                    x_0_hat = self._reference_scheduler().predict_original(model_output, network_input, t.long())
                recorded.append(TrajectoryStep(int(t), x_t.cpu(), x_0_hat.cpu()))
            x_t = result.prev_sample
            if callback_on_step_end is not None:
                tensors = {name: x_t for name in callback_on_step_end_tensor_inputs}
                x_t = (callback_on_step_end(self, i, t, tensors) or {}).get("latents", x_t)

        images = (x_t / 2 + 0.5).clamp(0, 1)
        if output_type == "pil":
            if not bool(images.isfinite().all()):
                raise ValueError(
                    "images must be finite for output_type='pil', got NaN: the weights are damaged or overflow"
                )
            images = to_pil(images)
        elif output_type == "np":
            images = images.cpu().permute(0, 2, 3, 1).numpy()
        self.maybe_free_model_hooks()
        if not return_dict:
            return (images,) if trajectory is False else (images, recorded)
        return DDPMPipelineOutput(images=images, trajectory=None if trajectory is False else recorded)

    def searched(self, num_inference_steps: int) -> SearchedTimesteps | None:
        """What was searched for the pipeline's scheduler and this number of steps."""
        if not self.searched_timesteps or (solver := solver_name(self.scheduler)) is None:
            return None
        return self.searched_timesteps.get((solver, num_inference_steps))

    @property
    def num_timesteps(self) -> int:
        """Steps of the call that is running, for callbacks; setting `_interrupt` ends it after its step."""
        return self._num_timesteps

    def _check_inputs(
        self,
        batch_size: int,
        generator: torch.Generator | list[torch.Generator] | None,
        output_type: str | None,
        tensor_inputs: Sequence[str],
        deterministic: bool,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"a list of generators must hold batch_size = {batch_size}, got {len(generator)}")
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"output_type must be 'pil', 'np' or 'pt', got {output_type!r}")
        if output_type == "pil" and self.unet.config.in_channels not in (1, 3, 4):
            raise ValueError(f"PIL has no image of {self.unet.config.in_channels} channels: use output_type='np'")
        if unknown := set(tensor_inputs) - set(self._callback_tensor_inputs):
            raise ValueError(f"callback_on_step_end_tensor_inputs may hold 'latents', got {sorted(unknown)}")
        ours = isinstance(self.scheduler, DDPMScheduler)
        if deterministic and not ours:
            raise ValueError(f"deterministic is for hf_ddpm's DDPMScheduler, got {type(self.scheduler).__name__}")
        if self.scheduler.config.get("prediction_type") == "previous_sample" and not ours:
            raise ValueError(
                "a step denoiser (prediction_type='previous_sample') is sampled by hf_ddpm's DDPMScheduler, "
                f"got {type(self.scheduler).__name__}"
            )

    def _check_timesteps(self, timesteps: Sequence[int], num_inference_steps: int | None) -> None:
        num_train = self.scheduler.config.num_train_timesteps
        if num_inference_steps not in (None, len(timesteps)):
            raise ValueError(
                f"timesteps must be given without num_inference_steps, got {num_inference_steps} and {len(timesteps)}"
            )
        bounded = [num_train, *timesteps, -1]
        if len(bounded) < 3 or any(t <= s or s != int(s) for t, s in pairwise(bounded)):
            raise ValueError(f"timesteps must be integers that fall strictly in [0, {num_train}), got {[*timesteps]}")
        if "timesteps" not in inspect.signature(self.scheduler.set_timesteps).parameters:
            raise ValueError(f"timesteps must be None for {type(self.scheduler).__name__}, which takes none")

    def _conditions(
        self, class_labels: int | Sequence[int] | Tensor | None, batch_size: int, device: torch.device
    ) -> dict[str, Tensor]:
        num_classes = self.unet.config.num_class_embeds
        conditioned = self.unet.config.class_embed_type is not None or num_classes is not None
        if class_labels is None:
            if conditioned:
                raise ValueError(f"class_labels must be given: the model is conditioned on {num_classes} classes")
            return {}
        if not conditioned:
            raise ValueError("class_labels must be None: the model was trained without classes")
        labels = torch.as_tensor(class_labels, device=device)
        labels = labels.expand(batch_size) if labels.ndim == 0 else labels
        if labels.shape[0] != batch_size:
            raise ValueError(f"class_labels must hold batch_size = {batch_size} labels, got {labels.shape[0]}")
        if num_classes is not None and not bool(((labels >= 0) & (labels < num_classes)).all()):
            raise ValueError(f"class_labels must be in [0, {num_classes}), got {labels.tolist()}")
        return {"class_labels": labels}

    def _reference_scheduler(self) -> DDPMScheduler:
        """q of the same schedule and prediction type, for schedulers whose steps do not return x_0_hat."""
        config = {
            **complete_config(self.scheduler.config),
            "variance_type": "fixed_small",
            "timestep_spacing": "trailing",
        }
        return DDPMScheduler.from_config(config)  # pyright: ignore[reportReturnType]


def _folder_of(unet: Any) -> Path:
    """Where the pipeline is that a network was loaded with, if it was."""
    folder = Path((unet is not None and unet.config.get("_name_or_path")) or "does-not-exist")
    return folder.parent if folder.name == "unet" else folder


def _chosen_steps(trajectory: bool | Sequence[int], count: int) -> set[int]:
    if isinstance(trajectory, bool):
        return set(range(count)) if trajectory else set()
    indices = {i + count if i < 0 else i for i in trajectory}
    if not all(0 <= i < count for i in indices):
        raise ValueError(f"trajectory must hold indices of the {count} steps, got {list(trajectory)}")
    return indices
