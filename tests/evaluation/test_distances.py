"""Tests of hf_ddpm.evaluation.distances: torchmetrics and prdc as oracles, known Gaussians, invariances, errors.

The oracles take seconds to import, and are not imported while tests are collected.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import reduce

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_ddpm.evaluation import distances as module
from hf_ddpm.evaluation.distances import (
    KernelDistance,
    Moments,
    cmmd,
    frechet_distance,
    kernel_distance,
    precision_recall_density_coverage,
)
from hf_ddpm.runtime.errors import UsageError

NUM_DRAWS = 300


def frechet(X: Tensor, Y: Tensor) -> float:
    return frechet_distance(Moments.of(X), Moments.of(Y))


DISTANCES = {
    "frechet": frechet,
    "kernel": lambda X, Y: kernel_distance(X, Y).distance,
    "cmmd": lambda X, Y: cmmd(X, Y).distance,
}


class Features(torch.nn.Module):
    """A network that returns its input, so that torchmetrics takes features for images."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, images: Tensor) -> Tensor:
        return images


def draw(n: int, d: int = 6, seed: int = 0, mean: float = 0.3, spread: float = 1.0) -> Tensor:
    """Return rows with correlated entries of different scale."""
    mixing = torch.randn(d, d, generator=torch.Generator().manual_seed(d), dtype=torch.float64)
    noise = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return noise @ mixing * spread + mean


