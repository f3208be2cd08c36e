"""Schedulers by name: exact lists of timesteps, clipping, and which of them can sample a model."""

import diffusers
import numpy as np
import pytest
import torch

from hf_ddpm import DDPMPipeline, DDPMScheduler
from hf_ddpm.names import UNTUNED_SCHEDULERS
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.sampling.loading import load_for_sampling
from hf_ddpm.solvers import Sampler, default_scheduler, default_steps, named_scheduler
from hf_ddpm.timesteps import SearchedTimesteps


@pytest.mark.parametrize("name", UNTUNED_SCHEDULERS)
@pytest.mark.filterwarnings("ignore:sampling starts")
def test_named_scheduler_visits_n_distinct_timesteps(name):
    config = DDPMScheduler(timestep_spacing="trailing", beta_schedule="squaredcos_cap_v2").config
    for n in (1, 2, 3, 20, 61, 103, 501, 600, 999, 1000):
        scheduler = named_scheduler(name, config, n)
        scheduler.set_timesteps(n)
        timesteps = scheduler.timesteps.tolist()
        assert len(set(timesteps)) == len(timesteps) == n
        assert timesteps[0] == 999
        assert timesteps[-1] >= 0


def run(scheduler, steps):
    scheduler.set_timesteps(steps)
    x = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for t in scheduler.timesteps:
        x = scheduler.step(torch.tanh(x), t, x).prev_sample
    return x


@pytest.mark.slow
def test_named_scheduler_ddim_equals_diffusers_ddim_where_its_steps_are_right():
    """Trailing steps that divide T evenly are t - T // n apart, as diffusers' DDIM assumes of all."""
    config = DDPMScheduler(clip_sample=False, timestep_spacing="trailing").config
    ddim = diffusers.DDIMScheduler.from_config(config)
    torch.testing.assert_close(run(named_scheduler("ddim", config, 1000), 1000), run(ddim, 1000), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["ddim", "dpmsolver++", "unipc"])
