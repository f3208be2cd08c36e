"""ConditionalDDPMPipeline: noise and an image -> an image, for networks that take the image beside x_t.

    c        the condition, (B, C', H, W) in [-1, 1]: an image of the data, or x_0 in a low resolution, enlarged
    input    (x_t, c), along the channels; the network predicts what it predicts without c, (B, C or 2C, H, W)

The network stands in the folder `conditional_unet`, where stock's pipelines do not look: they would sample it from
noise in place of c. `UNet2DModel.from_pretrained(model, subfolder="conditional_unet")` loads it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from hf_ddpm.condition import CONDITIONAL_NETWORK, Condition, read_condition, write_condition
from hf_ddpm.image_inputs import images_to_tensor
from hf_ddpm.image_size import Size
from hf_ddpm.pipeline import Conditions, DDPMPipeline, DDPMPipelineOutput, _folder_of
from hf_ddpm.scheduler import LEARNED_VARIANCES
from hf_ddpm.value_range import Scale, ValueRange


class ConditionalDDPMPipeline(DDPMPipeline):
    """A network and a scheduler that together generate images from images.

    Args:
        conditional_unet: A network whose input has more channels than its images: those of the condition come last.
        scheduler: As of `DDPMPipeline`.

    Attributes:
        condition: What the model makes images from, as it was trained.
    """

    model_cpu_offload_seq = CONDITIONAL_NETWORK
    network_component = CONDITIONAL_NETWORK

    def __init__(self, conditional_unet: Any, scheduler: Any):
        super().__init__(conditional_unet, scheduler)
        config = conditional_unet.config
        outputs = 2 if scheduler.config.get("variance_type") in LEARNED_VARIANCES else 1
        channels = config.in_channels - config.out_channels // outputs
        if channels < 1:
            raise ValueError(
                "conditional_unet must take more channels than an image has, got "
                f"{config.in_channels} in and {config.out_channels} out: DDPMPipeline samples it"
            )
        self.condition = Condition(channels)
        self._condition_images: Tensor | None = None

    @property
    def unet(self) -> Any:
        """The network, by the name that `DDPMPipeline` gives it."""
        return self.conditional_unet

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Load a pipeline as `DDPMPipeline` does, with what `save_config` keeps beside its weights."""
        pipeline: Any = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        condition = read_condition(_folder_of(pipeline.unet))
        if condition is not None:
            if condition.channels != pipeline.condition.channels:
                raise ValueError(
                    f"condition.json must be of the model's network, got {condition.channels} channels for "
                    f"{pipeline.condition.channels}: save or download the model again"
                )
            pipeline.condition = condition
        return pipeline

    def save_config(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Save the config as `DDPMPipeline` does, and what the model makes images from."""
        super().save_config(save_directory, push_to_hub, **kwargs)
        write_condition(Path(save_directory), self.condition)

    @property
    def condition_values(self) -> ValueRange | None:
        """The values of conditions that are arrays, of a low resolution those of the model; None for images."""
        return self.value_range if self.condition.super_resolution else self.condition.value_range

    @torch.no_grad()
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, image: Any = None, **arguments: Any
    ) -> DDPMPipelineOutput | tuple:
        """Sample an image from each image.

        Args:
            image: One image or several, in any form of `hf_ddpm.image_inputs`, with the size of the model's images, or
                that of `height` and `width`.
                For super-resolution it may have its own low resolution, and is then enlarged as in training. Arrays
                are shares of their range, as `condition_values.to_unit_interval` returns them.
            arguments: Those of `DDPMPipeline`, but `batch_size`, which is the number of images.

        Returns:
            As of `DDPMPipeline`: image i is made from image i.

        Raises:
            ValueError: When an image cannot be taken, or another argument cannot work.
        """
        if image is None:
            raise ValueError("image must be given: the model makes images from images")
        if "batch_size" in arguments:
            raise ValueError("batch_size must be left out: there is a sample for each image")
        size = self._requested_size(arguments.get("height"), arguments.get("width"))
        self._condition_images = 2 * self.to_conditions(image, size) - 1
        try:
            return super().__call__(batch_size=len(self._condition_images), **arguments)
        finally:
            self._condition_images = None

    def to_conditions(self, image: Any, size: Size | None = None) -> Tensor:
        """Return images as conditions of the model, (B, C', H, W) in [0, 1], those of a low resolution enlarged.

        Args:
            image: One image or several, as of a call.
            size: (H, W); None: that of the model's images.

        Raises:
            ValueError: When an image has another size or form.
        """
        channels, (_, height, width) = self.condition.channels, self._image_shape(size)
        factor = self.condition.super_resolution
        if factor is None and channels == 1:
            image = [_of_16_bits(each) for each in image] if isinstance(image, list | tuple) else _of_16_bits(image)
        if factor is None or not _is_low(image, height // factor):
            return images_to_tensor(image, channels, height, width)
        return enlarged(images_to_tensor(image, channels, height // factor, width // factor), height, width)

    def _image_shape(self, size: Size | None = None) -> tuple[int, int, int]:
        channels, height, width = super()._image_shape(size)
        return channels - self.condition.channels, height, width

    def _conditions(self, *arguments: Any, **keywords: Any) -> Conditions:
        if self._condition_images is None:
            raise ValueError("the model makes images from images, which only a call of its pipeline takes: image=")
        conditions = super()._conditions(*arguments, **keywords)
        return replace(conditions, images=self._condition_images.to(self._execution_device))


def _of_16_bits(image: Any) -> Any:
    """Return a gray picture of 16 bits as an array in [0, 1], as training takes it; all else as it is."""
    if isinstance(image, Image.Image) and image.mode.startswith("I;16"):
        return np.asarray(image).astype(np.float32) / 65535
    return image


def _is_low(image: Any, height: int) -> bool:
    """Return whether an image, or the first of several, has this height."""
    first = image[0] if isinstance(image, list | tuple) and image else image
    if isinstance(first, Image.Image):
        return first.height == height
    if not isinstance(first, Tensor | np.ndarray) or first.ndim < 2:
        return False
    has_channels_last = isinstance(first, np.ndarray) and first.ndim > 2 and first.shape[-1] in (1, 3, 4)
    return first.shape[-3 if has_channels_last else -2] == height


def low_resolution(pixels: Tensor, factor: int, scale: Scale) -> Tensor:
    """Return images in a lower resolution, as a file would hold them.

    They are made smaller by cubic interpolation with an antialiasing filter, as Saharia et al. 2021, Sec. 4, and
    Pillow's BICUBIC do, and rounded to whole values; of arrays, which are clipped to their range, to their type.

    Args:
        pixels: Images, (B, C, H, W) in [0, max_value], or arrays in the units of the data.
        factor: What divides height and width.
        scale: The largest value of a pixel, or the range of arrays.

    Returns:
        (B, C, H / factor, W / factor) float32, values that a file can hold, in [0, max_value] or the range.
    """
    size = (pixels.shape[2] // factor, pixels.shape[3] // factor)
    if not isinstance(scale, ValueRange):
        return _bicubic(pixels.float(), size).round().clamp(0, scale)
    small = _bicubic(pixels.float().clamp(scale.low, scale.high), size)
    small = small.round() if scale.is_integer else small
    small = small.clamp(scale.low, scale.high)
    return small if scale.is_integer else small.to(getattr(torch, scale.dtype)).float()


def enlarged(images: Tensor, height: int, width: int, max_value: float = 1.0) -> Tensor:
    """Return images in a higher resolution, by cubic interpolation as Pillow's BICUBIC.

    Args:
        images: (B, C, h, w) float32 in [0, max_value].
        height: H.
        width: W.
        max_value: The largest value of a pixel.

    Returns:
        (B, C, H, W) float32 in [0, max_value].
    """
    return _bicubic(images, (height, width)).clamp(0, max_value)


def _bicubic(images: Tensor, size: tuple[int, int]) -> Tensor:
    # Not every torch has the filter on MPS.
    where = torch.device("cpu") if images.device.type == "mps" else images.device
    # Without antialiasing torch takes another cubic kernel, with a = -0.75 in the place of Pillow's -0.5.
    resized = interpolate(images.to(where), size, mode="bicubic", antialias=True, align_corners=False)
    return resized.to(images.device)


@dataclass(frozen=True)
class Conditioned:
    """A network of x_t and t that gives a condition to another network beside x_t.

    Args:
        network: The other network, called as `network(input, t)` with input (B, C + C', H, W), and keyword arguments.
        condition: c, (B, C', H, W) in [-1, 1].
    """

    network: Callable[..., Any]
    condition: Tensor

    def __call__(self, x_t: Tensor, t: Tensor, **keywords: Any) -> Any:
        """Return what the other network puts out."""
        return self.network(torch.cat([x_t, self.condition], dim=1), t, **keywords)
