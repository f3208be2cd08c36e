"""Noise -> images: equality with stock, and what stock does not have."""

import math
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from hf_ddpm import DDPMPipeline, DDPMScheduler
from hf_ddpm.names import UNTUNED_SCHEDULERS
from hf_ddpm.solvers import named_scheduler


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def quiet(pipeline) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def pipeline(make_unet):
    return quiet(
        DDPMPipeline(make_unet(), DDPMScheduler(50, beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing"))
    )


@pytest.mark.slow
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_images_equal_stock_bit_for_bit(make_unet, prediction_type):
    # A tenth of the usual steps of the chain, whose noise is so much larger that its end is the usual one.
    stock_scheduler = diffusers.DDPMScheduler(100, 1e-3, 0.2, prediction_type=prediction_type)
    blocks = {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"], "add_attention": False}
    unet = make_unet(block_out_channels=[8], **blocks)
    stock = quiet(diffusers.DDPMPipeline(unet, stock_scheduler))
    ours = quiet(DDPMPipeline(unet, stock_scheduler))
    assert type(ours.scheduler) is DDPMScheduler
    for steps in (100, 20) if prediction_type == "epsilon" else (20,):
        images = [
            p(batch_size=2, generator=seeded(), num_inference_steps=steps, output_type="np").images
            for p in (stock, ours)
        ]
        assert np.array_equal(*images)


def test_stock_scheduler_with_positional_arguments_keeps_its_steps(make_unet):
    scheduler = diffusers.DDPMScheduler(100, 0.001, 0.2)
    assert len(DDPMPipeline(make_unet(), scheduler).scheduler) == 100


@pytest.mark.slow
def test_default_takes_all_steps_of_training(pipeline):
    pipeline(generator=seeded(), output_type="pt")
    assert len(pipeline.scheduler.timesteps) == 50


@pytest.mark.slow
def test_image_of_a_generator_does_not_depend_on_its_batch(pipeline):
    together = pipeline(batch_size=3, generator=[seeded(i) for i in range(3)], output_type="pt").images
    for i in range(3):
        alone = pipeline(generator=[seeded(i)], output_type="pt").images
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-4)
    assert not torch.allclose(together[0], together[1], atol=0.1)


@pytest.mark.slow
def test_latents_are_the_initial_noise(pipeline):
    generator = seeded()
    noise = torch.randn(2, 3, 8, 8, generator=generator)
    given = pipeline(batch_size=2, latents=noise, generator=generator, output_type="pt").images
    drawn = pipeline(batch_size=2, generator=seeded(), output_type="pt").images
    assert torch.equal(given, drawn)


@pytest.mark.slow
def test_trajectory_goes_from_noise_to_image(pipeline):
    output = pipeline(batch_size=2, generator=seeded(), num_inference_steps=10, output_type="pt", trajectory=True)
    steps = output.trajectory
    assert [s.timestep for s in steps] == pipeline.scheduler.timesteps.tolist()
    assert torch.equal(steps[0].x_t, torch.randn(2, 3, 8, 8, generator=seeded()))
    torch.testing.assert_close((steps[-1].x_0_hat / 2 + 0.5).clamp(0, 1), output.images)
    chosen = pipeline(
        batch_size=2,
        generator=seeded(),
        num_inference_steps=10,
        output_type="pt",
        trajectory=[0, -1],
        return_dict=False,
    )
    assert torch.equal(chosen[0], output.images)
    assert [s.timestep for s in chosen[1]] == [steps[0].timestep, steps[-1].timestep]
    assert torch.equal(chosen[1][1].x_t, steps[-1].x_t)


def test_trajectory_estimates_x_0_for_other_schedulers(make_unet):
    scheduler = diffusers.DPMSolverMultistepScheduler(solver_order=1, timestep_spacing="linspace")
    output = quiet(DDPMPipeline(make_unet(), scheduler))(
        generator=seeded(), num_inference_steps=5, output_type="pt", trajectory=True
    )
    last = output.trajectory[-1]
    # A first-order solver ends at its last estimate of x_0.
    torch.testing.assert_close((last.x_0_hat / 2 + 0.5).clamp(0, 1), output.images, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", UNTUNED_SCHEDULERS)
@pytest.mark.parametrize("settings", [{"clip_sample": True}, {"clip_sample": False}, {"thresholding": True}], ids=str)
def test_trajectory_clips_x_0_hat_where_the_scheduler_does(make_unet, name, settings):
    """The network's first x_0_hat is about 1e4 large, at a noise of alpha_bar = 2e-9."""
    ours = DDPMScheduler(beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing", **settings)
    pipeline = quiet(DDPMPipeline(make_unet(), ours))
    pipeline.scheduler = named_scheduler(name, ours.config, 4)
    output: Any = pipeline(2, seeded(), num_inference_steps=4, output_type="pt", trajectory=True)
    largest = max(float(step.x_0_hat.abs().max()) for step in output.trajectory)
    assert (largest > 100) if settings == {"clip_sample": False} else (largest == 1)
    if name != "ddpm":
        first, scheduler = output.trajectory[0], named_scheduler(name, ours.config, 4)
        scheduler.set_timesteps(4)
        if scheduler.step_index is None:
            scheduler._init_step_index(scheduler.timesteps[0])
        with torch.no_grad():
            network_output = pipeline.unet(first.x_t, first.timestep).sample
        x_0_hat = scheduler.convert_model_output(network_output, sample=first.x_t)
        torch.testing.assert_close(first.x_0_hat, x_0_hat, rtol=1e-3, atol=1e-5)


def test_trajectory_does_not_clip_for_a_solver_that_does_not(make_unet):
    """A solver that was made from a model's config holds clip_sample there, and does not know it."""
    config = DDPMScheduler(beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing").config
    pipeline = quiet(DDPMPipeline(make_unet(), diffusers.DPMSolverMultistepScheduler.from_config(config)))
    assert pipeline.scheduler.config["clip_sample"]
    output = pipeline(1, seeded(), num_inference_steps=4, output_type="pt", trajectory=[0])
    assert output.trajectory[0].x_0_hat.abs().max() > 100


def test_callback_sees_and_replaces_each_step(pipeline):
    seen = []

    def callback(pipe, i, t, tensors):
        seen.append((i, int(t)))
        return {"latents": torch.zeros_like(tensors["latents"])} if i == 4 else None

    output = pipeline(generator=seeded(), num_inference_steps=5, output_type="pt", callback_on_step_end=callback)
    assert seen == list(enumerate(pipeline.scheduler.timesteps.tolist()))
    assert torch.equal(output.images, torch.full((1, 3, 8, 8), 0.5))


def test_callback_can_end_the_call(pipeline):
    seen = []

    def callback(pipe, i, t, tensors):
        seen.append((i, pipe.num_timesteps))
        pipe._interrupt = i == 1

    pipeline(num_inference_steps=5, output_type="pt", callback_on_step_end=callback)
    assert seen == [(0, 5), (1, 5)]


@pytest.mark.slow
def test_classes_condition_the_image(make_unet):
    pipeline = quiet(DDPMPipeline(make_unet(num_class_embeds=3), DDPMScheduler(20, beta_schedule="squaredcos_cap_v2")))
    generators = [seeded(0), seeded(0)]
    a, b = pipeline(batch_size=2, generator=generators, class_labels=[0, 2], output_type="pt").images
    assert not torch.allclose(a, b, atol=1e-3)
    both = pipeline(batch_size=2, generator=[seeded(0), seeded(0)], class_labels=0, output_type="pt").images
    torch.testing.assert_close(both[1], a, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_images_have_the_mode_of_their_channels(make_unet, channels, mode):
    pipeline = quiet(DDPMPipeline(make_unet(channels), DDPMScheduler(10, beta_schedule="squaredcos_cap_v2")))
    image = pipeline(generator=seeded()).images[0]
    array = pipeline(generator=seeded(), output_type="np").images[0]
    assert (image.mode, image.size) == (mode, (8, 8))
    assert np.array_equal(np.asarray(image).reshape(array.shape), (array * 255).round().astype(np.uint8))


@pytest.mark.slow
def test_half_precision_network(make_unet):
    scheduler = DDPMScheduler(20, beta_schedule="squaredcos_cap_v2")
    full = quiet(DDPMPipeline(make_unet(), scheduler))(generator=seeded(), output_type="np").images
    pipeline = quiet(DDPMPipeline(make_unet().to(torch.bfloat16), scheduler))
    half = pipeline(generator=seeded(), output_type="np", trajectory=[0])
    assert half.trajectory[0].x_t.dtype == torch.float32
    assert half.images.dtype == np.float32
    assert np.abs(half.images - full).mean() < 0.05
    assert pipeline(generator=seeded()).images[0].mode == "RGB"


@pytest.mark.parametrize(
    "name",
    [
        "DDIM",
        "DPMSolverMultistep",
        "UniPCMultistep",
        "EulerDiscrete",
        "EulerAncestralDiscrete",
        "PNDM",
        "HeunDiscrete",
    ],
)
def test_pipeline_samples_with_other_schedulers(make_unet, name):
    config = DDPMScheduler(prediction_type="v_prediction", timestep_spacing="linspace").config
    scheduler = getattr(diffusers, f"{name}Scheduler").from_config(config)
    pipeline = quiet(DDPMPipeline(make_unet(), scheduler))
    assert pipeline.scheduler is scheduler
    images = pipeline(batch_size=2, generator=seeded(), num_inference_steps=10, output_type="pt").images
    assert images.isfinite().all()
    assert images.std() > 0.01


def test_flow_matching_equals_stock(make_unet):
    unet: Any = make_unet()
    scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler(50)
    settings = {"batch_size": 2, "num_inference_steps": 10, "output_type": "np"}
    ours = quiet(DDPMPipeline(unet, scheduler))
    images = ours(generator=seeded(), **settings).images
    assert np.array_equal(
        images, quiet(diffusers.DDPMPipeline(unet, scheduler))(generator=seeded(), **settings).images
    )
    with pytest.raises(ValueError, match="trajectory must be False for FlowMatchEulerDiscreteScheduler"):
        ours(trajectory=True, num_inference_steps=10)


@pytest.mark.parametrize("name", ["DDIM", "DPMSolverMultistep", "EulerDiscrete", "HeunDiscrete"])
def test_schedulers_with_input_scaling_end_at_the_image(name):
    """The network always predicts the image, so every scheduler ends there, whatever its scale of the noise."""
    config = DDPMScheduler(prediction_type="sample", timestep_spacing="linspace", clip_sample=False).config
    scheduler = getattr(diffusers, f"{name}Scheduler").from_config(config)
    mu, seen = 0.25, []

    class Oracle(diffusers.UNet2DModel):
        def forward(self, sample, timestep, class_labels=None, return_dict=True):
            seen.append(sample.std().item())
            return diffusers.models.unets.unet_2d.UNet2DOutput(sample=torch.full_like(sample, mu))

    unet = Oracle(
        sample_size=32, block_out_channels=(4,), norm_num_groups=4, down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",), attention_head_dim=4,
    )  # fmt: skip
    images = quiet(DDPMPipeline(unet, scheduler))(generator=seeded(), num_inference_steps=20, output_type="pt").images
    torch.testing.assert_close(images, torch.full_like(images, mu / 2 + 0.5), rtol=0, atol=0.02)
    # What the network sees at first has the variance of x_T.
    assert seen[0] == pytest.approx(1, abs=0.05)


def test_learned_variance_is_dropped_for_schedulers_without_it(make_unet):
    unet = make_unet(1, out_channels=2)
    config = DDPMScheduler(variance_type="learned_range", timestep_spacing="linspace").config
    for scheduler in (DDPMScheduler.from_config(config), diffusers.DDIMScheduler.from_config(config)):
        images = quiet(DDPMPipeline(unet, scheduler))(
            generator=seeded(), num_inference_steps=10, output_type="pt"
        ).images
        assert images.shape == (1, 1, 8, 8)


def test_step_denoiser_alone_is_a_function_of_the_noise(make_unet):
    scheduler = DDPMScheduler(20, beta_schedule="squaredcos_cap_v2", prediction_type="previous_sample")
    unet = make_unet()
    pipeline = quiet(DDPMPipeline(unet, scheduler))
    noise = torch.randn(1, 3, 8, 8)
    image = pipeline(latents=noise, output_type="pt", deterministic=True).images
    x = noise
    with torch.no_grad():
        for t in reversed(range(20)):
            x = unet(x, t).sample
    torch.testing.assert_close(image, (x / 2 + 0.5).clamp(0, 1))


def test_replaced_scheduler_is_saved_under_the_name_of_stock(pipeline):
    pipeline.scheduler = DDPMScheduler(prediction_type="sample")
    assert pipeline.config["scheduler"] == ("diffusers", "DDPMScheduler")
    pipeline.scheduler = diffusers.DDIMScheduler()
    assert pipeline.config["scheduler"] == ("diffusers", "DDIMScheduler")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"num_inference_steps": 51}, r"num_inference_steps must be in \[1, 50\], got 51"),
        ({"batch_size": 2, "generator": [torch.Generator()]}, "must hold batch_size = 2, got 1"),
        ({"output_type": "latent"}, "output_type must be 'pil', 'np' or 'pt', got 'latent'"),
        ({"latents": torch.zeros(1, 1, 8, 8)}, r"latents must have the shape \(1, 3, 8, 8\), got \(1, 1, 8, 8\)"),
        ({"class_labels": 1}, "class_labels must be None: the model was trained without classes"),
        ({"trajectory": [50]}, r"trajectory must hold indices of the 50 steps, got \[50\]"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "may hold 'latents', got .*noise"),
    ],
)
def test_call_rejects_invalid_arguments(pipeline, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipeline(**arguments)


def test_call_rejects_arguments_that_do_not_fit_the_model(make_unet):
    conditional = quiet(DDPMPipeline(make_unet(num_class_embeds=3), DDPMScheduler()))
    with pytest.raises(ValueError, match="class_labels must be given: the model is conditioned on 3 classes"):
        conditional()
    with pytest.raises(ValueError, match=r"class_labels must be in \[0, 3\), got 3"):
        conditional(class_labels=3)
    with pytest.raises(ValueError, match="must hold batch_size = 2 labels, got 3"):
        conditional(batch_size=2, class_labels=[0, 1, 2])
    with pytest.raises(ValueError, match="PIL has no image of 2 channels"):
        quiet(DDPMPipeline(make_unet(2), DDPMScheduler()))()
    with pytest.raises(ValueError, match="deterministic is for hf_ddpm's DDPMScheduler, got DDIMScheduler"):
        quiet(DDPMPipeline(make_unet(), diffusers.DDIMScheduler()))(deterministic=True)


def test_call_rejects_more_steps_than_were_trained(make_unet):
    pipeline = quiet(DDPMPipeline(make_unet(), diffusers.DPMSolverMultistepScheduler()))
    with pytest.raises(ValueError, match=r"num_inference_steps must be in \[1, 1000\], got 1001"):
        pipeline(num_inference_steps=1001)


@pytest.mark.parametrize("spacing", ["linspace", "leading"])
def test_call_rejects_repeated_noise_levels(make_unet, spacing):
    scheduler = diffusers.DPMSolverMultistepScheduler(20, timestep_spacing=spacing)
    pipeline = DDPMPipeline(make_unet(), scheduler)
    with pytest.raises(ValueError, match=r"a noise level twice for .*=20.* use fewer steps"):
        pipeline()


@pytest.mark.parametrize("name", ["use_karras_sigmas", "use_exponential_sigmas", "solver_order"])
def test_call_accepts_repeated_timesteps_at_different_noise_levels(make_unet, name):
    config = DDPMScheduler(50, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction").config
    changed = {**config, "timestep_spacing": "linspace", name: 1 if name == "solver_order" else True}
    scheduler = diffusers.DPMSolverMultistepScheduler.from_config(changed)
    steps = 50 if name == "solver_order" else 20
    scheduler.set_timesteps(steps)
    assert len(scheduler.timesteps.unique()) < steps
    pipeline = quiet(DDPMPipeline(make_unet(), scheduler))
    assert pipeline(generator=seeded(), num_inference_steps=steps, output_type="pt").images.isfinite().all()


def test_images_that_are_not_finite_are_no_pil_images(make_unet):
    unet = make_unet()
    with torch.no_grad():
        unet.conv_out.bias.fill_(math.nan)
    pipeline = DDPMPipeline(unet, DDPMScheduler(4, beta_schedule="squaredcos_cap_v2"))
    pipeline.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match="images must be finite for output_type='pil'"):
        pipeline()
    assert pipeline(output_type="pt").images.isnan().all()


def test_call_rejects_negative_timesteps(make_unet):
    scheduler = diffusers.DDIMScheduler(timestep_spacing="trailing")
    with pytest.raises(ValueError, match="DDIMScheduler gave timestep -1 for num_inference_steps=61"):
        quiet(DDPMPipeline(make_unet(), scheduler))(num_inference_steps=61)
