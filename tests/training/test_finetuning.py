"""A run that begins with another model is that model until its first step, and its own afterwards."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from hf_ddpm import DDPMPipeline
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.loop import train
from tests.support.networks import smallest_unet_config
from tests.support.runs import differences, start

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
SCHEDULE = {"beta_schedule": "linear", "beta_start": 0.005, "beta_end": 0.9}
NEVER = {"learning_rate": 1e-30, "lr_scheduler": "constant", "lr_warmup_steps": 0, "max_train_steps": 1}


def save_model(folder: Path, scheduler: Any = None, channels: int = 1, **network: Any) -> Path:
    torch.manual_seed(1)
    unet = diffusers.UNet2DModel(**smallest_unet_config(channels, **network))
    scheduler = scheduler or diffusers.DDPMScheduler(30, variance_type="fixed_large", **SCHEDULE)
    diffusers.DDPMPipeline(unet, scheduler).save_pretrained(folder)
    return folder


def spoil(model: Path, value: float) -> None:
    """Put a value into one weight of a saved model."""
    weights = load_file(model / WEIGHTS)
    weights["conv_in.bias"][1] = value
    save_file(weights, model / WEIGHTS)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A model of which nothing is as the defaults say."""
    return save_model(tmp_path / "base")


@pytest.fixture
def config(tiny_settings: dict[str, Any], base: Path) -> TrainingConfig:
    del tiny_settings["model_config_name_or_path"], tiny_settings["ddpm_num_steps"]
    return TrainingConfig(**{**tiny_settings, "init_from": str(base), "ema_snapshots": 0})


def written(config: TrainingConfig) -> dict[str, Any]:
    return yaml.safe_load((Path(config.output_dir) / "config.yaml").read_text())


