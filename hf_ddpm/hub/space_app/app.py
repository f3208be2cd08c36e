"""A page that shows a diffusion model: its samples, its reverse process and its forward process.

It needs torch, diffusers and gradio, and runs where the files beside it are all there is.

    x_T ~ N(0, I), of image i from Generator(seed + i);  for t in timesteps: x_t <- step(unet(x_t, t), t, x_t)
    x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps, the forward process

    sampler       step
    ddpm          Ho et al. 2020, Algorithm 2, here in `ddpm_step`; "without noise": its mean
    ddim          first-order DPM-Solver++, the same as Song et al. 2021, Eq. 12 with sigma = 0
    dpmsolver++   second order, Lu et al. 2022
    unipc         second order, Zhao et al. 2023
"""

from __future__ import annotations

import base64
import html
import inspect
import io
import math
import os
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
import numpy as np
import torch
from diffusers import DDPMPipeline, DDPMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from PIL import Image, ImageOps
from torch import Tensor

MODEL = os.environ.get("MODEL", "")  # a Hub id, or a folder

STEP_DENOISER, NOISELESS = "previous_sample", "ddpm without noise"
SOLVABLE_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
SHOWN_STEPS = 9
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
MIN_SIDE = 224  # pixels that an image is enlarged to at least, so that the browser only makes it smaller


class State(NamedTuple):
    """A step of sampling: t, and of the first image x_t before the step and the x_0_hat seen from it, (1, C, H, W)."""

    timestep: int
    x_t: Tensor
    x_0_hat: Tensor


