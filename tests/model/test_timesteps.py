"""Searched timesteps: which solvers take them, which are better; they are saved with a pipeline, and it uses them."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler

from hf_ddpm import DDPMPipeline, DDPMScheduler
from hf_ddpm.editing import first_index
from hf_ddpm.evaluation.anomaly import reconstruct
from hf_ddpm.evaluation.search import unsearched_timesteps
from hf_ddpm.runtime.files import weights_sha256
from hf_ddpm.sampling.loading import load_for_sampling
from hf_ddpm.sampling.sampler import seeded_generators
from hf_ddpm.solvers import named_scheduler
from hf_ddpm.timesteps import (
    FILE,
    SOLVERS,
    SearchedTimesteps,
    best_solver,
    read_searched,
    set_timesteps,
    solver_name,
    timesteps_even_in_log_sigma,
    write_searched,
)
from hf_ddpm.value_range import ValueRange
from tests.support.gaussian import gaussian_network

T = 100


@pytest.fixture
def model(make_unet, tmp_path):
    """A folder with a model."""
    scheduler = DDPMScheduler(
        T, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", timestep_spacing="trailing"
    )
    DDPMPipeline(make_unet(), scheduler).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def found(*timesteps, scheduler="dpmsolver++"):
    return SearchedTimesteps(scheduler, timesteps, 0.1, 0.2, num_images=2, seed=0, reference_steps=50)


@pytest.mark.slow
def test_pipeline_uses_searched_timesteps_for_their_number_of_steps(model):
    write_searched(model, [found(99, 70, 20), found(99, 60, 50, 9, scheduler="unipc")], weights_sha256(model))
    pipeline = DDPMPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    config = pipeline.scheduler.config
    pipeline.scheduler = named_scheduler("dpmsolver++", config)
    generators = seeded_generators([0], pipeline.device)
    images = pipeline(1, generators, num_inference_steps=3, output_type="pt").images
    assert pipeline.scheduler.timesteps.tolist() == [99, 70, 20]
    stock = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    stock.set_timesteps(timesteps=[99, 70, 20])
    x_t = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for t in stock.timesteps:
        with torch.no_grad():
            x_t = stock.step(pipeline.unet(x_t, t).sample, t, x_t).prev_sample
    assert torch.equal(images, (x_t / 2 + 0.5).clamp(0, 1))
    for scheduler, steps in (("dpmsolver++", 4), ("ddim", 3), ("unipc", 3), ("ddpm", 3)):
        pipeline.scheduler = named_scheduler(scheduler, config, steps)
        pipeline(num_inference_steps=steps)
        assert pipeline.scheduler.timesteps.tolist() == unsearched_timesteps(pipeline, scheduler, steps)
    pipeline.scheduler = named_scheduler("unipc", config, 4)
    pipeline(num_inference_steps=4)
    assert pipeline.scheduler.timesteps.tolist() == [99, 60, 50, 9]
    without, _ = load_for_sampling(str(model), "dpmsolver++", 3, uniform=True)
    without(num_inference_steps=3)
    assert without.scheduler.timesteps.tolist() == unsearched_timesteps(without, "dpmsolver++", 3)


def test_searched_timesteps_are_saved_and_ignored_for_other_weights(model, tmp_path, caplog):
    write_searched(model, [found(99, 50), found(99, 70, 20, scheduler="ddim")], weights_sha256(model))
    DDPMPipeline.from_pretrained(model).save_pretrained(tmp_path / "again")
    assert read_searched(tmp_path / "again") == read_searched(model)
    assert {("dpmsolver++", 2), ("ddim", 3)} == set(read_searched(model))
    pipeline = DDPMPipeline.from_pretrained(model)
    with torch.no_grad():
        pipeline.unet.conv_out.weight += 1
    pipeline.save_pretrained(tmp_path / "changed")
    assert not (tmp_path / "changed" / FILE).exists()
    assert "searched timesteps are not saved: they were found for other weights" in caplog.text
    assert DDPMPipeline.from_pretrained(model, unet=None).searched_timesteps == {}
    pipeline.unet.save_pretrained(model / "unet")
    assert read_searched(model) == {}
    assert "belongs to other weights and is not used: run `hf-ddpm schedule` again" in caplog.text
    (model / FILE).write_text("{")
    with pytest.raises(ValueError, match=r"searched_timesteps\.json cannot be read: .*: remove it"):
        DDPMPipeline.from_pretrained(model)


def test_solver_name_names_the_solvers_that_can_be_searched():
    config = DDPMScheduler(beta_schedule="squaredcos_cap_v2").config
    assert solver_name(DPMSolverMultistepScheduler.from_config(config)) == "dpmsolver++"
    assert solver_name(DPMSolverMultistepScheduler.from_config(config, solver_order=1)) == "ddim"
    assert solver_name(DPMSolverMultistepScheduler.from_config(config, solver_order=3)) is None
    assert solver_name(DPMSolverMultistepScheduler.from_config(config, algorithm_type="sde-dpmsolver++")) is None
    for own in ("karras_sigmas", "lu_lambdas", "exponential_sigmas", "beta_sigmas"):
        assert solver_name(DPMSolverMultistepScheduler.from_config(config, **{f"use_{own}": True})) is None
    assert solver_name(UniPCMultistepScheduler.from_config(config)) == "unipc"
    for other in ({"solver_order": 3}, {"predict_x0": False}, {"solver_type": "bh1"}, {"use_karras_sigmas": True}):
        assert solver_name(UniPCMultistepScheduler.from_config(config, **other)) is None
    for other in (DDIMScheduler, DDPMScheduler):
        assert solver_name(other.from_config(config)) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    {
        "both": ({"timesteps": [9, 1], "num_inference_steps": 3}, "without num_inference_steps, got 3 and 2"),
        "rising": ({"timesteps": [1, 9]}, r"must be integers that fall strictly in \[0, 100\), got \[1, 9\]"),
        "too large": ({"timesteps": [100, 9]}, "must be integers that fall strictly"),
        "negative": ({"timesteps": [9, -1]}, "must be integers that fall strictly"),
        "between": ({"timesteps": [9.5, 1]}, "must be integers that fall strictly"),
        "none": ({"timesteps": []}, "must be integers that fall strictly"),
    }.values(),
)
def test_pipeline_rejects_invalid_timesteps(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        DDPMPipeline.from_pretrained(model)(**arguments)


def test_pipeline_names_a_scheduler_that_accepts_no_timesteps(model):
    pipeline = DDPMPipeline.from_pretrained(model)
    config = pipeline.scheduler.config
    for scheduler in (
        DDIMScheduler.from_config(config),
        UniPCMultistepScheduler.from_config(config, use_karras_sigmas=True),
        DPMSolverMultistepScheduler.from_config(config, use_flow_sigmas=True),
    ):
        pipeline.scheduler = scheduler
        with pytest.raises(ValueError, match=f"timesteps must be None for {type(scheduler).__name__}"):
            pipeline(timesteps=[9, 1])


@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_solvers_end_at_x_0_and_take_their_own_timesteps_as_a_list(solver, schedule):
    """Reference, uniform and searched timesteps end at the noise level 0; a solver's own as a list change no bit."""
    config = DDPMScheduler(beta_schedule=schedule, timestep_spacing="trailing").config
    for n in (5, 61, 100):
        own, listed = named_scheduler(solver, config, n), named_scheduler(solver, config, n)
        own.set_timesteps(n)
        set_timesteps(listed, own.timesteps.tolist())
        assert torch.equal(listed.sigmas, own.sigmas)
        assert torch.equal(listed.timesteps, own.timesteps)
        assert listed.sigmas[-1] == 0
    set_timesteps(listed, [999, 500, 3])
    assert listed.timesteps.tolist() == [999, 500, 3]
    torch.testing.assert_close(listed.sigmas[:-1].double() ** -2, listed_snr(config, [999, 500, 3]), rtol=1e-3, atol=0)
    assert listed.sigmas[-1] == 0


