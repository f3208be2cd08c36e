"""Searched timesteps: the descent finds minima; they are better than uniform ones, kept with the model and used."""

import errno
import itertools
import json
import math
import os
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from typer.testing import CliRunner

from hf_ddpm import DDPMPipeline, DDPMScheduler
from hf_ddpm.cli import app
from hf_ddpm.evaluation.search import (
    Trajectories,
    descend,
    search_and_keep,
    search_timesteps,
    starting_timesteps,
    uniform_timesteps,
)
from hf_ddpm.runtime.files import weights_sha256
from hf_ddpm.sampling.image_set import write_samples
from hf_ddpm.sampling.sampler import load_for_sampling, seeded_generators
from hf_ddpm.sampling.schedulers import named_scheduler
from hf_ddpm.timesteps import FILE, SearchedTimesteps, read_searched, solver_name, write_searched

T = 100


@pytest.fixture
def model(make_unet, tmp_path):
    """A folder with a model whose ODE is curved: x_0_hat is far from the direction of x_t."""
    unet = make_unet()
    with torch.no_grad():
        unet.conv_out.weight *= 0.3
    scheduler = DDPMScheduler(
        T, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", timestep_spacing="trailing"
    )
    DDPMPipeline(unet, scheduler).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def found(*timesteps, scheduler="dpmsolver++"):
    return SearchedTimesteps(scheduler, timesteps, 0.1, 0.2, num_images=2, seed=0, reference_steps=50)


@pytest.mark.parametrize("n", [2, 3, 7, 20, 99])
def test_starting_timesteps_fall_strictly_from_the_last_timestep(n):
    for timesteps in starting_timesteps(T, n):
        assert len(timesteps) == n
        assert timesteps[0] == T - 1
        assert timesteps[-1] >= 0
        assert all(t > s for t, s in itertools.pairwise(timesteps))


def test_descend_finds_the_minimum_of_a_bowl():
    wanted = (99, 71, 33, 4)
    accepted = []
    best = descend(
        starting_timesteps(T, 4),
        lambda ts: sum((t - w) ** 2 for t, w in zip(ts, wanted, strict=True)),
        accepted.append,
    )
    assert best == wanted
    assert accepted[-1] == best


def test_descend_finds_almost_the_best_quadrature():
    """Steps of the quadrature of 1/t must grow with t. The result is almost as good as the best of all choices."""

    def value(timesteps):
        bounds = [*timesteps, 0]
        return sum((t - s) / (1 + s) - math.log((1 + t) / (1 + s)) for t, s in itertools.pairwise(bounds))

    best = min(((30, *rest) for rest in itertools.combinations(range(29, 0, -1), 3)), key=value)
    start = (30, 22, 15, 8)
    assert value(descend([start], value, lambda _: None)) < value(start) / 2
    assert value(descend(starting_timesteps(31, 4), value, lambda _: None)) < 1.05 * value(best)


@pytest.mark.slow
def test_trajectories_equal_the_pipeline_with_remembered_outputs_too(model):
    pipeline, _ = load_for_sampling(str(model), "dpmsolver++", 4)
    trajectories = Trajectories(pipeline, "dpmsolver++", range(3), batch_size=3)
    first, second = [99, 60, 40, 10], [99, 60, 35, 10]
    images = trajectories.images(first, remember=True)
    assert trajectories.network_evaluations == 4 * 3
    nearly = trajectories.images(second)
    assert trajectories.network_evaluations == 6 * 3  # two of four are known
    assert torch.equal(trajectories.images(first), images)
    for timesteps, own in ((first, images), (second, nearly)):
        generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
        whole: Any = pipeline(3, generators, timesteps=timesteps, output_type="pt").images
        assert torch.equal(own / 2 + 0.5, whole)


@pytest.mark.slow
def test_search_timesteps_finds_better_ones_than_uniform_on_unseen_noises(model):
    pipeline, _ = load_for_sampling(str(model), "ddpm")
    for row in search_timesteps(pipeline, [3], num_images=4, reference_steps=20):
        assert row.distance < row.uniform_distance
        unseen = Trajectories(pipeline, "dpmsolver++", range(4, 8), batch_size=32)
        target = unseen.images(uniform_timesteps(pipeline.scheduler.config, "dpmsolver++", 20))
        measured = (unseen.images(row.timesteps) - target).square().mean().sqrt()
        torch.testing.assert_close(float(measured), row.distance)
        n = len(row.timesteps)
        pipeline.scheduler = named_scheduler("unipc", pipeline.scheduler.config, n)
        generators = [torch.Generator().manual_seed(seed) for seed in range(4, 8)]
        images = pipeline(4, generators, num_inference_steps=n, output_type="pt").images
        measured = (2 * images - 1 - target).square().mean().sqrt()
        torch.testing.assert_close(float(measured), row.unipc_distance)


@pytest.mark.slow
def test_search_timesteps_of_a_model_with_classes_and_learned_variance(make_unet):
    unet = make_unet(out_channels=6, num_class_embeds=3)
    scheduler = DDPMScheduler(T, variance_type="learned_range", beta_schedule="squaredcos_cap_v2")
    (row,) = search_timesteps(DDPMPipeline(unet, scheduler), [3], num_images=4, reference_steps=10)
    assert len(row.timesteps) == 3


