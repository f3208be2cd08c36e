"""A run on columns of volumes: slices are made from slices, from the table to samples and measurements."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
from typer.testing import CliRunner

from hf_ddpm import ConditionalDDPMPipeline, evaluate
from hf_ddpm.cli import app
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.loop import train
from tests.data.test_volume_pairs import condition_of, save_pairs, save_volume, volumes
from tests.support.runs import differences
from tests.support.trained import pair_settings

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(datasets, "Nifti"), reason="this version of datasets has no volumes"),
]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainingConfig:
    """The settings of a run that is finished: t2, made from t1 of another type."""
    folder = tmp_path_factory.mktemp("volume-pairs")
    save_pairs("parquet", folder / "table")
    config = TrainingConfig(
        dataset_name=str(folder / "table"),
        condition_column="t1",
        resolution=8,
        eval_fraction=0.6,
        group_column="file",
        **pair_settings(folder, channels=1, conditions=1),
        center_crop=True,
        save_figures=False,
    )
    train(config)
    return config


def test_a_volume_gives_a_sample_for_each_slice(config: TrainingConfig, tmp_path: Path) -> None:
    pipeline = ConditionalDDPMPipeline.from_pretrained(config.output_dir)
    assert pipeline.value_range is not None
    assert pipeline.condition.value_range is not None
    assert (pipeline.value_range.dtype, pipeline.condition.value_range.dtype) == ("int16", "float32")
    scan = np.tile(condition_of(volumes()[2])[:, :2], (1, 4, 1))  # (8, 8, 4)
    command = ["sample", config.output_dir, "--image", save_volume(tmp_path / "t1.nii.gz", scan)]
    command += ["--num_inference_steps", "2", "--scheduler", "ddpm", "--out", str(tmp_path / "out")]
    answer = CliRunner().invoke(app, command)
    assert answer.exit_code == 0, answer.output
    samples = [np.load(path) for path in sorted((tmp_path / "out/t1.nii.gz").iterdir())]
    assert [(sample.shape, sample.dtype) for sample in samples] == [((1, 8, 8), np.int16)] * 4


def test_held_out_volumes_are_measured(config: TrainingConfig, tmp_path: Path) -> None:
    assert json.loads((Path(config.output_dir) / "eval.jsonl").read_text())["psnr"] > 0
    settings = {"num_images": 4, "num_inference_steps": (2,), "device": "cpu", "out": tmp_path / "out"}
    psnr, ssim = evaluate(config.output_dir, metrics=("psnr", "ssim"), **settings)["results"]
    assert psnr["value"] > 0
    assert -1 <= ssim["value"] <= 1
    assert psnr["num_compared"] == [4]


def test_resumed_run_is_the_run_that_was_not_stopped(config: TrainingConfig, tmp_path: Path) -> None:
    # Volumes whose bytes are in the table are written into another cache.
    settings = {"output_dir": str(tmp_path / "parted"), "resume_from_checkpoint": "latest"}
    parted = replace(config, **settings, cache_dir=str(tmp_path / "cache"))
    shutil.copytree(config.output_dir, parted.output_dir)
    for path in ("checkpoint-4", "conditional_unet"):
        shutil.rmtree(Path(parted.output_dir, path))
    train(parted)
    assert differences(Path(config.output_dir), Path(parted.output_dir)) == []
