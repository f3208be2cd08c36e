"""Networks and pipelines for images of any shape."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DModel

from hf_ddpm import DDPMPipeline, DDPMScheduler
from hf_ddpm.network import sized_config
from hf_ddpm.runtime.errors import UsageError


@pytest.mark.parametrize("size", [(8, 40), (48, 64), (64, 32)])
def test_oblong_network_is_that_of_its_shorter_side(size):
    settings, of_square = (sized_config(each, 1, 1) for each in (size, (min(size),) * 2))
    assert settings["sample_size"] == [*size]
    attention = ("sample_size", "down_block_types", "up_block_types")
    assert {k: v for k, v in settings.items() if k not in attention} == {
        k: v for k, v in of_square.items() if k not in attention
    }
    for level, kind in enumerate(settings["down_block_types"]):
        assert "Attn" not in kind or (size[0] >> level) * (size[1] >> level) <= 16**2


def test_illegal_size_names_the_nearest_of_each_side():
    expected = (
        "height and width of resolution must be multiples of 8, got 60 x 96 .*: the network halves them 3 times; the "
        "nearest are a height of 56 or 64 and a width of 96"
    )
    with pytest.raises(UsageError, match=expected):
        sized_config((60, 96), 1, 1)


@pytest.fixture
def pipeline(make_unet):
    pipeline = DDPMPipeline(make_unet(), DDPMScheduler(4, beta_schedule="squaredcos_cap_v2"))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(pipeline, **arguments):
    generator = torch.Generator().manual_seed(0)
    return pipeline(generator=generator, output_type="pt", **arguments).images


def test_pipeline_samples_another_size_as_a_network_of_that_size_does(pipeline, caplog):
    unet = pipeline.unet
    twin = UNet2DModel.from_config({**unet.config, "sample_size": [16, 12]})
    twin.load_state_dict(unet.state_dict())
    other = DDPMPipeline(twin.eval(), pipeline.scheduler)
    other.set_progress_bar_config(disable=True)
    images = sample(pipeline, height=16, width=12)
    assert images.shape[2:] == (16, 12)
    assert torch.equal(images, sample(other))
    assert "images of 16 x 12 (height x width) are sampled by a network that was trained with 8 x 8" in caplog.text
    assert torch.equal(sample(pipeline), sample(pipeline, height=8, width=8))
    assert sample(pipeline, width=12).shape[2:] == (8, 12)


@pytest.mark.parametrize(
    ("sides", "message"),
    [
        ({"height": 9}, "height and width must be multiples of 2, got 9 x 8.* a height of 8 or 10 and a width of 8"),
        ({"width": 0}, "width must be at least 1, got 0"),
        ({"width": 8.5}, "width must be a whole number, got 8.5"),
    ],
)
def test_pipeline_rejects_sizes_that_the_network_does_not_take(pipeline, sides, message):
    with pytest.raises(ValueError, match=message):
        pipeline(**sides)
