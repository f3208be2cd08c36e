"""Averaged weights against the recursion written out."""

import pytest
import torch

from hf_ddpm.ema import EMA, ema_decay, halflife_from_decay


def test_halflife_is_the_decays():
    halflife = halflife_from_decay(0.9999, 128)
    assert 0.9999 ** (halflife / 128) == pytest.approx(0.5)
    late = 10**12
    assert ema_decay(late, 128, halflife) == pytest.approx(0.9999)
    # The same length in images with another batch: two steps of 64 make one of 128.
    assert ema_decay(late, 64, halflife) ** 2 == pytest.approx(0.9999)


def test_initial_weights_leave_no_trace():
    assert ema_decay(0, 128, 1e6) == 0
    assert ema_decay(128 * 15, 128, 1e6, inv_gamma=1, power=0.75) == pytest.approx(1 - 16**-0.75)


def test_average_is_the_recursion():
    module = torch.nn.Linear(3, 2)
    ema, expected = EMA(module), module.weight.detach().clone()
    for step in range(5):
        with torch.no_grad():
            module.weight += torch.randn(2, 3)
        decay = 0.1 * (step + 1)
        ema.update(module, decay)
        expected = decay * expected + (1 - decay) * module.weight.detach()
        torch.testing.assert_close(ema.module.weight.detach(), expected)
    assert not ema.module.weight.requires_grad
    assert not ema.module.training


def test_buffers_are_copied():
    module = torch.nn.BatchNorm1d(2)
    ema = EMA(module)
    module(torch.randn(8, 2))
    ema.update(module, 0.9)
    assert torch.equal(ema.module.running_mean, module.running_mean)
    assert ema.module.num_batches_tracked == 1
