"""Tests of hf_ddpm.plots: line plots show what they are given, at the position and size that is documented."""

from __future__ import annotations

import ast
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hf_ddpm import figures, plots
from hf_ddpm.plots import Curve, Level


def draw(tmp_path: Path, *curves: Curve, **options: Any) -> np.ndarray:
    labels = {"title": "Training loss", "x_label": "optimizer step", "y_label": "loss"}
    plots.draw_curves(tmp_path / "curve.png", curves, **labels, **options)
    with Image.open(tmp_path / "curve.png") as image:
        assert (image.width, image.format, image.info.keys() - {"dpi"}) == (900, "PNG", set())
        return np.asarray(image.convert("RGB")).astype(int)


def pixels_of(array: np.ndarray, color: str) -> np.ndarray:
    """Rows and columns of the pixels that have the color, up to the smoothing of edges."""
    rgb = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return np.argwhere(np.abs(array - rgb).sum(axis=2) < 20)


def blue(array: np.ndarray) -> np.ndarray:
    return pixels_of(array, plots.COLORS[0])


@pytest.mark.slow
@pytest.mark.parametrize("log_y", [False, True])
@pytest.mark.parametrize(
    "y",
    [[0.5], [3.0] * 4, [1e-30, 1e30], [0.1, math.nan, math.inf, 0.3], [1e-9, 2e-9], [5, 5 + 1e-13], [1e7, 3e7, 2e7]],
)
def test_draw_curves_shows_all_kinds_of_values_and_cuts_off_no_label(tmp_path: Path, y: list[float], log_y: bool):
    array = draw(tmp_path, Curve("loss", range(1, len(y) + 1), y, error=[0.1 * value for value in y]), log_y=log_y)
    assert len(blue(array)) > 10
    border = np.concatenate([array[:2].ravel(), array[-2:].ravel(), array[:, :2].ravel(), array[:, -2:].ravel()])
    assert (border == 255).all()


@pytest.mark.slow
def test_draw_curves_draws_no_line_without_values(tmp_path: Path):
    empty = [Curve("loss", [], [])], [Curve("loss", [1, 2], [math.nan, -math.inf])], []
    for curves in empty:
        assert len(blue(draw(tmp_path, *curves))) == 0
    assert len(blue(draw(tmp_path, Curve("loss", [1, 2], [0.0, -1.0]), log_y=True))) == 0


@pytest.mark.slow
def test_draw_curves_puts_values_where_they_belong(tmp_path: Path):
    x = np.linspace(0, 100, 400)
    pixels = blue(draw(tmp_path, Curve("loss", x, 3 * x + 7)))
    assert np.corrcoef(pixels[:, 1], -pixels[:, 0])[0, 1] > 0.9999
    pixels = blue(draw(tmp_path, Curve("loss", x, np.exp(-x / 9)), log_y=True))
    assert np.corrcoef(pixels[:, 1], pixels[:, 0])[0, 1] > 0.9999
    pixels = blue(draw(tmp_path, Curve("loss", x + 1, np.log(x + 1)), log_x=True))
    assert np.corrcoef(pixels[:, 1], -pixels[:, 0])[0, 1] > 0.9999


@pytest.mark.slow
def test_draw_curves_leaves_a_gap_where_there_is_no_value_and_dots_lone_values(tmp_path: Path):
    y = np.ones(101)
    y[40:61] = math.nan
    columns = np.unique(blue(draw(tmp_path, Curve("loss", np.arange(101), y)))[:, 1])
    gap = np.diff(columns).max()
    assert gap > 0.2 * (columns[-1] - columns[0])
    y[50] = 1
    columns = np.unique(blue(draw(tmp_path, Curve("loss", np.arange(101), y)))[:, 1])
    assert 0.3 * gap < np.diff(columns).max() < 0.6 * gap


@pytest.mark.slow
def test_draw_curves_starts_at_zero_if_told_to(tmp_path: Path):
    def height(**options: Any) -> float:
        """The lowest row of the curve; the plot ends at the same row in both pictures."""
        return blue(draw(tmp_path, Curve("memory", [0, 1, 2], [300, 310, 305]), **options))[:, 0].max()

    assert height(y_from_zero=True) < height() - 100


