"""Tests of hf_ddpm.evaluation.memorization: the search, the null distributions, and copies that are found."""

import math
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
import torch
from PIL import Image

from hf_ddpm.evaluation import memorization as module
from hf_ddpm.evaluation.memorization import (
    Pair,
    _beta_binomial_tail,
    _mann_whitney_z,
    draw_pairs,
    memorization,
    nearest,
)
from hf_ddpm.runtime.errors import UsageError


def normal_rows(count, seed, dim=8):
    """Return rows of one distribution."""
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("block", [1, 7, 64, 1000])
def test_nearest_finds_the_nearest_row(monkeypatch, block):
    monkeypatch.setattr(module, "BLOCK_SIZE", block)
    queries, database = normal_rows(50, 0), normal_rows(120, 1)
    distances, indices = nearest(queries, database)
    every = (queries.double()[:, None] - database.double()).square().sum(dim=2).sqrt()
    assert torch.equal(indices, every.argmin(dim=1))
    torch.testing.assert_close(distances, every.min(dim=1).values, rtol=1e-12, atol=0)
    assert (distances.dtype, indices.dtype) == (torch.float64, torch.int64)


def test_nearest_gives_a_copy_distance_zero_for_large_values(monkeypatch):
    monkeypatch.setattr(module, "BLOCK_SIZE", 64)
    database = normal_rows(300, 0) + 1e6
    distances, indices = nearest(database[[5, 250, 17]], database)
    assert distances.tolist() == [0, 0, 0]
    assert indices.tolist() == [5, 250, 17]
    moved = database[:3].double() + torch.tensor([3e-3, 0, 0, 4e-3, 0, 0, 0, 0])
    torch.testing.assert_close(nearest(moved, database)[0], torch.full((3,), 5e-3).double(), rtol=1e-6, atol=0)


def test_nearest_separates_neighbors_that_differ_by_less_than_rounding():
    """The squared distances are 1e-6 to 1.6e-5; the squares of the rows are 8e12, with a rounding of 1e-3."""
    queries = normal_rows(50, 0).double() + 1e6
    for i, query in enumerate(queries):
        database = query + torch.tensor([[4e-3], [3e-3], [1e-3], [2e-3]], dtype=torch.float64).roll(i, 0) / math.sqrt(
            8
        )
        distances, indices = nearest(query[None], database)
        assert indices.item() == (2 + i) % 4
        assert distances.item() == pytest.approx(1e-3, rel=1e-6)


def test_nearest_takes_the_first_of_equal_rows(monkeypatch):
    database = normal_rows(40, 0)
    database[30] = database[3]
    for block in (4, 40):
        monkeypatch.setattr(module, "BLOCK_SIZE", block)
        assert nearest(database[30:31], database)[1].item() == 3


def test_nearest_reads_pixels_mapped_from_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_SIZE", 8)
    pixels = np.random.default_rng(0).integers(0, 256, (30, 3, 4, 4), dtype=np.uint8)
    pixels.tofile(tmp_path / "pixels.bin")
    mapped = np.memmap(tmp_path / "pixels.bin", dtype=np.uint8, mode="r", shape=pixels.shape)
    noisy = torch.from_numpy(pixels[[4, 2]]).int() + 1
    distances, indices = nearest(noisy, mapped)
    assert indices.tolist() == [4, 2]
    assert distances.tolist() == [pytest.approx(math.sqrt(48))] * 2


def test_nearest_of_no_queries_is_empty():
    distances, indices = nearest(normal_rows(0, 0), normal_rows(3, 1))
    assert distances.shape == indices.shape == (0,)


def test_mann_whitney_z_is_standardized_over_all_divisions():
    """Over all divisions of 8 values, some of them equal, into 3 and 5, z has exactly mean 0 and variance 1."""
    values = torch.tensor([0.0, 1, 1, 1, 2, 3, 3, 4], dtype=torch.float64)
    z = []
    for chosen in combinations(range(8), 3):
        rest = [i for i in range(8) if i not in chosen]
        z.append(_mann_whitney_z(values[list(chosen)], values[rest]))
    assert np.mean(z) == pytest.approx(0, abs=1e-12)
    assert np.var(z) == pytest.approx(1, rel=1e-12)
    assert z[0] == max(z)
    assert _mann_whitney_z(torch.ones(3), torch.ones(5)) == 0


def test_memorization_takes_equal_distances_for_no_sign_of_copies():
    result = memorization(torch.ones(30, 1), torch.zeros(1, 1), -torch.ones(99, 1))
    assert (result.near_fraction, result.near_p_value) == (0, 1)
    assert (result.z, result.z_p_value) == (0, 0.5)


@pytest.mark.parametrize(("num", "a", "b"), [(12, 1, 99), (30, 4, 7)])
def test_beta_binomial_tail_is_the_sum_of_its_terms(num, a, b):
    def beta(u, v):
        return Fraction(math.factorial(u - 1) * math.factorial(v - 1), math.factorial(u + v - 1))

    terms = [math.comb(num, x) * beta(x + a, num - x + b) / beta(a, b) for x in range(num + 1)]
    assert sum(terms) == 1
    for count in range(num + 1):
        assert _beta_binomial_tail(count, num, a, b) == pytest.approx(float(sum(terms[count:])), rel=1e-10)


