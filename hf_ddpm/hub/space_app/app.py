"""A page that shows a diffusion model: its samples, its reverse process and its forward process.

On a Space, the modules of `hf_ddpm` that the page imports lie beside this file, as they are in the package.
requirements.txt lists what those modules need.

    x_T ~ N(0, I), for image i from Generator(seed + i);  for t in timesteps: x_t <- step(unet(x_t, t), t, x_t)
    x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps, the forward process
"""

from __future__ import annotations

import base64
import html
import io
import math
import os
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from hf_ddpm.figures import to_pil
from hf_ddpm.names import SCHEDULERS
from hf_ddpm.pipeline import DDPMPipeline
from hf_ddpm.scheduler import DDPMScheduler, as_our_scheduler, is_solvable
from hf_ddpm.solvers import Sampler, choose_sampler, named_scheduler

MODEL = os.environ.get("MODEL", "")  # a Hub id, or a folder

STEP_DENOISER = "previous_sample"
NOISELESS = "ddpm without noise"  # the mean of each step of a step denoiser
NUM_SHOWN_STEPS = 9
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
MIN_SIDE = 224  # pixels to which an image is enlarged at least, so that the browser only makes it smaller


class Samples(NamedTuple):
    """Images, and the way of the first one.

    Args:
        images: One image per seed.
        states: NUM_SHOWN_STEPS of the steps as (t, x_t, x_0_hat) of the first image, tensors (1, C, H, W).
    """

    images: list[Image.Image]
    states: list[tuple[int, Tensor, Tensor]]


class Model:
    """A model on the Hub or in a folder, and what the page does with it.

    Args:
        name: A Hub id, or a folder.
    """

    def __init__(self, name: str):
        self.name = name
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.pipeline: DDPMPipeline = DDPMPipeline.from_pretrained(name).to(device)
        # The model may have been saved with a solver; the forward process is that of its noise schedule.
        self.scheduler: DDPMScheduler = as_our_scheduler(self.pipeline.scheduler.config)
        unet_config: Any = self.pipeline.unet.config
        self.channels: int = unet_config.in_channels
        size = unet_config.sample_size
        self.height, self.width = (size, size) if isinstance(size, int) else size
        if self.channels not in MODES:
            raise ValueError(f"the model must make images of 1, 3 or 4 channels, got {self.channels}")

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes that the model is conditioned on; empty without classes."""
        return () if self.pipeline.classes is None else self.pipeline.classes.names

    @property
    def num_timesteps(self) -> int:
        """The length T of the chain."""
        return len(self.scheduler)

    @property
    def prediction_type(self) -> str:
        """The prediction type of the network, in diffusers' words."""
        return self.scheduler.config["prediction_type"]

    @property
    def samplers(self) -> list[str]:
        """The names of the samplers that can sample this model, the best in few steps first."""
        if self.prediction_type == STEP_DENOISER:
            return ["ddpm", NOISELESS]
        if not is_solvable(self.scheduler.config):
            return ["ddpm"]
        best = self._default.scheduler
        return [best, *(name for name in reversed(SCHEDULERS) if name != best)]

    @property
    def default_steps(self) -> int:
        """The number of steps with which the page begins."""
        return self._default.num_inference_steps

    @property
    def _default(self) -> Sampler:
        kept, searched = self.pipeline.kept_sampler, self.pipeline.searched_timesteps
        return choose_sampler(self.scheduler.config, kept=kept, searched=searched)

    def sample(
        self,
        sampler: str,
        num_steps: int,
        seeds: Sequence[int],
        labels: Sequence[int] | None = None,
        on_step: Callable[[int, int], None] = lambda step, num_steps: None,
    ) -> Samples:
        """Sample one image per seed.

        Args:
            sampler: One of `samplers`.
            num_steps: In [1, T]; a step denoiser always takes all T.
            seeds: Seeds of the images' generators.
            labels: The classes of the images, for a model that is conditioned on them.
            on_step: Called after each step with the number of steps taken and that of all steps.
        """
        if self.prediction_type == STEP_DENOISER:
            num_steps = self.num_timesteps
        is_deterministic = sampler == NOISELESS
        scheduler = named_scheduler("ddpm" if is_deterministic else sampler, self.scheduler.config, num_steps)
        # A pipeline of its own, since several visitors may sample at once, with different schedulers.
        pipeline = DDPMPipeline(self.pipeline.unet, scheduler)
        pipeline.searched_timesteps, pipeline.classes = self.pipeline.searched_timesteps, self.pipeline.classes
        pipeline.set_progress_bar_config(disable=True)

        def report(_: DDPMPipeline, index: int, __: Tensor, ___: dict[str, Any]) -> None:
            on_step(index + 1, num_steps)

        output: Any = pipeline(
            batch_size=len(seeds),
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            num_inference_steps=num_steps,
            class_labels=None if labels is None else [*labels],
            callback_on_step_end=report,
            trajectory=np.linspace(0, num_steps - 1, NUM_SHOWN_STEPS).round().astype(int).tolist(),
            deterministic=is_deterministic,
        )
        states = [(state.timestep, state.x_t[:1], state.x_0_hat[:1]) for state in output.trajectory]
        return Samples(output.images, states)

    def add_noise(self, x_0: Tensor, seed: int, t: int) -> Tensor:
        """Return x_t for x_0, (1, C, H, W), and the noise of a seed; t in [0, T)."""
        eps = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(seed))
        return self.scheduler.add_noise(x_0, eps, t)

    def from_image(self, image: Image.Image) -> Tensor:
        """Return an image as x_0, (1, C, H, W) in [-1, 1], cropped and resized to the model's shape."""
        fitted = ImageOps.fit(image.convert(MODES[self.channels]), (self.width, self.height))
        pixels = np.asarray(fitted, dtype=np.float32).reshape(self.height, self.width, self.channels)
        return torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1


