"""A small network that is called as Inception's published file is."""

from __future__ import annotations

from pathlib import Path

import torch


class CallOfInception(torch.nn.Module):
    """A convolution of 8 channels, whose means are the features."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3)

    def forward(self, img: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        x = self.conv(img.to(torch.float32) / 128 - 1).relu().mean(dim=[2, 3])
        return x if return_features else x.softmax(dim=1)


def save_inception(path: Path) -> Path:
    """Write the network, whose weights are the same each time, as TorchScript."""
    torch.manual_seed(0)
    torch.jit.script(CallOfInception()).save(str(path))
    return path
