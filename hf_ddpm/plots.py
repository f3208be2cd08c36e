"""Line plots: curves with their errors, and a level to compare them with.

They are matplotlib's, which is imported when the first of them is drawn. The same data give the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

PLOT_SIZE, PLOT_DPI = (7.5, 3.75), 120  # inches, pixels per inch: 900 by 450 pixels
_LEGEND_ROW_HEIGHT = 0.225  # inches
# Okabe and Ito's colors, which color-blind readers can tell apart; the last one is darker than theirs.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#AA4499", "#56B4E9", "#806000")
_BACKGROUND_COLOR, _LEVEL_COLOR = "#9ECAE1", "#555555"
# Up to so many values are drawn as dots on their line.
_MAX_MARKERS = 30
# More values make a thinner line, which shows them one by one.
_MAX_THICK = 500


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
