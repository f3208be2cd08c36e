"""Pictures show what they are given, where they say, at the size they say."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hf_ddpm import figures
from hf_ddpm.scheduler import DDPMScheduler


def plain(value, size=(8, 8), mode="L") -> Image.Image:
    return Image.new(mode, size, value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_to_images_rounds_to_the_nearest_value(channels: int, mode: str, dtype: torch.dtype):
    x = torch.tensor([-1.5, -1, 0, 1, 2]).to(dtype).reshape(1, 1, 1, 5).expand(2, channels, 1, 5)
    images = figures.to_images(x)
    assert [(image.mode, image.size) for image in images] == [(mode, (5, 1))] * 2
    values = np.asarray(images[1]).reshape(5, channels)
    assert (values == np.array([0, 0, 128, 255, 255])[:, None]).all()


def test_to_images_gives_back_every_8_bit_value():
    levels = torch.arange(256)
    image = figures.to_images((levels / 127.5 - 1).reshape(1, 1, 16, 16))[0]
    assert np.array_equal(np.asarray(image).ravel(), levels.numpy())


def test_to_images_refuses_other_shapes():
    for shape in ((2, 2, 4, 4), (3, 4, 4)):
        with pytest.raises(ValueError, match=r"\(B, C, H, W\)"):
            figures.to_images(torch.zeros(shape))


@pytest.mark.parametrize(("count", "columns", "shape"), [(1, None, (1, 1)), (7, None, (3, 3)), (6, 2, (2, 3))])
def test_grid_puts_image_i_in_its_row_and_column(count: int, columns: int | None, shape: tuple[int, int]):
    sheet = figures.grid([plain(i) for i in range(count)], columns, min_side=20, padding=3)
    side = 24  # the least multiple of 8 from 20 on
    assert sheet.size == (shape[0] * (side + 3) - 3, shape[1] * (side + 3) - 3)
    array = np.asarray(sheet).copy()
    for i in range(count):
        row, column = divmod(i, shape[0])
        tile = array[row * (side + 3) :, column * (side + 3) :][:side, :side]
        assert (tile == i).all()
        tile[:] = 255
    assert (array == 255).all()


def test_grid_enlarges_pixels_by_a_whole_factor():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    sheet = np.asarray(figures.grid([Image.fromarray(pixels)], min_side=16))
    assert np.array_equal(sheet, pixels.repeat(4, axis=0).repeat(4, axis=1))
    assert np.array_equal(np.asarray(figures.grid([Image.fromarray(pixels)], min_side=1)), pixels)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_grid_keeps_the_mode(mode: str):
    assert figures.grid([plain(0, mode=mode)] * 3).mode == mode


@pytest.mark.parametrize(
    "images", [[], [plain(0), plain(0, (4, 4))], [plain(0), plain(0, mode="RGB")], [plain(0, mode="1")]]
)
def test_grid_refuses_images_that_differ(images: list[Image.Image]):
    with pytest.raises(ValueError, match="of one size and of one mode"):
        figures.grid(images)


def test_strip_holds_each_image_once_and_clips_no_label():
    rows = [[plain((10 * i + j, 0, 255), mode="RGB") for j in range(3)] for i in range(2)]
    labels = ["x_0", "t = 0", "a label that is much wider than its image"]
    sheet = np.asarray(figures.strip(rows, labels, ["a long row label", "b"], min_side=64))
    for i in range(2):
        places = [np.argwhere((sheet == (10 * i + j, 0, 255)).all(axis=2)) for j in range(3)]
        assert [len(place) for place in places] == [64 * 64] * 3
        assert len({place[:, 0].min() for place in places}) == 1
    edges = np.concatenate([sheet[:2].ravel(), sheet[-2:].ravel(), sheet[:, :2].ravel(), sheet[:, -2:].ravel()])
    assert (edges == 255).all()
    # Between the columns' labels there is a gap, from the top to the first row of images.
    gaps = (sheet[: np.argwhere((sheet == (0, 0, 255)).all(axis=2))[0, 0]] == 255).all(axis=(0, 2))
    assert (np.convolve(gaps, np.ones(6), "valid") == 6).sum() > 0


def test_strip_refuses_labels_that_do_not_match():
    rows = [[plain(0), plain(0)]]
    with pytest.raises(ValueError, match="per column label"):
        figures.strip(rows, ["x_0"])
    with pytest.raises(ValueError, match="one label per row"):
        figures.strip(rows, ["x_0", "t = 0"], ["a", "b"])


class ChainOf:
    """A stand-in with Eq. 2 and one beta for all steps."""

    def __init__(self, beta: float, steps: int = 50):
        self.beta, self.config = beta, {"num_train_timesteps": steps}

    def forward_step(self, previous_samples, noise, timesteps):
        return math.sqrt(1 - self.beta) * previous_samples + math.sqrt(self.beta) * noise


def test_a_chain_without_noise_stays_at_the_image():
    x_0 = torch.rand(3, 4, 4)
    chain = figures.forward_chain(x_0, ChainOf(0.0), [-1, 0, 20, 49], torch.Generator())
    assert torch.equal(chain, x_0.expand(4, 3, 4, 4))


def test_a_strong_chain_ends_in_standard_noise():
    chain = figures.forward_chain(torch.ones(1, 64, 64), DDPMScheduler(), [-1, 999], torch.Generator().manual_seed(0))
    assert torch.equal(chain[0], torch.ones(1, 64, 64))
    assert chain[1].mean().abs() < 0.06  # 4 standard errors, 1 / 64 each
    assert (chain[1].var() - 1).abs() < 0.09  # 4 of sqrt(2) / 64


def test_the_chain_is_one_trajectory_of_equation_2():
    def chain(timesteps: list[int]) -> torch.Tensor:
        return figures.forward_chain(torch.ones(1, 8, 8), DDPMScheduler(), timesteps, torch.Generator().manual_seed(3))

    steps = chain(list(range(-1, 30)))
    assert torch.equal(steps[[30, 0, 6]], chain([29, -1, 5]))
    scheduler = DDPMScheduler()
    noise = torch.randn((1, 1, 8, 8), generator=torch.Generator().manual_seed(3))
    assert torch.equal(steps[1:2], scheduler.forward_step(steps[:1], noise, 0))
    # Neighbors share their noise: with the closed form's independent draws, steps would differ by sqrt(2 (1 - abar)).
    assert (steps[30] - steps[29]).std() < 1.2 * scheduler.betas[29].sqrt()


@pytest.mark.parametrize("timesteps", [[], [-2], [50]])
def test_forward_chain_refuses_timesteps_out_of_range(timesteps: list[int]):
    with pytest.raises(ValueError, match=r"timesteps must be in \[-1, 50\)"):
        figures.forward_chain(torch.zeros(1, 2, 2), ChainOf(0.1), timesteps, torch.Generator())


def frames_of(path: Path) -> tuple[list[np.ndarray], list[int], int]:
    with Image.open(path) as gif:
        frames, durations = [], []
        for i in range(gif.n_frames):
            gif.seek(i)
            durations.append(gif.info["duration"])
            frames.append(np.asarray(gif.convert("RGB")))
        return frames, durations, gif.info["loop"]


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_gif_shows_each_frame_exactly_and_holds_the_last(tmp_path: Path, mode: str):
    # 256 colors at most, so that nothing needs to be reduced.
    array = np.random.default_rng(0).integers(0, 256, (5, 8, 8, {"L": 1, "RGB": 3, "RGBA": 4}[mode]), dtype=np.uint8)
    array[..., 3:] = 255
    images = [Image.fromarray(frame[:, :, 0] if mode == "L" else frame) for frame in array]
    figures.chain_gif(images, tmp_path / "chain.gif", duration_ms=40, hold_ms=900)
    frames, durations, loop = frames_of(tmp_path / "chain.gif")
    assert durations == [40] * 4 + [900]
    assert loop == 0
    for frame, expected in zip(frames, array, strict=True):
        assert np.array_equal(frame, np.broadcast_to(expected[:, :, :3], (8, 8, 3)))


def test_gif_of_one_frame_and_of_equal_frames(tmp_path: Path):
    figures.chain_gif([plain(7)], tmp_path / "one.gif")
    with Image.open(tmp_path / "one.gif") as gif:
        assert gif.size == (8, 8)
    figures.chain_gif([plain(7), plain(9), plain(9)], tmp_path / "equal.gif", 50, 500)
    assert frames_of(tmp_path / "equal.gif")[1] == [50, 550]


@pytest.mark.parametrize("duration", [0, 10, 55])
def test_gif_refuses_durations_that_it_cannot_say(tmp_path: Path, duration: int):
    with pytest.raises(ValueError, match="duration_ms must be a multiple of 10"):
        figures.chain_gif([plain(0)], tmp_path / "chain.gif", duration)


def draw(tmp_path: Path, series, log_y=False) -> np.ndarray:
    figures.curve(tmp_path / "curve.png", series, "optimizer step", "loss", log_y)
    with Image.open(tmp_path / "curve.png") as image:
        assert (image.size, image.format) == ((900, 450), "PNG")
        return np.asarray(image.convert("RGB")).astype(int)


def dark_blue(array: np.ndarray) -> np.ndarray:
    """Rows and columns of the pixels in the color of a line that is drawn alone."""
    return np.argwhere(np.abs(array - figures._COLORS[1]).sum(axis=2) < 20)


@pytest.mark.parametrize("log_y", [False, True])
@pytest.mark.parametrize(
    "y",
    [[0.5], [3.0] * 4, [1e-30, 1e30], [0.1, math.nan, math.inf, 0.3], [1e-9, 2e-9], [5, 5 + 1e-13], [1e7, 3e7, 2e7]],
)
def test_curve_survives_and_shows_something(tmp_path: Path, y: list[float], log_y: bool):
    array = draw(tmp_path, {"loss": (range(1, len(y) + 1), y)}, log_y)
    assert len(dark_blue(array)) > 10
    border = np.concatenate([array[:2].ravel(), array[-2:].ravel(), array[:, :2].ravel(), array[:, -2:].ravel()])
    assert (border == 255).all()  # nothing is clipped


def test_curve_of_nothing_says_so(tmp_path: Path):
    for series in ({}, {"loss": ([], [])}, {"loss": ([1, 2], [math.nan, -math.inf])}):
        assert len(dark_blue(draw(tmp_path, series))) == 0
    assert len(dark_blue(draw(tmp_path, {"loss": ([1, 2], [0.0, -1.0])}, log_y=True))) == 0


def test_curve_puts_values_where_they_belong(tmp_path: Path):
    x = np.linspace(0, 100, 400)
    pixels = dark_blue(draw(tmp_path, {"loss": (x, 3 * x + 7)}))
    v, u = pixels[:, 0], pixels[:, 1]
    assert np.corrcoef(u, -v)[0, 1] > 0.9999
    pixels = dark_blue(draw(tmp_path, {"loss": (x, np.exp(-x / 9))}, log_y=True))
    assert np.corrcoef(pixels[:, 1], pixels[:, 0])[0, 1] > 0.9999


def test_curve_leaves_a_gap_where_there_is_no_value(tmp_path: Path):
    y = np.ones(101)
    y[40:61] = math.nan
    columns = np.unique(dark_blue(draw(tmp_path, {"loss": (np.arange(101), y)}))[:, 1])
    assert np.diff(columns).max() > 0.2 * (columns[-1] - columns[0])


def test_curve_refuses_x_and_y_of_different_lengths(tmp_path: Path):
    with pytest.raises(ValueError, match="as many x as y, got 1 and 2"):
        draw(tmp_path, {"loss": ([1], [1, 2])})


@pytest.mark.parametrize(("lo", "hi"), [(0, 1), (-3, 17), (1e-7, 3e-7), (0, 800_000), (0.95, 1.05), (99, 1e5)])
def test_ticks_are_round_and_cover_the_axis(lo: float, hi: float):
    ticks = figures._linear_ticks(lo, hi, 8)
    values = np.array(list(ticks))
    assert 4 <= len(values) <= 9
    assert lo - 1e-9 * (hi - lo) <= values.min() <= values.max() <= hi + 1e-9 * (hi - lo)
    assert len(set(ticks.values())) == len(ticks)
    step = np.diff(values).mean()
    assert np.isclose(step / 10.0 ** np.floor(np.log10(step) + 1e-9), [1, 2, 5]).any()
    for value, label in ticks.items():
        assert float(label.replace(",", "")) == pytest.approx(value, abs=1e-6 * (hi - lo))
