"""The distances between two sets of feature vectors.

    X: n x d, features of samples; Y: m x d, of references, from the same network
    mu = mean of rows,  S = sum_i (x_i - mu)(x_i - mu)^T (scatter),  C = S / (n - 1) (unbiased covariance)

    Frechet   |mu_X - mu_Y|^2 + Tr(C_X + C_Y - 2 (C_X C_Y)^(1/2))                   Heusel et al. 2017 (FID)
    MMD^2     mean k(x_i, x_j) + mean k(y_i, y_j) - 2 mean k(x_i, y_j)              Gretton et al. 2012
      KID     k(x, y) = (x.y / d + 1)^3, i != j within a set                        Binkowski et al. 2018
      CMMD    1000 MMD^2, k(x, y) = exp(-|x - y|^2 / 200), |x| = |y| = 1, all i, j  Jayasumana et al. 2024
    B(y_j) = open ball around y_j; its radius: the distance to the k-th nearest other row of Y. B(x_i) likewise in X
      precision = fraction of X in any B(y_j)      recall   = fraction of Y in any B(x_i) Kynkäänniemi et al. 2019
      density   = mean over X of #{j: x in B(y_j)} / k                                    Naeem et al. 2020
      coverage  = fraction of j with any of X in B(y_j)                                   Naeem et al. 2020

Features may have any real type and device; everything is computed there in float64. Nothing here is random. No n x m
matrix is made: pairs of rows are taken in blocks, whose size changes only the rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hf_ddpm.runtime.errors import UsageError

BLOCK_SIZE = 1024  # rows; a block of pairs takes 8 MB
MIN_CLASS_IMAGES = 50  # of each side, for a class that is compared by itself
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0


@dataclass(frozen=True, eq=False)
class Moments:
    """The count, mean and scatter of rows, which may be added in parts, by several processes and in any order.

    The fields are plain tensors: `save_file(vars(moments), path)`, `Moments(**load_file(path))`.

    Args:
        count: Number of rows, () int64.
        mean: Their mean, (d,) float64.
        scatter: S, (d, d) float64. The mean is subtracted before products are summed, so that a large mean costs no
            digits.
    """

    count: Tensor
    mean: Tensor
    scatter: Tensor

    @classmethod
    def empty(cls, num_features: int, device: torch.device | str = "cpu") -> Moments:
        """Return the moments of zero rows."""
        mean = torch.zeros(num_features, dtype=torch.float64, device=device)
        return cls(torch.zeros((), dtype=torch.int64, device=device), mean, torch.outer(mean, mean))

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """Return the moments of the rows of one matrix, (n, d)."""
        moments = cls.empty(_check(features, "features", min_rows=0).shape[1], features.device)
        for block in features.split(BLOCK_SIZE):
            moments = moments.update(block)
        return moments

    def update(self, features: Tensor) -> Moments:
        """Add the rows of `features`, (B, d), and return new moments."""
        _check(features, "features", min_rows=0)
        _check_same_width(features.shape[1], len(self.mean))
        if len(features) == 0:
            return self
        count = self.count.new_tensor(len(features))
        mean = features.double().mean(dim=0)
        shift, fraction = self._shift(count, mean)
        # This is `merge` in one matrix product, with the shift as one more row.
        rows = torch.cat([features.double() - mean, (shift * (self.count * fraction).sqrt())[None]])
        return Moments(self.count + count, self.mean + shift * fraction, self.scatter.addmm(rows.T, rows))

    def merge(self, other: Moments) -> Moments:
        """Return the moments of both sets together.

        mu = mu_a + shift n_b / n,  S = S_a + S_b + shift shift^T n_a n_b / n;  Chan et al. 1979.
        """
        _check_same_width(len(other.mean), len(self.mean))
        shift, fraction = self._shift(other.count, other.mean)
        scatter = self.scatter + other.scatter + torch.outer(shift, shift) * (self.count * fraction)
        return Moments(self.count + other.count, self.mean + shift * fraction, scatter)

    def _shift(self, count: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        """Return mu_b - mu_a and n_b / n."""
        return mean - self.mean, count.double() / (self.count + count).clamp(min=1)


def frechet_distance(moments_x: Moments, moments_y: Moments) -> float:
    """Return the Fréchet distance of the Gaussians with these moments, at least 0.

    It is biased upwards. With n or m of about d or fewer, the bias is far larger than the differences of interest, so
    that the caller has to refuse or to warn. The bias falls with n and m: only distances of equal n and m compare.

    Raises:
        UsageError: When a set has fewer than 2 rows, or the sets differ in d.
    """
    _check_same_width(len(moments_x.mean), len(moments_y.mean))
    root_x, root_y = _root(moments_x), _root(moments_y)
    # Tr (C_X C_Y)^(1/2) is the sum of the singular values of R_X R_Y^T. They are the square roots of the eigenvalues
    # of C_X^(1/2) C_Y C_X^(1/2), which err by 1e-16: an eigenvalue of 0 would count as 1e-8.
    trace = torch.linalg.svdvals(root_x @ root_y.T).sum()
    shift = (moments_x.mean - moments_y.mean).square().sum()
    distance = shift + root_x.square().sum() + root_y.square().sum() - 2 * trace
    return max(0.0, distance.item())


def _root(moments: Moments) -> Tensor:
    """Return R with R^T R = C, (r, d), where r = min(n - 1, d): no more eigenvalues of C can be above 0."""
    count = int(moments.count)
    if count < 2:
        raise UsageError(f"a covariance needs at least 2 rows, got {count}: give more images")
    variances, directions = torch.linalg.eigh(moments.scatter / (count - 1))
    return (directions * variances.clamp(min=0).sqrt()).T[-(count - 1) :]


class KernelDistance(NamedTuple):
    """An MMD^2 and its standard error, the spread that new draws of both sets would give."""

    distance: float
    standard_error: float


def kernel_distance(X: Tensor, Y: Tensor) -> KernelDistance:
    """Return KID, the unbiased MMD^2 over all pairs: its mean is 0 for equal distributions, so it can be negative.

    Most papers average over random subsets, 100 of 1,000 rows each. That has the same expectation and a larger
    variance, and the spread of overlapping subsets is no standard error. `_mmd` says what the standard error is here.
    The computation takes d (n + m)^2 / 2 multiplications.

    Raises:
        UsageError: When a set has fewer than 4 rows.
    """
    _check_pair(X, Y, min_rows=4)
    within_x, within_y, between, standard_error = _mmd(X, Y, _polynomial_kernel)
    return KernelDistance(within_x + within_y - 2 * between, standard_error)


def paired_kernel_distance(X: Tensor, Y: Tensor) -> float:
    """Return the unbiased MMD^2 of pairs (x_i, y_i), as images of two samplers from the same noises are.

    It is the mean over i != j of k(x_i, x_j) + k(y_i, y_j) - k(x_i, y_j) - k(x_j, y_i), Gretton et al. 2012, Eq. 4.
    The pairs are independent of each other; x_i and y_i need not be, so k(x_i, y_i) is left out. The more alike they
    are, the less it varies: it is 0 for equal ones.

    Raises:
        UsageError: When there are fewer than 2 pairs.
    """
    _check_pair(X, Y)
    if len(X) != len(Y):
        raise UsageError(f"X and Y must have a row for each pair, got {len(X)} and {len(Y)}")
    within = _kernel_sums(X, None, _polynomial_kernel)[0].sum() + _kernel_sums(Y, None, _polynomial_kernel)[0].sum()
    of_pairs = torch.cat([_polynomial_kernel(x[None], y[None]) for x, y in zip(X.double(), Y.double(), strict=True)])
    between = _kernel_sums(X, Y, _polynomial_kernel)[0].sum() - of_pairs.sum()
    return (within - 2 * between).item() / (len(X) * (len(X) - 1))


def cmmd(X: Tensor, Y: Tensor) -> KernelDistance:
    """Return CMMD of CLIP embeddings, which this function divides by their lengths.

    As published, its means include k(x_i, x_i) = 1. For equal distributions the expectation is therefore not 0 but
    1000 (1 - E k(x, x')) (1/n + 1/m): only distances of equal n and m compare.

    Raises:
        UsageError: When a set has fewer than 4 rows, or a row is zero.
    """
    _check_pair(X, Y, min_rows=4)
    if not (X.any(dim=1).all() and Y.any(dim=1).all()):
        raise UsageError("an embedding must not be zero, as it has no direction: check the network")
    # These are means of k - 1, which is 0 for i = j.
    within_x, within_y, between, standard_error = _mmd(X, Y, _gaussian_kernel_minus_one)
    distance = within_x * (1 - 1 / len(X)) + within_y * (1 - 1 / len(Y)) - 2 * between
    return KernelDistance(CMMD_SCALE * distance, CMMD_SCALE * standard_error)


def _polynomial_kernel(x: Tensor, y: Tensor) -> Tensor:
    base = (x @ y.T).div_(x.shape[1]).add_(1)
    return base.square().mul_(base)


def _gaussian_kernel_minus_one(x: Tensor, y: Tensor) -> Tensor:
    x, y = x / x.norm(dim=1, keepdim=True), y / y.norm(dim=1, keepdim=True)
    return (x @ y.T).sub_(1).div_(CMMD_SIGMA**2).expm1_()  # |x - y|^2 = 2 - 2 x.y


def _mmd(X: Tensor, Y: Tensor, kernel: Callable[[Tensor, Tensor], Tensor]) -> tuple[float, float, float, float]:
    """Return the means of k over i != j in X, in Y, and between them, and the standard error of the unbiased MMD^2.

    By Hoeffding's decomposition, the variance of the MMD^2 is exactly

        4 V_x / n + 4 V_y / m + 2 V_xx / (n (n-1)) + 2 V_yy / (m (m-1)) + 4 V_xy / (n m)

    V_x = Var(E k(x, x') - E k(x, y)) over x, and V_y likewise. V_xx, V_yy and V_xy are the variance of k minus its
    conditional means given either argument. Row sums and sums of squares of the three kernel matrices give an
    unbiased estimate of each. For equal distributions the first two terms are 0, and the variance of row means alone
    (the jackknife) is twice the true one. Their estimate is cut off at 0: the standard error is rather too large.
    """
    n, m = len(X), len(Y)
    rows_x, _, squares_x = _kernel_sums(X, None, kernel)
    rows_y, _, squares_y = _kernel_sums(Y, None, kernel)
    rows_xy, columns_xy, squares_xy = _kernel_sums(X, Y, kernel)
    # Sums of squares of the matrices, doubly centered without their diagonals, divided by their degrees of freedom.
    v_xx = squares_x - 2 * rows_x.square().sum() / (n - 2) + rows_x.sum().square() / ((n - 1) * (n - 2))
    v_yy = squares_y - 2 * rows_y.square().sum() / (m - 2) + rows_y.sum().square() / ((m - 1) * (m - 2))
    v_xy = squares_xy - rows_xy.square().sum() / m - columns_xy.square().sum() / n + rows_xy.sum().square() / (n * m)
    v_xx, v_yy = v_xx.clamp(min=0) / (n * (n - 3)), v_yy.clamp(min=0) / (m * (m - 3))
    v_xy = v_xy.clamp(min=0) / ((n - 1) * (m - 1))
    # The divisor is n - 2 where a mean has n - 1, because a row's own effect is also in the mean over rows.
    v_x = (rows_x / (n - 2) - rows_xy / m).var() - v_xx / (n - 2) - v_xy / m
    v_y = (rows_y / (m - 2) - columns_xy / n).var() - v_yy / (m - 2) - v_xy / n
    variance = (4 * v_x / n + 4 * v_y / m).clamp(min=0)
    variance = variance + 2 * v_xx / (n * (n - 1)) + 2 * v_yy / (m * (m - 1)) + 4 * v_xy / (n * m)
    within_x = rows_x.sum() / (n * (n - 1))
    within_y = rows_y.sum() / (m * (m - 1))
    between = rows_xy.sum() / (n * m)
    return within_x.item(), within_y.item(), between.item(), variance.sqrt().item()


def _kernel_sums(
    X: Tensor, Y: Tensor | None, kernel: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return row sums, column sums and the sum of squares of a kernel matrix.

    Args:
        Y: None: X with itself, without the diagonal of the matrix.
    """
    rows = torch.zeros(len(X), dtype=torch.float64, device=X.device)
    columns = rows if Y is None else rows.new_zeros(len(Y))
    squares = rows.new_zeros(())
    for i, j, x, y in _blocks(X, Y):
        k = kernel(x, y)
        on_diagonal = Y is None and i == j
        if on_diagonal:
            k.fill_diagonal_(0)
        rows[i] += k.sum(dim=1)
        if not on_diagonal:
            columns[j] += k.sum(dim=0)  # Without Y, these are the row sums of the mirrored block.
        squares += k.flatten().dot(k.flatten()) * (2 if Y is None and not on_diagonal else 1)
    return rows, columns, squares


class PRDC(NamedTuple):
    """The precision and density, which tell fidelity, and recall and coverage, which tell diversity.

    Density can exceed 1.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def precision_recall_density_coverage(X: Tensor, Y: Tensor, k: int = 5) -> PRDC:
    """Return precision, recall, density and coverage.

    A point exactly at a ball's radius is outside, as in Naeem et al.'s code. All four values depend on n, m and k.

    Args:
        k: The neighbor whose distance is a ball's radius.

    Raises:
        UsageError: When k is not in [1, min(n, m) - 1].
    """
    _check_pair(X, Y)
    if not 1 <= k < min(len(X), len(Y)):
        raise UsageError(f"k must be in [1, {min(len(X), len(Y)) - 1}], got {k}: each row needs k others in its set")
    # |x|^2 + |y|^2 - 2 x.y loses digits when the mean is large. Subtracting the mean of some rows prevents that.
    center = Y[:BLOCK_SIZE].double().mean(dim=0)
    radii_x, radii_y = _squared_radii(X, center, k), _squared_radii(Y, center, k)
    num_balls = torch.zeros(len(X), dtype=torch.float64, device=X.device)  # #{j: x_i in B(y_j)}
    is_covered = torch.zeros(len(Y), dtype=torch.bool, device=X.device)
    is_recalled = torch.zeros_like(is_covered)
    for i, j, x, y in _blocks(X, Y):
        # The margin is larger than the rounding, which depends on a row's position in its block. So a row exactly at
        # the radius is always outside.
        distances = _squared_distances(x - center, y - center, margin=1e-12)
        inside = distances < radii_y[j]
        num_balls[i] += inside.sum(dim=1)
        is_covered[j] |= inside.any(dim=0)
        is_recalled[j] |= (distances < radii_x[i, None]).any(dim=0)
    means = [values.double().mean().item() for values in (num_balls > 0, is_recalled, num_balls / k, is_covered)]
    return PRDC(*means)


def _squared_radii(X: Tensor, center: Tensor, k: int) -> Tensor:
    """Return the squared distance of each row to its k-th nearest other row, (n,)."""
    nearest = torch.full((len(X), k), math.inf, dtype=torch.float64, device=X.device)

    def update(rows: slice, distances: Tensor) -> None:
        closest = distances.topk(min(k, distances.shape[1]), largest=False).values
        nearest[rows] = torch.cat([nearest[rows], closest], dim=1).topk(k, largest=False).values

    for i, j, x, y in _blocks(X, None):
        distances = _squared_distances(x - center, y - center)
        if i == j:
            distances.fill_diagonal_(math.inf)
        update(i, distances)
        if i != j:
            update(j, distances.T)
    return nearest.amax(dim=1)


def _squared_distances(x: Tensor, y: Tensor, margin: float = 0.0) -> Tensor:
    squares = x.square().sum(dim=1)[:, None] + y.square().sum(dim=1)
    return squares.mul_(1 + margin).addmm_(x, y.T, alpha=-2)


def _blocks(X: Tensor, Y: Tensor | None) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Yield blocks of pairs: rows, columns, and the features of both in float64.

    Args:
        Y: None: pairs within X; blocks below the diagonal are left out.
    """
    second = X if Y is None else Y
    for i in range(0, len(X), BLOCK_SIZE):
        x = X[i : i + BLOCK_SIZE].double()
        for j in range(i if Y is None else 0, len(second), BLOCK_SIZE):
            yield slice(i, i + BLOCK_SIZE), slice(j, j + BLOCK_SIZE), x, second[j : j + BLOCK_SIZE].double()


def _check_pair(X: Tensor, Y: Tensor, min_rows: int = 2) -> None:
    _check_same_width(_check(X, "X", min_rows).shape[1], _check(Y, "Y", min_rows).shape[1])


def _check(features: Tensor, name: str, min_rows: int) -> Tensor:
    if features.ndim != 2:
        raise UsageError(
            f"{name} must have a row for each image, got shape {tuple(features.shape)}: flatten or pool it"
        )
    if len(features) < min_rows:
        raise UsageError(f"{name} must have at least {min_rows} rows, got {len(features)}: give more images")
    num_bad = int((~features.isfinite()).any(dim=1).sum())
    if num_bad:
        raise UsageError(
            f"{name} must be finite, got NaN or infinity in {num_bad} of {len(features)} rows: "
            "check those images, and run the network in float32"
        )
    return features


def _check_same_width(num_features: int, other: int) -> None:
    if num_features != other:
        raise UsageError(f"both sets must have as many features, got {num_features} and {other}: use one network")
