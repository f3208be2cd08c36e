"""Distances between two sets of feature vectors.

    X: n x d, features of samples; Y: m x d, of references, from the same network
    mu = mean of rows,  S = sum_i (x_i - mu)(x_i - mu)^T (scatter),  C = S / (n - 1) (unbiased covariance)

    Frechet   |mu_X - mu_Y|^2 + Tr(C_X + C_Y - 2 (C_X C_Y)^(1/2))                   Heusel et al. 2017 (FID)
    MMD^2     mean k(x_i, x_j) + mean k(y_i, y_j) - 2 mean k(x_i, y_j)              Gretton et al. 2012
      KID     k(x, y) = (x.y / d + 1)^3, i != j within a set                        Binkowski et al. 2018
      CMMD    1000 MMD^2, k(x, y) = exp(-|x - y|^2 / 200), |x| = |y| = 1, all i, j  Jayasumana et al. 2024
    B(y_j) = open ball around y_j; its radius: the distance to the k-th nearest other row of Y. B(x_i) likewise in X
      precision = share of X in any B(y_j)         recall   = share of Y in any B(x_i)    Kynkäänniemi et al. 2019
      density   = mean over X of #{j: x in B(y_j)} / k                                    Naeem et al. 2020
      coverage  = share of j with any of X in B(y_j)                                      Naeem et al. 2020

Features may have any real type and device; what is computed from them is float64, there. Nothing here is random, and
no n x m matrix is made: work goes by blocks, whose size changes rounding only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hf_ddpm.runtime.errors import UsageError

BLOCK_SIZE = 1024  # rows; a block of pairs has 8 MB
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0


@dataclass(frozen=True, eq=False)
class Moments:
    """Count, mean and scatter of rows that are seen in parts, by one process or several, in any order.

    The fields are plain tensors: `save_file(vars(moments), path)`, `Moments(**load_file(path))`.

    Args:
        count: () int64.
        mean: (d,) float64.
        scatter: S, (d, d) float64; means are taken off before products are summed: a large one costs no digits.
    """

    count: Tensor
    mean: Tensor
    scatter: Tensor

    @classmethod
    def empty(cls, num_features: int, device: torch.device | str = "cpu") -> Moments:
        """Of no rows."""
        mean = torch.zeros(num_features, dtype=torch.float64, device=device)
        return cls(torch.zeros((), dtype=torch.int64, device=device), mean, torch.outer(mean, mean))

    @classmethod
    def of(cls, features: Tensor, block_size: int = BLOCK_SIZE) -> Moments:
        """Of the rows of one matrix."""
        moments = cls.empty(_check(features, "features", min_rows=0).shape[1], features.device)
        for block in features.split(block_size):
            moments = moments.update(block)
        return moments

    def update(self, features: Tensor) -> Moments:
        """Of the rows seen and those of `features`, (B, d). Returns new moments."""
        _check(features, "features", min_rows=0)
        _check_same_width(features.shape[1], len(self.mean))
        if len(features) == 0:
            return self
        count, mean = self.count.new_tensor(len(features)), features.double().mean(dim=0)
        shift, share = self._shift(count, mean)
        # `merge` in one matrix product: the shift is a row among the others.
        rows = torch.cat([features.double() - mean, (shift * (self.count * share).sqrt())[None]])
        return Moments(self.count + count, self.mean + shift * share, self.scatter.addmm(rows.T, rows))

    def merge(self, other: Moments) -> Moments:
        """Of both sets together, Chan et al. 1979: mu_a + shift n_b / n, S_a + S_b + shift shift^T n_a n_b / n."""
        _check_same_width(len(other.mean), len(self.mean))
        shift, share = self._shift(other.count, other.mean)
        scatter = self.scatter + other.scatter + torch.outer(shift, shift) * (self.count * share)
        return Moments(self.count + other.count, self.mean + shift * share, scatter)

    def _shift(self, count: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        """mu_b - mu_a and n_b / n."""
        return mean - self.mean, count.double() / (self.count + count).clamp(min=1)


def frechet_distance(moments_x: Moments, moments_y: Moments) -> float:
    """Frechet distance of the Gaussians with these moments, at least 0.

    With n or m of about d or fewer it is biased upwards by far more than the differences of interest: the caller has
    to refuse or to warn. The bias falls with n, so that distances compare at equal n and m only.

    Raises: UsageError if a set has fewer than 2 rows or d differs.
    """
    _check_same_width(len(moments_x.mean), len(moments_y.mean))
    return _frechet(moments_x.mean, _root(moments_x), moments_y.mean, _root(moments_y))


def frechet_distance_from_features(X: Tensor, Y: Tensor, block_size: int = BLOCK_SIZE) -> float:
    """`frechet_distance` of two matrices; one with no more rows than columns is its own root, which is cheaper."""
    _check_pair(X, Y)
    parts: list[Tensor] = []
    for features in (X, Y):
        if len(features) > features.shape[1]:
            moments = Moments.of(features, block_size)
            parts += [moments.mean, _root(moments)]
        else:
            mean = features.double().mean(dim=0)
            parts += [mean, (features.double() - mean) / math.sqrt(len(features) - 1)]
    return _frechet(*parts)


def _frechet(mean_x: Tensor, root_x: Tensor, mean_y: Tensor, root_y: Tensor) -> float:
    """From roots, R^T R = C: Tr (C_X C_Y)^(1/2) is the nuclear norm of R_X R_Y^T.

    Its singular values are the roots of the eigenvalues of C_X^(1/2) C_Y C_X^(1/2). Those err by 1e-16, so that a zero
    among them would count as 1e-8.
    """
    trace = torch.linalg.svdvals(root_x @ root_y.T).sum()
    distance = (mean_x - mean_y).square().sum() + root_x.square().sum() + root_y.square().sum() - 2 * trace
    return max(0.0, distance.item())


def _root(moments: Moments) -> Tensor:
    """R with R^T R = C, (r, d): r = min(n - 1, d), as no more eigenvalues can be above 0."""
    count = int(moments.count)
    if count < 2:
        raise UsageError(f"a covariance needs at least 2 rows, got {count}: give more images")
    variances, directions = torch.linalg.eigh(moments.scatter / (count - 1))
    return (directions * variances.clamp(min=0).sqrt()).T[-(count - 1) :]


class KernelDistance(NamedTuple):
    """An MMD^2 and its standard error over draws of both sets."""

    distance: float
    standard_error: float


def kernel_distance(X: Tensor, Y: Tensor, block_size: int = BLOCK_SIZE) -> KernelDistance:
    """KID: the unbiased MMD^2 over all pairs. Its mean is 0 for equal distributions, so that it can be negative.

    Means over random subsets, in most papers 100 of 1,000 rows, have the same expectation and a larger variance, and
    the spread of subsets, which overlap, is no standard error. The one here is of all pairs; see `_mmd`. Takes
    d (n + m)^2 / 2 multiplications.

    Raises: UsageError if a set has fewer than 4 rows.
    """
    _check_pair(X, Y, min_rows=4)
    within_x, within_y, between, standard_error = _mmd(X, Y, _polynomial_kernel, block_size)
    return KernelDistance(within_x + within_y - 2 * between, standard_error)


def cmmd(X: Tensor, Y: Tensor, block_size: int = BLOCK_SIZE) -> KernelDistance:
    """CMMD of CLIP embeddings, which are divided by their lengths here.

    As published, its means include k(x_i, x_i) = 1: for equal distributions the expectation is not 0 but
    1000 (1 - E k(x, x')) (1/n + 1/m), so that distances compare at equal n and m only.

    Raises: UsageError if a set has fewer than 4 rows or a row is zero.
    """
    _check_pair(X, Y, min_rows=4)
    if not (X.any(dim=1).all() and Y.any(dim=1).all()):
        raise UsageError("an embedding must not be zero, as it has no direction: check the network")
    # These are means of k - 1, which is 0 for i = j.
    within_x, within_y, between, standard_error = _mmd(X, Y, _gaussian_kernel_minus_one, block_size)
    distance = within_x * (1 - 1 / len(X)) + within_y * (1 - 1 / len(Y)) - 2 * between
    return KernelDistance(CMMD_SCALE * distance, CMMD_SCALE * standard_error)


def _polynomial_kernel(x: Tensor, y: Tensor) -> Tensor:
    base = (x @ y.T).div_(x.shape[1]).add_(1)
    return base.square().mul_(base)


def _gaussian_kernel_minus_one(x: Tensor, y: Tensor) -> Tensor:
    x, y = x / x.norm(dim=1, keepdim=True), y / y.norm(dim=1, keepdim=True)
    return (x @ y.T).sub_(1).div_(CMMD_SIGMA**2).expm1_()  # |x - y|^2 = 2 - 2 x.y


def _mmd(
    X: Tensor, Y: Tensor, kernel: Callable[[Tensor, Tensor], Tensor], block_size: int
) -> tuple[float, float, float, float]:
    """Means of k over i != j in X, in Y, and between them; the standard error of the unbiased MMD^2.

    Its variance, by Hoeffding's decomposition, is exactly

        4 V_x / n + 4 V_y / m + 2 V_xx / (n (n-1)) + 2 V_yy / (m (m-1)) + 4 V_xy / (n m)

    V_x = Var(E k(x, x') - E k(x, y)) over x, V_y likewise; V_xx, V_yy, V_xy: variance of k less its conditional means
    given either argument. Each has an unbiased estimate in row sums and sums of squares of the three kernel matrices.
    The first two terms are 0 for equal distributions, where the variance of row means alone (the jackknife) is twice
    the true one; their estimate is cut at 0, so that what errs is on the large side.
    """
    n, m = len(X), len(Y)
    rows_x, _, squares_x = _kernel_sums(X, None, kernel, block_size)
    rows_y, _, squares_y = _kernel_sums(Y, None, kernel, block_size)
    rows_xy, columns_xy, squares_xy = _kernel_sums(X, Y, kernel, block_size)
    # Sums of squares of the matrices, doubly centered without their diagonals, over degrees of freedom.
    v_xx = squares_x - 2 * rows_x.square().sum() / (n - 2) + rows_x.sum().square() / ((n - 1) * (n - 2))
    v_yy = squares_y - 2 * rows_y.square().sum() / (m - 2) + rows_y.sum().square() / ((m - 1) * (m - 2))
    v_xy = squares_xy - rows_xy.square().sum() / m - columns_xy.square().sum() / n + rows_xy.sum().square() / (n * m)
    v_xx, v_yy = v_xx.clamp(min=0) / (n * (n - 3)), v_yy.clamp(min=0) / (m * (m - 3))
    v_xy = v_xy.clamp(min=0) / ((n - 1) * (m - 1))
    # n - 2 where a mean has n - 1: a row's own effect is also in the mean over rows.
    v_x = (rows_x / (n - 2) - rows_xy / m).var() - v_xx / (n - 2) - v_xy / m
    v_y = (rows_y / (m - 2) - columns_xy / n).var() - v_yy / (m - 2) - v_xy / n
    variance = (4 * v_x / n + 4 * v_y / m).clamp(min=0)
    variance = variance + 2 * v_xx / (n * (n - 1)) + 2 * v_yy / (m * (m - 1)) + 4 * v_xy / (n * m)
    within_x, within_y, between = rows_x.sum() / (n * (n - 1)), rows_y.sum() / (m * (m - 1)), rows_xy.sum() / (n * m)
    return within_x.item(), within_y.item(), between.item(), variance.sqrt().item()


def _kernel_sums(
    X: Tensor, Y: Tensor | None, kernel: Callable[[Tensor, Tensor], Tensor], block_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Row sums, column sums and sum of squares of a kernel matrix; without Y of X with itself, less its diagonal."""
    rows = torch.zeros(len(X), dtype=torch.float64, device=X.device)
    columns, squares = rows if Y is None else rows.new_zeros(len(Y)), rows.new_zeros(())
    for i, j, x, y in _blocks(X, Y, block_size):
        k, on_diagonal = kernel(x, y), Y is None and i == j
        if on_diagonal:
            k.fill_diagonal_(0)
        rows[i] += k.sum(dim=1)
        if not on_diagonal:
            columns[j] += k.sum(dim=0)  # without Y, of the mirrored block
        squares += k.flatten().dot(k.flatten()) * (2 if Y is None and not on_diagonal else 1)
    return rows, columns, squares


class PRDC(NamedTuple):
    """Fidelity: precision, density. Diversity: recall, coverage. Density can be above 1."""

    precision: float
    recall: float
    density: float
    coverage: float


def precision_recall_density_coverage(X: Tensor, Y: Tensor, k: int = 5, block_size: int = BLOCK_SIZE) -> PRDC:
    """Precision, recall, density and coverage. A point just at a ball's radius is outside, as in Naeem et al.'s code.

    All four depend on n, m and k.

    Raises: UsageError if k is not in [1, min(n, m) - 1].
    """
    _check_pair(X, Y)
    if not 1 <= k < min(len(X), len(Y)):
        raise UsageError(f"k must be in [1, {min(len(X), len(Y)) - 1}], got {k}: each row needs k others in its set")
    # |x|^2 + |y|^2 - 2 x.y loses the digits that a mean takes; that of some rows is near enough.
    center = Y[:block_size].double().mean(dim=0)
    radii_x, radii_y = _squared_radii(X, center, k, block_size), _squared_radii(Y, center, k, block_size)
    num_balls = torch.zeros(len(X), dtype=torch.float64, device=X.device)  # #{j: x_i in B(y_j)}
    is_covered = torch.zeros(len(Y), dtype=torch.bool, device=X.device)
    is_recalled = torch.zeros_like(is_covered)
    for i, j, x, y in _blocks(X, Y, block_size):
        # More than rounding, which depends on a row's place in its block: who is at the radius is outside.
        distances = _squared_distances(x - center, y - center, margin=1e-12)
        inside = distances < radii_y[j]
        num_balls[i] += inside.sum(dim=1)
        is_covered[j] |= inside.any(dim=0)
        is_recalled[j] |= (distances < radii_x[i, None]).any(dim=0)
    shares = [part.double().mean().item() for part in (num_balls > 0, is_recalled, num_balls / k, is_covered)]
    return PRDC(*shares)


def _squared_radii(X: Tensor, center: Tensor, k: int, block_size: int) -> Tensor:
    """Squared distance of each row to its k-th nearest other row, (n,)."""
    nearest = torch.full((len(X), k), math.inf, dtype=torch.float64, device=X.device)
    for i, j, x, y in _blocks(X, None, block_size):
        distances = _squared_distances(x - center, y - center)
        if i == j:
            distances.fill_diagonal_(math.inf)
        for rows, others in [(i, distances), (j, distances.T)][: 1 if i == j else 2]:
            closest = others.topk(min(k, others.shape[1]), largest=False).values
            nearest[rows] = torch.cat([nearest[rows], closest], dim=1).topk(k, largest=False).values
    return nearest.amax(dim=1)


def _squared_distances(x: Tensor, y: Tensor, margin: float = 0.0) -> Tensor:
    squares = x.square().sum(dim=1)[:, None] + y.square().sum(dim=1)
    return squares.mul_(1 + margin).addmm_(x, y.T, alpha=-2)


def _blocks(X: Tensor, Y: Tensor | None, size: int) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Blocks of pairs: rows, columns and their features in float64; without Y of X with itself, i <= j."""
    for i in range(0, len(X), size):
        x, others = X[i : i + size].double(), X if Y is None else Y
        for j in range(i if Y is None else 0, len(others), size):
            yield slice(i, i + size), slice(j, j + size), x, others[j : j + size].double()


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
