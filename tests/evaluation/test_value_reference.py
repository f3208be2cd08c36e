"""References of the values of arrays: what they hold, and that a model is compared with them as with the data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
from typer.testing import CliRunner

from hf_ddpm import UsageError, evaluate
from hf_ddpm.cli import app
from hf_ddpm.data.config import DataConfig
from hf_ddpm.evaluation.statistics import load_reference
from hf_ddpm.evaluation.value_reference import ValueReference, load_value_reference, make_reference_of_data
from hf_ddpm.value_range import ValueRange
from tests.support.array_models import RANGE, fields, save_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of fields with the splits `train` and `test`."""
    for seed, split in enumerate(("train", "test")):
        (tmp_path / "fields" / split).mkdir(parents=True)
        np.save(tmp_path / "fields" / split / "all.npy", fields(24, seed=seed))
    return tmp_path / "fields"


def config(folder: Path, **settings: Any) -> DataConfig:
    return DataConfig(dataset_name=str(folder), cache_dir=str(folder.parent / "cache"), **settings)


def test_reference_holds_the_moments_of_each_field(folder: Path, tmp_path: Path) -> None:
    made = make_reference_of_data(config(folder), "test", tmp_path / "reference")
    kept = load_value_reference(tmp_path / "reference")
    values = np.load(folder / "test/all.npy").astype(np.float64)
    assert kept.statistics.means.numpy() == pytest.approx(values.mean(axis=(2, 3)))
    assert kept.statistics.covariances[3].numpy() == pytest.approx(np.cov(values[3].reshape(2, -1), bias=True))
    assert kept.metadata == made.metadata
    assert kept.metadata["limits"] == [values.min(), values.max()]
    assert (kept.count, kept.metadata["data"]["split"], kept.metadata["num_clipped"]) == (24, "test", 0)
    with pytest.raises(UsageError, match=r"reference must be of features for this metric, got .*, which is of values"):
        load_reference(tmp_path / "reference")


def test_range_clips_values_and_counts_them(folder: Path, tmp_path: Path) -> None:
    made = make_reference_of_data(config(folder, value_range=[278, 281]), "train", tmp_path / "reference")
    values = np.load(folder / "train/all.npy")
    assert made.metadata["num_clipped"] == ((values < 278) | (values > 281)).sum() > 0
    assert made.metadata["limits"] == [278, 281]
    means = load_value_reference(tmp_path / "reference").statistics.means
    assert means.numpy() == pytest.approx(np.clip(values, 278, 281).astype(np.float64).mean(axis=(2, 3)))


def test_what_is_for_images_alone_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"network has no effect on a reference of arrays, .*got 'inception'"):
        make_reference_of_data(config(folder), "train", tmp_path / "reference", network="inception")
    assert not (tmp_path / "reference").exists()


def test_color_of_16_bits_is_compared_in_its_16_bits(tmp_path: Path) -> None:
    (tmp_path / "color").mkdir()
    colors = np.random.default_rng(0).integers(0, 65536, (14, 4, 4, 3)).astype(np.uint16)
    for i, values in enumerate(colors):
        (tmp_path / f"color/{i:02}.png").write_bytes(imagecodecs.png_encode(values))
    made = make_reference_of_data(config(tmp_path / "color", preserve_input_precision=True), "train", tmp_path / "new")
    assert isinstance(made, ValueReference)
    assert made.metadata["values"] == {"low": 0.0, "high": 65535.0, "dtype": "uint16"}
    assert made.statistics.means.numpy() == pytest.approx(colors.astype(np.float64).mean(axis=(1, 2)))
    with pytest.raises(UsageError, match="preserve_input_precision must be left out for images whose features"):
        make_reference_of_data(
            DataConfig(dataset_name="digits", preserve_input_precision=True), "train", tmp_path / "d"
        )


@pytest.mark.slow
def test_features_of_color_of_16_bits_say_that_they_are_of_8(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "color").mkdir()
    for i in range(5):
        values = np.full((32, 32, 3), 1000 * i, np.uint16)
        (tmp_path / f"color/{i}.png").write_bytes(imagecodecs.png_encode(values))
    make_reference_of_data(config(tmp_path / "color"), "train", tmp_path / "new", network="efficientnet-lite0")
    assert "not read: the lower 8 of 16 bits of color" in capsys.readouterr().err
    assert load_reference(tmp_path / "new").count == 5


@pytest.mark.slow
def test_figures_are_those_of_the_folder(folder: Path, tmp_path: Path) -> None:
    """Also where the model clips: by a reference that is clipped alike."""
    narrow = ValueRange(272.0, 288.0, "float32")
    settings = {"metrics": ("values",), "num_images": 16, "num_inference_steps": (2,), "device": "cpu"}
    for name, value_range in (("wide", RANGE), ("narrow", narrow)):
        model = save_model(tmp_path / name, value_range=value_range)
        of_folder = evaluate(model, data=config(folder), out=tmp_path / f"{name}-folder", **settings)["results"]
        reference, clips = tmp_path / f"{name}-reference", {"value_range": [272.0, 288.0]} if name == "narrow" else {}
        make_reference_of_data(config(folder, **clips), "train", reference)
        out = tmp_path / f"{name}-out"
        (row,) = evaluate(model, reference=reference, out=out, **settings)["results"]
        for key in ("value", "real_vs_real", "reference", "spectra", "num_compared", "remark"):
            assert row[key] == of_folder[0][key]
        assert (out / "figures/spectrum.png").is_file()
    other = tmp_path / "other"
    make_reference_of_data(config(folder), "test", other)
    wide = {"reference": tmp_path / "wide-reference", "other_reference": other, "out": tmp_path / "third"}
    (row,) = evaluate(tmp_path / "wide", **wide, **settings)["results"]
    assert row["real_vs_real"]["of"] == "test against train"
    with pytest.raises(UsageError, match="must be of different images, got the same twice"):
        evaluate(tmp_path / "wide", **{**wide, "other_reference": wide["reference"]}, **settings)
    with pytest.raises(UsageError, match=r"in the model's range, 272.0 to 288.0, .*--value_range 272.0 288.0"):
        evaluate(tmp_path / "narrow", reference=other, out=tmp_path / "fourth", **settings)
    one = save_model(tmp_path / "one", channels=1)
    with pytest.raises(UsageError, match=r"must have equal settings(.|\n)*channels +2 +1"):
        evaluate(one, reference=other, out=tmp_path / "fourth", **settings)
    assert not (tmp_path / "fourth").exists()


@pytest.mark.slow
def test_command_names_the_next_one(folder: Path, tmp_path: Path) -> None:
    arguments = ["reference", folder, "--out", tmp_path / "r", "--cache_dir", tmp_path / "cache"]
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["metric"] == "Fréchet distance of values"
    result = CliRunner().invoke(app, [*map(str, arguments[:3]), str(tmp_path / "s"), *map(str, arguments[4:])])
    assert f"hf-ddpm evaluate MODEL --reference {tmp_path / 's'} --metrics values" in result.stdout.replace("\n", " ")
