"""Runs whose images are made from images."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline as StockPipeline
from diffusers import DDPMScheduler as StockScheduler
from diffusers import UNet2DModel
from PIL import Image
from safetensors.torch import load_file
from torch.nn.modules.module import register_module_forward_pre_hook

from hf_ddpm import ConditionalDDPMPipeline, DDPMPipeline
from hf_ddpm.condition import Condition
from hf_ddpm.data.conditions import low_resolution_conditions
from hf_ddpm.hub.info import model_info
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.training.checkpoint import WEIGHTS
from hf_ddpm.training.conditions import with_noise
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.loop import train
from hf_ddpm.training.posthoc import write_average
from tests.data.test_conditions import save_pairs
from tests.support.image_data import noise
from tests.support.runs import differences, start, trace
from tests.support.trained import model_file


def config(tmp_path, **settings):
    of_the_run = {
        "model_config_name_or_path": model_file(tmp_path, in_channels=2),
        "output_dir": str(tmp_path / "run"),
        "cache_dir": str(tmp_path / "cache"),
        "train_batch_size": 2,
        "max_train_steps": 4,
        "ddpm_num_steps": 10,
        "ddpm_num_inference_steps": 2,
        "lr_warmup_steps": 0,
        "eval_batch_size": 2,
        "save_figures": False,
        "cpu_threads_per_process": 1,
        "ema_snapshots": 0,
    }
    return TrainingConfig(**{**of_the_run, **settings})


def of_pairs(tmp_path, **settings):
    folder = tmp_path / "pairs"
    if not folder.exists():
        save_pairs(folder, count=5, shape=(8, 12))
    pairs = {"train_data_dir": str(folder), "condition_column": "negative", "resolution": 8, "random_flip": True}
    return config(tmp_path, **{**pairs, **settings})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of super-resolution of the digits."""
    folder = tmp_path_factory.mktemp("super-resolution")
    settings = {"dataset_name": "digits", "super_resolution": 2, "save_figures": True, "class_dropout": 0.0}
    train(config(folder, **settings))
    return folder / "run"


@pytest.mark.slow
def test_network_gets_the_condition_of_each_image_beside_x_t(tmp_path):
    seen = []

    def objective(network, x_0, class_labels, **draws):
        hook = register_module_forward_pre_hook(
            lambda module, inputs: seen.append((x_0, inputs[0])) if isinstance(module, UNet2DModel) else None
        )
        prediction = network(x_0, draws["timesteps"]).sample
        hook.remove()
        return (prediction - x_0).square().flatten(1).mean(1)

    train(of_pairs(tmp_path, max_train_steps=2, gradient_accumulation_steps=2), objective=objective)
    assert len(seen) == 4
    for x_0, network_input in seen:
        assert torch.equal(network_input[:, :1], x_0)
        assert torch.allclose(network_input[:, 1:], -x_0, atol=1e-6)  # the negative, cropped and mirrored alike


@pytest.mark.slow
@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_resumed_run_is_the_run_that_was_not_stopped(tmp_path, noise):
    whole = of_pairs(tmp_path, condition_noise=noise, checkpointing_steps=2, output_dir=str(tmp_path / "whole"))
    train(whole)
    parted = replace(whole, output_dir=str(tmp_path / "parted"))
    shutil.copytree(whole.output_dir, parted.output_dir)
    for path in [parted.output_dir + "/checkpoint-4", parted.output_dir + "/conditional_unet"]:
        shutil.rmtree(path)
    train(replace(parted, resume_from_checkpoint="latest"))
    assert differences(Path(whole.output_dir), Path(parted.output_dir)) == []
    with pytest.raises(UsageError, match="condition_column was negative in this run, got image"):
        train(replace(parted, condition_column="image", resume_from_checkpoint="latest", max_train_steps=6))