@pytest.mark.slow
def test_draw_curves_shows_errors_as_a_band_of_their_size(tmp_path: Path):
    x = np.arange(101)
    error = np.where(x < 50, 0.5, math.nan)
    array = draw(tmp_path, Curve("loss", x, np.full(101, 2.0), error), Curve("another", x, np.ones(101)))
    line, other = blue(array), pixels_of(array, plots.COLORS[1])
    unit = np.median(other[:, 0]) - np.median(line[:, 0])
    band = pixels_of(array, "#BFDCEC")  # a quarter of the line's color on white
    assert np.median(line[:, 0]) - band[:, 0].min() == pytest.approx(0.5 * unit, abs=2)
    assert band[:, 0].max() - np.median(line[:, 0]) == pytest.approx(0.5 * unit, abs=2)
    assert band[:, 1].max() == pytest.approx(line[:, 1].mean(), abs=10)


@pytest.mark.slow
def test_draw_curves_makes_room_for_its_legend(tmp_path: Path):
    curves = [Curve(f"a curve with a long name, number {i}", [1, 2], [i, i + 1]) for i in range(9)]
    few, many = draw(tmp_path, *curves[:2]), draw(tmp_path, *curves, level=Level("real images", 3.0, 0.1))
    assert len(many) > len(few) + 50
    for array in (few, many):
        assert (array[:, :2] == 255).all()
        assert (array[:, -2:] == 255).all()


@pytest.mark.slow
def test_draw_curves_is_the_same_whatever_the_user_sets_up_for_matplotlib(tmp_path: Path):
    import matplotlib

    curve = Curve("loss", [1, 2, 3], [3.0, 1.0, 2.0], error=[0.1, 0.2, 0.1])
    draw(tmp_path, curve, log_y=True)
    content = (tmp_path / "curve.png").read_bytes()
    with matplotlib.rc_context({"axes.facecolor": "black", "font.size": 20, "lines.linewidth": 9}):
        before = dict(matplotlib.rcParams)
        draw(tmp_path, curve, log_y=True)
        assert dict(matplotlib.rcParams) == before
    assert (tmp_path / "curve.png").read_bytes() == content


def test_draw_curves_refuses_x_and_y_of_different_lengths(tmp_path: Path):
    with pytest.raises(ValueError, match="as many x as y, got 1 and 2"):
        draw(tmp_path, Curve("loss", [1], [1, 2]))


@pytest.mark.parametrize(
    ("low", "high", "is_log", "labels"),
    [
        (0, 100, False, ["0", "20", "40", "60", "80", "100"]),
        (0, 800_000, False, ["0", "200,000", "400,000", "600,000", "800,000"]),
        (5, 20, True, ["5", "10", "20"]),
        (0.001, 30, True, ["0.001", "0.01", "0.1", "1", "10"]),
        (80, 120, True, ["80", "90", "100", "110", "120"]),
    ],
)
def test_ticks_are_round_numbers(low: float, high: float, is_log: bool, labels: list[str]):
    from matplotlib.figure import Figure

    figure = Figure()
    axes = figure.subplots()
    plots._set_axis(axes, "y", [np.array([low, high])], is_log, margin=0.001)
    figure.draw_without_rendering()
    bottom, top = axes.get_ylim()
    shown = [tick for tick in axes.yaxis.get_major_ticks() if bottom <= tick.get_loc() <= top]
    assert [tick.label1.get_text() for tick in shown] == labels
    assert len(axes.yaxis.get_minorticklocs()) > 5 or not is_log


@pytest.mark.parametrize("module", [figures, plots])
def test_importing_figures_and_plots_loads_no_matplotlib(module: ModuleType):
    """A Space imports figures with the pipeline, and has no matplotlib."""
    body = ast.parse(Path(str(module.__file__)).read_text()).body
    modules = [name.name for node in body if isinstance(node, ast.Import) for name in node.names]
    modules += [str(node.module) for node in body if isinstance(node, ast.ImportFrom)]
    assert "numpy" in modules
    assert not [name for name in modules if name.startswith(("matplotlib", "hf_ddpm"))]
