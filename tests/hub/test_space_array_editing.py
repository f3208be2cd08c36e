"""The page of a model of arrays edits files of arrays as the pipelines do, and keeps what it is not to change."""

from __future__ import annotations

import asyncio
import base64
import io
import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch

from hf_ddpm import DDPMImg2ImgPipeline, DDPMInpaintPipeline
from hf_ddpm.figures import to_pil
from hf_ddpm.value_range import pictured
from tests.hub.test_space_arrays import assert_shows, pictures_in
from tests.support.array_models import RANGE, fields, save_mask, save_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("gradio") is None, reason='needs pip install "hf_ddpm[demo]"'),
]

SEEDS, STEPS = [5, 6, 7, 8], 4
NONE = -2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(scope="module")
def app() -> Any:
    return import_module("hf_ddpm.hub.space_app.app")


@pytest.fixture(scope="module")
def page(app: Any, model: Path) -> Any:
    return app.Handlers(app.Model(str(model)), 1)


@pytest.fixture
def mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """A mask, which is in the folder of the test as an array and as a picture."""
    monkeypatch.chdir(tmp_path)
    return save_mask(tmp_path)


def values_in(content: str) -> np.ndarray:
    """Return the array that a part of the page lets its visitor save."""
    (data,) = re.findall(r'download="edits.npy" href="data:application/octet-stream;base64,([^"]+)"', content)
    return np.load(io.BytesIO(base64.b64decode(data)))


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in SEEDS]


def test_known_values_come_back_to_the_last_bit(page: Any, model: Path, mask: np.ndarray) -> None:
    """Also those that are beyond the model's range, and around a gap of values that are missing."""
    (field,) = fields(1)
    field[0, 0, 0] = 400
    np.save("gap.npy", np.where(mask, np.nan, field).astype(np.float32))
    shown = page.show_array_edits("gap.npy", "mask.npy", 1, NONE, 1.0, SEEDS[0], STEPS)
    values = values_in(shown)
    assert (values.dtype, values.shape) == (np.float32, (4, 2, 8, 8))
    assert np.array_equal(values[:, :, ~mask], np.broadcast_to(field[:, ~mask], (4, 2, 48)))
    assert "The model sees 1 values clipped to 250 to 310." in shown
    # What is filled is what the pipeline fills.
    shares = RANGE.to_unit_interval(torch.from_numpy(np.where(mask, 250, field).astype(np.float32)))
    pipeline = DDPMInpaintPipeline.from_pretrained(model).use(page.model.samplers[0], STEPS)
    wanted = pipeline([shares] * 4, torch.from_numpy(mask)[None], generator=generators(), output_type="pt").images
    assert np.array_equal(values[:, :, mask], RANGE.to_units(wanted)[:, :, mask])
    assert len({each.tobytes() for each in values}) == 4
    pictures = pictures_in(shown)
    channels_of_mask = torch.from_numpy(mask)[None, None].float().expand(1, 2, -1, -1)
    expected = to_pil(pictured(torch.cat([shares[None], channels_of_mask, wanted]), RANGE))
    for picture, each in zip(pictures, expected, strict=True):
        assert_shows(picture, each)
    # A mask may be a picture, and an array a TIFF file.
    tifffile.imwrite("gap.tif", np.load("gap.npy"), planarconfig="separate", photometric="minisblack")
    again = page.show_array_edits("gap.tif", "mask.png", 1, NONE, 1.0, SEEDS[0], STEPS)
    assert np.array_equal(values_in(again), values)


def test_without_a_mask_the_whole_array_is_varied(page: Any, model: Path, mask: np.ndarray) -> None:
    (field,) = fields(1)
    np.save("field.npy", field)
    shown = page.show_array_edits("field.npy", None, 0.5, NONE, 1.0, SEEDS[0], STEPS)
    pipeline = DDPMImg2ImgPipeline.from_pretrained(model).use(page.model.samplers[0], STEPS)
    shares = [RANGE.to_unit_interval(torch.from_numpy(field))] * 4
    wanted = pipeline(shares, strength=0.5, generator=generators(), output_type="pt").images
    assert np.array_equal(values_in(shown), RANGE.to_units(wanted))
    assert len(pictures_in(shown)) == 5
    # Without an array it is the first sample.
    first = page.first_samples()
    shown = page.show_array_edits(None, "mask.npy", 1, NONE, 1.0, SEEDS[0], STEPS)
    assert_shows(pictures_in(shown)[0], first.images[0])
    kept = values_in(shown)[:, :, ~mask]
    assert np.array_equal(kept, np.broadcast_to(RANGE.to_units(first.x_0 / 2 + 0.5)[0][:, ~mask], kept.shape))


def test_wrong_files_become_messages(app: Any, page: Any, mask: np.ndarray) -> None:
    field = fields(1)[0]
    files = {"float64": field[:1], "int16": field.astype(np.int16), "stack": np.stack([field] * 3)}
    files |= {"large": fields(1, size=9)[0], "gap": np.where(mask, np.nan, field).astype(np.float32), "field": field}
    files |= {"empty": np.zeros((8, 8), bool), "object": np.array([None])}
    for name, values in files.items():
        np.save(f"{name}.npy", values)
    Path("damaged.npy").write_bytes(b"no array")
    cases = [
        ("float64.npy", None, r"the model.+s shape, \(2, 8, 8\), got \(1, 8, 8\) in float64.npy: cut it so"),
        ("int16.npy", None, "of the model.+s type, float32, got int16 in int16.npy: convert it"),
        ("stack.npy", None, "image must be one array, got 3 in stack.npy: save one of them"),
        ("large.npy", None, r"the model.+s shape, \(2, 8, 8\), got \(2, 9, 9\) in large.npy"),
        ("gap.npy", None, "finite values but for what a mask repaints with strength 1, got 32 others in gap.npy"),
        ("field.npy", "empty.npy", r"mask must be \(8, 8\) as the model.+s images, .*, got zeros alone in empty.npy"),
        ("field.npy", "large.npy", r"mask must be \(8, 8\) .* got the shape \(2, 9, 9\) in large.npy"),
        ("damaged.npy", None, "damaged.npy"),
        ("object.npy", None, "object.npy"),
    ]
    for array, mask_file, message in cases:
        with pytest.raises(app.gr.Error, match=message) as error:
            page.show_array_edits(array, mask_file, 1, NONE, 1.0, 0, STEPS)
        assert not error.value.print_exception
    with pytest.raises(app.gr.Error, match="strength must be in"):
        page.show_array_edits("field.npy", "mask.npy", 0.0, NONE, 1.0, 0, STEPS)


def test_page_offers_files_in_the_place_of_an_editor(app: Any, model: Path) -> None:
    async def build() -> tuple[Any, Any]:  # within a loop, since gradio else leaves one open
        page = app.build(str(model))
        return [*page.blocks.values()], page.get_api_info()

    blocks, api = asyncio.run(build())
    assert not any(isinstance(each, app.gr.ImageEditor) for each in blocks)
    assert [each.label for each in blocks if isinstance(each, app.gr.File)] == ["Array", "Mask"]
    texts = [each.value for each in blocks if isinstance(each, app.gr.Markdown) and each.visible]
    assert any("an array of the shape (2, 8, 8) (float32, 250 to 310), and a mask" in text for text in texts)
    assert not any("cannot edit images" in text for text in texts)
    endpoint = api["named_endpoints"]["/edit"]
    assert [each["label"] for each in endpoint["parameters"]][:2] == ["Array", "Mask"]
