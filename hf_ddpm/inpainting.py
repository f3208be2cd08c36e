"""The filling of the unknown pixels of an image: the methods, and the noise levels of RePaint.

known          pixels of x_0 that are given and stay; a measurement without noise, see `measurements`
method         what x_0_hat = E[x_0 | x_t], which the network predicts, becomes in each step

replace        x_0_hat is y where pixels are known (Song et al. 2021, arXiv 2011.13456, Sec. 5). The unknown
           pixels see the known ones through the network alone.
posterior      x_0_hat is E[x_0 | x_t, y] for a normal distribution with mean and covariance of p(x_0 | x_t): moment
           matching (Rozet et al. 2024, arXiv 2405.13712), with few steps of conjugate gradients
repaint        as `replace`, but noisier states are visited again and again (Lugmayr et al. 2022, arXiv 2201.09865)
"""

from __future__ import annotations

METHODS = ("posterior", "replace", "repaint")


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
