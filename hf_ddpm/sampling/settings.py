"""The settings that the commands of sampling share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hf_ddpm.guidance import Guidance
from hf_ddpm.image_size import Size, to_size
from hf_ddpm.names import DTYPES, SCHEDULERS
from hf_ddpm.pipeline import DDPMPipeline
from hf_ddpm.prediction import Label
from hf_ddpm.runtime.devices import process_device, require_compiler
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.runtime.settings import require_choice
from hf_ddpm.sampling.loading import check_guidance, choose_guidance, load_for_sampling, speed_up
from hf_ddpm.scheduler import DDPMScheduler
from hf_ddpm.solvers import check_tuning


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """The settings of every command that samples a model.

    Attributes:
        seed: The seed of the first image; image i has the seed `seed` + i.
        num_inference_steps: A number in [1, T]. None: the one that the model's folder keeps (`DDPMPipeline.use`), or
            20, or all T of `ddpm`, or 4 of `lcm`.
        scheduler: `ddpm`, `ddim`, `dpmsolver++` or `unipc`. None: the one that the model's folder keeps, or unipc;
            dpmsolver++ where its searched timesteps are better; ddpm where only that can sample the model. `lcm` is
            the one of models that were tuned for few steps, which no other samples.
        class_label: The label of all images, see `DDPMPipeline`. None: each class in turn, or the quantiles of
            numbers, if the model has labels; of a model that makes images from images, and of edits: the label that
            stands for every one.
        guidance_scale: How far images are led away from those of a weaker model: the model without a class, or
            `guidance_model`. None: what the model's folder says, or 1, which is no guidance.
        guidance_interval: (low, high): guidance acts where low < sigma <= high, the ratio of noise to signal.
        guidance_method: `cfg`, `cfg-zero*`, `apg` or `tcfg`. None: what the model's folder says, or `cfg`.
        autoguidance_scale: How far images of a model of classes are also led away from those of `guidance_model`, at
            every sigma. None: what the model's folder says, or 1, which is not.
        guidance_model: A weaker model, a folder or a Hub id. None: the model itself without a class, or the one in its
            folder `guide`.
        batch_size: Images per forward pass; on a CPU there are always 16.
        device: A device of torch. None: the best one of this process.
        dtype: The type that the network computes in, `fp32` or `bf16`. None: fp32.

    Raises:
        UsageError: When a value cannot work. This is found out before a file is read.
    """

    seed: int = 0
    num_inference_steps: int | None = None
    scheduler: str | None = None
    class_label: Label | None = None
    guidance_scale: float | None = None
    guidance_interval: Sequence[float] | None = None
    guidance_method: str | None = None
    autoguidance_scale: float | None = None
    guidance_model: str | None = None
    batch_size: int = 64
    device: str | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        if self.dtype is not None:
            require_choice("dtype", self.dtype, DTYPES)
        if self.scheduler is not None:
            require_choice("scheduler", self.scheduler, SCHEDULERS)
        if self.batch_size < 1:
            raise UsageError(f"batch_size must be at least 1, got {self.batch_size}")
        check_guidance([self.guidance_scale], self.guidance_interval, self.guidance_method, self.autoguidance_scale)

    def guidance_of(self, pipeline: DDPMPipeline) -> Guidance | None:
        """Return how a pipeline is to be guided, see `choose_guidance`."""
        details = self.guidance_interval, self.guidance_method, self.autoguidance_scale, self.guidance_model
        return choose_guidance(pipeline, self.guidance_scale, *details)


@dataclass(frozen=True, kw_only=True)
class SampleSettings(SamplingSettings):
    """The settings of `hf-ddpm sample`: those of every command, and these.

    Attributes:
        resolution: The side of the images in pixels, or height and width; also of the images that they are made from,
            but for a low resolution of them. None: those of training. With others quality may fall.
        deterministic: Whether to iterate the mean of each reverse step, without noise; for `ddpm` only.
        compile: Whether `torch.compile` compiles the network, at its first forward pass.
        uniform: Whether to ignore timesteps that were searched for.
    """

    resolution: int | Sequence[int] | None = None
    deterministic: bool = False
    compile: bool = False
    uniform: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compile:
            require_compiler(process_device(self.device))

    def size_of(self, pipeline: DDPMPipeline) -> Size | None:
        """Return the size that a pipeline is asked for, after a warning; None for that of training."""
        return None if not self.resolution else pipeline._requested_size(*to_size(self.resolution))

    def load(self, model: str, makes_from_images: bool = False) -> tuple[DDPMPipeline, int, Guidance | None]:
        """Load a pipeline that is ready to sample by these settings.

        Args:
            model: A folder that holds a pipeline, stock diffusers' or ours, or a run; or a Hub id.
            makes_from_images: Whether the model must be one that makes images from images, or none of these.

        Returns:
            The pipeline, its number of steps, and how it is guided.

        Raises:
            ValueError: When there is no such model, or a setting cannot work with it.
            OSError: When a file of the model cannot be read.
        """
        pipeline, steps = load_for_sampling(
            model,
            self.scheduler,
            self.num_inference_steps,
            self.device,
            uniform=self.uniform,
            guidance_model=self.guidance_model,
            makes_from_images=makes_from_images,
        )
        if isinstance(pipeline.scheduler, DDPMScheduler):
            check_tuning("ddpm", pipeline.scheduler.config)
        guidance = self.guidance_of(pipeline)
        speed_up(pipeline, self.dtype, self.compile)
        pipeline._check_inputs(1, None, "pt", ("latents",), self.deterministic)
        return pipeline, steps, guidance
