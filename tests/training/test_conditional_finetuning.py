"""A run that makes images from images and begins with another model: of noise alone, or one of its own kind."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline as StockPipeline
from diffusers import UNet2DModel
from safetensors.torch import load_file

from hf_ddpm import ConditionalDDPMPipeline, DDPMScheduler
from hf_ddpm.condition import Condition
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.training.checkpoint import WEIGHTS
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.loop import train
from tests.data.test_conditions import save_pairs
from tests.support.networks import smallest_unet_config
from tests.support.runs import differences

NEVER = {"learning_rate": 1e-30, "lr_scheduler": "constant", "max_train_steps": 1}


def scheduler(**settings):
    return DDPMScheduler(10, beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing", **settings)


@pytest.fixture
def plain(tmp_path):
    """A model that makes images from noise alone."""
    torch.manual_seed(0)
    StockPipeline(UNet2DModel(**smallest_unet_config(1)), scheduler()).save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


@pytest.fixture
def conditional(tmp_path):
    """A model that makes images from those of a column, which also predicts their variance."""
    torch.manual_seed(0)
    unet = UNet2DModel(**smallest_unet_config(1, in_channels=2, out_channels=2))
    pipeline = ConditionalDDPMPipeline(unet, scheduler(variance_type="learned_range"))
    pipeline.condition = Condition(1, column="negative")
    pipeline.save_pretrained(tmp_path / "conditional")
    return tmp_path / "conditional"


@pytest.fixture
def config(tmp_path):
    save_pairs(tmp_path / "pairs", count=4, shape=(8, 8))
    return TrainingConfig(
        train_data_dir=str(tmp_path / "pairs"),
        condition_column="negative",
        output_dir=str(tmp_path / "run"),
        cache_dir=str(tmp_path / "cache"),
        train_batch_size=2,
        max_train_steps=4,
        ddpm_num_inference_steps=2,
        lr_warmup_steps=0,
        eval_batch_size=2,
        save_figures=False,
        cpu_threads_per_process=1,
        ema_snapshots=0,
    )


@pytest.mark.slow
@pytest.mark.parametrize("made_from", ["column", "low resolution"])
def test_model_of_noise_alone_begins_as_it_was_whatever_the_condition(config, plain, made_from):
    config = replace(config, init_from=str(plain), **NEVER)
    if made_from == "low resolution":
        config = replace(config, condition_column=None, image_column="image", super_resolution=2)
    pipeline = train(config)
    assert isinstance(pipeline, ConditionalDDPMPipeline)
    assert pipeline.condition.channels == 1
    before = UNet2DModel.from_pretrained(plain, subfolder="unet").eval()
    after = UNet2DModel.from_pretrained(config.output_dir, subfolder="conditional_unet").eval()
    x_t, condition = torch.randn(2, 4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = before(x_t, torch.tensor(3)).sample
        got = after(torch.cat([x_t, condition], dim=1), torch.tensor(3)).sample
    assert expected.std() > 0.1
    assert torch.allclose(got, expected, rtol=0, atol=1e-6)
    assert pipeline.scheduler.config.prediction_type == "epsilon"  # that of the model, not the default


@pytest.mark.slow
def test_model_of_noise_alone_learns_to_use_the_condition(config, plain):
    train(replace(config, init_from=str(plain)))
    weights = load_file(Path(config.output_dir) / "conditional_unet" / WEIGHTS)
    assert weights["conv_in.weight"][:, 1:].abs().max() > 0


@pytest.mark.slow
def test_model_of_its_own_kind_is_tuned_as_it_is(config, conditional):
    train(replace(config, init_from=str(conditional), **NEVER))
    before, after = (load_file(Path(run) / "conditional_unet" / WEIGHTS) for run in (conditional, config.output_dir))
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[name], after[name], rtol=0, atol=1e-25) for name in before)


@pytest.mark.slow
def test_resumed_run_is_the_run_that_was_not_stopped(config, plain, tmp_path):
    whole = replace(config, init_from=str(plain), checkpointing_steps=2, output_dir=str(tmp_path / "whole"))
    train(whole)
    parted = replace(whole, output_dir=str(tmp_path / "parted"))
    shutil.copytree(whole.output_dir, parted.output_dir)
    for path in (Path(parted.output_dir, "checkpoint-4"), Path(parted.output_dir, "conditional_unet"), plain):
        shutil.rmtree(path)  # what it began with is not needed any more
    train(replace(parted, resume_from_checkpoint="latest"))
    assert differences(Path(whole.output_dir), Path(parted.output_dir)) == []


def test_models_that_do_not_fit_are_refused_before_any_work(config, plain, conditional):
    from_noise = replace(config, condition_column=None, image_column="image", init_from=str(conditional))
    with pytest.raises(UsageError, match=r"noise alone, got .*, which makes them from images: give super_resolution"):
        train(from_noise)
    with pytest.raises(UsageError, match=r"channels must be 1, that of the model '.*plain', got 3"):
        train(replace(config, init_from=str(plain), channels=3))
    path = conditional / "conditional_unet/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"in_channels": 4}))
    low = replace(config, condition_column=None, image_column="image", super_resolution=2, init_from=str(conditional))
    with pytest.raises(UsageError, match=r"init_from .*conditional'"):
        train(low)
    assert not Path(config.output_dir).exists()
