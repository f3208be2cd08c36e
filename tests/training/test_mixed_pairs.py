"""Runs on pairs of a picture and an array: from the files to samples and measurements, each in its own values."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import imagecodecs
import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from hf_ddpm import ConditionalDDPMPipeline, evaluate
from hf_ddpm.cli import app
from hf_ddpm.condition import Condition
from hf_ddpm.hub.info import model_info
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.sampling.conditional_set import sample_from_images
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.loop import train
from hf_ddpm.value_range import ValueRange
from tests.data.test_mixed_pairs import depth_of, photos, save_files, settings_of
from tests.support.networks import smallest_unet_config
from tests.support.runs import differences
from tests.support.trained import pair_settings

pytestmark = pytest.mark.slow

PHOTOS = photos(10)
DEPTHS = np.stack([depth_of(photo) for photo in PHOTOS])
STEPS = ["--num_inference_steps", "2", "--scheduler", "ddpm"]


class Run(NamedTuple):
    """A run that is finished.

    Args:
        config: Its settings.
        makes_depths: Whether it makes depths from photographs; else photographs from depths.
    """

    config: TrainingConfig
    makes_depths: bool


@pytest.fixture(scope="module", params=["depth from image", "image from depth"])
def run(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Run:
    """A run of each direction, on the same files."""
    folder, makes_depths = tmp_path_factory.mktemp("mixed"), request.param.startswith("depth")
    save_files(folder / "pairs", PHOTOS)
    config = TrainingConfig(
        train_data_dir=str(folder / "pairs"),
        **settings_of(request.param),
        eval_fraction=0.4,
        **pair_settings(folder, channels=1 if makes_depths else 3, conditions=3 if makes_depths else 1),
    )
    train(config)
    return Run(config, makes_depths)


def pipeline_of(run: Run) -> ConditionalDDPMPipeline:
    pipeline = ConditionalDDPMPipeline.from_pretrained(run.config.output_dir)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_inputs(run: Run, folder: Path, pictures: list[np.ndarray]) -> Path:
    """Save what samples are made from, a file each."""
    folder.mkdir()
    for i, photo in enumerate(pictures):
        if run.makes_depths:
            Image.fromarray(photo).save(folder / f"{i}.{'tif' if i == 2 else 'png'}")  # TIFF files may be pictures
        else:
            np.save(folder / f"{i}.npy", depth_of(photo))
    return folder


def test_run_keeps_the_values_of_each_column(run: Run) -> None:
    folder, pipeline = Path(run.config.output_dir), pipeline_of(run)
    values = pipeline.value_range if run.makes_depths else pipeline.condition.value_range
    assert values is not None
    assert DEPTHS.min() <= values.low < values.high <= DEPTHS.max()
    if run.makes_depths:
        assert pipeline.condition == Condition(3, column="image")
        assert pipeline.condition_values is None
    else:
        assert pipeline.value_range is None
        assert pipeline.condition == Condition(1, column="depth", value_range=values)
    assert json.loads((folder / "eval.jsonl").read_text())["psnr"] > 0
    words = "images of the column image" if run.makes_depths else f"arrays of the column depth ({values})"
    assert model_info(str(folder))["made_from"] == words
    for name in ("samples.png", "reverse.png", "psnr.png"):
        assert (folder / "figures" / name).is_file()
    with Image.open(folder / "figures/samples.png") as picture:  # of photographs beside depths in gray
        assert picture.mode == "RGB"


def test_code_on_the_card_runs(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = (Path(run.config.output_dir) / "README.md").read_text()
    monkeypatch.chdir(tmp_path)
    Image.fromarray(PHOTOS[0]).save("image.png")
    np.save("array.npy", DEPTHS[0])
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    variables: dict[str, Any] = {}
    exec(code, variables)
    if run.makes_depths:
        assert (variables["sample"].shape, variables["sample"].dtype) == ((8, 8, 1), np.float32)
    else:
        assert (variables["sample"].size, variables["sample"].mode) == ((8, 8), "RGB")


def test_samples_are_of_the_kind_of_the_images(run: Run, tmp_path: Path) -> None:
    inputs = save_inputs(run, tmp_path / "in", PHOTOS[:3])
    command = ["sample", run.config.output_dir, "--image", str(inputs), *STEPS, "--out", str(tmp_path / "out")]
    answer = CliRunner().invoke(app, command)
    assert answer.exit_code == 0, answer.output
    pipeline = pipeline_of(run)
    given: Any = [*map(Image.fromarray, PHOTOS[:3])]
    if not run.makes_depths:
        assert pipeline.condition_values is not None
        given = pipeline.condition_values.to_unit_interval(torch.from_numpy(DEPTHS[:3]))
    generators = [torch.Generator().manual_seed(i) for i in range(3)]
    wanted: Any = pipeline(given, generator=generators, num_inference_steps=2, output_type="np").images
    for i in range(3):
        if run.makes_depths:
            sample = np.load(tmp_path / f"out/{i}.npy")
            assert (sample.shape, sample.dtype) == ((1, 8, 8), np.float32)
            assert np.allclose(sample, wanted[i].transpose(2, 0, 1), atol=1e-3)
        else:
            sample = np.asarray(Image.open(tmp_path / f"out/{i}.png"))
            assert np.array_equal(sample, np.rint(255 * wanted[i]).astype(np.uint8))
    assert (tmp_path / "out/samples.png").is_file()


def test_wrong_files_are_one_line_before_sampling(run: Run, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", DEPTHS[0])
    Image.fromarray(PHOTOS[0]).save(tmp_path / "a.png")
    cases = [
        ("a.npy", None, "image must hold pictures, which the model makes samples from, got the array a.npy"),
        ("a.png", "png", "format must be one of npy, tif, got 'png'"),
    ]
    if not run.makes_depths:
        cases = [
            ("a.png", None, "image must hold arrays of float32, .*, which the model makes samples from, got the pic"),
            ("a.npy", "npy", "format must be png for pictures, got 'npy': leave it out"),
        ]
    for name, format, message in cases:
        with pytest.raises(UsageError, match=message):
            sample_from_images(run.config.output_dir, tmp_path / name, tmp_path / "out", format=format)
    assert not (tmp_path / "out").exists()


def test_psnr_is_in_the_units_of_the_images(run: Run, tmp_path: Path) -> None:
    pictures = photos(4, first=40)
    for split in ("train", "test"):
        save_files(tmp_path / "pairs" / split, pictures)
    words = ["--dataset_name", str(tmp_path / "pairs"), "--num_images", "4", "--cache_dir", str(tmp_path / "cache")]
    for name in ("image_column", "condition_column"):
        words += [f"--{name}", getattr(run.config, name)]
    words += [*STEPS, "--out", str(tmp_path / "out"), "--metrics", "psnr,ssim"]
    answer = CliRunner().invoke(app, ["evaluate", run.config.output_dir, "--json", *words])
    assert answer.exit_code == 0, answer.output
    psnr, ssim = json.loads(answer.stdout)["results"]
    assert -1 <= ssim["value"] <= 1
    order = np.random.default_rng((0, 0, 0)).permutation(4)  # that of seed 0, by which images are chosen
    inputs = save_inputs(run, tmp_path / "in", [pictures[number] for number in order])
    settings = {"scheduler": "ddpm", "num_inference_steps": 2}
    samples = sample_from_images(run.config.output_dir, inputs, tmp_path / "samples", **settings)
    values, errors = pipeline_of(run).value_range, []
    for path, number in zip(samples, order, strict=True):
        if values is not None:
            truth = np.clip(depth_of(pictures[number]), values.low, values.high)
            errors.append(np.mean((np.load(path).astype(np.float64) - truth) ** 2))
        else:
            errors.append(np.mean((np.asarray(Image.open(path)).astype(np.float64) - pictures[number]) ** 2))
    peak = 255 if values is None else values.high - values.low
    assert psnr["value"] == pytest.approx(np.mean([10 * math.log10(peak**2 / error) for error in errors]), abs=1e-3)
    assert ("the peak is the width of the value range" in psnr.get("remark", "")) is run.makes_depths


def test_resumed_run_is_the_run_that_was_not_stopped(run: Run, tmp_path: Path) -> None:
    parted = replace(run.config, output_dir=str(tmp_path / "parted"), resume_from_checkpoint="latest")
    shutil.copytree(run.config.output_dir, parted.output_dir)
    for path in ("checkpoint-4", "conditional_unet"):
        shutil.rmtree(Path(parted.output_dir, path))
    train(parted)
    assert differences(Path(run.config.output_dir), Path(parted.output_dir)) == []


def test_tuned_model_keeps_its_units(run: Run, tmp_path: Path) -> None:
    path = Path(run.config.output_dir) / "scheduler" / ("values.json" if run.makes_depths else "condition.json")
    model = tmp_path / "model"
    shutil.copytree(run.config.output_dir, model)
    content = json.loads(path.read_text())
    (content if run.makes_depths else content["value_range"]).update(low=-50.0, high=50.0)
    (model / path.relative_to(run.config.output_dir)).write_text(json.dumps(content))
    settings = {"init_from": str(model), "output_dir": str(tmp_path / "run"), "model_config_name_or_path": None}
    tuned = replace(run.config, **settings, save_figures=False, max_train_steps=1)
    pipeline = train(tuned)
    assert isinstance(pipeline, ConditionalDDPMPipeline)
    values = pipeline.value_range if run.makes_depths else pipeline.condition.value_range
    assert values == ValueRange(-50.0, 50.0, "float32")
    if not run.makes_depths:  # a model of arrays is not tuned on pictures in their place
        pairs = save_files(tmp_path / "pairs", PHOTOS)
        for i, photo in enumerate(PHOTOS):
            Image.fromarray(photo[:, :, 0]).save(pairs / f"depths/{i}.png")
        metadata = (pairs / "metadata.csv").read_text().replace(".npy", ".png")
        (pairs / "metadata.csv").write_text(metadata)
        other = replace(tuned, train_data_dir=str(pairs), output_dir=str(tmp_path / "other"))
        with pytest.raises(
            UsageError, match=r"condition_column 'depth' must be .* got images: convert them to float32$"
        ):
            train(other)


def test_pictures_that_are_made_from_color_of_16_bits_are_measured(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    colors = [imagecodecs.png_encode(rng.integers(0, 65536, (8, 8, 3)).astype(np.uint16)) for _ in range(8)]
    grays = [Image.fromarray(rng.integers(0, 256, (8, 8)).astype(np.uint8)) for _ in range(8)]
    rows = {"gray": grays, "color": [{"bytes": bytes(content), "path": None} for content in colors]}
    table = datasets.Dataset.from_dict(rows, features=datasets.Features(dict.fromkeys(rows, datasets.Image())))
    table.to_parquet(str(tmp_path / "table/train.parquet"))
    (tmp_path / "unet.json").write_text(json.dumps(smallest_unet_config(1, in_channels=4)))
    config = TrainingConfig(
        dataset_name=str(tmp_path / "table"),
        image_column="gray",
        condition_column="color",
        preserve_input_precision=True,
        model_config_name_or_path=str(tmp_path / "unet.json"),
        output_dir=str(tmp_path / "run"),
        cache_dir=str(tmp_path / "cache"),
        train_batch_size=2,
        max_train_steps=1,
        ddpm_num_steps=10,
        lr_warmup_steps=0,
        save_figures=False,
        eval_batch_size=1,
        cpu_threads_per_process=1,
    )
    pipeline = train(config)
    assert isinstance(pipeline, ConditionalDDPMPipeline)
    assert pipeline.condition.value_range is not None
    assert pipeline.condition.value_range.dtype == "uint16"
    settings = {"test_split": "train", "num_images": 4, "num_inference_steps": (2,), "device": "cpu"}
    (psnr,) = evaluate(config.output_dir, metrics=("psnr",), **settings, out=tmp_path / "out")["results"]
    assert psnr["value"] > 0
