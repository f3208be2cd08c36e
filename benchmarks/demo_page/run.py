"""Take the pictures of a model's page.

    python -m benchmarks.demo_page.run MODEL [--port PORT]

Starts `hf-ddpm demo MODEL`, opens it in Chromium, samples with seed 1, and writes what is seen to `page.png`. Then it
paints over the middle of the first sample, and writes the edits to `page-edit.png`, and the forward process to
`page-forward.png`. A model of classes samples with guidance. Needs `pip install playwright` and a Chromium or Chrome
on the PATH.
"""

import argparse
import os
import shutil
import subprocess
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--port", type=int, default=7860)
    options = parser.parse_args()
    take_pictures(options.model, Path(__file__).with_name("page.png"), options.port)


def take_pictures(model: str, out: Path, port: int) -> None:
    expect.set_options(timeout=60_000)
    browsers = ("chromium", "chromium-browser", "google-chrome")
    browser = next(path for path in map(shutil.which, browsers) if path)
    command = ["hf-ddpm", "demo", model, "--port", str(port)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    with server, sync_playwright() as playwright:
        try:
            assert server.stdout is not None
            address = next(line.split()[-1] for line in server.stdout if "http" in line)
            page = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"]).new_page(
                viewport={"width": 1100, "height": 680}, color_scheme="light"
            )
            page.goto(address)
            first = page.locator("#images img").first
            before = first.get_attribute("src", timeout=300_000)
            page.get_by_label("Seed", exact=True).first.fill("1")
            guidance = page.get_by_label("number input for Guidance").first
            if guidance.is_visible():
                guidance.fill("2")
            page.get_by_role("button", name="Sample").click()
            expect(first).not_to_have_attribute("src", before or "", timeout=300_000)
            expect(page.locator(".progress-text")).to_have_count(0)
            show(page, out)
            edit(page)
            show(page, out.with_name(f"{out.stem}-edit.png"))
            page.get_by_role("tab", name="Forward process").click()
            page.get_by_label("number input for Timestep t").fill("400")
            expect(page.locator("#noised img").last).to_have_attribute("alt", "x_t, t = 400")
            show(page, out.with_name(f"{out.stem}-forward.png"))
        finally:
            server.terminate()


def edit(page: Page) -> None:
    """Paint over the middle of the image in the tab "Edit", and wait for the edits."""
    page.get_by_role("tab", name="Edit").click()
    page.wait_for_timeout(2_000)  # until the editor has its size
    box = page.locator("#editor canvas").first.bounding_box()
    assert box is not None
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    for row in (-20, 20):
        page.mouse.move(x - 60, y + row)
        page.mouse.down()
        page.mouse.move(x + 60, y + row, steps=12)
        page.mouse.up()
    page.get_by_role("button", name="Edit", exact=True).click()
    expect(page.locator("#edits img")).to_have_count(6, timeout=300_000)
    expect(page.locator(".progress-text")).to_have_count(0)


def show(page: Page, out: Path) -> None:
    """Take a picture of the whole page."""
    page.mouse.move(0, 0)
    page.wait_for_timeout(2_000)  # until colors have faded in
    page.screenshot(path=out, full_page=True)


if __name__ == "__main__":
    main()
