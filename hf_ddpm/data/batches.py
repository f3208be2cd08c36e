"""The order of the stream of images, cut into micro-batches; pixels as x_0."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from functools import lru_cache

import numpy as np
import torch

from hf_ddpm.data.cache import ImageCache


@lru_cache(maxsize=6)  # order, flips and crops of two epochs
def _draw(what: str, seed: int, epoch: int, num_images: int) -> np.ndarray:
    rng = np.random.default_rng((seed, ("order", "flip", "crop").index(what), epoch))
    return rng.permutation(num_images) if what == "order" else rng.random((num_images, 2 if what == "crop" else 1))


def epoch_order(seed: int, epoch: int, num_images: int) -> np.ndarray:
    """The order of an epoch, a function of these arguments only.

    Args:
        seed: at least 0.
        epoch: at least 0.
    Returns:
        A permutation of [0, num_images): (num_images,) int64.
    """
    return _draw("order", seed, epoch, num_images).copy()


@dataclass(frozen=True, eq=False)
class MicroBatches(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """The micro-batches of one process for the next `num_steps` steps, for `DataLoader(..., batch_size=None)`.

    Item k belongs to step k // A, counted from the first of them, and holds `pixels` (B, C, R, R), uint8, or int32 of
    16-bit images; `positions` (B,) int64 in the stream of images; `labels` (B,) int64, if the images have labels; and
    in the first of a step, if asked for, `others` (num_others, C, R, R) and `other_labels`: the images that follow
    those of the step in its epoch, whose end its beginning follows, so that none is there twice; an image of a step
    that spans two epochs can be among them. Crops and flips are functions of (seed, position), so batch size, workers
    and processes change only how the stream is cut up.

    Args:
        random_flip: mirror each image with probability 1/2, drawn anew each epoch.
        batch_size: B, images per micro-batch.
        accumulation_steps: A, micro-batches per step and process.
        rank: this process, in [0, num_processes).
        first_position: images already seen; the stream continues after them.
        num_steps: steps until it ends.
        num_others: 0 for none; with the images of a step at most those of an epoch.
    """

    images: ImageCache
    _: KW_ONLY
    seed: int
    random_flip: bool
    batch_size: int
    accumulation_steps: int
    rank: int
    num_processes: int
    first_position: int
    num_steps: int
    num_others: int = 0

    def __len__(self) -> int:
        return self.num_steps * self.accumulation_steps

    def __getitem__(self, k: int) -> dict[str, torch.Tensor]:
        if not 0 <= k < len(self):
            raise IndexError(f"micro-batch must be in [0, {len(self)}), got {k}")
        slot = k * self.num_processes + self.rank
        positions = self.first_position + slot * self.batch_size + np.arange(self.batch_size)
        pixels, labels = self._read(positions)
        batch = {"pixels": pixels, "positions": torch.from_numpy(positions)}
        if labels is not None:
            batch["labels"] = labels
        if self.num_others and k % self.accumulation_steps == 0:
            step_images = self.batch_size * self.accumulation_steps * self.num_processes
            epoch, place = divmod(self.first_position + k * self.batch_size * self.num_processes, len(self.images))
            places = (place + step_images + np.arange(self.num_others)) % len(self.images)
            batch["others"], labels = self._read(epoch * len(self.images) + places)
            if labels is not None:
                batch["other_labels"] = labels
        return batch

    def _read(self, positions: np.ndarray) -> tuple[torch.Tensor, torch.Tensor | None]:
        ids = self._drawn("order", positions)
        pixels = self._crop(ids, positions)
        if self.random_flip:
            flipped = self._drawn("flip", positions)[:, 0] < 0.5
            pixels[flipped] = pixels[flipped, :, :, ::-1]
        if pixels.dtype == np.uint16:
            pixels = pixels.astype(np.int32)
        labels = None if self.images.labels is None else torch.from_numpy(self.images.labels[ids])
        return torch.from_numpy(pixels), labels

    def _drawn(self, what: str, positions: np.ndarray) -> np.ndarray:
        epochs, places = np.divmod(positions, len(self.images))
        present = range(int(epochs[0]), int(epochs[-1]) + 1)
        draws = [_draw(what, self.seed, epoch, len(self.images))[places[epochs == epoch]] for epoch in present]
        return np.concatenate(draws)

    def _crop(self, ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
        size, channels = self.images.resolution, self.images.channels
        if self.images.is_uniform:
            return np.asarray(self.images.pixels).reshape(-1, channels, size, size)[ids]
        pixels = np.empty((len(ids), channels, size, size), self.images.pixels.dtype)
        for target, i, (u, v) in zip(pixels, ids, self._drawn("crop", positions), strict=True):
            image = self.images.image(i)
            top, left = int(u * (image.shape[1] - size + 1)), int(v * (image.shape[2] - size + 1))
            target[:] = image[:, top : top + size, left : left + size]
        return pixels


def to_x_0(pixels: torch.Tensor, max_value: int) -> torch.Tensor:
    """x_0 = pixels * (2 / max_value) - 1: float32 in [-1, 1], exact at 0 and at `max_value`, where `pixels` are."""
    return pixels.to(torch.float32) * (2 / max_value) - 1


def center_pixels(images: ImageCache, indices: np.ndarray | None = None) -> np.ndarray:
    """(n, C, R, R): the chosen images or all, the middle of oblong ones."""
    size = images.resolution
    if images.is_uniform:
        every = np.asarray(images.pixels).reshape(-1, images.channels, size, size)
        return every if indices is None else every[indices]
    indices = np.arange(len(images)) if indices is None else indices
    pixels = np.empty((len(indices), images.channels, size, size), images.pixels.dtype)
    for target, i in zip(pixels, indices.tolist(), strict=True):
        image = images.image(i)
        top, left = (image.shape[1] - size) // 2, (image.shape[2] - size) // 2
        target[:] = image[:, top : top + size, left : left + size]
    return pixels
