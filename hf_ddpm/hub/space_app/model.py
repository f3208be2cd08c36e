"""The work of the page with a model: it samples, noises images, and edits them.

Each call makes a pipeline of its own, since several visitors may come at once, with different settings. They share the
networks alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from hf_ddpm.data.arrays import count_outside, slices_of
from hf_ddpm.data.config import DataConfig
from hf_ddpm.data.given_files import read_values, require_shape, shares_of, with_known_values
from hf_ddpm.editing import DDPMImg2ImgPipeline, DDPMInpaintPipeline
from hf_ddpm.figures import to_pil
from hf_ddpm.guidance import Guidance
from hf_ddpm.image_size import to_size
from hf_ddpm.names import UNTUNED_SCHEDULERS
from hf_ddpm.pipeline import DDPMPipeline, check_guide
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.runtime.seeds import check_seeds
from hf_ddpm.runtime.settings import require_choice
from hf_ddpm.scheduler import DDPMScheduler, as_our_scheduler, is_solvable, is_tuned
from hf_ddpm.solvers import Sampler, choose_sampler, named_scheduler
from hf_ddpm.value_range import ValueRange, pictured

STEP_DENOISER = "previous_sample"
NOISELESS = "ddpm without noise"  # the mean of each step of a step denoiser
NUM_SHOWN_STEPS = 9
# The most steps that the page offers for a model that was tuned for few.
MAX_TUNED_STEPS = 20
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
# What the page offers beside the labels themselves, which it numbers in the order of a grid.
EACH_LABEL, NO_LABEL = -1, -2

OnStep = Callable[[int, int], None]


class Samples(NamedTuple):
    """The images, and the way of the first one.

    Args:
        images: What pictures show of one image per seed.
        states: NUM_SHOWN_STEPS of the steps as (t, x_t, x_0_hat) of the first image, tensors (1, C, H, W) of what
            pictures show.
        x_0: The first image, (1, C, H, W) in [-1, 1].
    """

    images: list[Image.Image]
    states: list[tuple[int, Tensor, Tensor]]
    x_0: Tensor


class Edits(NamedTuple):
    """The edits of one image, and what pictures show of them.

    Args:
        image: The image, of the model's size.
        mask: What is repainted, in white, of that size, too; None: all of it.
        images: One edit per seed.
        values: The edits of an array in the units of the data, (number of seeds, C, H, W); None for pictures.
    """

    image: Image.Image
    mask: Image.Image | None
    images: list[Image.Image]
    values: np.ndarray | None = None


def ignore_step(step: int, num_steps: int) -> None:
    """Do nothing after a step."""


class Model:
    """A model on the Hub or in a folder, and what the page does with it.

    Args:
        name: A Hub id, or a folder.
    """

    def __init__(self, name: str):
        self.name = name
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.pipeline: DDPMPipeline = DDPMPipeline.from_pretrained(name).to(device)
        # The model may have been saved with another scheduler; the forward process is that of its noise schedule.
        self.scheduler: DDPMScheduler = as_our_scheduler(self.pipeline.scheduler.config)
        unet_config: Any = self.pipeline.unet.config
        self.channels: int = unet_config.in_channels
        self.height, self.width = to_size(unet_config.sample_size)
        labels = self.pipeline.labels
        self.has_no_label: bool = labels is not None and labels.unconditional is not None
        # A model is tuned to what its guidance made of it, if it had any.
        self.can_be_guided: bool = not self.is_tuned and (self.has_no_label or _has_guide(self.pipeline))

    @property
    def has_pictures(self) -> bool:
        """True if a picture holds an image; of others, as arrays of many channels, pictures show the channels."""
        return self.channels in MODES and (self.pipeline.value_range is None or self.channels != 4)

    @property
    def arrays(self) -> ValueRange | None:
        """The values of arrays of which no picture holds one; None where pictures do, or nobody knows the values."""
        return None if self.has_pictures else self.pipeline.value_range

    @property
    def label_choices(self) -> list[tuple[str, int]]:
        """The labels that the page offers: names with numbers, of which those below 0 are no label."""
        labels = self.pipeline.labels
        if labels is None:
            return []
        kind = "label" if self.pipeline.classes is None else "class"
        no_label = [(f"without a {kind}", NO_LABEL)] if self.has_no_label else []
        return [("each in turn", EACH_LABEL), *no_label, *((name, i) for i, name in enumerate(labels.titles))]

    @property
    def num_timesteps(self) -> int:
        """The length T of the chain."""
        return len(self.scheduler)

    @property
    def prediction_type(self) -> str:
        """The prediction type of the network, in diffusers' words."""
        return self.scheduler.config["prediction_type"]

    @property
    def is_step_denoiser(self) -> bool:
        """True if the network is a step denoiser, which takes all T steps."""
        return self.prediction_type == STEP_DENOISER

    @property
    def is_tuned(self) -> bool:
        """True if the model was tuned to sample in few steps."""
        return is_tuned(self.scheduler.config)

    @property
    def samplers(self) -> list[str]:
        """The names of the samplers that can sample this model, the best in few steps first."""
        if self.is_step_denoiser:
            return ["ddpm", NOISELESS]
        if self.is_tuned:
            return ["lcm"]
        if not is_solvable(self.scheduler.config):
            return ["ddpm"]
        best = self._default.scheduler
        return [best, *(name for name in reversed(UNTUNED_SCHEDULERS) if name != best)]

    @property
    def default_steps(self) -> int:
        """The number of steps with which the page begins."""
        return self._default.num_inference_steps

    @property
    def max_steps(self) -> int:
        """The largest number of steps that the page offers: T, or fewer for a model that was tuned for few."""
        limit = max(MAX_TUNED_STEPS, self.default_steps) if self.is_tuned else self.num_timesteps
        return min(limit, self.num_timesteps)

    @property
    def default_guidance(self) -> Guidance:
        """The guidance that the model keeps; with scale 1 if it says nothing, or cannot be guided."""
        kept = self.pipeline.kept_sampler
        guidance = None if kept is None or not self.can_be_guided else kept.guidance
        return Guidance() if guidance is None else guidance

    @property
    def _default(self) -> Sampler:
        kept, searched = self.pipeline.kept_sampler, self.pipeline.searched_timesteps
        return choose_sampler(self.scheduler.config, kept=kept, searched=searched)

    def labels(self, choice: int | str | None, seeds: Sequence[int]) -> list[Any] | None:
        """Return the label of each image; None for a model without labels, and for images without one.

        Args:
            choice: A number of `label_choices`, or what `--class_label` takes. None: EACH_LABEL.
            seeds: The seeds of the images.

        Raises:
            UsageError: When there is no such label.
        """
        labels = self.pipeline.labels
        if labels is None or choice == NO_LABEL:
            return None
        rows = labels.in_turn
        if choice is None or choice == EACH_LABEL:
            return [rows[seed % len(rows)] for seed in seeds]
        if isinstance(choice, str) or self.pipeline.classes is not None:
            return [labels.read(choice)] * len(seeds)
        if not 0 <= choice < len(rows):  # the page's API takes any number
            raise UsageError(f"the label must be one of {len(rows)} that the page offers, got number {choice}")
        return [rows[choice]] * len(seeds)

    def lacks_direction(self, labels: Sequence[Any] | None) -> bool:
        """Return whether guidance has nothing to lead to: it leads to a label, and there is none."""
        by_weaker_model = self.pipeline.guide is not None and self.default_guidance.autoguidance_scale == 1
        return self.has_no_label and labels is None and not by_weaker_model

    def _guidance(self, scale: float, labels: Sequence[Any] | None) -> Guidance | None:
        """Return the model's own guidance with another scale; None: images are not guided."""
        is_off = scale == 1 or self.lacks_direction(labels)
        return None if is_off else replace(self.default_guidance, scale=scale)

    def sample(
        self,
        sampler: str,
        num_steps: int,
        seeds: Sequence[int],
        labels: Sequence[Any] | None = None,
        guidance_scale: float = 1.0,
        on_step: OnStep = ignore_step,
    ) -> Samples:
        """Sample one image per seed.

        Args:
            sampler: One of `samplers`.
            num_steps: In [1, T]; a step denoiser always takes all T.
            seeds: Seeds of the images' generators.
            labels: The classes of the images, for a model that is conditioned on them.
            guidance_scale: The scale of guidance, 1 for none. It is off where it has nothing to lead to.
            on_step: Called after each step with the number of steps taken and that of all steps.

        Raises:
            ValueError: When an argument cannot work.
        """
        require_choice("scheduler", sampler, self.samplers)
        if self.is_step_denoiser:
            num_steps = self.num_timesteps
        is_deterministic = sampler == NOISELESS
        scheduler = named_scheduler("ddpm" if is_deterministic else sampler, self.scheduler.config, num_steps)
        pipeline = DDPMPipeline.from_pipe(self.pipeline, scheduler=scheduler)
        output: Any = pipeline(
            batch_size=len(seeds),
            num_inference_steps=num_steps,
            trajectory=np.linspace(0, num_steps - 1, NUM_SHOWN_STEPS).round().astype(int).tolist(),
            deterministic=is_deterministic,
            output_type="pil" if self.has_pictures else "pt",
            **self._arguments(pipeline, seeds, labels, guidance_scale, on_step),
        )
        states = [
            (state.timestep, self.shown(state.x_t[:1]), self.shown(state.x_0_hat[:1])) for state in output.trajectory
        ]
        if self.has_pictures:
            return Samples(output.images, states, self.from_image(output.images[0]))
        return Samples(to_pil(self.shown(output.images)), states, 2 * output.images[:1].cpu() - 1)

    def shown(self, images: Tensor) -> Tensor:
        """Return what pictures show of images, (B, C, H, W): some channels, or all side by side, if none can."""
        return images if self.has_pictures else pictured(images, self.pipeline.value_range)

    def edit(
        self,
        image: Image.Image,
        mask: Image.Image | None,
        strength: float,
        num_steps: int,
        seeds: Sequence[int],
        labels: Sequence[Any] | None = None,
        guidance_scale: float = 1.0,
        on_step: OnStep = ignore_step,
    ) -> Edits:
        """Edit an image once per seed, with the sampler that is best in few steps.

        Args:
            image: An image of the model's size, as `fit` returns it.
            mask: What is repainted, in white, of this size, too. None: the whole image is varied.
            strength: In (0, 1], how much changes.
            num_steps: n in [1, T], of which the last `strength` n are taken; a step denoiser has all T.
            seeds: Seeds of the edits' generators.
            labels: The classes of the edits, for a model that is conditioned on them.
            guidance_scale: See `sample`.
            on_step: See `sample`.

        Raises:
            ValueError: When an argument cannot work.
        """
        edited = self._edited(image, mask, strength, num_steps, seeds, labels, guidance_scale, on_step, "pil")
        return Edits(image, mask, edited)

    def edit_array(
        self,
        values: np.ndarray,
        mask: Tensor | None,
        strength: float,
        num_steps: int,
        seeds: Sequence[int],
        labels: Sequence[Any] | None = None,
        guidance_scale: float = 1.0,
        on_step: OnStep = ignore_step,
    ) -> Edits:
        """Edit an array once per seed; what is not repainted comes back as it was, to the last bit.

        Args:
            values: An array of the model's shape, (C, H, W), in the units of the data.
            mask: What is repainted, (1, 1, H, W) bool. None: the whole array is varied.
            strength: See `edit`, as for the other arguments.

        Raises:
            ValueError: When an argument cannot work.
        """
        assert self.arrays is not None
        image = shares_of(values, self.arrays)
        edited = self._edited(image, mask, strength, num_steps, seeds, labels, guidance_scale, on_step, "pt").cpu()
        whole, masks = image[None], None if mask is None else mask.expand(len(seeds), -1, -1, -1)
        shown = [whole, *([] if mask is None else [mask.float().expand_as(whole)]), edited]
        pictures = to_pil(self.shown(torch.cat(shown)))
        return Edits(
            pictures[0],
            None if mask is None else pictures[1],
            pictures[-len(seeds) :],
            with_known_values(edited, np.stack([values] * len(seeds)), masks, self.arrays),
        )

    def _edited(
        self,
        image: Any,
        mask: Any,
        strength: float,
        num_steps: int,
        seeds: Sequence[int],
        labels: Sequence[Any] | None,
        guidance_scale: float,
        on_step: OnStep,
        output_type: str,
    ) -> Any:
        """Return one edit of an image per seed, as the pipelines that edit return it."""
        pipeline = self._editor(DDPMImg2ImgPipeline if mask is None else DDPMInpaintPipeline, num_steps)
        output: Any = pipeline(
            [image] * len(seeds),
            **({} if mask is None else {"mask_image": mask}),
            strength=strength,
            output_type=output_type,
            **self._arguments(pipeline, seeds, labels, guidance_scale, on_step),
        )
        return output.images

    def array_from(self, file: str | Path | None, mask: Tensor | None) -> np.ndarray | None:
        """Return the array in a file, (C, H, W), in the units of the data; None without a file.

        Args:
            file: The file.
            mask: What of it need not be finite, (1, 1, H, W) bool; None: all must be.

        Raises:
            ValueError: When it holds none of the model's type and shape.
        """
        if file is None or self.arrays is None:
            return None
        path = Path(file)
        rows = slices_of(path, DataConfig())
        if len(rows) > 1:
            raise UsageError(f"image must be one array, got {len(rows)} in {path.name}: save one of them")
        is_unknown = None if mask is None else mask[0].numpy()
        values = read_values(rows[0], path.name, DataConfig(), self.arrays, is_unknown)
        require_shape(values, (self.channels, self.height, self.width), path.name)
        return values

    def units_of(self, x_0: Tensor) -> np.ndarray:
        """Return an image of arrays, (1, C, H, W) in [-1, 1], in the units of the data, (C, H, W)."""
        assert self.arrays is not None
        return self.arrays.to_units(x_0 / 2 + 0.5)[0]

    def describe_clipped(self, values: np.ndarray) -> str:
        """Return in words how many values of an array the model sees clipped; nothing if there are none."""
        assert self.arrays is not None
        count, low, high = count_outside(values, self.arrays), self.arrays.low, self.arrays.high
        return f"The model sees {count:,} values clipped to {low:g} to {high:g}." if count else ""

    def editing_refusal(self) -> str:
        """Return why the model cannot edit images; nothing if it can."""
        if not self.has_pictures and self.arrays is None:
            return f"no picture holds its {self.channels} channels, and its files do not say what -1 and 1 stand for"
        try:
            pipeline = self._editor(DDPMInpaintPipeline, self.default_steps)
            with pipeline._editing_scheduler(None):
                pipeline._check_inputs(1, None, "pil" if self.has_pictures else "pt", (), False)
        except ValueError as error:
            return str(error)
        return ""

    def _editor(self, pipeline_class: Any, num_steps: int) -> Any:
        """Return a pipeline that edits images with this number of steps."""
        num_steps = self.num_timesteps if self.is_step_denoiser else num_steps
        return pipeline_class.from_pipe(self.pipeline).use(self.samplers[0], num_steps)

    def _arguments(
        self,
        pipeline: Any,
        seeds: Sequence[int],
        labels: Sequence[Any] | None,
        guidance_scale: float,
        on_step: OnStep,
    ) -> dict[str, Any]:
        """Return the arguments that calls of all pipelines share."""
        check_seeds(min(seeds), max(seeds) - min(seeds) + 1)
        pipeline.set_progress_bar_config(disable=True)

        def report(pipeline: Any, index: int, _: Tensor, __: dict[str, Any]) -> None:
            on_step(index + 1, pipeline.num_timesteps)

        return {
            "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
            "class_labels": None if labels is None else [*labels],
            "guidance": self._guidance(guidance_scale, labels) or Guidance(),
            "callback_on_step_end": report,
        }

    def add_noise(self, x_0: Tensor, seed: int, t: int) -> Tensor:
        """Return x_t for x_0, (1, C, H, W), and the noise of a seed; t in [0, T)."""
        eps = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(seed))
        return self.scheduler.add_noise(x_0, eps, t)

    def fit(self, image: Image.Image) -> Image.Image:
        """Return an image cropped and resized to the model's size, in the model's mode.

        An image of this size that was enlarged by a whole factor comes back as it was.

        Raises:
            ValueError: When no picture holds an image of the model.
        """
        if not self.has_pictures:
            raise ValueError(f"the page takes no picture for a model of {self.channels} channels: leave it out")
        image, size = image.convert(MODES[self.channels]), (self.width, self.height)
        small = image.resize(size, Image.Resampling.NEAREST)
        factor = image.width // self.width
        if image.size == (factor * self.width, factor * self.height):
            large = small.resize(image.size, Image.Resampling.NEAREST)
            if large.tobytes() == image.tobytes():
                return small
        return ImageOps.fit(image, size)

    def fit_mask(self, layers: Sequence[Image.Image]) -> Image.Image | None:
        """Return what is drawn on an image, cropped and resized as `fit` does it: 255 to repaint, 0 to keep.

        Args:
            layers: What is drawn, of one size: the white of each layer counts where it is opaque.

        Returns:
            The mask, of mode L. A pixel is repainted if at least half of it is drawn on. None: nothing is drawn.

        Raises:
            ValueError: When something is drawn, but less than half of any pixel.
        """
        coverage = np.zeros((self.height, self.width))
        is_drawn = False
        for layer in layers:
            pixels = np.asarray(layer.convert("RGBA").convert("LA"), dtype=np.float32) / 255
            white = Image.fromarray(pixels[:, :, 0] * pixels[:, :, 1])  # mode F
            is_drawn = is_drawn or bool(np.asarray(white).any())
            fitted = ImageOps.fit(white, (self.width, self.height), method=Image.Resampling.BOX)
            coverage = np.maximum(coverage, np.asarray(fitted))
        mask = coverage >= 0.5
        if is_drawn and not mask.any():
            raise ValueError(
                "the mask must cover a pixel of the image at least by half, got a thinner line: draw with a larger "
                "brush, or erase it"
            )
        return Image.fromarray(mask.astype(np.uint8) * 255) if is_drawn else None

    def from_image(self, image: Image.Image) -> Tensor:
        """Return an image as x_0, (1, C, H, W) in [-1, 1], cropped and resized to the model's shape."""
        pixels = np.asarray(self.fit(image), dtype=np.float32).reshape(self.height, self.width, self.channels)
        return torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1


def _has_guide(pipeline: DDPMPipeline) -> bool:
    """Return whether a model keeps a weaker network to be guided by, which is loaded here."""
    try:
        check_guide(pipeline.load_guide().guide, pipeline.unet)
    except ValueError:
        pipeline.guide = None
    return pipeline.guide is not None
