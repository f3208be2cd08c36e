"""Augmentation: exact transformations, and a network that is told of them and samples as if there were none."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from safetensors.torch import load_file

from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.training.augmentation import (
    NUM_PARAMETERS,
    WEIGHT,
    attach_map,
    draw_transformations,
    told_parameters,
    transform,
)
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.loop import train
from tests.support.networks import smallest_unet_config
from tests.support.runs import differences, said, start, trace


def parameters(**values: float) -> torch.Tensor:
    names = ("flip_x", "flip_y", "a", "b_cos", "b_sin", "cos_minus_1", "sin", "right", "down")
    return torch.tensor([[values.get(name, 0.0) for name in names]])


def noise(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_flips_and_translations_copy_pixels():
    x_0 = noise(1, 3, 16, 24)
    assert torch.equal(transform(x_0, parameters()), x_0)
    assert torch.equal(transform(x_0, parameters(flip_x=1)), x_0.flip(3))
    assert torch.equal(transform(x_0, parameters(flip_y=1)), x_0.flip(2))
    # 5 pixels to the right and 3 up; the border is mirrored.
    moved = transform(x_0, parameters(flip_y=1, right=5 / 3, down=-3 / 2))
    padded = np.pad(x_0.flip(2).numpy(), ((0, 0), (0, 0), (3, 3), (5, 5)), mode="symmetric")
    assert np.array_equal(moved.numpy(), padded[:, :, 6:, :24])


def test_quarter_turn_is_exact_up_to_rounding():
    x_0 = noise(2, 3, 9, 9)
    turned = transform(x_0, parameters(cos_minus_1=-1, sin=1).repeat(2, 1))
    torch.testing.assert_close(turned, x_0.rot90(-1, (2, 3)), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("a", "b", "phi", "theta"), [(1, 0, 0, 0), (0, 1.5, 0.4, 0), (0, -1.5, 0.4, 0), (-1, 1, 2, 0.7)]
)
def test_resampled_image_is_the_image_at_the_point_that_each_pixel_comes_from(a, b, phi, theta):
    def turn(angle: float) -> np.ndarray:
        return np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])

    forward = turn(theta) @ turn(phi) @ np.diag([2 ** (0.2 * b), 2 ** (-0.2 * b)]) @ turn(-phi) * 2 ** (0.2 * a)
    height, width = 31, 41
    y, x = np.mgrid[:height, :width]
    points = np.stack([x - (width - 1) / 2, y - (height - 1) / 2])
    slope = np.array([0.011, -0.017])
    ramp = torch.tensor(np.tensordot(slope, points, 1)[None, None]).float()
    sources = np.tensordot(np.linalg.inv(forward), points, 1)
    told = {"b_cos": b * math.cos(2 * phi), "b_sin": b * math.sin(2 * phi)}
    result = transform(ramp, parameters(a=a, **told, cos_minus_1=math.cos(theta) - 1, sin=math.sin(theta)))
    inside = (abs(sources[0]) < width / 2 - 2) & (abs(sources[1]) < height / 2 - 2)
    assert inside.sum() > 300
    expected = np.tensordot(slope, sources, 1)
    # Steps of 0.02 from pixel to pixel; torch's cubic interpolation of a ramp is not the ramp to the last digit.
    np.testing.assert_allclose(result[0, 0].numpy()[inside], expected[inside], rtol=0, atol=0.002)


def test_draws_are_functions_of_seed_and_position():
    positions = torch.arange(20_000)
    drawn = draw_transformations(3, positions, 0.12, 8, 8)
    assert torch.equal(drawn[137:150], draw_transformations(3, positions[137:150], 0.12, 8, 8))
    assert not torch.equal(drawn, draw_transformations(4, positions, 0.12, 8, 8))
    # Flips are drawn in half of the cases in which they are applied, as in the paper.
    applied = (drawn != 0).double().mean(dim=0)
    expected = torch.tensor([0.06, 0.06, 0.12, 0.12, 0.12, 0.12, 0.12])
    torch.testing.assert_close(applied[:7], expected.double(), rtol=0, atol=0.008)
    assert (draw_transformations(3, positions, 0.0, 8, 8) == 0).all()
    stretch = drawn[:, 3:5].norm(dim=1)
    assert stretch[stretch > 0].square().mean() == pytest.approx(1, abs=0.08)
    shift = drawn[:, 7:] * 8 / 8
    assert torch.equal(shift, shift.round())


def test_network_that_is_told_nothing_is_the_network_without_a_map():
    torch.manual_seed(0)
    unet = UNet2DModel(**smallest_unet_config(channels=1)).eval()
    size = unet.config["sample_size"]
    x_t, t = noise(3, 1, size, size), torch.tensor([1, 2, 3])
    told = draw_transformations(0, torch.arange(3), 0.99, size, size)
    with torch.no_grad():
        expected = unet(x_t, t).sample
        attach_map(unet)
        with told_parameters(unet, told):
            assert torch.equal(unet(x_t, t).sample, expected)  # its weights are zeros
        torch.nn.init.normal_(unet.time_embedding.cond_proj.weight)
        assert torch.equal(unet(x_t, t).sample, expected)
        with told_parameters(unet, torch.zeros(3, NUM_PARAMETERS)):
            assert torch.equal(unet(x_t, t).sample, expected)
        with told_parameters(unet, told):
            assert not torch.allclose(unet(x_t, t).sample, expected)


@pytest.fixture
def config(tiny_settings) -> TrainingConfig:
    return TrainingConfig(**{**tiny_settings, "augment_probability": 0.5})


@pytest.mark.slow
def test_saved_network_is_the_trained_one_that_is_told_nothing(config):
    pipeline = train(config)
    assert pipeline is not None
    folder = Path(config.output_dir)
    average = load_file(folder / "checkpoint-6/unet_ema/diffusion_pytorch_model.safetensors")
    assert average.pop(WEIGHT).abs().max() > 0
    for name in ("unet", "guide"):
        assert WEIGHT not in load_file(folder / name / "diffusion_pytorch_model.safetensors")
    saved = load_file(folder / "unet/diffusion_pytorch_model.safetensors")
    assert saved.keys() == average.keys()
    assert all(torch.equal(saved[name], average[name]) for name in saved)
    loaded: Any = UNet2DModel.from_pretrained(folder / "unet", output_loading_info=True)
    loading = loaded[1]
    assert loading["unexpected_keys"] == loading["missing_keys"] == []
    for snapshot in folder.glob("ema/snapshot-*.safetensors"):
        assert not [name for name in load_file(snapshot) if name.endswith(WEIGHT)]
    losses = [line["loss"] for line in trace(folder)]
    train(replace(config, output_dir=f"{folder}-off", augment_probability=0.0))
    assert losses != [line["loss"] for line in trace(f"{folder}-off")]


@pytest.mark.slow
def test_augmented_run_resumes_to_the_last_bit_and_on_two_processes(config, tmp_path):
    train(config)
    killed = replace(config, output_dir=str(tmp_path / "killed"))
    assert start(killed, 1, "step", 5) == [-9]
    train(replace(killed, resume_from_checkpoint="latest"))
    assert differences(Path(config.output_dir), Path(killed.output_dir)) == []
    two = replace(config, output_dir=str(tmp_path / "two"), train_batch_size=2)
    assert start(two, 2) == [0, 0], said(two)
    for a, b in zip(trace(config.output_dir), trace(two.output_dir), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    weights = (Path(f.output_dir) / "checkpoint-6/unet/diffusion_pytorch_model.safetensors" for f in (config, two))
    one, other = (load_file(path)[WEIGHT] for path in weights)
    torch.testing.assert_close(one, other, rtol=0.05, atol=1e-4)


def test_augmentation_is_refused_where_it_cannot_work(config, tmp_path):
    for change, message in (
        ({"super_resolution": 2}, "augment_probability must be 0 for a model that makes images from images, got 0.5"),
        ({"stable_target_images": 4}, "augment_probability must be 0 with stable_target_images, got 0.5 with 4"),
        ({"augment_probability": 1.0}, "augment_probability must be"),
    ):
        with pytest.raises(UsageError, match=message):
            train(replace(config, **change))
    model = json.loads(Path(config.model_config_name_or_path or "").read_text())
    with pytest.raises(UsageError, match=r"augment_probability must be left out with network=, got 0\.5"):
        train(replace(config, model_config_name_or_path=None), network=UNet2DModel(**model))
    assert not Path(config.output_dir).exists()
