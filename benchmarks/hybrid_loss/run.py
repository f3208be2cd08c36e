"""Find which x_0_hat the bound of the hybrid loss should take: the clipped one, or the network's own.

    python -m benchmarks.hybrid_loss.run

A learned variance is trained by 0.001 T L_t (Nichol & Dhariwal 2021, Eq. 16). In L_t, hf_ddpm clips x_0_hat where the
model does so when it samples. The code of improved-diffusion trains with `clip_denoised=False` and samples with True.
Each row trains a small network on 1,500 of the digits, 8x8, for 400 steps of 48 images, with the same draws both ways,
and measures the bound of the model that clips on 160 others, on the same 60 timesteps and noises of each. Appends each
row to `rows.jsonl` as soon as it is measured, unless it is in the file already, and writes `table.md`.
"""

from __future__ import annotations

import argparse
import itertools
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel

from hf_ddpm.data.batches import to_x_0
from hf_ddpm.data.config import DataConfig
from hf_ddpm.data.images import load_images
from hf_ddpm.evaluation.likelihood import Likelihood, bits_per_dimension, sum_bound_terms
from hf_ddpm.objective import Objective
from hf_ddpm.scheduler import DDPMScheduler

FOLDER = Path(__file__).parent
NUM_TRAIN, NUM_TEST, NUM_TIMESTEPS = 1500, 160, 60
NUM_STEPS, BATCH_SIZE = 400, 48
PREDICTION_TYPES, SEEDS = ("epsilon", "v_prediction"), (0, 1)
MEAN_OF_WEIGHTS_FROM, MEAN_OF_WEIGHTS_RATE = 120, 0.03


def main() -> None:
    """Measure each row that is not there yet, and write the table."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    path = FOLDER / "rows.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {(row["prediction_type"], row["seed"], row["clips"]) for row in rows}
    cache = load_images(DataConfig(dataset_name="digits"))
    images = torch.stack([torch.tensor(cache.image(i)) for i in range(NUM_TRAIN + NUM_TEST)])
    for key in itertools.product(PREDICTION_TYPES, SEEDS, (True, False)):
        if key in done:
            continue
        likelihood = train_and_measure(images, *key)
        row = {
            **dict(zip(("prediction_type", "seed", "clips"), key, strict=True)),
            "bits_per_dimension": likelihood.bits_per_dimension,
            "standard_error": likelihood.standard_error,
            "torch": version("torch"),
            "diffusers": version("diffusers"),
        }
        rows.append(row)
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
    write_table(rows)


def train_and_measure(images: torch.Tensor, prediction_type: str, seed: int, clips: bool) -> Likelihood:
    """Train a network with the clipped or unclipped x_0_hat in the bound, and measure it as the model that clips."""
    settings: dict[str, Any] = {
        "prediction_type": prediction_type,
        "beta_schedule": "squaredcos_cap_v2",
        "variance_type": "learned_range",
        "timestep_spacing": "trailing",
    }
    torch.manual_seed(seed)
    unet: Any = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=2,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )
    objective = Objective(DDPMScheduler(**settings, clip_sample=clips), density="stratified")
    optimizer = torch.optim.AdamW(unet.parameters(), 1e-3)
    averaged: dict[str, torch.Tensor] = {}
    x_0 = to_x_0(images[:NUM_TRAIN], 255)
    for step in range(NUM_STEPS):
        loss = objective(unet, x_0[torch.randint(NUM_TRAIN, (BATCH_SIZE,))]).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        if step == MEAN_OF_WEIGHTS_FROM:
            averaged = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
        for name, tensor in averaged.items():
            tensor.lerp_(unet.state_dict()[name], MEAN_OF_WEIGHTS_RATE)
    unet.load_state_dict(averaged)
    sums = sum_bound_terms(
        unet.eval(),
        DDPMScheduler(**settings),
        images[NUM_TRAIN:],
        seed=0,
        batch_size=80,
        timesteps_per_image=NUM_TIMESTEPS,
    )
    return bits_per_dimension(sums)


def write_table(rows: list[dict[str, Any]]) -> None:
    """Write a row for each prediction type and seed."""
    found = {(row["prediction_type"], row["seed"], row["clips"]): row["bits_per_dimension"] for row in rows}
    error = max(row["standard_error"] for row in rows)
    versions = f"torch {rows[0]['torch']}, diffusers {rows[0]['diffusers']}"
    lines = [
        f"{versions}, one thread. Bits per dimension, lower is better.",
        f"The standard error of one number is {error:.3f}, that of a difference is less: both models of a row are",
        "measured on the same images, timesteps and noises.",
        "",
        "| prediction type | seed | x_0_hat clipped, as here | unclipped, as in improved-diffusion | difference |",
        "|---|---|---|---|---|",
    ]
    for prediction_type, seed in itertools.product(PREDICTION_TYPES, SEEDS):
        clipped, unclipped = (found[prediction_type, seed, clips] for clips in (True, False))
        lines.append(f"| {prediction_type} | {seed} | {clipped:.4f} | {unclipped:.4f} | {unclipped - clipped:+.4f} |")
    (FOLDER / "table.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
