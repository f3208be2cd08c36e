"""Measure what `hf-ddpm train` without arguments gives, and how long it takes.

    python -m benchmarks.digits.run

A run learns the 1,797 digits of 8x8 pixels by the default settings, in a process of its own, from start to prompt. Of
its model, 1,000 samples in 20 steps are compared with the digits, all in pixels, 64 values in [0, 1]:

- the Fréchet distance to all digits, beside that between two halves of the digits;
- the share of samples that are as near to their nearest digit as 95 % of held-out digits are to theirs.

So that a model that repeats its training images does not look good, the same settings also train on 1,200 of the
digits, and the share of samples is given that are nearer to one of these than the nearest 5 % of the 597 held-out
digits are. Appends a line to `rows.jsonl` for each pair of runs. Writes `table.md`, and `loss.png` of the first run.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from hf_ddpm import DDPMPipeline
from hf_ddpm.data.config import DataConfig
from hf_ddpm.data.images import load_images
from hf_ddpm.evaluation.distances import Moments, frechet_distance
from hf_ddpm.evaluation.memorization import nearest

FOLDER = Path(__file__).parent
NUM_SAMPLES, NUM_STEPS = 1000, 20
NUM_TRAIN = 1200


def main() -> None:
    """Train twice, measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", required=True, help="What the processor is called in the table.")
    arguments = parser.parse_args()
    cache = load_images(DataConfig(dataset_name="digits"))
    pixels = torch.stack([torch.tensor(cache.image(i)) for i in range(len(cache))])
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "all"
        started = time.perf_counter()
        command = [sys.executable, "-m", "hf_ddpm", "train", "--output_dir", str(out)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - started
        shutil.copyfile(out / "figures" / "loss.png", FOLDER / "loss.png")
        order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
        kept, held_out = pixels[order[:NUM_TRAIN]], pixels[order[NUM_TRAIN:]]
        few, images = Path(folder) / "few", Path(folder) / "images"
        images.mkdir()
        for i, image in enumerate(kept):
            Image.fromarray(image[0].numpy()).save(images / f"{i:04}.png")
        command = [*command[:4], "--recipe", "digits", "--train_data_dir", str(images), "--output_dir", str(few)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        row = {
            "machine": arguments.machine,
            "date": time.strftime("%Y-%m-%d"),
            "torch": version("torch"),
            "diffusers": version("diffusers"),
            "seconds": seconds,
            "steps": json.loads((out / "run.json").read_text())["training"]["steps"],
            **measure(samples_of(out), samples_of(few), pixels, kept, held_out),
        }
    with (FOLDER / "rows.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    write_table([json.loads(line) for line in (FOLDER / "rows.jsonl").read_text().splitlines()])


def samples_of(folder: Path) -> Tensor:
    """Return the samples of a model, (N, 64) in [0, 1], of eight bits as those of a file."""
    pipeline = DDPMPipeline.from_pretrained(folder)
    pipeline.use(num_inference_steps=NUM_STEPS)
    generators = [torch.Generator().manual_seed(seed) for seed in range(NUM_SAMPLES)]
    images = pipeline(NUM_SAMPLES, generator=generators, output_type="np").images
    return torch.from_numpy(images).mul(255).round().div(255).flatten(1)


def measure(samples: Tensor, of_few: Tensor, pixels: Tensor, kept: Tensor, held_out: Tensor) -> dict[str, Any]:
    """Compare samples with the digits.

    Args:
        samples: The samples of the model of all digits, (N, 64) in [0, 1].
        of_few: Those of the model of some digits.
        pixels: All digits, (M, 1, 8, 8) uint8.
        kept: The digits that the second model was trained on.
        held_out: The others.
    """
    digits, kept, held_out = (images.flatten(1) / 255 for images in (pixels, kept, held_out))
    halves = torch.randperm(len(digits), generator=torch.Generator().manual_seed(1)).chunk(2)
    expected, _ = nearest(held_out, kept)
    distances, _ = nearest(samples, digits)
    distances_of_few, _ = nearest(of_few, kept)
    return {
        "fd": frechet_distance(Moments.of(samples), Moments.of(digits)),
        "fd_of_halves": frechet_distance(*(Moments.of(digits[half]) for half in halves)),
        "near": float((distances <= expected.quantile(0.95)).float().mean()),
        "too_near": float((distances_of_few < expected.quantile(0.05)).float().mean()),
    }


def write_table(rows: list[dict[str, Any]]) -> None:
    """Write a line for each pair of runs."""
    lines = [
        "What `hf-ddpm train` without arguments gives, by `python -m benchmarks.digits.run`. Seconds are those from",
        "start to prompt, pictures and card included. FD is the Fréchet distance of 1,000 samples in 20 steps to the",
        "digits in pixels; lower is better, and the second is that of two halves of the digits. Near is the share of",
        "samples that are as near to a digit as 95 % of held-out digits are; higher is better, and 95 % are real. Too",
        "near is the share of samples of a model of 1,200 digits that are nearer to one of these than 95 % of others",
        "are; far more than 5 % are memorized.",
        "",
        "| date | machine | torch, diffusers | steps | seconds | FD | FD of halves | near | too near |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['date']} | {row['machine']} | {row['torch']}, {row['diffusers']} | {row['steps']} "
            f"| {row['seconds']:.0f} | {row['fd']:.3f} | {row['fd_of_halves']:.3f} | {row['near']:.1%} "
            f"| {row['too_near']:.1%} |"
        )
    (FOLDER / "table.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
