"""Statistics of the values of images themselves, without a network: moments and power spectra.

    mean         of each channel over the pixels of an image, in the units of the data
    covariance   of the channels over the pixels of an image, (C, C)
    spectrum     P_k of each channel: the mean of |F|^2 / (H W) over the Fourier modes with k - 1/2 <= |k| < k + 1/2,
                 k = 1, ..., min(H, W) / 2, where F is the unnormalized transform and |k| counts periods per side
    statistics   all of these of one image, as a vector: means, covariances of channel i with j >= i, log P_k

The Fréchet distance of the values is that of normal distributions fitted to the statistics of samples and of images,
each component divided by its scale: its standard deviation over the images, but at least a hundredth of that of the
pixels, of their covariance, and of one unit of log P_k. No feature network sees them, so that it is for data
of any kind; it does not see what moments and spectra leave open, as phases.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hf_ddpm.evaluation.distances import Moments, frechet_distance
from hf_ddpm.plots import Curve, draw_curves
from hf_ddpm.value_range import ValueRange

SMALLEST_SCALE = 0.01
# Of the range of values, squared: less power than this is none, and has no logarithm.
SMALLEST_POWER = 1e-12
MAX_DRAWN_CHANNELS = 3


class ValueStatistics(NamedTuple):
    """The statistics of images, one row for each.

    Args:
        means: (N, C) float64.
        covariances: (N, C, C) float64.
        spectra: (N, C, K) float64, P_k.
    """

    means: Tensor
    covariances: Tensor
    spectra: Tensor

    def vectors(self, value_range: ValueRange) -> Tensor:
        """Return the statistics as one vector for each image, (N, C + C (C + 1) / 2 + C K)."""
        rows, columns = torch.triu_indices(self.means.shape[1], self.means.shape[1])
        power = self.spectra.clamp(min=SMALLEST_POWER * (value_range.high - value_range.low) ** 2)
        return torch.cat([self.means, self.covariances[:, rows, columns], power.log().flatten(1)], dim=1)


def value_statistics(images: Tensor) -> ValueStatistics:
    """Compute the statistics of images.

    Args:
        images: (N, C, H, W) of any type, in the units of the data.
    """
    values = images.double()
    num_images, channels, height, width = values.shape
    means = values.mean(dim=(2, 3))
    centered = (values - means[:, :, None, None]).flatten(2)
    covariances = centered @ centered.mT / (height * width)
    power = torch.fft.fft2(values).abs().square() / (height * width)
    radius = _radius(height, width).flatten()
    num_bins = min(height, width) // 2
    is_counted = (radius >= 1) & (radius <= num_bins)
    bins = radius[is_counted] - 1
    sums = torch.zeros(num_images, channels, num_bins, dtype=torch.float64)
    sums.index_add_(2, bins, power.flatten(2)[:, :, is_counted])
    return ValueStatistics(means, covariances, sums / bins.bincount(minlength=num_bins))


def joined(parts: Sequence[ValueStatistics]) -> ValueStatistics:
    """Return the statistics of several batches of images as those of all of them."""
    return ValueStatistics(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def num_components(channels: int, height: int, width: int) -> int:
    """Return the length of the vector of statistics of an image."""
    return channels + channels * (channels + 1) // 2 + channels * (min(height, width) // 2)


def scales_of(statistics: ValueStatistics, vectors: Tensor) -> Tensor:
    """Return the scale of each component of the vectors of images, (d,).

    Args:
        statistics: The statistics of real images.
        vectors: These as vectors.
    """
    pixels = statistics.covariances.diagonal(dim1=1, dim2=2).mean(dim=0).sqrt()
    pixels = pixels.clamp(min=max(1e-6 * float(pixels.max()), 1e-12))  # a channel may be constant
    rows, columns = torch.triu_indices(len(pixels), len(pixels))
    log_powers = torch.ones(statistics.spectra[0].numel(), dtype=torch.float64)
    least = SMALLEST_SCALE * torch.cat([pixels, pixels[rows] * pixels[columns], log_powers])
    return torch.maximum(vectors.std(dim=0), least)


def value_distance(samples: Tensor, images: Tensor, scale: Tensor) -> float:
    """Return the Fréchet distance between vectors of statistics, (N, d) and (M, d).

    Args:
        samples: Those of samples, or of real images in their place.
        images: Those of the reference.
        scale: That of each component, (d,), above 0.
    """
    X, Y = ((vectors / scale).contiguous() for vectors in (samples, images))
    return frechet_distance(Moments.of(X), Moments.of(Y))


def spectrum_rows(statistics: ValueStatistics) -> dict[str, Any]:
    """Return the mean and the standard error of each statistic over images, in the units of the data.

    Returns:
        For each of "mean", "variance" and "spectrum" the values of each channel, and "..._standard_error" of these.
    """
    variances = statistics.covariances.diagonal(dim1=1, dim2=2)
    rows: dict[str, Any] = {}
    for name, values in (("mean", statistics.means), ("variance", variances), ("spectrum", statistics.spectra)):
        rows[name] = values.mean(dim=0).tolist()
        rows[f"{name}_standard_error"] = (values.std(dim=0) / math.sqrt(len(values))).tolist()
    return rows


def describe_spectra(spectra: dict[str, Any]) -> str:
    """Return in words how far the spectra of samples are from those of images, where they are farthest."""
    (power, error), (of_images, error_of_images) = (
        (np.array(spectra[name]["spectrum"]), np.array(spectra[name]["spectrum_standard_error"]))
        for name in ("samples", "images")
    )
    if not (of_images > 0).all():
        return "the images have no power at some wave numbers"
    ratio = power / of_images - 1
    deviations = (power - of_images) / np.hypot(error, error_of_images)
    channel, bin = np.unravel_index(np.abs(deviations).argmax(), deviations.shape)
    return (
        f"the power spectrum of samples is farthest from that of images at k = {bin + 1} of channel {channel}: "
        f"{ratio[channel, bin]:+.1%}, {abs(deviations[channel, bin]):.1f} standard errors"
    )


def draw_spectra(row: dict[str, Any], channels: Sequence[int], path: Path) -> None:
    """Draw the spectra of samples and of images, with their standard errors.

    Args:
        row: A result of evaluation.json with `spectra`.
        channels: The channels to draw, of which the first MAX_DRAWN_CHANNELS are.
        path: The picture.
    """
    curves, spectra = [], row["spectra"]
    for color, channel in enumerate(channels[:MAX_DRAWN_CHANNELS]):
        for name in ("images", "samples"):
            power, errors = (spectra[name][key][channel] for key in ("spectrum", "spectrum_standard_error"))
            label = name if len(channels) == 1 else f"{name}, channel {channel}"
            is_dashed = name == "images"
            curves.append(Curve(label, [*range(1, len(power) + 1)], power, errors, color=color, is_dashed=is_dashed))
    draw_curves(
        path,
        curves,
        title="Power spectra of samples and of images",
        x_label="wave number k, periods per side",
        y_label="$P_k$ in squared units of the data",
        log_x=True,
        log_y=True,
    )


def _radius(height: int, width: int) -> Tensor:
    """Return |k| of each Fourier mode, rounded to a whole number, (H, W) int64.

    The shorter side decides how long a period is: k counts periods along it.
    """
    shorter = min(height, width)
    rows, columns = (np.fft.fftfreq(side) * shorter for side in (height, width))
    return torch.from_numpy(np.floor(np.hypot(rows[:, None], columns[None]) + 0.5).astype(np.int64))