class Model:
    """A network with the noise schedule that it learned; `name` is a Hub id or a folder."""

    def __init__(self, name: str):
        pipeline = DDPMPipeline.from_pretrained(name)
        self.name, self.device = name, torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.unet: Any = pipeline.unet.to(self.device).eval()
        # `from_config` drops what diffusers' list of defaults names, which is not always a default.
        self.scheduler: Any = DDPMScheduler.from_config(_all_values(pipeline.scheduler.config))
        self.config = _all_values(self.scheduler.config)
        self.prediction_type = self.config["prediction_type"]
        betas = self.scheduler.betas.double()
        # alpha_bar_{t-1} is alpha_bar[t], and that of the clean image alpha_bar[0] = 1.
        self.alpha_bar = torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod(1 - betas, dim=0)])
        self.num_timesteps, self.channels = len(betas), self.unet.config.in_channels
        size = self.unet.config.sample_size
        self.height, self.width = (size, size) if isinstance(size, int) else size
        self.num_classes: int | None = self.unet.config.num_class_embeds
        if self.channels not in MODES:
            raise ValueError(f"the model must make images of 1, 3 or 4 channels, got {self.channels}")

    @property
    def samplers(self) -> list[str]:
        """Names of those that can sample this model, the best in few steps first."""
        if self.prediction_type == STEP_DENOISER:
            return ["ddpm", NOISELESS]
        solvers = ["unipc", "dpmsolver++", "ddim"] if self.config["beta_schedule"] in SOLVABLE_SCHEDULES else []
        return [*solvers, "ddpm"]

    def add_noise(self, x_0: Tensor, eps: Tensor, t: int) -> Tensor:
        """x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps, Ho et al. 2020, Eq. 4; t in [0, T)."""
        alpha_bar = float(self.alpha_bar[t + 1])
        return math.sqrt(alpha_bar) * x_0 + math.sqrt(1 - alpha_bar) * eps

    def predict_original(self, prediction: Tensor, x_t: Tensor, t: int) -> Tensor:
        """x_0_hat, unclipped, from the network's output at x_t; a step denoiser's is Eq. 7's mean."""
        alpha_bar = self.alpha_bar[t + 1].item()
        signal, noise = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
        match self.prediction_type:
            case "sample":
                return prediction
            case "epsilon":
                return (x_t - noise * prediction) / signal
            case "v_prediction":
                return signal * x_t - noise * prediction
            case _:
                of_x_0, of_x_t, _ = self.posterior(t, t - 1)
                return (prediction - of_x_t * x_t) / of_x_0

    def posterior(self, t: int, s: int) -> tuple[float, float, float]:
        """Of q(x_s | x_t, x_0), s < t, Ho et al. 2020, Eq. 7: the mean's factors of x_0 and x_t, and the variance."""
        now, then = self.alpha_bar[t + 1].item(), self.alpha_bar[s + 1].item()
        beta = 1 - now / then
        return (
            math.sqrt(then) * beta / (1 - now),
            math.sqrt(now / then) * (1 - then) / (1 - now),
            beta * (1 - then) / (1 - now),
        )

    def ddpm_step(self, output: Tensor, x_t: Tensor, t: int, s: int, generators: Sequence[torch.Generator]) -> Tensor:
        """x_s ~ p(x_s | x_t), s the next timestep of the list; no noise for s = -1, or without generators."""
        prediction, learned = output[:, : self.channels], output[:, self.channels :]
        x_0_hat = self.predict_original(prediction, x_t, t)
        if self.config["thresholding"]:
            x_0_hat = self.scheduler._threshold_sample(x_0_hat)
        elif self.config["clip_sample"]:
            x_0_hat = x_0_hat.clamp(-self.config["clip_sample_range"], self.config["clip_sample_range"])
        of_x_0, of_x_t, variance = self.posterior(t, s)
        mean = prediction if self.prediction_type == STEP_DENOISER else of_x_0 * x_0_hat + of_x_t * x_t
        if s < 0 or not generators:
            return mean
        smallest, largest = math.log(variance), math.log(1 - (self.alpha_bar[t + 1] / self.alpha_bar[s + 1]).item())
        match self.config["variance_type"]:
            case "learned":
                log_variance = learned
            case "learned_range":  # Nichol & Dhariwal 2021, Eq. 15
                log_variance = (learned + 1) / 2 * largest + (1 - learned) / 2 * smallest
            case "fixed_large" | "fixed_large_log":
                log_variance = torch.tensor(largest)
            case _:
                log_variance = torch.tensor(smallest)
        return mean + (log_variance / 2).exp() * self._randn(generators)

    def timesteps(self, steps: int) -> list[int]:
        """Of ddpm: `steps` timesteps, strictly falling in [0, T), spaced as the scheduler's config says."""
        T, spacing = self.num_timesteps, self.config["timestep_spacing"]
        if spacing == "leading":
            rising = [i * T // steps + self.config["steps_offset"] for i in range(steps)]
        elif spacing == "linspace":
            rising = np.linspace(0, T - 1, steps).round().astype(int).tolist() if steps > 1 else [T - 1]
        else:
            rising = (np.arange(T, 0, -T / steps)[:steps].round().astype(int) - 1).tolist()[::-1]
        return rising[::-1]

    def solver(self, sampler: str, steps: int) -> Any:
        """diffusers' scheduler for `sampler`, with an exact list of timesteps."""
        # linspace is exact for each number of steps below T and repeats timesteps for T, where trailing is exact.
        spacing = "trailing" if steps == self.num_timesteps else "linspace"
        # A model that was saved with a solver has settings of its own there.
        known = inspect.signature(DDPMScheduler.__init__).parameters
        config = {key: self.config[key] for key in known if key in self.config}
        config |= {"timestep_spacing": spacing, "variance_type": None}
        # They do not know clip_sample; where they threshold, it is done in their place.
        limit, clips = self.config["clip_sample_range"], self.config["clip_sample"] and not self.config["thresholding"]
        if clips:
            config["thresholding"] = True
        if sampler == "unipc":
            scheduler: Any = UniPCMultistepScheduler.from_config(config)
        else:
            config |= {"algorithm_type": "dpmsolver++", "solver_order": 1 if sampler == "ddim" else 2}
            scheduler = DPMSolverMultistepScheduler.from_config(config)
        if clips:
            scheduler._threshold_sample = lambda x_0_hat: x_0_hat.clamp(-limit, limit)
        scheduler.set_timesteps(steps)
        return scheduler

    @torch.no_grad()
    def sample(
        self,
        sampler: str,
        steps: int,
        seeds: Sequence[int],
        labels: Sequence[int] | None = None,
        progress: Any = iter,
    ) -> tuple[Tensor, list[State]]:
        """Samples one image per seed: x_0, (B, C, H, W), and SHOWN_STEPS of the states on the way.

        Args:
            sampler: one of `samplers`. steps: in [1, T]; a step denoiser always takes all T.
            seeds: of the images' generators. labels: classes, one per image. progress: of an iterable, like `tqdm`.
        """
        if self.prediction_type == STEP_DENOISER:
            steps = self.num_timesteps
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        is_ddpm = sampler in ("ddpm", NOISELESS)
        scheduler = None if is_ddpm else self.solver(sampler, steps)
        timesteps = [int(t) for t in (self.timesteps(steps) if scheduler is None else scheduler.timesteps)]
        conditions = {} if labels is None else {"class_labels": torch.tensor(labels, device=self.device)}
        shown = set(np.linspace(0, steps - 1, SHOWN_STEPS).round().astype(int).tolist())
        x_t, states = self._randn(generators), []
        for i in progress(range(steps)):
            t, s = timesteps[i], timesteps[i + 1] if i + 1 < steps else -1
            output = self.unet(x_t, t, **conditions).sample
            prediction = output[:, : self.channels]  # what is left is a learned variance
            if i in shown:
                states.append(State(t, x_t[:1].cpu(), self.predict_original(prediction[:1], x_t[:1], t).cpu()))
            if scheduler is None:
                x_t = self.ddpm_step(output, x_t, t, s, [] if sampler == NOISELESS else generators)
            else:
                x_t = scheduler.step(prediction, scheduler.timesteps[i], x_t).prev_sample
        return x_t.cpu(), states

    def _randn(self, generators: Sequence[torch.Generator]) -> Tensor:
        shape = (1, self.channels, self.height, self.width)
        return torch.cat([torch.randn(shape, generator=generator) for generator in generators]).to(self.device)

    def noise(self, seed: int) -> Tensor:
        """eps, (1, C, H, W), a function of its seed."""
        return self._randn([torch.Generator().manual_seed(seed)]).cpu()

    def from_image(self, image: Image.Image) -> Tensor:
        """x_0, (1, C, H, W) in [-1, 1]: an image cropped to the model's shape, resized and as_our_scheduler."""
        fitted = ImageOps.fit(image.convert(MODES[self.channels]), (self.width, self.height))
        pixels = np.asarray(fitted, dtype=np.float32).reshape(self.height, self.width, self.channels)
        return torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1


def _all_values(config: Any) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name != "_use_default_values"}


