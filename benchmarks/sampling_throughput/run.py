"""Compare images per second: sampling with hf_ddpm against the stock `diffusers.DDPMPipeline`, in one run.

    python -m benchmarks.sampling_throughput.run [--threads N] [--turns N] [--images N] [--steps N]

All sample the network that is made for 28x28 gray images, with random weights, by DPM-Solver++. They take turns in
one process, so that a change of the machine's speed meets all alike; the ratio of each turn is kept. Compilation and a
first batch are left out. Then the stock pipeline as it comes, 1000 ancestral steps of 16 images, takes turns with the
fastest of ours, whose speed is measured before and after. Then the feature network of `hf-ddpm evaluate` is measured:
its speed, and how many cores it keeps busy. Writes `table.md`.
"""

from __future__ import annotations

import argparse
import itertools
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import UNet2DModel

from hf_ddpm.evaluation.features import load_network
from hf_ddpm.network_config import sized_config
from hf_ddpm.sampling.loading import load_for_sampling
from hf_ddpm.sampling.sampler import FORWARD_BATCH, iter_samples

BATCH, CHAINS = 64, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--images", type=int, default=BATCH)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("table.md"))
    options = parser.parse_args()
    options.device = "cpu"
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    unet: Any = UNet2DModel.from_config(sized_config((28, 28), 1, 1))
    scheduler = diffusers.DDPMScheduler(
        1000, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", timestep_spacing="trailing"
    )
    with tempfile.TemporaryDirectory() as folder:
        diffusers.DDPMPipeline(unet, scheduler).save_pretrained(folder)
        ways = {
            "stock DDPMPipeline": stock(folder, options),
            "hf_ddpm": ours(folder, options),
            "hf_ddpm --dtype bf16": ours(folder, options, dtype="bf16"),
            "hf_ddpm --dtype bf16 --compile": ours(folder, options, dtype="bf16", compile=True),
        }
    preparation = {name: seconds(sample) for name, sample in ways.items()}
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.turns):
        for name, sample in ways.items():
            taken[name].append(seconds(sample))
    text = (
        f"torch {version('torch')}, diffusers {version('diffusers')}, {platform.machine()}, "
        f"{options.threads} threads; {options.images} images of 28x28, {options.steps} steps of DPM-Solver++; "
        f"{options.turns} turns, medians; more images per second are better. `against stock` is the median of the "
        "ratios of each turn (smallest to largest in brackets), not the ratio of the medians beside it.\n\n"
        "| sampler | images per second | against stock | first call, seconds |\n|---|---|---|---|\n"
    )
    base = taken["stock DDPMPipeline"]
    for name, own in taken.items():
        ratios = [a / b for a, b in zip(base, own, strict=True)]
        spread = f" ({min(ratios):.2f} to {max(ratios):.2f})" if own is not base else ""
        speed = options.images / statistics.median(own)
        text += f"| {name} | {speed:.2f} | {statistics.median(ratios):.2f}{spread} | {preparation[name]:.1f} |\n"
    fastest = "hf_ddpm --dtype bf16 --compile"
    chain, beside = as_it_comes(unet, scheduler, 16), [seconds(ways[fastest])]
    ancestral = []
    for _ in range(CHAINS):
        ancestral.append(seconds(chain) / 16)
        beside.append(seconds(ways[fastest]))
    ratios = [
        own * options.images / statistics.mean(around)
        for own, around in zip(ancestral, itertools.pairwise(beside), strict=True)
    ]
    text += (
        f"\nThe stock pipeline as it comes, 1000 ancestral steps: {1 / statistics.median(ancestral):.3f} images per "
        f"second; for each of them `{fastest}` makes {statistics.median(ratios):.0f} ({min(ratios):.0f} to "
        f"{max(ratios):.0f}; {CHAINS} turns).\n"
    )
    text += "\n" + features(options.images) + "\n"
    options.out.write_text(text)
    print(text)


def as_it_comes(unet: Any, scheduler: Any, count: int) -> Callable[[], None]:
    pipeline = diffusers.DDPMPipeline(unet, scheduler)
    pipeline.set_progress_bar_config(disable=True)

    def sample() -> None:
        pipeline(count, [torch.Generator().manual_seed(seed) for seed in range(count)], output_type="np")

    return sample


def features(num_images: int) -> str:
    """Return a sentence: images per second through the feature network, and how many cores it keeps busy."""
    network = load_network("efficientnet-lite0", None, "cpu")
    pixels = torch.randint(0, 256, (FORWARD_BATCH, 1, 28, 28), dtype=torch.uint8)
    network(pixels)
    started, busy = time.perf_counter(), time.process_time()
    for _ in range(num_images // FORWARD_BATCH * 10):
        network(pixels)
    taken, busy = time.perf_counter() - started, time.process_time() - busy
    speed = num_images // FORWARD_BATCH * 10 * FORWARD_BATCH / taken
    return f"Features of efficientnet-lite0: {speed:.0f} images per second, {busy / taken:.2f} cores busy."


def seconds(sample: Callable[[], None]) -> float:
    started = time.perf_counter()
    sample()
    return time.perf_counter() - started


def stock(folder: str, options: argparse.Namespace) -> Callable[[], None]:
    pipeline = diffusers.DDPMPipeline.from_pretrained(folder).to(options.device)
    # The same solver as ours.
    config = load_for_sampling(folder, "dpmsolver++", options.steps, "cpu")[0].scheduler.config
    pipeline.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(config)
    # Which has no generator in its step; stock hands over one unless that is looked at.
    step = pipeline.scheduler.step
    pipeline.scheduler.step = lambda *arguments, generator=None, **named: step(*arguments, **named)
    pipeline.set_progress_bar_config(disable=True)

    def sample() -> None:
        for first in range(0, options.images, BATCH):
            seeds = range(first, min(first + BATCH, options.images))
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
            pipeline(len(seeds), generators, num_inference_steps=options.steps, output_type="np")

    return sample


def ours(folder: str, options: argparse.Namespace, **settings) -> Callable[[], None]:
    pipeline, steps = load_for_sampling(folder, "dpmsolver++", options.steps, options.device, **settings)

    def sample() -> None:
        for _ in iter_samples(pipeline, range(options.images), batch_size=BATCH, num_inference_steps=steps):
            pass

    return sample


if __name__ == "__main__":
    main()
