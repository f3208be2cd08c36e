"""The page of a model that was tuned for few steps: its own sampler alone, and few steps beside one another."""

from __future__ import annotations

import asyncio
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hf_ddpm import DDPMInpaintPipeline, DDPMPipeline, DDPMScheduler
from hf_ddpm.classes import Classes
from tests.hub.test_space_editing import drawing, picture, shown
from tests.support.tuned import TIMESTEPS, T, tuned_pipeline

pytestmark = pytest.mark.skipif(find_spec("gradio") is None, reason='needs pip install "hf_ddpm[demo]"')

CLASSES = Classes(("cat", "dog"), has_unconditional=True)
SEEDS, EACH = [5, 6, 7, 8], -1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tuned"
    tuned_pipeline(classes=CLASSES).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def app() -> Any:
    return import_module("hf_ddpm.hub.space_app.app")


@pytest.fixture(scope="module")
def page(app: Any, folder: Path) -> Any:
    return app.Handlers(app.Model(str(folder)), 2)


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in SEEDS]


def test_page_offers_the_sampler_of_the_model_in_few_steps(app: Any, page: Any):
    model = page.model
    assert (model.samplers, model.default_steps, model.max_steps) == (["lcm"], 4, T)
    assert not model.can_be_guided  # the model could guide itself by its classes, but was tuned to what that gave
    text = app.about(model)
    assert "*lcm*" in text
    assert "*ddim*" not in text
    assert "Guidance" not in text
    assert [t for t, _, _ in page.first_samples().states] == TIMESTEPS
    for name in ("unipc", "ddpm"):
        with pytest.raises(app.gr.Error, match=f"scheduler must be one of lcm, got &#x27;{name}&#x27;"):
            page.show_samples(name, 4, 0, 2, EACH)


@pytest.mark.parametrize("num_steps", [1, 2, 4, 20])
@pytest.mark.parametrize(("label", "labels"), [(EACH, ["dog", "cat", "dog", "cat"]), (0, "cat")])
def test_images_of_few_steps_are_those_of_the_pipeline(
    page: Any, folder: Path, num_steps: int, label: int, labels: Any
):
    pipeline = DDPMPipeline.from_pretrained(folder)
    expected = pipeline(4, generators(), num_steps, class_labels=labels).images
    images = shown(page.show_in_steps(num_steps, SEEDS[0], label))
    assert [*images] == [f"seed {seed}" for seed in SEEDS]
    assert np.array_equal([*images.values()], [np.asarray(image) for image in expected])


def test_edits_take_the_steps_of_the_model(page: Any, folder: Path):
    given = drawing(picture(), (28, 56, 111, 139))
    row = shown(page.show_edits(given, 0.5, 1, 1.0, SEEDS[0], 4))
    inpaint = DDPMInpaintPipeline.from_pretrained(folder)
    settings: dict[str, Any] = {"strength": 0.5, "class_labels": "dog", "generator": generators()}
    expected = inpaint([picture()] * 4, row["mask"], **settings).images
    assert np.array_equal([row[f"seed {seed}"] for seed in SEEDS], [np.asarray(each) for each in expected])
    assert np.array_equal(row["seed 5"][row["mask"] == 0], np.asarray(picture())[row["mask"] == 0])


def test_noised_images_are_of_the_forward_process_of_the_model(page: Any):
    x_0 = torch.rand(1, 3, 8, 8) * 2 - 1
    eps = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(3))
    scheduler = DDPMScheduler(T, beta_schedule="squaredcos_cap_v2")
    assert torch.equal(page.model.add_noise(x_0, 3, 7), scheduler.add_noise(x_0, eps, 7))


@pytest.mark.slow
def test_few_steps_have_a_tab_for_a_tuned_model_alone(app: Any, folder: Path, tmp_path: Path):
    plain = DDPMPipeline(tuned_pipeline().unet, DDPMScheduler(T, beta_schedule="squaredcos_cap_v2"))
    plain.save_pretrained(tmp_path / "plain")

    async def blocks_of(name: Path) -> list[Any]:  # within a loop, since gradio else leaves one open
        return [*app.build(str(name)).blocks.values()]

    for name, tabs in (
        (folder, ["Sample", "Few steps", "Edit", "Forward process", "About"]),
        (tmp_path / "plain", ["Sample", "Edit", "Forward process", "About"]),
    ):
        blocks = asyncio.run(blocks_of(name))
        assert [each.label for each in blocks if isinstance(each, app.gr.Tab)] == tabs
        steps = [each for each in blocks if getattr(each, "label", None) == "Steps"]
        assert {(each.value, each.maximum) for each in steps} == {(4 if name == folder else 20, T)}
