"""The nearness of the samples of a model that makes images from images to the images that are the truth.

    PSNR    10 log10(1 / MSE) of an image in [0, 1], in dB; of arrays 0 and 1 are the ends of their range, so that the
            peak is its width
    SSIM    the mean over the image of (2 mu_x mu_y + C1) (2 s_xy + C2) / ((mu_x^2 + mu_y^2 + C1) (s_x^2 + s_y^2 + C2))
            (Wang et al. 2004, Eq. 13): mu, s^2 and s_xy are means, variances and the covariance under a window

    LPIPS   see `hf_ddpm.evaluation.perceptual`; less is better

More is better for the first two. They compare pixels: of all that could be the truth, a blurred mean gets the best
PSNR, and a sample, which is sharp, less (Saharia et al. 2021, arXiv 2104.07636, Sec. 4).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from hf_ddpm.data.conditions import Pairs
from hf_ddpm.evaluation.features import FeatureNetwork
from hf_ddpm.evaluation.measure import Samples, counted_evaluations, statistics_of
from hf_ddpm.evaluation.perceptual import Perceptual
from hf_ddpm.guidance import Guidance
from hf_ddpm.pipeline import DDPMPipeline
from hf_ddpm.runtime.processes import Processes
from hf_ddpm.sampling.sampler import iter_samples
from hf_ddpm.value_range import pictured

WINDOW_SIZE, WINDOW_STD = 11, 1.5
C1, C2 = 0.01**2, 0.03**2


class Fidelity(NamedTuple):
    """The PSNR and SSIM of each image, (N,) float64, and LPIPS if it is measured."""

    psnr: Tensor
    ssim: Tensor
    lpips: Tensor | None = None


class _SampledBatch(NamedTuple):
    images: Tensor
    features: Tensor | None
    lpips: Tensor | None  # of the samples
    lpips_of_conditions: Tensor | None
    seconds: float


class Mean(NamedTuple):
    """The mean of a measure over images and its standard error; None where it is not finite."""

    value: float | None
    standard_error: float | None


@dataclass(frozen=True, eq=False)
class Measured:
    """The measurements of one sampler.

    Attributes:
        samples: The samples.
        of_samples: How near samples come to the truth.
        of_conditions: How near conditions themselves come; None if they are no images of the same kind.
    """

    samples: Samples
    of_samples: Fidelity
    of_conditions: Fidelity | None


def psnr(images: Tensor, truth: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio of each image in dB, (N,) float64; infinity where it is the truth.

    Args:
        images: (N, C, H, W) in [0, 1].
        truth: (N, C, H, W) in [0, 1].
    """
    return -10 * (images.double() - truth.double()).square().flatten(1).mean(dim=1).log10()


def ssim(images: Tensor, truth: Tensor) -> Tensor:
    """Return the structural similarity of each image, (N,) float64 in [-1, 1], as Wang et al. 2004.

    The window is a normal distribution of 11 x 11 pixels and the standard deviation 1.5; only places where it lies
    within the image count. In smaller images it is as large as an odd number of pixels can be.

    Args:
        images: (N, C, H, W) in [0, 1].
        truth: (N, C, H, W) in [0, 1].
    """
    side = window_size(*images.shape[2:])
    x, y = (values.double().flatten(0, 1)[:, None] for values in (images, truth))
    distance = torch.arange(side, dtype=torch.float64) - (side - 1) / 2
    row = (-(distance**2) / (2 * WINDOW_STD**2)).exp()
    window = (row[:, None] * row / row.sum() ** 2)[None, None]

    def mean(values: Tensor) -> Tensor:
        return conv2d(values, window)

    mu_x, mu_y = mean(x), mean(y)
    s_xx, s_yy, s_xy = mean(x * x) - mu_x**2, mean(y * y) - mu_y**2, mean(x * y) - mu_x * mu_y
    similarity = (2 * mu_x * mu_y + C1) * (2 * s_xy + C2) / ((mu_x**2 + mu_y**2 + C1) * (s_xx + s_yy + C2))
    return similarity.reshape(len(images), -1).mean(dim=1)


