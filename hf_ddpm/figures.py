"""Pictures of images and of numbers: contact sheets, the Markov chains as strips and animations, line plots.

    image          a PIL image with 8 bits per channel: mode L (C = 1), RGB (C = 3) or RGBA (C = 4)
    forward chain  x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) eps_t, an image dissolving; Ho et al. 2020, Eq. 2
    reverse chain  x_{t-1} ~ p(x_{t-1} | x_t), an image emerging

Small images are enlarged by whole factors without interpolation, so that a picture shows the model's own pixels.
Line plots are matplotlib's, which is imported when the first of them is drawn. The same data give the same bytes.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

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

PLOT_SIZE, PLOT_DPI = (7.5, 3.75), 120  # inches, pixels per inch: 900 by 450 pixels
_LEGEND_ROW_HEIGHT = 0.225  # inches
# Okabe and Ito's colors, which color-blind readers can tell apart; the last one is darker than theirs.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#AA4499", "#56B4E9", "#806000")
_BACKGROUND_COLOR, _LEVEL_COLOR = "#9ECAE1", "#555555"
# Up to so many values are drawn as dots on their line.
_MAX_MARKERS = 30
# More values make a thinner line, which shows them one by one.
_MAX_THICK = 500


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
        columns: Lists of as many images, of one size and any mode, one list for each label.
        labels: What the columns are called.
    """
    rows = [[_on_white(image).convert("RGB") for image in row] for row in zip(*columns, strict=True)]
    if len(rows) < SIDE_BY_SIDE_ROWS:
        return strip(rows, labels)
    if len(rows) % 2:
        rows.append([Image.new("RGB", image.size, "white") for image in rows[0]])
    half = len(rows) // 2
    return strip([[*a, *b] for a, b in zip(rows[:half], rows[half:], strict=True)], [*labels, *labels])


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


@dataclass(frozen=True, eq=False)
class Curve:
    """A series of values in a line plot.

    Args:
        label: The name in the legend.
        x: Positions, (n,).
        y: Values, (n,). One that its axis cannot show (NaN; 0 on a logarithmic axis) leaves a gap.
        error: Standard errors of `y`, (n,), drawn as a band of one standard error to each side; NaN: none there.
        color: A position in COLORS; default: the next color.
        is_dashed: Whether the line is dashed and its dots are hollow.
        is_background: Whether the line is thin, light and behind the others, as single values are behind their mean.
    """

    label: str
    x: Sequence[float] | np.ndarray
    y: Sequence[float] | np.ndarray
    error: Sequence[float] | np.ndarray | None = None
    color: int | None = None
    is_dashed: bool = False
    is_background: bool = False


class Level(NamedTuple):
    """A value to compare curves with, drawn as a horizontal line, with its standard error as a band."""

    label: str
    value: float
    error: float | None = None


def draw_curves(
    path: str | Path,
    curves: Sequence[Curve],
    *,
    title: str,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    log_y: bool = False,
    y_from_zero: bool = False,
    level: Level | None = None,
) -> None:
    """Write a line plot as a PNG file, 900 pixels wide.

    Two or more labels, or a band, make a legend below the plot.

    Args:
        x_label: The quantity and its unit.
        y_label: The quantity and its unit.
        log_x: Whether the horizontal axis is logarithmic.
        log_y: Whether the vertical axis is logarithmic.
        y_from_zero: Whether a linear vertical axis includes 0, as amounts need to be compared by their heights.

    Raises:
        ValueError: When a curve has not as many x as y.
    """
    from matplotlib import style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # What the user's own matplotlibrc says would change the picture from machine to machine.
    with style.context("default"):
        figure = Figure(PLOT_SIZE, PLOT_DPI, layout="constrained")
        axes: Axes = figure.subplots()
        axes.set_title(title)
        axes.set_xlabel(x_label)
        needs_legend = plot_curves(axes, curves, y_label, log_x, log_y, y_from_zero, level)
        if needs_legend:
            _add_legend(figure, axes)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()  # once; savefig draws twice
        picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    picture.save(path, "PNG", dpi=(PLOT_DPI, PLOT_DPI))


