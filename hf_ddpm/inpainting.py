"""What fills the unknown pixels of an image: formulas on tensors, without a network of its own.

known          pixels of x_0 that are given and stay, y = H x_0
x_0_hat        E[x_0 | x_t], what the network predicts; its Jacobian times (1 - alpha_bar_t) / sqrt(alpha_bar_t)
           is Cov[x_0 | x_t] (Meng et al. 2021, arXiv 2111.04726)
method         what each evaluation of the network becomes

replace        x_0_hat is y where pixels are known (Song et al. 2021, arXiv 2011.13456, Sec. 5). The unknown
           pixels see the known ones through the network alone.
posterior      x_0_hat is E[x_0 | x_t, y] for a normal distribution with mean and covariance of p(x_0 | x_t): moment
           matching (Rozet et al. 2024, arXiv 2405.13712), with few steps of conjugate gradients
repaint        as `replace`, but noisier states are visited again and again (Lugmayr et al. 2022, arXiv 2201.09865)
"""

from __future__ import annotations

import torch
from torch import Tensor

METHODS = ("posterior", "replace", "repaint")


def posterior_mean(x_0_hat: Tensor, x_t: Tensor, x_0: Tensor, is_known: Tensor, num_gradients: int) -> Tensor:
    """Return E[x_0 | x_t, y], where p(x_0 | x_t) is taken for a normal distribution; Rozet et al. 2024, Sec. 4.

    ::

        x_0_hat + C H^T (H C H^T)^{-1} (y - H x_0_hat),    C ~ d x_0_hat / d x_t

    A constant factor of C drops out. Conjugate gradients solve the system in as many iterations as there are
    gradients; with none, the known pixels alone are replaced. An image whose C is not positive, as that of a network
    that is wrong at this x_t may be, keeps what it has.

    Args:
        x_0_hat: (B, C, H, W), computed from `x_t` with autograd's graph if there are gradients.
        x_t: (B, C, H, W), a leaf of that graph.
        x_0: The known pixels, (B, C, H, W); the others do not count.
        is_known: (B, 1, H, W) bool.
        num_gradients: The number of iterations, each with one gradient through the network.

    Returns:
        The mean, (B, C, H, W), in which the known pixels are those of x_0.
    """
    mean = x_0_hat.detach()
    residual = torch.where(is_known, x_0 - mean, 0)
    direction, power = residual, _dot(residual, residual)
    for i in range(num_gradients):
        (moved,) = torch.autograd.grad(x_0_hat, x_t, direction, retain_graph=i + 1 < num_gradients)
        curvature = _dot(direction, torch.where(is_known, moved, 0))
        length = torch.where(curvature > 0, power / curvature, 0)
        mean = mean + length * moved
        residual = residual - length * torch.where(is_known, moved, 0)
        previous_power, power = power, _dot(residual, residual)
        direction = residual + torch.where(previous_power > 0, power / previous_power, 0) * direction
    return torch.where(is_known, x_0, mean)


def repaint_levels(num_steps: int, jump_length: int, jump_n_sample: int) -> list[int]:
    """Return the noise levels that RePaint visits one after the other; Lugmayr et al. 2022, Sec. 4.2 and Fig. 9.

    Level i is that of timestep i of the list, so that 0 is the noisiest and `num_steps` the clean image. A step to the
    next higher number denoises, and one to the next lower number adds noise.

    Args:
        num_steps: n, the number of timesteps.
        jump_length: j, the levels that a jump goes back.
        jump_n_sample: r, how often each part is denoised.

    Returns:
        The levels from 0 to n.
    """
    jumps = {num_steps - 1 - t: jump_n_sample - 1 for t in range(0, num_steps - jump_length, jump_length)}
    levels = [0]
    while levels[-1] < num_steps:
        level = levels[-1]
        if jumps.get(level, 0) > 0:
            jumps[level] -= 1
            levels += range(level - 1, level - 1 - jump_length, -1)
        levels.append(levels[-1] + 1)
    return levels


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner product of each image of `a` with that of `b`, (B, 1, 1, 1)."""
    return (a * b).sum(dim=(1, 2, 3), keepdim=True)
