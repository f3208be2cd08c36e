"""The order of the images of a cache, cut into micro-batches; pixels as x_0.

stream        the N images without end, epoch after epoch: position p holds image epoch_order(seed, p // N, N)[p % N]
position      the number of images in the stream before this one
micro-batch   B consecutive positions, which one process passes through the network at once
step          A * P micro-batches, A (accumulation steps) on each of P processes: A * P * B consecutive positions
x_0           a batch of clean images, (B, C, H, W) float32 in [-1, 1]

Order, crops and flips are functions of (seed, position), so batch size, workers and processes change only how the
stream is cut.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from hf_ddpm.data.cache import ImageCache
from hf_ddpm.data.given import GivenImages
from hf_ddpm.data.planes import center_crop, random_crop
from hf_ddpm.value_range import Scale, ValueRange

_DRAWS = ("order", "flip", "crop")
_NUMBERS = {"flip": 1, "crop": 2}  # how many an image draws


def _generator(draw: str, seed: int, epoch: int) -> np.random.Generator:
    return np.random.default_rng((seed, _DRAWS.index(draw), epoch))


@lru_cache(maxsize=2)  # a step may lie in two epochs
def _order(seed: int, epoch: int, num_images: int) -> np.ndarray:
    """Return the order of an epoch in as few bytes as it takes: each process and worker holds it."""
    order = np.arange(num_images, dtype=np.min_scalar_type(num_images))
    _generator("order", seed, epoch).shuffle(order)
    return order


def _draw_epoch(draw: str, seed: int, epoch: int, offsets: range) -> np.ndarray:
    """Return what the images at some offsets in an epoch draw in [0, 1), (number of offsets, numbers of an image).

    The generator is set forward to the first of them. So a draw takes no longer, and no more memory, in a large epoch.
    """
    generator = _generator(draw, seed, epoch)
    bits: Any = generator.bit_generator
    bits.advance(offsets.start * _NUMBERS[draw])
    return generator.random((len(offsets), _NUMBERS[draw]))


def epoch_order(seed: int, epoch: int, num_images: int) -> np.ndarray:
    """Return the order of an epoch, which is a function of these arguments only.

    Args:
        seed: At least 0.
        epoch: At least 0.
        num_images: N, the number of images in an epoch.

    Returns:
        A permutation of [0, N): (N,) int64.
    """
    return _order(seed, epoch, num_images).astype(np.int64)


@dataclass(frozen=True, eq=False)
class MicroBatches(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """The micro-batches of one process for the next `num_steps` steps, for `DataLoader(..., batch_size=None)`.

    Item k belongs to step k // A, counted from the first of these steps. It is a dict of tensors:

    - `pixels` (B, C, H, W), uint8, or int32 where the images have 16 bits, or float32 where they are x_0; of arrays
      in their own type, int32 for uint16;
    - `positions` (B,) int64, positions in the stream;
    - `labels` (B,) int64, if the images have classes; numbers are (B,) float32, several columns of labels
      (B, number of columns) float32;
    - `conditions` (B, C', H, W), as `pixels`, if they have conditions, cropped and mirrored as they are;
    - `extra_images` (num_extra_images, C, H, W) and, with labels, `extra_labels` (num_extra_images,): only if
      `num_extra_images` is above 0, and only in the first item of each step.

    The extra images are those that follow the images of the step in the order of its epoch. At the end of the epoch
    they continue with its beginning, so no image is there twice. They are the same on all processes. If a step spans
    two epochs, its images of the second epoch can be among its extra images.

    Args:
        images: The images.
        seed: The seed of order, crops and flips.
        random_flip: True to mirror each image with probability 1/2, drawn anew each epoch.
        batch_size: B, the images per micro-batch.
        accumulation_steps: A, the micro-batches per step and process.
        rank: The number of this process, in [0, num_processes).
        num_processes: P.
        first_position: The number of images already seen; the stream continues after them.
        num_steps: The number of steps.
        num_extra_images: The number of extra images; together with those of a step at most N.
    """

    images: ImageCache | GivenImages
    _: KW_ONLY
    seed: int
    random_flip: bool
    batch_size: int
    accumulation_steps: int
    rank: int
    num_processes: int
    first_position: int
    num_steps: int
    num_extra_images: int = 0

    def __len__(self) -> int:
        return self.num_steps * self.accumulation_steps

    def __getitem__(self, k: int) -> dict[str, torch.Tensor]:
        if not 0 <= k < len(self):
            raise IndexError(f"micro-batch must be in [0, {len(self)}), got {k}")
        slot = k * self.num_processes + self.rank
        positions = self.first_position + slot * self.batch_size + np.arange(self.batch_size)
        pixels, labels = self._read(positions)
        batch = {"pixels": pixels, "positions": torch.from_numpy(positions)}
        if isinstance(self.images, ImageCache) and self.images.conditions is not None:
            batch["conditions"] = self._read_conditions(self.images.conditions, positions)
        if labels is not None:
            batch["labels"] = labels
        if self.num_extra_images and k % self.accumulation_steps == 0:
            batch["extra_images"], labels = self._read(self._extra_positions(k))
            if labels is not None:
                batch["extra_labels"] = labels
        return batch

    def _extra_positions(self, k: int) -> np.ndarray:
        """Return the positions that follow those of the step of item k, in a circle through its epoch."""
        num_images = len(self.images)
        step_images = self.batch_size * self.accumulation_steps * self.num_processes
        step_position = self.first_position + k * self.batch_size * self.num_processes
        epoch, offset = divmod(step_position, num_images)
        extra_offsets = (offset + step_images + np.arange(self.num_extra_images)) % num_images
        return epoch * num_images + extra_offsets

    def _read(self, positions: np.ndarray) -> tuple[torch.Tensor, torch.Tensor | None]:
        indices = self._indices_at(positions)
        if isinstance(self.images, GivenImages):
            pixels, labels = self._read_given(self.images, indices, positions)
        else:
            pixels = self._cropped(self.images, indices, positions)
            labels = None if self.images.labels is None else self.images.labels[indices]
        return self._finished(pixels, positions), None if labels is None else torch.from_numpy(labels)

    def _read_conditions(self, conditions: ImageCache, positions: np.ndarray) -> torch.Tensor:
        pixels = self._cropped(conditions, self._indices_at(positions), positions)
        return self._finished(pixels, positions)

    def _finished(self, pixels: np.ndarray, positions: np.ndarray) -> torch.Tensor:
        """Mirror the images whose position drew that, and return all as torch holds them."""
        if self.random_flip:
            is_flipped = self._draws_at("flip", positions)[:, 0] < 0.5
            pixels[is_flipped] = pixels[is_flipped, :, :, ::-1]
        return as_tensor(pixels)

    def _indices_at(self, positions: np.ndarray) -> np.ndarray:
        """Return which image stands at each position; consecutive positions lie in few epochs."""
        epochs, offsets = np.divmod(positions, len(self.images))
        indices = [
            _order(self.seed, epoch, len(self.images))[offsets[epochs == epoch]]
            for epoch in range(int(epochs[0]), int(epochs[-1]) + 1)
        ]
        return np.concatenate(indices).astype(np.int64)

    def _draws_at(self, draw: str, positions: np.ndarray) -> np.ndarray:
        """Return what each position draws in its epoch, (number of positions, numbers of an image)."""
        epochs, offsets = np.divmod(positions, len(self.images))
        ends = [*np.flatnonzero(np.diff(offsets) != 1).tolist(), len(positions) - 1]
        draws, first = [], 0
        for end in ends:
            run = range(int(offsets[first]), int(offsets[end]) + 1)
            draws.append(_draw_epoch(draw, self.seed, int(epochs[first]), run))
            first = end + 1
        return np.concatenate(draws)

    def _cropped(self, images: ImageCache, indices: np.ndarray, positions: np.ndarray) -> np.ndarray:
        shape = (images.channels, *images.size)
        if images.is_uniform:
            return np.asarray(images.pixels).reshape(-1, *shape)[indices]
        pixels = np.empty((len(indices), *shape), images.pixels.dtype)
        for target, i, (u, v) in zip(pixels, indices, self._draws_at("crop", positions), strict=True):
            target[:] = random_crop(images.image(i), images.size, u, v)
        return pixels

    def _read_given(
        self, images: GivenImages, indices: np.ndarray, positions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray | None]:
        crops, labels = [], []
        for i, (u, v) in zip(indices.tolist(), self._draws_at("crop", positions), strict=True):
            planes, label = images.read(i)
            crops.append(random_crop(planes, images.size, u, v))
            labels.append(label)
        return np.stack(crops), None if images.class_names is None else np.array(labels, np.int64)


def as_tensor(pixels: np.ndarray) -> torch.Tensor:
    """Return pixels as torch holds them: int32 in the place of uint16, with which torch does not compute."""
    return torch.from_numpy(pixels.astype(np.int32) if pixels.dtype == np.uint16 else np.ascontiguousarray(pixels))


def to_x_0(pixels: torch.Tensor, scale: Scale) -> torch.Tensor:
    """Return x_0 = pixels * (2 / max_value) - 1, float32 in [-1, 1], exact where `pixels` are 0 or `max_value`.

    Floating-point `pixels` are x_0 already.

    Args:
        pixels: The pixels of images.
        scale: `max_value`; of arrays their range, see `ValueRange.to_x_0`.
    """
    if isinstance(scale, ValueRange):
        return scale.to_x_0(pixels)
    max_value = scale
    if pixels.is_floating_point():
        return pixels.to(torch.float32)
    return pixels.to(torch.float32) * (2 / max_value) - 1


def fixed_pixels(images: ImageCache, indices: np.ndarray | None = None) -> np.ndarray:
    """Return the pixels of some images, of larger ones a crop that is always the same.

    It is the central crop. With `random_crop`, where a model learns all parts of its images, it is the crop that the
    first epoch of seed 0 takes: the crops of many images then show all parts, too.

    Args:
        images: The images.
        indices: (n,) which of the images; None for all.

    Returns:
        The pixels, (n, C, H, W), uint8 or uint16; of arrays in their own type.
    """
    shape = (images.channels, *images.size)
    if images.is_uniform:
        pixels = np.asarray(images.pixels).reshape(-1, *shape)
        return pixels if indices is None else pixels[indices]
    indices = np.arange(len(images)) if indices is None else indices
    pixels = np.empty((len(indices), *shape), images.pixels.dtype)
    places = np.empty((len(images), 2))
    places[epoch_order(0, 0, len(images))] = _draw_epoch("crop", 0, 0, range(len(images)))
    for target, i in zip(pixels, indices.tolist(), strict=True):
        planes = images.image(i)
        is_random = images.random_crop
        target[:] = random_crop(planes, images.size, *places[i]) if is_random else center_crop(planes, images.size)
    return pixels
