"""Validation while a model trains, on the same noises and the same held-out images each time.

    kid          the kernel distance from samples of the averaged weights to held-out images (evaluation/distances.py)
    val_loss     the mean squared error of the network's output over held-out images, each at one t, all t alike; with
                 a learned variance, plus 0.001 T L_t, as in training
    levels       the means of val_loss over tenths of [0, T), from little noise to much
    by_class     kid and val_loss of each class of which there are enough images

The draws are functions of the image's number, so that training does not change by one bit.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_ddpm.classes import Classes
from hf_ddpm.data.batches import epoch_order, to_x_0
from hf_ddpm.data.cache import ImageCache
from hf_ddpm.data.labels import with_network_labels
from hf_ddpm.data.splits import describe_split, open_split
from hf_ddpm.evaluation.distances import MIN_CLASS_IMAGES, kernel_distance
from hf_ddpm.evaluation.features import FeatureNetwork, load_network
from hf_ddpm.figures import Curve, draw_curves
from hf_ddpm.labels import Labels
from hf_ddpm.objective import Objective
from hf_ddpm.pipeline import DDPMPipeline
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.runtime.files import read_metrics
from hf_ddpm.runtime.format import finite_or_none
from hf_ddpm.runtime.processes import Processes
from hf_ddpm.runtime.seeds import image_draws
from hf_ddpm.sampling.sampler import labels_in_turn, sample_all
from hf_ddpm.training.config import TrainingConfig

# They stand in each line of eval.jsonl: only distances by one network and to one set of images make a curve.
VALIDATION_SETTINGS = ("eval_network", "eval_split", "eval_num_images")
NUM_LEVELS = 10
BATCH_SIZE = 64


@dataclass(frozen=True, eq=False)
class Validation:
    """The held-out images that samples and losses are measured on.

    Args:
        network: The feature network of the kernel distance.
        images: (n, C, R, R) uint8 or int32, on the CPU.
        max_value: The value of white: 255 or 65535.
        labels: As the network takes them, (n,) or (n, number of columns); None without labels.
        features: (n, d), of the images.
        num_samples: The number of samples per validation.
    """

    network: FeatureNetwork
    images: Tensor
    max_value: int
    labels: Tensor | None
    features: Tensor
    num_samples: int


def check_validation_settings(config: TrainingConfig, path: Path) -> None:
    """Check that the lines in `path`, eval.jsonl of a resumed run, were measured by the same settings.

    Raises:
        UsageError: They were not.
    """
    lines = read_metrics(path) if config.eval_steps is not None else []
    for line in lines[-1:]:
        for name in VALIDATION_SETTINGS:
            value = getattr(config, name)
            if line.get(name, value) != value:
                raise UsageError(f"{name} was {line[name]} in this run, got {value}: give that, or move {path} away")


def open_validation(
    config: TrainingConfig, images: Any, labels: Labels | None, processes: Processes, device: torch.device
) -> Validation:
    """Open the held-out images of `config`; the processes share the work of their features.

    Args:
        images: The images of training, whose size, channels and depth the held-out ones must have.
        labels: The labels that the network is conditioned on.

    Raises:
        UsageError: There is no such split or network, or the images are of another form.
    """
    network = load_network(config.eval_network, config.eval_network_path, device)
    with open_split(config, config.eval_split, "eval_split") as held_out:
        image_format = (held_out.channels, held_out.resolution, held_out.max_value)
        wanted_format = (images.channels, images.resolution, images.max_value)
        if image_format != wanted_format or not held_out.is_uniform:
            raise UsageError(
                f"eval_split must hold square images like those of training, got {image_format} of "
                f"{config.eval_split!r} and {wanted_format}: --center_crop"
            )
        if len(held_out) < 4:
            raise UsageError(f"eval_split must hold at least 4 images, got {len(held_out)} of {config.eval_split!r}")
        if processes.rank == 0:
            for line in describe_split(config, config.eval_split, held_out):
                tqdm.write(line, file=sys.stderr)
        rows = epoch_order(0, 0, len(held_out))[: config.eval_num_images]
        pixels, network_labels = _copy(with_network_labels(held_out, labels), rows)
    parts = [network(_to_uint8(pixels[part], images.max_value)) for part in _batches(processes, len(pixels))]
    features = processes.gather_rows(torch.cat(parts), len(pixels))
    return Validation(network, pixels, images.max_value, network_labels, features, config.eval_num_images)


@torch.no_grad()
def measure_validation(
    validation: Validation,
    processes: Processes,
    pipeline: DDPMPipeline,
    objective: Objective,
    num_inference_steps: int,
    device: torch.device,
) -> dict[str, Any]:
    """Return `kid`, its `kid_standard_error`, `val_loss`, `levels` and `by_class`, the same on all processes.

    Args:
        pipeline: The pipeline to sample, its network in eval mode.
        objective: The objective of training; weight and density of t are those of validation.
    """
    loss, t = _held_out_loss(validation, processes, pipeline, objective, device)
    level = (t * NUM_LEVELS / len(objective.scheduler)).long()
    levels = [float(loss[level == k].mean()) if (level == k).any() else None for k in range(NUM_LEVELS)]
    features = _sample_features(validation, processes, pipeline, num_inference_steps)
    kid, standard_error = kernel_distance(features, validation.features)
    return {
        "kid": finite_or_none(kid),
        "kid_standard_error": finite_or_none(standard_error),
        "val_loss": finite_or_none(float(loss.mean())),
        "levels": levels,
        "by_class": measure_classes(validation, pipeline.classes, loss, features),
    }


def measure_classes(
    validation: Validation, classes: Classes | None, loss: Tensor, features: Tensor
) -> dict[str, dict[str, float | None]]:
    """Return `kid`, its standard error and `val_loss` of each class of which there are enough images.

    Args:
        classes: The classes, which the samples show in turn; None for a model without classes.
        loss: The loss of each held-out image, (n,).
        features: Those of the samples, (N, d).
    """
    measured = {}
    if classes is None or validation.labels is None:
        return measured
    for number, name in enumerate(classes.names):
        is_held_out, samples = validation.labels == number, features[number :: len(classes)]
        if min(int(is_held_out.sum()), len(samples)) < MIN_CLASS_IMAGES:
            continue
        kid, standard_error = kernel_distance(samples, validation.features[is_held_out])
        measured[name] = {
            "kid": finite_or_none(kid),
            "kid_standard_error": finite_or_none(standard_error),
            "val_loss": finite_or_none(float(loss[is_held_out].mean())),
        }
    return measured


def _held_out_loss(
    validation: Validation, processes: Processes, pipeline: DDPMPipeline, objective: Objective, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the loss of each held-out image, (n,) float64, and its t, (n,)."""
    fixed = replace(objective, density="stratified", weighting="constant")
    count = len(validation.images)
    rows = []
    for part in _batches(processes, count):
        x_0 = to_x_0(validation.images[part].to(device), validation.max_value)
        labels = None if validation.labels is None else validation.labels[part].to(device)
        uniform, noise = image_draws(0, torch.from_numpy(part), x_0.shape[1:], device)
        t = fixed.timesteps_from_uniform(uniform, first_index=int(part[0]), global_batch_size=count)
        loss = fixed(pipeline.unet, x_0, labels, timesteps=t, noise=noise)
        rows.append(torch.stack([loss, t.float()], dim=1))
    loss, t = processes.gather_rows(torch.cat(rows), count).double().unbind(dim=1)
    return loss, t


