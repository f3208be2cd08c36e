"""Whether samples are copies: do they come nearer to the training images than images that were not trained on?

    training, held-out, samples     images as rows: pixels, or features of any network, the same for all three
    distance                        L2, from a sample or a held-out image to the nearest training image
    near                            at a distance below the k-th smallest of the n held-out ones, k/(n + 1) = 1 %

Were the model to draw what the held-out images are drawn from, then samples and held-out images would be exchangeable,
and so would be their distances, whatever the training images and the distance. Hence both null distributions:

    number of near samples          beta-binomial: each is near with one unknown probability ~ Beta(k, n + 1 - k)
    Z                               N(0, 1): the Mann-Whitney statistic of all distances, Meehan et al. 2020, Sec. 3

The first sees a few copies among many samples that are none, or that are far from all images. The second, the paper's
test of data-copying over one cell, sees that samples are a little too near on the whole. Both say something of the
model only if held-out images were chosen at random; a model that favors images with close neighbors passes for near.
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

MIN_SAMPLES = 20  # from which on Z is nearly normal
_NUM_CANDIDATES = 4


class Pair(NamedTuple):
    """A sample and the training image nearest to it, by their indices."""

    sample: int
    training: int
    distance: float


@dataclass(frozen=True)
class Memorization:
    """How much nearer samples come to training images than held-out images do.

    Args:
        near_fraction: the share of samples that are near.
        expected_near_fraction: its mean for a model that does not copy, k/(n + 1).
        near_p_value: the probability that such a model has as many near samples or more.
        z: Meehan et al.'s Z with its sign turned: above 3, samples are too near; below -3, too far.
        z_p_value: the probability of such a z or a greater one.
        near_distance: below it a sample is near.
        median_distance, median_held_out_distance: of samples, of held-out images.
        num_samples, num_held_out, num_training: images compared.
        pairs: the samples nearest to a training image, nearest first.
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