@pytest.mark.slow
def test_init_from_starts_with_the_weights_of_the_model(config: TrainingConfig, base: Path):
    train(replace(config, **NEVER))
    before, after = (load_file(folder / WEIGHTS) for folder in (base, Path(config.output_dir)))
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[name], after[name], rtol=0, atol=1e-25) for name in before)
    for name in ("unet/config.json", "scheduler/scheduler_config.json"):
        theirs, ours = (json.loads((folder / name).read_text()) for folder in (base, Path(config.output_dir)))
        # How to sample the model in fewer steps is this package's choice, and clipping is a matter of sampling.
        for known in (theirs, ours):
            for key in ("timestep_spacing", "_name_or_path"):
                known.pop(key, None)
        assert ours == theirs
    index = json.loads((Path(config.output_dir) / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "DDPMScheduler"]
    assert type(DDPMPipeline.from_pretrained(config.output_dir)) is DDPMPipeline


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_init_from_refuses_weights_that_are_not_finite(config: TrainingConfig, base: Path, value: float):
    spoil(base, value)
    with pytest.raises(UsageError, match=r"^init_from .*/base' must have finite weights, .* in 1 of \d+ tensors"):
        train(config)
    assert not Path(config.output_dir).exists()


@pytest.mark.slow
def test_init_from_trains_the_weights(config: TrainingConfig, base: Path):
    train(config)
    before, after = (load_file(folder / WEIGHTS) for folder in (base, Path(config.output_dir)))
    assert not torch.equal(before["conv_in.weight"], after["conv_in.weight"])


@pytest.mark.slow
def test_init_from_writes_what_the_model_decides_into_the_config(config: TrainingConfig):
    train(replace(config, **NEVER))
    assert {name: value for name, value in written(config).items() if name.startswith(("ddpm_", "rescale"))} == {
        "ddpm_num_steps": 30,
        "ddpm_beta_schedule": "linear",
        "ddpm_beta_start": 0.005,
        "ddpm_beta_end": 0.9,
        "ddpm_num_inference_steps": 4,
        "rescale_betas_zero_snr": False,
    }
    names = ("prediction_type", "variance_type", "resolution", "channels", "init_from")
    assert [written(config)[name] for name in names] == ["epsilon", "fixed_large", 8, 1, config.init_from]


@pytest.mark.slow
def test_init_from_takes_size_and_channels_of_the_model(config: TrainingConfig, tmp_path: Path):
    (tmp_path / "large").mkdir()
    for i in range(4):
        Image.new("RGB", (20, 20), (i, 0, 0)).save(tmp_path / f"large/{i}.png")
    train(replace(config, **NEVER, train_data_dir=str(tmp_path / "large")))
    assert [written(config)[name] for name in ("resolution", "channels")] == [8, 1]


@pytest.mark.slow
@pytest.mark.parametrize("size", [(8, 8), [8, 8]])
def test_init_from_accepts_a_square_sample_size_of_two_numbers(
    config: TrainingConfig, base: Path, size: Any, tmp_path: Path
):
    shutil.rmtree(base)
    save_model(base, sample_size=size)
    train(replace(config, **NEVER))
    description = base / "unet/config.json"
    description.write_text(json.dumps(json.loads(description.read_text()) | {"sample_size": None}))
    with pytest.raises(UsageError, match=r"sample_size of init_from .* must be a whole number above 0, .* got None"):
        train(replace(config, **NEVER, overwrite_output_dir=True))
    network = tmp_path / "network.json"
    network.write_text(json.dumps(smallest_unet_config(1) | {"sample_size": [8, 8]}))
    of_file = replace(config, init_from=None, model_config_name_or_path=str(network), output_dir=str(tmp_path / "own"))
    train(replace(of_file, **NEVER, ddpm_num_steps=30))


@pytest.mark.slow
@pytest.mark.parametrize(
    "scheduler",
    [
        {"beta_schedule": "squaredcos_cap_v2", "beta_start": 0.3, "prediction_type": "v_prediction"},
        {"prediction_type": "sample", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing", **SCHEDULE},
        {"variance_type": "learned_range", **SCHEDULE},
    ],
    ids=["cosine", "zero snr", "learned variance"],
)
def test_init_from_accepts_each_kind_of_model(config: TrainingConfig, base: Path, scheduler: dict[str, Any]):
    shutil.rmtree(base)
    outputs = 2 if scheduler.get("variance_type") == "learned_range" else 1
    save_model(base, diffusers.DDPMScheduler(30, **scheduler), out_channels=outputs)
    train(replace(config, **NEVER))
    stored = json.loads((Path(config.output_dir) / "scheduler/scheduler_config.json").read_text())
    assert all(
        stored[name] == value for name, value in scheduler.items() if name not in ("timestep_spacing", "beta_start")
    )
    before, after = (load_file(folder / WEIGHTS) for folder in (base, Path(config.output_dir)))
    assert all(torch.allclose(before[name], after[name], rtol=0, atol=1e-25) for name in before)
    # What is written down can be read and trained again.
    train(replace(TrainingConfig(**written(config)), overwrite_output_dir=True))


def reschedule(**changes: Any) -> Callable[[Path], None]:
    def change(base: Path) -> None:
        path = base / "scheduler/scheduler_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def as_another_scheduler(base: Path) -> None:
    path = base / "scheduler/scheduler_config.json"
    path.write_text(json.dumps({"_class_name": "KarrasVeScheduler", "sigma_min": 0.02}))


def with_classes(base: Path) -> None:
    shutil.rmtree(base)
    save_model(base, num_class_embeds=10)


def nothing(base: Path) -> None:
    pass


@pytest.mark.filterwarnings("ignore:alpha_bar_T:UserWarning")  # of schedules that are refused anyway
@pytest.mark.parametrize(
    ("settings", "change", "message"),
    [
        (
            {"prediction_type": "sample"},
            nothing,
            "prediction_type must be epsilon, that of the model '.*', got sample",
        ),
        ({"variance_type": "learned_range"}, nothing, "variance_type must be fixed_large, .* got learned_range"),
        ({"ddpm_num_steps": 50}, nothing, "ddpm_num_steps must be 30, that of the model '.*', got 50"),
        ({"ddpm_beta_schedule": "sigmoid"}, nothing, "ddpm_beta_schedule must be linear, .* got sigmoid"),
        ({"resolution": 16}, nothing, "resolution must be 8, that of the model '.*', got 16"),
        ({"channels": 3}, nothing, "channels must be 1, that of the model '.*', got 3"),
        ({"rescale_betas_zero_snr": True, "prediction_type": "sample"}, nothing, "must be .*, that of the model"),
        ({"ddpm_num_inference_steps": 31}, nothing, r"ddpm_num_inference_steps must be in \[1, 30\], got 31"),
        ({"dropout": 0.1}, nothing, "dropout = 0.1 has no effect: init_from is given"),
        (
            {"model_config_name_or_path": "."},
            nothing,
            "model_config_name_or_path = . has no effect: init_from is given",
        ),
        ({}, with_classes, "num_class_embeds of init_from .* must be None, as no label_column is given; got 10"),
        ({}, reschedule(trained_betas=[0.1] * 30), "a noise schedule by name, got '.*' with .* betas of its own"),
        ({}, reschedule(beta_schedule="laplace"), "beta_schedule is one of linear, .*, got 'laplace'"),
        ({}, reschedule(beta_schedule="unheard of"), "beta_schedule is one of linear, .*, got 'unheard of'"),
        ({}, reschedule(prediction_type="flow"), "prediction_type is one of epsilon, .*, got 'flow'"),
        ({}, reschedule(variance_type="fixed_small_log"), "variance_type is one of .*, got 'fixed_small_log'"),
        ({}, as_another_scheduler, "a noise schedule by name, got '.*' with KarrasVeScheduler and none"),
        ({}, shutil.rmtree, "model must be a folder"),
        ({"init_from": "/nowhere"}, nothing, "model must be a folder with model_index.json or .*, got '/nowhere'"),
        ({"init_from": "someone/offline"}, nothing, "model must be a folder or on the Hub, got 'someone/offline'"),
    ],
)
def test_init_from_refuses_contradicting_settings_before_writing(
    config: TrainingConfig, base: Path, settings: dict[str, Any], change: Callable[[Path], None], message: str
):
    change(base)
    with pytest.raises(UsageError, match=message):
        train(replace(config, **settings))
    assert not Path(config.output_dir).exists()


@pytest.mark.slow
def test_resume_does_not_need_the_model_of_init_from(config: TrainingConfig, base: Path, tmp_path: Path):
    """Bit for bit, and also where it is gone, or another, when the run resumes."""
    whole = replace(config, output_dir=str(tmp_path / "whole"), checkpointing_steps=2)
    killed = replace(whole, output_dir=str(tmp_path / "killed"))
    assert start(whole) == [0]
    assert start(killed, event="step", count=5) == [-signal.SIGKILL]
    shutil.rmtree(base)
    assert start(replace(killed, resume_from_checkpoint="latest")) == [0]
    assert differences(Path(whole.output_dir), Path(killed.output_dir)) == []
    assert written(whole) | {"output_dir": killed.output_dir} == written(killed)


@pytest.mark.slow
def test_resume_keeps_what_the_model_of_init_from_decided(config: TrainingConfig, base: Path):
    train(replace(config, max_train_steps=3))
    more = replace(config, resume_from_checkpoint="latest")
    with pytest.raises(UsageError, match="ddpm_num_steps must be 30, that of the model"):
        train(replace(more, ddpm_num_steps=50))
    with pytest.raises(UsageError, match=r"init_from was .* in this run, got None"):
        train(replace(more, init_from=None))
    shutil.rmtree(base)
    train(more)
    assert written(config)["ddpm_num_steps"] == 30