@pytest.mark.slow
def test_two_processes_train_the_same_model(tmp_path):
    one = of_pairs(tmp_path, condition_noise=0.2, output_dir=str(tmp_path / "one"))
    train(one)
    two = replace(one, train_batch_size=1, output_dir=str(tmp_path / "two"))
    assert start(two, num_processes=2) == [0, 0]
    for ours, theirs in zip(trace(one.output_dir), trace(two.output_dir), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    weights = [load_file(Path(run.output_dir) / "conditional_unet" / WEIGHTS) for run in (one, two)]
    assert all(torch.allclose(weights[0][name], weights[1][name], atol=1e-4) for name in weights[0])


def test_noise_is_a_function_of_seed_and_position():
    conditions, positions = torch.zeros(4000, 1, 2, 2), torch.arange(4000)
    noisy = with_noise(conditions, 3, positions, 0.5)
    assert torch.equal(with_noise(conditions[:2], 3, positions[7:9], 0.5), noisy[7:9])
    assert not torch.equal(with_noise(conditions, 4, positions, 0.5), noisy)
    # The variance of s eps with s uniform in [0, 1/2) is E s^2 = 1/12.
    assert noisy.var().item() == pytest.approx(1 / 12, rel=0.05)


@pytest.mark.slow
def test_stock_refuses_the_model_and_loads_its_parts(trained):
    assert not (trained / "unet").exists()
    with pytest.raises(ValueError, match=r"expected.*unet"):
        StockPipeline.from_pretrained(trained)
    with pytest.raises(ValueError, match=r"expected.*unet"):
        DDPMPipeline.from_pretrained(trained)
    pipeline = ConditionalDDPMPipeline.from_pretrained(trained)
    assert pipeline.condition.super_resolution == 2
    pipeline.set_progress_bar_config(disable=True)

    image = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    seeded = torch.Generator().manual_seed(5)
    (ours,) = pipeline(image, generator=seeded, output_type="pt", return_dict=False)

    unet = UNet2DModel.from_pretrained(trained, subfolder="conditional_unet").eval()
    scheduler = StockScheduler.from_pretrained(trained, subfolder="scheduler")
    scheduler.set_timesteps(10)
    generator = torch.Generator().manual_seed(5)
    x_t = torch.randn(2, 1, 8, 8, generator=generator)
    with torch.no_grad():
        for t in scheduler.timesteps:
            prediction = unet(torch.cat([x_t, 2 * image - 1], dim=1), t).sample
            x_t = scheduler.step(prediction, t, x_t, generator=generator).prev_sample
    assert torch.equal(ours, (x_t / 2 + 0.5).clamp(0, 1))


@pytest.mark.slow
def test_super_resolution_run_leaves_pictures_card_and_what_it_makes_images_from(trained):
    assert json.loads((trained / "scheduler/condition.json").read_text())["super_resolution"] == 2
    for name in ("samples.png", "reverse.png", "forward.png"):
        assert (trained / "figures" / name).is_file()
    card = (trained / "README.md").read_text()
    assert "pipeline_tag: image-to-image" in card
    assert "trained on images of 1/2 of their height and width" in card
    assert model_info(str(trained))["channels"] == 1
    assert model_info(str(trained))["made_from"] == "images of 1/2 of their height and width"


@pytest.mark.slow
def test_code_of_the_card_runs(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(noise(4, 4)).save("image.png")
    ours, stocks = re.findall(r"```python\n(.*?)```", (trained / "README.md").read_text(), re.DOTALL)
    assert "hf_ddpm" not in stocks.replace(str(trained), "")
    variables = {}
    exec(ours, variables)
    assert variables["sample"].size == (8, 8)
    exec(stocks, variables)
    assert variables["sample"].shape == (1, 1, 8, 8)
    # Pillow enlarges as the pipeline does, but in whole numbers.
    condition = 2 * variables["pipeline"].to_conditions(variables["image"]) - 1
    assert (condition - variables["condition"]).abs().max() < 2 / 127.5


@pytest.mark.slow
def test_average_of_any_length_is_a_model_of_the_same_kind(tmp_path):
    train(config(tmp_path, dataset_name="digits", super_resolution=4, ema_snapshots=4))
    folder = write_average(tmp_path / "run", 0.1)
    assert ConditionalDDPMPipeline.from_pretrained(folder).condition == Condition(1, super_resolution=4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"super_resolution": 3}, "super_resolution must divide the resolution, 8 x 8, got 3: give one of 2, 4"),
        ({"super_resolution": 8}, "super_resolution must divide the resolution, 8 x 8, got 8"),
        ({"super_resolution": 4, "resolution": 10}, "super_resolution must divide the resolution, 10 x 10, got 4"),
        (
            {"super_resolution": 2, "stable_target_images": 4},
            "stable_target_images must be 0 for a model that makes images from images, got 4: its target would be",
        ),
        ({"super_resolution": 2, "condition_column": "x"}, "super_resolution = 2 has no effect"),
        ({"condition_noise": 0.1}, "condition_noise = 0.1 has no effect"),
        (
            {"condition_column": "x", "streaming": True, "resolution": 8},
            r"condition_column = x has no effect.*streaming",
        ),
        (
            {"condition_column": "x"},
            r"must name a second column of images, got 'x', none of \['image'\]",
        ),
    ],
)
def test_wrong_settings_are_one_line_before_any_work(tmp_path, settings, message):
    default = {"dataset_name": "digits", "model_config_name_or_path": None}
    with pytest.raises(UsageError, match=message) as error:
        train(config(tmp_path, **{**default, **settings}))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_data_set_of_the_users_own_is_made_from_its_low_resolution(tmp_path):
    items = [{"image": np.full((1, 8, 8), i / 4, np.float32), "label": i % 2} for i in range(4)]
    dataset = type("Items", (list,), {"classes": ["a", "b"]})(items)
    settings = {"super_resolution": 4, "model_config_name_or_path": None, "save_figures": True}
    pipeline = train(config(tmp_path, **settings), dataset=dataset)
    assert isinstance(pipeline, ConditionalDDPMPipeline)
    assert pipeline.classes is not None
    assert (tmp_path / "run/figures/samples.png").is_file()