def plot_curves(
    axes: Axes,
    curves: Sequence[Curve],
    y_label: str,
    log_x: bool = False,
    log_y: bool = False,
    y_from_zero: bool = False,
    level: Level | None = None,
) -> bool:
    """Draw curves as `draw_curves` does, on axes that somebody else has made.

    Returns:
        Whether they need a legend: there are two labels, or a band.

    Raises:
        ValueError: When a curve has not as many x as y.
    """
    series = [_drawable(curve, log_x, log_y) for curve in curves]
    axes.set_ylabel(y_label)
    _set_axis(axes, "x", [x for x, _, _ in series], log_x, margin=0.02)
    heights = [values for _, y, error in series for values in (y, y + error)]
    if not log_y:  # On a logarithmic axis, a band that comes near 0 would take all the room.
        heights += [y - error for _, y, error in series]
    if level is not None:
        heights.append(np.array([level.value]))
    _set_axis(axes, "y", heights, log_y, margin=0.05, with_zero=y_from_zero)
    axes.grid(color="#E6E6E6")
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    has_band = _draw_lines(axes, curves, series, level)
    if not any(len(x) for x, _, _ in series):
        axes.text(0.5, 0.5, "no finite values", ha="center", va="center", transform=axes.transAxes)
    return has_band or len(axes.get_legend_handles_labels()[1]) > 1


def loss_curves(records: Sequence[dict[str, Any]]) -> list[Curve]:
    """Return logged losses and their centered geometric mean, which lies in their middle on a logarithmic axis.

    Args:
        records: The lines of metrics.jsonl.
    """
    records = [record for record in records if record["loss"] is not None]
    steps, losses = [record["step"] for record in records], [record["loss"] for record in records]
    half = len(losses) // 40
    if not half or min(losses) <= 0:
        return [Curve("loss as logged", steps, losses)]
    window = 2 * half + 1
    means = np.exp(np.convolve(np.log(losses), np.full(window, 1 / window), mode="valid"))
    return [
        Curve("loss as logged", steps, losses, is_background=True),
        Curve(f"geometric mean of {window} values, centered", steps[half:-half], means),
    ]


_Series: TypeAlias = tuple[np.ndarray, np.ndarray, np.ndarray]


def _drawable(curve: Curve, log_x: bool, log_y: bool) -> _Series:
    """Return x, y and error; y is NaN where nothing can be drawn, and all are empty if that is everywhere."""
    if len(curve.x) != len(curve.y):
        raise ValueError(f"curve {curve.label!r} must have as many x as y, got {len(curve.x)} and {len(curve.y)}")
    x, y = (np.asarray(values, dtype=np.float64) for values in (curve.x, curve.y))
    error = np.full(len(y), math.nan) if curve.error is None else np.asarray(curve.error, dtype=np.float64)
    is_shown = np.isfinite(x) & np.isfinite(y)
    if log_x:
        is_shown &= x > 0
    if log_y:
        is_shown &= y > 0
    if not is_shown.any():
        return np.empty(0), np.empty(0), np.empty(0)
    has_position = np.isfinite(x) & (x > 0) if log_x else np.isfinite(x)
    return x[has_position], np.where(is_shown, y, math.nan)[has_position], error[has_position]


def _draw_lines(axes: Axes, curves: Sequence[Curve], series: Sequence[_Series], level: Level | None) -> bool:
    """Draw all lines and bands. Return whether there is a band, which one entry of the legend explains."""
    band: dict[str, Any] = {"linewidth": 0, "alpha": 0.25}
    has_band = False
    if level is not None:
        axes.axhline(level.value, color=_LEVEL_COLOR, linestyle=(0, (1, 1)), label=level.label)
        if level.error is not None:
            axes.axhspan(level.value - level.error, level.value + level.error, color=_LEVEL_COLOR, **band)
            has_band = True
    num_colors = 0
    for curve, (x, y, error) in zip(curves, series, strict=True):
        if not len(x):
            continue
        color = _BACKGROUND_COLOR
        if not curve.is_background:
            color = COLORS[(num_colors if curve.color is None else curve.color) % len(COLORS)]
            num_colors += 1
        linestyle = "--" if curve.is_dashed else "-"
        if np.isfinite(y).sum() == 1:
            linestyle = "none"
        linewidth = 1.8 if len(x) <= _MAX_THICK else 1.2
        if curve.is_background:
            linewidth = 0.8
        marked = _marked(y)
        axes.plot(
            x,
            y,
            color=color,
            label=curve.label,
            linestyle=linestyle,
            linewidth=linewidth,
            marker="o" if len(marked) else None,
            markersize=5,
            markerfacecolor="white" if curve.is_dashed else color,
            markevery=marked.tolist(),
            zorder=1.5 if curve.is_background else 2.5,
        )
        if np.isfinite(error).any():
            axes.fill_between(x, y - error, y + error, color=color, **band)
            lone = _lone(y)
            axes.errorbar(x[lone], y[lone], error[lone], color=color, linestyle="none", capsize=3)
            has_band = True
    if has_band:
        axes.fill_between([], [], [], color=_LEVEL_COLOR, label="± 1 standard error", **band)
    return has_band


