"""Augmentation that does not leak (Karras et al. 2022, arXiv 2206.00364, App. F.2).

The network learns transformed images, and is told the transformation of each by nine parameters, all of them 0 for the
image as it is. When it samples it is told nothing, which is the same as nine zeros, so that its samples are images as
they are. Each row below is applied with probability p, the rows in their order:

    scale, all sides alike     by 2^(0.2 a), a ~ N(0, 1)                            a
    stretch along an axis      by 2^(0.2 b), b ~ N(0, 1), and by 2^(-0.2 b) across  b cos(2 phi), b sin(2 phi)
    rotation                   by theta ~ U(-pi, pi)                                cos(theta) - 1, sin(theta)
    flip, one for each axis    c ~ U{0, 1}                                          c
    translation                by whole pixels, near W d / 8 and H e / 8            8 / W and 8 / H of them

The last column are the parameters; phi ~ U(0, pi) is the direction of the axis, d and e ~ N(0, 1). The paper gives
b cos(phi) and b sin(phi), which are the same for a stretch (b, phi) and the opposite one (-b, phi + pi). Those of
twice the angle are not. Pixels beyond the border are the image's reflection. The first three rows are resampled at
once, by cubic interpolation; flips and translations copy pixels.

A `TimestepEmbedding` of diffusers has a place for a condition, which a `UNet2DModel` never fills: a linear map without
bias, whose output is added to the sines and cosines of t. It is there during training alone. The network that is saved
has none, and is stock's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import grid_sample

from hf_ddpm.runtime.seeds import AUGMENT, random_words

NUM_PARAMETERS = 9
WEIGHT = "time_embedding.cond_proj.weight"  # the name of the map's weight in the network
_LOG_SCALE = 0.2 * math.log(2)
_TRANSLATION = 1 / 8  # the standard deviation, as a fraction of the side


def draw_transformations(seed: int, positions: Tensor, probability: float, height: int, width: int) -> Tensor:
    """Draw the parameters of each image's transformation, as a function of the seed and its position.

    Args:
        seed: The seed of the run.
        positions: Where each image is in the endless stream, (B,) integers.
        probability: p, in [0, 1).
        height: H, in pixels.
        width: W, in pixels.

    Returns:
        (B, NUM_PARAMETERS) float32 on the CPU: c of left and right, c of top and bottom, a, both of b, both of theta,
        the translations to the right and down.
    """
    words = torch.stack(random_words(seed, AUGMENT, positions, 4, "cpu"), dim=2).flatten(1)
    uniform = (words.double() + 0.5) * 2.0**-32
    is_applied = (uniform[:, :6] < probability).double()
    flip_x, flip_y = (uniform[:, 6:8] < 0.5).double().unbind(dim=1)
    twice_phi, theta = 2 * math.pi * uniform[:, 8], 2 * math.pi * (uniform[:, 9] - 0.5)
    a, b, d, e = torch.special.ndtri(uniform[:, 10:14]).unbind(dim=1)
    right, down = ((z * _TRANSLATION * side).round() / (_TRANSLATION * side) for z, side in ((d, width), (e, height)))
    columns = (flip_x, flip_y, a, b * twice_phi.cos(), b * twice_phi.sin(), theta.cos() - 1, theta.sin(), right, down)
    row_of_column = torch.tensor([0, 1, 2, 3, 3, 4, 4, 5, 5])
    return (torch.stack(columns, dim=1) * is_applied[:, row_of_column]).float()


def transform(x_0: Tensor, parameters: Tensor) -> Tensor:
    """Transform each image by its parameters; where these are 0 it stays the same to the last bit.

    Args:
        x_0: (B, C, H, W) float32 in [-1, 1].
        parameters: (B, NUM_PARAMETERS), as `draw_transformations` returns them, on the CPU.

    Returns:
        (B, C, H, W) float32 in [-1, 1], on the device of `x_0`.
    """
    resampled = parameters[:, 2:7].any(dim=1).nonzero()[:, 0]
    if len(resampled):
        rows = resampled.to(x_0.device)
        grid = _source_grid(parameters[resampled], x_0.shape[2], x_0.shape[3]).to(x_0.device)
        images = grid_sample(x_0[rows], grid, mode="bicubic", padding_mode="reflection", align_corners=False)
        x_0 = x_0.index_copy(0, rows, images.clamp(-1, 1))
    columns = _source_indices(parameters[:, 0], parameters[:, 7], x_0.shape[3]).to(x_0.device)
    rows = _source_indices(parameters[:, 1], parameters[:, 8], x_0.shape[2]).to(x_0.device)
    batch, channel = (torch.arange(count, device=x_0.device) for count in x_0.shape[:2])
    return x_0[batch[:, None, None, None], channel[:, None, None], rows[:, None, :, None], columns[:, None, None, :]]


def _source_indices(is_flipped: Tensor, translation: Tensor, side: int) -> Tensor:
    """Return where each pixel of a side comes from, (B, side) int64."""
    shift = (translation * _TRANSLATION * side).round().long()
    # The image and its reflection, one after the other without end.
    source = (torch.arange(side) - shift[:, None]) % (2 * side)
    source = torch.minimum(source, 2 * side - 1 - source)
    return torch.where(is_flipped[:, None] > 0, side - 1 - source, source)


def _source_grid(parameters: Tensor, height: int, width: int) -> Tensor:
    """Return where each pixel comes from before flips and translation, (B, H, W, 2) as `grid_sample` takes it.

    A point goes to R S (2^(0.2 a) point), so it comes from 2^(-0.2 a) S^-1 R^T point. With k = 0.2 b log 2::

        S^-1 = cosh(k) I - sinh(k) [[cos(2 phi), sin(2 phi)], [sin(2 phi), -cos(2 phi)]]
    """
    a, b_cos, b_sin, cos_minus_1, sin = parameters[:, 2:7].double().unbind(dim=1)
    b, cos = torch.hypot(b_cos, b_sin), cos_minus_1 + 1
    k = _LOG_SCALE * b
    sinh = torch.where(b > 0, k.sinh() / b.clamp(min=1e-12), 0.0)
    stretch = torch.stack([k.cosh() - sinh * b_cos, -sinh * b_sin, -sinh * b_sin, k.cosh() + sinh * b_cos], dim=1)
    rotation = torch.stack([cos, sin, -sin, cos], dim=1)
    inverse = (-_LOG_SCALE * a).exp()[:, None, None] * (stretch.view(-1, 2, 2) @ rotation.view(-1, 2, 2))
    x, y = torch.arange(width) - (width - 1) / 2, torch.arange(height) - (height - 1) / 2
    points = torch.stack([x.expand(height, -1), y[:, None].expand(-1, width)], dim=2).double()
    # Rows of points times the transpose, in units of half a side.
    sources = points.view(1, -1, 2) @ inverse.mT * (2 / torch.tensor([width, height]).double())
    return sources.view(-1, height, width, 2).float()


def attach_map(unet: Any) -> None:
    """Give a network the map of parameters, with zeros for weights: it then predicts what it did.

    Args:
        unet: A `UNet2DModel`.
    """
    embedding = unet.time_embedding
    width = embedding.linear_1.in_features
    embedding.cond_proj = nn.Linear(NUM_PARAMETERS, width, bias=False, device=unet.device, dtype=unet.dtype)
    nn.init.zeros_(embedding.cond_proj.weight)
    embedding.augmentation = None
    embedding.register_forward_pre_hook(_add_condition, with_kwargs=True)


def _add_condition(embedding: Any, inputs: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Give a `TimestepEmbedding` the parameters that its network was told, if any."""
    condition = embedding.augmentation
    return inputs, options if condition is None else {**options, "condition": condition}


@contextmanager
def told_parameters(unet: Any, parameters: Tensor | None) -> Iterator[None]:
    """Tell a network with a map the parameters of its images for the duration of a `with` block; None: nothing."""
    if parameters is None:
        yield
        return
    unet.time_embedding.augmentation = parameters
    try:
        yield
    finally:
        unet.time_embedding.augmentation = None


def without_map(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a network, by their names, without those of the map."""
    return {name: tensor for name, tensor in weights.items() if name != WEIGHT}