def test_solvers_keep_an_imperfect_noise_predictor_in_range(name):
    """At the end of a cosine schedule x_0_hat magnifies an error of eps_hat 20,000 times: the solvers must clip it."""
    config = DDPMScheduler(beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing").config
    reference = DDPMScheduler.from_config(config)
    scheduler, mu = named_scheduler(name, config, 20), 0.5
    scheduler.set_timesteps(20)
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for t in scheduler.timesteps:
        abar = reference.alpha_bar[t].float()
        # A network knows no inputs far from those of training.
        seen = x.clamp(-5, 5)
        eps_hat = (seen - abar.sqrt() * mu) / (1 - abar).sqrt() + 0.02 * torch.sin(7 * seen)
        x = scheduler.step(eps_hat, t, x).prev_sample
    assert (x - mu).abs().max() < 0.1


@pytest.mark.parametrize("name", ["ddim", "dpmsolver++", "unipc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_solvers_clip_to_the_same_bits_as_thresholding_up_to_1(name, dtype, prediction_type, monkeypatch):
    config = DDPMScheduler(
        beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing", prediction_type=prediction_type
    ).config

    def final(scheduler):
        scheduler.set_timesteps(20)
        x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=dtype)
        for t in scheduler.timesteps:
            x = scheduler.step(2 * torch.tanh(3 * x), t, x).prev_sample
        return x

    ours = named_scheduler(name, config, 20)
    by_threshold = final(type(ours).from_config(ours.config))
    assert not torch.equal(by_threshold, final(named_scheduler(name, {**config, "clip_sample": False}, 20)))
    monkeypatch.delattr(torch, "quantile")
    assert torch.equal(final(ours), by_threshold)


@pytest.mark.parametrize("name", ["ddim", "dpmsolver++", "unipc"])
def test_solvers_prefer_the_models_thresholding_to_clip_sample(name):
    config = DDPMScheduler(thresholding=True, sample_max_value=2.0, clip_sample=True).config
    scheduler = named_scheduler(name, config, 20)
    assert scheduler.config.sample_max_value == 2
    x_0_hat = 3 * torch.randn(4, 1, 8, 8)
    expected = DDPMScheduler.from_config(config)._threshold_sample(x_0_hat)
    assert torch.equal(scheduler._threshold_sample(x_0_hat), expected)
    assert not torch.equal(expected, x_0_hat.clamp(-1, 1))


def test_named_scheduler_leaves_unknown_noise_schedules_to_ddpm():
    config = DDPMScheduler(beta_schedule="sigmoid").config
    assert default_scheduler(config) == "ddpm"
    with pytest.raises(ValueError, match=r"must be 'ddpm' for the noise schedule 'sigmoid', got 'unipc'"):
        named_scheduler("unipc", config)


def test_named_scheduler_leaves_betas_that_end_in_1_to_ddpm():
    betas = [*np.linspace(0.1, 0.9, 9), 1.0]
    config = DDPMScheduler(10, trained_betas=betas, prediction_type="v_prediction", timestep_spacing="trailing").config
    assert default_scheduler(config) == "ddpm"
    with pytest.raises(ValueError, match=r"must be 'ddpm' for .* with trained_betas that end in 1, got 'unipc'"):
        named_scheduler("unipc", config, 5)


def test_default_scheduler_prefers_searched_timesteps_that_are_better_than_unipc():
    config = DDPMScheduler(beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing").config
    rows = [
        SearchedTimesteps(solver, (*range(n - 1, -1, -1),), 0.1, 0.2, 1, 0, 50, unipc_distance=unipc)
        for solver, n, unipc in (
            *(("dpmsolver++", 5, 0.11), ("ddim", 8, 0.11), ("dpmsolver++", 20, None)),
            ("dpmsolver++", 21, 0.09),
        )
    ]
    searched = {row.key: row for row in rows}
    names = {n: default_scheduler(config, searched, n) for n in (None, 5, 8, 20, 21)}
    assert names == {None: "dpmsolver++", 5: "dpmsolver++", 8: "unipc", 20: "dpmsolver++", 21: "unipc"}
    assert default_scheduler(config) == "unipc"


def test_default_steps_are_20_of_solvers_and_all_of_ddpm():
    names = ("ddpm", "unipc", "dpmsolver++", "ddim")
    assert [default_steps(name, 1000) for name in names] == [1000, 20, 20, 20]
    assert {default_steps(name, 7) for name in names} == {7}


@pytest.mark.parametrize("name", ["ddim", "dpmsolver++", "unipc"])
@pytest.mark.parametrize(
    "setting",
    [
        {"final_sigmas_type": "sigma_min"},
        {"use_karras_sigmas": True},
        {"predict_x0": False},
        {"solver_order": 3},
        {"solver_type": "bh1"},
        {"algorithm_type": "sde-dpmsolver++"},
    ],
    ids=str,
)
def test_named_scheduler_ignores_solver_settings_of_the_saved_scheduler(name, setting):
    config = DDPMScheduler(beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing").config
    clean, other = named_scheduler(name, config, 5), named_scheduler(name, {**config, **setting}, 5)
    assert dict(other.config) == dict(clean.config)
    other.set_timesteps(5)
    assert other.sigmas[-1] == 0


@pytest.mark.parametrize("name", ["ddim", "dpmsolver++", "unipc"])
def test_solvers_clip_to_the_models_clip_sample_range(name):
    config = DDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample_range=2.0).config
    scheduler = named_scheduler(name, config, 1)
    scheduler.set_timesteps(1)
    x = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    assert scheduler.step(-x, scheduler.timesteps[0], x).prev_sample.abs().max() == 2


def test_named_scheduler_samples_step_denoisers_by_ddpm_alone():
    config = DDPMScheduler(prediction_type="previous_sample").config
    assert type(named_scheduler("ddpm", config)) is DDPMScheduler
    with pytest.raises(ValueError, match=r"scheduler must be 'ddpm' for a step denoiser.*got 'ddim'"):
        named_scheduler("ddim", config)
    with pytest.raises(ValueError, match=r"scheduler must be one of ddpm, .*, unipc, lcm, got 'euler'"):
        named_scheduler("euler", config)


def trained(tmp_path, make_unet):
    """Save a model as a run does, and return its folder."""
    scheduler = DDPMScheduler(30, beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing")
    DDPMPipeline(make_unet(), scheduler).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def images_of(pipeline, **arguments):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(2, torch.Generator().manual_seed(0), output_type="np", **arguments).images


@pytest.mark.slow
def test_use_samples_as_the_commands_do(make_unet, tmp_path):
    folder = trained(tmp_path, make_unet)
    pipeline = DDPMPipeline.from_pretrained(folder)
    as_stock = images_of(pipeline)
    assert np.array_equal(as_stock, images_of(diffusers.DDPMPipeline.from_pretrained(folder), num_inference_steps=30))
    own = pipeline.scheduler
    assert pipeline.use() is pipeline
    assert pipeline.sampler == Sampler("unipc", 20)
    by_command, steps = load_for_sampling(str(folder), device="cpu")
    assert np.array_equal(images_of(pipeline), images_of(by_command, num_inference_steps=steps))
    # A call's own number of steps goes before, and the scheduler that is saved stays.
    by_name, _ = load_for_sampling(str(folder), "unipc", 5, device="cpu")
    assert np.array_equal(images_of(pipeline, num_inference_steps=5), images_of(by_name, num_inference_steps=5))
    assert pipeline.scheduler is own
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(own.config)  # as users of diffusers do, and it counts
    by_ddim = images_of(pipeline, num_inference_steps=5)
    assert not np.array_equal(by_ddim, images_of(by_name, num_inference_steps=5))
    assert pipeline.sampler is None
    pipeline.scheduler = own
    assert np.array_equal(images_of(pipeline.use("ddpm")), as_stock)


@pytest.mark.slow
def test_sampler_that_was_chosen_is_kept_beside_a_model_that_stays_stock(make_unet, tmp_path):
    pipeline = DDPMPipeline.from_pretrained(trained(tmp_path, make_unet))
    pipeline.use("dpmsolver++", 7).save_pretrained(tmp_path / "chosen")
    loaded = DDPMPipeline.from_pretrained(tmp_path / "chosen")
    stock = diffusers.DDPMPipeline.from_pretrained(tmp_path / "chosen")
    assert np.array_equal(images_of(loaded), images_of(stock, num_inference_steps=30))
    assert loaded.use().sampler == Sampler("dpmsolver++", 7)
    by_command, steps = load_for_sampling(str(tmp_path / "chosen"), device="cpu")
    assert steps == 7
    assert np.array_equal(images_of(loaded), images_of(by_command, num_inference_steps=7))
    assert loaded.use("unipc").sampler == Sampler("unipc", 20)
    assert loaded.use(num_inference_steps=3).sampler == Sampler("dpmsolver++", 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("euler",), "scheduler must be one of ddpm, ddim, .* got 'euler'"),
        (("unipc", 31), r"num_inference_steps must be in \[1, 30\], got 31"),
        (("unipc", 0), r"num_inference_steps must be in \[1, 30\], got 0"),
    ],
)
def test_use_rejects_what_cannot_sample(make_unet, arguments, message):
    scheduler = DDPMScheduler(30, beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing")
    pipeline = DDPMPipeline(make_unet(), scheduler)
    with pytest.raises(ValueError, match=message):
        pipeline.use(*arguments)
    assert pipeline.sampler is None


def test_damaged_sampler_is_named(make_unet, tmp_path):
    folder = trained(tmp_path, make_unet)
    for content in ('{"scheduler": "euler", "num_inference_steps": 3}', '{"scheduler": "unipc"}', "{"):
        (folder / "scheduler/sampler.json").write_text(content)
        with pytest.raises(UsageError, match=r"sampler\.json cannot be read: .*remove it"):
            DDPMPipeline.from_pretrained(folder)
