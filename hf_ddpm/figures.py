"""The pictures of images: contact sheets, and the Markov chains as strips and animations.

    image          a PIL image with 8 bits per channel: mode L (C = 1), RGB (C = 3) or RGBA (C = 4)
    forward chain  x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) eps_t, an image dissolving; Ho et al. 2020, Eq. 2
    reverse chain  x_{t-1} ~ p(x_{t-1} | x_t), an image emerging

Small images are enlarged by whole factors without interpolation, so that a picture shows the model's own pixels.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

if TYPE_CHECKING:
    from hf_ddpm.pipeline import TrajectoryStep
    from hf_ddpm.scheduler import DDPMScheduler

Images: TypeAlias = Sequence[Image.Image]

NUM_STRIP_COLUMNS = 11
MIN_SIDE = 64  # pixels; smaller images are enlarged
GRID_PADDING, STRIP_PADDING = 2, 6  # pixels
STRIP_FONT_SIZE = 14  # pixels
SIDE_BY_SIDE_ROWS = 8  # from so many on, they stand in two halves
FRAME_MS, LAST_FRAME_MS = 60, 1500  # browsers slow down what is faster than 20 ms

_PIL_CHANNELS = (1, 3, 4)
_WHITE = {"L": 255, "RGB": (255, 255, 255), "RGBA": (255, 255, 255, 255)}
_INK = (40, 40, 40)


def to_pil(images: Tensor | np.ndarray) -> list[Image.Image]:
    """Return images as PIL images: uint8 values as they are, others as round(255 clamp(value, 0, 1)).

    Args:
        images: (N, C, H, W) with C 1, 3 or 4; uint8, or of a floating type in [0, 1]. NaN becomes 0.

    Returns:
        N images of mode L, RGB or RGBA.

    Raises:
        ValueError: When the shape or the type is another.
    """
    pixels = torch.from_numpy(np.array(images)) if isinstance(images, np.ndarray) else images.detach()
    if pixels.ndim != 4 or pixels.shape[1] not in _PIL_CHANNELS:
        raise ValueError(f"images must be (N, C, H, W) with C in {[*_PIL_CHANNELS]}, got shape {tuple(pixels.shape)}")
    if pixels.is_floating_point():
        values = pixels.to(torch.promote_types(pixels.dtype, torch.float32))
        pixels = (values.nan_to_num(nan=0).clamp(0, 1) * 255).round().to(torch.uint8)
    if pixels.dtype != torch.uint8:
        raise ValueError(f"images must be uint8 or floating-point, got {pixels.dtype}: convert them")
    array = pixels.permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image) for image in array]


def png_bytes(image: Image.Image) -> bytes:
    """Return the content of a PNG file of the image."""
    content = io.BytesIO()
    image.save(content, "png")
    return content.getvalue()


def grid(images: Images, columns: int | None = None) -> Image.Image:
    """Return a contact sheet: image i stands in row i // columns and column i % columns.

    Args:
        images: At least one; all of one size and one mode, which the sheet keeps.
        columns: Default: the smallest number for which there are no more rows than columns.

    Raises:
        ValueError: When there are no images, they differ, their mode is not L, RGB or RGBA, or `columns` is below 1.
    """
    _check_alike(images)
    columns = math.ceil(math.sqrt(len(images))) if columns is None else columns
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}")
    tiles = [_enlarge(image) for image in images]
    width, height = (side + GRID_PADDING for side in tiles[0].size)
    num_rows = -(-len(tiles) // columns)
    mode = tiles[0].mode
    sheet = Image.new(mode, (columns * width - GRID_PADDING, num_rows * height - GRID_PADDING), _WHITE[mode])
    for i, tile in enumerate(tiles):
        sheet.paste(tile, (i % columns * width, i // columns * height))
    return sheet


def with_row_titles(sheet: Image.Image, titles: Sequence[str]) -> Image.Image:
    """Return a contact sheet with a title to the left of each of its rows, in RGB on white."""
    font = ImageFont.load_default(STRIP_FONT_SIZE)
    left = max(math.ceil(font.getlength(title)) for title in titles) + 2 * STRIP_PADDING
    titled = Image.new("RGB", (left + sheet.width, sheet.height), _WHITE["RGB"])
    titled.paste(_on_white(sheet).convert("RGB"), (left, 0))
    draw, row_height = ImageDraw.Draw(titled), (sheet.height + GRID_PADDING) / len(titles)
    for row, title in enumerate(titles):
        center = row * row_height + (row_height - GRID_PADDING) / 2
        draw.text((left - STRIP_PADDING, center), title, _INK, font, anchor="rm")
    return titled


def strip(
    rows: Sequence[Images], column_labels: Sequence[str], row_labels: Sequence[str] | None = None
) -> Image.Image:
    """Return rows of images under one line of labels, such as "t = 999"; columns are as wide as the labels need.

    Args:
        rows: Each as long as `column_labels`; all images of one size and one mode.
        row_labels: One per row, drawn to its left.

    Returns:
        An RGB image on white.

    Raises:
        ValueError: When the labels do not match the images, or `grid` would refuse the images.
    """
    _check_strip(rows, column_labels, row_labels)
    font = ImageFont.load_default(STRIP_FONT_SIZE)
    tiles = [[_enlarge(_on_white(image).convert("RGB")) for image in row] for row in rows]
    width, height = tiles[0][0].size
    widest_label = max(math.ceil(font.getlength(label)) for label in column_labels)
    column_width = max(width, widest_label + STRIP_PADDING) + STRIP_PADDING
    row_height = height + STRIP_PADDING
    left = STRIP_PADDING
    if row_labels is not None:
        left += max(math.ceil(font.getlength(label)) for label in row_labels) + 2 * STRIP_PADDING
    top = STRIP_PADDING + math.ceil(1.5 * STRIP_FONT_SIZE)
    sheet = Image.new("RGB", (left + len(column_labels) * column_width, top + len(rows) * row_height), _WHITE["RGB"])
    draw = ImageDraw.Draw(sheet)
    for j, label in enumerate(column_labels):
        x = left + j * column_width
        center = x + (column_width - STRIP_PADDING) / 2
        draw.text((center, STRIP_PADDING + STRIP_FONT_SIZE / 2), label, _INK, font, anchor="mm")
        for i, row in enumerate(tiles):
            sheet.paste(row[j], (x + (column_width - STRIP_PADDING - width) // 2, top + i * row_height))
    for i, label in enumerate(row_labels or ()):
        draw.text((left - 2 * STRIP_PADDING, top + i * row_height + height / 2), label, _INK, font, anchor="rm")
    return sheet


def side_by_side(columns: Sequence[Images], labels: Sequence[str]) -> Image.Image:
    """Return a strip in which the images of equal number stand side by side, in two halves if there are many.

    Args:
        columns: Lists of as many images, of one height and any mode, one list for each label. Narrower images, as
            those of fewer channels side by side, get white beside them.
        labels: What the columns are called.
    """
    width = max(column[0].width for column in columns)
    rows = [[_widened(image, width) for image in row] for row in zip(*columns, strict=True)]
    if len(rows) < SIDE_BY_SIDE_ROWS:
        return strip(rows, labels)
    if len(rows) % 2:
        rows.append([Image.new("RGB", image.size, "white") for image in rows[0]])
    half = len(rows) // 2
    return strip([[*a, *b] for a, b in zip(rows[:half], rows[half:], strict=True)], [*labels, *labels])


def _widened(image: Image.Image, width: int) -> Image.Image:
    """Return an image in RGB, in the middle of white as wide as asked for."""
    image = _on_white(image).convert("RGB")
    if image.width == width:
        return image
    wide = Image.new("RGB", (width, image.height), "white")
    wide.paste(image, ((width - image.width) // 2, 0))
    return wide


def reverse_strip(
    steps: Sequence[TrajectoryStep], images: Tensor | None = None, max_images: int | None = None
) -> Image.Image:
    """Return the reverse chain as a strip: two rows for each image, x_t and below it x_0_hat, under the timesteps.

    Args:
        steps: At least one step of sampling.
        images: What the chain ends at, (B, C, H, W) in [-1, 1], as a last column; None: no such column.
        max_images: How many of the B images are shown at most; None: all.
    """
    rows, names = [], []
    for i in range(len(steps[0].x_t))[:max_images]:
        end = [] if images is None else [images[i]]
        for states in ([step.x_t[i] for step in steps], [step.x_0_hat[i] for step in steps]):
            rows.append(to_pil(torch.stack([*states, *end]) / 2 + 0.5))
        names += ["x_t", "x_0_hat"]
    return strip(rows, [f"t = {step.timestep}" for step in steps] + ([] if images is None else ["image"]), names)


def spread(total: int, count: int) -> list[int]:
    """Return at most `count` whole numbers from 0 to total - 1, evenly spaced."""
    count = min(count, total)
    return [round(i * (total - 1) / max(1, count - 1)) for i in range(count)]


@torch.no_grad()
def forward_chain(
    x_0: Tensor, scheduler: DDPMScheduler, timesteps: Sequence[int], generator: torch.Generator | None
) -> Tensor:
    """Return chosen states of one trajectory of the forward chain, Ho et al. 2020, Eq. 2.

    Every step up to the last chosen one is taken, so that the choice does not change the trajectory.

    Args:
        x_0: (C, H, W) in [-1, 1].
        timesteps: Each in [-1, T), in any order; -1 is x_0 itself.
        generator: Draws eps_t, on its own device.

    Returns:
        The states in the order of `timesteps`, (len(timesteps), C, H, W).

    Raises:
        ValueError: When `timesteps` is empty or one of them is out of range.
    """
    end: int = scheduler.config["num_train_timesteps"]
    if not timesteps or min(timesteps) < -1 or max(timesteps) >= end:
        raise ValueError(f"timesteps must be in [-1, {end}), -1 for x_0, got {list(timesteps)}")
    device = x_0.device if generator is None else generator.device
    x_t = x_0.unsqueeze(0)
    states = {-1: x_t}
    for t in range(max(timesteps) + 1):
        eps = torch.randn(x_t.shape, generator=generator, device=device, dtype=x_t.dtype).to(x_t.device)
        x_t = scheduler.forward_step(x_t, eps, t)
        if t in timesteps:
            states[t] = x_t
    return torch.cat([states[t] for t in timesteps])


def chain_gif(frames: Images, path: str | Path) -> None:
    """Write an animation that shows its last frame longer than the others and then starts over.

    Gray values stay exact; colors are reduced to 256 per frame, without dithering. Equal neighbors become one frame
    that is shown as long as both.

    Args:
        frames: At least one; all of one size and one mode.

    Raises:
        ValueError: When `grid` would refuse the frames.
    """
    _check_alike(frames)
    flat = [_on_white(frame) for frame in frames]
    if flat[0].mode == "RGB":
        flat = [frame.quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE) for frame in flat]
    durations = [FRAME_MS] * (len(flat) - 1) + [LAST_FRAME_MS]
    flat[0].save(path, "GIF", save_all=True, append_images=flat[1:], duration=durations, loop=0)


def _check_alike(images: Images) -> None:
    kinds = sorted({(image.mode, *image.size) for image in images})
    if len(kinds) != 1 or kinds[0][0] not in _WHITE:
        raise ValueError(f"images must be of one size and of one mode out of {[*_WHITE]}, got {kinds}: convert them")


def _check_strip(rows: Sequence[Images], column_labels: Sequence[str], row_labels: Sequence[str] | None) -> None:
    lengths = [len(row) for row in rows]
    if not column_labels or set(lengths) != {len(column_labels)}:
        raise ValueError(f"each row must hold an image per column label, {len(column_labels)}, got rows of {lengths}")
    if row_labels is not None and len(row_labels) != len(rows):
        raise ValueError(f"row_labels must hold one label per row, got {len(row_labels)} for {len(rows)} rows")
    _check_alike([image for row in rows for image in row])


def _enlarge(image: Image.Image) -> Image.Image:
    """Enlarge by the smallest whole factor that makes both sides at least MIN_SIDE long."""
    factor = max(1, math.ceil(MIN_SIDE / min(image.size)))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode == "RGBA":
        return Image.alpha_composite(Image.new("RGBA", image.size, _WHITE["RGBA"]), image).convert("RGB")
    return image
