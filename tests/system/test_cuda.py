"""What only a GPU can show; `python -m pytest -m cuda` runs these tests, and those of other files with this mark."""

import copy
import signal

import diffusers
import numpy as np
import pytest
import torch
from torch import nn

from hf_ddpm import DDPMPipeline
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.optimizer import Muon
from tests.support.runs import differences, start

DEVICE = "cuda"
# The condition is a text: it is not asked before processes have forked.
pytestmark = [pytest.mark.cuda, pytest.mark.skipif("not torch.cuda.is_available()", reason="needs a GPU")]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("of_device", ["cpu", DEVICE])
def test_images_equal_stock_bit_for_bit(make_unet, prediction_type, of_device):
    scheduler = diffusers.DDPMScheduler(prediction_type=prediction_type)
    unet = make_unet().to(DEVICE)
    images = []
    for pipeline_type in (diffusers.DDPMPipeline, DDPMPipeline):
        pipeline = pipeline_type(unet, scheduler)
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator(of_device).manual_seed(0)
        images.append(pipeline(4, generator=generator, num_inference_steps=20, output_type="np").images)
    assert np.array_equal(*images)


@pytest.mark.parametrize(("precision", "optimizer"), [("no", "muon"), ("bf16", "muon"), ("fp16", "adamw")])
def test_run_killed_and_resumed_is_the_run_that_was_not(tiny_settings, tmp_path, precision, optimizer):
    settings = {**tiny_settings, "mixed_precision": precision, "optimizer": optimizer, "random_flip": True}
    whole, killed = (
        TrainingConfig(**{**settings, "output_dir": str(tmp_path / name)}, resume_from_checkpoint="latest")
        for name in ("whole", "killed")
    )
    assert start(whole) == [0]
    assert start(killed, event="step", count=5) == [-signal.SIGKILL]
    assert start(killed) == [0]
    assert differences(tmp_path / "killed", tmp_path / "whole") == []


def test_muon_takes_the_step_that_it_takes_on_a_cpu():
    torch.manual_seed(0)
    on_cpu = [nn.Parameter(torch.randn(shape)) for shape in ((16, 40), (8, 4, 3, 3), (16, 40), (5,))]
    on_device = copy.deepcopy(nn.ParameterList(on_cpu)).to(DEVICE)
    optimizers = [Muon(each[:-1], each[-1:], lr=0.1, weight_decay=0.1) for each in (on_cpu, [*on_device])]
    for _ in range(3):
        for mine, other in zip(on_cpu, on_device, strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.to(DEVICE)
        for optimizer in optimizers:
            optimizer.step()
    for mine, other in zip(on_cpu, on_device, strict=True):
        torch.testing.assert_close(other.cpu(), mine, rtol=1e-3, atol=1e-3)


def test_muon_leaves_weights_and_state_in_a_skipped_step():
    parameters = [nn.Parameter(torch.ones(4, 6, device=DEVICE)), nn.Parameter(torch.ones(5, device=DEVICE))]
    optimizer = Muon(parameters[:1], parameters[1:], lr=0.1)
    for found_inf in (0.0, 1.0):
        before = copy.deepcopy((parameters, optimizer.state_dict()["state"]))
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter) / (1 - found_inf)
        optimizer.found_inf = torch.tensor(found_inf, device=DEVICE)
        optimizer.step()
    after = (parameters, optimizer.state_dict()["state"])
    torch.testing.assert_close(after, before, rtol=0, atol=0)
