"""Searched timesteps: the descent finds minima; they are better than uniform ones, kept with the model and used."""

import errno
import itertools
import json
import math
import os
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from hf_ddpm import DDPMPipeline, DDPMScheduler, UsageError
from hf_ddpm.cli import app
from hf_ddpm.evaluation import features
from hf_ddpm.evaluation.distances import paired_kernel_distance
from hf_ddpm.evaluation.features import load_network
from hf_ddpm.evaluation.search import (
    descend,
    search_and_keep,
    search_timesteps,
    starting_timesteps,
    unsearched_timesteps,
)
from hf_ddpm.evaluation.trajectories import Trajectories
from hf_ddpm.hub.card import write_card
from hf_ddpm.runtime.files import weights_sha256
from hf_ddpm.sampling.image_set import write_samples
from hf_ddpm.sampling.loading import load_for_sampling
from hf_ddpm.solvers import named_scheduler, tuned_scheduler
from hf_ddpm.timesteps import FILE, SOLVERS, SearchedTimesteps, best_solver, read_searched, write_searched

T = 100


@pytest.fixture
def model(make_unet, tmp_path):
    """A folder with a model whose ODE is curved: x_0_hat is far from the direction of x_t."""
    unet = make_unet(block_out_channels=[8], down_block_types=["DownBlock2D"], up_block_types=["UpBlock2D"])
    with torch.no_grad():
        unet.conv_out.weight *= 0.3
    scheduler = DDPMScheduler(
        T, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", timestep_spacing="trailing"
    )
    DDPMPipeline(unet, scheduler).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def without_network(monkeypatch):
    """Without a feature network the distance of pixels decides, by which the model is better at searched timesteps."""
    monkeypatch.setattr(features, "find_spec", lambda name: None)


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
@pytest.mark.parametrize("solver", SOLVERS)
def test_trajectories_equal_the_pipeline_with_remembered_outputs_too(model, solver):
    pipeline, _ = load_for_sampling(str(model), solver, 4)
    trajectories = Trajectories(pipeline, solver, range(3), batch_size=3)
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
    rows = [*search_timesteps(pipeline, [3], schedulers=["dpmsolver++", "unipc"], num_images=4, reference_steps=20)]
    assert [row.key for row in rows] == [("dpmsolver++", 3), ("unipc", 3)]
    for row in rows:
        assert row.distance < row.uniform_distance
        unseen = Trajectories(pipeline, "dpmsolver++", range(4, 8), batch_size=32)
        target = unseen.images(unsearched_timesteps(pipeline, "dpmsolver++", 20))
        unseen = Trajectories(pipeline, row.scheduler, range(4, 8), batch_size=32)
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
    pipeline = DDPMPipeline(unet, scheduler)
    (row,) = search_timesteps(pipeline, [3], schedulers=["unipc"], num_images=4, reference_steps=10)
    assert len(row.timesteps) == 3


@pytest.mark.slow
def test_kernel_distance_decides_where_a_network_is_at_hand(model, monkeypatch):
    """The rows of one search hold the paired distances of its images, or none without a network."""
    pytest.importorskip("efficientnet_lite_pytorch", reason='needs pip install "hf_ddpm[evaluation]"')
    pipeline, _ = load_for_sampling(str(model), "ddpm")
    settings: Any = {"schedulers": ["unipc"], "num_images": 4, "reference_steps": 20}
    (row,) = search_timesteps(pipeline, [2], **settings)
    network = load_network("efficientnet-lite0")
    unseen = {name: Trajectories(pipeline, name, range(4, 8), batch_size=32) for name in ("dpmsolver++", "unipc")}
    lists = {"target": unsearched_timesteps(pipeline, "dpmsolver++", 20), "own": row.timesteps}
    images = [unseen["dpmsolver++"].images(lists["target"]), unseen["unipc"].images(lists["own"])]
    target, own = (network(((x + 1) * 127.5).round().to(torch.uint8)) for x in images)
    assert row.network == "efficientnet-lite0"
    assert row.kernel_distance == pytest.approx(paired_kernel_distance(own, target), abs=1e-4)
    assert row.uniform_kernel_distance == row.unipc_kernel_distance
    monkeypatch.setattr(features, "find_spec", lambda name: None)
    (without,) = search_timesteps(pipeline, [2], **settings)
    assert (without.timesteps, without.network, without.kernel_distance) == (row.timesteps, None, None)


