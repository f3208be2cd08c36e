"""The averaged weights, whose length is counted in images (Ho et al. 2020, App. B, "EMA on model parameters").

    average <- decay average + (1 - decay) weights        after each step of G images (G the global batch)
    decay = 2^(-G / length)

The length is `halflife_images`, the images after which a weight counts half, and shorter at the start of a run, so
that the initial weights leave no trace: `ramped_decay` as in diffusers' `EMAModel`, or `edm_decay`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def halflife_from_decay(decay: float, global_batch_size: int) -> float:
    """Return the images after which a weight counts half.

    Args:
        decay: The factor by which each step multiplies it, in (0, 1).
        global_batch_size: The images of a step.
    """
    return global_batch_size * math.log(0.5) / math.log(decay)


def ramped_decay(
    images_seen: int,
    global_batch_size: int,
    halflife_images: float,
    inv_gamma: float = 1.0,
    power: float = 3 / 4,
    ramp_batch_size: int | None = None,
) -> float:
    """Return the decay of a step under diffusers' ramp, in [0, 1).

        min(2^(-G / halflife), (1 - (1 + k / inv_gamma)^(-power))^(G / R)),  k = images_seen / R

    Args:
        images_seen: The images seen before the step.
        global_batch_size: G, the images of the step.
        ramp_batch_size: R, the images per step of the ramp, which counts steps in diffusers; None: G.
    """
    ramp_batch_size = ramp_batch_size or global_batch_size
    ramp = 1 - (1 + images_seen / ramp_batch_size / inv_gamma) ** -power
    return min(0.5 ** (global_batch_size / halflife_images), ramp ** (global_batch_size / ramp_batch_size))


def edm_decay(images_seen: int, global_batch_size: int, halflife_images: float, rampup_ratio: float) -> float:
    """Return the decay of a step under EDM's ramp, 2^(-G / min(halflife, rampup_ratio images_seen)), in [0, 1).

    It is that of the code published with Karras et al. 2022; 0 before the first image.
    """
    length = min(halflife_images, rampup_ratio * images_seen)
    return 0.5 ** (global_batch_size / length) if length > 0 else 0.0


class EMA:
    """The running averages of the same parameters, of several lengths.

    Attributes:
        averages: The name of each average -> one float32 tensor per parameter, or per shard of this process.
    """

    def __init__(self, parameters: Sequence[Tensor], names: Sequence[str]):
        self.averages = {name: [p.detach().float().clone() for p in parameters] for name in names}

    @torch.no_grad()
    def update(self, parameters: Sequence[Tensor], decays: Mapping[str, float]) -> None:
        """Update each average: average <- decay average + (1 - decay) parameters.

        Args:
            decays: The decay of each average, by its name.
        """
        current = [local(p).float() for p in parameters]
        for name, average in self.averages.items():
            torch._foreach_lerp_([local(a) for a in average], current, 1 - decays[name])


@contextmanager
def swap_in(parameters: Sequence[Tensor], average: Sequence[Tensor]) -> Iterator[None]:
    """Swap the averaged weights into the parameters for the duration of a `with` block."""
    own_values = [p.detach().clone() for p in parameters]
    assign(parameters, average)
    try:
        yield
    finally:
        assign(parameters, own_values)


@torch.no_grad()
def assign(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy the values into the parameters, in place."""
    for parameter, value in zip(parameters, values, strict=True):
        local(parameter).copy_(local(value))


def local(tensor: Tensor) -> Tensor:
    """Return the shard of a tensor that this process holds, sharing its memory; an unsharded tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # pyright: ignore[reportAttributeAccessIssue]


def full(tensor: Any) -> Tensor:
    """Return a tensor whole, gathered from all processes if it is sharded; all of them call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def sharded_like(target: Any, value: Tensor) -> Tensor:
    """Return `value`, which is whole, on the device of `target`, and sharded if `target` is."""
    if not hasattr(target, "full_tensor"):
        return value.to(target.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(target.device), target.device_mesh, target.placements)


def gathered(targets: Sequence[Any], shards: Tensor) -> Tensor:
    """Return N tensors whole, of which this process has the shards; all processes call it.

    Args:
        targets: N parameters of one shape, sharded as the tensors are, or not.
        shards: (N, ...), one of each.
    """
    if not hasattr(targets[0], "full_tensor"):
        return shards
    from torch.distributed.tensor import DTensor

    def gather(target: Any, shard: Tensor) -> Tensor:
        layout = {"shape": target.shape, "stride": target.stride(), "run_check": False}
        return DTensor.from_local(shard, target.device_mesh, target.placements, **layout).full_tensor()

    return torch.stack([gather(*pair) for pair in zip(targets, shards, strict=True)])


def scattered(targets: Sequence[Any], values: Tensor) -> Tensor:
    """Return this process's shards of N whole tensors, (N, ...), as `gathered` takes them."""
    if not hasattr(targets[0], "full_tensor"):
        return values
    return torch.stack([local(sharded_like(*pair)) for pair in zip(targets, values, strict=True)])
