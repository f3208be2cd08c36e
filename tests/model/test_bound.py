"""The variational bound: the KL of two Gaussians and the decoder of 8-bit values."""

import math

import pytest
import torch

from hf_ddpm.bound import _discretized_log_likelihood, variational_bound
from hf_ddpm.scheduler import DDPMScheduler


@pytest.mark.parametrize(("dtype", "max_value"), [(torch.float32, 255), (torch.float64, 255), (torch.float64, 65535)])
@pytest.mark.parametrize(("mean", "log_variance"), [(0.1, -3.0), (-0.97, -9.0), (2.0, 0.5)])
def test_decoder_is_a_distribution_over_all_values(dtype, max_value, mean, log_variance):
    side = math.isqrt(max_value + 1)
    x_0 = (torch.arange(max_value + 1, dtype=dtype) * 2 / max_value - 1).view(1, 1, side, side)
    means, log_variances = torch.full_like(x_0, mean), torch.full_like(x_0, log_variance)
    log_mass = _discretized_log_likelihood(x_0, means, log_variances, max_value)
    assert log_mass.double().exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_bound_has_the_bins_of_its_values():
    """Where a bin is narrow, its mass is its width times the density: 256 times less costs 8 bits more."""
    scheduler = DDPMScheduler(prediction_type="sample", clip_sample=False, beta_start=0.1, beta_end=0.2)
    x_0, t = torch.zeros(1, 1, 2, 2, dtype=torch.float64), 0
    of_8, of_16 = (variational_bound(scheduler, x_0, x_0, x_0, t, max_value).item() for max_value in (255, 65535))
    assert of_16 - of_8 == pytest.approx(8, abs=0.01)


def test_bound_is_zero_for_the_true_posterior():
    scheduler = DDPMScheduler(prediction_type="sample", clip_sample=False)
    x_0 = torch.rand(4, 1, 4, 4) * 2 - 1
    t = torch.tensor([1, 10, 500, 999])
    x_t = scheduler.add_noise(x_0, torch.randn(x_0.shape), t)
    assert variational_bound(scheduler, x_0, x_0, x_t, t).abs().max() < 1e-6


def test_bound_is_the_kl_of_two_gaussians():
    """With x_0 = x_t = 0 and x_0_hat = 1/2, q has mean 0 and p half of x_0's coefficient in Ho et al. Eq. 7."""
    scheduler = DDPMScheduler(prediction_type="sample", clip_sample=False, variance_type="fixed_large")
    t, zeros = 300, torch.zeros(1, 1, 1, 1)
    beta, alpha_bar = scheduler.beta[t].item(), scheduler.alpha_bar[t].item()
    alpha_bar_prev = scheduler.alpha_bar[t - 1].item()
    mean = 0.5 * math.sqrt(alpha_bar_prev) * beta / (1 - alpha_bar)
    variance = (1 - alpha_bar_prev) / (1 - alpha_bar) * beta
    nats = (math.log(beta / variance) - 1 + (variance + mean**2) / beta) / 2
    bound = variational_bound(scheduler, torch.full_like(zeros, 0.5), zeros, zeros, t)
    assert bound.item() == pytest.approx(nats / math.log(2), rel=1e-3)


def test_bound_is_that_of_p_which_clips_x_0_hat():
    """The variance of the hybrid loss is trained by this bound; p samples with the clipped x_0_hat."""
    x_0, noise, t = torch.rand(3, 1, 4, 4) * 2 - 1, torch.randn(3, 1, 4, 4), torch.tensor([2, 400, 999])
    x_0_hat = 3 * torch.randn(3, 1, 4, 4)
    settings = {"prediction_type": "sample", "beta_schedule": "squaredcos_cap_v2"}
    clips, free = (DDPMScheduler(**settings, clip_sample=clip) for clip in (True, False))
    x_t = clips.add_noise(x_0, noise, t)
    bound = variational_bound(clips, x_0_hat, x_0, x_t, t)
    assert torch.equal(bound, variational_bound(free, x_0_hat.clamp(-1, 1), x_0, x_t, t))
    assert (bound < variational_bound(free, x_0_hat, x_0, x_t, t)).all()
