"""L_t of the variational bound (Ho et al. 2020, Eq. 5), in bits per dimension.

t > 0    KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), of two Gaussians
t = 0    -log p(x_0 | x_1), by the discretized decoder of Eq. 13: the mass of p on the bin of each value of a pixel
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_ddpm.scheduler import DDPMScheduler


def variational_bound(
    scheduler: DDPMScheduler, model_output: Tensor, x_0: Tensor, x_t: Tensor, t: int | Tensor, max_value: int = 255
) -> Tensor:
    """Return L_t of the variational bound, Ho et al. 2020, Eq. 5.

    Args:
        scheduler: The scheduler whose p is measured.
        model_output: The network's output at x_t, (B, C, H, W), or (B, 2C, H, W) with a learned variance.
        x_0: Clean images, (B, C, H, W), each value -1 + 2k/max_value with an integer k in [0, max_value].
        x_t: Noisy images, (B, C, H, W).
        t: Timesteps in [0, T), a scalar or (B,).
        max_value: The largest value of a pixel: 255, or 65535 for 16-bit images.

    Returns:
        L_t of each image, (B,), bits per dimension.
    """
    true_mean, _, true_log_variance = scheduler.posterior(x_0, x_t, t)
    mean, log_variance, _ = scheduler.reverse_distribution(model_output, x_t, t)
    kl = _gaussian_kl(true_mean, true_log_variance, mean, log_variance)
    decoder = -_discretized_log_likelihood(x_0, mean, log_variance, max_value)
    is_decoder = torch.as_tensor(t, device=x_t.device).reshape(-1) == 0
    return torch.where(is_decoder, decoder.flatten(1).mean(dim=1), kl.flatten(1).mean(dim=1)) / math.log(2)


def _gaussian_kl(mean: Tensor, log_variance: Tensor, other_mean: Tensor, other_log_variance: Tensor) -> Tensor:
    """Return KL(N(mean, e^log_variance) || N(other_mean, e^other_log_variance)) of each element, nats."""
    ratio = log_variance - other_log_variance
    return 0.5 * (torch.expm1(ratio) - ratio + (mean - other_mean).square() * (-other_log_variance).exp())


def _discretized_log_likelihood(x_0: Tensor, mean: Tensor, log_variance: Tensor, max_value: int) -> Tensor:
    """Return the logarithm of a Gaussian's mass on the bin of each value, Ho et al. 2020, Eq. 13; nats.

    Bins are 2/max_value wide; those of -1 and 1 reach to infinity. The mass is a difference of two values of the
    normal distribution function. On the side of the mean where both are small the difference keeps its digits, and by
    symmetry it is always taken there. It is at least 1e-12.
    """
    centered = x_0 - mean
    inverse_std = (-log_variance / 2).exp()
    half = 1 / max_value
    lower = torch.where(x_0 < -1 + half, -math.inf, (centered - half) * inverse_std)
    upper = torch.where(x_0 > 1 - half, math.inf, (centered + half) * inverse_std)
    flip = centered > 0
    lower, upper = torch.where(flip, -upper, lower), torch.where(flip, -lower, upper)
    mass = torch.special.ndtr(upper) - torch.special.ndtr(lower)
    return mass.clamp(min=1e-12).log()
