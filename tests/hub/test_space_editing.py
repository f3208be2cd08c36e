"""The page of a model guides and edits as the pipelines do, and tells its visitors what cannot work."""

from __future__ import annotations

import asyncio
import base64
import io
import re
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from PIL import Image, ImageDraw

from hf_ddpm import DDPMImg2ImgPipeline, DDPMInpaintPipeline, DDPMPipeline, DDPMScheduler
from hf_ddpm.classes import Classes
from hf_ddpm.guidance import Guidance
from hf_ddpm.solvers import named_scheduler
from tests.support.networks import smallest_unet_config

pytestmark = pytest.mark.skipif(find_spec("gradio") is None, reason='needs pip install "hf_ddpm[demo]"')

T, STEPS, SEED, EDIT_SEEDS = 20, 4, 5, [5, 6, 7, 8]
NAMES = ("cat", "dog", "elk")
KEPT = Guidance(2.0, (0.0, 50.0), method="apg", norm_threshold=3.0)
EACH, NONE = -1, -2


def save(folder: Path, classes: Classes | None = None, guidance: Guidance | None = None, **settings: Any) -> Path:
    """Save a small random model that keeps what is given."""
    torch.manual_seed(0)
    channels = settings.pop("out_channels", 3)
    count = classes and classes.num_embeddings
    unet = UNet2DModel(**smallest_unet_config(3, out_channels=channels, num_class_embeds=count))
    pipeline = DDPMPipeline(
        unet, DDPMScheduler(T, beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing", **settings)
    )
    pipeline.classes = classes
    if guidance is not None:
        if guidance.autoguidance_scale != 1:
            pipeline.guide = UNet2DModel(**smallest_unet_config(3, num_class_embeds=count))
        pipeline.use()
        assert pipeline.sampler is not None
        pipeline.sampler = pipeline.sampler._replace(guidance=guidance)
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models without classes, with named ones, with a class for all, with a guide, and others."""
    root = tmp_path_factory.mktemp("models")
    folders = {
        "plain": save(root / "plain", prediction_type="v_prediction"),
        "classes": save(root / "classes", Classes(NAMES)),
        "dropout": save(root / "dropout", Classes(NAMES, has_unconditional=True)),
        "kept": save(root / "kept", Classes(NAMES, has_unconditional=True), KEPT),
        "twice": save(root / "twice", Classes(NAMES, has_unconditional=True), Guidance(2.0, autoguidance_scale=1.5)),
        "guide": save(root / "guide"),
        "step denoiser": save(root / "steps", prediction_type="previous_sample"),
        "other task": save(root / "other", out_channels=4),
    }
    torch.manual_seed(1)
    UNet2DModel(**smallest_unet_config(3)).save_pretrained(folders["guide"] / "guide")
    return folders


@pytest.fixture(scope="module")
def app() -> Any:
    """The page; gradio, which takes seconds to import, is not imported while tests are collected."""
    return import_module("hf_ddpm.hub.space_app.app")


@pytest.fixture(scope="module")
def handlers(app: Any, folders: dict[str, Path]) -> dict[str, Any]:
    """What the page of each model does."""
    return {name: app.Handlers(app.Model(str(folder)), 2) for name, folder in folders.items()}


def generators(seeds: list[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def shown(page: str) -> dict[str, np.ndarray]:
    """Return the images of HTML, 8 x 8 as the models make them, by their text."""
    images = {}
    for data, text in re.findall(r'<img src="data:image/png;base64,([^"]+)" alt="([^"]+)"', page):
        large = Image.open(io.BytesIO(base64.b64decode(data)))
        small = large.resize((8, 8), Image.Resampling.NEAREST)
        assert np.array_equal(small.resize(large.size, Image.Resampling.NEAREST), large)
        images[text] = np.asarray(small)
    return images


def sample_with_package(folder: Path, labels: Any, guidance: Guidance | None = None, sampler: str = "unipc") -> Any:
    pipeline = DDPMPipeline.from_pretrained(folder)
    pipeline.scheduler = named_scheduler(sampler, pipeline.scheduler.config, STEPS)
    images = pipeline(
        batch_size=2,
        generator=generators([SEED, SEED + 1]),
        num_inference_steps=STEPS,
        class_labels=labels,
        guidance=guidance,
    ).images
    return [np.asarray(image) for image in images]


def sample_on_page(handlers: Any, label: int | None, scale: float, sampler: str = "unipc") -> list[np.ndarray]:
    page, _ = handlers.show_samples(sampler, STEPS, SEED, 2, label, scale)
    return [*shown(page).values()]


def picture() -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(values)


def drawing(image: Image.Image, *boxes: tuple[int, int, int, int]) -> dict[str, Any]:
    """Return what the editor gives: an image, enlarged, and a layer in which boxes are painted, in its pixels."""
    large = image.resize((224, 224), Image.Resampling.NEAREST).convert("RGBA")
    layer = Image.new("RGBA", large.size)
    for box in boxes:
        ImageDraw.Draw(layer).rectangle(box, fill="white")
    return {"background": large, "layers": [layer], "composite": large}


@pytest.mark.parametrize(("name", "label", "labels"), [("plain", EACH, None), ("dropout", EACH, [2, 0])])
def test_guidance_of_1_changes_no_bit(folders, handlers, name, label, labels):
    assert np.array_equal(sample_on_page(handlers[name], label, 1.0), sample_with_package(folders[name], labels))


@pytest.mark.parametrize("sampler", ["unipc", "ddpm"])
@pytest.mark.parametrize(("name", "label", "labels"), [("dropout", 1, "dog"), ("guide", None, None)])
def test_guidance_of_the_page_is_that_of_the_pipeline(folders, handlers, name, label, labels, sampler):
    images = sample_on_page(handlers[name], label, 3.0, sampler)
    assert np.array_equal(images, sample_with_package(folders[name], labels, Guidance(3.0), sampler))
    assert not np.array_equal(images, sample_on_page(handlers[name], label, 1.0, sampler))


def test_kept_guidance_is_the_default_and_only_its_scale_changes(app, folders, handlers):
    model = handlers["kept"].model
    assert model.default_guidance == KEPT
    images = sample_on_page(handlers["kept"], 1, 4.0)
    guidance = Guidance(4.0, KEPT.interval, method="apg", norm_threshold=3.0)
    assert np.array_equal(images, sample_with_package(folders["kept"], 1, guidance))
    assert np.array_equal(sample_on_page(handlers["kept"], 1, 1.0), sample_with_package(folders["dropout"], 1))


def test_no_class_in_particular_is_a_choice_and_turns_guidance_by_class_off(folders, handlers):
    assert handlers["dropout"].model.label_choices[:3] == [
        ("each in turn", EACH),
        ("without a class", NONE),
    ] + [("cat", 0)]
    expected = sample_with_package(folders["dropout"], None)
    for scale, is_said in ((1.0, False), (3.0, True)):
        page, _ = handlers["dropout"].show_samples("unipc", STEPS, SEED, 2, NONE, scale)
        assert np.array_equal([*shown(page).values()], expected)
        assert ("Guidance is off" in page) is is_said
    assert ("without a class", NONE) not in handlers["classes"].model.label_choices
    assert "Guidance is off" not in handlers["guide"].show_samples("unipc", STEPS, SEED, 2, None, 3.0)[0]
    assert "Guidance is off" not in handlers["twice"].show_samples("unipc", STEPS, SEED, 2, 1, 3.0)[0]
    assert "Guidance is off" in handlers["twice"].show_samples("unipc", STEPS, SEED, 2, NONE, 3.0)[0]


@pytest.mark.parametrize(
    ("name", "label", "labels", "scale"),
    [("plain", EACH, None, 1.0), ("dropout", EACH, [2, 0, 1, 2], 3.0), ("kept", NONE, None, 1.0)],
)
def test_edits_are_those_of_the_pipelines(folders, handlers, name, label, labels, scale):
    image, mask = picture(), np.zeros((8, 8), dtype=np.uint8)
    mask[2:5, 1:4] = 255
    arguments: dict[str, Any] = {
        "strength": 0.6,
        "num_inference_steps": STEPS,
        "class_labels": labels,
        "guidance_scale": scale,
    }
    painted = handlers[name].show_edits(drawing(image, (28, 56, 111, 139)), 0.6, label, scale, SEED, STEPS)
    varied = handlers[name].show_edits(drawing(image), 0.6, label, scale, SEED, STEPS)
    inpaint = DDPMInpaintPipeline.from_pretrained(folders[name])
    expected = inpaint([image] * 4, mask, generator=generators(EDIT_SEEDS), **arguments).images
    row = shown(painted)
    assert [*row] == ["image", "mask", *(f"seed {seed}" for seed in EDIT_SEEDS)]
    assert np.array_equal(row["image"], image)
    assert np.array_equal(row["mask"], mask)
    assert np.array_equal([row[f"seed {seed}"] for seed in EDIT_SEEDS], [np.asarray(each) for each in expected])
    for seed in EDIT_SEEDS:
        is_changed = (row[f"seed {seed}"] != np.asarray(image)).any(axis=2)
        assert is_changed.any()
        assert not is_changed[mask == 0].any()

    vary = DDPMImg2ImgPipeline.from_pretrained(folders[name])
    expected = vary([image] * 4, generator=generators(EDIT_SEEDS), **arguments).images
    row = shown(varied)
    assert [*row] == ["image", *(f"seed {seed}" for seed in EDIT_SEEDS)]
    assert np.array_equal([row[f"seed {seed}"] for seed in EDIT_SEEDS], [np.asarray(each) for each in expected])


def test_a_step_denoiser_edits_by_all_of_its_steps(folders, handlers):
    page = handlers["step denoiser"].show_edits(drawing(picture(), (0, 0, 100, 100)), 0.2, EACH, 1.0, SEED, STEPS)
    mask = shown(page)["mask"]
    inpaint = DDPMInpaintPipeline.from_pretrained(folders["step denoiser"])
    expected = inpaint([picture()] * 4, mask, strength=0.2, generator=generators(EDIT_SEEDS)).images
    assert np.array_equal(shown(page)["seed 6"], expected[1])
    assert handlers["step denoiser"].model.editing_refusal() == ""


def test_images_and_masks_are_cropped_and_resized_alike(handlers):
    model = handlers["plain"].model
    wide = Image.new("RGB", (240, 80), "black")
    layer = Image.new("RGBA", wide.size)
    for canvas in (wide, layer):
        ImageDraw.Draw(canvas).rectangle((120, 0, 239, 79), fill="white")
    image, mask = np.asarray(model.fit(wide)), np.asarray(model.fit_mask([layer]))
    assert image.shape == (8, 8, 3)
    assert np.array_equal(mask, np.repeat([[0] * 4 + [255] * 4], 8, axis=0))
    assert np.array_equal(image[:, [0, -1], 0], np.repeat([[0, 255]], 8, axis=0))
    assert np.array_equal(model.fit(picture()), picture())
    # A mask of black and white, as programs send it, without transparency.
    opaque = Image.fromarray(mask).convert("RGBA")
    assert np.array_equal(model.fit_mask([opaque]), mask)
    assert model.fit_mask([]) is model.fit_mask([Image.new("RGBA", (9, 9))]) is None


def test_the_first_sample_is_edited_without_an_image(handlers):
    first = np.asarray(handlers["plain"].first_samples().images[0])
    for empty in (None, {"background": None, "layers": []}, {"background": Image.new("RGBA", (9, 9)), "layers": []}):
        assert np.array_equal(shown(handlers["plain"].show_edits(empty, 0.5, EACH, 1.0, SEED, STEPS))["image"], first)
    assert handlers["plain"].show_first()[2].size == (224, 224)


@pytest.mark.slow
def test_visitors_do_not_disturb_one_another(handlers):
    kept, image = handlers["kept"], drawing(picture(), (0, 0, 111, 111))

    def visit(scale: float) -> tuple[str, str]:
        images, _ = kept.show_samples("unipc", STEPS, SEED, 2, EACH, scale)
        return images, kept.show_edits(image, 1.0, EACH, scale, SEED, STEPS)

    scales = [2.0, 4.0]
    alone = [visit(scale) for scale in scales]
    with ThreadPoolExecutor(2) as pool:
        assert [*pool.map(visit, scales)] == alone


def test_wrong_values_become_messages(app, handlers):
    thin, image = drawing(picture(), (0, 0, 223, 2)), drawing(picture())
    wrong = [
        ("plain", "strength must be in", lambda page: page.show_edits(image, 0.0, EACH, 1.0, 0, STEPS)),
        ("plain", "num_inference_steps must be in", lambda page: page.show_edits(image, 1.0, EACH, 1.0, 0, T + 1)),
        ("plain", "guidance needs a weaker model", lambda page: page.show_edits(image, 1.0, EACH, 2.0, 0, STEPS)),
        ("plain", "draw with a larger brush", lambda page: page.show_edits(thin, 1.0, EACH, 1.0, 0, STEPS)),
        ("plain", "seed must be in", lambda page: page.show_edits(image, 1.0, EACH, 1.0, 2**63 - 1, STEPS)),
        ("classes", "class_labels must be in", lambda page: page.show_edits(image, 1.0, 7, 1.0, 0, STEPS)),
        ("classes", "class_labels must be given", lambda page: page.show_samples("unipc", STEPS, 0, 2, NONE)),
        ("plain", "num_inference_steps must be in", lambda page: page.show_samples("unipc", T + 1, 0, 2, EACH)),
        ("plain", "scheduler must be one of", lambda page: page.show_samples("<b>", STEPS, 0, 2, EACH)),
        ("dropout", "guidance scale must be finite", lambda page: page.show_samples("unipc", STEPS, 0, 2, 0, -1.0)),
        ("plain", "seed must be in", lambda page: page.show_noised(picture(), 3, 2**63)),
        ("other task", "as many channels as it takes", lambda page: page.show_first()),
    ]
    for name, message, action in wrong:
        with pytest.raises(app.gr.Error, match=message) as error:
            action(handlers[name])
        assert not error.value.print_exception
        assert "<b>" not in error.value.message


@pytest.mark.slow
def test_page_has_what_the_model_can_do(app, folders):
    async def build(name: str) -> tuple[Any, Any]:  # within a loop, since gradio else leaves one open
        page = app.build(str(folders[name]))
        return page, page.get_api_info()

    sliders = {}
    for name in ("plain", "classes", "kept", "guide", "other task"):
        page, api = asyncio.run(build(name))
        blocks = [*page.blocks.values()]
        sliders[name] = [each for each in blocks if getattr(each, "label", None) == "Guidance"]
        texts = [each.value for each in blocks if isinstance(each, app.gr.Markdown) and each.visible]
        is_refused = any("cannot edit images: unet must give as many channels" in text for text in texts)
        assert is_refused is (name == "other task")
        assert any("cropped and resized to 8 × 8 pixels" in text for text in texts)
        endpoints = api["named_endpoints"]
        assert endpoints.keys() - {"/edit"} == {"/sample", "/add_noise"}
        assert ("/edit" in endpoints) is not is_refused
        parameters = {each["label"]: each for each in endpoints["/sample"]["parameters"]}
        assert parameters["Guidance"]["parameter_default"] == (2.0 if name == "kept" else 1.0)
    assert {name: {each.visible for each in found} for name, found in sliders.items()} == {
        "plain": {False},
        "classes": {False},
        "kept": {True},
        "guide": {True},
        "other task": {False},
    }
