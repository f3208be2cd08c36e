"""Small models that are saved as those which were tuned for few steps; nobody has trained them."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DModel

from hf_ddpm import DDPMPipeline, DDPMScheduler
from hf_ddpm.classes import Classes
from hf_ddpm.solvers import Sampler, tuned_scheduler
from tests.support.networks import smallest_unet_config

T = 20
TIMESTEPS = [19, 14, 9, 4]  # of 4 steps


def tuned_pipeline(cls: Any = DDPMPipeline, classes: Classes | None = None, unet: Any = None, **settings: Any) -> Any:
    """A pipeline of a tuned model of 3 channels, or of the network that is given."""
    torch.manual_seed(0)
    if unet is None:
        unet = UNet2DModel(**smallest_unet_config(3, num_class_embeds=classes and classes.num_embeddings)).eval()
    defaults = {"num_train_timesteps": T, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}
    scheduler = DDPMScheduler(**{**defaults, **settings})
    pipeline = cls(unet, tuned_scheduler(scheduler.config))
    pipeline.kept_sampler = Sampler("lcm", 4)
    if classes is not None:
        pipeline.classes = classes
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