# The page: images stand in it as data, in a grid of CSS, so that nothing else is fetched.

CSS = """
.gradio-container {width: 100%; max-width: 1160px !important; margin: 0 auto !important}
.gradio-container h1 {margin: 0 0 -8px}
.gradio-container h3 {margin: 0}
.show, .show .html-container {padding: 0 !important}
.pictures {display: grid; gap: 8px; align-items: center}
.pictures figure {margin: 0}
.pictures img {display: block; width: 100%; margin: 0; border-radius: 4px}
.pictures span {font-size: 13px; text-align: center; white-space: nowrap}
.formula {font-size: 15px; line-height: 2; font-variant-numeric: tabular-nums}
"""


def picture(image: Image.Image, text: str) -> str:
    """Return an image as an <img>, enlarged by a whole factor so that its pixels stay squares."""
    factor = max(1, math.ceil(MIN_SIDE / min(image.size)))
    content = io.BytesIO()
    image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST).save(content, "png")
    data = base64.b64encode(content.getvalue()).decode()
    return f'<figure><img src="data:image/png;base64,{data}" alt="{html.escape(text)}"></figure>'


def pictures(cells: Iterable[str], columns: str) -> str:
    """Return pictures and words in a grid; `columns` is CSS."""
    return f'<div class="pictures" style="grid-template-columns: {columns}">{"".join(cells)}</div>'


def grid(images: Sequence[Image.Image], seeds: Sequence[int]) -> str:
    """Return images in rows of at most eight."""
    cells = [picture(image, f"seed {seed}") for image, seed in zip(images, seeds, strict=True)]
    return pictures(cells, f"repeat({min(8, max(4, len(cells)))}, minmax(0, 1fr))")


def strip(samples: Samples) -> str:
    """Return how the first image emerges: a row of x_t, below it a row of x_0_hat, and below each step its t."""
    texts = [*(f"t = {t}" for t, _, _ in samples.states), "image"]
    rows = {
        ("x_t", "x<sub>t</sub>"): [to_pil(x_t / 2 + 0.5)[0] for _, x_t, _ in samples.states],
        ("x_0_hat", "x̂<sub>0</sub>"): [to_pil(x_0_hat / 2 + 0.5)[0] for _, _, x_0_hat in samples.states],
    }
    cells = []
    for (name, symbol), images in rows.items():
        cells.append(f"<span>{symbol}</span>")
        cells += [
            picture(image, f"{name}, {text}") for image, text in zip([*images, samples.images[0]], texts, strict=True)
        ]
    cells += ["<span></span>", *(f"<span>{text}</span>" for text in texts)]
    return pictures(cells, f"auto repeat({len(texts)}, minmax(0, 1fr))")


