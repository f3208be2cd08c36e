"""Averaged weights, their length counted in images (Ho et al. 2020, App. B, "EMA on model parameters").

    average <- decay average + (1 - decay) weights        after each step of G images (G the global batch)
    decay = min(2^(-G / halflife_images), 1 - (1 + k / inv_gamma)^(-power))        before step k = 0, 1, ...

The second bound grows from 0, so that the initial weights leave no trace; it is diffusers' `EMAModel` ramp.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import nn


def halflife_from_decay(decay: float, global_batch_size: int) -> float:
    """Images after which a weight counts half, if each step of `global_batch_size` images multiplies it by `decay`."""
    return global_batch_size * math.log(0.5) / math.log(decay)


def ema_decay(
    images_seen: int, global_batch_size: int, halflife_images: float, inv_gamma: float = 1.0, power: float = 3 / 4
) -> float:
    """The decay of the step that starts after `images_seen` images, in [0, 1)."""
    ramp = 1 - (1 + images_seen / global_batch_size / inv_gamma) ** -power
    return min(0.5 ** (global_batch_size / halflife_images), ramp)


class EMA:
    """A copy of a module whose parameters are running averages; buffers are copied as they are.

    Attributes:
        module: the averaged module, in eval mode, without gradients; save or sample it as any other.
    """

    def __init__(self, module: nn.Module):
        self.module = copy.deepcopy(module).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, module: nn.Module, decay: float) -> None:
        """average <- decay average + (1 - decay) weights; `module` has the parameters of the one copied."""
        torch._foreach_lerp_(list(self.module.parameters()), [p.detach() for p in module.parameters()], 1 - decay)
        for averaged, current in zip(self.module.buffers(), module.buffers(), strict=True):
            averaged.copy_(current)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.module.state_dict()

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.module.load_state_dict(state)
