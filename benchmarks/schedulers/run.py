"""Say which schedulers of diffusers sample a network right: its images have the mean and the spread of the data.

    python -m benchmarks.schedulers.run

The network is exact for images whose values are normal, N(0.3, 0.25^2), so that whatever the images' mean and spread
differ by is the scheduler's. Each scheduler gets the model's config, as `from_config` takes it, or its own settings if
it is for flow matching, and takes STEPS steps. The pipeline refuses those that are not in its list. Writes `table.md`.
"""

from __future__ import annotations

import inspect
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.utils import logging

from hf_ddpm import DDPMPipeline, DDPMScheduler
from hf_ddpm.pipeline import SAMPLING_SCHEDULERS

MEAN, SPREAD = 0.3, 0.25
STEPS, NUM_IMAGES = 100, 32
# A chain with the variance of the posterior has too little noise in few steps.
MEAN_TOLERANCE, SPREAD_TOLERANCE = 0.02, 0.03
NETWORK: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (4,),
    "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "attention_head_dim": 4,
}


class Exact(diffusers.UNet2DModel):
    """A network that predicts the noise as well as can be known for values of N(MEAN, SPREAD^2)."""

    def forward(self, sample: Any, timestep: Any, class_labels: Any = None, return_dict: bool = True) -> Any:
        alpha_bar = DDPMScheduler().alpha_bar
        t = torch.as_tensor(timestep, dtype=torch.float64).reshape(-1)
        # Between two timesteps, where some schedulers look, the logarithm of sigma is linear.
        low = t.floor().long().clamp(0, len(alpha_bar) - 1)
        high = (low + 1).clamp(max=len(alpha_bar) - 1)
        log_sigma = ((1 - alpha_bar) / alpha_bar).log() / 2
        sigma = torch.lerp(log_sigma[low], log_sigma[high], (t - low).clamp(0, 1)).exp().view(-1, 1, 1, 1)
        a, b = (1 / (1 + sigma**2)).sqrt(), (sigma**2 / (1 + sigma**2)).sqrt()
        noise = b / (a**2 * SPREAD**2 + b**2) * (sample.double() - a * MEAN)
        return diffusers.models.unets.unet_2d.UNet2DOutput(sample=noise.float())


class ExactFlow(diffusers.UNet2DModel):
    """The same for x_s = (1 - s) x_0 + s eps, of which it predicts eps - x_0; its timestep is 1000 s."""

    def forward(self, sample: Any, timestep: Any, class_labels: Any = None, return_dict: bool = True) -> Any:
        s = torch.as_tensor(timestep, dtype=torch.float64).reshape(-1, 1, 1, 1) / 1000
        residual = (sample.double() - (1 - s) * MEAN) / ((1 - s) ** 2 * SPREAD**2 + s**2)
        velocity = s * residual - (MEAN + (1 - s) * SPREAD**2 * residual)
        return diffusers.models.unets.unet_2d.UNet2DOutput(sample=velocity.float())


def scheduler_classes() -> list[type]:
    """Return the schedulers that diffusers exports."""
    found = [getattr(diffusers, name, None) for name in sorted(dir(diffusers)) if name.endswith("Scheduler")]
    return [each for each in found if inspect.isclass(each) and not each.__name__.startswith("Flax")]


def make_pipeline(cls: Any) -> DDPMPipeline:
    """Return a pipeline of the exact network for a scheduler.

    Raises:
        Exception: When diffusers cannot make the scheduler: its settings or a package are missing.
    """
    is_flow = any(word in cls.__name__ for word in ("Flow", "AncestralRF"))
    unet: Any = (ExactFlow if is_flow else Exact)(**NETWORK)
    scheduler = cls() if is_flow else cls.from_config(DDPMScheduler(clip_sample=False).config)
    pipeline = DDPMPipeline(unet, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def mean_and_spread(pipeline: DDPMPipeline) -> tuple[float, float]:
    """Sample images and return mean and standard deviation of their values, in [-1, 1]."""
    generator = torch.Generator().manual_seed(0)
    images: Any = pipeline(NUM_IMAGES, generator, STEPS, output_type="np").images
    values = 2 * np.asarray(images, dtype=np.float64) - 1
    return float(values.mean()), float(values.std())


def is_right(mean: float, spread: float) -> bool:
    return abs(mean - MEAN) < MEAN_TOLERANCE and abs(spread - SPREAD) < SPREAD_TOLERANCE


def main() -> None:
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    text = (
        f"torch {version('torch')}, diffusers {version('diffusers')}; {NUM_IMAGES} images in {STEPS} steps by a "
        f"network that is exact for values of N({MEAN}, {SPREAD}^2).\n\n"
        "| scheduler | mean | spread | |\n|---|---|---|---|\n"
    )
    for cls in scheduler_classes():
        mean = spread = ""
        if cls.__name__ not in SAMPLING_SCHEDULERS:
            outcome = "refused"
        else:
            try:
                values = mean_and_spread(make_pipeline(cls))
            except ImportError as error:
                outcome = f"not measured: {' '.join(str(error).split())[:80]}"
            else:
                mean, spread = (f"{value:.3f}" for value in values)
                outcome = "sampled" if is_right(*values) else "WRONG"
        text += f"| {cls.__name__} | {mean} | {spread} | {outcome} |\n"
    path = Path(__file__).with_name("table.md")
    path.write_text(text)
    print(f"{text}\nThe table is in {path}.")


if __name__ == "__main__":
    main()