@pytest.mark.slow
@pytest.mark.parametrize("as_json", [False, True])
def test_schedule_command_prints_what_it_could_not_write(model, monkeypatch, without_network, as_json):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    command = ["schedule", str(model), "--steps", "2,3", "--num_images", "2", "--scheduler", "dpmsolver++"]
    command += ["--json"] if as_json else []
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 1
    assert f"error: timesteps could not be written into '{model}': [Errno 28] No space left on device" in done.stderr
    if as_json:
        results = json.loads(done.stdout)["results"]
        assert [(len(row["timesteps"]), row["path"]) for row in results] == [(2, None), (3, None)]
    else:
        assert done.stdout.count("timesteps=[") == 2
        assert "0 of 2 schedules are kept" in done.stdout
        # It says what it does while it works.
        assert "Images of 100 steps: " in done.stderr
        assert "dpmsolver++, 3 steps: " in done.stderr
    assert not read_searched(model)


@pytest.mark.slow
def test_schedule_command_keeps_timesteps_and_samples_record_them(model, tmp_path, without_network):
    runner = CliRunner()
    command = ["schedule", str(model), "--steps", "2", "--num_images", "2"]
    done = runner.invoke(app, command)
    assert done.exit_code == 0, done.output
    stored = read_searched(model)
    for row in stored.values():
        assert f"timesteps={[*row.timesteps]}" in done.output
    assert runner.invoke(app, [*command[:2], "--steps", "3", "--num_images", "2"]).exit_code == 0
    assert {n for _, n in read_searched(model)} == {2, 3}
    card = (model / "README.md").read_text()
    for (_, _), row in stored.items():
        timesteps = ", ".join(map(str, row.timesteps))
        assert f"| {row.scheduler} | {timesteps} | {row.distance:.4f} | {row.uniform_distance:.4f} |\n" in card
    assert "`UniPCMultistepScheduler` takes none" in card
    best = best_solver(stored, 2)
    for uniform in (False, True):
        out = tmp_path / f"uniform-{uniform}"
        write_samples(str(model), out, num_images=2, num_inference_steps=2, device="cpu", uniform=uniform)
        recorded = json.loads((out / "samples.json").read_text())
        assert recorded["timesteps"] == (None if uniform else [*stored[best, 2].timesteps])
        assert recorded["scheduler"] == ("unipc" if uniform else best)


def test_card_shows_kernel_distances_where_they_were_measured(model):
    kernels = {"kernel_distance": 0.01, "uniform_kernel_distance": 0.03, "unipc_kernel_distance": 0.03}
    rows = [
        SearchedTimesteps("unipc", (99, 50), 0.1, 0.2, 2, 0, 50, 0.2, "efficientnet-lite0", **kernels),
        SearchedTimesteps("dpmsolver++", (99, 40), 0.1, 0.2, 2, 0, 50, 0.2),
    ]
    write_searched(model, rows, weights_sha256(model))
    write_card(model)
    card = (model / "README.md").read_text()
    assert "compares the features of the same images by efficientnet-lite0; less is\nbetter" in card
    assert "| unipc | 99, 50 | 0.1000 | 0.2000 | 0.0100 | 0.0300 |\n" in card
    assert "| dpmsolver++ | 99, 40 | 0.1000 | 0.2000 |  |  |\n" in card
    assert "\n|---|---|---|---|---|---|\n" in card


@pytest.mark.parametrize(
    ("arguments", "message"),
    {
        "one step": (["--steps", "1"], "steps must be at least 2, got 1"),
        "all steps": (["--steps", "100"], "steps must be in [2, 100), got 100"),
        "words": (["--steps", "five"], "steps must be whole numbers, got 'five'"),
        "no steps": (["--steps", ","], "steps must be whole numbers, got ','"),
        "solver": (["--scheduler", "ddpm"], "scheduler must be one of unipc, dpmsolver++, ddim, got 'ddpm'"),
        "no solver": (
            ["--scheduler", ","],
            "steps and scheduler must name something to search, got [5, 8, 10] and []",
        ),
    }.values(),
)
def test_schedule_command_rejects_what_cannot_work(model, arguments, message):
    done = CliRunner().invoke(app, ["schedule", str(model), *arguments])
    assert done.exit_code == 2
    assert message in done.output


@pytest.mark.slow
def test_search_and_keep_stops_when_the_weights_change(model, make_unet, without_network):
    """A run trains in the folder, and saves while the search runs."""
    search = search_and_keep(str(model), [2, 3], schedulers=["dpmsolver++"], num_images=2)
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


def test_model_that_was_tuned_for_few_steps_is_refused(model):
    pipeline = DDPMPipeline.from_pretrained(model)
    DDPMPipeline(pipeline.unet, tuned_scheduler(pipeline.scheduler.config)).save_pretrained(model)
    with pytest.raises(UsageError, match="timesteps are searched for models that were not tuned for few steps"):
        list(search_and_keep(str(model), [2]))