def about(model: Model) -> str:
    """Return a description of the model in Markdown."""
    color = {"L": "gray", "RGB": "color", "RGBA": "color images with transparency,"}[MODES[model.channels]]
    predicted = {
        "epsilon": "the noise in a noisy image",
        "sample": "the clean image in a noisy one",
        "v_prediction": "v, a mix of the noise and the clean image",
        STEP_DENOISER: "the next, less noisy image",
    }[model.prediction_type]
    num_parameters = sum(p.numel() for p in model.pipeline.unet.parameters())
    classes = f" It knows {len(model.class_names)} classes." if model.class_names else ""
    card = "" if Path(model.name).exists() else f"\n\n[The model's card](https://huggingface.co/{model.name})"
    return (
        f"A denoising diffusion model for {color} images of {model.width} × {model.height} pixels. Its network has "
        f"{num_parameters:,} parameters and predicts {predicted}.{classes}\n\n"
        f"**Forward process.** In {model.num_timesteps:,} steps, an image dissolves in Gaussian noise: "
        "x<sub>t</sub> = √ᾱ<sub>t</sub> x<sub>0</sub> + √(1 - ᾱ<sub>t</sub>) ε.\n\n"
        "**Reverse process.** The model goes the same way back, from pure noise to an image. At each step, its "
        "network estimates the clean image, x̂<sub>0</sub>, from the noisy one, x<sub>t</sub>, and a sampler takes a "
        "step towards it. *ddpm* draws new noise at each step, and is at its best with all steps. *ddim*, "
        "*dpmsolver++* and *unipc* draw none, and need 10 to 50 steps.\n\n"
        f"Image *i* depends on seed + *i* alone.{card}"
    )


def describe_noise_level(model: Model, t: int) -> str:
    """Return the coefficients of x_t and its signal-to-noise ratio, in HTML."""
    alpha_bar = float(model.scheduler.alpha_bar[t])
    snr = alpha_bar / (1 - alpha_bar)
    decibels = f"{10 * math.log10(snr):+.1f} dB" if snr > 0 else "no signal"
    return (
        f"x<sub>{t}</sub> = {math.sqrt(alpha_bar):.4f} x<sub>0</sub> + {math.sqrt(1 - alpha_bar):.4f} ε<br>"
        f"ᾱ<sub>{t}</sub> = {alpha_bar:.4g}<br>"
        f"SNR = ᾱ<sub>{t}</sub> / (1 - ᾱ<sub>{t}</sub>) = {snr:.4g} ({decibels})"
    )


class Handlers:
    """The actions of the page: functions of the values of its controls, which return HTML."""

    def __init__(self, model: Model, num_images: int):
        self.model = model
        self.num_images = num_images
        self.first_samples = cache(self._first_samples)  # the same for each visitor

    def _first_samples(self) -> tuple[Samples, str, str]:
        return self._sample(self.model.samplers[0], self.model.default_steps, 0, self.num_images, None)

    def _sample(
        self,
        sampler: str,
        num_steps: float,
        seed: float | None,
        num_images: float,
        label: int | None,
        on_step: Callable[[int, int], None] = lambda step, num_steps: None,
    ) -> tuple[Samples, str, str]:
        seeds = [int(seed or 0) + i for i in range(int(num_images))]
        num_classes, labels = len(self.model.class_names), None
        if num_classes:
            labels = [i % num_classes if label is None or label < 0 else label for i in seeds]
        samples = self.model.sample(sampler, int(num_steps), seeds, labels, on_step)
        return samples, grid(samples.images, seeds), strip(samples)

    def show_first(self) -> tuple[str, str]:
        """Return the images and the strip with which the page begins."""
        _, images, chain = self.first_samples()
        return images, chain

    def show_samples(
        self,
        sampler: str,
        num_steps: float,
        seed: float | None,
        num_images: float,
        label: int | None,
        progress: gr.Progress = gr.Progress(),  # noqa: B008  gradio finds it as a default
    ) -> tuple[str, str]:
        """Return the images and the strip that somebody has asked for."""

        def on_step(step: int, num_steps: int) -> None:
            progress((step, num_steps), unit="steps")

        _, images, chain = self._sample(sampler, num_steps, seed, num_images, label, on_step)
        return images, chain

    def show_noised(self, image: Image.Image | None, t: float, seed: float | None) -> tuple[str, str]:
        """Return an image beside its x_t, and the numbers of that t; without an image, the first sample is shown."""
        t = int(t)
        x_0 = self.model.from_image(self.first_samples()[0].images[0] if image is None else image)
        x_t = self.model.add_noise(x_0, int(seed or 0), t)
        cells = [
            picture(to_pil(x_0 / 2 + 0.5)[0], "x_0"),
            picture(to_pil(x_t / 2 + 0.5)[0], f"x_t, t = {t}"),
            "<span>x<sub>0</sub></span>",
            f"<span>x<sub>t</sub>, t = {t}</span>",
        ]
        numbers = f'<div class="formula">{describe_noise_level(self.model, t)}</div>'
        return pictures(cells, "repeat(2, minmax(0, 320px))"), numbers


