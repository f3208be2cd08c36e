"""Compare the methods of inpainting with one another, and the errors of DDIM inversion.

    hf-ddpm train --output_dir runs/digits
    python -m benchmarks.editing.run runs/digits

RUN is a run of the digits. Of 16 digits the lower half, or a square in the middle, is filled 8 times. The energy
score of the fills of an image is E|X - y| - E|X - X'| / 2, with X and X' two of them and y what was there. Its
expectation is smallest for fills that are drawn from the distribution of y (Gneiting & Raftery 2007). The digits are
among those that the model was trained on, which is so for all methods. Writes `table.md`.
"""

from __future__ import annotations

import argparse
import time
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_ddpm import editing
from hf_ddpm.data.config import DataConfig
from hf_ddpm.data.images import load_images
from hf_ddpm.inpainting import repaint_levels
from hf_ddpm.inversion import reconstruction_error
from hf_ddpm.runtime.run_files import read_run
from hf_ddpm.sampling.loading import load_for_sampling
from hf_ddpm.sampling.sampler import seeded_generators

NUM_IMAGES, NUM_FILLS = 16, 8
# Method, scheduler, steps, gradients of each step, jump_length and jump_n_sample of RePaint.
SETTINGS: list[tuple[str, str, int, int, int, int]] = [
    ("replace", "unipc", 20, 0, 0, 0),
    ("replace", "ddpm", 20, 0, 0, 0),
    ("replace", "ddpm", 100, 0, 0, 0),
    ("posterior", "unipc", 20, 1, 0, 0),
    ("posterior", "unipc", 20, 2, 0, 0),
    ("posterior", "unipc", 20, 3, 0, 0),
    ("posterior", "unipc", 10, 2, 0, 0),
    ("posterior", "ddpm", 20, 2, 0, 0),
    ("repaint", "ddpm", 50, 0, 10, 10),
]
INVERSIONS = [(steps, iterations) for steps in (10, 20, 50) for iterations in (1, 3, 5)]


def main() -> None:
    """Fill by each method, invert, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    options = parser.parse_args()
    pipeline, _ = load_for_sampling(options.run, uniform=True)
    digits = some_digits()
    half, middle = torch.zeros(2, 8, 8, dtype=torch.bool)
    half[4:], middle[2:6, 2:6] = True, True
    text = (
        f"{time.strftime('%Y-%m-%d')}, torch {version('torch')}, diffusers {version('diffusers')}. A model of the "
        f"digits after {read_run(Path(options.run))['training']['steps']:,} steps; {NUM_IMAGES} digits, each filled "
        f"{NUM_FILLS} times. Lower is better. The energy score is the distance of the fills to what was there, less "
        "half of that between two of them.\n\n"
        "| method | scheduler | steps | gradients per step | evaluations per image | energy score, lower half | "
        "energy score, middle |\n|---|---|---|---|---|---|---|\n"
    )
    for method, scheduler, steps, gradients, jump_length, jump_n_sample in SETTINGS:
        jumps: dict[str, Any] = {}
        evaluations = steps
        if method == "repaint":
            jumps = {"jump_length": jump_length, "jump_n_sample": jump_n_sample}
            levels = repaint_levels(steps, **jumps)
            evaluations = sum(after > before for before, after in pairwise(levels))
        scores = [fill(pipeline, digits, mask, method, scheduler, steps, gradients, jumps) for mask in (half, middle)]
        text += (
            f"| {method} | {scheduler} | {steps} | {gradients} | {evaluations} | {scores[0]:.3f} | {scores[1]:.3f} |\n"
        )
        print(text.splitlines()[-1], flush=True)
    text += (
        "\nThe error of reconstruction after DDIM inversion, the root of the mean squared difference of pixels in "
        "[0, 1], its mean over the same digits:\n\n"
        "| steps | iterations of each step | evaluations of the inversion | error |\n|---|---|---|---|\n"
    )
    for steps, iterations in INVERSIONS:
        error = float(reconstruction_error(pipeline, digits, steps, num_iterations=iterations).mean())
        text += f"| {steps} | {iterations} | {steps * iterations} | {error:.4f} |\n"
    Path(__file__).with_name("table.md").write_text(text)


def some_digits() -> Tensor:
    """Return NUM_IMAGES digits, (N, 1, 8, 8) in [0, 1]."""
    cache = load_images(DataConfig(dataset_name="digits"))
    chosen = np.random.default_rng(0).permutation(len(cache))[:NUM_IMAGES]
    return torch.stack([torch.tensor(cache.image(int(i))) for i in chosen]) / 255


def fill(
    pipeline: Any,
    digits: Tensor,
    mask: Tensor,
    method: str,
    scheduler: str,
    steps: int,
    gradients: int,
    jumps: dict[str, Any],
) -> float:
    """Return the mean energy score of the fills of a mask."""
    editing.NUM_GRADIENTS = gradients
    inpaint = editing.DDPMInpaintPipeline.from_pipe(pipeline)
    inpaint.use(scheduler, steps)
    images = digits.repeat_interleave(NUM_FILLS, dim=0)
    generators = seeded_generators(range(len(images)), pipeline.device)
    filled = inpaint(images, mask, generator=generators, output_type="pt", method=method, **jumps).images
    fills = filled.view(len(digits), NUM_FILLS, 8, 8)[:, :, mask].cpu()
    distance = (fills - digits[:, 0, mask][:, None]).norm(dim=2).mean(dim=1)
    between = torch.cdist(fills, fills).sum(dim=(1, 2)) / (NUM_FILLS * (NUM_FILLS - 1))
    return float((distance - between / 2).mean())


if __name__ == "__main__":
    main()
