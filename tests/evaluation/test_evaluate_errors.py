"""Evaluation refuses what cannot work before it samples, and leaves the folder as it was."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, UNet2DModel
from typer.testing import CliRunner

from hf_ddpm.cli import app
from hf_ddpm.data.config import cache_folder
from hf_ddpm.evaluation import statistics
from hf_ddpm.evaluation.evaluate import evaluate
from hf_ddpm.evaluation.features import load_network
from hf_ddpm.evaluation.statistics import make_reference
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.training.config import TrainingConfig
from tests.support.evaluations import (
    config_of,
    files_in,
    labeled_folder,
    results_in,
)

pytestmark = pytest.mark.filterwarnings(r"ignore:`torch\.jit\.:DeprecationWarning")


ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "metric": (
        {"metrics": ["fid"]},
        "metrics must be of fd, kid, cmmd, precision, nll, memorization, values, psnr, ssim, lpips, got fid",
    ),
    "no metric": ({"metrics": []}, "got none"),
    "scheduler": ({"schedulers": ["euler"]}, "scheduler must be one of ddpm, ddim, .*, got 'euler'"),
    "dtype": ({"dtype": "fp16"}, "dtype must be one of fp32, bf16, got 'fp16'"),
    "steps": ({"num_inference_steps": [2, 21]}, r"num_inference_steps must be in \[1, 20\], got 21"),
    "batch": ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    "too few for fd": ({"num_images": 8}, "8 images are not more than the 8 dimensions of inception"),
    "too few for kid": ({"metrics": ["kid"], "num_images": 3}, "num_images must be at least 4 for kid, got 3"),
    "too few for precision": ({"metrics": ["precision"], "num_images": 5}, "at least 6 for precision, got 5"),
    "too few copies": ({"metrics": ["memorization"], "num_images": 19}, "at least 20 for memorization, got 19"),
    "network": ({"network": "vgg"}, "network must be one of"),
    "network file": ({"network_path": "nowhere.pt"}, "network_path must be the weights file of inception"),
    "cmmd": ({"metrics": ["cmmd"]}, "cmmd is of CLIP's embeddings, got the network 'inception'"),
    "reference": ({"reference": "nowhere"}, "make one with `hf-ddpm reference`"),
    "other_reference": ({"other_reference": "nowhere"}, "other_reference goes with a reference"),
    "device": ({"device": "abacus"}, "device must be one that torch finds here, as cpu, got 'abacus'"),
    "split": ({"split": "validation"}, "^split must be .*got 'validation'"),
    "test split": ({"metrics": ["nll"], "test_split": "validation"}, "^test_split must be .*got 'validation'"),
    "test split of distances": ({"test_split": "tset"}, "^test_split must be .*got 'tset'"),
    "terms": ({"metrics": ["nll"], "timesteps_per_image": 1}, r"timesteps_per_image must be in \[2, 20\]"),
    "too many terms": ({"metrics": ["nll"], "timesteps_per_image": 21}, r"timesteps_per_image must be in \[2, 20\]"),
    "guidance of nll": (
        {"metrics": ["nll"], "guidance_scales": [1, 2]},
        "guidance_scale has no effect on nll, which is of the model without guidance, got 2: leave it out",
    ),
    "held-out are training": (
        {"metrics": ["memorization"], "test_split": "train"},
        "held-out images must not be training images, got 300 of 300",
    ),
    "resolution": ({"data": TrainingConfig(dataset_name="digits", resolution=9)}, "resolution must be the model's, 8"),
    "no test split": (
        {"metrics": ["nll"], "data": TrainingConfig(dataset_name="digits")},
        "^test_split must be train, which is all that digits has",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("steps", ["5,many", "2.5", "-5"])
def test_command_line_names_the_option_of_steps_that_are_no_numbers(run: Path, steps: str):
    done = CliRunner().invoke(app, ["evaluate", str(run), "--metrics", "kid", "--num_inference_steps", steps])
    assert done.exit_code == 2
    assert f"num_inference_steps must be whole numbers, got {steps!r}" in done.output


@pytest.mark.usefixtures("no_sampling")
@pytest.mark.parametrize("name", ERRORS)
def test_evaluate_rejects_settings_before_sampling(run: Path, measure: Any, name: str):
    before = files_in(run)
    settings, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        measure(run, **settings)
    assert files_in(run) == before


@pytest.mark.slow
@pytest.mark.usefixtures("no_sampling")
def test_evaluate_rejects_folders_before_sampling(
    run: Path,
    stock: Path,
    of_classes: Path,
    measure: Any,
    digits: Path,
    tmp_path: Path,
):
    for model, settings, message in (
        (tmp_path, {}, "must be a folder with model_index.json"),
        (tmp_path / "not" / "there", {}, "must be a folder with model_index.json"),
        ("me/photos", {}, "must be a folder or on the Hub, got 'me/photos'"),
        (stock, {}, "the data must be known for this"),
        (run, {"out": of_classes}, "out must not hold another model"),
        (run, {"out": run / "config.yaml"}, "out must be a folder, got .*config.yaml.*, which is a file"),
    ):
        with pytest.raises(UsageError, match=message):
            measure(model, **settings)
    (stock / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline", "unet": ["d", "UNet2D"]}')
    with pytest.raises(UsageError, match=r"must be a DDPMPipeline .* a StableDiffusionPipeline"):
        measure(stock)

    (run / "evaluation.json").write_text('{"format": 1, "results"')
    with pytest.raises(UsageError, match=r"evaluation\.json cannot be read: .*: move it away"):
        measure(run)
    (run / "evaluation.json").unlink()
    recorded = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({"data": {"fingerprint": "ab" * 32}}))
    with pytest.raises(UsageError, match="trained on, got images with the fingerprint") as caught:
        measure(run)
    assert "ab" * 32 in str(caught.value)
    assert recorded["data"]["fingerprint"] in str(caught.value)
    with torch.no_grad():
        pipeline = DDPMPipeline.from_pretrained(run)
        pipeline.unet.conv_out.bias.fill_(torch.nan)
    pipeline.save_pretrained(run)
    with pytest.raises(UsageError, match=r"must have finite weights, got NaN .* first in 'conv_out"):
        measure(run, data=config_of(digits))


@pytest.mark.slow
@pytest.mark.usefixtures("no_sampling")
def test_references_that_cannot_be_written_are_refused_before_their_features_are_computed(
    run: Path, measure: Any, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    data = replace(config_of(digits), cache_dir=str(tmp_path / "cache"))
    cache_folder(data).mkdir(parents=True)
    (cache_folder(data) / "references").write_text("a file where a folder is to be")
    monkeypatch.setattr(statistics, "collect", lambda *_: pytest.fail("features were computed before"))
    with pytest.raises(UsageError, match=r"out must be a folder that can be written, got .*references"):
        measure(run, data=data)


@pytest.mark.slow
@pytest.mark.usefixtures("no_sampling")
def test_evaluate_rejects_references_of_another_kind(
    run: Path, measure: Any, digits: Path, network_file: Path, tmp_path: Path
):
    network = load_network("inception", network_file)
    for name, value in (("resolution", 4), ("channels", 3)):
        make_reference(config_of(digits, **{name: value}), "test", network, tmp_path / name)
        with pytest.raises(UsageError, match="they differ in") as caught:
            measure(run, reference=tmp_path / name)
        expected = [name, str(value), {"resolution": "8", "channels": "1"}[name]]
        assert [line.split() for line in str(caught.value).splitlines()][2] == expected
    few = tmp_path / "few"
    for i in range(8):
        (few / "train").mkdir(parents=True, exist_ok=True)
        shutil.copy(digits / "train" / f"{i:04}.png", few / "train")
    make_reference(config_of(few, resolution=8, channels=1), "train", network, tmp_path / "small")
    with pytest.raises(UsageError, match="the reference must be more for fd, got 8"):
        measure(run, reference=tmp_path / "small")


@pytest.mark.slow
@pytest.mark.usefixtures("no_sampling")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_images": 8}, "num_images must be more for fd, got 8"),
        ({"split": "few"}, "the reference must be more for fd, got 5"),
        ({"split": "few", "metrics": ["precision"]}, "the reference must be at least 6 for precision, got 5"),
    ],
)
def test_evaluate_counts_images_before_their_features(
    run: Path, measure: Any, digits: Path, tmp_path: Path, settings, message
):
    data = tmp_path / "data"
    shutil.copytree(digits, data)
    (data / "few").mkdir()
    for i in range(5):
        shutil.copy(data / "train" / f"{i:04}.png", data / "few")
    config = replace(config_of(data), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(UsageError, match=message):
        measure(run, data=config, **settings)
    assert not (tmp_path / "cache" / "hf_ddpm" / "references").exists()


def test_missing_network_is_answered_first_and_names_one_that_needs_no_download(
    run: Path, tmp_path: Path, monkeypatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    (run / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"")  # which nobody reads before
    message = "or --network efficientnet-lite0, which is installed here and needs no download"
    with pytest.raises(UsageError, match=message):
        evaluate(run)


@pytest.mark.slow
def test_evaluate_writes_nothing_for_samples_that_are_not_finite(run: Path, measure: Any):
    pipeline = DDPMPipeline.from_pretrained(run)
    with torch.no_grad():
        pipeline.unet.conv_out.weight.fill_(3e38)
    pipeline.save_pretrained(run)
    before = files_in(run)
    with pytest.raises(ValueError, match="samples must be finite, got NaN for seed 0"):
        measure(run)
    assert files_in(run) == before


@pytest.mark.slow
def test_evaluate_rejects_a_class_without_images(of_classes: Path, measure: Any, digits: Path, tmp_path: Path):
    data = labeled_folder(tmp_path / "empty", {"train": [1] * 30, "test": [0, 1] * 10}, digits)
    config = replace(config_of(digits, label_column="kind"), dataset_name=str(data))
    with pytest.raises(UsageError, match="each class must have images in train, got none of 'even'"):
        measure(of_classes, metrics=["kid"], data=config)


@pytest.mark.slow
def test_evaluate_refuses_a_folder_with_results_of_another_model(run: Path, stock: Path, measure: Any, digits: Path):
    out = run.with_name("elsewhere") / "results"
    measure(run, metrics=["kid"], out=out)
    assert "--out results" in results_in(out)[0]["command"]
    assert f'from_pretrained("{run}")' in (out / "README.md").read_text()
    unet = UNet2DModel.from_pretrained(stock / "unet")
    with torch.no_grad():
        unet.conv_out.weight *= 2
    unet.save_pretrained(stock / "unet")
    before = files_in(out)
    with pytest.raises(UsageError, match="out must not hold what was measured of other weights"):
        measure(stock, metrics=["kid"], data=config_of(digits), out=out)
    assert files_in(out) == before
