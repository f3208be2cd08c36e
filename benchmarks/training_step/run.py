"""Measure what the package costs: its training step against the same step as a bare PyTorch loop, in one run.

    python -m benchmarks.training_step.run [--threads N]

Both train a 32/64/64-channel UNet with `attention_head_dim=8` on the same 32x32 RGB images in batches of 64: noise,
forward and backward pass, clipping, AdamW, EMA. They take turns, a few steps each, in one process, so that a change of
the machine's speed meets both alike; the ratio of each pair of turns is kept. Writes `table.md`.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DModel
from PIL import Image

from hf_ddpm.network_config import sized_config
from hf_ddpm.training.averages import EMA
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.loop import train

BATCH, STEPS_PER_TURN, TURNS = 64, 4, 14


class BareLoop:
    """A training step as one writes it by hand."""

    def __init__(self, settings: dict, pixels: torch.Tensor):
        torch.manual_seed(0)
        self.unet: Any = UNet2DModel.from_config(settings)
        self.average = [p.detach().clone() for p in self.unet.parameters()]
        self.optimizer = torch.optim.AdamW(self.unet.parameters(), lr=1e-4)
        self.alpha_bar = DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod
        self.pixels = pixels

    def step(self) -> None:
        x_0 = self.pixels[torch.randint(len(self.pixels), (BATCH,))].float() / 127.5 - 1
        t, eps = torch.randint(1000, (BATCH,)), torch.randn_like(x_0)
        a, b = (c.sqrt().view(-1, 1, 1, 1) for c in (self.alpha_bar[t], 1 - self.alpha_bar[t]))
        v_hat = self.unet(a * x_0 + b * eps, t).sample
        loss = (v_hat - (a * eps - b * x_0)).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        torch._foreach_lerp_(self.average, [p.detach() for p in self.unet.parameters()], 0.001)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    torch.set_num_threads(parser.parse_args().threads)
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        (Path(folder) / "images").mkdir()
        pixels = rng.integers(0, 256, (256, 32, 32, 3), dtype=np.uint8)
        for i, image in enumerate(pixels):
            Image.fromarray(image).save(f"{folder}/images/{i:03d}.png")
        settings = {**sized_config((32, 32), 3, 3), "attention_head_dim": 8}
        Path(folder, "unet.json").write_text(json.dumps(settings))
        bare = BareLoop(settings, torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous())
        ours, theirs = measure(bare, folder)
    quotients = [a / b for a, b in zip(ours, theirs, strict=True)]
    text = (
        f"torch {version('torch')}, diffusers {version('diffusers')}, {platform.machine()}, "
        f"{torch.get_num_threads()} threads; {TURNS} turns of {STEPS_PER_TURN} steps each, medians; fewer ms are "
        "better. `against the bare loop` is the median of the ratios of each pair of turns (smallest to largest in "
        "brackets), not the ratio of the medians beside it.\n\n"
        "| loop | ms per step | against the bare loop |\n|---|---|---|\n"
        f"| bare PyTorch loop | {1e3 * statistics.median(theirs):.0f} | 1 |\n"
        f"| hf_ddpm | {1e3 * statistics.median(ours):.0f} | {statistics.median(quotients):.3f} "
        f"({min(quotients):.3f} to {max(quotients):.3f}) |\n"
    )
    (Path(__file__).parent / "table.md").write_text(text)
    print(text)


def measure(bare: BareLoop, folder: str) -> tuple[list[float], list[float]]:
    """Return the seconds per step of both, turn by turn, without the first turn."""
    ours: list[float] = []
    theirs: list[float] = []
    state = {"steps": 0, "since": time.perf_counter()}
    update = EMA.update

    def update_and_take_turns(self: EMA, *arguments) -> None:
        update(self, *arguments)
        state["steps"] += 1
        if state["steps"] % STEPS_PER_TURN == 0:
            ended = time.perf_counter()
            ours.append((ended - state["since"]) / STEPS_PER_TURN)
            for _ in range(STEPS_PER_TURN):
                bare.step()
            theirs.append((time.perf_counter() - ended) / STEPS_PER_TURN)
            state["since"] = time.perf_counter()

    EMA.update = update_and_take_turns
    steps = STEPS_PER_TURN * (TURNS + 1)
    train(
        TrainingConfig(
            train_data_dir=f"{folder}/images",
            cache_dir=f"{folder}/cache",
            model_config_name_or_path=f"{folder}/unet.json",
            output_dir=f"{folder}/run",
            train_batch_size=BATCH,
            max_train_steps=steps,
            checkpointing_steps=10 * steps,
            eval_batch_size=1,
            optimizer="adamw",
            ddpm_num_steps=1000,
            ddpm_num_inference_steps=1,
            cpu_threads_per_process=torch.get_num_threads(),
        )
    )
    EMA.update = update
    return ours[1:], theirs[1:]


if __name__ == "__main__":
    main()
