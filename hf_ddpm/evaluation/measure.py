"""What `evaluate` measures, each by one function, shared among the processes that torch.distributed knows of.

batch       the images of B seeds; batch k is made by process k % P, the same for any number P of processes
order       what is summed is summed in the order of batches, by the first process: P changes no digit
samples     uint8, as they would be saved
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hf_ddpm.evaluation.distances import (
    Moments,
    cmmd,
    frechet_distance,
    kernel_distance,
    precision_recall_density_coverage,
)
from hf_ddpm.evaluation.features import FeatureNetwork
from hf_ddpm.evaluation.likelihood import Likelihood, bits_per_dimension, sum_bound_terms
from hf_ddpm.evaluation.statistics import NUM_FEATURES, Statistics
from hf_ddpm.pipeline import DDPMPipeline
from hf_ddpm.runtime.processes import Processes
from hf_ddpm.sampling.sampler import iter_samples
from hf_ddpm.scheduler import DDPMScheduler

# Metrics that compare features of samples with a reference -> the names of their results.
DISTANCES = {
    "fd": ("fd",),
    "kid": ("kid",),
    "cmmd": ("cmmd",),
    "precision": ("precision", "recall", "density", "coverage"),
}
NEIGHBORS = 5  # k of precision, recall, density and coverage


@dataclass(frozen=True, eq=False)
class Samples:
    """What is kept of the samples of one scheduler.

    Args:
        statistics: of their features; only on the first process.
        images: the first of them, (n, C, H, W) uint8.
        network_evaluations: per image.
        seconds_per_image: of one process, without features.
    """

    statistics: Statistics | None
    images: Tensor
    network_evaluations: int
    seconds_per_image: float


def sample_statistics(
    processes: Processes,
    pipeline: DDPMPipeline,
    network: FeatureNetwork | None,
    seeds: Sequence[int],
    class_labels: Sequence[int] | None,
    *,
    num_inference_steps: int,
    batch_size: int,
    num_kept: int = 0,
    label: str = "Sampling",
) -> Samples:
    """Samples one image per seed. Raises: ValueError for images that are not finite."""
    count = -(-len(seeds) // batch_size)
    calls = num_passes = 0

    def counted(*_: Any) -> None:
        nonlocal calls
        calls += 1

    def mine() -> Iterator[tuple[Tensor | None, Tensor, float]]:
        nonlocal num_passes
        for k in range(processes.rank, count, processes.size):
            part = slice(k * batch_size, (k + 1) * batch_size)
            started = time.perf_counter()
            passes = iter_samples(
                pipeline,
                seeds[part],
                batch_size=batch_size,
                num_inference_steps=num_inference_steps,
                class_labels=None if class_labels is None else class_labels[part],
            )
            parts = [images for _, images in passes]
            seconds, images = time.perf_counter() - started, torch.cat(parts)
            num_passes += len(parts)
            kept = images[: max(0, num_kept - k * batch_size)].clone()  # of a view all would be sent
            yield None if network is None else network(images), kept, seconds

    moments, features, images, total = None, [], [], 0.0
    hook = pipeline.unet.register_forward_hook(counted)
    try:
        for found, kept, seconds in processes.in_rank_order(mine(), count, label):
            images.append(kept)
            total += seconds
            if found is None or processes.rank > 0:
                continue
            moments = (moments or Moments.empty(found.shape[1])).update(found)
            features.append(found[: max(0, NUM_FEATURES - int(moments.count) + len(found))].clone())
    finally:
        hook.remove()
    statistics = None if moments is None else Statistics(moments, torch.cat(features))
    evaluations = processes.on_main(lambda: calls // num_passes)
    return Samples(statistics, torch.cat(images), evaluations, total / len(seeds))


class Measured(NamedTuple):
    """A value, its standard error if there is one, and how many images of each side it compares."""

    value: float
    standard_error: float | None
    num_compared: list[int]


def measure_distances(X: Statistics, Y: Statistics, metrics: Iterable[str]) -> dict[str, Measured]:
    """The distances named in `metrics`, keys of `DISTANCES`, of X, samples or what stands in for them, from Y."""
    found: dict[str, Measured] = {}
    kept = [len(X.features), len(Y.features)]
    for metric in metrics:
        if metric == "fd":
            found["fd"] = Measured(frechet_distance(X.moments, Y.moments), None, [X.count, Y.count])
        elif metric == "precision":
            shares = precision_recall_density_coverage(X.features, Y.features, NEIGHBORS)
            found |= {name: Measured(value, None, kept) for name, value in shares._asdict().items()}
        else:
            distance = (kernel_distance if metric == "kid" else cmmd)(X.features, Y.features)
            found[metric] = Measured(distance.distance, distance.standard_error, kept)
    return found


def first_images(statistics: Statistics, count: int) -> Statistics:
    """Of `count` images only, as far as their features were kept."""
    if count >= statistics.count or count > len(statistics.features):
        return statistics
    features = statistics.features[:count].contiguous()
    return Statistics(Moments.of(features), features)


def pixel_features(processes: Processes, network: FeatureNetwork, pixels: np.ndarray, batch_size: int) -> Tensor:
    """The features of all images, (n, d): on the first process; of the others each has its own batches."""
    count = -(-len(pixels) // batch_size)

    def mine() -> Iterator[Tensor]:
        for k in range(processes.rank, count, processes.size):
            yield network(torch.from_numpy(pixels[k * batch_size : (k + 1) * batch_size].copy()))

    kept = [part for part in processes.in_rank_order(mine(), count, "Features") if processes.rank == 0]
    return torch.cat(kept) if kept else torch.empty(0, network.dimensions)


def measure_likelihood(
    processes: Processes,
    unet: Any,
    scheduler: DDPMScheduler,
    pixels: np.ndarray,
    class_labels: np.ndarray | None,
    *,
    seed: int,
    timesteps_per_image: int,
    batch_size: int,
    device: torch.device,
) -> Likelihood:
    """The variational bound on `pixels`, (N, C, H, W) uint8."""
    count = math.ceil(len(pixels) / batch_size)

    def mine() -> Iterator[Tensor]:
        for share in range(processes.rank, count, processes.size):
            # A share of at most `batch_size` images: the same batches, whoever works on them. TF32 would round a
            # GPU's convolutions to 10 bits.
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                sums = sum_bound_terms(
                    unet,
                    scheduler,
                    pixels,
                    seed=seed,
                    batch_size=batch_size,
                    timesteps_per_image=timesteps_per_image,
                    class_labels=class_labels,
                    rank=share,
                    num_processes=count,
                    device=device,
                )
            yield sums

    total = None
    for sums in processes.in_rank_order(mine(), count, "Likelihood"):
        total = sums if total is None else total + sums
    assert total is not None
    return bits_per_dimension(total)
