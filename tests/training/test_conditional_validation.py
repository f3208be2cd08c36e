"""Validation of models that make images from images: against numbers by hand, and what it refuses."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from PIL import Image

from hf_ddpm.evaluation.fidelity import psnr
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.loop import train
from tests.data.test_conditions import save_pairs
from tests.support.runs import start
from tests.support.trained import model_file

HALF = 0.5


class Negative(ModelMixin, ConfigMixin):
    """A network that predicts a part of the negative of its condition."""

    @register_to_config
    def __init__(self, sample_size=8, in_channels=2, out_channels=1, num_class_embeds=None):
        super().__init__()
        self.part = torch.nn.Parameter(torch.tensor(HALF))

    def forward(self, sample, timestep, return_dict=True):
        return UNet2DOutput(sample=-self.part * sample[:, 1:])


@pytest.fixture
def config(tmp_path):
    """A run on pairs, with 6 held-out ones."""
    save_pairs(tmp_path / "data", count=4, shape=(8, 8), split="train")
    save_pairs(tmp_path / "data", count=6, shape=(8, 8), split="test")
    settings = {"train_batch_size": 2, "max_train_steps": 2, "ddpm_num_steps": 10, "ddpm_num_inference_steps": 2}
    settings |= {"lr_warmup_steps": 0, "eval_batch_size": 2, "cpu_threads_per_process": 1, "ema_snapshots": 0}
    return TrainingConfig(
        dataset_name=str(tmp_path / "data"),
        condition_column="negative",
        resolution=8,
        output_dir=str(tmp_path / "run"),
        cache_dir=str(tmp_path / "cache"),
        eval_steps=1,
        eval_num_images=5,
        save_figures=False,
        **settings,
    )


def measured(config):
    return [json.loads(line) for line in (Path(config.output_dir) / "eval.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_loss_and_psnr_are_those_of_the_held_out_pairs(config, tmp_path):
    """The network that halves the truth has a loss and a PSNR that can be said."""
    of_all = replace(config, eval_num_images=6, prediction_type="sample", save_figures=True)
    of_all = replace(of_all, optimizer="adamw", learning_rate=1e-30)
    train(of_all, network=Negative())
    files = [tmp_path / f"data/test/images/{i}.png" for i in range(6)]
    pixels = torch.from_numpy(np.stack([np.array(Image.open(path)) for path in files]))[:, None]
    x_0 = pixels / 127.5 - 1
    samples = ((HALF * x_0 / 2 + 0.5) * 255).round() / 255
    for record in measured(of_all):
        assert record["val_loss"] == pytest.approx(float((x_0 - HALF * x_0).square().mean()), rel=1e-5)
        assert record["psnr"] == pytest.approx(float(psnr(samples, pixels / 255).mean()), abs=1e-3)
        assert record["psnr_standard_error"] > 0
    for name in ("kid.png", "val_loss.png", "psnr.png"):
        with Image.open(Path(of_all.output_dir, "figures", name)) as picture:
            picture.load()
    assert "figures/psnr.png" in Path(of_all.output_dir, "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("made_from", ["column", "low resolution"])
def test_validation_is_equal_over_processes(config, tmp_path, made_from):
    one = replace(config, model_config_name_or_path=model_file(tmp_path, in_channels=2))
    if made_from == "low resolution":
        one = replace(one, condition_column=None, image_column="image", super_resolution=2)
    train(one)
    two = replace(one, output_dir=str(tmp_path / "two"), train_batch_size=1)
    assert start(two, num_processes=2) == [0, 0]
    assert [record["step"] for record in measured(one)] == [1, 2]
    for ours, theirs in zip(measured(one), measured(two), strict=True):
        for name in ("val_loss", "psnr"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3)
    assert (Path(one.output_dir) / "best/conditional_unet").is_dir()


def test_held_out_conditions_of_another_form_are_refused_before_training(config, tmp_path):
    for path in (tmp_path / "data/test/inputs").iterdir():
        Image.new("RGB", (8, 8), (255, 0, 0)).save(path)
    with pytest.raises(UsageError, match="hold conditions like those of training, 1 channels of pictures, got 3"):
        train(replace(config, model_config_name_or_path=model_file(tmp_path, in_channels=2)))
    assert not Path(config.output_dir).exists()