def window_size(height: int, width: int) -> int:
    """Return the side of SSIM's window for images of this size, an odd number."""
    side = min(WINDOW_SIZE, height, width)
    return side - 1 + side % 2


def mean_of(values: Tensor) -> Mean:
    """Return the mean of values of images, and its standard error."""
    mean = float(values.mean())
    if not math.isfinite(mean):
        return Mean(None, None)
    error = float(values.std() / math.sqrt(len(values))) if len(values) > 1 else None
    return Mean(mean, error)


def measure_fidelity(
    processes: Processes,
    pipeline: DDPMPipeline,
    pairs: Pairs,
    seed: int,
    *,
    network: FeatureNetwork | None = None,
    perceptual: Perceptual | None = None,
    compare_conditions: bool,
    num_inference_steps: int,
    batch_size: int,
    guidance: Guidance | None = None,
    label: str = "Sampling",
) -> Measured:
    """Sample an image from each condition, and compare it with the truth.

    Args:
        processes: The processes that share the work.
        pipeline: A `ConditionalDDPMPipeline`.
        pairs: Conditions and truth.
        seed: The seed of the first sample.
        network: The feature network of statistics; None: there are none.
        perceptual: LPIPS; None: it is not measured.
        compare_conditions: Whether conditions are images of the same kind, which are compared, too.
        num_inference_steps: The steps of sampling.
        batch_size: Images per network evaluation.
        guidance: How predictions are guided; None: they are not.
        label: What the progress bar is called.

    Raises:
        ValueError: When a sample is not finite.
    """
    count, num_passes = len(pairs.images), 0

    def sample_batch(k: int) -> _SampledBatch:
        nonlocal num_passes
        part = slice(k * batch_size, min((k + 1) * batch_size, count))
        started = time.perf_counter()
        batches = iter_samples(
            pipeline,
            range(seed + part.start, seed + part.stop),
            batch_size=batch_size,
            num_inference_steps=num_inference_steps,
            class_labels=None if pairs.labels is None else pairs.labels[part],
            guidance=guidance,
            conditions=pairs.conditions[part],
            value_range=pipeline.value_range,
        )
        passes = [images for _, images in batches]
        seconds = time.perf_counter() - started
        num_passes += len(passes)
        images = torch.cat(passes)
        shown = pictured(_shares(images, pipeline), pipeline.value_range)
        truth = pictured(pairs.images[part], pipeline.value_range)
        return _SampledBatch(
            images,
            None if network is None else network(images),
            None if perceptual is None else perceptual(shown, truth),
            perceptual(pictured(pairs.conditions[part], pipeline.value_range), truth)
            if perceptual is not None and compare_conditions
            else None,
            seconds,
        )

    with counted_evaluations(pipeline) as evaluated:
        batches = processes.map(sample_batch, math.ceil(count / batch_size), label)
    images = torch.cat([batch.images for batch in batches])
    features = [batch.features for batch in batches if batch.features is not None]
    return Measured(
        samples=Samples(
            statistics=statistics_of(features) if processes.rank == 0 else None,
            images=images,
            network_evaluations=processes.on_main(lambda: sum(evaluated) // (num_passes * batch_size)),
            seconds_per_image=sum(batch.seconds for batch in batches) / count,
        ),
        of_samples=_fidelity(_shares(images.double(), pipeline), pairs.images, [batch.lpips for batch in batches]),
        of_conditions=_fidelity(pairs.conditions, pairs.images, [batch.lpips_of_conditions for batch in batches])
        if compare_conditions
        else None,
    )


def _shares(images: Tensor, pipeline: DDPMPipeline) -> Tensor:
    """Return samples as images in [0, 1]."""
    return images / 255 if pipeline.value_range is None else pipeline.value_range.to_unit_interval(images)


def _fidelity(images: Tensor, truth: Tensor, distances: Sequence[Tensor | None]) -> Fidelity:
    measured = [each for each in distances if each is not None]
    return Fidelity(psnr(images, truth), ssim(images, truth), torch.cat(measured) if measured else None)
