"""DDPMPipeline: noise -> images, for the schedulers of diffusers that sample such networks.

    x_T     initial noise, N(0, I); diffusers' name for it and for each x_t is `latents`
    x_t     the noisy image at timestep t: x_t <- scheduler.step(unet(x_t, t), t, x_t) for t in scheduler.timesteps
    image   (x_0 + 1) / 2, clipped to [0, 1]

A pipeline is saved as a stock `diffusers.DDPMPipeline` with a stock `DDPMScheduler`, which every diffusers loads. On
loading, a stock `DDPMScheduler` becomes ours, which has the same config. The timesteps that `hf-ddpm schedule` stored
for these weights are loaded with them.
"""

from __future__ import annotations

import inspect
import logging
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline, UNet2DModel
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import hf_hub_download
from PIL import Image
from torch import Tensor

from hf_ddpm.classes import Classes
from hf_ddpm.figures import to_pil
from hf_ddpm.guidance import Guidance, changed
from hf_ddpm.image_size import Size, format_size, to_size
from hf_ddpm.label_embedding import (
    EMBEDDING_FILE,
    attach_saved_embedding,
    embedding_of,
    embedding_taken_off,
    save_network,
    write_embedding,
)
from hf_ddpm.labels import Columns, Labels, read_labels, write_labels
from hf_ddpm.network import accept_labels_in_any_type, naming_weights, require_finite, require_labels_of
from hf_ddpm.network_config import require_size
from hf_ddpm.prediction import (
    ClassLabels,
    Conditions,
    check_guide,
    evaluate,
    hidden_labels,
    is_guided_at,
    network_labels,
    predict_guided,
    predict_original,
    scheduler_of_outputs,
    unnamed_classes,
)
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.runtime.files import NETWORK_FOLDERS, weights_sha256
from hf_ddpm.runtime.launch import is_main_process
from hf_ddpm.scheduler import DDPMScheduler, as_our_scheduler, is_tuned, require_num_inference_steps
from hf_ddpm.solvers import (
    Sampler,
    check_tuning,
    choose_sampler,
    named_scheduler,
    read_sampler,
    require_no_guidance,
    write_sampler,
)
from hf_ddpm.timesteps import (
    SearchedTimesteps,
    read_searched,
    set_timesteps,
    solver_name,
    takes_timesteps,
    timesteps_even_in_log_sigma,
    write_searched,
)
from hf_ddpm.value_range import ValueRange, read_value_range, write_value_range

logger = logging.getLogger(__name__)


