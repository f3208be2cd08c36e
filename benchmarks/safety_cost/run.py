"""Measure what it costs that a run cannot be lost: per step, and per checkpoint.

    python -m benchmarks.safety_cost.run

One loop takes training steps of the default network for 28x28 images and, after each, does by itself what a step does
only so that it can be resumed, skipped or stopped: t and eps as functions of the position of each image, a seed for
dropout, marking a loss and skipping a step that are not finite, asking for signals. Ratios are of medians of this
loop. Then checkpoints are written as a run writes them, flushed and read back. Writes `table.md`.
"""

from __future__ import annotations

import argparse
import math
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DModel

from hf_ddpm import DDPMScheduler
from hf_ddpm.network_config import sized_config
from hf_ddpm.objective import Objective
from hf_ddpm.runtime.seeds import image_draws, seed_step
from hf_ddpm.runtime.signals import StopRequest
from hf_ddpm.training.averages import EMA
from hf_ddpm.training.checkpoint import Progress, TrainingState, save_checkpoint

BATCH, STEPS, CHECKPOINTS, STEPS_BETWEEN = 32, 60, 10, 500


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    unet: Any = UNet2DModel.from_config(sized_config((28, 28), 1, 1))
    parameters = list(unet.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    ema = EMA(parameters, ["halflife-1000", "std-0.05", "std-0.1"])
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    objective = Objective(scheduler)
    x_0 = torch.rand(BATCH, 1, 28, 28) * 2 - 1
    times: dict[str, list[float]] = {}

    def timed(name: str, work: Callable[[], object]) -> None:
        started = time.perf_counter()
        work()
        times.setdefault(name, []).append(time.perf_counter() - started)

    def step() -> None:
        objective(unet, x_0).mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update(parameters, {"halflife-1000": 0.99, "std-0.05": 0.9, "std-0.1": 0.9})

    def draw() -> None:
        objective.timesteps_from_uniform(torch.rand(BATCH))
        torch.randn(x_0.shape)

    def draw_per_image(positions: np.ndarray) -> None:
        uniform, _ = image_draws(0, torch.from_numpy(positions), x_0.shape[1:], x_0.device)
        objective.timesteps_from_uniform(uniform)

    def guard() -> None:
        mean = torch.ones((), requires_grad=True) * 2
        mark = torch.where(mean.detach().isfinite(), 1.0, math.nan)
        is_bad = ~(mean * mark).isfinite()
        is_bad.float()
        bool(is_bad)

    with StopRequest(max_hours=1, started=time.monotonic()) as stop:
        for number in range(STEPS):
            positions = np.arange(BATCH) + number * BATCH
            timed("step", step)
            timed("one generator", draw)
            timed("draws per image", lambda at=positions: draw_per_image(at))
            timed("dropout seed", lambda at=number: seed_step(0, at, 0))
            timed("guard", guard)
            timed("signals", lambda at=number: stop.reason(at))
    with tempfile.TemporaryDirectory() as folder:
        for number in range(CHECKPOINTS):
            progress = Progress(number + 1, 0, 0.0, 0, BATCH, BATCH, None, "")
            state = TrainingState(unet, optimizer, ema)
            timed("checkpoint", lambda now=progress, of=state: print(save_checkpoint(of, now, Path(folder), 2, True)))

    median = {name: statistics.median(values) for name, values in times.items()}
    rows = {
        "t and eps as functions of the position": median["draws per image"] - median["one generator"],
        "the seed of dropout": median["dropout seed"],
        "loss and gradients looked at": median["guard"],
        "signals and time asked for": median["signals"],
    }
    rows["all of it"] = sum(rows.values())
    rows[f"a checkpoint, spread over {STEPS_BETWEEN} steps"] = median["checkpoint"] / STEPS_BETWEEN
    size = sum(p.numel() for p in parameters)
    lines = [
        (
            f"A step of {BATCH} images of 28x28, {size:,} parameters: {1e3 * median['step']:.0f} ms; a checkpoint: "
            f"{1e3 * median['checkpoint']:.0f} ms, {median['checkpoint'] / median['step']:.2f} steps. torch "
            f"{version('torch')}, {platform.machine()}, {torch.get_num_threads()} threads; medians, lower is better."
        ),
        "",
        "| for safety | ms per step | of a step |",
        "|---|---|---|",
        *(f"| {name} | {1e3 * s:.3f} | {s / median['step']:.3%} |" for name, s in rows.items()),
    ]
    (Path(__file__).parent / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