def _sample_features(
    validation: Validation, processes: Processes, pipeline: DDPMPipeline, num_inference_steps: int
) -> Tensor:
    """Return the features of the samples of seeds 0, 1, ..., (num_samples, d)."""
    seeds = range(validation.num_samples)
    samples = sample_all(
        pipeline,
        seeds,
        processes,
        batch_size=BATCH_SIZE,
        num_inference_steps=num_inference_steps,
        class_labels=labels_in_turn(pipeline.labels, seeds),
    )
    rows = [validation.network(samples[part]) for part in _batches(processes, len(seeds))]
    return processes.gather_rows(torch.cat(rows), len(seeds))


def draw_validation_curves(records: list[dict[str, Any]], folder: Path) -> None:
    """Draw the kernel distance and the held-out loss over the images seen: `kid.png` and `val_loss.png` in `folder`.

    Args:
        records: The lines of eval.jsonl. A picture without a value is not drawn.
    """
    for name, title, y_label in (
        ("kid", "Distance of samples to held-out images", "kernel distance"),
        ("val_loss", "Loss on held-out images", "mean loss over all t"),
    ):
        measured = [record for record in records if record[name] is not None]
        if not measured:
            continue
        errors = [record.get(f"{name}_standard_error") for record in measured]
        draw_curves(
            folder / f"{name}.png",
            [
                Curve(
                    y_label,
                    [record["images"] for record in measured],
                    [record[name] for record in measured],
                    [math.nan if error is None else error for error in errors],
                )
            ],
            title=title,
            x_label="training images seen",
            y_label=f"{y_label}\n(lower is better)",
            y_from_zero=name == "kid",
        )


def _copy(images: ImageCache, rows: np.ndarray) -> tuple[Tensor, Tensor | None]:
    pixels = np.stack([images.image(int(row)) for row in rows])
    labels = None if images.labels is None else torch.from_numpy(images.labels[rows])
    return torch.from_numpy(pixels if pixels.dtype == np.uint8 else pixels.astype(np.int32)), labels


def _to_uint8(pixels: Tensor, max_value: int) -> Tensor:
    return pixels if max_value == 255 else (pixels / 257).round().to(torch.uint8)


def _batches(processes: Processes, count: int) -> list[np.ndarray]:
    """Return the share of this process of `count` numbers, in batches; every process gets as many."""
    share = np.array(processes.split_evenly(count))
    return [share[first : first + BATCH_SIZE] for first in range(0, len(share), BATCH_SIZE)]
