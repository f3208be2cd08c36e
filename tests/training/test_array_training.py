"""A run on arrays, from files of two channels to samples in the units of the data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import diffusers
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from typer.testing import CliRunner

from hf_ddpm import DDPMPipeline, evaluate
from hf_ddpm.cli import app
from hf_ddpm.data.batches import epoch_order, fixed_pixels
from hf_ddpm.data.images import load_images
from hf_ddpm.hub.info import model_info
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.runtime.processes import Processes
from hf_ddpm.sampling.image_set import write_samples
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.finetuning import range_to_keep
from hf_ddpm.training.loop import train
from hf_ddpm.training.validation import open_validation
from hf_ddpm.value_range import ValueRange
from tests.support.networks import smallest_unet_config
from tests.support.trained import assert_same_weights, part

pytestmark = pytest.mark.slow


def settings_in(folder: Path, channels: int = 2) -> dict[str, Any]:
    model = folder / "unet.json"
    model.write_text(json.dumps(smallest_unet_config(channels=channels)))
    return {
        "train_data_dir": str(folder / "fields"),
        "cache_dir": str(folder / "cache"),
        "model_config_name_or_path": str(model),
        "output_dir": str(folder / "run"),
        "ddpm_num_steps": 20,
        "ddpm_num_inference_steps": 2,
        "train_batch_size": 4,
        "max_train_steps": 4,
        "lr_warmup_steps": 2,
        "checkpointing_steps": 2,
        "eval_batch_size": 2,
        "ema_snapshots": 1,
        "save_figures": False,
        "cpu_threads_per_process": 1,
    }


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainingConfig:
    """The settings of a run that is finished: float32 fields of two channels, with negative values."""
    folder = tmp_path_factory.mktemp("arrays")
    (folder / "fields").mkdir()
    noise = np.random.default_rng(0).standard_normal((60, 2, 8, 8)).astype(np.float32)
    smooth = sum(np.roll(noise, (i, j), (2, 3)) for i in range(3) for j in range(3))
    np.save(folder / "fields" / "all.npy", smooth - 1)
    config = TrainingConfig(**settings_in(folder), value_quantiles=[0.01, 0.99])
    train(config)
    return config


def sampled(pipeline: Any, **arguments: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(2, torch.Generator().manual_seed(0), num_inference_steps=3, **arguments).images


def test_pipeline_returns_units_of_the_data_where_stock_returns_shares(config: TrainingConfig) -> None:
    ours = DDPMPipeline.from_pretrained(config.output_dir)
    value_range = ours.value_range
    assert value_range is not None
    assert value_range.dtype == "float32"
    shares = sampled(diffusers.DDPMPipeline.from_pretrained(config.output_dir), output_type="np")
    values = sampled(ours, output_type="np")
    assert (values.dtype, values.shape) == (np.float32, (2, 8, 8, 2))
    assert np.allclose(values, value_range.low + shares * (value_range.high - value_range.low), atol=1e-5)
    assert np.array_equal(sampled(ours, output_type="pt").permute(0, 2, 3, 1).numpy(), shares)
    with pytest.raises(ValueError, match="PIL has no image of 2 channels: use output_type='np'"):
        sampled(ours)


def test_run_leaves_its_values_in_its_folder_and_on_its_card(config: TrainingConfig, tmp_path: Path) -> None:
    folder = Path(config.output_dir)
    value_range = DDPMPipeline.from_pretrained(folder).value_range
    facts = json.loads((folder / "run.json").read_text())["data"]
    assert facts["values"] == str(value_range) == model_info(str(folder))["values"]
    card = (folder / "README.md").read_text()
    assert "arrays of 2 channels" in card
    assert f"| Values outside of these, which are clipped | {facts['num_clipped']} |" in card
    with Image.open(folder / "previews/step-0000004.png") as preview:
        assert preview.mode == "L"  # both channels side by side
    DDPMPipeline.from_pretrained(folder).save_pretrained(tmp_path / "copy")
    assert DDPMPipeline.from_pretrained(tmp_path / "copy").value_range == value_range


def test_validation_compares_what_pictures_show(config: TrainingConfig, capsys: pytest.CaptureFixture[str]) -> None:
    of_run = {**vars(config), "display_channels": [1.0], "eval_fraction": 0.2, "eval_steps": 1, "random_flip": True}
    settings = TrainingConfig(**of_run)
    images = load_images(settings)
    validation = open_validation(settings, images, None, None, Processes(), torch.device("cpu"))
    # Its range is that of training, whose quantiles are not its own.
    assert f"test of fields: 12 images, 8 x 8, channels 2; values {images.value_range}" in capsys.readouterr().err
    assert validation.real is not None
    order = epoch_order(0, 0, len(images))
    assert images.value_range is not None
    low, high = images.value_range.low, images.value_range.high
    shares = np.clip((fixed_pixels(images, order)[:, 1:] - low) / (high - low), 0, 1)
    assert (validation.real.held_out.shape, validation.real.held_out.dtype) == ((12, 1, 8, 8), torch.uint8)
    assert np.abs(validation.real.training.numpy() - shares * 255).max() <= 0.51
    assert validation.real.is_mirrored


def test_resumed_run_is_the_run(config: TrainingConfig) -> None:
    parted = part(config)
    train(TrainingConfig(**{**vars(parted), "resume_from_checkpoint": "latest"}))
    assert_same_weights(config.output_dir, parted.output_dir)


def tuned_settings(config: TrainingConfig, folder: Path, values: np.ndarray) -> dict[str, Any]:
    """Return the settings of a run that begins with the model of `config`, on other arrays."""
    (folder / "more").mkdir()
    np.save(folder / "more/all.npy", values)
    others = {"init_from": config.output_dir, "train_data_dir": str(folder / "more"), "max_train_steps": 1}
    return {**settings_in(folder), **others, "model_config_name_or_path": None, "ddpm_num_steps": 1000}


def test_tuned_model_keeps_the_units_of_the_model_that_it_begins_with(
    config: TrainingConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = np.random.default_rng(1).standard_normal((12, 2, 8, 8)).astype(np.float32)
    settings = tuned_settings(config, tmp_path, 9 * values)
    settings["init_from"] = shutil.copytree(config.output_dir, tmp_path / "base")
    base = DDPMPipeline.from_pretrained(config.output_dir).value_range
    assert base is not None
    train(TrainingConfig(**settings))
    assert f"-1 and 1 stand for what they do in the model in init_from: {base}" in capsys.readouterr().err
    folder = Path(settings["output_dir"])
    assert DDPMPipeline.from_pretrained(folder).value_range == base
    num_clipped = ((9 * values < base.low) | (9 * values > base.high)).sum()
    assert json.loads((folder / "run.json").read_text())["data"]["num_clipped"] == num_clipped > 0
    assert range_to_keep(TrainingConfig(**settings, value_range=[0, 1])) is None
    streamed = {"streaming": True, "output_dir": str(tmp_path / "streamed")}
    train(TrainingConfig(**{**settings, **streamed}))
    assert DDPMPipeline.from_pretrained(tmp_path / "streamed").value_range == base
    shutil.rmtree(tmp_path / "base")
    train(TrainingConfig(**{**settings, "resume_from_checkpoint": "latest", "max_train_steps": 2}))
    assert DDPMPipeline.from_pretrained(folder).value_range == base


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        (
            (4, 2, 8, 8),
            "uint16",
            r"of the model in init_from, float32, .* got uint16: convert them to float32, or give",
        ),
        ((4, 3, 8, 8), "float32", r"channels must be those of the arrays, 3 in .*, got 2 by .* model of --init_from"),
    ],
)
def test_data_that_cannot_have_the_units_of_the_model_are_refused_before_work(
    config: TrainingConfig, tmp_path: Path, shape: tuple[int, ...], dtype: str, message: str
) -> None:
    settings = tuned_settings(config, tmp_path, np.arange(np.prod(shape)).reshape(shape).astype(dtype))
    with pytest.raises(UsageError, match=message):
        train(TrainingConfig(**settings))
    assert not [*tmp_path.glob("cache/hf_ddpm/*")]
    assert not (tmp_path / "run").exists()


def test_set_holds_the_same_values_in_each_format(config: TrainingConfig, tmp_path: Path) -> None:
    def write(name: str | None) -> Path:
        out = tmp_path / str(name)
        write_samples(config.output_dir, out, num_images=3, num_inference_steps=2, format=name)
        assert (out / "grid.png").is_file()
        return out

    out = write(None)
    arrays = np.stack([np.load(out / f"{i:06}.npy") for i in range(3)])
    assert (arrays.dtype, arrays.shape) == (np.float32, (3, 2, 8, 8))
    out = write("tif")
    assert np.array_equal(np.stack([tifffile.imread(out / f"{i:06}.tif") for i in range(3)]), arrays)
    table = datasets.load_dataset(str(write("parquet")), split="train", cache_dir=str(tmp_path / "cache"))
    assert table.features["image"] == datasets.Array3D((2, 8, 8), "float32")
    assert np.array_equal(np.array(table["image"][:], np.float32), arrays)
    assert np.array_equal(np.load(write("npz") / "samples.npz")["arr_0"].transpose(0, 3, 1, 2), arrays)
    with pytest.raises(ValueError, match="format must be 'npy', 'tif', 'parquet' or 'npz' for images of 2 channels"):
        write("png")


def test_values_are_measured_and_what_floats_cannot_have_is_refused(config: TrainingConfig, tmp_path: Path) -> None:
    settings = {"num_inference_steps": (2,), "out": tmp_path / "out"}
    with pytest.raises(UsageError, match="num_images must be at least 14 for values, got 10"):
        evaluate(config.output_dir, metrics=("values",), num_images=10, **settings)
    (row,) = evaluate(config.output_dir, metrics=("values",), num_images=32, **settings)["results"]
    assert row["value"] > row["real_vs_real"]["value"] > 0  # the model has hardly been trained
    assert np.array(row["spectra"]["samples"]["spectrum"]).shape == (2, 4)
    assert (tmp_path / "out/figures/spectrum.png").is_file()
    # The same arrays, channels last, are read in the range of the model, not in that of the folder.
    (tmp_path / "last").mkdir()
    np.save(tmp_path / "last/all.npy", np.moveaxis(np.load(Path(config.train_data_dir or "") / "all.npy"), 1, -1))
    words = [*("--dataset_name", tmp_path / "last", "--cache_dir", tmp_path / "cache"), "--channel_axis", -1]
    words += [*("--metrics", "values", "--num_images", 32, "--num_inference_steps", 2), "--out", tmp_path / "other"]
    command = ["evaluate", config.output_dir, "--json", *map(str, words)]
    answer = CliRunner().invoke(app, command)
    (other,) = json.loads(answer.stdout)["results"]
    assert other["value"] == row["value"]
    assert "--channel_axis -1" in (tmp_path / "other/README.md").read_text()
    answer = CliRunner().invoke(app, [*command, "--value_range", "0", "1"])
    assert "value_range must be the model's, [" in answer.stderr
    with pytest.raises(UsageError, match="nll must be left out for a model of float32"):
        evaluate(config.output_dir, metrics=("nll",), num_images=4, **settings)
    with pytest.raises(UsageError, match="feature networks see 1 or 3 channels, got arrays of 2"):
        evaluate(config.output_dir, metrics=("kid",), num_images=8, network="efficientnet-lite0", **settings)


def test_bits_per_dimension_of_16_bits_are_those_of_their_own_bins(tmp_path: Path) -> None:
    (tmp_path / "fields").mkdir()
    np.save(tmp_path / "fields/all.npy", np.random.default_rng(0).integers(0, 1001, (8, 2, 8, 8)).astype(np.uint16))
    train(TrainingConfig(**settings_in(tmp_path), value_range=[0, 1000], display_channels=[1]))
    settings = {"num_images": 8, "test_split": "train", "timesteps_per_image": 20}
    (row,) = evaluate(tmp_path / "run", metrics=("nll",), **settings)["results"]
    assert row["value"] > np.log2(1001)  # no model can do better on uniform noise
    assert DDPMPipeline.from_pretrained(tmp_path / "run").value_range == ValueRange(0, 1000, "uint16", (1,))


def test_learned_variance_of_floats_is_refused_before_training(config: TrainingConfig, tmp_path: Path) -> None:
    model = tmp_path / "unet.json"
    model.write_text(json.dumps(smallest_unet_config(channels=2, out_channels=4)))
    learned = {"variance_type": "learned_range", "model_config_name_or_path": str(model)}
    learned["output_dir"] = str(tmp_path / "other")
    with pytest.raises(UsageError, match="variance_type must be fixed_small or fixed_large for float32"):
        train(TrainingConfig(**{**vars(config), **learned}))
    assert not (tmp_path / "other").exists()


def test_super_resolution_trains_validates_and_says_how_arrays_are_given(tmp_path: Path) -> None:
    (tmp_path / "fields").mkdir()
    np.save(tmp_path / "fields/all.npy", np.random.default_rng(0).standard_normal((20, 2, 8, 8)).astype(np.float32))
    settings = {**settings_in(tmp_path), "super_resolution": 2, "eval_fraction": 0.3, "display_channels": [1]}
    (tmp_path / "unet.json").write_text(json.dumps(smallest_unet_config(channels=2, in_channels=4)))
    settings |= {"eval_steps": 4, "eval_num_images": 4, "eval_network": "efficientnet-lite0"}
    train(TrainingConfig(**settings))
    assert json.loads((tmp_path / "run/scheduler/condition.json").read_text())["channels"] == 2
    assert json.loads((tmp_path / "run/eval.jsonl").read_text())["psnr"] > 0
    card = (tmp_path / "run/README.md").read_text()
    assert "image = pipeline.value_range.to_unit_interval(array)" in card
    assert "Image.open" not in card
