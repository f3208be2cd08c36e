"""Many images, each from its seed.

On one kind of device an image is a function of its seed alone; where that is not a CPU, of the batch size, too.

The last bits of an image depend on how many images a forward pass has, because PyTorch and diffusers choose algorithms
by it. `iter_samples` therefore gives every forward pass the same number of images and fills the last one up. On a CPU
that number is FORWARD_BATCH. Which images are in a forward pass then changes no bit of any of them, so that processes
can share them in any way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from hf_ddpm.classes import Classes
from hf_ddpm.figures import grid, strip, with_row_titles
from hf_ddpm.guidance import Guidance
from hf_ddpm.image_size import Size
from hf_ddpm.labels import Labels
from hf_ddpm.pipeline import DDPMPipeline
from hf_ddpm.runtime.processes import Processes
from hf_ddpm.value_range import ValueRange

# From 16 images on, PyTorch chooses a CPU's 1x1 convolution without regard to the number of threads, which differs
# between one process and several; from 64 images on, diffusers lays out what it enlarges in another way.
FORWARD_BATCH = 16
MOST_NOISES = 4  # in a row of a strip, which has several images of each


def labels_in_turn(labels: Labels | None, numbers: Iterable[int]) -> list[Any] | None:
    """Return a label for each image, by its number: classes or quantiles in turn. None for a model without labels."""
    if labels is None:
        return None
    shown = labels.in_turn
    return [shown[number % len(shown)] for number in numbers]


def grid_by_label(num_images: int, labels: Labels | None) -> tuple[int, int | None]:
    """Return the number of images of a grid, and of its columns where each of its rows shows one label.

    There are at least two columns, and the last one is filled up.

    Args:
        num_images: The number of images that are asked for.
        labels: The labels of the images, which come in turn. None, or more than images: the rows show no labels.
    """
    if labels is None or len(labels.in_turn) > num_images:
        return num_images, None
    columns = max(2, -(-num_images // len(labels.in_turn)))
    return columns * len(labels.in_turn), columns


def by_label(images: Sequence[Any], columns: int | None) -> Sequence[Any]:
    """Return images whose labels come in turn in the order of a grid of so many columns, a row for each label."""
    if columns is None:
        return images
    num_rows = len(images) // columns
    return [images[column * num_rows + row] for row in range(num_rows) for column in range(columns)]


def sheet_by_label(images: Sequence[Image.Image], columns: int | None, labels: Labels | None) -> Image.Image:
    """Return a grid of images whose labels come in turn, a row for each label; numbers stand beside their rows.

    Args:
        images: The images.
        columns: The columns of the grid; None: the rows show no labels.
        labels: The labels of the images.
    """
    sheet = grid(by_label(images, columns), columns)
    if columns is None or labels is None or isinstance(labels, Classes):
        return sheet
    return with_row_titles(sheet, labels.titles)


def strip_by_label(shown: Mapping[str, Sequence[Image.Image]], columns: int, labels: Labels) -> Image.Image:
    """Return a strip with a row for each label, in which images of one noise stand side by side.

    Args:
        shown: Lists of as many images, whose labels come in turn, by the title of their columns.
        columns: The images of each label in each of these lists; the first MOST_NOISES are shown.
        labels: The labels of the images.
    """
    of_noises, count = by_label([*zip(*shown.values(), strict=True)], columns), min(columns, MOST_NOISES)
    rows = [of_noises[start : start + count] for start in range(0, len(of_noises), columns)]
    return strip([[image for images in row for image in images] for row in rows], [*shown] * count, labels.titles)


def iter_samples(
    pipeline: DDPMPipeline,
    seeds: Sequence[int],
    *,
    batch_size: int,
    num_inference_steps: int | None = None,
    class_labels: Sequence[Any] | None = None,
    deterministic: bool = False,
    value_range: Sequence[float] | ValueRange | None = None,
    guidance: Guidance | None = None,
    conditions: Tensor | None = None,
    size: Size | None = None,
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield one image per seed, a batch at a time, in order: the batch's seeds, and (B, C, H, W) on the CPU.

    Args:
        seeds: The seeds of the images' generators.
        batch_size: Images per forward pass; on a CPU there are always FORWARD_BATCH.
        num_inference_steps: A number in [1, T]. None: T.
        class_labels: One for each seed, if the model has labels.
        deterministic: Whether to iterate the mean of each reverse step, without noise; for `ddpm` only.
        value_range: The values in [0, 65535] that -1 and 1 stand for; the images are then uint16. The values of a
            model of arrays: the images are then in its type. None: they are uint8, and the values are 0 and 255.
        guidance: How predictions are guided; None: they are not.
        conditions: See `sample_all`.
        size: (H, W); None: that of the model's images.

    Raises:
        ValueError: When an argument cannot work, or an image is not finite.
    """
    steps = num_inference_steps
    batches = _sample(pipeline, seeds, batch_size, steps, class_labels, deterministic, guidance, conditions, size)
    for batch_seeds, images in batches:
        is_finite = images.isfinite().flatten(1).all(dim=1)
        if not bool(is_finite.all()):
            seed = batch_seeds[int(is_finite.int().argmin())]
            raise ValueError(f"samples must be finite, got NaN for seed {seed}: the weights are damaged or overflow")
        if isinstance(value_range, ValueRange):
            yield batch_seeds, torch.from_numpy(value_range.to_units(images))
        elif value_range is None:
            yield batch_seeds, (images * 255).round().to(torch.uint8)
        else:
            low, high = value_range
            values = (images.double() * (high - low) + low).round()
            yield batch_seeds, values.clamp(0, 65535).to(torch.uint16)