# The schedulers of diffusers that sample a network of its own images with their mean and spread, as measured with a
# network that is exact for a normal distribution (benchmarks/schedulers/table.md).
SAMPLING_SCHEDULERS = (
    *("DDIMParallelScheduler", "DDIMScheduler", "DDPMParallelScheduler", "DDPMScheduler", "DEISMultistepScheduler"),
    *("DPMSolverMultistepScheduler", "DPMSolverSDEScheduler", "DPMSolverSinglestepScheduler"),
    *("EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler"),
    *("KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "LMSDiscreteScheduler", "PNDMScheduler"),
    *("SASolverScheduler", "UniPCMultistepScheduler"),
    # For networks that were trained by flow matching.
    *("FlowMapEulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"),
    "LTXEulerAncestralRFScheduler",
)
# Their first step leaves noise of two values where almost nothing but noise is seen.
_SENSITIVE_SCHEDULERS = ("HeunDiscreteScheduler", "PNDMScheduler")
_MIN_FIRST_ALPHA_BAR = 1e-6
_MIN_STEPS_IN_LOG_SIGMA = 4
# The folder of a model that holds a weaker version of its network.
GUIDE_FOLDER = "guide"

StepCallback = Callable[["DDPMPipeline", int, Tensor, dict[str, Any]], dict[str, Any] | None]


@dataclass
class TrajectoryStep:
    """A step of sampling.

    Args:
        timestep: t of the step.
        x_t: The noisy image before the step, (B, C, H, W) on the CPU.
        x_0_hat: The clean image that the network predicts from it, (B, C, H, W) on the CPU. It is the one from which
            the scheduler computes the step: clipped or thresholded where the scheduler does that, as all of
            `hf-ddpm sample` do for a model with `clip_sample`, and as the network puts it out where it does not.
        value_range: The values of a model of arrays, which say what a picture shows of them; None for other models.
    """

    timestep: int
    x_t: Tensor
    x_0_hat: Tensor
    value_range: ValueRange | None = None


@dataclass
class DDPMPipelineOutput(BaseOutput):
    """The images of one call.

    Args:
        images: PIL images, or values in [0, 1]: a (B, H, W, C) array or a (B, C, H, W) tensor. The array of a model of
            arrays is in the units and the type of the data instead.
        trajectory: The recorded steps in the order of sampling; None if none were asked for.
    """

    images: list[Image.Image] | np.ndarray | Tensor
    trajectory: list[TrajectoryStep] | None = None


class DDPMPipeline(DiffusionPipeline):
    """A network and a scheduler that together generate images.

    Args:
        unet: The network: a UNet2DModel, or another model of diffusers or of one's own that is called as it is, and
            whose config has `sample_size` and `in_channels`. Stock diffusers samples only the first.
        scheduler: A `DDPMScheduler`, where stock's is turned into ours, or another of diffusers' that samples such a
            network: one of SAMPLING_SCHEDULERS.

    Attributes:
        searched_timesteps: The timesteps that replace the solver's own, by solver and number of steps. Empty it to
            sample without them.
        sampler: How `use` said that the pipeline samples; None: by its own scheduler, as stock does.
        kept_sampler: What `use()` takes: the sampler that the folder of the model keeps, if there is one.
        guide: The weaker network that guidance leads away from (autoguidance), in the place of guidance by the class,
            or with an `autoguidance_scale` beside it. None: the network itself without a class, or the one of the
            model's folder `guide`, which is loaded when it is needed.
        labels: The labels that the network is conditioned on: classes with their names, numbers with their range, or
            several columns of these; None for a network without labels.
        value_range: The values of a model of arrays, which say what 0 and 1 stand for; None for other models.
    """

    model_cpu_offload_seq = "unet"
    network_component = "unet"
    _callback_tensor_inputs = ("latents",)

    def __init__(self, unet: Any, scheduler: Any):
        super().__init__()
        if type(scheduler) is diffusers.DDPMScheduler:
            scheduler = as_our_scheduler(scheduler.config)
        self.register_modules(**{self.network_component: unet, "scheduler": scheduler})
        self.searched_timesteps: dict[tuple[str, int], SearchedTimesteps] = {}
        self._searched_weights: str | None = None
        self.sampler: Sampler | None = None
        self._scheduler_of_sampler: Any = None
        self.kept_sampler: Sampler | None = None
        self.guide: Any = None
        self._guide_of_folder: Any = None  # for autoguidance beside guidance by the class
        self._running: Tensor | None = None  # of the guidance `apg`, from one step to the next
        self._source: tuple[Any, dict[str, Any]] | None = None  # what the pipeline was loaded from
        self.labels: Labels | None = None if unet is None else unnamed_classes(unet.config)
        self.value_range: ValueRange | None = None
        if unet is not None:
            accept_labels_in_any_type(unet)

    @property
    def classes(self) -> Classes | None:
        """The classes that the network is conditioned on; None if it is conditioned on something else, or nothing."""
        return self.labels if isinstance(self.labels, Classes) else None

    @classes.setter
    def classes(self, classes: Classes | None) -> None:
        self.labels = classes

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Load a pipeline as `diffusers.DiffusionPipeline` does, with what `save_config` keeps beside its weights."""
        pipeline: Any = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        of_repository = ("revision", "token", "cache_dir", "local_files_only", "force_download")
        pipeline._source = pretrained_model_name_or_path, {k: v for k, v in kwargs.items() if k in of_repository}
        folder = _folder_of(pipeline.unet)
        pipeline.kept_sampler = read_sampler(folder)
        pipeline._load_labels(folder)
        pipeline.value_range = read_value_range(folder)
        if searched := read_searched(folder):
            pipeline.searched_timesteps, pipeline._searched_weights = searched, weights_sha256(folder)
        return pipeline

    @classmethod
    def from_pipe(cls, pipeline: Any, **components: Any) -> Any:
        """Return a pipeline of this class that shares the network and the scheduler of another, as diffusers does.

        It also has what diffusers' own `from_pipe` forgets: labels, guide, searched timesteps, and what `use` chose.
        The weights keep their type.

        Args:
            pipeline: A pipeline of a network and a scheduler, ours or stock's.
            components: `unet` or `scheduler` instead of that of `pipeline`.

        Raises:
            ValueError: When `pipeline` has no network or no scheduler.
        """
        if missing := {"unet", "scheduler"} - pipeline.components.keys():
            raise ValueError(
                f"pipeline must have a unet and a scheduler, got {type(pipeline).__name__} without {missing}"
            )
        other = cls(**{name: pipeline.components[name] for name in ("unet", "scheduler")} | components)
        other.set_progress_bar_config(**getattr(pipeline, "_progress_bar_config", {}))
        if "unet" not in components and not isinstance(pipeline, DDPMPipeline):
            other._load_labels(_folder_of(other.unet))
            other.value_range = read_value_range(_folder_of(other.unet))
        if isinstance(pipeline, DDPMPipeline):
            other.sampler, other._scheduler_of_sampler = pipeline.sampler, pipeline._scheduler_of_sampler
            if "unet" not in components:
                other.kept_sampler, other._searched_weights = pipeline.kept_sampler, pipeline._searched_weights
                other.searched_timesteps = {**pipeline.searched_timesteps}
                other.labels, other.guide, other._source = pipeline.labels, pipeline.guide, pipeline._source
                other.value_range = pipeline.value_range
        return other

    def _load_labels(self, folder: Path) -> None:
        """Load the labels that a model's folder keeps, with the embedding of several columns of them."""
        labels = read_labels(folder)
        if labels is None:
            return
        require_labels_of(labels, self.unet)
        if isinstance(labels, Columns) and embedding_of(self.unet) is None:
            attach_saved_embedding(self.unet, labels, folder / EMBEDDING_FILE)
        self.labels = labels

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save the pipeline as diffusers does, and the embedding of several columns of labels beside the scheduler."""
        with embedding_taken_off(self.unet) as embedding:
            if embedding is not None:
                write_embedding(Path(save_directory) / EMBEDDING_FILE, embedding)
            super().save_pretrained(save_directory, *args, **kwargs)

    def save_config(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Save the config as `diffusers.DiffusionPipeline` does, labels, searched timesteps, and what `use` chose.

        diffusers calls it after it has saved the weights.
        """
        super().save_config(save_directory, push_to_hub, **kwargs)
        if not isinstance(self.unet, UNet2DModel):
            logger.warning(
                "stock diffusers has no pipeline that samples a %s: load it by hf_ddpm", type(self.unet).__name__
            )
        if (sampler := self.sampler or self.kept_sampler) is not None:
            write_sampler(Path(save_directory), sampler)
        if self.labels is not None and (self.classes is None or self.classes.is_named):
            write_labels(Path(save_directory), self.labels)
        if self.value_range is not None:
            write_value_range(Path(save_directory), self.value_range)
        guide = self.guide
        if guide is None and sampler is not None and self._needs_guide(sampler):
            guide = self._read_guide()
        if guide is not None:
            save_network(guide, Path(save_directory) / GUIDE_FOLDER)
        if not self.searched_timesteps:
            return
        if weights_sha256(Path(save_directory)) == self._searched_weights:
            write_searched(Path(save_directory), [*self.searched_timesteps.values()], self._searched_weights)
        else:
            logger.warning("searched timesteps are not saved: they were found for other weights or another dtype")

    def register_to_config(self, **kwargs: Any) -> None:
        """Register components as diffusers does, with our scheduler under the name of the stock one.

        The name stands in model_index.json, and diffusers loads no other from the Hub.
        """
        ours = (DDPMScheduler.__module__, DDPMScheduler.__name__)
        stock = ("diffusers", diffusers.DDPMScheduler.__name__)
        super().register_to_config(**{name: stock if value == ours else value for name, value in kwargs.items()})

    def load_guide(self) -> DDPMPipeline:
        """Load the weaker network that the model keeps in its folder `guide`, for autoguidance.

        Returns:
            The pipeline itself.

        Raises:
            ValueError: When the model keeps none.
        """
        self.guide = self._read_guide()
        return self

    def _read_guide(self) -> Any:
        """Return the network in the model's folder `guide`, which is read once."""
        if self._guide_of_folder is not None:
            return self._guide_of_folder
        name, keywords = self._source or (None, {})
        if name is None or (Path(name).is_dir() and not (Path(name) / GUIDE_FOLDER).is_dir()):
            raise _no_guide_error(name)
        kind: Any = type(getattr(self.unet, "_orig_mod", self.unet))  # which torch.compile has wrapped
        try:
            with naming_weights(f"the folder {GUIDE_FOLDER!r} of {str(name)!r}"):
                guide: Any = kind.from_pretrained(
                    name, subfolder=GUIDE_FOLDER, torch_dtype=self.unet.dtype, **keywords
                )
                self._attach_to_guide(guide, name, keywords)
        except UsageError as error:
            if Path(name).is_dir():
                raise
            raise _no_guide_error(name) from error
        require_finite(guide.state_dict(), f"the folder {GUIDE_FOLDER!r} of {str(name)!r}")
        self._guide_of_folder = guide.to(self.device).eval()
        return self._guide_of_folder

    def _attach_to_guide(self, guide: Any, name: Any, keywords: dict[str, Any]) -> None:
        """Give a weaker network that was loaded its own embedding of several columns of labels."""
        if not isinstance(self.labels, Columns):
            return
        file = f"{GUIDE_FOLDER}/{EMBEDDING_FILE.name}"
        path = Path(name) / file if Path(name).is_dir() else Path(hf_hub_download(str(name), file, **keywords))
        attach_saved_embedding(guide, self.labels, path)

    def use(
        self,
        scheduler: str | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        autoguidance_scale: float | None = None,
    ) -> DDPMPipeline:
        """Choose how later calls sample, as the commands do: in 20 steps of UniPC unless something else is asked for.

        The pipeline's own scheduler, which stock diffusers loads, stays as it is. A pipeline that is saved keeps the
        choice: the commands and `hf_ddpm.sample` take it, and so does `use()` without arguments.

        Args:
            scheduler: `ddpm`, `ddim`, `dpmsolver++`, `unipc`, or for a tuned model `lcm`. None: the one that the
                folder keeps, or the best.
            num_inference_steps: The number of steps of calls that give none. None: as for `scheduler`.
            guidance_scale: The scale of guidance of calls that give none. None: as for `scheduler`, or 1.
            guidance_interval: Where this guidance acts, as of a call.
            autoguidance_scale: The scale of autoguidance beside it, for a model of classes with a weaker version of
                it in `guide`, or in the folder of that name. None: as for `scheduler`, or 1, which is none.

        Returns:
            The pipeline itself.

        Raises:
            ValueError: When there is no such scheduler, it cannot sample the model, or the number is not in [1, T].
        """
        config = self.scheduler.config
        if "beta_schedule" not in config or "prediction_type" not in config:
            raise ValueError(
                f"scheduler of the pipeline must have a beta_schedule and a prediction_type, got "
                f"{type(self.scheduler).__name__}: call the pipeline with its own scheduler"
            )
        sampler = choose_sampler(config, scheduler, num_inference_steps, self.kept_sampler, self.searched_timesteps)
        check_tuning(sampler.scheduler, config)
        guidance = changed(sampler.guidance, guidance_scale, guidance_interval, autoguidance_scale=autoguidance_scale)
        is_led_twice = guidance is not None and guidance.autoguidance_scale != 1
        if guidance is not None:
            self._check_autoguidance(guidance)
        if autoguidance_scale is not None and is_led_twice and self.guide is None:
            self._read_guide()
        # Beside guidance by the class, the weaker network does not take its place.
        uses_guide = guidance is not None and not is_led_twice and (self.guide is not None or sampler.uses_guide)
        sampler = sampler._replace(guidance=guidance, uses_guide=uses_guide)
        named_scheduler(sampler.scheduler, config, sampler.num_inference_steps)
        self.sampler, self._scheduler_of_sampler = sampler, self.scheduler
        return self

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        class_labels: ClassLabels = None,
        latents: Tensor | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        trajectory: bool | Sequence[int] = False,
        deterministic: bool = False,
        timesteps: Sequence[int] | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        guidance: Guidance | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> DDPMPipelineOutput | tuple:
        """Sample images.

        Args:
            batch_size: B, the number of images.
            generator: The generator of the initial noise and of the noise of each step. A list of B generators gives
                each image its own; the image then depends on its batch by rounding alone.
            num_inference_steps: The number of steps of the scheduler; None: T, the steps of training, or what `use`
                chose.
            output_type: `pil`, `np` or `pt`. Of a model of arrays, `np` is in the units and the type of the data.
            return_dict: Return a `DDPMPipelineOutput` rather than a tuple.
            class_labels: For a model that is conditioned on labels, one for all images or B of them: a class by its
                name or its number, a number, or for several columns a mapping from their names. None: images without
                a label, by a model that was trained with `class_dropout`.
            latents: x_T, (B, C, H, W), instead of noise from `generator`.
            callback_on_step_end: A function that is called after each step as `callback(pipeline, i, t, tensors)`,
                with i the number of the step and `tensors` {"latents": x_t}. If it returns {"latents": x}, then x
                replaces x_t.
            callback_on_step_end_tensor_inputs: The names of the tensors that the callback gets; there is only
                "latents".
            trajectory: True to return every step, or the indices of the steps to return, 0 the first, -1 the last.
            deterministic: Take the mean of each reverse step and add no noise. A step denoiser is then iterated
                alone, x_{t-1} = f(x_t). For our scheduler only.
            timesteps: t_1 > t_2 > ... in [0, T), instead of `num_inference_steps`, for schedulers that take them.
            guidance_scale: How far each prediction is led away from that of a weaker model: `guide` if it is set, else
                the network itself without a class (classifier-free guidance). 1 is no guidance. None: 1, or what
                `use` chose.
            guidance_interval: (low, high): guidance acts where low < sigma <= high, the ratio of noise to signal.
            guidance: Scale, interval, autoguidance beside them and all else that `hf_ddpm.guidance` knows, instead of
                these two.
            height: The height of the images in pixels. None: that of the images that the model was trained with.
            width: Their width, likewise. Other sides must be multiples of what the levels of the network halve. It has
                seen no such images, and quality may fall.

        Returns:
            A `DDPMPipelineOutput`, or the tuple (images,) or (images, trajectory).

        Raises:
            ValueError: When an argument cannot work, before the first network evaluation, or when PIL images would be
                NaN.
        """
        _require_whole_number("batch_size", batch_size)
        if num_inference_steps is not None:
            _require_whole_number("num_inference_steps", num_inference_steps)
        size = self._requested_size(height, width)
        with self._sampling_scheduler(num_inference_steps) as num_steps:
            self._check_inputs(batch_size, generator, output_type, callback_on_step_end_tensor_inputs, deterministic)
            device = self._execution_device
            guidance = self._guidance(guidance_scale, guidance_interval, guidance)
            conditions = self._conditions(class_labels, batch_size, device, guidance)
            if timesteps is not None:
                self._check_timesteps(timesteps, num_inference_steps)
            self._set_timesteps(num_steps, timesteps)
            recorded_indices = self._recorded_indices(trajectory)
            x_T = self._initial_noise(batch_size, generator, latents, device, size)

            x_0, recorded = self._denoise(
                x_T,
                conditions,
                self._step_arguments(generator, deterministic),
                recorded_indices,
                callback_on_step_end,
                callback_on_step_end_tensor_inputs,
            )
            images = _decode(x_0, output_type, self.value_range)
            self.maybe_free_model_hooks()
            if not return_dict:
                return (images,) if trajectory is False else (images, recorded)
            return DDPMPipelineOutput(images=images, trajectory=None if trajectory is False else recorded)

    @contextmanager
    def _sampling_scheduler(self, num_inference_steps: int | None) -> Iterator[int]:
        """Put the scheduler that `use` chose in the place of the pipeline's own, and give the number of steps."""
        own, num_steps = self.scheduler, num_inference_steps
        if own is not self._scheduler_of_sampler:  # Somebody has set another since, which then counts.
            self.sampler = None
        if self.sampler is not None:
            num_steps = self.sampler.num_inference_steps if num_steps is None else num_steps
        _check_scheduler(own)
        num_train: int = own.config.num_train_timesteps
        # Some of diffusers' solvers take more steps, repeat timesteps and return NaN.
        num_steps = require_num_inference_steps(num_train if num_steps is None else num_steps, num_train)
        if self.sampler is not None:
            self.scheduler = named_scheduler(self.sampler.scheduler, own.config, num_steps)
        try:
            yield num_steps
        finally:
            self.scheduler = own

    def searched_timesteps_for(self, num_inference_steps: int) -> SearchedTimesteps | None:
        """Return the searched timesteps for the pipeline's scheduler and this number of steps, if there are any."""
        solver = solver_name(self.scheduler) if self.searched_timesteps else None
        return None if solver is None else self.searched_timesteps.get((solver, num_inference_steps))

    def _needs_guide(self, sampler: Sampler) -> bool:
        """Return whether the guidance of a sampler takes the network in the model's folder `guide`."""
        guides_itself = self.labels is not None and self.labels.has_unconditional
        if sampler.guidance is None:
            return False
        return sampler.uses_guide or not guides_itself or sampler.guidance.autoguidance_scale != 1

    def default_timesteps(self, scheduler: Any, num_steps: int) -> list[int] | None:
        """Return the timesteps that a solver takes for the model when none were searched; None: its own.

        Models of arrays are sampled at timesteps that are even in log sigma, so that small scales keep their power.
        """
        if self.value_range is None or solver_name(scheduler) is None:
            return None
        # Of fewer steps none would be left for the levels between noise and data.
        if not _MIN_STEPS_IN_LOG_SIGMA <= num_steps < len(scheduler.alphas_cumprod):
            return None
        return timesteps_even_in_log_sigma(scheduler.alphas_cumprod.tolist(), num_steps)

    @property
    def num_timesteps(self) -> int:
        """The number of steps of the running call, for callbacks. To set `_interrupt` ends it after its step."""
        return self._num_timesteps

    def _set_timesteps(self, num_steps: int, timesteps: Sequence[int] | None) -> None:
        """Set the scheduler's list: `timesteps`, else the searched ones, else `default_timesteps` of `num_steps`."""
        if timesteps is None:
            searched = self.searched_timesteps_for(num_steps)
            timesteps = self.default_timesteps(self.scheduler, num_steps) if searched is None else searched.timesteps
        if timesteps is None:
            self.scheduler.set_timesteps(num_steps)
        else:
            set_timesteps(self.scheduler, timesteps)
        if hasattr(self.scheduler, "set_begin_index"):
            # Else a list whose first two timesteps are equal is taken from the second on, and ends too early.
            self.scheduler.set_begin_index(0)
        _check_timesteps_of_other_schedulers(self.scheduler, num_steps)

    def _recorded_indices(self, trajectory: bool | Sequence[int]) -> set[int]:
        """Return the indices, at least 0, of the steps that `trajectory` asks for."""
        num_steps = len(self.scheduler.timesteps)
        if isinstance(trajectory, bool):
            indices = set(range(num_steps)) if trajectory else set()
        else:
            indices = {i + num_steps if i < 0 else i for i in trajectory}
            if not all(0 <= i < num_steps for i in indices):
                raise ValueError(f"trajectory must hold indices of the {num_steps} steps, got {list(trajectory)}")
        if indices and "beta_schedule" not in self.scheduler.config:
            raise ValueError(f"trajectory must be False for {type(self.scheduler).__name__}, which has no x_0_hat")
        return indices

    def _initial_noise(
        self,
        batch_size: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: Tensor | None,
        device: torch.device,
        size: Size | None = None,
    ) -> Tensor:
        """Return x_T in the scheduler's scale, (B, C, H, W), in float32 also for a network in half precision.

        Args:
            size: (H, W); None: that of the model's images.
        """
        shape = (batch_size, *self._image_shape(size))
        if latents is None:
            latents = self._draw_noise(batch_size, generator, device, size)
        elif latents.shape != shape:
            raise ValueError(f"latents must have the shape {shape}, got {tuple(latents.shape)}")
        # Schedulers of flow matching have no `init_noise_sigma`.
        scale = getattr(self.scheduler, "init_noise_sigma", 1.0)
        return latents.to(device, torch.promote_types(self.unet.dtype, torch.float32)) * scale

    def _image_shape(self, size: Size | None = None) -> tuple[int, int, int]:
        """Return the shape of an image, (C, H, W), with (H, W) = `size` if that is given."""
        return self.unet.config.in_channels, *(size or to_size(self.unet.config.sample_size, "sample_size"))

    def _requested_size(self, height: int | None, width: int | None) -> Size | None:
        """Return the size that a call asks for, after a warning; None for that of the model's images.

        Raises:
            ValueError: When the network does not take it.
        """
        trained = self._image_shape()[1:]
        size = (trained[0] if height is None else height, trained[1] if width is None else width)
        for name, side in zip(("height", "width"), size, strict=True):
            _require_whole_number(name, side)
            if side < 1:
                raise ValueError(f"{name} must be at least 1, got {side}")
        if size == trained:
            return None
        require_size(self.unet, size)
        _warn_of_size(trained, size)
        return size

    def _draw_noise(
        self,
        batch_size: int,
        generator: torch.Generator | list[torch.Generator] | None,
        device: torch.device,
        size: Size | None = None,
    ) -> Tensor:
        """Return noise of N(0, I), (B, C, H, W), in float32 also for a network in half precision."""
        # randn is not reproducible on MPS.
        noise_device = torch.device("cpu") if device.type == "mps" else device
        dtype = torch.promote_types(self.unet.dtype, torch.float32)
        shape = (batch_size, *self._image_shape(size))
        return randn_tensor(shape, generator=generator, device=noise_device, dtype=dtype).to(device)

    def _step_arguments(
        self, generator: torch.Generator | list[torch.Generator] | None, deterministic: bool
    ) -> dict[str, Any]:
        """Return the keyword arguments of the scheduler's `step`."""
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        arguments: dict[str, Any] = {"generator": generator} if takes_generator else {}
        if deterministic:
            arguments["deterministic"] = True
        return arguments

    def _denoise(
        self,
        x_T: Tensor,
        conditions: Conditions,
        step_arguments: dict[str, Any],
        recorded_indices: set[int],
        callback: StepCallback | None,
        callback_tensors: Sequence[str],
        begin: int = 0,
    ) -> tuple[Tensor, list[TrajectoryStep]]:
        """Take the scheduler's steps from the index `begin` on; return x_0 and the recorded steps."""
        x_t, timesteps = x_T, self.scheduler.timesteps[begin:]
        self._num_timesteps, self._interrupt = len(timesteps), False
        recorded: list[TrajectoryStep] = []
        progress: Any = self.progress_bar(timesteps)  # pyright: ignore[reportCallIssue, reportArgumentType]
        for i, t in enumerate(progress):
            if self._interrupt:
                break
            network_input = self._network_input(x_t, t)
            model_output = self._predict(network_input, t, conditions)
            result = self.scheduler.step(model_output, t, x_t, **step_arguments)
            if i in recorded_indices:
                x_0_hat = getattr(result, "pred_original_sample", None)
                if x_0_hat is None:
                    x_0_hat = predict_original(self.scheduler, model_output, network_input, t)
                recorded.append(TrajectoryStep(int(t), x_t.cpu(), x_0_hat.cpu(), self.value_range))
            x_t = result.prev_sample
            if callback is not None:
                returned = callback(self, i, t, {name: x_t for name in callback_tensors}) or {}
                x_t = returned.get("latents", x_t)
        return x_t, recorded

    def _predict(self, network_input: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        """Return the network's output at x_t as the scheduler's `step` takes it, (B, C or 2C, H, W).

        Args:
            network_input: x_t as `_network_input` scales it, (B, C, H, W).
            t: The timestep, ().
            conditions: What `_conditions` returned.
        """
        guidance = conditions.guidance
        acts = guidance is not None and is_guided_at(self.scheduler, t, guidance)
        if guidance is None or not (acts or guidance.autoguidance_scale != 1):
            labels, images = conditions.class_labels, conditions.images
            model_output = evaluate(self.unet, conditions.network_dtype, network_input, t, labels, images)
        else:
            model_output, self._running = predict_guided(self.unet, network_input, t, conditions, self._running, acts)
        # Infinity would be clipped to an extreme image; NaN stays until the image is refused.
        model_output = torch.where(model_output.isfinite(), model_output, math.nan)
        # Only DDPM's schedulers use a learned variance; the others get the first half of the output.
        is_ddpm = isinstance(self.scheduler, diffusers.DDPMScheduler)
        return model_output if is_ddpm else model_output[:, : network_input.shape[1]]

    def _network_input(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Return x_t in the scale that the network takes. Schedulers of flow matching have no `scale_model_input`."""
        scale_input = getattr(self.scheduler, "scale_model_input", None)
        return x_t if scale_input is None else scale_input(x_t, t)

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
        given = generator if isinstance(generator, list | tuple) else [] if generator is None else [generator]
        if not all(isinstance(each, torch.Generator) for each in given):
            raise ValueError(
                f"generator must be a torch.Generator, or one for each image, got {generator!r}: "
                "torch.Generator().manual_seed(SEED) makes one"
            )
        channels = self._image_shape()[0]
        out_channels = self.unet.config.get("out_channels") or channels
        if out_channels not in (channels, 2 * channels):
            raise ValueError(
                "unet must give as many channels as it takes, or twice as many with a learned variance, got "
                f"{out_channels} for {channels}: it was trained for another task"
            )
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"a list of generators must hold batch_size = {batch_size}, got {len(generator)}")
        if output_type not in ("pil", "np", "pt"):
            raise ValueError(f"output_type must be 'pil', 'np' or 'pt', got {output_type!r}")
        if output_type == "pil" and channels not in (1, 3, 4):
            units = "" if self.value_range is None else f", which is {self.value_range.dtype} in the data's own units"
            raise ValueError(f"PIL has no image of {channels} channels: use output_type='np'{units}")
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
        if not takes_timesteps(self.scheduler):
            raise ValueError(f"timesteps must be None for {type(self.scheduler).__name__}, which takes none")

    def _guidance(
        self, scale: float | None, interval: tuple[float, float] | None, guidance: Guidance | None
    ) -> Guidance | None:
        """Return how a call guides, by its arguments or by what `use` chose; None for no guidance."""
        if guidance is not None and (scale is not None or interval is not None):
            raise ValueError("guidance must be given without guidance_scale and guidance_interval, got both")
        if guidance is None:
            guidance = changed(None if self.sampler is None else self.sampler.guidance, scale, interval)
        elif not isinstance(guidance, Guidance):
            raise ValueError(f"guidance must be a Guidance, got {guidance!r}: guidance_scale takes a number")
        if guidance is None or guidance.scale == 1:
            return None
        require_no_guidance(self.scheduler.config)
        return guidance

    def _conditions(
        self,
        class_labels: ClassLabels,
        batch_size: int,
        device: torch.device,
        guidance: Guidance | None = None,
    ) -> Conditions:
        """Check the classes of the images, and return what each evaluation of the network takes beside x_t and t."""
        kind, dtype = self.unet.config.get("class_embed_type"), self.unet.dtype
        labels = network_labels(self.labels, kind, class_labels, batch_size, device)
        self._running = None
        if guidance is None:
            return Conditions(dtype, labels)
        scheduler, unconditional = None, None if self.labels is None else self.labels.unconditional
        if guidance.method == "apg":
            if "beta_schedule" not in self.scheduler.config:
                raise ValueError(
                    f"guidance 'apg' needs a model with a beta_schedule, got {type(self.scheduler).__name__}"
                )
            scheduler = scheduler_of_outputs(self.scheduler.config)
        is_led_twice = guidance.autoguidance_scale != 1
        self._check_autoguidance(guidance)
        uses_guide = self.sampler is not None and self.sampler.uses_guide
        if self.guide is None and (unconditional is None or (uses_guide and not is_led_twice)):
            self.load_guide()
        weaker = self._read_guide() if self.guide is None and is_led_twice else self.guide
        no_labels = None
        if weaker is not None:
            check_guide(weaker, self.unet)
            weaker = weaker.to(device).eval()
        if weaker is None or is_led_twice:
            if class_labels is None and is_led_twice:
                raise ValueError(
                    "guidance needs class_labels, got none, and so nothing to lead to: give a class, or "
                    "guidance_scale=1"
                )
            if class_labels is None:
                raise ValueError(
                    "guidance needs class_labels, got none, and so nothing to lead to: give a class, or "
                    "guidance_scale=1, or call load_guide() for guidance by a weaker model"
                )
            assert self.labels is not None
            no_labels = hidden_labels(self.labels, batch_size, device)
        return Conditions(dtype, labels, guidance, weaker, no_labels, scheduler)

    def _check_autoguidance(self, guidance: Guidance) -> None:
        """Check that a model can be guided by its classes where autoguidance is to act beside them."""
        guides_itself = self.labels is not None and self.labels.unconditional is not None
        if guidance.autoguidance_scale != 1 and not guides_itself:
            raise ValueError(
                f"autoguidance_scale goes beside guidance by classes, got {guidance.autoguidance_scale:g} for a model "
                "that has learned no images without a class: give autoguidance_scale=1; a weaker model then guides by "
                "guidance_scale"
            )


def _no_guide_error(name: Any) -> ValueError:
    where = "a pipeline that was not loaded" if name is None else f"{str(name)!r} without a folder {GUIDE_FOLDER!r}"
    return ValueError(
        f"guidance needs a weaker model, got {where}: give a smaller or less trained one of the same data as "
        "--guidance_model, in Python its network as `guide` of the pipeline; or train on classes, with class_dropout, "
        "which guide without one, at autoguidance_scale=1"
    )


@cache
def _warn_of_size(trained: Size, size: Size) -> None:
    """Say once in a process that images get another size than those of training."""
    if is_main_process():
        logger.warning(
            "images of %s are sampled by a network that was trained with %s: quality may fall",
            *map(format_size, (size, trained)),
        )


def _require_whole_number(name: str, value: Any) -> None:
    try:
        operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be a whole number, got {value!r}") from None


def _folder_of(unet: Any) -> Path:
    """Return the folder of the pipeline that a network was loaded from, or one that does not exist."""
    folder = Path((unet is not None and unet.config.get("_name_or_path")) or "does-not-exist")
    return folder.parent if folder.name in NETWORK_FOLDERS else folder


def _check_scheduler(scheduler: Any) -> None:
    """Reject the schedulers of diffusers whose images are wrong: they are for other networks, or for other tasks."""
    cls = type(scheduler)
    if cls is diffusers.LCMScheduler and is_tuned(scheduler.config):
        return
    if cls.__module__.split(".")[0] == "diffusers" and cls.__name__ not in SAMPLING_SCHEDULERS:
        raise ValueError(
            f"scheduler must be one that samples this network from noise, got {cls.__name__}, which does not: use one "
            f"of {', '.join(SAMPLING_SCHEDULERS)}"
        )


def _check_timesteps_of_other_schedulers(scheduler: Any, num_steps: int) -> None:
    """Reject the lists of diffusers' schedulers that end in wrong images.

    Two faults of diffusers 0.42 make such lists; our scheduler has neither.

    - `DPMSolverMultistepScheduler`, with the spacings `linspace` and `leading`, rounds its timesteps, so that with
      almost as many steps as T the same timestep stands there twice. From one noise level to the same one a solver of
      second order divides by zero: the images are NaN.
    - `trailing` spacing counts down with a floating-point `arange` in DDIM, DPM-Solver++ and UniPC. Of T = 1000, 62
      numbers of steps (61, 103, 121, ...) get one timestep too many, and the last of them is -1.
    """
    timesteps = scheduler.timesteps
    if type(scheduler).__name__ in _SENSITIVE_SCHEDULERS:
        first = float(scheduler.alphas_cumprod[int(timesteps[0])])
        if 0 < first < _MIN_FIRST_ALPHA_BAR:
            raise ValueError(
                f"{type(scheduler).__name__} gives noise of two values where alpha_bar = {first:.1e}, at which it "
                "would begin: use timestep_spacing='leading', or another scheduler, as DPMSolverMultistepScheduler"
            )
    noise_levels = getattr(scheduler, "sigmas", timesteps)[:num_steps]
    repeats = len(timesteps) == num_steps and len(noise_levels.unique()) < num_steps
    if repeats and scheduler.config.get("solver_order") != 1:
        raise ValueError(
            f"{type(scheduler).__name__} visits a noise level twice for num_inference_steps={num_steps}, which "
            "makes images NaN: use fewer steps or timestep_spacing='trailing'"
        )
    if timesteps.min() < 0 and not timesteps.is_floating_point():
        raise ValueError(
            f"{type(scheduler).__name__} gave timestep {timesteps.min():g} for num_inference_steps={num_steps}, "
            "because its 'trailing' spacing rounds wrongly: use another number of steps or "
            "timestep_spacing='linspace'"
        )


def _decode(
    x_0: Tensor, output_type: str | None, values: ValueRange | None = None
) -> list[Image.Image] | np.ndarray | Tensor:
    """Turn x_0 into images of `output_type`, arrays of a model of arrays into the units of the data."""
    images = (x_0 / 2 + 0.5).clamp(0, 1)
    if values is not None and output_type == "np":
        return values.to_units(images.permute(0, 2, 3, 1))
    return as_output_type(images, output_type)


def as_output_type(images: Tensor, output_type: str | None) -> list[Image.Image] | np.ndarray | Tensor:
    """Turn images, (B, C, H, W) in [0, 1], into images of `output_type`.

    Raises:
        ValueError: When PIL images would be NaN.
    """
    if output_type == "pt":
        return images
    if output_type == "np":
        return images.cpu().permute(0, 2, 3, 1).numpy()
    if not bool(images.isfinite().all()):
        raise ValueError("images must be finite for output_type='pil', got NaN: the weights are damaged or overflow")
    return to_pil(images)
