"""show and plot_metrics: what they take, what is seen on the picture, what they refuse."""

import io
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from hf_ddpm import UsageError, figures, plot_metrics, plots, show
from hf_ddpm.pipeline import TrajectoryStep
from hf_ddpm.value_range import ValueRange, pictured

VALUES = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
PICTURES = figures.to_pil(VALUES)


def same(a: Image.Image, b: Image.Image) -> bool:
    return a.mode == b.mode and np.array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize(
    "images",
    [
        PICTURES,
        tuple(PICTURES),
        VALUES,
        [*VALUES],
        VALUES.movedim(1, -1).numpy(),
        [*VALUES.movedim(1, -1).numpy()],
        (VALUES * 255).round().to(torch.uint8),
    ],
    ids=["pil", "tuple", "pt", "tensors", "np", "arrays", "uint8"],
)
def test_show_takes_every_form_of_a_pipelines_images(images):
    assert same(show(images), figures.grid(PICTURES))
    assert same(show(images, columns=4), figures.grid(PICTURES, 4))


def test_show_takes_one_image():
    for image in (PICTURES[0], VALUES[0], VALUES[0].movedim(0, -1).numpy()):
        assert same(show(image), figures.grid(PICTURES[:1]))


def test_show_maps_value_range_to_black_and_white():
    x_t = torch.tensor([-3.0, -1, 0, 1, 3]).expand(1, 1, 64, 5)
    shown = np.asarray(show(x_t, value_range=(-1, 1)))
    assert [*shown[0, ::13]] == [0, 0, 128, 255, 255]


def test_show_puts_labels_above_columns():
    labels = ["a", "b"]
    assert same(show(PICTURES, labels=labels), figures.strip([PICTURES[:2], PICTURES[2:]], labels))


def steps_of(count, batch_size):
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(count, 2, batch_size, 1, 8, 8, generator=generator)
    return [TrajectoryStep(count - 1 - i, *pair) for i, pair in enumerate(states)]


def test_show_of_a_trajectory_has_rows_of_x_t_and_x_0_hat():
    steps = steps_of(3, 2)
    rows = [[figures.to_pil(s.x_t / 2 + 0.5)[i] for s in steps] for i in (0, 1)]
    x_0_rows = [[figures.to_pil(s.x_0_hat / 2 + 0.5)[i] for s in steps] for i in (0, 1)]
    names = ["x_t", "x_0_hat"] * 2
    expected = figures.strip([rows[0], x_0_rows[0], rows[1], x_0_rows[1]], ["t = 2", "t = 1", "t = 0"], names)
    assert same(show(steps), expected)


def test_show_of_a_long_trajectory_is_even_and_of_few_images():
    steps = steps_of(101, 6)
    first = [TrajectoryStep(s.timestep, s.x_t[:4], s.x_0_hat[:4]) for s in steps[::10]]
    assert same(show(steps), show(first))
    assert same(show(steps, columns=2), show([first[0], first[-1]]))