def to_images(x: Tensor) -> list[Image.Image]:
    """x in [-1, 1], (B, C, H, W), as images of 8 bits."""
    pixels = ((x.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image) for image in pixels]


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


def picture(x: Tensor, text: str) -> str:
    """x, (1, C, H, W), as an <img>, enlarged by a whole factor and nearest neighbor."""
    (image,) = to_images(x)
    factor = max(1, math.ceil(MIN_SIDE / min(image.size)))
    content = io.BytesIO()
    image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST).save(content, "png")
    data = base64.b64encode(content.getvalue()).decode()
    return f'<figure><img src="data:image/png;base64,{data}" alt="{html.escape(text)}"></figure>'


def pictures(cells: Iterable[str], columns: str) -> str:
    return f'<div class="pictures" style="grid-template-columns: {columns}">{"".join(cells)}</div>'


def grid(x: Tensor, seeds: Sequence[int]) -> str:
    """Images (B, C, H, W) in rows of at most eight."""
    cells = [picture(image[None], f"seed {seed}") for image, seed in zip(x, seeds, strict=True)]
    return pictures(cells, f"repeat({min(8, max(4, len(cells)))}, minmax(0, 1fr))")


def strip(states: Sequence[State], x_0: Tensor) -> str:
    """The way to x_0, (1, C, H, W): a row of x_t, and below it one of x_0_hat; under each step its t."""
    shown = [*((f"t = {t}", x_t, x_0_hat) for t, x_t, x_0_hat in states), ("image", x_0, x_0)]
    cells = ["<span>x<sub>t</sub></span>", *(picture(x_t, f"x_t, {text}") for text, x_t, _ in shown)]
    cells += ["<span>x̂<sub>0</sub></span>", *(picture(x_0_hat, f"x_0_hat, {text}") for text, _, x_0_hat in shown)]
    cells += ["<span></span>", *(f"<span>{text}</span>" for text, _, _ in shown)]
    return pictures(cells, f"auto repeat({len(shown)}, minmax(0, 1fr))")


def about(model: Model) -> str:
    """What the model is, in Markdown."""
    color = {"L": "gray", "RGB": "color", "RGBA": "color images with transparency,"}[MODES[model.channels]]
    learned = {
        "epsilon": "the noise in a noisy image",
        "sample": "the clean image in a noisy one",
        "v_prediction": "v, a mix of the noise and the clean image",
        STEP_DENOISER: "the next, less noisy image",
    }[model.prediction_type]
    parameters = sum(p.numel() for p in model.unet.parameters())
    classes = f" It knows {model.num_classes} classes." if model.num_classes else ""
    card = "" if Path(model.name).exists() else f"\n\n[The model's card](https://huggingface.co/{model.name})"
    return (
        f"A denoising diffusion model for {color} images of {model.width} × {model.height} pixels. Its network has "
        f"{parameters:,} parameters and predicts {learned}.{classes}\n\n"
        f"**Forward process.** In {model.num_timesteps:,} steps an image dissolves in Gaussian noise: "
        "x<sub>t</sub> = √ᾱ<sub>t</sub> x<sub>0</sub> + √(1 - ᾱ<sub>t</sub>) ε.\n\n"
        "**Reverse process.** From pure noise the network goes the same way back. At each step it sees a clean image, "
        "x̂<sub>0</sub>, in the noisy one, x<sub>t</sub>, and a sampler takes a step towards it. *ddpm* draws new "
        "noise at each step and is at its best with all of them; *ddim*, *dpmsolver++* and *unipc* draw none and need "
        "10 to 50.\n\n"
        f"Image *i* depends on seed + *i* alone.{card}"
    )


