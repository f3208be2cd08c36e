"""The pictures that a notebook shows by itself, as the last line of a cell: images, trajectories, metrics of a run."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib import style
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from hf_ddpm import figures, plots
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.runtime.files import read_metrics
from hf_ddpm.value_range import pictured

if TYPE_CHECKING:
    from hf_ddpm.pipeline import TrajectoryStep

MAX_TRAJECTORIES = 4
# Rounding may leave values so far outside of [0, 1].
_ROUNDING = 1e-3


def show(
    images: Any, *, columns: int | None = None, labels: Sequence[str] | None = None, value_range: Any = None
) -> Image.Image:
    """Return a picture of images, or of the trajectory of sampling.

    Args:
        images: What a `DDPMPipeline` returns as `images`, by its `output_type`: PIL images, an array (B, H, W, C) or a
            tensor (B, C, H, W), both in [0, 1] or uint8. One image alone, and a list of arrays or tensors, are taken
            too. Or what it returns as `trajectory`, of which the first MAX_TRAJECTORIES images are shown, each as a
            row of x_t and one of x_0_hat; of a model of arrays the channels that its other pictures show.
        columns: The images in a row, by default as many as there are rows; of a trajectory the steps in a row, evenly
            spaced, by default all up to NUM_STRIP_COLUMNS.
        labels: A text above each column, in place of `columns`; not for a trajectory.
        value_range: The values that become black and white, such as (-1, 1) for x_0 and x_t; what lies outside is
            clipped. None: (0, 1), and values outside are refused. For arrays and tensors of a floating type only.

    Raises:
        UsageError: When the images or the other arguments cannot be what they are for.
    """
    if columns is not None and (type(columns) is not int or columns < 1):
        raise UsageError(f"columns must be a whole number of at least 1, got {columns!r}")
    if labels is not None and columns is not None:
        raise UsageError(f"columns must be left out with labels, got {columns}: there is a column for each label")
    if _is_trajectory(images):
        if labels is not None or value_range is not None:
            raise UsageError("labels and value_range must be left out for a trajectory, which has its own")
        return _show_trajectory(images, columns)
    try:
        pictures = _as_pil(images, value_range)
        if labels is None:
            return figures.grid(pictures, columns)
        rows = [pictures[i : i + len(labels)] for i in range(0, len(pictures), max(1, len(labels)))]
        return figures.strip(rows, labels)
    except ValueError as error:
        raise UsageError(str(error)) from None


def plot_metrics(run: str | Path) -> Figure:
    """Return a figure of what a run has logged so far: its loss, held-out loss, learning rate and speed.

    Args:
        run: The output folder of a run, which may still go on.

    Raises:
        UsageError: When it holds no metrics.jsonl, or one that cannot be read.
    """
    folder = Path(run)
    records = read_metrics(folder / "metrics.jsonl")
    if not records:
        raise UsageError(
            f"run must be the output folder of a run, got {str(run)!r}: it holds no lines of metrics.jsonl"
        )
    losses = plots.loss_curves(records)
    validations = [line for line in read_metrics(folder / "eval.jsonl") if line.get("val_loss") is not None]
    if validations:
        steps, values = [line["step"] for line in validations], [line["val_loss"] for line in validations]
        losses.append(plots.Curve("on held-out images", steps, values))
    steps = [record["step"] for record in records]
    rates = plots.Curve("learning rate", steps, [record["lr"] for record in records])
    speeds = plots.Curve("speed", steps, [record["images_per_second"] for record in records])
    # As in the pictures of a run, what the user's own matplotlibrc says does not count.
    with style.context("default"):
        figure = _ShownFigure((7.5, 7.5), 100, layout="constrained")
        loss_axes, rate_axes, speed_axes = figure.subplots(3, 1, sharex=True, height_ratios=(2, 1, 1))
        if plots.plot_curves(loss_axes, losses, "loss\n(lower is better)", log_y=True):
            loss_axes.legend(frameon=False)
        plots.plot_curves(rate_axes, [rates], "learning rate")
        plots.plot_curves(speed_axes, [speeds], "images per second", y_from_zero=True)
        speed_axes.set_xlabel("optimizer step")
    return figure


class _ShownFigure(Figure):
    """A figure that a notebook shows without pyplot, whose figures would pile up."""

    def _repr_png_(self) -> bytes:
        content = io.BytesIO()
        self.savefig(content, format="png")
        return content.getvalue()


def _is_trajectory(images: Any) -> bool:
    # By its form, so that images are shown without loading diffusers.
    return isinstance(images, Sequence) and len(images) > 0 and all(hasattr(step, "x_0_hat") for step in images)


def _show_trajectory(steps: Sequence[TrajectoryStep], columns: int | None) -> Image.Image:
    chosen = [
        replace(step, x_t=pictured(step.x_t, step.value_range), x_0_hat=pictured(step.x_0_hat, step.value_range))
        for step in (steps[i] for i in figures.spread(len(steps), columns or figures.NUM_STRIP_COLUMNS))
    ]
    return figures.reverse_strip(chosen, max_images=MAX_TRAJECTORIES)


def _as_pil(images: Any, value_range: Any) -> list[Image.Image]:
    """Return images as PIL images.

    Raises:
        ValueError: When they are of no such form.
    """
    if isinstance(images, Image.Image):
        images = [images]
    elif isinstance(images, np.ndarray | Tensor):
        images = [images] if images.ndim == 3 else list(images)
    if not isinstance(images, list | tuple) or not images:
        raise ValueError(f"images must be PIL images, an array, a tensor or a trajectory, got {_kind(images)}")
    if all(isinstance(image, Image.Image) for image in images):
        if value_range is not None:
            raise ValueError(f"value_range must be left out for PIL images, got {value_range}")
        return list(images)
    if all(isinstance(image, np.ndarray) for image in images):
        images = [torch.from_numpy(np.array(image)).movedim(-1, 0) for image in images]  # (H, W, C) -> (C, H, W)
    if not all(isinstance(image, Tensor) for image in images):
        raise ValueError(f"images must be all PIL images, all arrays or all tensors, got {_kind(images)}")
    shapes = sorted({tuple(image.shape) for image in images})
    if len(shapes) > 1:
        raise ValueError(f"images must be of one shape, got {shapes}: show them one by one")
    return figures.to_pil(_in_unit_range(torch.stack(list(images)).detach().cpu(), value_range))


def _in_unit_range(values: Tensor, value_range: Any) -> Tensor:
    """Return values as shares of their range, which `to_pil` clips.

    Raises:
        ValueError: When values lie outside of a range that nobody gave, or the range is none.
    """
    if value_range is None:
        low, high = values.aminmax() if values.numel() else (0, 0)
        if values.is_floating_point() and not -_ROUNDING <= low <= high <= 1 + _ROUNDING and low <= high:
            raise ValueError(
                f"images must be in [0, 1], got values from {low:.3g} to {high:.3g}: give value_range=(-1, 1) for x_0 "
                "and x_t, or the range that they have"
            )
        return values
    is_pair = isinstance(value_range, Sequence) and len(value_range) == 2
    if not is_pair or not value_range[0] < value_range[1] or not values.is_floating_point():
        raise ValueError(
            f"value_range must be two rising numbers, for values of a floating type, got {value_range} for "
            f"{values.dtype}"
        )
    low, high = value_range
    return (values.double() - low) / (high - low)


def _kind(images: Any) -> str:
    if isinstance(images, list | tuple):
        return f"a {type(images).__name__} of {', '.join(sorted({type(i).__name__ for i in images})) or 'nothing'}"
    return type(images).__name__
