"""The kernel distance of pairs: the value of its definition, and the expectation of the MMD^2 whatever ties a pair."""

import pytest
import torch

from hf_ddpm.evaluation.distances import kernel_distance, paired_kernel_distance
from hf_ddpm.runtime.errors import UsageError


def kernel(x, y):
    return float((x @ y / len(x) + 1) ** 3)


def features(count, seed, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 6, generator=generator, dtype=torch.float64) + shift


def test_paired_kernel_distance_is_the_mean_over_two_different_pairs():
    x, y = features(5, 0), features(5, 1, shift=0.5)
    terms = [
        kernel(x[i], x[j]) + kernel(y[i], y[j]) - kernel(x[i], y[j]) - kernel(x[j], y[i])
        for i in range(5)
        for j in range(5)
        if i != j
    ]
    assert paired_kernel_distance(x, y) == pytest.approx(sum(terms) / 20, rel=1e-12)


def test_paired_kernel_distance_of_equal_features_is_zero():
    x = features(2000, 0).float()
    assert paired_kernel_distance(x, x) == pytest.approx(0, abs=1e-12)


@pytest.mark.slow
def test_paired_kernel_distance_has_the_mean_of_the_unpaired_one_and_less_spread():
    """The pairs are two copies of a point, of which one is moved a little."""
    paired, unpaired = [], []
    for seed in range(300):
        x = features(8, seed)
        paired.append(paired_kernel_distance(x, 1.2 * x + 0.1))
        unpaired.append(kernel_distance(x, 1.2 * features(8, 1000 + seed) + 0.1).distance)
    paired, unpaired = torch.tensor(paired), torch.tensor(unpaired)
    large = features(6000, 5000)
    expected = kernel_distance(large, 1.2 * features(6000, 5001) + 0.1).distance
    assert float(paired.mean()) == pytest.approx(expected, abs=4 * float(paired.std()) / 300**0.5)
    assert paired.std() < unpaired.std() / 2


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (features(1, 0), features(1, 1), "X must have at least 2 rows, got 1"),
        (features(3, 0), features(4, 1), "must have a row for each pair, got 3 and 4"),
    ],
)
def test_paired_kernel_distance_needs_two_pairs(x, y, message):
    with pytest.raises(UsageError, match=message):
        paired_kernel_distance(x, y)