def listed_snr(config, timesteps):
    return DDPMScheduler.from_config(config).snr(torch.tensor(timesteps))


def test_kernel_distance_goes_before_that_of_pixels():
    row = replace(found(99, 50), unipc_distance=0.05)
    assert row.is_better_than_uniform
    assert row.lead_over_unipc < 0
    kernels = {"kernel_distance": 0.3, "uniform_kernel_distance": 0.2, "unipc_kernel_distance": 0.4}
    measured = replace(row, network="efficientnet-lite0", **kernels)
    assert not measured.is_better_than_uniform
    assert measured.lead_over_unipc > 0
    unipc = replace(measured, scheduler="unipc", kernel_distance=0.35)
    assert best_solver({row.key: row}, 2) == "unipc"
    assert best_solver({row.key: measured, unipc.key: unipc}, 2) == "dpmsolver++"
    assert best_solver({row.key: measured, unipc.key: replace(unipc, kernel_distance=0.2)}, 2) == "unipc"
    assert best_solver({row.key: measured}, 3) == "unipc"
    # A lead of pixels, however large, does not compare with one of kernels.
    assert best_solver({row.key: replace(row, unipc_distance=9.0), unipc.key: unipc}, 2) == "unipc"


def test_timesteps_even_in_log_sigma_fall_from_the_last_to_the_first_each_once():
    alpha_bar = DDPMScheduler(beta_schedule="squaredcos_cap_v2").alpha_bar.tolist()
    for n in (1, 2, 3, 20, 400, 1000):
        timesteps = timesteps_even_in_log_sigma(alpha_bar, n)
        assert timesteps[0] == 999
        assert len(timesteps) == n
        assert all(t > u for t, u in pairwise(timesteps))
        assert timesteps[-1] == 0 or n == 1
    # With alpha_bar = 1, which float32 may make of it, and with none at the end.
    assert timesteps_even_in_log_sigma([1.0, 0.9, 0.5, 0.1, 0.0], 4) == [4, 3, 1, 0]
    log_sigma = [math.log((1 - alpha_bar[t]) / alpha_bar[t]) / 2 for t in timesteps_even_in_log_sigma(alpha_bar, 20)]
    steps = [a - b for a, b in pairwise(log_sigma[1:])]
    assert log_sigma[1] == pytest.approx(math.log(20), abs=0.05)
    # A timestep is 0.7 wide in log sigma at t = 0, and narrower everywhere else.
    assert max(steps) - min(steps) < 0.4


