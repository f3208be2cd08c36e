"""Inversion undoes DDIM, and what lies between two noises."""

import math
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DOutput
from PIL import Image

from hf_ddpm import DDPMInpaintPipeline, DDPMPipeline, DDPMScheduler
from hf_ddpm.image_inputs import images_to_tensor, masks_to_tensor
from hf_ddpm.inversion import interpolate, invert, reconstruct, reconstruction_error, slerp
from hf_ddpm.solvers import Sampler
from tests.support.gaussian import gaussian_network, smooth_covariance
from tests.support.networks import smallest_unet_config


def pipeline_of(network, **settings) -> Any:
    scheduler = DDPMScheduler(
        **{"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "trailing", "clip_sample": False, **settings}
    )
    pipeline = DDPMPipeline(network, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def gaussian():
    return pipeline_of(
        gaussian_network(smooth_covariance(4), DDPMScheduler(beta_schedule="squaredcos_cap_v2").alpha_bar)
    )


@pytest.fixture
def images():
    values = torch.randn(2, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return ((values @ torch.linalg.cholesky(smooth_covariance(4)).T) / 2 + 0.5).clamp(0, 1).view(2, 1, 4, 4)


class ZeroNetwork(diffusers.UNet2DModel):
    def forward(self, sample: Any, timestep: Any, class_labels: Any = None, return_dict: bool = True) -> Any:
        return UNet2DOutput(sample=torch.zeros_like(sample))


@pytest.mark.parametrize("num_iterations", [1, 3])
def test_inversion_is_exact_where_the_noise_does_not_depend_on_x(images, num_iterations):
    pipeline = pipeline_of(ZeroNetwork(**smallest_unet_config(channels=1, sample_size=4)))
    latents = invert(pipeline, images, 5, num_iterations=num_iterations)
    # With eps_hat = 0 each step scales x alone.
    alpha_bar_T = pipeline.scheduler.alpha_bar[-1]
    expected = (images.float() * 2 - 1) * alpha_bar_T.sqrt()
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(reconstruct(pipeline, latents, 5, output_type="pt"), images.float(), rtol=0, atol=1e-3)


@pytest.mark.slow
def test_error_of_reconstruction_falls_with_steps_and_with_iterations(gaussian, images):
    errors = {
        (steps, iterations): float(reconstruction_error(gaussian, images, steps, num_iterations=iterations).max())
        for steps, iterations in [(10, 1), (40, 1), (160, 1), (10, 3), (10, 40), (160, 5)]
    }
    assert errors[10, 1] > 2 * errors[40, 1] > 4 * errors[160, 1]
    assert errors[10, 40] < errors[10, 3] < errors[10, 1]
    assert errors[160, 5] < 1e-3


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
def test_prediction_types_of_one_network_give_one_noise(gaussian, images, prediction_type):
    network = gaussian_network(gaussian.unet.covariance, gaussian.unet.alpha_bar, prediction_type)
    other = pipeline_of(network, prediction_type=prediction_type)
    latents = [invert(pipeline, images, 10, num_iterations=2) for pipeline in (gaussian, other)]
    torch.testing.assert_close(*latents, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("clip_sample", [True, False])
def test_converged_iterations_solve_the_equation_of_each_step(clip_sample):
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(**smallest_unet_config(channels=3)).eval()
    with torch.no_grad():
        unet.conv_out.weight *= 0.01  # so that the iterations converge
    pipeline = pipeline_of(unet, clip_sample=clip_sample, beta_schedule="linear")
    given = np.random.default_rng(0).uniform(0.3, 0.7, (1, 8, 8, 3))
    few, many = (float(reconstruction_error(pipeline, given, 20, num_iterations=count)) for count in (1, 8))
    assert many < few
    assert many < 5e-3


def test_pipeline_keeps_its_own_sampler_and_may_be_one_that_edits(gaussian, images):
    inpaint = DDPMInpaintPipeline.from_pipe(gaussian)
    inpaint.use("unipc", 7)
    latents = invert(inpaint, images, 5)
    assert inpaint.sampler == Sampler("unipc", 7)
    assert isinstance(inpaint.scheduler, DDPMScheduler)
    reconstructed = reconstruct(inpaint, latents, 5, output_type="pt")
    assert torch.equal(reconstructed, reconstruct(gaussian, latents, 5, output_type="pt"))
    gaussian.use("ddim", 5)
    torch.testing.assert_close(gaussian(2, latents=latents, output_type="pt").images, reconstructed)


def test_interpolation_begins_and_ends_at_images_and_seeds(gaussian, images):
    settings = {"num_inference_steps": 40, "output_type": "pt"}
    way = interpolate(gaussian, images[0], 5, num_images=4, **settings)
    assert way.shape == (4, 1, 4, 4)
    torch.testing.assert_close(way[:1], images[:1].float(), rtol=0, atol=0.05)
    noise = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(way[3:], reconstruct(gaussian, noise, 40, output_type="pt"))
    steps = (way[1:] - way[:-1]).flatten(1).norm(dim=1)
    assert steps.max() < (way[3] - way[0]).norm()
    with pytest.raises(ValueError, match="num_images must be a whole number of at least 2, got 1"):
        interpolate(gaussian, 0, 1, num_images=1)


def test_inversion_refuses_what_ddim_cannot_do(gaussian, images):
    with pytest.raises(ValueError, match="num_iterations must be a whole number of at least 1, got 0"):
        invert(gaussian, images, 5, num_iterations=0)
    with pytest.raises(ValueError, match="image must be 4 pixels high and 4 wide"):
        invert(gaussian, np.zeros((8, 8), dtype=np.uint8), 5)
    step_denoiser = pipeline_of(gaussian.unet, prediction_type="previous_sample")
    with pytest.raises(ValueError, match="scheduler must be 'ddpm' for a step denoiser"):
        invert(step_denoiser, images, 5)


def test_slerp_follows_the_arc():
    x, y = torch.eye(2, dtype=torch.float64)[:, None]
    for f in (0.1, 0.5, 0.75):
        angle = f * math.pi / 2
        expected = torch.tensor([[math.cos(angle), math.sin(angle)]], dtype=torch.float64)
        torch.testing.assert_close(slerp(x, y, f), expected)
    noises = torch.randn(2, 3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    start, end = (each / each.flatten(1).norm(dim=1).view(-1, 1, 1, 1) * 8 for each in noises)
    assert torch.equal(slerp(start, end, 0), start)
    assert torch.equal(slerp(start, end, 1), end)
    between = slerp(start, end, 0.3)
    assert between.dtype == torch.float32
    torch.testing.assert_close(between.flatten(1).norm(dim=1), torch.full((3,), 8.0))
    torch.testing.assert_close(between, slerp(end, start, 0.7))


@pytest.mark.parametrize("offset", [0, 1e-9, 1e-5])
def test_slerp_joins_parallel_vectors_by_a_line(offset):
    x = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    y = 2 * x + offset
    torch.testing.assert_close(slerp(x, y, 0.25), 0.75 * x + 0.25 * y, rtol=0, atol=1e-9)


def test_slerp_refuses_what_has_no_arc():
    x = torch.ones(1, 4)
    with pytest.raises(ValueError, match="start and end must not be opposite"):
        slerp(x, -x, 0.5)
    with pytest.raises(ValueError, match=r"fraction must be in \[0, 1\], got 2"):
        slerp(x, x, 2)
    with pytest.raises(ValueError, match="start and end must have one shape"):
        slerp(x, x[:, :2], 0.5)


GRAY = np.arange(64, dtype=np.uint8).reshape(8, 8)
COLOR = np.stack([GRAY, GRAY[::-1], GRAY.T], axis=2)


def _name(value: Any) -> str:
    """Return what a parameter is called, the same in each process."""
    return value.mode if isinstance(value, Image.Image) else type(value).__name__


@pytest.mark.parametrize(
    ("image", "channels", "expected"),
    [
        (Image.fromarray(GRAY), 1, GRAY[:, :, None]),
        (Image.fromarray(GRAY), 3, np.repeat(GRAY[:, :, None], 3, axis=2)),
        (Image.fromarray(GRAY).convert("RGB"), 1, GRAY[:, :, None]),
        (Image.fromarray(COLOR).convert("RGBA"), 3, COLOR),
        (Image.fromarray(COLOR), 4, np.dstack([COLOR, np.full((8, 8), 255)])),
        (Image.fromarray(GRAY).convert("P"), 1, GRAY[:, :, None]),
        (GRAY, 1, GRAY[:, :, None]),
        (COLOR / 255, 3, COLOR),
        (torch.from_numpy(COLOR).permute(2, 0, 1), 3, COLOR),
        (torch.from_numpy(COLOR).permute(2, 0, 1)[None] / 255, 3, COLOR),
        (torch.from_numpy(GRAY), 1, GRAY[:, :, None]),
    ],
    ids=_name,
)
def test_images_are_taken_in_every_form_that_loses_nothing(image, channels, expected):
    tensor = images_to_tensor(image, channels, 8, 8)
    assert tensor.dtype == torch.float32
    assert torch.equal((tensor * 255).round()[0], torch.from_numpy(expected.astype(np.float32)).permute(2, 0, 1))


@pytest.mark.parametrize(
    ("image", "channels", "message"),
    [
        (Image.fromarray(COLOR), 1, "image must be gray for a model of 1 channel, got colors: use image.convert"),
        (Image.fromarray(COLOR).convert("LA"), 1, None),
        (Image.new("RGBA", (8, 8)), 3, "image must be opaque for a model of 3 channels, got transparent pixels"),
        (Image.new("I;16", (8, 8)), 1, "image must be gray or RGB of 8 bits .* got mode 'I;16'"),
        (Image.new("CMYK", (8, 8)), 3, "got mode 'CMYK'"),
        (COLOR, 1, "image must have the model's number of channels, 1, got 3"),
        (GRAY.astype(np.int64), 1, "image must be uint8, or floating-point in .*, got torch.int64"),
        (np.full((8, 8), np.nan), 1, r"image must have values in \[0, 1\], got nan"),
        (torch.zeros(1, 1, 1, 8, 8), 1, "image must be PIL images, arrays .* got Tensor of shape"),
    ],
    ids=_name,
)
def test_images_that_would_lose_something_are_refused(image, channels, message):
    if message is None:
        assert images_to_tensor(image, channels, 8, 8).shape == (1, 1, 8, 8)
        return
    with pytest.raises(ValueError, match=message):
        images_to_tensor(image, channels, 8, 8)


def test_masks_are_white_from_the_middle_on():
    soft = np.array([[0, 0.49], [0.5, 1]])
    expected = torch.from_numpy(soft >= 0.5)
    forms = [soft, (soft * 255).round().astype(np.uint8), Image.fromarray((soft * 255).round().astype(np.uint8))]
    forms += [soft >= 0.5, torch.from_numpy(soft >= 0.5), [soft >= 0.5, soft >= 0.5], Image.fromarray(soft >= 0.5)]
    for mask in forms:
        masks = masks_to_tensor(mask, 2, 2, 2)
        assert masks.shape == (2, 1, 2, 2)
        assert torch.equal(masks[0, 0], expected)
        assert torch.equal(masks[1, 0], expected)
