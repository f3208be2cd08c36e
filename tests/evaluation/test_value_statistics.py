"""Moments and spectra of values: analytic cases."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_ddpm.data.images import load_images
from hf_ddpm.evaluation.value_reference import require_enough_images
from hf_ddpm.evaluation.value_statistics import (
    describe_spectra,
    joined,
    num_components,
    scales_of,
    spectrum_rows,
    value_distance,
    value_statistics,
)
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.value_range import ValueRange
from tests.support.image_data import cache_config, save_grays

RANGE = ValueRange(-4, 4, "float32")


def noise(count: int, channels: int = 2, size: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(seed))


def test_wave_has_all_its_power_at_its_wave_number() -> None:
    x = np.arange(16) / 16
    image = torch.from_numpy(3 + 2 * np.cos(2 * math.pi * 5 * x)[None] * np.ones((16, 1)))
    statistics = value_statistics(image[None, None])
    assert statistics.means.item() == pytest.approx(3)
    assert statistics.covariances.item() == pytest.approx(2**2 / 2)
    # |F|^2 / (H W) of each of the two modes is (amplitude / 2)^2 H W; the bin holds the mean over its modes.
    radius = np.hypot(np.fft.fftfreq(16)[:, None] * 16, np.fft.fftfreq(16)[None] * 16)
    num_modes = ((radius >= 4.5) & (radius < 5.5)).sum()
    wanted = np.zeros(8)
    wanted[4] = 2 * (2 / 2) ** 2 * 16 * 16 / num_modes
    assert statistics.spectra[0, 0].numpy() == pytest.approx(wanted, abs=1e-9)


def test_white_noise_has_its_variance_as_power_at_every_wave_number() -> None:
    rows = spectrum_rows(value_statistics(noise(400)))
    for power, error in zip(rows["spectrum"], rows["spectrum_standard_error"], strict=True):
        assert (np.abs(np.array(power) - 1) < 5 * np.array(error)).all()
    assert np.array(rows["variance"]) == pytest.approx(np.ones(2), abs=0.05)


def test_moments_are_those_of_numpy() -> None:
    images = noise(3, channels=3)
    statistics = value_statistics(images)
    for values, mean, covariance in zip(images.numpy(), statistics.means, statistics.covariances, strict=True):
        flat = values.reshape(3, -1).astype(np.float64)
        assert mean.numpy() == pytest.approx(flat.mean(axis=1))
        assert covariance.numpy() == pytest.approx(np.cov(flat, bias=True))


def test_batches_change_nothing_and_vectors_have_the_stated_length() -> None:
    images = noise(6)
    whole, parts = value_statistics(images), joined([value_statistics(part) for part in images.split(4)])
    assert all(torch.allclose(a, b) for a, b in zip(whole, parts, strict=True))
    assert whole.vectors(RANGE).shape == (6, num_components(2, 8, 8))


def test_distance_is_that_of_a_shift_in_units_of_the_scale() -> None:
    statistics = value_statistics(noise(200))
    vectors = statistics.vectors(RANGE)
    scale = scales_of(statistics, vectors)
    shift = torch.linspace(0, 1, len(scale)).double()
    assert value_distance(vectors, vectors, scale) == pytest.approx(0, abs=1e-6)
    assert value_distance(vectors + shift * scale, vectors, scale) == pytest.approx(float(shift @ shift), rel=1e-4)


def test_images_without_any_variation_have_a_distance_that_is_finite() -> None:
    flat = torch.zeros(40, 1, 4, 4) + torch.arange(40)[:, None, None, None] / 40
    statistics, other = value_statistics(noise(40, 1, 4)), value_statistics(flat)
    vectors = statistics.vectors(RANGE)
    assert math.isfinite(value_distance(other.vectors(RANGE), vectors, scales_of(statistics, vectors)))


def test_channel_that_is_constant_does_not_hide_the_others() -> None:
    padded = [torch.cat([noise(20, 1, seed=seed), torch.full((20, 1, 8, 8), 3.0)], dim=1) for seed in range(3)]
    padded[2][:, :1] += 1
    statistics = [value_statistics(each) for each in padded]
    vectors = [each.vectors(RANGE) for each in statistics]
    scale = scales_of(statistics[0], vectors[0])
    assert (scale > 0).all()
    near, far = (value_distance(each, vectors[0], scale) for each in vectors[1:])
    assert math.isfinite(near)
    assert far > 2 * near


def test_smoother_samples_are_told_by_their_spectrum() -> None:
    images = noise(50, 1)
    smooth = (images + images.roll(1, dims=3)) / 2
    text = describe_spectra(
        {"samples": spectrum_rows(value_statistics(smooth)), "images": spectrum_rows(value_statistics(images))}
    )
    assert "k = 4 of channel 0: -" in text


@pytest.mark.parametrize("random_crop", [False, True])
def test_too_few_images_of_random_crops_are_to_be_cut_into_tiles(tmp_path: Path, random_crop: bool) -> None:
    save_grays(tmp_path / "photos", 2, size=16)
    images = load_images(cache_config(tmp_path / "photos", resolution=8, random_crop=random_crop))
    with pytest.raises(UsageError, match="the split must be at least 7 for values, got 2") as raised:
        require_enough_images("the split", len(images), images.channels, images.size, images.random_crop)
    assert ("cut it into tiles" in str(raised.value)) == random_crop
