"""Edit images that a model has not seen: one picture of all kinds of edits, and the errors of DDIM inversion.

    hf-ddpm train --recipe fashion-mnist --dataset_name zalando-datasets/fashion_mnist --label_column label \
        --output_dir runs/clothes
    python -m benchmarks.edits_of_held_out.run runs/clothes --machine NAME

RUN is a run of the ten classes of clothes; images of the split `test` are edited as images of their class. Writes
`edits.png`, which has a block for each kind of edit, and `table.md`, the errors of inversion.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hf_ddpm import DDPMImg2ImgPipeline, DDPMInpaintPipeline, DDPMPipeline
from hf_ddpm.data.batches import fixed_pixels
from hf_ddpm.data.config import load_data_config
from hf_ddpm.data.splits import open_split
from hf_ddpm.figures import png_bytes, strip, to_pil
from hf_ddpm.inversion import interpolate, invert, reconstruct, reconstruction_error
from hf_ddpm.runtime.run_files import read_run
from hf_ddpm.sampling.loading import load_for_sampling
from hf_ddpm.sampling.sampler import seeded_generators

FOLDER = Path(__file__).parent
STRENGTHS = (0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
NUM_COLUMNS = 1 + len(STRENGTHS)
INVERSION_STEPS, ITERATIONS = (5, 10, 20, 50, 100), (1, 3)
# Of each class the first image is edited; of the last one the second, too, to which it is interpolated.
EDITED, INVERTED, INTERPOLATED = ("Bag", "Ankle boot"), ("Sandal",), "Sneaker"


def main() -> None:
    """Edit, draw and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--num_images", type=int, default=64, help="The images of the errors of inversion.")
    parser.add_argument("--machine", required=True, help="What the processor is called in the table.")
    options = parser.parse_args()
    pipeline, steps = load_for_sampling(str(options.run), uniform=True)
    pipeline.use(num_inference_steps=steps)
    with open_split(load_data_config(options.run / "config.yaml"), "test") as test:
        assert test.class_names is not None
        images = torch.from_numpy(np.array(fixed_pixels(test)[:1000])).float() / test.max_value
        labels = torch.from_numpy(np.array(test.labels[:1000]))
        names = list(test.class_names)
    edited, to_invert = (
        [int((labels == names.index(name)).nonzero()[0]) for name in each] for each in (EDITED, INVERTED)
    )
    blocks = [
        inpainted(pipeline, images[edited], labels[edited].tolist()),
        varied(pipeline, images[edited], labels[edited].tolist()),
        inverted(pipeline, images[to_invert], labels[to_invert].tolist()),
        interpolated(pipeline, images[labels == names.index(INTERPOLATED)][:2]),
    ]
    (FOLDER / "edits.png").write_bytes(png_bytes(stacked(blocks)))
    write_table(pipeline, images[: options.num_images], labels[: options.num_images].tolist(), options)