def build(name: str) -> gr.Blocks:
    """Return the page of the model called `name`, a Hub id or a folder."""
    model = Model(name)
    T = model.num_timesteps
    is_fast = model.samplers[0] != "ddpm"  # which needs all steps
    num_images = 16 if is_fast and model.height * model.width <= 64**2 else 4
    handlers = Handlers(model, num_images)
    title = Path(name).resolve().name if Path(name).exists() else name
    with gr.Blocks(title=title, analytics_enabled=False, fill_width=True) as page:
        gr.Markdown(f"# {title}\nA diffusion model at work: from noise to images, and back.")
        with gr.Tab("Sample"), gr.Row():
            with gr.Column(scale=1, min_width=250):
                sampler = gr.Dropdown(model.samplers, value=model.samplers[0], label="Sampler")
                is_step_denoiser = model.prediction_type == STEP_DENOISER
                steps = gr.Slider(1, T, model.default_steps, step=1, label="Steps", interactive=not is_step_denoiser)
                seed = gr.Number(0, label="Seed", precision=0, minimum=0)
                count = gr.Slider(1, 32, num_images, step=1, label="Images")
                classes = [("each in turn", -1), *((name, i) for i, name in enumerate(model.class_names))]
                label = gr.Dropdown(classes, value=-1, label="Class", visible=bool(model.class_names))
                button = gr.Button("Sample", variant="primary")
            with gr.Column(scale=3, min_width=480):
                gr.Markdown("### Images")
                images = gr.HTML(elem_id="images", elem_classes="show", min_height=160)
                gr.Markdown("### How the first one emerges")
                chain = gr.HTML(elem_id="chain", elem_classes="show", min_height=160)
        with gr.Tab("Forward process"), gr.Row():
            with gr.Column(scale=1, min_width=250):
                timestep = gr.Slider(0, T - 1, T // 4, step=1, label="Timestep t")
                noise_seed = gr.Number(0, label="Seed of the noise", precision=0, minimum=0)
                upload = gr.Image(label="Your own image", type="pil", image_mode=None, sources=["upload"], height=200)
            with gr.Column(scale=3, min_width=480):
                noised = gr.HTML(elem_id="noised", elem_classes="show", min_height=300)
                numbers = gr.HTML(elem_id="numbers", elem_classes="show")
        with gr.Tab("About"):
            gr.Markdown(about(model))

        controls = [sampler, steps, seed, count, label]
        button.click(handlers.show_samples, controls, [images, chain], api_name="sample")
        forward = {
            "fn": handlers.show_noised,
            "inputs": [upload, timestep, noise_seed],
            "outputs": [noised, numbers],
        }
        for changed in (timestep.change, noise_seed.change, upload.change):
            # While the slider moves, only its last position matters.
            changed(**forward, show_progress="hidden", trigger_mode="always_last", api_visibility="private")
        first = page.load(handlers.show_first, None, [images, chain], api_visibility="private")
        first.then(**forward, api_name="add_noise")
    return page


if __name__ == "__main__":
    # The fonts are those of the system: gradio's themes fetch theirs from elsewhere.
    theme = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    build(MODEL).launch(theme=theme, css=CSS, footer_links=["gradio"], ssr_mode=False, show_error=True)
