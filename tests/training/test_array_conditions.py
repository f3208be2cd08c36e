"""A run on arrays that are made from arrays: each in its own units, from the files to samples and measurements."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from hf_ddpm import ConditionalDDPMPipeline, evaluate
from hf_ddpm.cli import app
from hf_ddpm.condition import Condition
from hf_ddpm.data.images import load_images
from hf_ddpm.hub.info import model_info
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.sampling.conditional_set import sample_from_images
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.loop import train
from hf_ddpm.value_range import ValueRange
from tests.data.test_array_conditions import condition_of, conditions_in, save_array_pairs
from tests.support.array_models import fields
from tests.support.runs import differences
from tests.support.trained import pair_settings

pytestmark = pytest.mark.slow


def own_range(config: TrainingConfig) -> ValueRange:
    """Return the range of the conditions that a run is trained on."""
    conditions = conditions_in(load_images(config))
    values = np.concatenate([conditions.image(i) for i in range(len(conditions))])
    return ValueRange(float(values.min()), float(values.max()), "int16")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainingConfig:
    """The settings of a run that is finished: two channels of float32, made from one of int16."""
    folder = tmp_path_factory.mktemp("array-pairs")
    save_array_pairs(folder / "pairs", fields(20))
    config = TrainingConfig(
        train_data_dir=str(folder / "pairs"),
        condition_column="coarse",
        eval_fraction=0.3,
        display_channels=[1],
        **pair_settings(folder, channels=2, conditions=1),
    )
    train(config)
    return config


def test_run_leaves_both_ranges_and_says_them(config: TrainingConfig) -> None:
    folder = Path(config.output_dir)
    pipeline = ConditionalDDPMPipeline.from_pretrained(folder)
    values = own_range(config)
    assert pipeline.condition == Condition(1, column="coarse", value_range=values)
    assert pipeline.condition_values == values
    assert pipeline.value_range is not None
    assert (pipeline.value_range.dtype, pipeline.value_range.display_channels) == ("float32", (1,))
    assert json.loads((folder / "eval.jsonl").read_text())["psnr"] > 0
    words = f"arrays of the column coarse ({values})"
    assert model_info(str(folder))["made_from"] == words
    card = (folder / "README.md").read_text()
    assert f"| Images that they are made from | {words} |" in card
    for name in ("samples.png", "reverse.png"):
        assert (folder / "figures" / name).is_file()


def test_code_of_the_card_takes_an_array_in_its_units(
    config: TrainingConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("array.npy", condition_of(fields(1))[0])
    (code,) = re.findall(r"```python\n(.*?)```", (Path(config.output_dir) / "README.md").read_text(), re.DOTALL)
    variables = {}
    exec(code, variables)
    assert (variables["sample"].shape, variables["sample"].dtype) == ((8, 8, 2), np.float32)


def test_files_of_conditions_are_in_their_own_units(config: TrainingConfig, tmp_path: Path) -> None:
    values = condition_of(fields(3, seed=5))
    np.save(tmp_path / "all.npy", values)
    command = ["sample", config.output_dir, "--image", str(tmp_path / "all.npy"), "--num_inference_steps", "2"]
    answer = CliRunner().invoke(app, [*command, "--scheduler", "ddpm", "--out", str(tmp_path / "out")])
    assert answer.exit_code == 0, answer.output
    assert (tmp_path / "out/samples.png").is_file()
    pipeline = ConditionalDDPMPipeline.from_pretrained(config.output_dir)
    pipeline.set_progress_bar_config(disable=True)
    own = own_range(config)
    shares = torch.from_numpy((values.astype(np.float64) - own.low) / (own.high - own.low)).float().clamp(0, 1)
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    wanted = pipeline(shares, generator=generators, num_inference_steps=2, output_type="np").images
    for i in range(3):
        sample = np.load(tmp_path / f"out/all.npy/{i:06d}.npy")
        assert (sample.dtype, sample.shape) == (np.float32, (2, 8, 8))
        assert np.allclose(sample, wanted[i].transpose(2, 0, 1), atol=1e-3)


def test_conditions_of_another_kind_are_one_line_before_sampling(config: TrainingConfig, tmp_path: Path) -> None:
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "a.png")
    np.save(tmp_path / "float.npy", fields(1)[0, :1])
    np.save(tmp_path / "two.npy", fields(1)[0].astype(np.int16))
    for name, message in (
        ("a.png", "image must hold arrays of int16, .*, which the model makes samples from, got the pic"),
        ("float.npy", "image must be of the model's type, int16, got float32 in"),
        ("two.npy", r"number of channels, 1, got 2: if these are 2 images, save them as \(N, 1, H, W\)"),
    ):
        with pytest.raises(UsageError, match=message):
            sample_from_images(config.output_dir, tmp_path / name, tmp_path / "out", num_inference_steps=2)
    assert not (tmp_path / "out").exists()


def test_psnr_is_of_the_samples_that_held_out_conditions_give(config: TrainingConfig, tmp_path: Path) -> None:
    values = fields(5, seed=7)
    save_array_pairs(tmp_path / "pairs", values, split="train")
    save_array_pairs(tmp_path / "pairs", values, split="test")
    # The rows of the test split are those of training in another place: each has its own condition.
    words = ["--dataset_name", str(tmp_path / "pairs"), "--condition_column", "coarse", "--num_images", "5"]
    words += ["--num_inference_steps", "2", "--cache_dir", str(tmp_path / "cache"), "--out", str(tmp_path / "out")]
    answer = CliRunner().invoke(app, ["evaluate", config.output_dir, "--json", "--metrics", "psnr,ssim", *words])
    assert answer.exit_code == 0, answer.output
    rows = json.loads(answer.stdout)["results"]
    pipeline = ConditionalDDPMPipeline.from_pretrained(config.output_dir)
    range_of_model = pipeline.value_range
    assert range_of_model is not None
    order = np.random.default_rng((0, 0, 0)).permutation(5)  # that of seed 0, by which images are chosen
    for i, number in enumerate(order):
        np.save(tmp_path / f"{i}.npy", condition_of(values[number : number + 1])[0])
    samples = [
        np.load(
            sample_from_images(
                config.output_dir, tmp_path / f"{i}.npy", tmp_path / f"s{i}", seed=i, num_inference_steps=2
            )[0]
        )
        for i in range(5)
    ]
    width = range_of_model.high - range_of_model.low
    truth = np.clip(values[order], range_of_model.low, range_of_model.high)
    errors = [np.mean((sample.astype(np.float64) - each) ** 2) for sample, each in zip(samples, truth, strict=True)]
    assert rows[0]["value"] == pytest.approx(np.mean([10 * math.log10(width**2 / each) for each in errors]), abs=1e-3)
    assert f"the peak is the width of the value range, {width:g}" in rows[0]["remark"]
    assert "input" not in rows[0]  # a condition is no image of the same kind


def test_evaluation_of_the_runs_own_split(
    config: TrainingConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"num_images": 6, "num_inference_steps": (2,), "device": "cpu", "out": tmp_path / "out"}
    (row,) = evaluate(config.output_dir, metrics=("psnr",), **settings)["results"]
    assert row["value"] > 0
    # Training validates on the same split, and both see its conditions in the range of training.
    assert f"made from the column coarse, channels 1, values {own_range(config)}" in capsys.readouterr().err


def test_resumed_run_is_the_run_that_was_not_stopped(config: TrainingConfig, tmp_path: Path) -> None:
    parted = replace(config, output_dir=str(tmp_path / "parted"), resume_from_checkpoint="latest")
    shutil.copytree(config.output_dir, parted.output_dir)
    for path in ("checkpoint-4", "conditional_unet"):
        shutil.rmtree(Path(parted.output_dir, path))
    train(parted)
    assert differences(Path(config.output_dir), Path(parted.output_dir)) == []


def test_tuned_model_keeps_the_units_of_its_conditions(
    config: TrainingConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(config.output_dir) / "scheduler/condition.json"
    model = tmp_path / "model"
    shutil.copytree(config.output_dir, model)
    other = json.loads(path.read_text()) | {"value_range": {**vars(own_range(config)), "low": -2800.0, "high": 0.0}}
    (model / "scheduler/condition.json").write_text(json.dumps(other))
    settings = {"init_from": str(model), "output_dir": str(tmp_path / "run"), "model_config_name_or_path": None}
    tuned = replace(config, **settings, save_figures=False)
    assert isinstance(pipeline := train(tuned), ConditionalDDPMPipeline)
    assert pipeline.condition.value_range == ValueRange(-2800.0, 0.0, "int16")
    lines = [line for line in capsys.readouterr().err.splitlines() if "the column coarse" in line]
    assert all("-2800 to 0" in line for line in lines)  # also of the split that is held out, with what is clipped
    assert sum(line.startswith("clipped: ") for line in lines) == 2
    other["value_range"]["dtype"] = "float32"
    (model / "scheduler/condition.json").write_text(json.dumps(other))
    third = replace(tuned, output_dir=str(tmp_path / "third"), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(UsageError, match=r"condition_column 'coarse' must be .*got int16: .* --value_quantiles 0 1"):
        train(third)
    assert not [*tmp_path.rglob("pixels.bin")]  # before anything is decoded
    assert isinstance(pipeline := train(replace(third, value_quantiles=[0, 1])), ConditionalDDPMPipeline)
    assert pipeline.condition.value_range == own_range(config)