def rotation(d: int) -> Tensor:
    matrix = torch.randn(d, d, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return torch.linalg.qr(matrix).Q


def standard_normal(n: int, d: int, generator: torch.Generator) -> Tensor:
    return torch.randn(n, d, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("mean", [0.3, 1e6])
@pytest.mark.parametrize("sizes", [[500], [1, 499], [250, 250], [7] * 71 + [3], [1] * 500])
def test_moments_do_not_depend_on_how_rows_are_divided(mean: float, sizes: list[int]):
    X = draw(500, mean=mean)
    parts = [Moments.of(part) for part in X.split(sizes)]
    streamed = Moments.empty(6)
    for part in X.split(sizes):
        streamed = streamed.update(part)
    for moments in [streamed, reduce(Moments.merge, parts), reduce(Moments.merge, reversed(parts))]:
        assert moments.count == 500
        torch.testing.assert_close(moments.mean, X.mean(dim=0), rtol=1e-12, atol=0)
        # cov subtracts the mean, too.
        torch.testing.assert_close(moments.scatter / 499, X.T.cov(), rtol=1e-9, atol=1e-9 * X.var().item())


def test_moments_merge_with_empty_ones_and_change_no_operand(monkeypatch: pytest.MonkeyPatch):
    X = draw(20)
    moments, empty = Moments.of(X[:10]), Moments.empty(6)
    before = {name: tensor.clone() for name, tensor in vars(moments).items()}
    monkeypatch.setattr(module, "BLOCK_SIZE", 3)
    for same in [moments.merge(empty), empty.merge(moments), moments.update(X[:0]), Moments.of(X[:10])]:
        torch.testing.assert_close(vars(same), vars(moments), rtol=1e-12, atol=1e-12)
    moments.update(X[10:])
    moments.merge(Moments.of(X[10:]))
    assert all(torch.equal(before[name], tensor) for name, tensor in vars(moments).items())
    assert empty.merge(empty).count == 0
    assert empty.merge(empty).scatter.isfinite().all()


def test_moments_are_plain_tensors_and_save(tmp_path):
    moments = Moments.empty(6)
    for batch in draw(20).float().split(6):
        moments = moments.update(batch)
    assert (moments.count.shape, moments.count.dtype) == ((), torch.int64)
    assert (moments.mean.shape, moments.mean.dtype) == ((6,), torch.float64)
    assert (moments.scatter.shape, moments.scatter.dtype) == ((6, 6), torch.float64)
    save_file(vars(moments), tmp_path / "moments.safetensors")
    loaded = Moments(**load_file(tmp_path / "moments.safetensors"))
    assert all(torch.equal(tensor, vars(moments)[name]) for name, tensor in vars(loaded).items())
    assert frechet_distance(loaded, Moments.of(draw(30, seed=1))) > 0


@pytest.mark.parametrize("n", [400, 700])
def test_frechet_distance_equals_torchmetrics(n: int):
    from torchmetrics.image.fid import FrechetInceptionDistance

    X, Y = draw(n, d=32, mean=0.5), draw(500, d=32, seed=1, spread=1.1)
    oracle = FrechetInceptionDistance(feature=Features(32)).set_dtype(torch.float64)
    oracle.update(Y, real=True)
    oracle.update(X, real=False)
    assert frechet(X, Y) == pytest.approx(oracle.compute().item(), rel=1e-6)


def test_frechet_distance_of_known_gaussians():
    # For commuting covariances, |mu_X - mu_Y|^2 + sum (sigma_X - sigma_Y)^2. A deviation of 0 becomes 1e-8 in a root.
    d, count, Q = 5, torch.tensor(100), rotation(5)
    sigma_x, sigma_y = torch.linspace(0.1, 2, d).double(), torch.linspace(3, 0, d).double()
    mean_x, mean_y = torch.zeros(d).double(), torch.arange(d).double()
    moments_x = Moments(count, mean_x, 99 * Q @ sigma_x.square().diag() @ Q.T)
    moments_y = Moments(count, mean_y, 99 * Q @ sigma_y.square().diag() @ Q.T)
    expected = (mean_x - mean_y).square().sum() + (sigma_x - sigma_y).square().sum()
    assert frechet_distance(moments_x, moments_y) == pytest.approx(expected.item(), rel=1e-8)
    assert frechet_distance(moments_y, moments_x) == pytest.approx(expected.item(), rel=1e-8)


@pytest.mark.parametrize(("n", "m"), [(60, 70), (10, 70), (70, 10), (10, 15), (40, 41), (2, 2)])
def test_frechet_distance_equals_the_forms_by_eigenvalues_and_by_features(n: int, m: int):
    X, Y = draw(n, d=40), draw(m, d=40, seed=1, mean=0.0)
    values, vectors = torch.linalg.eigh(X.T.cov())
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    trace = torch.linalg.eigvalsh(root @ Y.T.cov() @ root).clamp(min=0).sqrt().sum()
    expected = (X.mean(0) - Y.mean(0)).square().sum() + X.T.cov().trace() + Y.T.cov().trace() - 2 * trace
    assert frechet(X, Y) == pytest.approx(expected.item(), rel=1e-6)
    # Singular values give more digits than eigenvalues. The centered features are roots of the covariances.
    root_x, root_y = (X - X.mean(0)) / (n - 1) ** 0.5, (Y - Y.mean(0)) / (m - 1) ** 0.5
    trace = torch.linalg.svdvals(root_x @ root_y.T).sum()
    expected = (X.mean(0) - Y.mean(0)).square().sum() + root_x.square().sum() + root_y.square().sum() - 2 * trace
    assert frechet(X, Y) == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("n", [10, 200])
def test_frechet_distance_of_a_set_with_itself_is_0(n: int):
    for seed in range(8):
        X = draw(n, d=40, seed=seed)
        X[:, 3] = 0.25  # a feature that never fires
        assert 0 <= frechet(X, X) < 1e-12 * X.var(dim=0).sum()


def kid_by_torchmetrics(X: Tensor, Y: Tensor, subsets: int, subset_size: int) -> float:
    from torchmetrics.image.kid import KernelInceptionDistance

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*will save all extracted features in buffer")
        oracle = KernelInceptionDistance(feature=Features(X.shape[1]), subsets=subsets, subset_size=subset_size)
    oracle.update(Y, real=True)
    oracle.update(X, real=False)
    return oracle.compute()[0].item()


def test_kernel_distance_equals_torchmetrics():
    X, Y = draw(300, d=32, mean=0.5), draw(300, d=32, seed=1)
    expected = kid_by_torchmetrics(X, Y, subsets=1, subset_size=300)
    assert kernel_distance(X, Y).distance == pytest.approx(expected, rel=1e-9)


def test_kernel_distance_of_subsets_equals_torchmetrics():
    X, Y = draw(200, d=16, mean=0.5), draw(150, d=16, seed=1)
    torch.manual_seed(0)
    expected = kid_by_torchmetrics(X, Y, subsets=20, subset_size=50)
    torch.manual_seed(0)
    rows = [(torch.randperm(len(Y))[:50], torch.randperm(len(X))[:50]) for _ in range(20)]
    mean = sum(kernel_distance(X[rows_x], Y[rows_y]).distance for rows_y, rows_x in rows) / 20
    assert mean == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("n", "m"), [(12, 9), (4, 5)])
@pytest.mark.parametrize("shift", [0.0, 2.0])
def test_standard_error_equals_that_of_fitted_effects(n: int, m: int, shift: float):
    # k(x_i, x_j) = g_i + g_j + rest over i < j, k(x_i, y_j) = p_i + q_j + rest, by least squares.
    X, Y = draw(n, mean=shift), draw(m, seed=1, mean=0.0)

    def fit(design: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        effects = torch.linalg.lstsq(design, k[:, None], driver="gelsd").solution
        rest = (k[:, None] - design @ effects).square().sum()
        return effects[:, 0], rest / (len(k) - torch.linalg.matrix_rank(design))

    def within(x: Tensor) -> tuple[Tensor, Tensor]:
        i, j = torch.combinations(torch.arange(len(x))).unbind(dim=1)
        identity = torch.eye(len(x), dtype=x.dtype)
        return fit(identity[i] + identity[j], ((x[i] * x[j]).mean(dim=1) + 1) ** 3)

    (g_x, v_xx), (g_y, v_yy) = within(X), within(Y)
    i, j = torch.cartesian_prod(torch.arange(n), torch.arange(m)).unbind(dim=1)
    design = torch.cat([torch.eye(n, dtype=X.dtype)[i], torch.eye(m, dtype=X.dtype)[j]], dim=1)
    pq, v_xy = fit(design, ((X[i] * Y[j]).mean(dim=1) + 1) ** 3)
    v_x = (g_x - pq[:n]).var() - v_xx / (n - 2) - v_xy / m
    v_y = (g_y - pq[n:]).var() - v_yy / (m - 2) - v_xy / n
    variance = max(0.0, (4 * v_x / n + 4 * v_y / m).item())
    variance += (2 * v_xx / (n * (n - 1)) + 2 * v_yy / (m * (m - 1)) + 4 * v_xy / (n * m)).item()
    assert kernel_distance(X, Y).standard_error == pytest.approx(variance**0.5, rel=1e-9)


def unit(X: Tensor) -> Tensor:
    return X / X.norm(dim=1, keepdim=True)


def test_cmmd_equals_its_definition():
    X, Y = draw(50), draw(70, seed=1, mean=0.0)

    def mean_kernel(x: Tensor, y: Tensor) -> Tensor:
        return torch.exp(-(unit(x)[:, None] - unit(y)).square().sum(dim=2) / 200).mean()

    expected = 1000 * (mean_kernel(X, X) + mean_kernel(Y, Y) - 2 * mean_kernel(X, Y))
    assert cmmd(X, Y).distance == pytest.approx(expected.item(), rel=1e-9)
    assert cmmd(3 * X, unit(Y)) == pytest.approx(cmmd(X, Y), rel=1e-9)


@pytest.mark.slow
def test_cmmd_of_equal_distributions_is_its_bias():
    generator = torch.Generator().manual_seed(0)
    draws = [(standard_normal(40, 4, generator), standard_normal(50, 4, generator)) for _ in range(NUM_DRAWS)]
    values = torch.tensor([cmmd(X, Y).distance for X, Y in draws])
    # On the sphere E k(x, x') is 1 - E |x - x'|^2 / 200 = 1 - 1 / 100 to 1e-4.
    expected = 1000 * (1 / 100) * (1 / 40 + 1 / 50)
    assert abs(values.mean() - expected) < 4 * values.std() / NUM_DRAWS**0.5 + 0.01 * expected


@pytest.mark.slow
@pytest.mark.parametrize("distance", [kernel_distance, cmmd])
@pytest.mark.parametrize(("n", "m"), [(40, 40), (25, 60), (5, 6)])
@pytest.mark.parametrize("shift", [0.0, 0.4])
def test_standard_error_is_the_spread_over_draws(
    distance: Callable[[Tensor, Tensor], KernelDistance], n: int, m: int, shift: float
):
    generator = torch.Generator().manual_seed(0)
    values, standard_errors = torch.tensor(
        [
            distance(standard_normal(n, 4, generator) + shift, standard_normal(m, 4, generator))
            for _ in range(NUM_DRAWS)
        ],
        dtype=torch.float64,
    ).unbind(dim=1)
    assert standard_errors.min() > 0
    # The variance is unbiased but for the cutoff at 0, which matters where sets are alike or small. The jackknife is
    # 1.4 times too large there, or more.
    ratio = standard_errors.square().mean().sqrt() / values.std()
    assert 0.85 < ratio < (1.15 if shift and n > 10 else 1.45)
    assert 0.65 < standard_errors.median() / values.std() < 1.2
    if distance is kernel_distance and shift == 0:
        assert abs(values.mean()) < 3 * values.std() / NUM_DRAWS**0.5


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("mean", [0.3, 1.0, 3.0])
def test_prdc_equals_prdc(k: int, mean: float, capsys):
    from prdc import compute_prdc

    X, Y = draw(120, mean=mean, spread=0.8), draw(150, seed=1)
    expected = compute_prdc(Y.numpy(), X.numpy(), nearest_k=k)
    assert precision_recall_density_coverage(X, Y, k)._asdict() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("block_size", [7, 1024])
def test_prdc_breaks_ties_as_prdc_does(block_size: int, capsys, monkeypatch: pytest.MonkeyPatch):
    from prdc import compute_prdc

    monkeypatch.setattr(module, "BLOCK_SIZE", block_size)
    # Distances on a grid are exact, most are ties, and many rows are the same.
    generator = torch.Generator().manual_seed(0)
    X, Y = (torch.randint(0, 4, (n, 3), generator=generator).double() for n in (60, 80))
    expected = compute_prdc(Y.numpy(), X.numpy(), nearest_k=3)
    assert precision_recall_density_coverage(X, Y, 3)._asdict() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("mean", [0.3, 1e5])
@pytest.mark.parametrize("block_size", [13, 1024])
def test_prdc_of_identical_sets_is_1(mean: float, block_size: int, monkeypatch: pytest.MonkeyPatch):
    # Density is 1, too: one of each ball's k + 1 rows is exactly at its radius and so outside.
    monkeypatch.setattr(module, "BLOCK_SIZE", block_size)
    X = draw(100, mean=mean)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    for k in (1, 5):
        assert precision_recall_density_coverage(X, X[order], k) == pytest.approx((1, 1, 1, 1), rel=1e-12)


def test_prdc_of_sets_far_apart_is_0():
    assert precision_recall_density_coverage(draw(30), draw(30, mean=1e3)) == (0, 0, 0, 0)


def test_prdc_tells_fidelity_from_diversity():
    Y = draw(300)
    collapsed = precision_recall_density_coverage(draw(300, seed=1, spread=0.2), Y)
    scattered = precision_recall_density_coverage(draw(300, seed=1, spread=3), Y)
    assert collapsed.precision > 0.9 > 0.5 > collapsed.recall
    assert scattered.recall > 0.5 > scattered.precision
    assert collapsed.density > 1 > scattered.density
    assert max(collapsed.coverage, scattered.coverage) < 0.8


@pytest.mark.parametrize("name", DISTANCES)
def test_distances_are_symmetric_and_invariant_to_rotations(name: str):
    X, Y, Q = draw(50), draw(60, seed=1, mean=0.0), rotation(6)
    expected = pytest.approx(DISTANCES[name](X, Y), rel=1e-9)
    assert DISTANCES[name](Y, X) == expected
    assert DISTANCES[name](X @ Q, Y @ Q) == expected
    assert precision_recall_density_coverage(X @ Q, Y @ Q) == precision_recall_density_coverage(X, Y)


def test_frechet_distance_and_prdc_are_invariant_to_translations():
    X, Y = draw(50), draw(60, seed=1, mean=0.0)
    assert frechet(X + 1e4, Y + 1e4) == pytest.approx(frechet(X, Y))
    assert precision_recall_density_coverage(X + 1e4, Y + 1e4) == precision_recall_density_coverage(X, Y)


@pytest.mark.parametrize("name", DISTANCES)
def test_distances_rise_with_noise(name: str):
    X, Y, noise = draw(300), draw(300, seed=1), draw(300, d=6, seed=2, mean=0.0)
    distances = [DISTANCES[name](X + strength * noise.flip(1), Y) for strength in (0, 0.5, 1, 2, 4)]
    assert distances == sorted(distances)
    scores = [precision_recall_density_coverage(X + strength * noise.flip(1), Y) for strength in (0, 0.5, 1, 2, 4)]
    for column in (0, 2, 3):
        values = [score[column] for score in scores]
        assert values == sorted(values, reverse=True)


@pytest.mark.parametrize("block_size", [1, 7, 12, 24, 25])
def test_block_size_changes_only_the_rounding(block_size: int, monkeypatch: pytest.MonkeyPatch):
    X, Y = draw(24, mean=0.6), draw(36, seed=1)

    def distances() -> list[float]:
        return [frechet(X, Y), *kernel_distance(X, Y), *cmmd(X, Y), *precision_recall_density_coverage(X, Y)]

    expected = distances()
    monkeypatch.setattr(module, "BLOCK_SIZE", block_size)
    assert distances() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.int64])
