"""Take the pictures of a model's page.

    python -m benchmarks.demo_page.run MODEL [--port PORT]

Starts `hf-ddpm demo MODEL`, opens it in Chromium, samples with seed 1, and writes what is seen to `page.png`, and the
forward process to `page-forward.png`. Needs `pip install playwright` and a Chromium or Chrome on the PATH.
"""

import argparse
import os
import shutil
import subprocess
from pathlib import Path

from playwright.sync_api import expect, sync_playwright


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
            page.get_by_label("Seed", exact=True).fill("1")
            page.get_by_role("button", name="Sample").click()
            expect(first).not_to_have_attribute("src", before or "", timeout=300_000)
            expect(page.locator(".progress-text")).to_have_count(0)
            page.mouse.move(0, 0)
            page.screenshot(path=out)
            page.get_by_role("tab", name="Forward process").click()
            page.get_by_label("number input for Timestep t").fill("400")
            expect(page.locator("#noised img").last).to_have_attribute("alt", "x_t, t = 400")
            page.screenshot(path=out.with_name(f"{out.stem}-forward.png"))
        finally:
            server.terminate()


if __name__ == "__main__":
    main()