@pytest.mark.parametrize("channels", [2, 5])
def test_show_of_a_trajectory_of_arrays_shows_what_other_pictures_of_the_model_show(channels):
    x_t, x_0_hat = torch.randn(2, 3, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    for shown in ((1,), (1, 0, 1), None):
        values = ValueRange(0, 1, "float32", shown)
        chosen = [TrajectoryStep(9, pictured(x_t, values), pictured(x_0_hat, values))]
        assert same(show([TrajectoryStep(9, x_t, x_0_hat, values)]), show(chosen))


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        ([], {}, "got a list of nothing"),
        ("photos", {}, "must be PIL images, an array, a tensor or a trajectory, got str"),
        ([PICTURES[0], VALUES[0]], {}, "all arrays or all tensors, got a list of Image, Tensor"),
        ([VALUES[0], VALUES[0, :, :4]], {}, r"of one shape, got \[\(3, 4, 8\), \(3, 8, 8\)\]"),
        (VALUES[:, :2], {}, r"C in \[1, 3, 4\]"),
        (VALUES[0, 0], {}, r"\(N, C, H, W\)"),
        (2 * VALUES - 1, {}, r"in \[0, 1\], got values from -0\.998 to 1: give value_range=\(-1, 1\)"),
        (VALUES, {"value_range": (1, 0)}, "two rising numbers"),
        (VALUES, {"value_range": 255}, "two rising numbers"),
        ((VALUES * 255).byte(), {"value_range": (0, 255)}, "floating type"),
        (PICTURES, {"value_range": (0, 1)}, "left out for PIL images"),
        (PICTURES, {"columns": 0}, "columns must be a whole number of at least 1, got 0"),
        (PICTURES, {"columns": 2, "labels": ["a", "b"]}, "columns must be left out with labels"),
        (PICTURES, {"labels": ["a", "b", "c"]}, "an image per column label"),
        (PICTURES, {"labels": []}, "an image per column label"),
        (steps_of(2, 1), {"labels": ["a", "b"]}, "left out for a trajectory"),
        ([PICTURES[0], PICTURES[1].resize((4, 4))], {}, "of one size"),
    ],
)
def test_show_refuses_what_it_cannot_show(images, options, message):
    with pytest.raises(UsageError, match=message):
        show(images, **options)


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_run(folder):
    lines = [{"step": s, "loss": 1 / s, "lr": 1e-3 * s, "images_per_second": 100.0 + s} for s in range(10, 60, 10)]
    lines[2]["loss"] = None  # every step of it was skipped
    write_lines(folder / "metrics.jsonl", lines)
    return lines


def drawn(axes) -> dict:
    return {line.get_label(): np.column_stack(line.get_data()) for line in axes.get_lines()}


def test_plot_metrics_draws_what_the_run_logged(tmp_path):
    lines = write_run(tmp_path)
    figure = plot_metrics(tmp_path)
    loss, rate, speed = figure.axes
    finite = [line for line in lines if line["loss"] is not None]
    assert np.allclose(drawn(loss)["loss as logged"], [(line["step"], line["loss"]) for line in finite])
    assert np.allclose(drawn(rate)["learning rate"], [(line["step"], line["lr"]) for line in lines])
    assert np.allclose(drawn(speed)["speed"], [(line["step"], line["images_per_second"]) for line in lines])
    assert loss.get_yscale() == "log"
    assert speed.get_ylim()[0] == 0
    assert loss.get_legend() is None


def test_plot_metrics_adds_the_held_out_loss(tmp_path):
    write_run(tmp_path)
    write_lines(tmp_path / "eval.jsonl", [{"step": 20, "val_loss": 0.5}, {"step": 30, "val_loss": None}])
    loss = plot_metrics(str(tmp_path)).axes[0]
    assert np.allclose(drawn(loss)["on held-out images"], [(20, 0.5)])
    assert loss.get_legend() is not None


def test_plot_metrics_is_shown_by_a_notebook_and_opens_no_window(tmp_path):
    write_run(tmp_path)
    with Image.open(io.BytesIO(plot_metrics(tmp_path)._repr_png_())) as picture:
        assert picture.size == (750, 750)
    from matplotlib import _pylab_helpers

    assert not _pylab_helpers.Gcf.get_all_fig_managers()


def test_plot_metrics_refuses_a_folder_without_metrics(tmp_path):
    with pytest.raises(UsageError, match=r"must be the output folder of a run, got .*no lines of metrics\.jsonl"):
        plot_metrics(tmp_path)


def test_loss_curves_have_a_centered_mean_of_many_values():
    records = [{"step": step, "loss": math.exp(-step / 50)} for step in range(1, 101)]
    raw, mean = plots.loss_curves(records)
    assert raw.is_background
    # The geometric mean of an exponential over a centered window is the exponential in its middle.
    assert np.allclose(mean.y, np.exp(-np.array(mean.x) / 50))
    assert len(plots.loss_curves([{"step": 1, "loss": None}])[0].x) == 0
