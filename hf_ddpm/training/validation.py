"""The validation while a model trains, on the same noises and the same held-out images each time.

    kid          the kernel distance from samples of the averaged weights to held-out images (evaluation/distances.py)
    kid_by_steps kid in each number of steps that a model is tuned for; kid itself is that of the most steps
    val_loss     the mean squared error of the network's output over held-out images, each at one t, all t alike; with
                 a learned variance, plus 0.001 T L_t, as in training
                 a model that is tuned for few steps has none, as its target moves with it
    levels       the means of val_loss over tenths of [0, T), from little noise to much
    by_class     kid and val_loss of each class of which there are enough images
    memorization how near samples are to training and to held-out images (evaluation/training_share.py), where images
                 are made from noise alone and not streamed
    psnr         where images are made from images: how near the samples come to the held-out images themselves

Images that are made from images are made from the held-out conditions, one sample for each, without noise on these.

The draws are functions of the image's number, so that training does not change by one bit.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_ddpm.classes import Classes
from hf_ddpm.condition import Condition
from hf_ddpm.conditional import Conditioned
from hf_ddpm.data.batches import as_tensor, epoch_order, fixed_pixels, to_x_0
from hf_ddpm.data.cache import ImageCache
from hf_ddpm.data.conditions import low_resolution_conditions, to_conditions, with_conditions_of_model
from hf_ddpm.data.labels import network_label, with_network_labels
from hf_ddpm.data.splits import describe_split, open_split
from hf_ddpm.evaluation.distances import MIN_CLASS_IMAGES, kernel_distance
from hf_ddpm.evaluation.features import FeatureNetwork, load_network
from hf_ddpm.evaluation.fidelity import mean_of, psnr
from hf_ddpm.evaluation.training_share import RealImages, compare_samples, nearest_images, summarize
from hf_ddpm.image_size import format_size
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
from hf_ddpm.value_range import Scale, ValueRange, pictured, require_seen

# They stand in each line of eval.jsonl: only distances by one network and to one set of images make a curve.
VALIDATION_SETTINGS = ("eval_network", "eval_split", "eval_num_images")
NUM_LEVELS = 10
# Samples are compared with at most so many training images, which hold at most so many values.
MAX_TRAINING_IMAGES, MAX_TRAINING_VALUES = 10_000, 2**29
BATCH_SIZE = 64


@dataclass(frozen=True, eq=False)
class Validation:
    """The held-out images that samples and losses are measured on.

    Args:
        network: The feature network of the kernel distance.
        images: (n, C, H, W) uint8 or int32, of arrays in their own type, on the CPU.
        scale: What -1 and 1 stand for in them.
        labels: As the network takes them, (n,) or (n, number of columns); None without labels.
        features: (n, d), of the images.
        num_samples: The number of samples per validation.
        condition: What images are made from; None: from noise alone.
        column: Where they are made from those of a column, these, (n, C', H, W) as `images`, on the CPU.
        column_scale: The largest value of a pixel in the column, or the range of its arrays.
        real: What samples are compared with for memorization; None: they are not.
        real_distance: The median distance of the held-out images of `real` to its training images.
    """

    network: FeatureNetwork
    images: Tensor
    scale: Scale
    labels: Tensor | None
    features: Tensor
    num_samples: int
    condition: Condition | None = None
    column: Tensor | None = None
    column_scale: Scale = 255
    real: RealImages | None = None
    real_distance: float | None = None

    def conditions(self, numbers: np.ndarray, device: torch.device) -> Tensor | None:
        """Return the conditions of the images with these numbers, (B, C', H, W) in [-1, 1]; None: there are none."""
        if self.condition is None:
            return None
        if self.column is not None:
            return to_conditions(self.column[numbers].to(device), self.column_scale)
        assert self.condition.super_resolution is not None
        pixels = self.images[numbers].to(device)
        return low_resolution_conditions(pixels, self.condition.super_resolution, self.scale)


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
    config: TrainingConfig,
    images: Any,
    labels: Labels | None,
    condition: Condition | None,
    processes: Processes,
    device: torch.device,
) -> Validation:
    """Open the held-out images of `config`; the processes share the work of their features.

    Args:
        images: The images of training, whose size, channels and depth the held-out ones must have.
        labels: The labels that the network is conditioned on.
        condition: What images are made from; None: from noise alone.

    Raises:
        UsageError: There is no such split or network, or the images are of another form.
    """
    if images.value_range is not None:
        require_seen(images.value_range, images.channels)
    network = load_network(config.eval_network, config.eval_network_path, device)
    with open_split(config, config.eval_split, "eval_split") as held_out:
        image_format, wanted_format = _format_of(held_out), _format_of(images)
        if image_format != wanted_format:
            raise UsageError(
                f"eval_split must hold images like those of training, got {image_format} of {config.eval_split!r} "
                f"beside {wanted_format}: convert them, or give --no_preserve_input_precision for 8 bits of both"
            )
        if not (held_out.is_uniform or held_out.random_crop):
            sizes = sorted({(int(height), int(width)) for height, width in held_out.index[:, 1:]})
            raise UsageError(
                f"eval_split must hold images of one shape, as nothing crops them, got {format_size(sizes[0])} and "
                f"{format_size(sizes[-1])} of {config.eval_split!r} after they were resized: --center_crop"
            )
        if len(held_out) < 4:
            raise UsageError(f"eval_split must hold at least 4 images, got {len(held_out)} of {config.eval_split!r}")
        if images.value_range is not None:  # they are seen in the range of training
            held_out = held_out.in_range(images.value_range)
        held_out = with_conditions_of_model(held_out, condition, "eval_split", config.eval_split)
        if processes.rank == 0:
            for line in describe_split(config, config.eval_split, held_out):
                tqdm.write(line, file=sys.stderr)
        rows = epoch_order(0, 0, len(held_out))[: config.eval_num_images]
        pixels, network_labels = _copy(with_network_labels(held_out, labels), rows)
        of_column = held_out.conditions
        column = None if of_column is None else as_tensor(fixed_pixels(of_column, rows))
        column_scale = 255 if of_column is None else of_column.scale
    scale = images.scale
    real = None if condition is not None else _real_images(config, images, pixels)
    parts = [network(_to_uint8(pixels[part], scale)) for part in _batches(processes, len(pixels))]
    features = processes.gather_rows(torch.cat(parts), len(pixels))
    # An image that is made from another one has as many samples as there are others.
    num_samples = config.eval_num_images if condition is None else len(pixels)
    return Validation(
        network,
        pixels,
        scale,
        network_labels,
        features,
        num_samples,
        condition,
        column,
        column_scale,
        real,
        None if real is None else _distance_of_held_out(real, processes),
    )


@torch.no_grad()
def measure_validation(
    validation: Validation,
    processes: Processes,
    pipeline: DDPMPipeline,
    objective: Objective,
    num_inference_steps: int,
    device: torch.device,
    tuned_steps: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Return `kid`, its `kid_standard_error`, `val_loss`, `levels` and `by_class`, the same on all processes.

    Where images are made from images, also `psnr` and `psnr_standard_error`; else what `summarize` returns, and
    `real_distance`. For a model that is tuned for few steps, also `kid_by_steps`.

    Args:
        pipeline: The pipeline to sample, its network in eval mode.
        objective: The objective of training; weight and density of t are those of validation.
        num_inference_steps: The number of steps that all but `kid_by_steps` is measured with.
        tuned_steps: The numbers of steps that the model is tuned for; None: it is not.
    """
    levels: list[float | None] = [None] * NUM_LEVELS
    loss = torch.full((len(validation.images),), math.nan)
    if tuned_steps is None:  # the target of tuning moves with the network, and says nothing of its samples
        loss, t = _held_out_loss(validation, processes, pipeline, objective, device)
        level = (t * NUM_LEVELS / len(objective.scheduler)).long()
        levels = [float(loss[level == k].mean()) if (level == k).any() else None for k in range(NUM_LEVELS)]
    samples, sample_labels = _sample(validation, processes, pipeline, num_inference_steps, device)
    features, fidelity, memorized = _measure_samples(validation, processes, samples)
    kid, standard_error = kernel_distance(features, validation.features)
    by_steps = {num_inference_steps: (kid, standard_error)}
    for num_steps in tuned_steps or ():
        if num_steps not in by_steps:
            others, _ = _sample(validation, processes, pipeline, num_steps, device)
            by_steps[num_steps] = kernel_distance(_features(validation, processes, others), validation.features)
    nearness = {} if fidelity is None else mean_of(fidelity)._asdict()
    return {
        "kid": finite_or_none(kid),
        "kid_standard_error": finite_or_none(standard_error),
        "val_loss": finite_or_none(float(loss.mean())),
        "levels": levels,
        "by_class": measure_classes(validation, pipeline.classes, loss, features, sample_labels),
        **({} if tuned_steps is None else {"kid_by_steps": _describe_distances(by_steps)}),
        **memorized,
        **{{"value": "psnr"}.get(name, f"psnr_{name}"): value for name, value in nearness.items()},
    }


def measure_classes(
    validation: Validation,
    classes: Classes | None,
    loss: Tensor,
    features: Tensor,
    sample_labels: list[int] | None,
) -> dict[str, dict[str, float | None]]:
    """Return `kid`, its standard error and `val_loss` of each class of which there are enough images.

    Args:
        classes: The classes; None for a model without classes.
        loss: The loss of each held-out image, (n,).
        features: Those of the samples, (N, d).
        sample_labels: The class of each sample; None for a model without classes.
    """
    measured = {}
    if classes is None or validation.labels is None or sample_labels is None:
        return measured
    for number, name in enumerate(classes.names):
        is_held_out, samples = validation.labels == number, features[torch.tensor(sample_labels) == number]
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
        x_0 = to_x_0(validation.images[part].to(device), validation.scale)
        labels = None if validation.labels is None else validation.labels[part].to(device)
        uniform, noise = image_draws(0, torch.from_numpy(part), x_0.shape[1:], device)
        t = fixed.timesteps_from_uniform(uniform, first_index=int(part[0]), global_batch_size=count)
        condition = validation.conditions(part, device)
        network = pipeline.unet if condition is None else Conditioned(pipeline.unet, condition)
        loss = fixed(network, x_0, labels, timesteps=t, noise=noise)
        rows.append(torch.stack([loss, t.float()], dim=1))
    loss, t = processes.gather_rows(torch.cat(rows), count).double().unbind(dim=1)
    return loss, t


def _sample(
    validation: Validation,
    processes: Processes,
    pipeline: DDPMPipeline,
    num_inference_steps: int,
    device: torch.device,
) -> tuple[Tensor, list[Any] | None]:
    """Return the samples of the seeds 0, 1, ..., (num_samples, C, R, R) uint8, and their labels, if there are any.

    Where images are made from images, sample i is made from the condition of image i.
    """
    seeds = range(validation.num_samples)
    conditions, labels = validation.conditions(np.arange(len(seeds)), device), labels_in_turn(pipeline.labels, seeds)
    if conditions is not None:
        conditions = conditions.cpu() / 2 + 0.5
        labels = None if validation.labels is None else [network_label(label) for label in validation.labels.numpy()]
    samples = sample_all(
        pipeline,
        seeds,
        processes,
        batch_size=BATCH_SIZE,
        num_inference_steps=num_inference_steps,
        class_labels=labels,
        conditions=conditions,
    )
    return samples, labels


def _measure_samples(
    validation: Validation, processes: Processes, samples: Tensor
) -> tuple[Tensor, Tensor | None, dict[str, float]]:
    """Measure the samples.

    Returns:
        Their features, (num_samples, d); where images are made from images, the PSNR of each, (num_samples,); and
        what is recorded of memorization.
    """
    count = len(samples)
    parts = _batches(processes, count)
    shown = _shown(validation, samples)
    features = _features(validation, processes, samples)
    memorized: dict[str, Any] = {}
    fidelity = None
    if validation.real is not None and validation.real_distance is not None:
        rows = compare_samples(shown[np.concatenate(parts)].cpu(), validation.real)
        memorized = summarize(processes.gather_rows(rows, count), validation.real)
        memorized |= {"real_distance": validation.real_distance}
    if validation.condition is not None:
        truth = [to_x_0(validation.images[part], validation.scale) / 2 + 0.5 for part in parts]
        rows = [psnr(samples[part] / 255, images) for part, images in zip(parts, truth, strict=True)]
        fidelity = processes.gather_rows(torch.cat(rows), count)
    return features, fidelity, memorized


def _features(validation: Validation, processes: Processes, samples: Tensor) -> Tensor:
    """Return the features of samples, (num_samples, d); the processes share the work."""
    shown = _shown(validation, samples)
    parts = [validation.network(shown[part]) for part in _batches(processes, len(samples))]
    return processes.gather_rows(torch.cat(parts), len(samples))


def _shown(validation: Validation, samples: Tensor) -> Tensor:
    """Return samples as a feature network sees them; of arrays the channels that pictures show."""
    return pictured(samples, validation.scale) if isinstance(validation.scale, ValueRange) else samples


def _describe_distances(by_steps: Mapping[int, tuple[float, float]]) -> dict[str, dict[str, float | None]]:
    """Return kernel distances by the number of sampling steps as a line of eval.jsonl has them."""
    return {
        str(num_steps): {"kid": finite_or_none(kid), "kid_standard_error": finite_or_none(standard_error)}
        for num_steps, (kid, standard_error) in sorted(by_steps.items())
    }


def _real_images(config: TrainingConfig, images: Any, held_out: Tensor) -> RealImages | None:
    """Return what samples are compared with, in 8 bits; None for images that are streamed, or too few.

    Args:
        images: The images of training.
        held_out: (n, C, H, W) uint8 or int32, of arrays in their own type.
    """
    if not isinstance(images, ImageCache) or len(images) < 2:
        return None
    count = min(MAX_TRAINING_IMAGES, max(2, MAX_TRAINING_VALUES // held_out[0].numel()))
    training = as_tensor(fixed_pixels(images, epoch_order(0, 0, len(images))[:count]))
    uint8 = (_to_uint8(pixels, images.scale) for pixels in (training, held_out))
    return RealImages(*uint8, is_mirrored=config.random_flip, in_groups=config.group_column is not None)


def _distance_of_held_out(real: RealImages, processes: Processes) -> float:
    """Return the median distance of held-out images to the nearest training image."""
    share = np.array(processes.split_evenly(len(real.held_out)))
    distances, _ = nearest_images(real.held_out[share], real.training, real.is_mirrored)
    return float(processes.gather_rows(distances[:, 0], len(real.held_out)).median())


def _format_of(images: Any) -> str:
    """Return in words what held-out images must have in common with those of training."""
    of_values = f"{images.max_value.bit_length()} bits" if images.value_range is None else images.value_range.dtype
    return f"channels {images.channels}, {format_size(images.size)}, {of_values}"


def _copy(images: ImageCache, rows: np.ndarray) -> tuple[Tensor, Tensor | None]:
    pixels = fixed_pixels(images, rows)
    labels = None if images.labels is None else torch.from_numpy(images.labels[rows])
    return as_tensor(pixels), labels


def _to_uint8(pixels: Tensor, scale: Scale) -> Tensor:
    """Return images as a feature network sees them; of arrays the channels that pictures show."""
    if isinstance(scale, ValueRange):
        return pictured((scale.to_unit_interval(pixels) * 255).round().to(torch.uint8), scale)
    return pixels if scale == 255 else (pixels / 257).round().to(torch.uint8)


def _batches(processes: Processes, count: int) -> list[np.ndarray]:
    """Return the share of this process of `count` numbers, in batches; every process gets as many."""
    share = np.array(processes.split_evenly(count))
    return [share[first : first + BATCH_SIZE] for first in range(0, len(share), BATCH_SIZE)]
