"""Anomaly maps of arrays: in the units of the data, and largest where a field was changed."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hf_ddpm import DDPMPipeline, UsageError
from hf_ddpm.data.config import DataConfig
from hf_ddpm.evaluation.anomaly import anomaly_maps
from hf_ddpm.evaluation.detection import find_anomalies
from hf_ddpm.solvers import named_scheduler
from tests.support.array_models import RANGE, fields, save_model

SMALL: dict[str, Any] = {"num_inference_steps": 4, "num_reconstructions": 1, "device": "cpu"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A file of two good fields, and one of two that have a value beyond the model's range."""
    values = fields(4)
    values[2:, 1, 3, 5] = 400
    for name, array in (("good/a", values[:2]), ("odd/c", values[2:])):
        path = tmp_path / "fields" / f"{name}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, array)
    return tmp_path / "fields"


def config(folder: Path, **settings: Any) -> DataConfig:
    return DataConfig(dataset_name=str(folder), cache_dir=str(folder.parent / "cache"), **settings)


def test_map_is_largest_where_a_value_was_planted_beyond_the_range(folder: Path, tmp_path: Path) -> None:
    model, out = save_model(tmp_path / "model"), tmp_path / "out"
    result = find_anomalies(model, config(folder, label_column="label"), out, normal=["good"], **SMALL)
    assert result["unit"] == "squared units of the data"
    assert result["data"]["num_clipped"] == 2
    assert result["auroc"]["value"] == 1
    rows = list(csv.DictReader((out / "scores.csv").read_text().splitlines()))
    assert [row["file_name"] for row in rows] == [
        f"{name}.npy/00000{i}" for name in ("good/a", "odd/c") for i in (0, 1)
    ]
    maps = [np.load(out / "maps" / f"{row['file_name']}.npy") for row in rows]
    for each, row in zip(maps, rows, strict=True):
        assert each.mean(dtype=np.float64) == pytest.approx(float(row["score"]))
    assert np.unravel_index(maps[2].argmax(), (8, 8)) == (3, 5)
    assert maps[2].max() >= (400 - RANGE.high) ** 2 / 2  # a mean over two channels
    with Image.open(out / "maps/odd/c.npy/000001.png") as picture:
        assert picture.size == (8, 8)
    assert json.loads((out / "anomaly.json").read_text()) == result


def test_maps_are_those_of_x_0_in_the_units_of_the_data(folder: Path, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    find_anomalies(model, config(folder), tmp_path / "out", **SMALL)
    pipeline = DDPMPipeline.from_pretrained(model)
    pipeline.scheduler = named_scheduler("unipc", pipeline.scheduler.config, 4)
    x_0 = RANGE.to_x_0(torch.from_numpy(np.load(folder / "good/a.npy")))
    maps, _ = anomaly_maps(pipeline, x_0, [0, 1], strengths=[0.4], num_inference_steps=4)
    for i, each in enumerate(maps.numpy()):
        assert np.load(tmp_path / f"out/maps/good/a.npy/00000{i}.npy") == pytest.approx(each * 30**2, rel=1e-4)


def test_what_cannot_be_compared_is_refused(folder: Path, tmp_path: Path) -> None:
    model, integers = save_model(tmp_path / "model"), tmp_path / "integers"
    integers.mkdir()
    np.save(integers / "a.npy", np.zeros((2, 8, 8), np.uint8))
    for data, message in (
        (config(folder, value_range=[0, 1]), r"value_range must be left out for a model of arrays, which has its own"),
        (config(integers), "the data must be of the model's type, float32, got uint8 in train"),
    ):
        with pytest.raises(UsageError, match=message):
            find_anomalies(model, data, tmp_path / "out", **SMALL)
    assert not (tmp_path / "out").exists()
