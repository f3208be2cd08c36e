"""Memorization: tests whether samples are nearer to the training images than held-out images are.

    training, held-out, samples     images as rows: pixels, or features of one network for all three
    distance                        L2 distance of a sample or a held-out image to the nearest training image
    near                            at a distance below the k-th smallest of the n held-out ones, k/(n + 1) = 1 %

If the model drew its samples from the distribution of the held-out images, samples and held-out images would be
exchangeable, and so would their distances, for any training images and any distance. This gives both null hypotheses:

    number of near samples          beta-binomial: each is near with one unknown probability ~ Beta(k, n + 1 - k)
    Z                               N(0, 1): the Mann-Whitney statistic of all distances, Meehan et al. 2020, Sec. 3

The number of near samples reveals a few copies among many samples that are not, or that are far from all images. Z,
the paper's test of data copying over a single cell, reveals that samples as a whole are slightly too near. Both are
valid only if the held-out images were chosen at random. A model that prefers images with close neighbors is taken for
one that copies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from hf_ddpm.figures import strip, to_pil
from hf_ddpm.runtime.errors import UsageError

Rows: TypeAlias = np.ndarray | Tensor

MIN_SAMPLES = 20  # With fewer of them, Z is not close to normal.
NUM_PAIRS = 8
BLOCK_SIZE = 1024  # rows of queries and of database that are in memory in float64 at a time, if they are short
BLOCK_VALUES = 2**24  # the most values of each
_NUM_CANDIDATES = 4


class Pair(NamedTuple):
    """A sample and the training image nearest to it, by their indices."""

    sample: int
    training: int
    distance: float


@dataclass(frozen=True)
class Memorization:
    """A comparison of the distances of samples and of held-out images to training images.

    Args:
        near_fraction: The fraction of samples that are near.
        expected_near_fraction: Its mean for a model that does not copy, k/(n + 1).
        near_p_value: The probability that such a model has at least as many near samples.
        z: Meehan et al.'s Z with the opposite sign: above 3, samples are too near; below -3, they are too far.
        z_p_value: The probability that such a model has at least this z.
        near_distance: The distance below which a sample is near.
        median_distance: The median over samples.
        median_held_out_distance: The median over held-out images.
        num_samples: The number of samples.
        num_held_out: The number of held-out images, n.
        num_training: The number of training images.
        pairs: The NUM_PAIRS samples that are nearest to a training image, the nearest first.
    """

    near_fraction: float
    expected_near_fraction: float
    near_p_value: float
    z: float
    z_p_value: float
    near_distance: float
    median_distance: float
    median_held_out_distance: float
    num_samples: int
    num_held_out: int
    num_training: int
    pairs: list[Pair]


def memorization(samples: Rows, training: Rows, held_out: Rows, *, quantile: float = 0.01) -> Memorization:
    """Compare the distances of samples to training images with those of held-out images.

    Args:
        samples: (m, ...), pixels or features; rounded as they are saved.
        training: (N, ...).
        held_out: (n, ...), prepared as the training images are.
        quantile: k/(n + 1), the quantile of held-out distances that is the limit of near; in (0, 1).

    Raises:
        UsageError: When there are too few samples or held-out images, held-out images are training images, or
            `nearest` raises it.
    """
    num_samples, num_held_out = len(samples), len(held_out)
    if num_samples < MIN_SAMPLES:
        raise UsageError(f"samples must be at least {MIN_SAMPLES}, got {num_samples}: sample more")
    if not 0 < quantile < 1:
        raise UsageError(f"quantile must be in (0, 1), got {quantile}")
    rank = math.floor(quantile * (num_held_out + 1) + 1e-9)
    if num_held_out < MIN_SAMPLES or rank < 1:
        least = max(MIN_SAMPLES, math.ceil(1 / quantile - 1e-9) - 1)
        raise UsageError(
            f"held_out must be at least {least} images for a quantile of {quantile:g}, got {num_held_out}: keep more "
            "images out of training; without them nothing says how near is too near"
        )
    distances, indices = nearest(samples, training)
    expected = nearest(held_out, training)[0].sort().values
    near_distance = float(expected[rank - 1])
    if near_distance == 0:
        raise UsageError(
            f"held_out must be images that were not trained on, got {int((expected == 0).sum())} of {num_held_out} "
            "that are training images: remove them"
        )
    num_near = int((distances < near_distance).sum())
    z = _mann_whitney_z(distances, expected)
    order = distances.argsort(stable=True)[:NUM_PAIRS].tolist()
    return Memorization(
        near_fraction=num_near / num_samples,
        expected_near_fraction=rank / (num_held_out + 1),
        near_p_value=_beta_binomial_tail(num_near, num_samples, rank, num_held_out + 1 - rank),
        z=z,
        z_p_value=math.erfc(z / math.sqrt(2)) / 2,
        near_distance=near_distance,
        median_distance=float(distances.median()),
        median_held_out_distance=float(expected.median()),
        num_samples=num_samples,
        num_held_out=num_held_out,
        num_training=len(training),
        pairs=[Pair(i, int(indices[i]), float(distances[i])) for i in order],
    )


def nearest(queries: Rows, database: Rows) -> tuple[Tensor, Tensor]:
    """Find the nearest row of `database` to each row of `queries`, as `nearest_rows` does.

    Returns:
        Distances, (n,) float64, and indices, (n,) int64, on the CPU.
    """
    distances, indices = nearest_rows(queries, database, 1)
    return distances[:, 0], indices[:, 0]


def nearest_rows(queries: Rows, database: Rows, count: int) -> tuple[Tensor, Tensor]:
    """Find the nearest rows of `database` to each row of `queries`, by L2 distance in float64.

    |q|^2 + |x|^2 - 2 q.x selects four candidates. |q - x| is then computed directly for each of them, so that a copy
    has the distance 0. This takes about 8 b (4 d + b) bytes, where b is BLOCK_SIZE, or less for rows of many values.

    Args:
        queries: (n, ...) of any numeric type; rows are flattened to d values.
        database: (m, ...) with m > 0. Of equal rows the first is found.
        count: How many rows, k, at most 4; all of them if there are fewer.

    Returns:
        Distances, (n, k) float64, rising, and indices, (n, k) int64, on the CPU.

    Raises:
        UsageError: When `database` has no rows, rows have different lengths, or values are not finite.
    """
    lengths = [math.prod(x.shape[1:]) for x in (queries, database)]
    if not len(database) or lengths[0] != lengths[1]:
        raise UsageError(
            f"images must be compared with some, of as many values, got {tuple(queries.shape)} against "
            f"{tuple(database.shape)}: take pixels of one size, or features of one network, for all of them"
        )
    count = min(count, len(database))
    distances, indices = [torch.empty(0, count, dtype=torch.float64)], [torch.empty(0, count, dtype=torch.int64)]
    block_size = max(1, min(BLOCK_SIZE, BLOCK_VALUES // max(1, lengths[0])))
    for first in range(0, len(queries), block_size):
        q = _float_rows(queries, slice(first, first + block_size))
        # Sorted, so that the first of equal rows is taken.
        candidates = _candidates(q, database, block_size).sort(dim=1).values
        columns = [(q - _float_rows(database, i)).square().sum(dim=1) for i in candidates.T.numpy()]
        squares = torch.stack(columns, dim=1)
        squares, order = squares.sort(dim=1, stable=True)
        distances.append(squares[:, :count].sqrt())
        indices.append(candidates.gather(1, order)[:, :count])
    return torch.cat(distances), torch.cat(indices)


def _candidates(q: Tensor, database: Rows, block_size: int) -> Tensor:
    """Return the indices of the rows nearest to each row of q up to rounding, (b, 4), or (b, m) if m is less."""
    q_square = q.square().sum(dim=1, keepdim=True)
    squares, indices = q.new_empty(len(q), 0), torch.empty(len(q), 0, dtype=torch.int64)
    for start in range(0, len(database), block_size):
        x = _float_rows(database, slice(start, start + block_size))
        block_squares = torch.addmm(q_square + x.square().sum(dim=1), q, x.T, alpha=-2)
        squares = torch.cat([squares, block_squares], dim=1)
        indices = torch.cat([indices, torch.arange(start, start + len(x)).expand(len(q), -1)], dim=1)
        squares, selected = squares.topk(min(_NUM_CANDIDATES, squares.shape[1]), dim=1, largest=False)
        indices = indices.gather(1, selected)
    return indices


def draw_pairs(samples: Rows, training_images: Rows, pairs: Sequence[Pair], path: str | Path) -> None:
    """Write the pairs as a PNG file: in each column a sample, its training image and their absolute difference.

    The number above a column is the pair's distance, which is one of features if the pairs were found by features; the
    difference is always one of pixels.

    Args:
        samples: (m, C, H, W) uint8 with C 1, 3 or 4.
        training_images: (N, C, H, W) uint8.
        pairs: At least one pair of a `Memorization`, found in pixels or in features.
    """
    left = torch.stack([torch.as_tensor(np.array(samples[pair.sample])) for pair in pairs])
    right = torch.stack([torch.as_tensor(np.array(training_images[pair.training])) for pair in pairs])
    difference = (left.int() - right.int()).abs()
    if difference.shape[1] == 4:
        difference[:, 3] = 255  # opaque
    rows = [to_pil(pixels) for pixels in (left, right, difference.to(torch.uint8))]
    strip(rows, [f"{pair.distance:.4g}" for pair in pairs], ["sample", "training image", "pixel difference"]).save(
        path
    )


def _float_rows(rows: Rows, which: slice | np.ndarray) -> Tensor:
    """Return the selected rows, (b, d) float64 on the CPU."""
    # np.array copies: torch warns about arrays that cannot be written to, such as files mapped into memory.
    selected = rows[which].cpu() if isinstance(rows, Tensor) else torch.from_numpy(np.array(rows[which]))
    values = selected.flatten(1).double()
    if not values.isfinite().all():
        raise UsageError("images must have finite values, got NaN or infinite ones: the network overflowed somewhere")
    return values


def _mann_whitney_z(distances: Tensor, expected: Tensor) -> float:
    """Return (U - m n / 2) / std, where U counts the pairs whose sample is nearer, and ties as halves.

    Args:
        distances: Of the samples, (m,).
        expected: Of the held-out images, (n,), sorted.
    """
    m, n = len(distances), len(expected)
    farther = n - torch.searchsorted(expected, distances, right=True)
    equal = n - torch.searchsorted(expected, distances) - farther
    u = float((farther + equal / 2).sum())
    ties = torch.cat([distances, expected]).unique(return_counts=True)[1].double()
    total = m + n
    variance = m * n / 12 * (total + 1 - float((ties**3 - ties).sum()) / (total * (total - 1)))
    return (u - m * n / 2) / math.sqrt(variance) if variance > 0 else 0.0


def _beta_binomial_tail(count: int, num: int, a: float, b: float) -> float:
    """Return P(X >= count) for X ~ Binomial(num, p), p ~ Beta(a, b)."""
    x = torch.arange(count, num + 1, dtype=torch.float64)

    def log_beta(u: Tensor, v: Tensor) -> Tensor:
        return u.lgamma() + v.lgamma() - (u + v).lgamma()

    log_choose = -log_beta(x + 1, num - x + 1) - math.log(num + 1)
    prior = log_beta(torch.tensor(float(a), dtype=torch.float64), torch.tensor(float(b), dtype=torch.float64))
    return min(1.0, float((log_choose + log_beta(x + a, num - x + b) - prior).logsumexp(dim=0).exp()))