def test_distances_are_computed_in_float64_for_each_type_of_features(dtype: torch.dtype):
    X, Y = (10 * draw(50, mean=0.6)).to(dtype), (10 * draw(60, seed=1)).to(dtype)
    for distance in [frechet, kernel_distance, cmmd, precision_recall_density_coverage]:
        assert distance(X, Y) == distance(X.double(), Y.double())


def test_distances_of_identical_rows_are_0():
    X = torch.ones(10, 3)
    assert frechet(X, X) == 0
    assert kernel_distance(X, X) == (0, 0)
    assert cmmd(X, X) == pytest.approx((0, 0), abs=1e-9)
    assert precision_recall_density_coverage(X, X) == (0, 0, 0, 0)  # open balls of radius 0


@pytest.mark.parametrize("distance", [kernel_distance, cmmd, precision_recall_density_coverage])
def test_distances_refuse_invalid_features_with_value_and_remedy(distance):
    X = draw(10)
    bad = X.clone()
    bad[2, 1], bad[2, 2], bad[5, 0] = torch.nan, torch.inf, -torch.inf
    with pytest.raises(UsageError, match=r"as many features, got 6 and 5: use one network"):
        distance(X, X[:, :5])
    with pytest.raises(UsageError, match=r"X must have a row for each image, got shape \(6,\): flatten"):
        distance(X[0], X)
    with pytest.raises(UsageError, match=r"Y must have a row for each image, got shape \(10, 6, 1\)"):
        distance(X, X[..., None])
    with pytest.raises(UsageError, match=r"Y must have at least [24] rows, got 1: give more images"):
        distance(X, X[:1])
    with pytest.raises(UsageError, match=r"X must be finite, got NaN or infinity in 2 of 10 rows: check"):
        distance(bad, X)


