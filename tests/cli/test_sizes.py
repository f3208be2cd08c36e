"""Commands on a model of images that are not square."""

from __future__ import annotations

import json

import pytest
from PIL import Image
from typer.testing import CliRunner

from hf_ddpm import DDPMPipeline, DDPMScheduler
from hf_ddpm.cli import app


@pytest.fixture
def model(make_unet, tmp_path):
    unet = make_unet(1, sample_size=[8, 12])
    scheduler = DDPMScheduler(10, beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing")
    DDPMPipeline(unet, scheduler).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_info_says_which_side_is_which(model):
    result = CliRunner().invoke(app, ["info", model], catch_exceptions=False)
    assert "8 x 12 (height x width)" in result.output


@pytest.mark.slow
def test_sample_records_another_size_and_keeps_sets_apart(model, tmp_path):
    out = tmp_path / "samples"
    command = ["sample", model, "--out", str(out), "--num_images", "1", "--num_inference_steps", "2"]
    for flags, size, recorded in (([], (12, 8), None), (["--resolution", "16", "10"], (10, 16), [16, 10])):
        result = CliRunner().invoke(app, [*command, *flags], catch_exceptions=False)
        if recorded is not None:  # the folder holds the set of the model's own size
            assert "resolution=None, got resolution=[16, 10]" in result.stderr
            command[3] = str(out := tmp_path / "larger")
            result = CliRunner().invoke(app, [*command, *flags], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        with Image.open(out / "000000.png") as image:
            assert image.size == size
        assert json.loads((out / "samples.json").read_text())["resolution"] == recorded
    result = CliRunner().invoke(app, [*command, "--resolution", "15"], catch_exceptions=False)
    assert "height and width must be multiples of 2, got 15 x 15" in result.stderr
