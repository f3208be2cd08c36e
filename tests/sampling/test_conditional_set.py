"""`hf-ddpm sample MODEL --image`: a sample for each image of a folder."""

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from PIL import Image
from typer.testing import CliRunner

from hf_ddpm import ConditionalDDPMPipeline, DDPMPipeline, DDPMScheduler
from hf_ddpm.cli import app
from hf_ddpm.condition import Condition
from hf_ddpm.runtime.errors import UsageError
from hf_ddpm.sampling.conditional_set import sample_from_images
from hf_ddpm.sampling.edit_set import edit_images
from hf_ddpm.sampling.image_set import write_samples
from tests.support.image_data import noise, save_grays
from tests.support.networks import smallest_unet_config


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A model of super-resolution, and one that makes images from noise alone."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    scheduler = DDPMScheduler(num_train_timesteps=10, beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing")
    pipeline = ConditionalDDPMPipeline(UNet2DModel(**smallest_unet_config(1, in_channels=2)), scheduler)
    pipeline.condition = Condition(1, super_resolution=2)
    pipeline.save_pretrained(folder / "conditional")
    DDPMPipeline(UNet2DModel(**smallest_unet_config(1)), scheduler).save_pretrained(folder / "plain")
    return folder


def test_each_image_of_a_folder_gives_the_sample_of_its_seed(models, tmp_path):
    save_grays(tmp_path / "images", 3)
    settings = {"num_inference_steps": 2, "scheduler": "ddpm"}
    files = sample_from_images(str(models / "conditional"), tmp_path / "images", tmp_path / "out", **settings)
    assert [path.name for path in files] == ["000.png", "001.png", "002.png"]
    assert (tmp_path / "out/samples.png").is_file()
    (alone,) = sample_from_images(
        str(models / "conditional"), tmp_path / "images/001.png", tmp_path / "alone", seed=1, **settings
    )
    assert alone.read_bytes() == files[1].read_bytes()


def test_command_takes_images_of_the_low_resolution(models, tmp_path):
    Image.fromarray(noise(4, 4)).save(tmp_path / "small.png")
    command = ["sample", str(models / "conditional"), "--image", str(tmp_path / "small.png"), "--out"]
    result = CliRunner().invoke(app, [*command, str(tmp_path / "out"), "--num_inference_steps", "2"])
    assert result.exit_code == 0, result.output
    assert np.asarray(Image.open(tmp_path / "out/small.png")).shape == (8, 8)
    result = CliRunner().invoke(app, [*command, str(tmp_path / "more"), "--num_images", "4"])
    assert "num_images = 4 has no effect with image" in result.output
    assert not (tmp_path / "more").exists()


def test_models_of_the_other_kind_are_refused_before_any_work(models, tmp_path):
    image = tmp_path / "image.png"
    Image.fromarray(noise(8, 8)).save(image)
    conditional, plain, out = str(models / "conditional"), str(models / "plain"), tmp_path / "out"
    with pytest.raises(UsageError, match="makes them from images: hf-ddpm sample MODEL --image"):
        write_samples(conditional, out, num_images=1)
    with pytest.raises(UsageError, match="image has no effect on"):
        sample_from_images(plain, image, out)
    with pytest.raises(UsageError, match="makes them from images"):
        edit_images(conditional, image, out)
    Image.fromarray(noise(6, 6)).save(image)
    with pytest.raises(UsageError, match=r"image.png cannot be taken: image must be 8 pixels high"):
        sample_from_images(conditional, image, out)
    assert not out.exists()
