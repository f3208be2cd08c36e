"""Loading a pipeline for sampling, and images as functions of their seeds."""

import json
import math
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from hf_ddpm import DDPMPipeline, DDPMScheduler
from hf_ddpm.classes import numbered_classes
from hf_ddpm.names import UNTUNED_SCHEDULERS
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.runtime.processes import Processes
from hf_ddpm.sampling.loading import load_for_sampling
from hf_ddpm.sampling.sampler import iter_samples, labels_in_turn, sample_all, seeded_generators
from hf_ddpm.solvers import named_scheduler


@pytest.mark.parametrize("name", ["PNDM", "DPMSolverMultistep", "UniPCMultistep", "EulerDiscrete", "DDIM"])
@pytest.mark.parametrize("sampler", [None, *UNTUNED_SCHEDULERS])
@pytest.mark.filterwarnings("ignore:sampling starts")
def test_load_for_sampling_samples_models_saved_with_another_scheduler(make_unet, tmp_path, name, sampler):
    scheduler = getattr(diffusers, f"{name}Scheduler")(20, beta_schedule="squaredcos_cap_v2")
    diffusers.DDPMPipeline(make_unet(), scheduler).save_pretrained(tmp_path)
    pipeline, steps = load_for_sampling(str(tmp_path), sampler, 4)
    stock = diffusers.DDPMScheduler(20, beta_schedule="squaredcos_cap_v2")
    expected = named_scheduler(sampler or "unipc", stock.config, steps)
    for settings in (pipeline.scheduler.config, expected.config):
        assert {key: settings[key] for key in ("beta_schedule", "prediction_type", "num_train_timesteps")} == {
            "beta_schedule": "squaredcos_cap_v2",
            "prediction_type": "epsilon",
            "num_train_timesteps": 20,
        }
    pipeline.scheduler.set_timesteps(steps)
    assert len(pipeline.scheduler.timesteps) == 4
    ((seeds, images),) = iter_samples(pipeline, [0], batch_size=1, num_inference_steps=4)
    assert (seeds, images.shape) == ([0], (1, 3, 8, 8))


@pytest.mark.slow
def test_load_for_sampling_rejects_schedulers_that_are_no_ddpm(make_unet, tmp_path):
    for name in ("EDMEuler", "FlowMatchEulerDiscrete", "CMStochasticIterative", "ScoreSdeVe"):
        scheduler = getattr(diffusers, f"{name}Scheduler")()
        diffusers.DDPMPipeline(make_unet(), scheduler).save_pretrained(tmp_path / name)
        for by_name in (None, "ddpm"):
            with pytest.raises(ValueError, match=f"with a beta_schedule and a prediction_type, got .*{name}Scheduler"):
                load_for_sampling(str(tmp_path / name), by_name)


