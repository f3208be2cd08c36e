"""`hf-ddpm edit`: files in, edits and a picture out, and what it refuses before it evaluates the network."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from PIL import Image
from typer.testing import CliRunner

from hf_ddpm import DDPMImg2ImgPipeline, DDPMInpaintPipeline, DDPMPipeline, DDPMScheduler
from hf_ddpm.classes import Classes
from hf_ddpm.cli import app
from hf_ddpm.sampling.edit_set import edit_images
from hf_ddpm.sampling.sampler import seeded_generators
from tests.support.networks import smallest_unet_config
from tests.support.tuned import tuned_pipeline

STEPS = ["--num_inference_steps", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "model"
    scheduler = DDPMScheduler(20, beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing")
    DDPMPipeline(UNet2DModel(**smallest_unet_config(channels=1)), scheduler).save_pretrained(folder)
    return folder


@pytest.fixture
def images(tmp_path, monkeypatch):
    """Three gray images of 8x8 pixels in a folder, and masks beside it."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.png", "deep/c.png"):
        path = tmp_path / "images" / name
        path.parent.mkdir(exist_ok=True, parents=True)
        Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(path)
    mask = np.zeros((8, 8), dtype=np.uint8)
    mask[:4] = 255
    (tmp_path / "masks").mkdir()
    for i in range(3):
        Image.fromarray(np.roll(mask, 2 * i, axis=0)).save(tmp_path / "masks" / f"{i}.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    return tmp_path / "images"


def pixels(path):
    return np.array(Image.open(path))


def edit(*arguments):
    return CliRunner().invoke(app, ["edit", *map(str, arguments)])


@pytest.mark.parametrize("masks", ["mask.png", "masks"])
def test_masked_edits_keep_names_and_black_parts(model, images, masks):
    result = edit(model, "--image", images, "--mask", masks, "--out", "out", "--seed", 3, *STEPS, "--json")
    assert result.exit_code == 0, result.output
    names = ["a.png", "b.png", "deep/c.png"]
    assert json.loads(result.stdout)["edits"] == [str(Path("out", name)) for name in names]
    for i, name in enumerate(names):
        mask = pixels("mask.png" if masks == "mask.png" else f"masks/{i}.png")
        edited, given = pixels(f"out/{name}"), pixels(images / name)
        assert np.array_equal(edited[mask == 0], given[mask == 0])
        assert not np.array_equal(edited, given)
    assert pixels("out/edits.png").shape[2] == 3
    # Image i has the seed SEED + i, whichever images are edited beside it.
    pipeline = DDPMInpaintPipeline.from_pretrained(model)
    mask = pixels("mask.png" if masks == "mask.png" else "masks/1.png")
    (alone,) = pipeline(
        Image.open(images / "b.png"), mask, num_inference_steps=2, generator=seeded_generators([4], pipeline.device)
    ).images
    assert np.abs(np.array(alone).astype(int) - pixels("out/b.png")).max() <= 1


def test_one_image_is_varied_in_color_or_gray_and_the_command_says_what_is_next(model, images):
    Image.open(images / "a.png").convert("RGB").save("gray_in_color.png")
    result = edit(model, "--image", "gray_in_color.png", "--out", "out", "--strength", 0.9, *STEPS)
    assert result.exit_code == 0, result.output
    assert "The edited images (1) are in out; edits.png shows them beside the originals." in result.stdout
    assert pixels("out/gray_in_color.png").shape == (8, 8)
    assert not np.array_equal(pixels("out/gray_in_color.png"), pixels(images / "a.png"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "none.png"], "image must be an image or a folder of images, got 'none.png', which does not"),
        (["--image", "empty"], "image must be an image or a folder of images, got 'empty', which holds none"),
        (["--image", "wide.png"], "wide.png cannot be taken: image must be 8 pixels high and 8 wide as the model's"),
        (["--image", "color.png"], "color.png cannot be taken: image must be gray for a model of 1 channel"),
        (["--image", "text.png"], "text.png cannot be taken: cannot identify image file"),
        (["--strength", "0"], "strength must be in (0, 1], got 0"),
        (["--strength", "1.5"], "strength must be in (0, 1], got 1.5"),
        (["--mask", "none.png"], "mask must be an image or a folder of images, got 'none.png', which does not"),
        (["--mask", "wide.png"], "wide.png cannot be taken: mask_image must be 8 pixels high and 8 wide"),
        (["--mask", "black.png"], "black.png cannot be taken: mask_image must have white pixels"),
        (["--mask", "two"], "mask must be one image, or one for each of 3 images, got 2 in 'two'"),
        (["--class_label", "1"], "class_labels must be None: the model was trained without classes"),
        (["--seed", str(2**63 - 2)], "seed must be in [0, 2**63)"),
        (["--num_inference_steps", "21"], "num_inference_steps must be in [1, 20], got 21"),
        (["--scheduler", "euler"], "scheduler must be one of ddpm, ddim, dpmsolver++, unipc, lcm, got 'euler'"),
        (["--out", "taken"], "taken/a.png would be overwritten: choose another folder than 'taken'"),
        (["--image", "twins"], "image must hold files of different names, but edits.png, got 'a.png': rename it"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(model, images, arguments, message):
    for name in ("empty", "two", "twins", "taken"):
        Path(name).mkdir()
    Image.new("L", (9, 8), 255).save("wide.png")
    Image.new("RGB", (8, 8), (255, 0, 0)).save("color.png")
    Image.new("L", (8, 8)).save("black.png")
    Path("text.png").write_text("not an image")
    for path in ("two/0.png", "two/1.png", "twins/a.png", "twins/a.bmp", "taken/a.png"):
        Image.new("L", (8, 8), 255).save(path)
    before = sorted(Path().rglob("*"))
    given = {"--image": images, "--out": "out"} | dict(zip(arguments[::2], arguments[1::2], strict=True))
    result = edit(model, *(word for pair in given.items() for word in pair))
    assert result.exit_code == 2, result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert sorted(Path().rglob("*")) == before


def test_batch_size_below_one_is_refused(model, images):
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        edit_images(str(model), images, "out", batch_size=0)


def test_edit_samples_the_model_that_the_pipelines_do(images, tmp_path):
    """Also one that clips to another limit than 1, and without the guidance that it keeps, when that is asked for."""
    torch.manual_seed(0)
    unet = UNet2DModel(**smallest_unet_config(channels=1, num_class_embeds=3))
    scheduler = DDPMScheduler(20, beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing", clip_sample_range=3)
    pipeline = DDPMPipeline(unet, scheduler)
    pipeline.classes = Classes(("a", "b"), has_unconditional=True)
    pipeline.use("unipc", 3, guidance_scale=4.0).save_pretrained(tmp_path / "tuned")
    image, options = images / "a.png", ("--class_label", "b", "--device", "cpu", "--strength", 1)
    expected = {}
    for scale in (1.0, 4.0):
        variation = DDPMImg2ImgPipeline.from_pretrained(tmp_path / "tuned").use()
        generator = seeded_generators([0], variation.device)
        settings = {"strength": 1.0, "class_labels": "b", "guidance_scale": scale}
        expected[scale] = np.array(variation(Image.open(image), generator=generator, **settings).images[0]).astype(int)
    for out, more in (("kept", ()), ("none", ("--guidance_scale", 1))):
        result = edit(tmp_path / "tuned", "--image", image, "--out", out, *options, *more)
        assert result.exit_code == 0, result.output
    assert np.abs(pixels("kept/a.png") - expected[4.0]).max() <= 1
    assert np.abs(pixels("none/a.png") - expected[1.0]).max() <= 1
    assert np.abs(expected[4.0] - expected[1.0]).max() > 5


@pytest.mark.slow
def test_a_tuned_model_edits_in_its_own_steps_and_takes_no_other_sampler(images, tmp_path):
    tuned_pipeline().save_pretrained(tmp_path / "tuned")
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save("color.png")
    options = ("--image", "color.png", "--device", "cpu")
    result = edit(tmp_path / "tuned", *options, "--mask", "mask.png", "--out", "filled")
    assert result.exit_code == 0, result.output
    inpaint = DDPMInpaintPipeline.from_pretrained(tmp_path / "tuned")
    (alone,) = inpaint(
        Image.open("color.png"), pixels("mask.png"), generator=seeded_generators([0], inpaint.device)
    ).images
    assert np.array_equal(pixels("filled/color.png"), np.array(alone))
    for command in (["edit", *options], ["sample", "--num_images", "1"]):
        for name in ("unipc", "ddpm"):
            words = [command[0], str(tmp_path / "tuned"), *command[1:], "--out", "none", "--scheduler", name]
            result = CliRunner().invoke(app, words)
            assert result.exit_code == 2
            assert f"error: scheduler must be 'lcm' for a model that was tuned for few steps, got '{name}'" in (
                result.stderr
            )
    assert not Path("none").exists()