def _add_legend(figure: Figure, axes: Axes) -> None:
    """Add a legend below the plot, in as many columns as the picture is wide enough for.

    The picture grows with each row after the first, so that the plot keeps its size.
    """
    handles, labels = axes.get_legend_handles_labels()
    entry_width = 0.6 + 0.075 * max(map(len, labels))  # inches
    num_columns = max(1, min(4, len(labels), int(PLOT_SIZE[0] / entry_width)))
    num_rows = -(-len(labels) // num_columns)
    figure.set_figheight(PLOT_SIZE[1] + _LEGEND_ROW_HEIGHT * (num_rows - 1))
    figure.legend(handles, labels, loc="outside lower center", ncols=num_columns, frameon=False)


def _lone(y: np.ndarray) -> np.ndarray:
    """Return the indices of values without a neighbor, which a line does not show."""
    is_shown = np.concatenate([[False], np.isfinite(y), [False]])
    return np.flatnonzero(is_shown[1:-1] & ~is_shown[:-2] & ~is_shown[2:])


def _marked(y: np.ndarray) -> np.ndarray:
    """Return the indices of values that get a dot."""
    shown = np.flatnonzero(np.isfinite(y))
    return shown if len(shown) <= _MAX_MARKERS else _lone(y)


def _set_axis(
    axes: Axes, name: str, data: Sequence[np.ndarray], is_log: bool, margin: float, with_zero: bool = False
) -> None:
    """Set scale, limits and ticks of an axis.

    Args:
        name: x or y.
        margin: The fraction of the data's range that is added on both sides.
    """
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    values = np.concatenate([np.empty(0), *data])
    values = values[np.isfinite(values) & (values > 0)] if is_log else values[np.isfinite(values)]
    if not len(values):
        values = np.array([1.0, 10.0])
    low, high = float(values.min()), float(values.max())
    low, high = _log_limits(low, high, margin) if is_log else _linear_limits(low, high, margin, with_zero)
    axes.set(**{f"{name}scale": "log" if is_log else "linear", f"{name}lim": (low, high)})
    axis = axes.xaxis if name == "x" else axes.yaxis
    if is_log:
        _set_log_ticks(axis, low, high)
    else:
        axis.set_major_locator(MaxNLocator(nbins=7, steps=[1, 2, 5, 10]))
        axis.set_major_formatter(FuncFormatter(_format_tick))


def _log_limits(low: float, high: float, margin: float) -> tuple[float, float]:
    factor = 10**0.5 if high <= low * (1 + 1e-9) else (high / low) ** margin
    return low / factor, high * factor


def _linear_limits(low: float, high: float, margin: float, with_zero: bool) -> tuple[float, float]:
    """Return limits that are wider than one value even if the data is not."""
    if with_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        room = 0.5 * abs(low) or 1.0
        return low - room, high + room
    room = (high - low) * margin
    # Values that are not negative get no negative axis, and those that begin near 0 an axis from 0.
    starts_at_zero = 0 <= low < (high - low) * 0.05
    return (0.0 if starts_at_zero else low - room), high + room


def _set_log_ticks(axis: Axis, low: float, high: float) -> None:
    """Label 1, 2, 5, 10, ... or, over a wider range, powers of ten; minor ticks stand between them."""
    from matplotlib.ticker import FuncFormatter, LogFormatterMathtext, LogLocator, MaxNLocator, NullFormatter

    num_decades = math.log10(high / low)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    num_ticks = sum(low <= multiple * 10.0**power <= high for power in powers for multiple in (1, 2, 5))
    if num_ticks < 3:
        axis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
        axis.set_minor_locator(MaxNLocator(nbins=30, steps=[1, 2, 5, 10]))
    else:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if num_decades < 2.5 else (1,), numticks=10))
        axis.set_minor_locator(LogLocator(subs=[*range(1, 10)] if num_decades < 10 else (1,), numticks=100))
    is_plain = low >= 1e-4 and high < 1e6
    axis.set_major_formatter(FuncFormatter(_format_tick) if is_plain else LogFormatterMathtext())
    axis.set_minor_formatter(NullFormatter())


def _format_tick(value: float, position: int | None = None) -> str:
    return f"{value:,.10g}"


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