def test_each_distance_refuses_its_own_invalid_arguments():
    X = draw(10)
    with pytest.raises(UsageError, match=r"k must be in \[1, 4\], got 5: each row needs k others"):
        precision_recall_density_coverage(X, X[:5])
    with pytest.raises(UsageError, match=r"k must be in \[1, 9\], got 0"):
        precision_recall_density_coverage(X, X, k=0)
    assert precision_recall_density_coverage(X, X, k=9).coverage == 1
    with pytest.raises(UsageError, match="at least 4 rows, got 3"):
        kernel_distance(X[:3], X)
    with pytest.raises(UsageError, match="an embedding must not be zero"):
        cmmd(X, X * (torch.arange(10) > 0)[:, None])
    with pytest.raises(UsageError, match="at least 2 rows, got 1: give more images"):
        frechet_distance(Moments.of(X), Moments.of(X[:1]))
    for wrong in (lambda: Moments.of(X).merge(Moments.empty(5)), lambda: Moments.empty(5).update(X)):
        with pytest.raises(UsageError, match="as many features"):
            wrong()
    with pytest.raises(UsageError, match=r"features must have a row for each image, got shape \(6,\): flatten"):
        Moments.of(X[0])
    with pytest.raises(UsageError, match="in 1 of 10 rows"):
        Moments.empty(6).update(X.where(torch.arange(10)[:, None] != 4, torch.nan))
