"""LPIPS: how far two images are from each other in the features of a network (Zhang et al. 2018, arXiv 1801.03924).

It is computed by the package `lpips` of its authors, with AlexNet. Neither the package nor the weights of AlexNet,
which torchvision keeps in torch's cache, are downloaded: who wants LPIPS brings both.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from hf_ddpm.runtime.errors import UsageError, in_one_line

ALEXNET = "alexnet-owt-7be5be79.pth"
MIN_SIZE = 31  # pixels; of fewer, a layer of AlexNet leaves nothing

Perceptual = Callable[[Tensor, Tensor], Tensor]


def load_lpips(channels: int, height: int, width: int, device: torch.device) -> Perceptual:
    """Load LPIPS for images of this form, without a download.

    Returns:
        A function of two batches of images, (B, C, H, W) in [0, 1], that gives the distance of each pair, (B,) on the
        CPU; less is better.

    Raises:
        UsageError: When the package or the weights are missing or damaged, or AlexNet cannot take such images.
    """
    if channels not in (1, 3) or min(height, width) < MIN_SIZE:
        raise UsageError(
            f"lpips needs images of 1 or 3 channels and {MIN_SIZE} pixels or more, got {channels} channels and "
            f"{height} x {width}: leave it out of metrics"
        )
    if find_spec("lpips") is None:
        raise UsageError("lpips needs a package that is not installed: pip install lpips, or leave it out of metrics")
    weights = Path(torch.hub.get_dir(), "checkpoints", ALEXNET)
    if not weights.is_file():
        raise UsageError(
            f"lpips needs the weights of AlexNet, got none at {str(weights)!r}: put torchvision's there, or leave it "
            "out of metrics"
        )
    try:
        from lpips import LPIPS  # pyright: ignore[reportMissingImports]

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # it asks torchvision for weights in an older way
            network = LPIPS(net="alex", verbose=False).eval().to(device)
    except Exception as error:  # torchvision raises nearly any class where it was built for another torch
        reason = in_one_line(error, with_type=True)
        raise UsageError(f"lpips cannot be loaded: {reason}; repair it, or leave it out of metrics") from error

    @torch.no_grad()
    def distances(images: Tensor, truth: Tensor) -> Tensor:
        x, y = (2 * each.float().to(device).expand(-1, 3, -1, -1) - 1 for each in (images, truth))
        return network(x, y).flatten().double().cpu()

    return distances
