"""L_t of the variational bound (Ho et al. 2020, Eq. 5): Gaussian KL, and the decoder of 8-bit values (Eq. 13)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_ddpm.scheduler import DDPMScheduler


def variational_bound(
    scheduler: DDPMScheduler, model_output: Tensor, x_0: Tensor, x_t: Tensor, t: int | Tensor
) -> Tensor:
    """L_t of the variational bound, Ho et al. 2020, Eq. 5; for t = 0 with the discretized decoder of Eq. 13.

    t > 0: KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)); t = 0: -log p(x_0 | x_1) of 8-bit values.

    Args:
        model_output: the network's output at x_t, (B, C, H, W), or (B, 2C, H, W) with learned variance.
        x_0: clean images, (B, C, H, W), -1 + 2k/255 for whole k.
        x_t: noisy images, (B, C, H, W).
        t: in [0, T), scalar or (B,).

    Returns: (B,), bits per dimension.
    """
    true_mean, _, true_log_variance = scheduler.posterior(x_0, x_t, t)
    mean, log_variance, _ = scheduler.reverse_distribution(model_output, x_t, t)
    kl = _gaussian_kl(true_mean, true_log_variance, mean, log_variance)
    decoder = -_discretized_log_likelihood(x_0, mean, log_variance)
    is_decoder = torch.as_tensor(t, device=x_t.device).reshape(-1) == 0
    return torch.where(is_decoder, decoder.flatten(1).mean(dim=1), kl.flatten(1).mean(dim=1)) / math.log(2)


def _gaussian_kl(mean: Tensor, log_variance: Tensor, other_mean: Tensor, other_log_variance: Tensor) -> Tensor:
    """KL(N(mean, e^log_variance) || N(other_mean, e^other_log_variance)) of each element, nats."""
    ratio = log_variance - other_log_variance
    return 0.5 * (torch.expm1(ratio) - ratio + (mean - other_mean).square() * (-other_log_variance).exp())


def _discretized_log_likelihood(x_0: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """log of the Gaussian's mass on the bin of each 8-bit value, Ho et al. 2020, Eq. 13; nats.

    Bins are 2/255 wide and open at -1 and 1. The mass is taken on the side of the mean where both CDFs are small, so
    that their difference keeps its digits, and is at least 1e-12.
    """
    centered = x_0 - mean
    inverse_std = (-log_variance / 2).exp()
    lower = torch.where(x_0 < -1 + 1 / 255, -math.inf, (centered - 1 / 255) * inverse_std)
    upper = torch.where(x_0 > 1 - 1 / 255, math.inf, (centered + 1 / 255) * inverse_std)
    flip = centered > 0
    lower, upper = torch.where(flip, -upper, lower), torch.where(flip, -lower, upper)
    mass = torch.special.ndtr(upper) - torch.special.ndtr(lower)
    return mass.clamp(min=1e-12).log()
