"""What commands print of their results: sentences for people, one JSON object for scripts."""

import json
import subprocess
import sys

import pytest
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from hf_ddpm import DDPMPipeline, DDPMScheduler, __version__
from hf_ddpm.cli import app
from hf_ddpm.runtime.command_line import exit_code_of
from hf_ddpm.runtime.errors import PushError, RunError, UsageError
from hf_ddpm.runtime.files import weights_sha256, write_atomically
from hf_ddpm.runtime.signals import StoppedOnPurpose
from hf_ddpm.training.posthoc import TRACKED_STDS, snapshot_bytes, snapshot_path
from tests.support.networks import smallest_unet_config


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model of a run, with two snapshots of its averages, a checkpoint and a result of evaluation."""
    from diffusers import UNet2DModel

    folder = tmp_path_factory.mktemp("model")
    unet = UNet2DModel(**smallest_unet_config(channels=1))
    DDPMPipeline(
        unet, DDPMScheduler(10, beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing")
    ).save_pretrained(folder)
    for images in (50, 100):
        tensors = {std: dict(unet.named_parameters()) for std in TRACKED_STDS}
        write_atomically(snapshot_path(folder, images), snapshot_bytes(images, tensors))
    (folder / "checkpoint-7").mkdir()
    (folder / "checkpoint-7" / "progress.json").write_text('{"step": 7, "images": 56}')
    result = {
        "name": "KD",
        "value": 0.5,
        "reference": {"name": "digits", "split": "train", "count": 100},
        "num_compared": [10, 100],
        "sampling": {"scheduler": "unipc", "num_inference_steps": 20, "seed": 0},
    }
    evaluation = {"format": 1, "weights_sha256": weights_sha256(folder), "results": [result]}
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    return folder


def hf_ddpm(*arguments):
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.mark.filterwarnings("ignore:alpha_bar_T")
def test_sample_prints_sentence_or_json(model, tmp_path):
    command = ["sample", model, "--out", tmp_path / "out", "--num_images", 2, "--num_inference_steps", 1]
    assert f"2 images are in {tmp_path / 'out'}; grid.png shows all of them." in hf_ddpm(*command)
    result = json.loads(hf_ddpm(*command, "--json"))
    grid = str(tmp_path / "out" / "grid.png")
    assert result == {"out": str(tmp_path / "out"), "num_images": 2, "grid": grid, "format": "png"}


def test_average_prints_sentence_or_json(model, tmp_path):
    command = ["average", model, "--std", 0.1, "--out", tmp_path / "out"]
    assert f"Measure it with: hf-ddpm evaluate {tmp_path / 'out'}" in hf_ddpm(*command)
    result = json.loads(hf_ddpm(*command, "--json"))
    assert (result["out"], result["std"], result["images"]) == (str(tmp_path / "out"), 0.1, 100)


def test_info_describes_model(model):
    result = json.loads(hf_ddpm("info", model, "--json"))
    weights = load_file(model / "unet" / "diffusion_pytorch_model.safetensors")
    assert result["parameters"] == sum(tensor.numel() for tensor in weights.values())
    assert (result["size"], result["channels"], result["classes"]) == (8, 1, None)
    assert (result["prediction_type"], result["num_train_timesteps"]) == ("epsilon", 10)
    assert (result["steps_trained"], result["images_seen"]) == (7, 56)
    assert [row["value"] for row in result["measured"]] == [0.5]
    lines = hf_ddpm("info", model).splitlines()
    assert "prediction_type      epsilon" in lines
    assert lines[-1].split()[:2] == ["KD", "0.5"]


@pytest.mark.slow
def test_info_reads_model_without_torch(model):
    code = f"""
import sys
from hf_ddpm.cli import app
app(["info", {str(model)!r}], standalone_mode=False)
assert "torch" not in sys.modules and "diffusers" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_info_names_versions_and_devices():
    result = json.loads(hf_ddpm("info", "--json"))
    assert result["hf_ddpm"] == __version__
    assert result["Python"] == sys.version.split()[0]
    assert result["devices"]
    assert f"hf_ddpm          {__version__}" in hf_ddpm("info")


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (UsageError("a setting"), 2, "error: a setting\n"),
        (RunError("the run ended"), 1, "error: the run ended\n"),
        (PushError("the Hub"), 1, "error: the Hub\n"),
        (StoppedOnPurpose("the run is stopped"), 75, "the run is stopped\n"),
    ],
)
def test_exit_code_and_line_of_error(error, code, text, capsys):
    def run():
        raise error

    assert exit_code_of(run) == code
    assert capsys.readouterr().err == text


def test_error_of_the_program_keeps_its_traceback():
    def run():
        raise ValueError("a fault")

    with pytest.raises(ValueError, match="a fault"):
        exit_code_of(run)
    assert exit_code_of(lambda: None) == 0
    assert exit_code_of(lambda: 75) == 75


@pytest.mark.filterwarnings("ignore:alpha_bar_T")
def test_anomaly_prints_auroc_or_json(model, tmp_path):
    for i in range(6):
        folder = tmp_path / "images" / ("good" if i % 3 else "bad")
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 40 * i).save(folder / f"{i}.png")
    command = ["anomaly", model, tmp_path / "images", "--label_column", "label", "--normal", "good", "--strength", 1]
    command += ["--num_inference_steps", 1, "--num_reconstructions", 1, "--cache_dir", tmp_path / "cache"]
    said = hf_ddpm(*command, "--out", tmp_path / "out")
    scores = tmp_path / "out" / "scores.csv"
    assert f"The scores of 6 images are in {scores}, the maps of the highest 6 in {tmp_path / 'out/maps'}" in said
    result = json.loads(hf_ddpm(*command, "--out", tmp_path / "again", "--json"))
    assert result["out"] == str(tmp_path / "again")
    area = result["auroc"]
    assert f"\nbad        2       4       {area['value']:.3f} ± {area['standard_error']:.3f}\n" in said
    assert (tmp_path / "again" / "scores.csv").read_bytes() == scores.read_bytes()


def test_anomaly_refuses_words_for_strengths_before_torch_loads(tmp_path):
    done = CliRunner().invoke(app, ["anomaly", "model", "digits", "--out", str(tmp_path / "x"), "--strength", "half"])
    assert done.exit_code == 2
    assert "strength must be numbers that commas separate, got 'half'" in done.output
    assert not (tmp_path / "x").exists()
