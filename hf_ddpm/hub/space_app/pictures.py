"""Pictures as HTML: they stand in the page as data, in a grid of CSS, so that nothing else is fetched."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image

from hf_ddpm.figures import to_pil
from hf_ddpm.hub.space_app.model import Edits, Samples

MIN_SIDE = 224  # pixels to which an image is enlarged at least, so that the browser only makes it smaller

CSS = """
.gradio-container {width: 100%; max-width: 1160px !important; margin: 0 auto !important}
.gradio-container h1 {margin: 0 0 -8px}
.gradio-container h3 {margin: 0}
.show, .show .html-container {padding: 0 !important}
.pictures {display: grid; gap: 8px; align-items: center; overflow-x: auto}
.pictures figure {margin: 0}
.pictures figcaption {font-size: 13px; text-align: center}
.pictures img {display: block; width: 100%; margin: 0; border-radius: 4px}
.pictures span {font-size: 13px; text-align: center; white-space: nowrap}
.formula {font-size: 15px; line-height: 2; font-variant-numeric: tabular-nums}
.note {margin: 8px 0 0}
"""


def enlarged(image: Image.Image) -> Image.Image:
    """Return an image enlarged by a whole factor, so that its pixels stay squares."""
    factor = max(1, math.ceil(MIN_SIDE / min(image.size)))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def picture(image: Image.Image, text: str, caption: str = "") -> str:
    """Return an image as a <figure>, enlarged so that its pixels stay squares."""
    content = io.BytesIO()
    enlarged(image).save(content, "png")
    data = base64.b64encode(content.getvalue()).decode()
    below = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return f'<figure><img src="data:image/png;base64,{data}" alt="{html.escape(text)}">{below}</figure>'


def pictures(cells: Iterable[str], columns: str) -> str:
    """Return pictures and words in a grid; `columns` is CSS."""
    return f'<div class="pictures" style="grid-template-columns: {columns}">{"".join(cells)}</div>'


def note(text: str) -> str:
    """Return a line below pictures; none without a text."""
    return f'<p class="note">{html.escape(text)}</p>' if text else ""


def grid(images: Sequence[Image.Image], seeds: Sequence[int]) -> str:
    """Return images in rows of at most eight, and of fewer where there is no room."""
    cells = [picture(image, f"seed {seed}") for image, seed in zip(images, seeds, strict=True)]
    share = f"100% / {min(8, max(4, len(cells)))} - 8px"  # less the gap
    return pictures(cells, f"repeat(auto-fill, minmax(max(64px, {share}), 1fr))")


def column(images: Sequence[Image.Image], seeds: Sequence[int]) -> str:
    """Return images below one another."""
    texts = [f"seed {seed}" for seed in seeds]
    return pictures([picture(image, text, text) for image, text in zip(images, texts, strict=True)], "1fr")


def strip(samples: Samples) -> str:
    """Return how the first image emerges: a row of x_t, below it a row of x_0_hat, and below each step its t."""
    texts = [*(f"t = {t}" for t, _, _ in samples.states), "image"]
    rows = {
        ("x_t", "x<sub>t</sub>"): [to_pil(x_t / 2 + 0.5)[0] for _, x_t, _ in samples.states],
        ("x_0_hat", "x̂<sub>0</sub>"): [to_pil(x_0_hat / 2 + 0.5)[0] for _, _, x_0_hat in samples.states],
    }
    cells = []
    for (name, symbol), images in rows.items():
        cells.append(f"<span>{symbol}</span>")
        cells += [
            picture(image, f"{name}, {text}") for image, text in zip([*images, samples.images[0]], texts, strict=True)
        ]
    cells += ["<span></span>", *(f"<span>{text}</span>" for text in texts)]
    return pictures(cells, f"auto repeat({len(texts)}, minmax(52px, 1fr))")


def edit_row(edits: Edits, seeds: Sequence[int]) -> str:
    """Return an image, its mask if there is one, and its edits, beside each other; of arrays with a file of these."""
    shown = [(edits.image, "image"), *([] if edits.mask is None else [(edits.mask, "mask")])]
    shown += [(image, f"seed {seed}") for image, seed in zip(edits.images, seeds, strict=True)]
    cells = [picture(image, text, text) for image, text in shown]
    row = pictures(cells, "repeat(auto-fit, minmax(104px, 1fr))")
    return row if edits.values is None else row + download(edits.values, "edits.npy")


def download(values: np.ndarray, name: str) -> str:
    """Return a link to a NumPy file of values, which stands in the page as pictures do."""
    content = io.BytesIO()
    np.save(content, values)
    data = base64.b64encode(content.getvalue()).decode()
    text = f"{name}: {values.shape} {values.dtype}"
    address = f"data:application/octet-stream;base64,{data}"
    return f'<p class="note"><a download="{name}" href="{address}">{html.escape(text)}</a></p>'
