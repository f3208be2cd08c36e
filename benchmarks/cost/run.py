"""Measure what training and sampling cost as the work grows: batch, resolution, channels, processes, steps.

    python -m benchmarks.cost.run

Training is a dry run of the network that is made for the data, on random images, in bfloat16, not compiled: the
seconds per step, and the memory that the steps added to the process. Sampling is `load_for_sampling` and
`iter_samples`: one measured turn after one that warms up. What was not run is extrapolated, and the table says so.
Writes `table.md`.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import numpy as np
import torch
from diffusers import UNet2DModel
from PIL import Image

from hf_ddpm.network_config import sized_config
from hf_ddpm.sampling.loading import load_for_sampling
from hf_ddpm.sampling.sampler import iter_samples

ROOT = Path(__file__).parents[2]


class Workload(NamedTuple):
    resolution: int
    channels: int
    batch: int
    processes: int = 1
    flags: tuple[str, ...] = ()


CHECKPOINTING = ("--gradient_checkpointing",)
WORKLOADS = [
    *(Workload(28, 1, batch) for batch in (8, 32, 128)),
    Workload(28, 1, 128, flags=CHECKPOINTING),
    Workload(28, 1, 16, processes=2),
    Workload(28, 3, 32),
    *(Workload(resolution, 3, 8) for resolution in (8, 16, 32, 64)),
    Workload(64, 3, 8, flags=CHECKPOINTING),
    Workload(128, 3, 2),
    Workload(128, 3, 2, flags=CHECKPOINTING),
]
SAMPLE_SETS = [(images, steps) for images in (16, 64) for steps in (10, 20, 50)]


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as folder:
        rows = [dry_run(workload, Path(folder)) for workload in WORKLOADS]
        sampling = [sampling_seconds(Path(folder), images, steps) for images, steps in SAMPLE_SETS]
    text = (
        f"torch {version('torch')}, diffusers {version('diffusers')}, {platform.machine()}, {os.cpu_count()} cores; "
        "bfloat16, not compiled; samples by DPM-Solver++. Fewer seconds, less memory and more images/s are better.\n\n"
        "| resolution | channels | batch per process | processes | flags | parameters | FLOP per image and step | "
        "s per step | images/s | memory of steps |\n|---|---|---|---|---|---|---|---|---|---|\n"
    )
    for workload, row in zip(WORKLOADS, rows, strict=True):
        flags = " ".join(workload.flags)
        text += (
            f"| {workload.resolution} | {workload.channels} | {workload.batch} | {workload.processes} | {flags} | "
            f"{row['parameters']} | {row['flops']} | {row['seconds']:.3g} | {row['speed']:.3g} | {row['memory']} |\n"
        )
    last = rows[WORKLOADS.index(Workload(128, 3, 2))]
    text += (
        f"\nExtrapolated, not run: a batch of 32 at 128x128 takes 16 times the step of a batch of 2, "
        f"{16 * last['seconds']:.0f} s, and an epoch of 50,000 images {50_000 / last['speed'] / 3600:.0f} hours here."
        "\n\n| images of 28x28 | steps | seconds | images/s |\n|---|---|---|---|\n"
    )
    for (images, steps), seconds in zip(SAMPLE_SETS, sampling, strict=True):
        text += f"| {images} | {steps} | {seconds:.2f} | {images / seconds:.1f} |\n"
    Path(__file__).with_name("table.md").write_text(text)
    print(text)


def dry_run(workload: Workload, folder: Path) -> dict[str, Any]:
    """Return what the dry run of a workload prints: parameters, FLOP, seconds per step, images per second, memory."""
    images = folder / f"{workload.resolution}-{workload.channels}"
    if not images.exists():
        images.mkdir()
        shape = (256, workload.resolution, workload.resolution, 3)[: 4 if workload.channels == 3 else 3]
        for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)):
            Image.fromarray(pixels).save(images / f"{i:03d}.png")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", str(workload.processes)]
    launch += ["--mixed_precision", "bf16", str(ROOT / "train_accelerate.py"), "--train_data_dir", str(images)]
    launch += ["--cache_dir", str(folder / "cache"), "--output_dir", str(folder / "run"), "--dry_run"]
    launch += ["--train_batch_size", str(workload.batch), *workload.flags]
    output = subprocess.run(launch, check=True, capture_output=True, text=True).stdout

    def find(pattern: str) -> str:
        return re.search(pattern, output, re.M)[1]

    return {
        "parameters": find(r"^parameters .* ([\d,]+)$"),
        "flops": find(r"forward, (.*?) a training step"),
        "seconds": float(find(r"([\d.e+-]+) s per step")),
        "speed": float(find(r"measured\s+([\d.,e+-]+) images/s").replace(",", "")),
        "memory": find(r", ([\d.]+ \w+) of it since before the first step"),
    }


def sampling_seconds(folder: Path, images: int, steps: int) -> float:
    """Return the seconds that `images` images take, after a turn of 16 that is not counted."""
    model = folder / "model"
    if not model.exists():
        scheduler = diffusers.DDPMScheduler(1000, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
        unet: Any = UNet2DModel.from_config(sized_config((28, 28), 1, 1))
        diffusers.DDPMPipeline(unet, scheduler).save_pretrained(model)
    pipeline, _ = load_for_sampling(str(model), "dpmsolver++", steps, "cpu", dtype="bf16")
    for count in (16, images):
        started = time.perf_counter()
        for _ in iter_samples(pipeline, range(count), batch_size=64, num_inference_steps=steps):
            pass
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