def inpainted(pipeline: DDPMPipeline, images: Tensor, labels: Sequence[int]) -> Image.Image:
    """Return a strip: images, what is known of them, and fills of the rest."""
    inpaint = DDPMInpaintPipeline.from_pipe(pipeline)
    height, width = images.shape[2:]
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[:, width // 2 :] = True
    known = images.masked_fill(mask, 0.5)
    num_fills = NUM_COLUMNS - 2
    fills = inpaint(
        images.repeat_interleave(num_fills, dim=0),
        mask,
        generator=seeded_generators(range(len(images) * num_fills), pipeline.device),
        class_labels=[label for label in labels for _ in range(num_fills)],
        output_type="pt",
    ).images.cpu()
    is_kept = (fills == images.repeat_interleave(num_fills, dim=0))[..., ~mask].all()
    assert is_kept, "known pixels changed"
    rows = [
        to_pil(torch.stack([image, hidden, *fills[i * num_fills : (i + 1) * num_fills]]))
        for i, (image, hidden) in enumerate(zip(images, known, strict=True))
    ]
    return strip(rows, ["image", "known", "filled", *[""] * (num_fills - 1)])


def varied(pipeline: DDPMPipeline, images: Tensor, labels: Sequence[int]) -> Image.Image:
    """Return a strip: images, and variations of growing strength."""
    variation = DDPMImg2ImgPipeline.from_pipe(pipeline)
    columns = [images]
    for strength in STRENGTHS:
        generators = seeded_generators(range(len(images)), pipeline.device)
        columns.append(
            variation(
                images, strength=strength, generator=generators, class_labels=list(labels), output_type="pt"
            ).images.cpu()
        )
    rows = [to_pil(torch.stack(row)) for row in zip(*columns, strict=True)]
    return strip(rows, ["image", "strength 0.2", *[f"{strength:g}" for strength in STRENGTHS[1:]]])


def inverted(pipeline: DDPMPipeline, images: Tensor, labels: Sequence[int]) -> Image.Image:
    """Return a strip: images, the noise that each comes from, and what DDIM makes of that noise by so many steps."""
    columns, titles = [images], ["image"]
    for steps in INVERSION_STEPS:
        noise = invert(pipeline, images, steps, list(labels))
        if steps == 20:
            columns.insert(1, (noise.cpu() / 6 + 0.5).clamp(0, 1))
            titles.insert(1, "its noise")
        columns.append(reconstruct(pipeline, noise, steps, list(labels), "pt").cpu())
        titles.append(f"{steps} steps")
    blank = torch.ones_like(images)
    columns += [blank] * (NUM_COLUMNS - len(columns))
    titles += [""] * (NUM_COLUMNS - len(titles))
    return strip([to_pil(torch.stack(row)) for row in zip(*columns, strict=True)], titles)


def interpolated(pipeline: DDPMPipeline, pair: Tensor) -> Image.Image:
    """Return a strip: two images, and what lies between them."""
    between = interpolate(
        pipeline, pair[:1], pair[1:], NUM_COLUMNS, 50, class_labels=INTERPOLATED, output_type="pt"
    ).cpu()
    between[0], between[-1] = pair  # DDIM gives them back with an error
    return strip([to_pil(between)], ["image", *[""] * (NUM_COLUMNS - 2), "image"])


def stacked(blocks: Sequence[Image.Image]) -> Image.Image:
    """Return blocks, one below the other."""
    sheet = Image.new("RGB", (max(each.width for each in blocks), sum(each.height for each in blocks)), "white")
    top = 0
    for block in blocks:
        sheet.paste(block, (0, top))
        top += block.height
    return sheet


def write_table(pipeline: DDPMPipeline, images: Tensor, labels: Sequence[int], options: argparse.Namespace) -> None:
    """Write the error of reconstruction by numbers of steps and of iterations."""
    run = read_run(options.run)
    text = (
        f"{time.strftime('%Y-%m-%d')}, {options.machine}, torch {version('torch')}, diffusers {version('diffusers')}. "
        f"A model of {run['data']['name']} after {run['training']['steps']:,} steps; {len(images)} images that it was "
        "not trained on. The error of reconstruction after DDIM inversion is the root of the mean squared difference "
        "of pixels in [0, 1]; its mean ± its standard error over images. Lower is better. The columns are numbers of "
        "iterations of each step.\n\n"
        f"| steps | {' | '.join(map(str, ITERATIONS))} |\n|{'---|' * (1 + len(ITERATIONS))}\n"
    )
    for steps in INVERSION_STEPS:
        cells = []
        for iterations in ITERATIONS:
            errors = reconstruction_error(pipeline, images, steps, list(labels), num_iterations=iterations)
            cells.append(f"{float(errors.mean()):.4f} ± {float(errors.std()) / len(errors) ** 0.5:.4f}")
        text += f"| {steps} | {' | '.join(cells)} |\n"
        print(text.splitlines()[-1], flush=True)
    (FOLDER / "table.md").write_text(text)


if __name__ == "__main__":
    main()
