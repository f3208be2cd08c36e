"""Fields of two channels, and a small model of them that nobody has trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DModel
from PIL import Image

from hf_ddpm import DDPMPipeline, DDPMScheduler
from hf_ddpm.value_range import ValueRange
from tests.support.networks import smallest_unet_config

RANGE = ValueRange(250.0, 310.0, "float32")


def fields(count: int, channels: int = 2, size: int = 8, seed: int = 0) -> np.ndarray:
    """Return smooth fields in the middle of RANGE, (N, C, H, W) float32."""
    noise = np.random.default_rng(seed).standard_normal((count, channels, size, size))
    smooth = sum(np.roll(noise, (i, j), (2, 3)) for i in range(3) for j in range(3)) / 3
    return (280 + 4 * np.clip(smooth, -4, 4)).astype(np.float32)


def save_model(folder: Path, channels: int = 2, value_range: ValueRange = RANGE, **settings: Any) -> Path:
    """Save a pipeline of arrays, whose network has the weights of a seed."""
    torch.manual_seed(0)
    scheduler = DDPMScheduler(20, beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing")
    pipeline = DDPMPipeline(UNet2DModel(**smallest_unet_config(channels=channels, **settings)), scheduler)
    pipeline.value_range = value_range
    pipeline.save_pretrained(folder)
    return folder


def save_mask(folder: Path) -> np.ndarray:
    """Save a mask for images of 8 x 8 as an array and as a picture, and return it, (8, 8) bool."""
    mask = np.zeros((8, 8), bool)
    mask[2:6, 1:5] = True
    np.save(folder / "mask.npy", mask)
    Image.fromarray(mask.astype(np.uint8) * 255).save(folder / "mask.png")
    return mask