def test_load_for_sampling_rejects_pipelines_with_more_components(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    index |= {"_class_name": "LDMPipeline", "vqvae": ["diffusers", "VQModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="a LDMPipeline of scheduler, unet, vqvae"):
        load_for_sampling(str(tmp_path))


def test_load_for_sampling_rejects_weights_that_are_not_finite(pipeline, tmp_path):
    with torch.no_grad():
        pipeline.unet.conv_out.bias[0] = math.nan
    pipeline.save_pretrained(tmp_path / "model")
    with pytest.raises(UsageError, match=r"model .* must have finite weights, .* first in 'conv_out\.bias'"):
        load_for_sampling(tmp_path / "model")


@pytest.mark.slow
@pytest.mark.parametrize("sampler", [None, "ddpm"])
def test_zero_terminal_snr_is_sampled_whatever_its_timestep_spacing(make_unet, tmp_path, sampler):
    scheduler = diffusers.DDPMScheduler(20, rescale_betas_zero_snr=True, prediction_type="v_prediction")
    assert scheduler.config.timestep_spacing == "leading"
    stock = diffusers.DDPMPipeline(make_unet(), scheduler)
    stock.set_progress_bar_config(disable=True)
    stock.save_pretrained(tmp_path)
    pipeline, steps = load_for_sampling(str(tmp_path), sampler, device="cpu")
    ((_, images),) = iter_samples(pipeline, [0], batch_size=1, num_inference_steps=steps)  # refuses NaN
    assert images.shape == (1, 3, 8, 8)
    if sampler == "ddpm":
        ours: Any = DDPMPipeline(stock.unet, scheduler)
        ours.set_progress_bar_config(disable=True)
        expected: Any = stock(
            generator=torch.Generator().manual_seed(0), num_inference_steps=20, output_type="np"
        ).images
        assert np.array_equal(ours(generator=torch.Generator().manual_seed(0), output_type="np").images, expected)


def whole(batches):
    seeds, images = zip(*batches, strict=True)
    return [seed for part in seeds for seed in part], torch.cat(images)


@pytest.mark.slow
def test_iter_samples_gives_the_same_bits_in_any_batch(pipeline):
    settings: dict[str, Any] = {"num_inference_steps": 2, "batch_size": 64}
    seeds, images = whole(iter_samples(pipeline, range(20), **settings))
    assert seeds == [*range(20)]
    assert images.dtype == torch.uint8
    assert images.shape == (20, 3, 8, 8)
    for chosen, batch_size in (([19, 3, 5], 64), (range(20), 3), (range(2, 5), 1)):
        got, alone = whole(iter_samples(pipeline, chosen, num_inference_steps=2, batch_size=batch_size))
        assert got == [*chosen]
        assert torch.equal(alone, images[got])
    torch.set_num_threads(2)
    assert torch.equal(whole(iter_samples(pipeline, range(20), **settings))[1], images)
    generators = seeded_generators(range(16), pipeline.device)
    exact = pipeline(16, generators, num_inference_steps=2, output_type="pt").images
    assert torch.equal((exact * 255).round().to(torch.uint8), images[:16])


@pytest.mark.parametrize("labels", [None, [1, 0, 2, 1, 0]])
def test_sample_all_gives_the_images_of_iter_samples(make_unet, labels):
    unet = make_unet(num_class_embeds=None if labels is None else 3)
    pipeline = DDPMPipeline(unet, DDPMScheduler(20, beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing"))
    pipeline.set_progress_bar_config(disable=True)
    settings: dict[str, Any] = {"batch_size": 3, "num_inference_steps": 2, "class_labels": labels}
    images = sample_all(pipeline, [4, 2, 9, 3, 7], Processes(), **settings)
    assert torch.equal(images, whole(iter_samples(pipeline, [4, 2, 9, 3, 7], **settings))[1])


def test_sample_all_shows_what_is_not_finite_as_black(pipeline):
    with torch.no_grad():
        pipeline.unet.conv_out.bias[:] = torch.nan
    images = sample_all(pipeline, [7], Processes(), batch_size=1, num_inference_steps=2)
    assert torch.equal(images, torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


def test_labels_in_turn_go_by_the_images_number():
    assert labels_in_turn(numbered_classes(3), range(5, 9)) == [2, 0, 1, 2]
    assert labels_in_turn(None, range(5, 9)) is None


@pytest.mark.parametrize("name", UNTUNED_SCHEDULERS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_iter_samples_rejects_images_that_are_not_finite(pipeline, name, value):
    pipeline.scheduler = named_scheduler(name, pipeline.scheduler.config, 2)
    with torch.no_grad():
        pipeline.unet.conv_out.bias[:] = value
    with pytest.raises(ValueError, match="samples must be finite, got NaN for seed 7"):
        next(iter_samples(pipeline, [7, 8], batch_size=2, num_inference_steps=2))


def test_iter_samples_rejects_an_empty_batch(pipeline):
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        next(iter_samples(pipeline, [7], batch_size=0))


@pytest.mark.slow
def test_iter_samples_equals_stock_for_a_stock_folder(make_unet, tmp_path):
    scheduler = diffusers.DDPMScheduler(20, beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing")
    stock = diffusers.DDPMPipeline(make_unet(), scheduler)
    stock.set_progress_bar_config(disable=True)
    stock.save_pretrained(tmp_path)
    generators = [torch.Generator().manual_seed(seed) for seed in range(16)]
    expected = stock(batch_size=16, generator=generators, num_inference_steps=20, output_type="np").images
    loaded, steps = load_for_sampling(str(tmp_path), scheduler="ddpm", device="cpu")
    assert steps == 20
    _, images = whole(iter_samples(loaded, range(16), batch_size=16, num_inference_steps=steps))
    assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), (expected * 255).round().astype(np.uint8))


@pytest.mark.slow
def test_bf16_is_the_networks_alone_and_changes_images_little(pipeline, tmp_path, monkeypatch):
    pipeline.save_pretrained(tmp_path)
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: compiled.append(dynamic) or function)
    images = {}
    for dtype in ("fp32", "bf16"):
        loaded, steps = load_for_sampling(str(tmp_path), None, 5, "cpu", dtype, compile=dtype == "bf16")
        seen = []
        loaded.scheduler.step = lambda *a, step=loaded.scheduler.step, seen=seen, **k: seen.append(a) or step(*a, **k)
        _, images[dtype] = whole(iter_samples(loaded, range(16), batch_size=16, num_inference_steps=steps))
        assert {tensor.dtype for model_output, _, x_t in seen for tensor in (model_output, x_t)} == {torch.float32}
    assert compiled == [False]
    difference = (images["fp32"].float() - images["bf16"].float()).abs()
    assert 0 < difference.mean() < 3
    with pytest.raises(ValueError, match="dtype must be one of fp32, bf16, got 'fp16'"):
        load_for_sampling(str(tmp_path), dtype="fp16")
