"""Super-resolution of arrays: training and files have the same conditions, and PSNR the range of the data."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from PIL import Image

from hf_ddpm import ConditionalDDPMPipeline, DDPMScheduler, evaluate
from hf_ddpm.condition import Condition
from hf_ddpm.conditional import enlarged, low_resolution
from hf_ddpm.data.conditions import low_resolution_conditions
from hf_ddpm.data.config import DataConfig
from hf_ddpm.sampling.conditional_set import sample_from_images
from hf_ddpm.value_range import ValueRange
from tests.support.array_models import RANGE, fields
from tests.support.networks import smallest_unet_config


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model of super-resolution of fields of two channels, by the factor 2."""
    torch.manual_seed(0)
    scheduler = DDPMScheduler(20, beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing")
    pipeline = ConditionalDDPMPipeline(UNet2DModel(**smallest_unet_config(2, in_channels=4)), scheduler)
    pipeline.condition, pipeline.value_range = Condition(2, super_resolution=2), RANGE
    pipeline.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_low_resolution_is_what_pillow_makes_of_floats() -> None:
    values = fields(1, channels=1, size=12)
    small = low_resolution(torch.from_numpy(values), 3, RANGE)
    wanted = np.asarray(Image.fromarray(values[0, 0]).resize((4, 4), Image.Resampling.BICUBIC))
    assert small[0, 0].numpy() == pytest.approx(wanted, abs=1e-3)


def test_low_resolution_holds_values_of_the_type_and_the_range() -> None:
    for value, wanted in ((0.0, 250), (400.0, 310)):
        assert (low_resolution(torch.full((1, 1, 4, 4), value), 2, RANGE) == wanted).all()
    whole = torch.arange(16, dtype=torch.int16).view(1, 1, 4, 4)
    small = low_resolution(whole, 2, ValueRange(-5.0, 20.0, "int16"))
    assert torch.equal(small, small.round())
    half = low_resolution(torch.rand(1, 1, 4, 4), 2, ValueRange(0.0, 1.0, "float16"))
    assert torch.equal(half, half.half().float())


def test_file_of_the_low_resolution_gives_the_condition_of_training(model: Path) -> None:
    values = torch.from_numpy(fields(2))
    pipeline = ConditionalDDPMPipeline.from_pretrained(model)
    shares = RANGE.to_unit_interval(low_resolution(values, 2, RANGE))
    assert torch.equal(2 * pipeline.to_conditions(shares) - 1, low_resolution_conditions(values, 2, RANGE))


def test_samples_are_files_of_values(model: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "low.npy", low_resolution(torch.from_numpy(fields(2)), 2, RANGE).numpy())
    settings = {"num_inference_steps": 2, "device": "cpu"}
    files = sample_from_images(str(model), tmp_path / "low.npy", tmp_path / "out", **settings)
    assert files == [tmp_path / f"out/low.npy/00000{i}.npy" for i in (0, 1)]
    samples = [np.load(path) for path in files]
    assert [(each.dtype, each.shape) for each in samples] == [(np.float32, (2, 8, 8))] * 2
    assert all(((each >= RANGE.low) & (each <= RANGE.high)).all() for each in samples)
    assert (tmp_path / "out/samples.png").is_file()


@pytest.mark.slow
def test_psnr_has_the_width_of_the_range_as_its_peak(model: Path, tmp_path: Path) -> None:
    values = fields(5)
    (tmp_path / "fields/train").mkdir(parents=True)
    (tmp_path / "fields/test").mkdir()
    for split in ("train", "test"):
        np.save(tmp_path / "fields" / split / "all.npy", values)
    data = DataConfig(dataset_name=str(tmp_path / "fields"), cache_dir=str(tmp_path / "cache"))
    settings = {"num_images": 5, "num_inference_steps": (2,), "device": "cpu", "out": tmp_path / "out"}
    rows = evaluate(model, data=data, metrics=("psnr", "ssim"), **settings)["results"]
    large = enlarged(RANGE.to_unit_interval(low_resolution(torch.from_numpy(values), 2, RANGE)), 8, 8)
    errors = (RANGE.to_units(large).astype(np.float64) - values).reshape(5, -1)
    wanted = np.mean([10 * math.log10(60**2 / np.mean(error**2)) for error in errors])
    assert rows[0]["input"]["value"] == pytest.approx(wanted, abs=1e-3)
    assert rows[0]["value"] < wanted  # nobody has trained the model
    assert rows[1]["remark"].endswith("the peak is the width of the value range, 60")
