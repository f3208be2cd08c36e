"""Pictures of a run: contact sheets, the Markov chains as strips and animations, and curves.

    x              images as the network sees them, (B, C, H, W) in [-1, 1]
    image          a PIL image, 8 bits per channel: mode L (C = 1), RGB (3) or RGBA (4)
    forward chain  x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) eps_t, an image dissolving; Ho et al. 2020, Eq. 2
    reverse chain  x_{t-1} ~ p(x_{t-1} | x_t), an image emerging

Pixels are enlarged by whole factors and nearest neighbor: what is seen is what the model made.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

if TYPE_CHECKING:
    from hf_ddpm.scheduler import DDPMScheduler

Images: TypeAlias = Sequence[Image.Image]
Series: TypeAlias = tuple[Sequence[float], Sequence[float]]
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_WHITE = {"L": 255, "RGB": (255, 255, 255), "RGBA": (255, 255, 255, 255)}
_INK, _AXIS, _LIGHT = (40, 40, 40), (120, 120, 120), (230, 230, 230)
# Of several series the first is light, the second its dark shade: a noisy curve and its mean.
_COLORS = [(158, 202, 225), (8, 81, 156), (230, 111, 20), (35, 139, 69), (203, 24, 29), (106, 81, 163)]
_CURVE_SIZE, _SUPERSAMPLING = (900, 450), 4


def to_images(x: Tensor) -> list[Image.Image]:
    """x in [-1, 1] as images: round(255 clamp(x / 2 + 1/2, 0, 1)), which is what `DDPMPipeline` gives.

    Args:
        x: (B, C, H, W) with C 1, 3 or 4; of any floating type, on any device.

    Returns: B images of mode L, RGB or RGBA. Raises: ValueError for another shape.
    """
    if x.ndim != 4 or x.shape[1] not in _MODES:
        raise ValueError(f"x must be (B, C, H, W) with C in {sorted(_MODES)}, got shape {tuple(x.shape)}")
    pixels = ((x.detach().float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    array = pixels.permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image) for image in array]


def grid(images: Images, columns: int | None = None, min_side: int = 64, padding: int = 2) -> Image.Image:
    """A contact sheet: image i stands in row i // columns and column i % columns.

    Args:
        images: at least one; of one size and of one mode, which the sheet keeps.
        columns: default: the least for which there are no more rows than columns.
        min_side: pixels; smaller images are enlarged by the least whole factor that gives it to both sides.
        padding: pixels of white between images.

    Raises: ValueError for no images, images that differ, a mode that is not L, RGB or RGBA, `columns` below 1.
    """
    _check_alike(images)
    columns = math.ceil(math.sqrt(len(images))) if columns is None else columns
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}")
    tiles = [_enlarge(image, min_side) for image in images]
    width, height = tiles[0].size
    size = (columns * (width + padding) - padding, -(-len(tiles) // columns) * (height + padding) - padding)
    sheet = Image.new(tiles[0].mode, size, _WHITE[tiles[0].mode])
    for i, tile in enumerate(tiles):
        sheet.paste(tile, (i % columns * (width + padding), i // columns * (height + padding)))
    return sheet


def strip(
    rows: Sequence[Images],
    column_labels: Sequence[str],
    row_labels: Sequence[str] | None = None,
    min_side: int = 64,
    padding: int = 6,
    font_size: int = 14,
) -> Image.Image:
    """Rows of images under one line of labels, such as "t = 999"; columns are as wide as the labels need.

    Args:
        rows: each as long as `column_labels`; images of one size and of one mode.
        row_labels: one per row, to its left.
        min_side, padding, font_size: pixels; as of `grid`.

    Returns: an RGB image on white. Raises: ValueError for labels that do not match the images, and as `grid`.
    """
    lengths = [len(row) for row in rows]
    if not column_labels or set(lengths) != {len(column_labels)}:
        raise ValueError(f"each row must hold an image per column label, {len(column_labels)}, got rows of {lengths}")
    if row_labels is not None and len(row_labels) != len(rows):
        raise ValueError(f"row_labels must hold one label per row, got {len(row_labels)} for {len(rows)} rows")
    _check_alike([image for row in rows for image in row])
    font = ImageFont.load_default(font_size)
    tiles = [[_enlarge(_on_white(image).convert("RGB"), min_side) for image in row] for row in rows]
    width, height = tiles[0][0].size
    cell = max(width, *(math.ceil(font.getlength(label)) + padding for label in column_labels)) + padding
    left = padding
    if row_labels is not None:
        left += max(math.ceil(font.getlength(label)) for label in row_labels) + 2 * padding
    top = padding + math.ceil(1.5 * font_size)
    size = (left + len(column_labels) * cell, top + len(rows) * (height + padding))
    draw = ImageDraw.Draw(sheet := Image.new("RGB", size, _WHITE["RGB"]))
    for j, label in enumerate(column_labels):
        x = left + j * cell
        draw.text((x + (cell - padding) / 2, padding + font_size / 2), label, _INK, font, anchor="mm")
        for i, row in enumerate(tiles):
            sheet.paste(row[j], (x + (cell - padding - width) // 2, top + i * (height + padding)))
    for i, label in enumerate(row_labels or ()):
        draw.text((left - 2 * padding, top + i * (height + padding) + height / 2), label, _INK, font, anchor="rm")
    return sheet


@torch.no_grad()
def forward_chain(
    x_0: Tensor, scheduler: DDPMScheduler, timesteps: Sequence[int], generator: torch.Generator | None
) -> Tensor:
    """Chosen states of one trajectory of the forward chain, Ho et al. 2020, Eq. 2.

    Every step up to the last chosen one is taken; which states are chosen does not change the trajectory.

    Args:
        x_0: (C, H, W) in [-1, 1].
        timesteps: each in [-1, T), in any order; -1 is x_0 itself.
        generator: draws eps_t, on its own device.

    Returns: (len(timesteps), C, H, W), in their order. Raises: ValueError for none, or for one out of range.
    """
    end: int = scheduler.config["num_train_timesteps"]
    if not timesteps or min(timesteps) < -1 or max(timesteps) >= end:
        raise ValueError(f"timesteps must be in [-1, {end}), -1 for x_0, got {list(timesteps)}")
    device = x_0.device if generator is None else generator.device
    kept = {-1: (x_t := x_0.unsqueeze(0))}
    for t in range(max(timesteps) + 1):
        eps = torch.randn(x_t.shape, generator=generator, device=device, dtype=x_t.dtype).to(x_t.device)
        x_t = scheduler.forward_step(x_t, eps, t)
        if t in timesteps:
            kept[t] = x_t
    return torch.cat([kept[t] for t in timesteps])


def chain_gif(frames: Images, path: str | Path, duration_ms: int = 60, hold_ms: int = 1500) -> None:
    """Write an animation that starts over after its last frame was held.

    Gray stays exact; colors are reduced to 256 per frame, undithered. Equal neighbors become one, longer frame.

    Args:
        frames: at least one, of one size and of one mode.
        duration_ms, hold_ms: of a frame, of the last one; multiples of 10 from 20 on, as browsers slow what is faster.

    Raises: ValueError for a duration that cannot take effect, and as `grid`.
    """
    _check_alike(frames)
    for name, value in (("duration_ms", duration_ms), ("hold_ms", hold_ms)):
        if value < 20 or value % 10:
            raise ValueError(f"{name} must be a multiple of 10 and at least 20, got {value}: a GIF counts in 10 ms")
    flat = [_on_white(frame) for frame in frames]
    if flat[0].mode == "RGB":
        flat = [frame.quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE) for frame in flat]
    durations = [duration_ms] * (len(flat) - 1) + [hold_ms]
    flat[0].save(path, "GIF", save_all=True, append_images=flat[1:], duration=durations, loop=0)


def curve(
    path: str | Path,
    series: Mapping[str, Series],
    x_label: str,
    y_label: str,
    log_y: bool = False,
    log_x: bool = False,
) -> None:
    """Write a line plot as a PNG of 900 by 450 pixels.

    Of several series the first is drawn thin and light, the second dark: a noisy curve goes before its running mean.
    A value that is not finite, or not positive on a logarithmic axis, leaves a gap in its line.

    Args:
        series: name -> (x, y), equally long, else a ValueError; several names make a legend.
        log_y, log_x: a logarithmic axis.
    """
    lines = {name: _segments(name, x, y, log_y, log_x) for name, (x, y) in series.items()}
    every = [*chain.from_iterable(lines.values())]
    points = np.concatenate(every) if every else np.array([[0.0, 1.0], [1.0, 10.0]])
    (x_lo, x_hi), (y_lo, y_hi) = _limits(points[:, 0], log=log_x), _limits(points[:, 1], margin=0.04, log=log_y)
    x_lo = 0.0 if 0 < x_lo < 0.05 * x_hi and not log_x else x_lo
    x_ticks = _log_ticks(x_lo, x_hi) if log_x else _linear_ticks(x_lo, x_hi, 8)
    y_ticks = _log_ticks(y_lo, y_hi) if log_y else _linear_ticks(y_lo, y_hi, 6)

    small, font = ImageFont.load_default(13), ImageFont.load_default(15)
    width, height = _CURVE_SIZE
    left = 46 + math.ceil(max(small.getlength(label) for label in y_ticks.values()))
    right = width - 18 - math.ceil(small.getlength(list(x_ticks.values())[-1]) / 2)
    legend, u, v = [], left, 18
    for name in series if len(series) > 1 else ():
        needed = 29 + math.ceil(small.getlength(name))
        u, v = (left, v + 22) if u > left and u + needed > right else (u, v)
        legend.append((u, v))
        u += needed + 24
    top, bottom = (v + 20 if legend else 20), height - 62
    colors = [_COLORS[i % len(_COLORS)] for i in range(len(series))] if legend else _COLORS[1:]

    def place(x: np.ndarray | float, y: np.ndarray | float) -> np.ndarray:
        scale = np.log10 if log_x else np.asarray
        u = left + (scale(x) - scale(x_lo)) / (scale(x_hi) - scale(x_lo)) * (right - left)
        scale = np.log10 if log_y else np.asarray
        v = bottom - (scale(y) - scale(y_lo)) / (scale(y_hi) - scale(y_lo)) * (bottom - top)
        return np.stack([u, v], axis=-1)

    x_at = {label: place(tick, y_lo)[0] for tick, label in x_ticks.items()}
    y_at = {label: place(x_lo, tick)[1] for tick, label in y_ticks.items()}
    strokes = [([(u, top), (u, bottom)], _LIGHT, 1.0) for u in x_at.values()]
    strokes += [([(left, v), (right, v)], _LIGHT, 1.0) for v in y_at.values()]
    strokes += [([(left, top), (left, bottom), (right, bottom)], _AXIS, 1.0)]
    for i, segments in enumerate(lines.values()):
        thickness = 1.2 if legend and i == 0 else 2.0
        strokes += [(place(segment[:, 0], segment[:, 1]), colors[i], thickness) for segment in segments]
    strokes += [([(u, v), (u + 22, v)], color, 3.0) for (u, v), color in zip(legend, colors, strict=False)]
    canvas = Image.new("RGB", (width * _SUPERSAMPLING, height * _SUPERSAMPLING), _WHITE["RGB"])
    draw = ImageDraw.Draw(canvas)
    for stroke, color, thickness in strokes:
        pixels, pen = [tuple(point) for point in np.asarray(stroke) * _SUPERSAMPLING], thickness * _SUPERSAMPLING
        draw.line(pixels, color, round(pen), joint="curve" if len(pixels) < 5000 else None)
        if len(pixels) == 1:
            (u, v), r = pixels[0], 2 * pen
            draw.ellipse((u - r, v - r, u + r, v + r), color)

    # Letters are sharper when they are drawn at their own size.
    canvas = canvas.reduce(_SUPERSAMPLING)
    draw, middle = ImageDraw.Draw(canvas), (top + bottom) / 2
    upright = Image.new("RGB", (math.ceil(font.getlength(y_label)) + 2, 22), _WHITE["RGB"])
    ImageDraw.Draw(upright).text((1, 11), y_label, _INK, font, anchor="lm")
    canvas.paste(upright.rotate(90, expand=True), (8, max(0, round(middle - upright.width / 2))))
    draw.text(((left + right) / 2, height - 12), x_label, _INK, font, anchor="md")
    for label, u in x_at.items():
        draw.text((u, bottom + 7), label, _INK, small, anchor="ma")
    for label, v in y_at.items():
        draw.text((left - 8, v), label, _INK, small, anchor="rm")
    for name, (u, v) in zip(series, legend, strict=False):
        draw.text((u + 29, v), name, _INK, small, anchor="lm")
    if not every:
        draw.text(((left + right) / 2, middle), "no finite values", _AXIS, font, anchor="mm")
    canvas.save(path, "PNG")


def _check_alike(images: Images) -> None:
    kinds = sorted({(image.mode, *image.size) for image in images})
    if len(kinds) != 1 or kinds[0][0] not in _WHITE:
        raise ValueError(f"images must be of one size and of one mode out of {[*_WHITE]}, got {kinds}: convert them")


def _enlarge(image: Image.Image, min_side: int) -> Image.Image:
    factor = max(1, math.ceil(min_side / min(image.size)))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode == "RGBA":
        return Image.alpha_composite(Image.new("RGBA", image.size, _WHITE["RGBA"]), image).convert("RGB")
    return image


def _segments(name: str, x: Sequence[float], y: Sequence[float], log_y: bool, log_x: bool = False) -> list[np.ndarray]:
    """The line as (N, 2) arrays, parted where a value cannot be drawn."""
    if len(x) != len(y):
        raise ValueError(f"series {name!r} must have as many x as y, got {len(x)} and {len(y)}")
    points = np.stack([np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)], axis=1)
    allowed = np.where([log_x, log_y], points > 0, True)
    drawn = np.asarray(np.isfinite(points).all(axis=1) & allowed.all(axis=1))
    parts = np.split(np.arange(len(points)), np.flatnonzero(np.diff(drawn)) + 1)
    return [points[part] for part in parts if drawn[part].any()]


def _limits(values: np.ndarray, margin: float = 0.0, log: bool = False) -> tuple[float, float]:
    """The range of an axis, wider than one value even if the data is not."""
    lo, hi = float(values.min()), float(values.max())
    if log:
        room = math.log10(hi / lo) * margin or (0.5 if hi == lo or margin else 0.0)
        return lo / 10**room, hi * 10**room
    if hi - lo <= 1e-9 * max(abs(lo), abs(hi)):
        room = 0.5 * abs(lo) or 1.0
        return lo - room, hi + room
    room = (hi - lo) * margin
    return (max(lo - room, 0.0) if lo >= 0 else lo - room), hi + room


def _linear_ticks(lo: float, hi: float, count: int) -> dict[float, str]:
    """Round values in [lo, hi], at most `count` + 1, and how they are written: steps of 1, 2 or 5 times 10^n."""
    raw = (hi - lo) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    ticks = [k * step for k in range(math.ceil(lo / step - 1e-9), math.floor(hi / step + 1e-9) + 1)]
    plain = decimals <= 5 and max(abs(lo), abs(hi)) < 1e10
    return {tick: f"{tick:,.{decimals}f}" if plain else f"{tick:.4g}" for tick in ticks}


def _log_ticks(lo: float, hi: float) -> dict[float, str]:
    decades = range(math.floor(math.log10(lo)), math.ceil(math.log10(hi)) + 1)
    every = max(1, len(decades) // 8)
    for multiples in ((1,), (1, 3), (1, 2, 5)):
        ticks = [m * 10.0**n for n in decades if n % every == 0 for m in multiples]
        if sum(lo <= tick <= hi for tick in ticks) >= 4:
            return {tick: f"{tick:g}" for tick in ticks if lo <= tick <= hi}
    return _linear_ticks(lo, hi, 6)
