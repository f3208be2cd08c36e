"""Quality while a model trains, measured on the same noises and the same held-out images each time.

    kid          of samples from the averaged weights to held-out images (evaluation/distances.py)
    val_loss     mean squared error of the network's output over held-out images, each at one t, all t alike; with a
                 learned variance, plus 0.001 T L_t, as in training
    levels       its means over tenths of [0, T), from little noise to much

Draws are functions of the image's number, so that training does not change by one bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hf_ddpm.data.batches import epoch_order, to_x_0
from hf_ddpm.data.cache import ImageCache
from hf_ddpm.data.splits import open_split
from hf_ddpm.evaluation.distances import kernel_distance
from hf_ddpm.evaluation.features import FeatureNetwork, load_network
from hf_ddpm.figures import curve
from hf_ddpm.objective import Objective
from hf_ddpm.pipeline import DDPMPipeline
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.runtime.files import read_metrics
from hf_ddpm.runtime.seeds import image_draws
from hf_ddpm.sampling.sampler import sample_images
from hf_ddpm.training.config import TrainingConfig

if TYPE_CHECKING:
    from accelerate import Accelerator

# In each line of eval.jsonl: of one network and one set of images alone is a course of distances one.
OF_COURSE = ("eval_network", "eval_split", "eval_num_images")
NUM_LEVELS = 10
BATCH_SIZE = 64


@dataclass(frozen=True, eq=False)
class Monitor:
    """What samples and losses are measured on.

    Args:
        images: (n, C, R, R) uint8 or int32, held out.
        labels: (n,) int64, or None.
        features: (n, d) of them.
        num_samples: of each measurement.
    """

    network: FeatureNetwork
    images: Tensor
    max_value: int
    labels: Tensor | None
    features: Tensor
    num_samples: int


def check_course(config: TrainingConfig, measured: Path) -> None:
    """Raises: UsageError if the lines in `measured`, eval.jsonl of a run that goes on, are of other images."""
    for line in read_metrics(measured)[-1:] if config.eval_steps is not None else ():
        for name in OF_COURSE:
            if (was := line.get(name, getattr(config, name))) != getattr(config, name):
                raise UsageError(
                    f"{name} was {was} in this run, got {getattr(config, name)}: give that, or move {measured} away"
                )


def open_monitor(config: TrainingConfig, images: Any, accelerator: Accelerator) -> Monitor:
    """The held-out images of `config` and their features, which the processes share.

    Args:
        images: of training, whose form they must have.

    Raises:
        UsageError: no such split or network, or images of another form.
    """
    network = load_network(config.eval_network, config.eval_network_path, accelerator.device)
    with open_split(config, config.eval_split, "eval_split") as held_out:
        form = (held_out.channels, held_out.resolution, held_out.max_value)
        if form != (images.channels, images.resolution, images.max_value) or not held_out.is_uniform:
            raise UsageError(
                f"eval_split must hold square images like those of training, got {form} of {config.eval_split!r} and "
                f"{(images.channels, images.resolution, images.max_value)}: --center_crop"
            )
        if len(held_out) < 4:
            raise UsageError(f"eval_split must hold at least 4 images, got {len(held_out)} of {config.eval_split!r}")
        chosen = epoch_order(0, 0, len(held_out))[: config.eval_num_images]
        pixels, labels = _copy(held_out, chosen)
    mine = _share(len(pixels), accelerator)
    parts = [network(_to_uint8(pixels[part], images.max_value)) for part in _batches(mine)]
    features = _gather(accelerator, torch.cat(parts), len(pixels))
    return Monitor(network, pixels, images.max_value, labels, features, config.eval_num_images)


@torch.no_grad()
def measure(
    monitor: Monitor, accelerator: Accelerator, pipeline: DDPMPipeline, objective: Objective, num_inference_steps: int
) -> dict[str, Any]:
    """`kid`, its `kid_standard_error`, `val_loss` and `levels` of the pipeline's network, the same on all processes.

    Args:
        pipeline: in eval mode.
        objective: of training; weight and density of t are those of this measure.
    """
    fixed = replace(objective, density="stratified", weighting="constant")
    n = len(monitor.images)
    parts = []
    for part in _batches(_share(n, accelerator)):
        x_0 = to_x_0(monitor.images[part].to(accelerator.device), monitor.max_value)
        labels = None if monitor.labels is None else monitor.labels[part].to(accelerator.device)
        uniform, noise = image_draws(0, torch.from_numpy(part), x_0.shape[1:], accelerator.device)
        t = fixed.timesteps_from_uniform(uniform, first_index=int(part[0]), global_batch_size=n)
        loss = fixed(pipeline.unet, x_0, labels, timesteps=t, noise=noise)
        parts.append(torch.stack([loss, t.float()], dim=1))
    loss, t = _gather(accelerator, torch.cat(parts), n).double().unbind(dim=1)
    level = (t * NUM_LEVELS / len(objective.scheduler)).long()
    levels = [float(loss[level == k].mean()) if (level == k).any() else None for k in range(NUM_LEVELS)]

    classes, parts = pipeline.unet.config.num_class_embeds, []
    for part in _batches(_share(monitor.num_samples, accelerator)):
        samples = sample_images(
            pipeline,
            part.tolist(),
            batch_size=len(part),
            num_inference_steps=num_inference_steps,
            class_labels=None if classes is None else (part % classes).tolist(),
        )
        parts.append(monitor.network((samples * 255).round().to(torch.uint8)))
    kid, standard_error = kernel_distance(
        _gather(accelerator, torch.cat(parts), monitor.num_samples), monitor.features
    )
    return {
        "kid": _finite(kid),
        "kid_standard_error": _finite(standard_error),
        "val_loss": _finite(float(loss.mean())),
        "levels": levels,
    }


def draw_course(records: list[dict[str, Any]], folder: Path) -> None:
    """`kid.png` and `val_loss.png`: what was measured, against the images seen."""
    for name, label in (("kid", "kernel distance"), ("val_loss", "held-out loss")):
        known = [r for r in records if r[name] is not None]
        points = [r["images"] for r in known], [r[name] for r in known]
        if known:
            curve(folder / f"{name}.png", {label: points}, "images seen", label)


def _copy(images: ImageCache, chosen: np.ndarray) -> tuple[Tensor, Tensor | None]:
    pixels = np.stack([images.image(int(i)) for i in chosen])
    labels = None if images.labels is None else torch.from_numpy(images.labels[chosen])
    return torch.from_numpy(pixels if pixels.dtype == np.uint8 else pixels.astype(np.int32)), labels


def _to_uint8(pixels: Tensor, max_value: int) -> Tensor:
    return pixels if max_value == 255 else (pixels / 257).round().to(torch.uint8)


def _share(count: int, accelerator: Accelerator) -> np.ndarray:
    """The numbers of this process, as many as of each other; those that are too many repeat the last."""
    size = -(-count // accelerator.num_processes)
    return np.minimum(accelerator.process_index * size + np.arange(size), count - 1)


def _batches(numbers: np.ndarray) -> list[np.ndarray]:
    return [numbers[first : first + BATCH_SIZE] for first in range(0, len(numbers), BATCH_SIZE)]


def _gather(accelerator: Accelerator, rows: Tensor, count: int) -> Tensor:
    gathered: Any = accelerator.gather(rows.to(accelerator.device))
    return gathered.cpu()[:count]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
