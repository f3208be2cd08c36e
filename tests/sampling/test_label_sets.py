"""Sets of samples of models that are conditioned on numbers and on several columns."""

import json
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from hf_ddpm import DDPMImg2ImgPipeline, DDPMInpaintPipeline, DDPMPipeline, DDPMScheduler
from hf_ddpm.classes import Classes
from hf_ddpm.cli import app
from hf_ddpm.data.config import DataConfig
from hf_ddpm.data.images import load_images
from hf_ddpm.inversion import invert
from hf_ddpm.labels import Columns, values_of
from hf_ddpm.network import make_unet
from hf_ddpm.sampling.image_set import write_samples
from tests.support.networks import smallest_unet_config

SLANT = values_of("slant", np.linspace(-1, 1, 101), has_unconditional=True)
BOTH = Columns((("digit", Classes(("zero", "one", "two"), True)), ("slant", SLANT)), has_unconditional=True)


@pytest.fixture(params=[SLANT, BOTH], ids=["number", "columns"])
def model(request, tmp_path) -> tuple[Any, str]:
    path = tmp_path / "unet.json"
    path.write_text(json.dumps(smallest_unet_config(channels=1)))
    unet = make_unet(1, (8, 8), labels=request.param, model_config=str(path))
    unet.conv_out.reset_parameters()
    pipeline = DDPMPipeline(unet.eval(), DDPMScheduler(20, beta_schedule="squaredcos_cap_v2"))
    pipeline.labels = request.param
    pipeline.save_pretrained(tmp_path / "model")
    return request.param, str(tmp_path / "model")


@pytest.mark.slow
def test_set_has_its_labels_in_the_units_of_the_data(model, tmp_path):
    labels, folder = model
    rows = [labels.in_turn[i % 5] for i in range(12)]
    expected = {"label": rows} if labels is SLANT else {name: [row[name] for row in rows] for name in labels.names}
    for format in ("png", "parquet", "npz"):
        write_samples(folder, tmp_path / format, num_images=12, num_inference_steps=2, device="cpu", format=format)
    lines = [json.loads(line) for line in (tmp_path / "png/metadata.jsonl").read_text().splitlines()]
    assert {name: [line[name] for line in lines] for name in expected} == expected
    arrays = np.load(tmp_path / "npz/samples.npz")
    for name, column in expected.items():
        assert arrays["labels" if name == "label" else name].tolist() == column
    # What one command writes, the others read.
    for format in ("png", "parquet"):
        settings = {"dataset_name": str(tmp_path / format), "cache_dir": str(tmp_path / "cache")}
        images = load_images(DataConfig(**settings, label_column=",".join(expected)))
        assert images.label_columns is not None
        values = np.array(images.labels).reshape(12, -1).T
        for (name, class_names), column in zip(images.label_columns, values, strict=True):
            known = column.tolist() if class_names is None else [class_names[int(number)] for number in column]
            assert known == expected[name]
    with Image.open(tmp_path / "png/grid.png") as sheet:
        assert sheet.width > 2 * sheet.height / 5  # two columns and their titles


@pytest.mark.slow
def test_commands_take_a_label(model, tmp_path):
    labels, folder = model
    text, wrong = ("0.5", "1.5") if labels is SLANT else ("digit=two, slant=0.5", "digit=two, slnt=0.5")
    arguments = ["sample", folder, "--num_images", "2", "--num_inference_steps", "2", "--guidance_scale", "2"]
    result = CliRunner().invoke(app, [*arguments, "--class_label", text, "--out", str(tmp_path / "a")])
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in (tmp_path / "a/metadata.jsonl").read_text().splitlines()]
    wanted = {"label": 0.5} if labels is SLANT else {"digit": "two", "slant": 0.5}
    assert lines[1] == {"file_name": "000001.png", "seed": 1, **wanted}
    # The same set goes on.
    more = [*arguments, "--class_label", text, "--out", str(tmp_path / "a")]
    more[more.index("--num_images") + 1] = "3"
    assert CliRunner().invoke(app, more).exit_code == 0
    result = CliRunner().invoke(app, [*arguments, "--class_label", wrong, "--out", str(tmp_path / "b")])
    assert result.exit_code != 0
    assert "-1 to 1" in result.output if labels is SLANT else "do you mean 'slant'?" in result.output
    assert not (tmp_path / "b").exists()
    if labels is BOTH:
        one = [*arguments, "--class_label", "slant=0.5", "--format", "npz", "--out", str(tmp_path / "c")]
        assert CliRunner().invoke(app, one).exit_code == 0
        arrays = np.load(tmp_path / "c/samples.npz")
        assert np.isnan(arrays["digit"]).all()  # hidden
        assert arrays["slant"].tolist() == [0.5, 0.5]
    Image.new("L", (8, 8), 99).save(tmp_path / "image.png")
    edit = ["edit", folder, "--image", str(tmp_path / "image.png"), "--num_inference_steps", "2"]
    edit += ["--class_label", text, "--out", str(tmp_path / "edits")]
    result = CliRunner().invoke(app, edit)
    assert result.exit_code == 0, result.output
    result = CliRunner().invoke(app, ["info", folder])
    assert result.exit_code == 0, result.output
    assert "slant: -1 to 1" in result.output


def test_editing_takes_a_label(model):
    labels, folder = model
    label = labels.in_turn[1]
    image = Image.new("L", (8, 8), 99)
    pipeline = DDPMPipeline.from_pretrained(folder)
    for kind, arguments in (
        (DDPMImg2ImgPipeline, {}),
        (DDPMInpaintPipeline, {"mask_image": image.point(lambda value: 2 * value)}),
    ):
        editor: Any = kind.from_pipe(pipeline).use(num_inference_steps=2)
        editor.set_progress_bar_config(disable=True)
        edits = editor(image, **arguments, class_labels=[label], guidance_scale=2.0, output_type="np").images
        assert np.isfinite(edits).all()
    assert bool(invert(pipeline, image, 2, label).isfinite().all())
