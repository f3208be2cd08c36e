"""The page of a model shows in a browser, where somebody samples, paints, edits and moves sliders."""

from __future__ import annotations

import os
import shutil
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from PIL import Image

from hf_ddpm import DDPMPipeline, DDPMScheduler
from hf_ddpm.classes import Classes
from hf_ddpm.hub.space_app.model import NUM_SHOWN_STEPS
from tests.support.forks import python
from tests.support.networks import smallest_unet_config
from tests.support.tuned import tuned_pipeline

pytestmark = pytest.mark.skipif(find_spec("gradio") is None, reason='needs pip install "hf_ddpm[demo]"')

T = 20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small random model of two classes, which can be guided."""
    torch.manual_seed(0)
    scheduler = DDPMScheduler(T, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    pipeline = DDPMPipeline(UNet2DModel(**smallest_unet_config(3, num_class_embeds=3)), scheduler)
    pipeline.classes = Classes(("cat", "dog"), has_unconditional=True)
    pipeline.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@contextmanager
def opened(folder: Path, tmp_path: Path) -> Iterator[tuple[Any, Any]]:
    """Show a model in a browser, and give `expect` and the page; in the end it has had no error and no other host."""
    playwright = pytest.importorskip("playwright.sync_api")
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium or Chrome on the PATH")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.mkfifo(tmp_path / "said.txt")
    command = ["-m", "hf_ddpm", "demo", str(folder), "--port", str(port)]
    server = python(command, tmp_path, None, tmp_path / "said.txt", tmp_path / "complained.txt")
    server.start()
    playwright.expect.set_options(timeout=60_000)
    errors: list[str] = []
    hosts: set[str] = set()
    with open(tmp_path / "said.txt") as said, playwright.sync_playwright() as api:
        try:
            assert any(f"http://127.0.0.1:{port}" in line for line in said)
            page = api.chromium.launch(executable_path=browser, args=["--no-sandbox"]).new_page()
            page.set_default_timeout(60_000)
            page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.on("request", lambda request: hosts.add(request.url.split("/")[2]))
            page.goto(f"http://127.0.0.1:{port}")
            yield playwright.expect, page
        finally:
            os.kill(server.pid, signal.SIGTERM)
            server.join()
    assert errors == []
    assert hosts <= {f"127.0.0.1:{port}", ""}  # data: addresses have none


@pytest.mark.slow
def test_page_shows_in_a_browser(folder: Path, tmp_path: Path):
    with opened(folder, tmp_path) as (expect, page):
        image, sources = page.locator("#images img").first, []
        sources.append(image.get_attribute("src"))
        page.get_by_label("Seed", exact=True).first.fill("7")
        page.get_by_label("number input for Guidance").first.fill("3")
        page.get_by_role("button", name="Sample").click()
        expect(image).not_to_have_attribute("src", sources[0])
        assert image.get_attribute("alt") == "seed 7"
        assert page.locator("#images img").count() == 16
        assert page.locator("#chain img").count() == 2 * (NUM_SHOWN_STEPS + 1)

        page.get_by_role("tab", name="Edit").click()
        canvas = page.locator("#editor canvas").first
        edits = page.locator("#edits img")
        page.wait_for_timeout(1000)  # until the editor has its size
        for _ in range(3):  # on a busy machine it is not yet ready for a stroke then, and there is no mask
            box = canvas.bounding_box()
            assert box is not None
            x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
            page.mouse.move(x, y)
            page.mouse.down()
            page.mouse.move(x + 40, y, steps=4)
            page.mouse.up()
            page.get_by_role("button", name="Edit", exact=True).click()
            with suppress(AssertionError):
                expect(edits).to_have_count(6, timeout=20_000)
                break
        expect(edits).to_have_count(6)
        assert [each.get_attribute("alt") for each in edits.all()[:3]] == ["image", "mask", "seed 0"]
        assert edits.first.get_attribute("src") == sources[0]  # the first sample, bit for bit

        page.get_by_role("tab", name="Forward process").click()
        noised = page.locator("#noised img").last
        sources.append(noised.get_attribute("src"))
        page.get_by_label("range slider for Timestep t").press("End")
        expect(noised).to_have_attribute("alt", f"x_t, t = {T - 1}")
        assert noised.get_attribute("src") != sources[1]
        expect(page.locator("#numbers")).to_contain_text("dB")

        clean = page.locator("#noised img").first
        sources.append(clean.get_attribute("src"))
        Image.new("L", (30, 20), 128).save(tmp_path / "gray.png")
        page.locator("[role=tabpanel]:visible input[type=file]").set_input_files(tmp_path / "gray.png")
        expect(clean).not_to_have_attribute("src", sources[2])


@pytest.mark.slow
def test_columns_of_few_steps_follow_the_slider(tmp_path: Path):
    tuned_pipeline().save_pretrained(tmp_path / "tuned")
    with opened(tmp_path / "tuned", tmp_path) as (expect, page):
        page.get_by_role("tab", name="Few steps").click()
        columns = [page.locator(f"#in_{num_steps}_steps img") for num_steps in (1, 2, 4, 20)]
        for column in columns:
            expect(column).to_have_count(4)
        before = [column.first.get_attribute("src") for column in columns]
        slider = page.get_by_label("range slider for Seed")
        slider.press("End")
        for _ in range(5):  # faster than images come: the last position counts
            slider.press("ArrowLeft")
        for column, source in zip(columns, before, strict=True):
            expect(column.first).to_have_attribute("alt", "seed 994")
            assert column.first.get_attribute("src") != source
