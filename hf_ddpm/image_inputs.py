"""The images and masks that a user gives to a pipeline, in any of the usual forms -> tensors.

image   a PIL image; an array (H, W, C), or (H, W) in gray; a tensor (C, H, W). uint8, or floating-point in [0, 1]
images  one of these, a list of them, or an array or tensor with a first axis for the images
mask    an image of one channel, or bool: white is repainted, black is kept

Nothing is resized, and nothing is lost on the way: an image that does not fit is refused with what to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

# The modes of Pillow that RGBA holds without a loss.
_EXACT_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")
# A mask is white from here on, as in diffusers.
MASK_THRESHOLD = 0.5


def images_to_tensor(images: Any, channels: int, height: int, width: int, name: str = "image") -> Tensor:
    """Return images as values in [0, 1], (B, C, H, W) float32; those of 8 bits are k / 255.

    Args:
        images: One image or several, see above.
        channels: C of the model.
        height: H of the model, in pixels.
        width: W of the model, in pixels.
        name: What messages call the images.

    Raises:
        ValueError: When an image has another size or form, does not fit into C channels without a loss, or has values
            outside of [0, 1].
    """
    tensors = [_one_to_tensor(image, channels, name) for image in _split(images, channels, height, width, name)]
    for tensor in tensors:
        if tensor.shape != (channels, height, width):
            given_height, given_width = tensor.shape[1:]
            if tensor.shape[0] != channels:
                raise ValueError(f"{name} must have the model's number of channels, {channels}, got {tensor.shape[0]}")
            raise ValueError(
                f"{name} must be {height} pixels high and {width} wide as the model's own, got {given_height} and "
                f"{given_width}: resize it first, a PIL image by image.resize(({width}, {height}))"
            )
    return torch.stack(tensors)


def masks_to_tensor(masks: Any, num_images: int, height: int, width: int) -> Tensor:
    """Return masks as bool, (B, 1, H, W), True where an image is repainted: where the mask is at least 0.5.

    Args:
        masks: One mask for all images, or one for each.
        num_images: B.
        height: H in pixels.
        width: W in pixels.

    Raises:
        ValueError: When a mask has another size or form, has no white pixel, or their number is wrong.
    """
    if _is_bool(masks):
        masks = [_as_uint8(mask) for mask in masks] if isinstance(masks, list | tuple) else _as_uint8(masks)
    tensor = images_to_tensor(masks, 1, height, width, "mask_image")
    if len(tensor) not in (1, num_images):
        raise ValueError(f"mask_image must be one mask, or one for each of {num_images} images, got {len(tensor)}")
    is_repainted = tensor >= MASK_THRESHOLD
    if not bool(is_repainted.flatten(1).any(dim=1).all()):
        raise ValueError("mask_image must have white pixels, which are repainted, got a black mask: invert it")
    return is_repainted.expand(num_images, -1, -1, -1)


def _is_bool(masks: Any) -> bool:
    first = masks[0] if isinstance(masks, list | tuple) and masks else masks
    return getattr(first, "dtype", None) in (torch.bool, np.dtype(bool))


def _as_uint8(mask: Any) -> Any:
    return mask.to(torch.uint8) * 255 if isinstance(mask, Tensor) else np.asarray(mask, dtype=np.uint8) * 255


def _split(images: Any, channels: int, height: int, width: int, name: str) -> Sequence[Any]:
    """Return the single images of one image or several."""
    if isinstance(images, Tensor | np.ndarray):
        # An array of two axes is a gray image; one of three may be several of them.
        are_gray = channels == 1 and images.ndim == 3 and tuple(images.shape[1:]) == (height, width)
        images = [*images] if images.ndim == 4 or are_gray else [images]
    elif isinstance(images, Image.Image):
        images = [images]
    if not isinstance(images, list | tuple) or not images:
        raise ValueError(
            f"{name} must be a PIL image, an array, a tensor or a list of them, got "
            f"{'an empty list' if isinstance(images, list | tuple) else type(images).__name__}"
        )
    return images


def _one_to_tensor(image: Any, channels: int, name: str) -> Tensor:
    """Return one image as (C, H, W) float32 in [0, 1]."""
    if isinstance(image, Image.Image):
        values = torch.from_numpy(_pil_to_array(image, channels, name)).permute(2, 0, 1)
    elif isinstance(image, np.ndarray) and image.ndim in (2, 3):
        values = torch.from_numpy(np.array(image if image.ndim == 3 else image[:, :, None])).permute(2, 0, 1)
    elif isinstance(image, Tensor) and image.ndim in (2, 3):
        values = (image if image.ndim == 3 else image[None]).detach().cpu()
    else:
        shape = f" of shape {tuple(image.shape)}" if isinstance(image, Tensor | np.ndarray) else ""
        raise ValueError(
            f"{name} must be PIL images, arrays (H, W, C) or tensors (C, H, W), got {type(image).__name__}{shape}"
        )
    if values.dtype == torch.uint8:
        return values.to(torch.float32) / 255
    if not values.is_floating_point():
        raise ValueError(f"{name} must be uint8, or floating-point in [0, 1], got {values.dtype}: convert it")
    if not bool(((values >= 0) & (values <= 1)).all()):  # NaN fails, too
        low, high = float(values.min()), float(values.max())
        raise ValueError(f"{name} must have values in [0, 1], got {low:g} to {high:g}: scale them")
    return values.to(torch.float32)


def _pil_to_array(image: Image.Image, channels: int, name: str) -> np.ndarray:
    """Return a PIL image as (H, W, C) uint8, if C channels hold all of it."""
    if image.mode not in _EXACT_MODES or channels not in (1, 3, 4):
        raise ValueError(
            f"{name} must be gray or RGB of 8 bits for a model of {channels} channels, got mode {image.mode!r}: "
            "convert it, or give an array of values in [0, 1]"
        )
    pixels = np.array(image.convert("RGBA"))
    if channels == 4:
        return pixels
    if (pixels[:, :, 3] < 255).any():
        raise ValueError(
            f"{name} must be opaque for a model of {channels} channels, got transparent pixels: "
            "paste it on a background"
        )
    if channels == 3:
        return pixels[:, :, :3]
    if (pixels[:, :, :1] != pixels[:, :, :3]).any():
        raise ValueError(f"{name} must be gray for a model of 1 channel, got colors: use image.convert('L')")
    return pixels[:, :, :1]