@pytest.mark.slow
def test_pipeline_uses_searched_timesteps_for_their_number_of_steps(model):
    write_searched(model, [found(99, 70, 20)], weights_sha256(model))
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
        assert pipeline.scheduler.timesteps.tolist() == uniform_timesteps(config, scheduler, steps)
    without, _ = load_for_sampling(str(model), "dpmsolver++", 3, uniform=True)
    without(num_inference_steps=3)
    assert without.scheduler.timesteps.tolist() == uniform_timesteps(without.scheduler.config, "dpmsolver++", 3)


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
    for other in (DDIMScheduler, UniPCMultistepScheduler, DDPMScheduler):
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
    pipeline.scheduler = named_scheduler("unipc", pipeline.scheduler.config)
    with pytest.raises(ValueError, match="timesteps must be None for UniPCMultistepScheduler"):
        pipeline(timesteps=[9, 1])


@pytest.mark.slow
@pytest.mark.parametrize("as_json", [False, True])
def test_schedule_command_prints_what_it_could_not_write(model, monkeypatch, as_json):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    command = ["schedule", str(model), "--steps", "2,3", "--num_images", "2", *(["--json"] if as_json else [])]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 1
    assert f"error: timesteps could not be written into '{model}': [Errno 28] No space left on device" in done.stderr
    if as_json:
        results = json.loads(done.stdout)["results"]
        assert [(len(row["timesteps"]), row["path"]) for row in results] == [(2, None), (3, None)]
    else:
        assert done.stdout.count("timesteps=[") == 2
        assert "0 of 2 schedules are kept" in done.stdout
    assert not read_searched(model)


@pytest.mark.slow
def test_schedule_command_keeps_timesteps_and_samples_record_them(model, tmp_path):
    runner = CliRunner()
    command = ["schedule", str(model), "--steps", "2,4", "--num_images", "2"]
    done = runner.invoke(app, command)
    assert done.exit_code == 0, done.output
    stored = read_searched(model)
    for n in (2, 4):
        assert f"timesteps={[*stored['dpmsolver++', n].timesteps]}" in done.output
    assert runner.invoke(app, [*command[:2], "--steps", "3", "--num_images", "2"]).exit_code == 0
    assert {n for _, n in read_searched(model)} == {2, 3, 4}
    card = (model / "README.md").read_text()
    for (_, _), row in stored.items():
        timesteps = ", ".join(map(str, row.timesteps))
        assert f"| dpmsolver++ | {timesteps} | {row.distance:.4f} | {row.uniform_distance:.4f} |" in card
    for uniform in (False, True):
        out = tmp_path / f"uniform-{uniform}"
        write_samples(str(model), out, num_images=2, num_inference_steps=4, device="cpu", uniform=uniform)
        recorded = json.loads((out / "samples.json").read_text())
        assert recorded["timesteps"] == (None if uniform else [*stored["dpmsolver++", 4].timesteps])
        # UniPC, the default, takes no timesteps.
        assert recorded["scheduler"] == ("unipc" if uniform else "dpmsolver++")


@pytest.mark.parametrize(
    ("arguments", "message"),
    {
        "one step": (["--steps", "1"], "steps must be at least 2, got 1"),
        "all steps": (["--steps", "100"], "steps must be in [2, 100), got 100"),
        "words": (["--steps", "five"], "steps must be whole numbers, got 'five'"),
        "no steps": (["--steps", ","], "steps must be whole numbers, got ','"),
        "solver": (["--scheduler", "unipc"], "scheduler must be one of dpmsolver++, ddim, got 'unipc'"),
    }.values(),
)
def test_schedule_command_rejects_what_cannot_work(model, arguments, message):
    done = CliRunner().invoke(app, ["schedule", str(model), *arguments])
    assert done.exit_code == 2
    assert message in done.output


@pytest.mark.slow
def test_search_and_keep_stops_when_the_weights_change(model, make_unet):
    """A run trains in the folder, and saves while the search runs."""
    search = search_and_keep(str(model), [2, 3], num_images=2)
    next(search)
    assert read_searched(model)
    make_unet(seed=1).save_pretrained(model / "unet")
    with pytest.raises(ValueError, match="model must keep its weights during the search"):
        next(search)
    assert not read_searched(model)


@pytest.mark.slow
def test_schedule_command_rejects_a_damaged_model(model):
    pipeline = DDPMPipeline.from_pretrained(model)
    with torch.no_grad():
        pipeline.unet.conv_out.weight[0] = torch.nan
    pipeline.save_pretrained(model)
    done = CliRunner().invoke(app, ["schedule", str(model), "--steps", "3", "--num_images", "2"])
    assert done.exit_code == 2
    assert "must have finite weights, got NaN or infinity in 1 of" in done.output
    assert not (model / FILE).exists()


def test_schedule_command_rejects_a_step_denoiser(make_unet, tmp_path):
    scheduler = DDPMScheduler(
        T, prediction_type="previous_sample", timestep_spacing="trailing", beta_schedule="squaredcos_cap_v2"
    )
    DDPMPipeline(make_unet(), scheduler).save_pretrained(tmp_path)
    done = CliRunner().invoke(app, ["schedule", str(tmp_path), "--steps", "3"])
    assert done.exit_code == 2
    assert "scheduler must be 'ddpm' for a step denoiser" in done.output
