"""The page of a model of arrays shows the channels that figures show, and takes no pictures."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hf_ddpm import DDPMPipeline
from hf_ddpm.figures import to_pil
from hf_ddpm.value_range import pictured
from tests.support.array_models import RANGE, save_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("gradio") is None, reason='needs pip install "hf_ddpm[demo]"'),
]


def pictures_in(content: str) -> list[Image.Image]:
    """Return the pictures of a part of the page, each of the pixels that were enlarged."""
    found = re.findall(r"image/png;base64,([^\"]+)", content)
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in found]


def assert_shows(picture: Image.Image, wanted: Image.Image) -> None:
    """Check that a picture of the page is an image, enlarged by a whole factor."""
    factor = picture.width // wanted.width
    assert picture.size == (factor * wanted.width, factor * wanted.height)
    assert np.array_equal(np.asarray(picture)[::factor, ::factor], np.asarray(wanted))


@pytest.mark.parametrize(("channels", "display"), [(2, None), (5, (4, 2, 1)), (2, (1,)), (4, None)])
def test_page_shows_the_channels_that_figures_show(
    tmp_path: Path, channels: int, display: tuple[int, ...] | None
) -> None:
    values = replace(RANGE, display_channels=display)
    model = save_model(tmp_path / "model", channels, values)
    app: Any = import_module("hf_ddpm.hub.space_app.app")
    page = app.Handlers(app.Model(str(model)), 2)
    images, chain, first = page.show_first()
    sampler, steps = page.model.samplers[0], page.model.default_steps
    pipeline = DDPMPipeline.from_pretrained(model).use(sampler, steps)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    samples = pipeline(batch_size=2, generator=generators, num_inference_steps=steps, output_type="pt").images
    wanted = to_pil(pictured(samples, values))
    assert wanted[0].size == ((8 if display else 9 * channels - 1), 8)
    shown = pictures_in(images)
    assert len(shown) == 2
    for picture, each in zip([*shown, first], [*wanted, wanted[0]], strict=True):
        assert_shows(picture, each)
    assert_shows(pictures_in(chain)[-1], wanted[0])
    # The forward process begins with all channels of the first sample.
    x_0 = 2 * samples[:1] - 1
    noised, _ = page.show_noised(None, 7, 3)
    for picture, tensor in zip(pictures_in(noised), (x_0, page.model.add_noise(x_0, 3, 7)), strict=True):
        assert_shows(picture, to_pil(pictured(tensor, values) / 2 + 0.5)[0])
    assert f"arrays of {channels} channels" in app.about(page.model)


def test_page_takes_no_picture_for_arrays(tmp_path: Path) -> None:
    app: Any = import_module("hf_ddpm.hub.space_app.app")
    model = save_model(tmp_path / "model")
    page = app.Handlers(app.Model(str(model)), 1)
    with pytest.raises(Exception, match="the page takes no picture for a model of 2 channels: leave it out"):
        page.show_noised(Image.new("RGB", (8, 8)), 3, 0)