def memorization(
    samples: Rows, training: Rows, held_out: Rows, *, quantile: float = 0.01, num_pairs: int = 8, block: int = 1024
) -> Memorization:
    """Compares the distances of samples to training images with those of held-out images.

    Args:
        samples, training, held_out: (m, ...), (N, ...) and (n, ...), pixels or features; samples rounded as they are
            saved, held-out images prepared as the training images were.
        quantile: of the held-out distances, about which samples are near; in (0, 1).
        num_pairs: how many pairs to return.
        block: as of `nearest`.

    Raises:
        UsageError: too few samples or held-out images, held-out images that are training images, and as `nearest`.
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
    distances, indices = nearest(samples, training, block)
    expected = nearest(held_out, training, block)[0].sort().values
    near_distance = float(expected[rank - 1])
    if near_distance == 0:
        raise UsageError(
            f"held_out must be images that were not trained on, got {int((expected == 0).sum())} of {num_held_out} "
            "that are training images: remove them"
        )
    num_near = int((distances < near_distance).sum())
    z = _mann_whitney_z(distances, expected)
    order = distances.argsort(stable=True)[:num_pairs].tolist()
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


def nearest(queries: Rows, database: Rows, block: int = 1024) -> tuple[Tensor, Tensor]:
    """The nearest row of `database` to each row of `queries`, by L2 distance, in float64.

    |q|^2 + |x|^2 - 2 q.x chooses four candidates, of which |q - x| is then computed as it stands: a copy is at 0.

    Args:
        queries, database: (n, ...) and (m, ...), m > 0, of any numeric type; rows are flattened to d values.
        block: rows of each that are in memory in float64 at a time: about 8 block (4 d + block) bytes.

    Returns: distances (n,) float64 and indices (n,) int64, on the CPU.

    Raises:
        UsageError: no rows in `database`, rows of different lengths, values that are not finite.
    """
    lengths = [math.prod(x.shape[1:]) for x in (queries, database)]
    if not len(database) or lengths[0] != lengths[1]:
        raise UsageError(
            f"images must be compared with some, of as many values, got {tuple(queries.shape)} against "
            f"{tuple(database.shape)}: take pixels of one size, or features of one network, for all of them"
        )
    parts: list[tuple[Tensor, Tensor]] = []
    for first in range(0, len(queries), block):
        q = _float_rows(queries, slice(first, first + block))
        q_square = q.square().sum(dim=1, keepdim=True)
        squares, indices = q.new_empty(len(q), 0), torch.empty(len(q), 0, dtype=torch.int64)
        for start in range(0, len(database), block):
            x = _float_rows(database, slice(start, start + block))
            found = torch.addmm(q_square + x.square().sum(dim=1), q, x.T, alpha=-2)
            squares = torch.cat([squares, found], dim=1)
            indices = torch.cat([indices, torch.arange(start, start + len(x)).expand(len(q), -1)], dim=1)
            squares, kept = squares.topk(min(_NUM_CANDIDATES, squares.shape[1]), dim=1, largest=False)
            indices = indices.gather(1, kept)
        indices = indices.sort(dim=1).values  # of equal ones the first
        exact = torch.stack([(q - _float_rows(database, i)).square().sum(dim=1) for i in indices.T.numpy()], dim=1)
        least = exact.argmin(dim=1, keepdim=True)
        parts.append((exact.gather(1, least)[:, 0].sqrt(), indices.gather(1, least)[:, 0]))
    if not parts:
        return torch.empty(0, dtype=torch.float64), torch.empty(0, dtype=torch.int64)
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def draw_pairs(samples: Rows, training_images: Rows, pairs: Sequence[Pair], path: str | Path) -> None:
    """Write the pairs as a PNG, one below the other: sample, training image, and the size of their difference.

    Args:
        samples, training_images: (m, C, H, W) and (N, C, H, W) uint8, C being 1, 3 or 4.
        pairs: of `Memorization`, whatever they were found with; at least one.
    """
    left = torch.stack([torch.as_tensor(np.array(samples[pair.sample])) for pair in pairs])
    right = torch.stack([torch.as_tensor(np.array(training_images[pair.training])) for pair in pairs])
    difference = (left.int() - right.int()).abs()
    if difference.shape[1] == 4:
        difference[:, 3] = 255  # opaque
    rows = [to_pil(pixels) for pixels in (left, right, difference.to(torch.uint8))]
    strip(rows, [f"{pair.distance:.4g}" for pair in pairs], ["sample", "training image", "difference"]).save(path)


def _float_rows(rows: Rows, which: slice | np.ndarray) -> Tensor:
    """The chosen rows, (b, d) float64 on the CPU."""
    # A copy, as a file that is mapped into memory may not be written to.
    part = rows[which].cpu() if isinstance(rows, Tensor) else torch.from_numpy(np.array(rows[which]))
    part = part.flatten(1).double()
    if not part.isfinite().all():
        raise UsageError("images must have finite values, got NaN or infinite ones: look for the network's overflow")
    return part


def _mann_whitney_z(distances: Tensor, expected: Tensor) -> float:
    """(U - m n / 2) / std, U the number of pairs whose sample is nearer, halves for equal ones; `expected` sorted."""
    m, n = len(distances), len(expected)
    farther = n - torch.searchsorted(expected, distances, right=True)
    equal = n - torch.searchsorted(expected, distances) - farther
    u = float((farther + equal / 2).sum())
    ties = torch.cat([distances, expected]).unique(return_counts=True)[1].double()
    total = m + n
    variance = m * n / 12 * (total + 1 - float((ties**3 - ties).sum()) / (total * (total - 1)))
    return (u - m * n / 2) / math.sqrt(variance) if variance > 0 else 0.0


def _beta_binomial_tail(count: int, num: int, a: float, b: float) -> float:
    """P(X >= count) for X ~ Binomial(num, p), p ~ Beta(a, b)."""
    x = torch.arange(count, num + 1, dtype=torch.float64)

    def log_beta(u: Tensor, v: Tensor) -> Tensor:
        return u.lgamma() + v.lgamma() - (u + v).lgamma()

    log_choose = -log_beta(x + 1, num - x + 1) - math.log(num + 1)
    prior = log_beta(torch.tensor(float(a), dtype=torch.float64), torch.tensor(float(b), dtype=torch.float64))
    return min(1.0, float((log_choose + log_beta(x + a, num - x + b) - prior).logsumexp(dim=0).exp()))
