"""Which solver and spacing of the timesteps samples a trained model best in 20 steps, beside 1000 ancestral ones.

    python benchmarks/solvers.py MODEL DATA

MODEL is a run of `--recipe fashion-mnist`, DATA a folder or Hub id of Fashion-MNIST. Each row is of images of the same
seeds, against the test images, by efficientnet-lite0; the Fréchet distance of so few is mostly bias, so rows are to be
compared with each other. A spacing of power p is t_i = round((T - 1) (1 - i / n)^p). Bfloat16, compiled. Writes
`solvers.md` beside it, a row as soon as it is measured.
"""

from __future__ import annotations

import argparse
from importlib.metadata import version
from pathlib import Path

import torch
from diffusers import DPMSolverMultistepScheduler
from recipe import load_data

from hf_ddpm.evaluation.distances import Moments, frechet_distance, kernel_distance
from hf_ddpm.evaluation.features import load_network
from hf_ddpm.pipeline import DDPMPipeline
from hf_ddpm.sampling import FORWARD_BATCH, load_for_sampling, named_scheduler, seeded_generators
from hf_ddpm.search import spaced_timesteps

STEPS, NUM_IMAGES, NUM_ANCESTRAL = 20, 512, 256
# Solver, order, power of the spacing; None: the solver's own.
CELLS = [
    ("dpmsolver++", 2, None),
    ("dpmsolver++", 2, 0.6),
    ("dpmsolver++", 2, 0.8),
    ("dpmsolver++", 2, 1.25),
    ("dpmsolver++", 2, 2.0),
    ("dpmsolver++", 3, None),
    ("dpmsolver++", 3, 0.8),
    ("ddim", 1, None),
    ("unipc", 2, None),
    ("ddpm", 1, None),
]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("data")
    options = parser.parse_args()
    _, moments, features = load_data(options.data)
    network = load_network("efficientnet-lite0", None, "cpu")
    pipeline, _ = load_for_sampling(options.model, "ddpm", dtype="bf16", compile=True)
    config = pipeline.scheduler.config
    text = (
        f"torch {version('torch')}, diffusers {version('diffusers')}; images of the same seeds against the test "
        "images of Fashion-MNIST, efficientnet-lite0; bfloat16, compiled.\n\n"
        f"| solver | order | spacing | steps | FD of {NUM_ANCESTRAL} | KD of {NUM_ANCESTRAL} | FD of {NUM_IMAGES} | "
        f"KD of {NUM_IMAGES} |\n|---|---|---|---|---|---|---|---|\n"
    )
    for solver, order, power in CELLS:
        steps = 1000 if solver == "ddpm" else STEPS
        pipeline.scheduler = named_scheduler(solver, config, steps)
        if order == 3:
            changed = {**pipeline.scheduler.config, "solver_order": 3}
            pipeline.scheduler = DPMSolverMultistepScheduler.from_config(changed)
        timesteps = None if power is None else [*spaced_timesteps(config["num_train_timesteps"], steps, power)]
        images = sample(pipeline, NUM_ANCESTRAL if solver == "ddpm" else NUM_IMAGES, steps, timesteps)
        own = torch.cat([network(part) for part in images.split(64)])
        spacing = "its own" if power is None else f"power {power:g}"
        text += f"| {solver} | {order} | {spacing} | {steps} | "
        for count in (NUM_ANCESTRAL, NUM_IMAGES):
            part = own[:count]
            fd, kd = frechet_distance(Moments.of(part), moments), kernel_distance(part, features).distance
            text += f"{fd:.1f} | {kd:.3f} | " if len(part) == count else " | | "
        text = text.rstrip(" ") + "\n"
        Path(__file__).with_suffix(".md").write_text(text)
    print(text)


def sample(pipeline: DDPMPipeline, count: int, steps: int, timesteps: list[int] | None) -> torch.Tensor:
    """uint8."""
    parts = []
    for first in range(0, count, FORWARD_BATCH):
        generators = seeded_generators(range(first, first + FORWARD_BATCH), pipeline.device)
        given = {"num_inference_steps": steps} if timesteps is None else {"timesteps": timesteps}
        (images,) = pipeline(FORWARD_BATCH, generators, output_type="pt", return_dict=False, **given)
        parts.append((images * 255).round().to(torch.uint8))
    return torch.cat(parts)


if __name__ == "__main__":
    main()