@pytest.mark.parametrize("scheduler", ["unipc", "dpmsolver++"])
def test_arrays_are_sampled_with_the_power_of_their_small_scales(scheduler: str) -> None:
    """Of a Gaussian field with an exact network, the variance of each component comes back in 20 steps."""
    std = torch.tensor([0.3, 0.2, 0.1, 0.05], dtype=torch.float64).repeat(4)
    ddpm = DDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False, prediction_type="v_prediction")
    network = gaussian_network(torch.diag(std**2), ddpm.alpha_bar, "v_prediction")
    pipeline = DDPMPipeline(network, named_scheduler(scheduler, ddpm.config, 20))
    pipeline.set_progress_bar_config(disable=True)
    x_T = torch.randn(1000, 1, 4, 4, generator=torch.Generator().manual_seed(0))

    def ratio() -> torch.Tensor:
        images = pipeline(1000, latents=x_T, num_inference_steps=20, output_type="pt").images
        assert isinstance(images, torch.Tensor)
        return (images * 2 - 1).reshape(-1, 4).std(dim=0) / std[:4]

    lost = ratio()[3]
    pipeline.value_range = ValueRange(-1, 1, "float32")
    # The standard error of 4,000 values is 1.1 %.
    assert (ratio() - 1).abs().max() < 0.04
    assert lost < 0.6
    # What anomalies are told from: the way back from some noise leaves such fields their distribution, too.
    x_0 = torch.randn(x_T.shape, generator=torch.Generator().manual_seed(1)) * std.float().view(4, 4)[0]
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(x_0))]
    again = reconstruct(pipeline, x_0, generators, strength=0.4, num_inference_steps=20)
    assert (again.reshape(-1, 4).std(dim=0) / std[:4] - 1).abs().max() < 0.06


@pytest.mark.parametrize("strength", [0.01, 0.3, 0.5, 0.8, 1])
def test_strength_begins_at_the_same_noise_in_each_list(make_unet, strength: float) -> None:
    pipeline = DDPMPipeline(make_unet(), DDPMScheduler(beta_schedule="squaredcos_cap_v2"))
    pipeline.scheduler = named_scheduler("unipc", pipeline.scheduler.config, 20)
    first = []
    for value_range in (None, ValueRange(0, 1, "float32")):
        pipeline.value_range = value_range
        timesteps = pipeline.default_timesteps(pipeline.scheduler, 20)
        if timesteps is None:
            pipeline.scheduler.set_timesteps(20)
        else:
            set_timesteps(pipeline.scheduler, timesteps)
        first.append(int(pipeline.scheduler.timesteps[first_index(pipeline, pipeline.scheduler, strength, 20)]))
    own, even = first
    assert even <= max(own, strength * 999 + 0.5)
    assert even >= own - 150  # the list that is even in log sigma has no steps nearer to each other there