@pytest.mark.slow
def test_memorization_of_a_model_that_does_not_copy_has_the_null_distribution():
    """600 models are compared with one set of training images: z ~ N(0, 1), and p-values are uniform."""
    training = normal_rows(200, 0, dim=3)
    results = []
    for seed in range(600):
        both = normal_rows(99 + 60, seed + 1, dim=3)
        results.append(memorization(both[99:], training, both[:99], quantile=0.1))
    z = np.array([result.z for result in results])
    assert abs(z.mean()) < 4 / math.sqrt(600)
    assert z.std() == pytest.approx(1, abs=4 / math.sqrt(1200))
    z_p = np.array([result.z_p_value for result in results])
    assert np.abs(np.histogram(z_p, bins=10, range=(0, 1))[0] - 60).max() < 4 * math.sqrt(54)
    # A beta-binomial distribution with 60 samples, a = 10 and b = 90.
    near = np.array([result.near_fraction for result in results]) * 60
    variance = 60 * 0.1 * 0.9 * (100 + 60) / 101
    assert results[0].expected_near_fraction == 0.1
    assert near.mean() == pytest.approx(6, abs=4 * math.sqrt(variance / 600))
    assert near.var() == pytest.approx(variance, rel=0.3)
    assert results[0].near_p_value == _beta_binomial_tail(round(near[0]), 60, 10, 90)
    near_p = np.array([result.near_p_value for result in results])
    for level in (0.01, 0.05, 0.2, 0.5):
        share, error = (near_p <= level).mean(), math.sqrt(level * (1 - level) / 600)
        # Counts are integers, so that some levels cannot be reached.
        assert level / 3 - 4 * error < share < level + 4 * error


@pytest.mark.parametrize("noise", [0, 0.05])
def test_memorization_finds_copies(noise):
    training, held_out = normal_rows(500, 0), normal_rows(200, 1)
    copied = torch.randperm(500, generator=torch.Generator().manual_seed(2))[:100]
    samples = training[copied] + noise * normal_rows(100, 3)
    result = memorization(samples, training, held_out)
    assert result.near_fraction == 1
    assert result.near_p_value < 1e-30
    assert result.z > 10
    assert result.z_p_value < 1e-20
    assert result.median_distance <= 0.2 < result.near_distance < result.median_held_out_distance
    assert (result.num_samples, result.num_held_out, result.num_training) == (100, 200, 500)
    assert len(result.pairs) == 8
    assert all(pair.training == copied[pair.sample] for pair in result.pairs)
    distances = [pair.distance for pair in result.pairs]
    assert distances == sorted(distances)
    assert distances[0] == pytest.approx(float(nearest(samples, training)[0].min()))


def test_memorization_finds_a_few_copies_among_samples_that_are_far():
    """z shows that samples are far from all images, but not that 5 % of them are copies."""
    training, held_out = normal_rows(500, 0), normal_rows(300, 1)
    samples = 1.5 * normal_rows(200, 2)
    assert memorization(samples, training, held_out).near_p_value > 0.1
    samples[::20] = training[40:50]
    result = memorization(samples, training, held_out)
    assert result.z < -3
    assert result.near_fraction >= 0.05
    assert result.near_p_value < 0.01
    assert {pair.training for pair in result.pairs} <= set(range(40, 50))


def test_memorization_finds_mirrored_copies_in_features_that_ignore_mirroring():
    rng = np.random.default_rng(0)
    training, held_out = (rng.integers(0, 256, (n, 1, 6, 6), dtype=np.uint8) for n in (300, 150))
    samples = training[:50, :, :, ::-1]

    def features(pixels):
        return torch.from_numpy(pixels.astype(np.float32) + pixels[:, :, :, ::-1])

    assert abs(memorization(samples, training, held_out).z) < 3
    result = memorization(features(samples), features(training), features(held_out))
    assert result.z > 5
    assert result.near_fraction == 1
    assert [pair.training for pair in result.pairs] == list(range(8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": normal_rows(19, 0)}, "samples must be at least 20, got 19"),
        ({"held_out": normal_rows(0, 0)}, "held_out must be at least 99 images for a quantile of 0.01, got 0"),
        ({"held_out": normal_rows(98, 0)}, "held_out must be at least 99 images .* got 98"),
        ({"held_out": normal_rows(19, 0), "quantile": 0.5}, "held_out must be at least 20 images .* got 19"),
        ({"quantile": 0.0}, r"quantile must be in \(0, 1\), got 0.0"),
        ({"held_out": normal_rows(200, 1)}, "got 200 of 200 that are training images: remove them"),
        ({"training": normal_rows(200, 1, dim=7)}, r"got \(20, 8\) against \(200, 7\): take pixels of one size"),
        ({"training": normal_rows(0, 1)}, r"compared with some, .* against \(0, 8\)"),
        ({"samples": normal_rows(20, 0) / 0}, "finite values"),
        ({"training": torch.full((4, 8), math.nan)}, "finite values"),
    ],
)
def test_memorization_refuses_invalid_images_and_settings(change, message):
    arguments = {"samples": normal_rows(20, 0), "training": normal_rows(200, 1), "held_out": normal_rows(99, 2)}
    with pytest.raises(UsageError, match=message):
        memorization(**{**arguments, **change})


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_draw_pairs_shows_the_difference(tmp_path, channels):
    images = np.random.default_rng(0).integers(1, 256, (6, channels, 8, 8), dtype=np.uint8)
    pairs = [Pair(0, 0, 0.0), Pair(5, 2, 12.3456)]
    draw_pairs(images, torch.from_numpy(images), pairs, tmp_path / "pairs.png")
    with Image.open(tmp_path / "pairs.png") as picture:
        assert picture.mode == "RGB"
        pixels = np.asarray(picture)
    # The first difference is completely black: 64 rows of 64 pixels.
    black = (pixels == 0).all(axis=2)
    assert black.sum(axis=1).max() >= 64
    assert (black.sum(axis=1) >= 64).sum() == 64
