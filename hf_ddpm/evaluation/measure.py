"""The measurements of `evaluate`, each by one function, shared among processes.

The unit of work is a batch. Batch k holds the same images for any number of processes, and results are summed in the
order of batches: the number of processes changes no digit. Samples are uint8, as they would be saved.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hf_ddpm.data.batches import as_tensor
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
from hf_ddpm.evaluation.value_statistics import ValueStatistics, joined, value_statistics
from hf_ddpm.guidance import Guidance
from hf_ddpm.pipeline import DDPMPipeline
from hf_ddpm.runtime.processes import Processes
from hf_ddpm.sampling.sampler import iter_samples
from hf_ddpm.scheduler import DDPMScheduler
from hf_ddpm.value_range import Scale

NEIGHBORS = 5  # k of precision, recall, density and coverage


@dataclass(frozen=True, eq=False)
class Samples:
    """The samples of one scheduler.

    Attributes:
        statistics: The statistics of their features. None on all processes but the main one, or without a network.
        images: The first of them, (n, C, H, W) uint8, of a model of arrays in the units of its data.
        network_evaluations: The number of network evaluations per image.
        seconds_per_image: The time that one process takes to sample an image, without its features.
        values: The statistics of their values, if they are measured.
    """

    statistics: Statistics | None
    images: Tensor
    network_evaluations: int
    seconds_per_image: float
    values: ValueStatistics | None = None


class _SampledBatch(NamedTuple):
    features: Tensor | None
    images: Tensor
    seconds: float
    values: ValueStatistics | None


def sample_statistics(
    processes: Processes,
    pipeline: DDPMPipeline,
    network: FeatureNetwork | None,
    seeds: Sequence[int],
    class_labels: Sequence[int] | None,
    *,
    num_inference_steps: int,
    batch_size: int,
    num_images_to_keep: int = 0,
    guidance: Guidance | None = None,
    measures_values: bool = False,
    label: str = "Sampling",
) -> Samples:
    """Sample one image per seed, and collect the statistics of their features.

    Args:
        network: None: no features are computed.
        class_labels: One for each seed, if the model has classes.
        batch_size: Images per network evaluation.
        num_images_to_keep: The number of images to return.
        guidance: How predictions are guided; None: they are not.
        measures_values: Whether to compute the statistics of their values.
        label: What the progress bar is called.

    Raises:
        ValueError: When an image is not finite.
    """
    num_forward_batches = 0

    def sample_batch(k: int) -> _SampledBatch:
        nonlocal num_forward_batches
        batch = slice(k * batch_size, (k + 1) * batch_size)
        started = time.perf_counter()
        forward_batches = [
            images
            for _, images in iter_samples(
                pipeline,
                seeds[batch],
                batch_size=batch_size,
                num_inference_steps=num_inference_steps,
                class_labels=None if class_labels is None else class_labels[batch],
                guidance=guidance,
                value_range=pipeline.value_range,
            )
        ]
        seconds = time.perf_counter() - started
        num_forward_batches += len(forward_batches)
        images = torch.cat(forward_batches)
        features = None if network is None else network(images)
        # A view would be sent with all that it is a view of.
        kept = images[: max(0, num_images_to_keep - k * batch_size)].clone()
        return _SampledBatch(features, kept, seconds, value_statistics(images) if measures_values else None)

    with counted_evaluations(pipeline) as evaluated:
        batches = processes.map(sample_batch, math.ceil(len(seeds) / batch_size), label)
    return Samples(
        statistics=statistics_of([b.features for b in batches if b.features is not None])
        if processes.rank == 0
        else None,
        images=torch.cat([b.images for b in batches]),
        network_evaluations=processes.on_main(lambda: sum(evaluated) // (num_forward_batches * batch_size)),
        seconds_per_image=sum(b.seconds for b in batches) / len(seeds),
        values=joined([b.values for b in batches if b.values is not None]) if measures_values else None,
    )


@contextmanager
def counted_evaluations(pipeline: DDPMPipeline) -> Iterator[list[int]]:
    """Give a list that gets the number of images of each evaluation of a network within a `with` block."""
    evaluated: list[int] = []

    def count(_: Any, inputs: Sequence[Any], __: Any) -> None:
        evaluated.append(len(inputs[0]))

    networks = [network for network in (pipeline.unet, pipeline.guide) if network is not None]
    hooks = [network.register_forward_hook(count) for network in networks]
    try:
        yield evaluated
    finally:
        for hook in hooks:
            hook.remove()


def statistics_of(batches: Sequence[Tensor]) -> Statistics | None:
    """Return the statistics of features that are given in batches, the first NUM_FEATURES of them included."""
    if not batches:
        return None
    moments = Moments.empty(batches[0].shape[1])
    for features in batches:
        moments = moments.update(features)
    num_kept_batches = math.ceil(NUM_FEATURES / len(batches[0]))
    return Statistics(moments, torch.cat([*batches[:num_kept_batches]])[:NUM_FEATURES])


class Measured(NamedTuple):
    """A value, its standard error if there is one, and the number of images of each side that it compares."""

    value: float
    standard_error: float | None
    num_compared: list[int]


def measure_distances(X: Statistics, Y: Statistics, metrics: Iterable[str]) -> dict[str, Measured]:
    """Measure how far X is from Y.

    Args:
        X: The statistics of samples, or of real images in their place.
        Y: The statistics of the reference.
        metrics: Keys of DISTANCES.

    Returns:
        The names of results, as DISTANCES has them, with what was measured.
    """
    measured: dict[str, Measured] = {}
    num_features = [len(X.features), len(Y.features)]
    for metric in metrics:
        if metric == "fd":
            measured["fd"] = Measured(frechet_distance(X.moments, Y.moments), None, [X.count, Y.count])
        elif metric == "precision":
            fractions = precision_recall_density_coverage(X.features, Y.features, NEIGHBORS)
            measured |= {name: Measured(value, None, num_features) for name, value in fractions._asdict().items()}
        else:
            distance = (kernel_distance if metric == "kid" else cmmd)(X.features, Y.features)
            measured[metric] = Measured(distance.distance, distance.standard_error, num_features)
    return measured


def first_images(statistics: Statistics, count: int) -> Statistics:
    """Return the statistics of the first `count` images, or of all if their features were not kept."""
    if count >= statistics.count or count > len(statistics.features):
        return statistics
    features = statistics.features[:count].contiguous()
    return Statistics(Moments.of(features), features)


def pixel_features(processes: Processes, network: FeatureNetwork, pixels: np.ndarray, batch_size: int) -> Tensor:
    """Return the features of all images, (n, d).

    Args:
        pixels: (n, C, H, W), as `network` takes them.
    """

    def compute(k: int) -> Tensor:
        return network(as_tensor(pixels[k * batch_size : (k + 1) * batch_size].copy()))

    return torch.cat(processes.map(compute, math.ceil(len(pixels) / batch_size), "Features"))


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
    scale: Scale = 255,
) -> Likelihood:
    """Measure the variational bound of a model.

    Args:
        unet: The network, in float32 and not compiled.
        pixels: (N, C, H, W) uint8, or arrays of integers.
        class_labels: (N,) int64, if the model has classes.
        timesteps_per_image: K; see `sum_bound_terms`.
        batch_size: Images per network evaluation.
        scale: See `sum_bound_terms`.
    """
    num_batches = math.ceil(len(pixels) / batch_size)

    def sum_batch(k: int) -> Tensor:
        # TF32 would round a GPU's convolutions to 10 bits.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            return sum_bound_terms(
                unet,
                scheduler,
                pixels,
                range(k, len(pixels), num_batches),  # batches of a length, up to one image
                seed=seed,
                batch_size=batch_size,
                timesteps_per_image=timesteps_per_image,
                class_labels=class_labels,
                scale=scale,
                device=device,
            )

    sums = processes.map(sum_batch, num_batches, "Likelihood")
    total = sums[0]
    for batch_sums in sums[1:]:
        total = total + batch_sums
    return bits_per_dimension(total)
