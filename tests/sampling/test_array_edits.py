"""`hf-ddpm edit` of arrays: known values come back to the last bit, others in the units of the data."""

from __future__ import annotations

import json
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image
from typer.testing import CliRunner

from hf_ddpm.cli import app
from hf_ddpm.value_range import ValueRange
from tests.support.array_models import fields, save_mask, save_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture
def mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """A mask, which is in the folder of the test as an array and as a picture."""
    monkeypatch.chdir(tmp_path)
    return save_mask(tmp_path)


def edit(*arguments: object) -> str:
    """Return what a command says, without what it says while it loads."""
    result = CliRunner().invoke(app, ["edit", *map(str, arguments), "--num_inference_steps", "2", "--device", "cpu"])
    lines = [line for line in result.stderr.splitlines() if line.startswith(("error: ", "clipped: "))]
    return "\n".join([*lines, result.stdout])


def test_known_values_come_back_to_the_last_bit(model: Path, mask: np.ndarray) -> None:
    """Also those that are beyond the model's range, and around a gap of values that are missing."""
    (field,) = fields(1)
    field[0, 0, 0] = 400
    gap = np.where(mask, np.nan, field).astype(np.float32)
    np.save("gap.npy", gap)
    said = edit(model, "--image", "gap.npy", "--mask", "mask.npy", "--out", "out")
    assert said.startswith("clipped: 1 values (0.78%) lie outside of 250 to 310\n")
    filled = np.load("out/gap.npy")
    assert (filled.dtype, filled.shape) == (np.float32, (2, 8, 8))
    assert np.array_equal(filled[:, ~mask], field[:, ~mask])
    assert np.isfinite(filled).all()
    assert ((filled[:, mask] >= 250) & (filled[:, mask] <= 310)).all()
    # Nothing of what is under the mask counts.
    np.save("gap.npy", np.where(mask, 260, field).astype(np.float32))
    edit(model, "--image", "gap.npy", "--mask", "mask.png", "--out", "again")
    assert np.array_equal(np.load("again/gap.npy"), filled)


def test_images_of_one_file_become_files_of_the_format_that_was_asked_for(tmp_path: Path, mask: np.ndarray) -> None:
    integers = ValueRange(0.0, 60000.0, "uint16")
    model = save_model(tmp_path / "integers", channels=1, value_range=integers)
    images = np.random.default_rng(0).integers(0, 60001, (3, 1, 8, 8)).astype(np.uint16)
    np.save("all.npy", images)
    arguments = ("--image", "all.npy", "--mask", "mask.npy", "--format", "tif", "--out", "out", "--json")
    edits = json.loads(edit(model, *arguments))["edits"]
    assert edits == [str(Path("out", "all.npy", f"{i:06d}.tif")) for i in range(3)]
    for path, image in zip(edits, images, strict=True):
        edited = tifffile.imread(path)
        assert edited.dtype == np.uint16
        assert np.array_equal(edited[~mask], image[0][~mask])
        assert not np.array_equal(edited, image[0])
    # Without the axis of one channel, and as pages of TIFF, they are the same images.
    np.save("all.npy", images[:, 0])
    edit(model, *arguments[:-2], "plain")
    tifffile.imwrite("pages.tif", images[:, 0], photometric="minisblack")
    edit(model, "--image", "pages.tif", *arguments[2:-2], "pages")
    for i, path in enumerate(edits):
        wanted = tifffile.imread(path)
        assert np.array_equal(tifffile.imread(Path("plain", "all.npy", f"{i:06d}.tif")), wanted)
        assert np.array_equal(tifffile.imread(Path("pages", "pages.tif", f"{i:06d}.tif")), wanted)
    np.save("all.npy", images)
    edit(model, "--image", "all.npy", "--strength", 0.1, "--out", "varied")
    assert not np.array_equal(np.load("varied/all.npy/000000.npy"), images[0])
    with Image.open("varied/edits.png") as picture:
        assert picture.mode == "RGB"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "wide.npy"], "image must have the model's shape, (2, 8, 8), got (2, 8, 9) in wide.npy"),
        (["--image", "whole.npy"], "image must be of the model's type, float32, got int16 in row 0"),
        (["--image", "gap.npy"], "image must hold finite values but for what a mask repaints with strength 1, got 4"),
        (["--image", "mask.png"], "model must make images of 1, 3 or 4 channels, got 2, which no picture holds"),
        (["--image", "field.npy", "--format", "png"], "format must be one of npy, tif, got 'png'"),
        (["--image", "field.npy", "--mask", "field.npy"], "mask must be (8, 8) as the model's images, and not 0"),
        (["--image", "field.npy", "--mask", "zeros.npy"], "it is to be repainted, got zeros alone in zeros.npy"),
        (["--image", "broken.npy"], "each file must be readable, got broken.npy"),
    ],
)
@pytest.mark.usefixtures("mask")
def test_bad_arrays_are_one_line_and_nothing_is_written(model: Path, arguments: list[str], message: str) -> None:
    (field,) = fields(1)
    np.save("field.npy", field)
    np.save("wide.npy", np.concatenate([field, field[..., :1]], axis=2))
    np.save("whole.npy", field.astype(np.int16))
    np.save("gap.npy", np.where(np.arange(8) < 7, field, np.where(np.arange(8)[:, None] < 2, np.nan, field)))
    np.save("zeros.npy", np.zeros((8, 8), bool))
    Path("broken.npy").write_bytes(b"no array")
    before = sorted(Path().rglob("*"))
    said = edit(model, *arguments, "--out", "out")
    assert message in said
    assert said.count("error: ") == 1
    assert sorted(Path().rglob("*")) == before


def test_arrays_are_refused_by_a_model_of_pictures(tmp_path: Path, mask: np.ndarray) -> None:
    from hf_ddpm import DDPMPipeline

    pipeline = DDPMPipeline.from_pretrained(save_model(tmp_path / "arrays", channels=1))
    pipeline.value_range = None
    pipeline.save_pretrained(tmp_path / "pictures")
    np.save("field.npy", mask.astype(np.uint8))
    said = edit(tmp_path / "pictures", "--image", "field.npy", "--out", "out")
    assert "field.npy cannot be taken: cannot identify image file" in said


def test_color_of_16_bits_keeps_them_where_nothing_is_repainted(tmp_path: Path, mask: np.ndarray) -> None:
    color = np.random.default_rng(0).integers(0, 65536, (8, 8, 3)).astype(np.uint16)
    Path("color.png").write_bytes(imagecodecs.png_encode(color))
    model = save_model(tmp_path / "deep", channels=3, value_range=ValueRange(0, 65535, "uint16"))
    edit(model, "--image", "color.png", "--mask", "mask.npy", "--out", "out")
    (path,) = Path("out").glob("**/*.npy")
    filled = np.load(path)
    assert filled.dtype == np.uint16
    assert np.array_equal(filled[:, ~mask], np.moveaxis(color, 2, 0)[:, ~mask])
