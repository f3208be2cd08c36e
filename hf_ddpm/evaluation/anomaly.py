"""Anomaly maps: where, and how much, an image differs from what the model makes of it.

    strength         the share of the steps of sampling that an image is noised by and then denoised, in (0, 1]
    reconstruction   noise x_0 to x_t by Ho et al. 2020, Eq. 4, and denoise x_t to x_0_hat by the remaining steps
    map              the mean of (x_0_hat - x_0)^2 over channels, strengths and reconstructions, (H, W)
    score            the mean of the map; the higher, the more anomalous
    AUROC            the probability that an anomalous image has a higher score than a normal one; ties count one half

A model that was trained on normal images turns what it does not know into what it does: an anomaly is reconstructed
with a large error (AnoDDPM, Wyatt et al. 2022, CVPR Workshops; there with simplex noise, too). No strength is the best
for all anomalies, which is why several may be averaged (Graham et al. 2023, arXiv 2211.07740, there as errors that are
standardized by those of a validation set). One reconstruction is a draw from what the noised image may have been: the
mean of several tells far more (benchmarks/anomaly/table.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from hf_ddpm.editing import first_index
from hf_ddpm.evaluation.names import check_strengths
from hf_ddpm.pipeline import DDPMPipeline
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.sampling.sampler import seeded_generators
from hf_ddpm.timesteps import set_timesteps


class AnomalyMaps(NamedTuple):
    """The maps and reconstructions that `anomaly_maps` makes of B images.

    Args:
        maps: (B, H, W) float32, on the CPU; in [0, 4] where x_0 is in [-1, 1].
        reconstructions: The mean reconstruction of each strength, in their order, (B, S, C, H, W) float32 in [-1, 1],
            on the CPU.
    """

    maps: Tensor
    reconstructions: Tensor


class Auroc(NamedTuple):
    """An area under the ROC curve, and its standard error; None with fewer than two images of either kind."""

    value: float
    standard_error: float | None


@torch.no_grad()
def anomaly_maps(
    pipeline: DDPMPipeline,
    x_0: Tensor,
    seeds: Sequence[int],
    *,
    strengths: Sequence[float],
    num_inference_steps: int,
    num_reconstructions: int = 1,
    class_labels: Sequence[int] | None = None,
) -> AnomalyMaps:
    """Compute the anomaly maps of images.

    The map of an image is the mean of (x_0_hat - x_0)^2 over channels, strengths and reconstructions. It is a function
    of the image, its seed and the settings; what else is in its batch changes rounding alone.

    Args:
        pipeline: A pipeline with the scheduler that denoises.
        x_0: The images, (B, C, H, W) in [-1, 1]. Arrays may have values beyond, which the model sees clipped; their
            errors are those of the values themselves.
        seeds: The seeds of the generators that draw the noise of each image, B of them.
        strengths: Each in (0, 1].
        num_inference_steps: The number of steps that strength 1 takes, in [1, T].
        num_reconstructions: How often each image is noised and denoised by each strength.
        class_labels: The class of each image, if the model has classes.

    Raises:
        ValueError: When an argument cannot work, or a reconstruction is not finite.
    """
    check_strengths(strengths)
    if len(seeds) != len(x_0):
        raise UsageError(f"seeds must hold one for each of {len(x_0)} images, got {len(seeds)}")
    if num_reconstructions < 1:
        raise UsageError(f"num_reconstructions must be at least 1, got {num_reconstructions}")
    x_0 = x_0.to(pipeline.device, torch.float32)
    generators = seeded_generators(seeds, x_0.device)
    seen = x_0.clamp(-1, 1)
    errors, sums = torch.zeros_like(x_0), [torch.zeros_like(x_0) for _ in strengths]
    for _ in range(num_reconstructions):
        for total, strength in zip(sums, strengths, strict=True):
            x_0_hat = reconstruct(pipeline, seen, generators, strength, num_inference_steps, class_labels)
            errors += (x_0_hat - x_0).square()
            total += x_0_hat
    maps = errors.mean(dim=1) / (num_reconstructions * len(strengths))
    return AnomalyMaps(maps.cpu(), torch.stack(sums, dim=1).cpu() / num_reconstructions)


def reconstruct(
    pipeline: DDPMPipeline,
    x_0: Tensor,
    generators: list[torch.Generator],
    strength: float,
    num_inference_steps: int,
    class_labels: Sequence[int] | None = None,
) -> Tensor:
    """Noise images to the timestep of a strength, and denoise them.

    x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps, Ho et al. 2020, Eq. 4, where t is the first of the last
    the last of the n timesteps of sampling, from `first_index` on.

    Args:
        pipeline: A pipeline with the scheduler that denoises.
        x_0: (B, C, H, W) float32 in [-1, 1], on the pipeline's device.
        generators: One for each image, which draws eps and the noise of each step.
        strength: In (0, 1].
        num_inference_steps: n.
        class_labels: The class of each image, if the model has classes.

    Returns:
        x_0_hat clipped to [-1, 1], (B, C, H, W).

    Raises:
        ValueError: When it is not finite.
    """
    scheduler: Any = pipeline.scheduler
    timesteps = set_last_timesteps(pipeline, strength, num_inference_steps)
    shape, noise_device = tuple(x_0.shape), generators[0].device
    eps = randn_tensor(shape, generator=generators, device=noise_device, dtype=x_0.dtype).to(x_0.device)
    x_t = scheduler.add_noise(x_0, eps, timesteps[:1].expand(len(x_0)))
    conditions = pipeline._conditions(class_labels, len(x_0), x_0.device)
    step_arguments = pipeline._step_arguments(generators, False)
    for t in timesteps:
        prediction = pipeline._predict(pipeline._network_input(x_t, t), t, conditions)
        x_t = scheduler.step(prediction, t, x_t, **step_arguments).prev_sample
    if not bool(x_t.isfinite().all()):
        raise ValueError("reconstructions must be finite, got NaN: the weights are damaged or overflow")
    return x_t.clamp(-1, 1)


def set_last_timesteps(pipeline: DDPMPipeline, strength: float, num_inference_steps: int) -> Tensor:
    """Let a pipeline's scheduler begin at the timestep of a strength, and return the timesteps from there on.

    A solver then forgets the steps that it took before.
    """
    scheduler: Any = pipeline.scheduler
    timesteps = pipeline.default_timesteps(scheduler, num_inference_steps)
    if timesteps is None:
        scheduler.set_timesteps(num_inference_steps, device=pipeline.device)
    else:
        set_timesteps(scheduler, timesteps)
    first = first_index(pipeline, scheduler, strength, num_inference_steps)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    return scheduler.timesteps[first:]


def scores_of(maps: Tensor) -> Tensor:
    """Return the score of each map, its mean: (B,) float64."""
    return maps.double().flatten(1).mean(dim=1)


def auroc(scores: np.ndarray, is_anomalous: np.ndarray) -> Auroc:
    """Compute the area under the ROC curve from ranks, exactly, with ties as halves.

    With anomalous scores X_1, ..., X_m and normal ones Y_1, ..., Y_n it is the Mann-Whitney statistic

    A = mean_ij psi(X_i, Y_j),  psi(x, y) = 1 if x > y, 1/2 if x = y, 0 if x < y

    Its standard error is that of DeLong et al. 1988, sqrt(S_X / m + S_Y / n), where S_X is the variance over i of
    mean_j psi(X_i, Y_j), and S_Y the variance over j of mean_i psi(X_i, Y_j).

    Args:
        scores: (N,), finite.
        is_anomalous: (N,) bool, with both values.

    Raises:
        UsageError: When all images are of one kind.
    """
    scores, is_anomalous = np.asarray(scores, np.float64), np.asarray(is_anomalous, bool)
    anomalous, normal = np.sort(scores[is_anomalous]), np.sort(scores[~is_anomalous])
    if not len(anomalous) or not len(normal):
        raise UsageError(
            f"an AUROC needs normal and anomalous images, got {len(normal)} normal and {len(anomalous)} anomalous"
        )
    of_anomalous = _share_below(anomalous, normal)
    of_normal = 1 - _share_below(normal, anomalous)
    error = None
    if len(anomalous) > 1 and len(normal) > 1:
        error = math.sqrt(of_anomalous.var(ddof=1) / len(anomalous) + of_normal.var(ddof=1) / len(normal))
    return Auroc(float(of_anomalous.mean()), error)


def _share_below(values: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the share of `others`, which are sorted, that are below each value; ties count one half."""
    below, not_above = (np.searchsorted(others, values, side) for side in ("left", "right"))
    return (below + not_above) / 2 / len(others)
