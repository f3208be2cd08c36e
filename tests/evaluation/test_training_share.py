"""The training share tells copies from samples that are only blurred, and its p-value is that of all choices."""

from itertools import combinations

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_ddpm.evaluation.memorization import memorization, nearest_rows
from hf_ddpm.evaluation.training_share import (
    SIGNIFICANCE,
    RealImages,
    compare_samples,
    nearest_images,
    summarize,
    training_share,
)


def images(count: int, seed: int, std: float = 40.0) -> Tensor:
    noise = torch.randn(count, 1, 4, 4, generator=torch.Generator().manual_seed(seed))
    return (128 + std * noise).clamp(0, 255).round().to(torch.uint8)


def measured(samples: Tensor, training: Tensor, held_out: Tensor, is_mirrored: bool = False) -> dict[str, float]:
    real = RealImages(training, held_out, is_mirrored)
    return summarize(compare_samples(samples, real), real)


@pytest.mark.parametrize("counts", [[5, 3, 1, 0, 2, 0], [9, 0, 0, 0, 0, 0], [2, 2, 2, 2, 1, 1]])
def test_p_value_is_the_share_of_all_choices_of_held_out_images(counts):
    num_training, total = 4, len(counts)
    numbers = torch.tensor([i for i, count in enumerate(counts) for _ in range(count)])
    share, p_value = training_share(numbers, num_training, total - num_training)
    observed = sum(counts[:num_training])
    assert share == observed / len(numbers)
    sums = [sum(chosen) for chosen in combinations(counts, num_training)]
    assert p_value == pytest.approx(np.mean([s >= observed for s in sums]), abs=0.02)


def test_whole_groups_that_are_held_out_have_no_p_value():
    real = RealImages(images(30, 0), images(10, 1), is_mirrored=False, in_groups=True)
    result = summarize(compare_samples(images(20, 2), real), real)
    assert result["training_share_by_chance"] == 0.75
    assert "training_share_p_value" not in result


def test_samples_of_the_data_are_nearest_to_training_images_by_chance():
    # Another choice of held-out images each time: given one, the p-values of several samples are alike.
    results = [measured(images(300, 3 * k), images(150, 3 * k + 1), images(50, 3 * k + 2)) for k in range(8)]
    p_values = [result["training_share_p_value"] for result in results]
    assert min(p_values) > SIGNIFICANCE
    assert 0.2 < np.mean(p_values) < 0.8
    result = results[0]
    assert result["training_share_by_chance"] == 0.75
    assert result["training_share"] == pytest.approx(0.75, abs=0.1)


def test_blurred_samples_are_not_taken_for_copies():
    training, held_out, blurred = images(150, 1), images(150, 2), images(300, 3, std=5)
    # They are nearer to training images than held-out ones are, and no less near to the held-out ones.
    assert memorization(blurred, training, held_out).z > 10
    assert measured(blurred, training, held_out)["training_share_p_value"] > SIGNIFICANCE


def test_a_few_memorized_samples_are_significant():
    training, held_out = images(100, 1), images(100, 2)
    samples = torch.cat([images(200, 3), training])
    result = measured(samples, training, held_out)
    assert result["training_share_p_value"] <= SIGNIFICANCE
    assert result["copied_share"] >= 100 / 300
    assert measured(samples, held_out, training)["training_share_p_value"] > 0.5


def test_model_that_makes_one_image_is_not_significant():
    training, held_out = images(90, 1), images(10, 2)
    same = training[:1].repeat(200, 1, 1, 1)
    # Chance alone puts the one image among the training images in nine of ten cases.
    assert measured(same, training, held_out)["training_share_p_value"] == pytest.approx(0.9, abs=0.02)


def test_image_of_both_splits_counts_as_held_out():
    training, held_out = images(20, 1), images(20, 2)
    held_out[3] = training[5]
    compared = compare_samples(training[5:6], RealImages(training, held_out, is_mirrored=False))
    assert compared[0, 0] == compared[0, 2] == 0
    assert compared[0, 3] == 20 + 3


def test_mirrored_images_are_those_of_training_and_not_their_own_second():
    training, held_out = images(20, 1), images(20, 2)
    result = measured(training.flip(3), training, held_out, is_mirrored=True)
    assert result["copied_share"] == 1
    assert result["training_share"] == 1
    assert measured(training.flip(3), training, held_out)["copied_share"] < 0.2
    symmetric = torch.cat([training, training.flip(3)], dim=3)
    distances, indices = nearest_images(symmetric, symmetric, is_mirrored=True)
    assert torch.equal(indices[:, 0], torch.arange(20))
    assert (indices[:, 1] != indices[:, 0]).all()
    expected = torch.cdist(symmetric.flatten(1).double(), symmetric.flatten(1).double()) / (255 * 32**0.5)
    torch.testing.assert_close(distances[:, 1], expected.fill_diagonal_(9).min(dim=1).values)


def test_nearest_rows_are_those_of_all_distances_also_in_small_blocks(monkeypatch):
    queries, database = images(30, 1), images(50, 2)
    expected = torch.cdist(queries.flatten(1).double(), database.flatten(1).double()).sort(dim=1)
    for values in (2**24, 16 * 7):
        monkeypatch.setattr("hf_ddpm.evaluation.memorization.BLOCK_VALUES", values)
        distances, indices = nearest_rows(queries, database, 3)
        torch.testing.assert_close(distances, expected.values[:, :3])
        assert torch.equal(indices, expected.indices[:, :3])
