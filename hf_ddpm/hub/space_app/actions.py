"""The actions of the page: what its controls set off, and what is said where a value cannot work."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from hf_ddpm.data.given_files import read_mask
from hf_ddpm.figures import to_pil
from hf_ddpm.hub.space_app.model import EACH_LABEL, Model, Samples
from hf_ddpm.hub.space_app.pictures import column, edit_row, enlarged, grid, note, picture, pictures, strip
from hf_ddpm.runtime.seeds import check_seeds

NUM_EDITS = 4
# The noises of each number of steps, of a model that was tuned for few.
NUM_NOISES = 4


def describe_noise_level(model: Model, t: int) -> str:
    """Return the coefficients of x_t and its signal-to-noise ratio, in HTML."""
    alpha_bar = float(model.scheduler.alpha_bar[t])
    snr = alpha_bar / (1 - alpha_bar)
    decibels = f"{10 * math.log10(snr):+.1f} dB" if snr > 0 else "no signal"
    return (
        f"x<sub>{t}</sub> = {math.sqrt(alpha_bar):.4f} x<sub>0</sub> + {math.sqrt(1 - alpha_bar):.4f} ε<br>"
        f"ᾱ<sub>{t}</sub> = {alpha_bar:.4g}<br>"
        f"SNR = ᾱ<sub>{t}</sub> / (1 - ᾱ<sub>{t}</sub>) = {snr:.4g} ({decibels})"
    )


@contextmanager
def messages() -> Iterator[None]:
    """Show what a visitor can mend as a message of the page, in place of a traceback."""
    try:
        yield
    except ValueError as error:
        raise gr.Error(html.escape(str(error)), print_exception=False) from error


class Handlers:
    """The actions of the page: functions of the values of its controls, which return HTML or images.

    All of them raise `gr.Error`, the message that the page shows, when a value cannot work.
    """

    def __init__(self, model: Model, num_images: int):
        self.model = model
        self.num_images = num_images
        self.first_samples = cache(self._first_samples)  # the same for each visitor

    def _first_samples(self) -> Samples:
        model, seeds = self.model, range(self.num_images)
        scale = model.default_guidance.scale
        return model.sample(model.samplers[0], model.default_steps, seeds, model.labels(EACH_LABEL, seeds), scale)

    def _note(self, label: int | str | None, scale: float) -> str:
        """Return what is to be said about guidance, in HTML."""
        is_off = scale != 1 and self.model.lacks_direction(self.model.labels(label, [0]))
        return note("Guidance is off: it leads to a class or a label, and none was chosen." if is_off else "")

    def show_first(self) -> tuple[str, str, Image.Image]:
        """Return the images and the strip with which the page begins, and the image that it offers to edit."""
        with messages():
            samples = self.first_samples()
        return grid(samples.images, range(self.num_images)), strip(samples), enlarged(samples.images[0])

    def show_samples(
        self,
        sampler: str,
        num_steps: float,
        seed: float | None,
        num_images: float,
        label: int | str | None,
        guidance_scale: float = 1.0,
        progress: gr.Progress = gr.Progress(),  # noqa: B008  gradio finds it as a default
    ) -> tuple[str, str]:
        """Return the images and the strip that somebody has asked for."""

        def on_step(step: int, num_steps: int) -> None:
            progress((step, num_steps), unit="steps")

        with messages():
            seeds = range(int(seed or 0), int(seed or 0) + int(num_images))
            labels = self.model.labels(label, seeds)
            samples = self.model.sample(sampler, int(num_steps), seeds, labels, guidance_scale, on_step)
            return grid(samples.images, seeds) + self._note(label, guidance_scale), strip(samples)

    def show_in_steps(self, num_steps: int, seed: float | None, label: int | str | None) -> str:
        """Return what becomes of NUM_NOISES noises in a number of steps."""
        with messages():
            model, seeds = self.model, range(int(seed or 0), int(seed or 0) + NUM_NOISES)
            return column(model.sample("lcm", num_steps, seeds, model.labels(label, seeds)).images, seeds)

    def show_noised(self, image: Image.Image | None, t: float, seed: float | None) -> tuple[str, str]:
        """Return an image beside its x_t, and the numbers of that t; without an image, the first sample is shown."""
        t = int(t)
        with messages():
            check_seeds(int(seed or 0))
            x_0 = self.first_samples().x_0 if image is None else self.model.from_image(image)
        x_t = self.model.add_noise(x_0, int(seed or 0), t)
        cells = [
            picture(to_pil(self.model.shown(x_0) / 2 + 0.5)[0], "x_0"),
            picture(to_pil(self.model.shown(x_t) / 2 + 0.5)[0], f"x_t, t = {t}"),
            "<span>x<sub>0</sub></span>",
            f"<span>x<sub>t</sub>, t = {t}</span>",
        ]
        numbers = f'<div class="formula">{describe_noise_level(self.model, t)}</div>'
        return pictures(cells, "repeat(2, minmax(0, 320px))"), numbers

    def show_edits(
        self,
        drawing: dict[str, Any] | None,
        strength: float,
        label: int | str | None,
        guidance_scale: float,
        seed: float | None,
        num_steps: float,
        progress: gr.Progress = gr.Progress(),  # noqa: B008  gradio finds it as a default
    ) -> str:
        """Return an image, its mask and four edits.

        What is drawn in white is repainted. Where nothing is drawn, the whole image is varied. Without an image, the
        first sample is edited.
        """

        def on_step(step: int, num_steps: int) -> None:
            progress((step, num_steps), unit="steps")

        with messages():
            seeds = range(int(seed or 0), int(seed or 0) + NUM_EDITS)
            image, labels = self._image_to_edit(drawing), self.model.labels(label, seeds)
            mask = self.model.fit_mask((drawing or {}).get("layers") or [])
            edits = self.model.edit(
                image, mask, strength, int(num_steps), seeds, labels, guidance_scale, on_step=on_step
            )
            return edit_row(edits, seeds) + self._note(label, guidance_scale)

    def show_array_edits(
        self,
        array: str | None,
        mask: str | None,
        strength: float,
        label: int | str | None,
        guidance_scale: float,
        seed: float | None,
        num_steps: float,
        progress: gr.Progress = gr.Progress(),  # noqa: B008  gradio finds it as a default
    ) -> str:
        """Return an array, its mask and four edits, and a file of these, (4, C, H, W), in the units of the data.

        What is white or not 0 in the mask is repainted, and all else stays as it is, to the last bit. Without a mask,
        the whole array is varied. Without an array, the first sample is edited.
        """

        def on_step(step: int, num_steps: int) -> None:
            progress((step, num_steps), unit="steps")

        with messages():
            model, seeds = self.model, range(int(seed or 0), int(seed or 0) + NUM_EDITS)
            labels = model.labels(label, seeds)
            repainted = None if mask is None else read_mask(Path(mask), model.height, model.width)
            values = model.array_from(array, repainted if strength == 1 else None)
            if values is None:
                values = model.units_of(self.first_samples().x_0)
            edits = model.edit_array(
                values, repainted, strength, int(num_steps), seeds, labels, guidance_scale, on_step=on_step
            )
            return edit_row(edits, seeds) + note(model.describe_clipped(values)) + self._note(label, guidance_scale)

    def _image_to_edit(self, drawing: dict[str, Any] | None) -> Image.Image:
        """Return the image of a drawing as the model sees it; without one, the first sample."""
        image: Image.Image | None = (drawing or {}).get("background")
        # An empty canvas is transparent.
        is_empty = image is None or image.convert("RGBA").getchannel("A").getextrema()[1] == 0
        with messages():
            return self.first_samples().images[0] if image is None or is_empty else self.model.fit(image)