def sample_all(
    pipeline: DDPMPipeline,
    seeds: Sequence[int],
    processes: Processes,
    *,
    batch_size: int,
    num_inference_steps: int | None = None,
    class_labels: Sequence[Any] | None = None,
    conditions: Tensor | None = None,
) -> Tensor:
    """Sample one image per seed; the processes share the seeds, and each of them gets all images.

    Each process makes as many forward passes as any other, so that their network may be one that is divided among
    them. What is not finite in an image becomes black: a model in training may give such images.

    Args:
        seeds: The seeds of the images' generators; at least one.
        batch_size: Images per forward pass; on a CPU there are always FORWARD_BATCH.
        num_inference_steps: A number in [1, T]. None: T.
        class_labels: One for each seed, if the model has labels.
        conditions: One for each seed, (N, C', H, W) in [0, 1], if the model makes images from images.

    Returns:
        The images in the order of the seeds, (N, C, H, W) uint8 on the CPU.

    Raises:
        ValueError: When an argument cannot work.
    """
    share = processes.split_evenly(len(seeds))
    labels = None if class_labels is None else [class_labels[i] for i in share]
    own = None if conditions is None else conditions[[*share]]
    batches = _sample(pipeline, [seeds[i] for i in share], batch_size, num_inference_steps, labels, conditions=own)
    images = torch.cat([images for _, images in batches]).nan_to_num(0)
    return processes.gather_rows((images * 255).round().to(torch.uint8), len(seeds))


def _sample(
    pipeline: DDPMPipeline,
    seeds: Sequence[int],
    batch_size: int,
    num_inference_steps: int | None,
    class_labels: Sequence[Any] | None,
    deterministic: bool = False,
    guidance: Guidance | None = None,
    conditions: Tensor | None = None,
    size: Size | None = None,
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield the seeds of each batch and its images in [0, 1], on the CPU."""
    count = forward_batch_of(pipeline.device, batch_size)
    height, width = size or (None, None)
    for first in range(0, len(seeds), count):
        batch_seeds = [*seeds[first : first + count]]
        # The last batch is made as large as the others by repeating its last image.
        filled = [min(i, len(seeds) - 1) for i in range(first, first + count)]
        # A model that makes images from images takes these in the place of their number.
        number: dict[str, Any] = {"batch_size": count} if conditions is None else {"image": conditions[filled]}
        (images,) = pipeline(
            **number,
            generator=seeded_generators([seeds[i] for i in filled], pipeline.device),
            num_inference_steps=num_inference_steps,
            output_type="pt",
            class_labels=None if class_labels is None else [class_labels[i] for i in filled],
            deterministic=deterministic,
            guidance=guidance,
            height=height,
            width=width,
            return_dict=False,
        )
        yield batch_seeds, images[: len(batch_seeds)].cpu()


def forward_batch_of(device: torch.device, batch_size: int) -> int:
    """Return the number of images in each forward pass of `iter_samples`.

    Raises:
        ValueError: When `batch_size` is less than 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    return FORWARD_BATCH if device.type == "cpu" else batch_size


def seeded_generators(seeds: Sequence[int], device: torch.device) -> list[torch.Generator]:
    """Return one generator for each image, on its device; on the CPU for MPS, where noise is not reproducible."""
    noise_device = torch.device("cpu") if device.type == "mps" else device
    return [torch.Generator(noise_device).manual_seed(seed) for seed in seeds]


def shared_batches(processes: Processes, count: int, forward_batch: int) -> list[range]:
    """Return the numbers of the images in each forward pass of this process, of `count` images."""
    share = processes.split(-(-count // forward_batch))
    return [range(k * forward_batch, min((k + 1) * forward_batch, count)) for k in share]
