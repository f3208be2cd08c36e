"""Editing with a model that was tuned for few steps: by its own sampler, or refused before any work."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import LCMScheduler

from hf_ddpm import DDPMImg2ImgPipeline, DDPMInpaintPipeline, DDPMPipeline, DDPMScheduler
from hf_ddpm.inversion import interpolate, invert, reconstruct, reconstruction_error
from hf_ddpm.measurements import downsample
from hf_ddpm.restoration import restore
from hf_ddpm.solvers import named_scheduler
from tests.support.gaussian import gaussian_network, smooth_covariance
from tests.support.tuned import TIMESTEPS, T, tuned_pipeline

MASK = np.zeros((8, 8), dtype=bool)
MASK[2:7, 3:] = True


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(count=2):
    return torch.rand(count, 3, 8, 8, generator=seeded(9))


def steps_of(pipeline, *arguments, **settings):
    """The scheduler and the timesteps of a call, and its images."""
    seen = []
    settings |= {"generator": seeded(), "output_type": "pt"}

    def note(pipeline, i, t, tensors):
        seen.append((type(pipeline.scheduler).__name__, int(t)))

    images = pipeline(*arguments, **settings, callback_on_step_end=note).images
    return seen, images


@pytest.mark.parametrize("method", ["posterior", "replace"])
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_known_pixels_stay_bit_for_bit_and_others_change(method, strength):
    inpaint, given = tuned_pipeline(DDPMInpaintPipeline), pictures()
    seen, images = steps_of(inpaint, given, MASK, strength=strength, method=method)
    assert seen == [("LCMScheduler", t) for t in TIMESTEPS[-round(4 * strength) :]]
    assert torch.equal(images[:, :, ~MASK], given[:, :, ~MASK])
    assert not torch.equal(images[:, :, MASK], given[:, :, MASK])
    assert inpaint.sampler is None
    assert type(inpaint.scheduler) is LCMScheduler


def test_strength_takes_the_last_steps_as_the_scheduler_defines_them():
    variation, given = tuned_pipeline(DDPMImg2ImgPipeline), pictures(1)
    seen, images = steps_of(variation, given, 0.5)
    assert [t for _, t in seen] == TIMESTEPS[2:]
    alpha_bar, generator = DDPMScheduler(T, beta_schedule="squaredcos_cap_v2").alpha_bar.float(), seeded()
    x_0 = given * 2 - 1
    for t in TIMESTEPS[2:]:  # each step noises an image, and goes to the next one
        x_t = alpha_bar[t].sqrt() * x_0 + (1 - alpha_bar[t]).sqrt() * torch.randn(given.shape, generator=generator)
        with torch.no_grad():
            v = variation.unet(x_t, t).sample
        x_0_hat = (alpha_bar[t].sqrt() * x_t - (1 - alpha_bar[t]).sqrt() * v).clamp(-1, 1)
        scaled = 10.0 * t
        x_0 = scaled / (scaled**2 + 0.25) ** 0.5 * x_0_hat + 0.25 / (scaled**2 + 0.25) * x_t
    torch.testing.assert_close(images, (x_0 / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", [None, "posterior", "replace"])
def test_image_of_a_generator_does_not_depend_on_its_batch(method):
    given = pictures(3)
    settings = {} if method is None else {"mask_image": MASK, "method": method}
    pipeline = tuned_pipeline(DDPMImg2ImgPipeline if method is None else DDPMInpaintPipeline)
    together = pipeline(given, generator=[seeded(i) for i in range(3)], output_type="pt", **settings).images
    for i in range(3):
        alone = pipeline(given[i], generator=[seeded(i)], output_type="pt", **settings).images
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-4)


def test_fills_of_posterior_are_nearer_to_the_conditional_distribution_than_those_of_replace():
    """A consistent network for a normal distribution names the end of each path exactly."""
    covariance, unknown = smooth_covariance(6), torch.zeros(6, 6, dtype=torch.bool)
    unknown[1:5, 2:] = True
    m = unknown.flatten()
    network = gaussian_network(covariance, DDPMScheduler(beta_schedule="squaredcos_cap_v2").alpha_bar, "v_prediction")
    network.is_consistent = True
    settings = {"unet": network, "num_train_timesteps": 1000, "clip_sample": False}
    inpaint = tuned_pipeline(DDPMInpaintPipeline, **settings)
    image = torch.linalg.cholesky(covariance) @ torch.randn(36, generator=seeded(1), dtype=torch.float64)
    image = image.clamp(-1, 1)
    mean = covariance[m][:, ~m] @ covariance[~m][:, ~m].inverse() @ image[~m]
    given = (image / 2 + 0.5).float().view(1, 1, 6, 6).expand(200, -1, -1, -1)
    biases = {}
    for method in ("posterior", "replace"):
        fills = inpaint(given, unknown, generator=seeded(), method=method, output_type="pt").images * 2 - 1
        biases[method] = float((fills.flatten(1)[:, m].mean(dim=0) - mean).square().mean().sqrt())
    assert biases["posterior"] < biases["replace"] / 1.5


def test_measurements_without_noise_are_restored():
    y = torch.rand(2, 3, 4, 4, generator=seeded(1))
    pipeline = tuned_pipeline(clip_sample=False)
    images = restore(pipeline, y, downsample(2), generator=seeded(), output_type="pt")
    # Values that are clipped to [0, 1] in the end fit no more.
    fits = ((images > 0) & (images < 1)).float()
    whole = downsample(2)(fits) == 1
    assert whole.any()
    torch.testing.assert_close(downsample(2)(images)[whole], y[whole], rtol=0, atol=1e-2)


def test_x_0_hat_of_a_trajectory_is_clipped_as_the_step_clips_it():
    output = tuned_pipeline()(2, seeded(), 4, "pt", trajectory=True)
    assert [step.timestep for step in output.trajectory] == TIMESTEPS
    assert all(step.x_0_hat.abs().max() <= 1 for step in output.trajectory)
    last, scaled = output.trajectory[-1], 10.0 * TIMESTEPS[-1]
    x_0 = scaled / (scaled**2 + 0.25) ** 0.5 * last.x_0_hat + 0.25 / (scaled**2 + 0.25) * last.x_t
    torch.testing.assert_close(output.images, (x_0 / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-5)


REFUSED = [
    (lambda pipeline: invert(pipeline, pictures()), "DDIM can sample, got one that was tuned for few steps"),
    (lambda pipeline: reconstruct(pipeline, torch.zeros(1, 3, 8, 8)), "DDIM can sample, got one that was tuned"),
    (lambda pipeline: reconstruction_error(pipeline, pictures()), "DDIM can sample, got one that was tuned"),
    (lambda pipeline: interpolate(pipeline, 0, 1), "DDIM can sample, got one that was tuned for few steps"),
    (
        lambda pipeline: restore(pipeline, torch.rand(1, 3, 4, 4), downsample(2), noise_std=0.1),
        "noise_std must be 0 for a model that was tuned for few steps, got 0.1",
    ),
    (
        lambda pipeline: DDPMInpaintPipeline.from_pipe(pipeline)(pictures(), MASK, method="repaint"),
        "method must be 'posterior' or 'replace' for LCMScheduler, got 'repaint'",
    ),
    *[
        (lambda pipeline, name=name: pipeline.use(name), f"scheduler must be 'lcm' for a model .* got '{name}'")
        for name in ("ddpm", "ddim", "unipc")
    ],
]


@pytest.mark.parametrize(("action", "message"), REFUSED, ids=[str(i) for i in range(len(REFUSED))])
def test_what_makes_no_sense_is_refused_before_the_network_is_evaluated(action, message):
    pipeline = tuned_pipeline()
    pipeline.unet.register_forward_pre_hook(lambda *_: pytest.fail("the network was evaluated"))
    with pytest.raises(ValueError, match=f"{message}.* take the model before it was tuned$"):
        action(pipeline)
    assert pipeline.sampler is None


def test_lcm_is_refused_for_a_model_that_was_not_tuned():
    scheduler = DDPMScheduler(T, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    plain = DDPMPipeline(tuned_pipeline().unet, scheduler)
    for action in (lambda: plain.use("lcm"), lambda: named_scheduler("lcm", plain.scheduler.config)):
        with pytest.raises(ValueError, match=r"'lcm' must have a model that was tuned .* or tune the model by"):
            action()