def build(name: str) -> gr.Blocks:
    """The page of the model called `name`: a Hub id or a folder."""
    model = Model(name)
    T, is_step_denoiser = model.num_timesteps, model.prediction_type == STEP_DENOISER
    fast = len(model.samplers) > 2
    all_steps = T if is_step_denoiser or not fast else min(20, T)
    num_images = 16 if fast and model.height * model.width <= 64**2 else 4

    def sample(sampler: str, steps: float, seed: float | None, count: float, label: int | None, progress: Any = iter):
        seeds = [int(seed or 0) + i for i in range(int(count))]
        labels = None
        if model.num_classes:
            labels = [i % model.num_classes if label is None or label < 0 else label for i in seeds]
        x_0, states = model.sample(sampler, int(steps), seeds, labels, progress)
        return x_0, grid(x_0, seeds), strip(states, x_0[:1])

    @cache  # the same for each visitor
    def first():
        return sample(model.samplers[0], all_steps, 0, num_images, None)

    def show_first():
        return first()[1:]

    def show_samples(sampler, steps, seed, count, label, progress=gr.Progress()):  # noqa: B008  as gradio wants it
        return sample(sampler, steps, seed, count, label, lambda steps: progress.tqdm(steps, unit="steps"))[1:]

    def show_noised(image: Image.Image | None, t: float, seed: float | None):
        t = int(t)
        x_0 = first()[0][:1] if image is None else model.from_image(image)
        x_t = model.add_noise(x_0, model.noise(int(seed or 0)), t)
        alpha_bar = model.alpha_bar[t + 1].item()
        snr = alpha_bar / (1 - alpha_bar)
        decibels = f"{10 * math.log10(snr):+.1f} dB" if snr > 0 else "no signal"
        text = (
            f"x<sub>{t}</sub> = {math.sqrt(alpha_bar):.4f} x<sub>0</sub> + {math.sqrt(1 - alpha_bar):.4f} ε<br>"
            f"ᾱ<sub>{t}</sub> = {alpha_bar:.4g}<br>"
            f"SNR = ᾱ<sub>{t}</sub> / (1 - ᾱ<sub>{t}</sub>) = {snr:.4g} ({decibels})"
        )
        cells = [picture(x_0, "x_0"), picture(x_t, f"x_t, t = {t}"), "<span>x<sub>0</sub></span>"]
        cells.append(f"<span>x<sub>t</sub>, t = {t}</span>")
        return pictures(cells, "repeat(2, minmax(0, 320px))"), f'<div class="formula">{text}</div>'

    title = Path(name).resolve().name if Path(name).exists() else name
    with gr.Blocks(title=title, analytics_enabled=False, fill_width=True) as page:
        gr.Markdown(f"# {title}\nA diffusion model at work: from noise to images, and back.")
        with gr.Tab("Sample"), gr.Row():
            with gr.Column(scale=1, min_width=250):
                sampler = gr.Dropdown(model.samplers, value=model.samplers[0], label="Sampler")
                steps = gr.Slider(1, T, all_steps, step=1, label="Steps", interactive=not is_step_denoiser)
                seed = gr.Number(0, label="Seed", precision=0, minimum=0)
                count = gr.Slider(1, 32, num_images, step=1, label="Images")
                classes = [("each in turn", -1), *((str(i), i) for i in range(model.num_classes or 0))]
                label = gr.Dropdown(classes, value=-1, label="Class", visible=bool(model.num_classes))
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

        button.click(show_samples, [sampler, steps, seed, count, label], [images, chain], api_name="sample")
        forward = {"fn": show_noised, "inputs": [upload, timestep, noise_seed], "outputs": [noised, numbers]}
        for changed in (timestep.change, noise_seed.change, upload.change):
            # While the slider moves only its last place is of interest.
            changed(**forward, show_progress="hidden", trigger_mode="always_last", api_visibility="private")
        page.load(show_first, None, [images, chain], api_visibility="private").then(**forward, api_name="add_noise")
    return page


if __name__ == "__main__":
    # Fonts of the system: gradio's themes fetch theirs.
    theme = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    build(MODEL).launch(theme=theme, css=CSS, footer_links=["gradio"], ssr_mode=False, show_error=True)
