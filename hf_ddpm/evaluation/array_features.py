"""The features of arrays by networks for photographs, which see the channels that pictures show."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_ddpm.evaluation.features import FeatureNetwork
from hf_ddpm.value_range import ValueRange, pictured, require_seen


@dataclass(frozen=True, eq=False)
class ArrayFeatureNetwork(FeatureNetwork):
    """A feature network that takes arrays in the units of the data.

    Args:
        value_range: The values of the arrays, and the channels that the network sees.
    """

    value_range: ValueRange

    def __call__(self, images: Tensor) -> Tensor:
        """Return the features of arrays, (B, d) float32 on the CPU.

        Args:
            images: (B, C, H, W) in the units of the data.
        """
        return super().__call__(as_seen(images, self.value_range))


def as_seen(images: Tensor, value_range: ValueRange) -> Tensor:
    """Return what a network for photographs sees of arrays: (B, c, H, W) uint8 with c = 1 or 3."""
    return pictured((value_range.to_unit_interval(images) * 255).round().to(torch.uint8), value_range)


def for_arrays(network: FeatureNetwork, value_range: ValueRange, num_channels: int) -> ArrayFeatureNetwork:
    """Return a feature network that takes arrays, and says in its identity what it sees of them.

    Raises:
        UsageError: When there are other channels than it takes, and nobody has chosen some.
    """
    require_seen(value_range, num_channels)
    channels = value_range.display_channels or tuple(range(num_channels))
    identity = {
        **network.identity,
        "channels": [*channels],
        "values": [value_range.low, value_range.high, value_range.dtype],
    }
    parts = {name: getattr(network, name) for name in ("name", "dimensions", "device", "compute")}
    return ArrayFeatureNetwork(identity=identity, value_range=value_range, **parts)