def test_data_set_of_the_users_own_has_no_column(tmp_path):
    items = [np.zeros((1, 8, 8), np.float32)] * 4
    with pytest.raises(UsageError, match="condition_column is for data sets of `datasets`"):
        train(config(tmp_path, condition_column="x"), dataset=items)


@pytest.mark.slow
def test_stream_gives_super_resolution_the_conditions_of_its_images(tmp_path):
    of_stream = {"dataset_name": "digits", "super_resolution": 2, "streaming": True, "label_column": "label"}
    whole = config(tmp_path, **of_stream, model_config_name_or_path=None, checkpointing_steps=2)
    seen = []

    def objective(network, x_0, class_labels, **draws):
        hook = register_module_forward_pre_hook(
            lambda module, inputs: seen.append((x_0, inputs[0])) if isinstance(module, UNet2DModel) else None
        )
        prediction = network(x_0, draws["timesteps"], class_labels=class_labels).sample
        hook.remove()
        return (prediction - x_0).square().flatten(1).mean(1)

    train(whole, objective=objective)
    for x_0, network_input in seen:
        assert torch.equal(network_input[:, 1:], low_resolution_conditions(x_0, 2, 255))
    parted = replace(whole, output_dir=str(tmp_path / "parted"))
    shutil.copytree(whole.output_dir, parted.output_dir)
    for path in [parted.output_dir + "/checkpoint-4", parted.output_dir + "/conditional_unet"]:
        shutil.rmtree(path)
    train(replace(parted, resume_from_checkpoint="latest"), objective=objective)
    assert differences(Path(whole.output_dir), Path(parted.output_dir)) == []
