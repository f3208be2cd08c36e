"""Tests of hf_ddpm.figures: pictures show what they are given, at the position and size that is documented."""

from __future__ import annotations

import io
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
def test_to_pil_rounds_to_the_nearest_value(channels: int, mode: str, dtype: torch.dtype):
    values = torch.tensor([-0.25, 0, 0.5, 1, 1.5, math.nan]).to(dtype).reshape(1, 1, 1, 6).expand(2, channels, 1, 6)
    images = figures.to_pil(values)
    assert [(image.mode, image.size) for image in images] == [(mode, (6, 1))] * 2
    pixels = np.asarray(images[1]).reshape(6, channels)
    assert (pixels == np.array([0, 0, 128, 255, 255, 0])[:, None]).all()


def test_to_pil_keeps_every_8_bit_value():
    levels = torch.arange(256).reshape(1, 1, 16, 16)
    for images in (levels / 255, levels.to(torch.uint8), (levels / 255).numpy(), levels.to(torch.uint8).numpy()):
        assert np.array_equal(np.asarray(figures.to_pil(images)[0]), levels[0, 0].numpy())


def test_to_pil_takes_arrays_that_cannot_be_written_to():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3), dtype=np.uint8)
    pixels.flags.writeable = False
    images = figures.to_pil(pixels.transpose(0, 3, 1, 2))
    assert np.array_equal(np.stack([np.asarray(image) for image in images]), pixels)


def test_to_pil_refuses_other_shapes_and_types():
    for shape in ((2, 2, 4, 4), (3, 4, 4)):
        with pytest.raises(ValueError, match=r"\(N, C, H, W\)"):
            figures.to_pil(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"uint8 or floating-point, got torch\.int64"):
        figures.to_pil(torch.zeros(1, 1, 2, 2, dtype=torch.int64))


def test_png_bytes_are_a_png_file_of_the_image():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    with Image.open(io.BytesIO(figures.png_bytes(Image.fromarray(pixels)))) as image:
        assert image.format == "PNG"
        assert np.array_equal(np.asarray(image), pixels)


@pytest.mark.parametrize(("count", "columns", "shape"), [(1, None, (1, 1)), (7, None, (3, 3)), (6, 2, (2, 3))])
def test_grid_puts_image_i_in_its_row_and_column(count: int, columns: int | None, shape: tuple[int, int]):
    sheet = figures.grid([plain(i, (24, 24)) for i in range(count)], columns)
    side, step = 72, 74  # the smallest multiple of 24 from 64 on, and two pixels of padding
    assert sheet.size == (shape[0] * step - 2, shape[1] * step - 2)
    array = np.asarray(sheet).copy()
    for i in range(count):
        row, column = divmod(i, shape[0])
        tile = array[row * step :, column * step :][:side, :side]
        assert (tile == i).all()
        tile[:] = 255
    assert (array == 255).all()


def test_grid_enlarges_pixels_by_a_whole_factor():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    sheet = np.asarray(figures.grid([Image.fromarray(pixels)]))
    assert np.array_equal(sheet, pixels.repeat(13, axis=0).repeat(13, axis=1))
    large = pixels.repeat(20, axis=0).repeat(20, axis=1)
    assert np.array_equal(np.asarray(figures.grid([Image.fromarray(large)])), large)


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
    sheet = np.asarray(figures.strip(rows, labels, ["a long row label", "b"]))
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


def test_forward_chain_without_noise_stays_at_the_image():
    x_0 = torch.rand(3, 4, 4)
    chain = figures.forward_chain(x_0, ChainOf(0.0), [-1, 0, 20, 49], torch.Generator())
    assert torch.equal(chain, x_0.expand(4, 3, 4, 4))


@pytest.mark.slow
def test_forward_chain_ends_in_standard_noise():
    chain = figures.forward_chain(torch.ones(1, 64, 64), DDPMScheduler(), [-1, 999], torch.Generator().manual_seed(0))
    assert torch.equal(chain[0], torch.ones(1, 64, 64))
    assert chain[1].mean().abs() < 0.06  # 4 standard errors, 1 / 64 each
    assert (chain[1].var() - 1).abs() < 0.09  # 4 of sqrt(2) / 64


def test_forward_chain_is_one_trajectory_of_equation_2():
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
def test_chain_gif_shows_each_frame_exactly_and_holds_the_last(tmp_path: Path, mode: str):
    # 256 colors at most, so that nothing needs to be reduced.
    array = np.random.default_rng(0).integers(0, 256, (5, 8, 8, {"L": 1, "RGB": 3, "RGBA": 4}[mode]), dtype=np.uint8)
    array[..., 3:] = 255
    images = [Image.fromarray(frame[:, :, 0] if mode == "L" else frame) for frame in array]
    figures.chain_gif(images, tmp_path / "chain.gif")
    frames, durations, loop = frames_of(tmp_path / "chain.gif")
    assert durations == [60] * 4 + [1500]
    assert loop == 0
    for frame, expected in zip(frames, array, strict=True):
        assert np.array_equal(frame, np.broadcast_to(expected[:, :, :3], (8, 8, 3)))


def test_chain_gif_of_one_frame_and_of_equal_frames(tmp_path: Path):
    figures.chain_gif([plain(7)], tmp_path / "one.gif")
    with Image.open(tmp_path / "one.gif") as gif:
        assert gif.size == (8, 8)
    figures.chain_gif([plain(7), plain(9), plain(9)], tmp_path / "equal.gif")
    assert frames_of(tmp_path / "equal.gif")[1] == [60, 1560]
