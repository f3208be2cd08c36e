"""Averaged weights against the recursion written out."""

import pytest
import torch

from hf_ddpm.training.averages import EMA, edm_decay, halflife_from_decay, ramped_decay, swap_in


def test_halflife_from_decay_inverts_the_decay():
    halflife = halflife_from_decay(0.9999, 128)
    assert 0.9999 ** (halflife / 128) == pytest.approx(0.5)
    late = 10**12
    assert ramped_decay(late, 128, halflife) == pytest.approx(0.9999)
    # The same length in images with another batch: two steps of 64 make one of 128.
    assert ramped_decay(late, 64, halflife) ** 2 == pytest.approx(0.9999)


def test_ramped_averages_forget_the_initial_weights():
    assert ramped_decay(0, 128, 1e6) == 0
    assert ramped_decay(128 * 15, 128, 1e6, inv_gamma=1, power=0.75) == pytest.approx(1 - 16**-0.75)


def test_ramped_decay_counts_images_not_steps():
    """Two steps of 64 are one of 128, if the ramp counts steps of 128."""
    whole = ramped_decay(12_800, 128, 1e6)
    half = ramped_decay(12_800, 64, 1e6, ramp_batch_size=128)
    assert half**2 == pytest.approx(whole)


def test_edm_decay_limits_the_length_to_a_part_of_the_images_seen():
    assert edm_decay(0, 128, 5e5, 0.05) == 0
    assert edm_decay(10**5, 128, 5e5, 0.05) ** (5000 / 128) == pytest.approx(0.5)
    assert edm_decay(10**9, 128, 5e5, 0.05) ** (5e5 / 128) == pytest.approx(0.5)


def test_ema_update_is_the_recursion():
    parameters = [torch.randn(2, 3), torch.randn(3)]
    ema = EMA(parameters, ["short", "long"])
    expected = {name: [p.clone() for p in parameters] for name in ema.averages}
    for step in range(5):
        for p in parameters:
            p += torch.randn(p.shape)
        decays = {"short": 0.1 * step, "long": 0.9 + 0.01 * step}
        ema.update(parameters, decays)
        for name, decay in decays.items():
            expected[name] = [decay * e + (1 - decay) * p for e, p in zip(expected[name], parameters, strict=True)]
            for average, e in zip(ema.averages[name], expected[name], strict=True):
                torch.testing.assert_close(average, e)


def test_ema_keeps_float32_averages_of_any_weights():
    parameters = [torch.ones(2, dtype=torch.bfloat16)]
    ema = EMA(parameters, ["a"])
    ema.update([torch.full((2,), 2, dtype=torch.bfloat16)], {"a": 0.999})
    assert ema.averages["a"][0].tolist() == pytest.approx([1.001, 1.001], abs=1e-6)


def test_swapped_restores_the_weights():
    parameter, average = torch.nn.Parameter(torch.zeros(2)), torch.ones(2)
    with swap_in([parameter], [average]):
        assert parameter.tolist() == [1, 1]
    assert parameter.tolist() == [0, 0]
    assert average.tolist() == [1, 1]
