"""Find the best solver and spacing of the timesteps in 20 steps, beside fewer steps, 50, and 1000 ancestral ones.

    hf-ddpm train --output_dir runs/digits
    python -m benchmarks.solvers.run runs/digits --machine NAME

RUN is a run of the digits. Each row samples images of the same seeds, 5,000 or, of the chain, 1,000, and compares them
with all digits, in pixels, 64 values in [0, 1]. A spacing of power p is t_i = round((T - 1) (1 - i / n)^p); a searched
one is that of `hf-ddpm schedule`, from other seeds. Appends each row to `rows.jsonl` as soon as it is measured, unless
it is in the file already, and writes `table.md`.
"""

from __future__ import annotations

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_ddpm.data.config import DataConfig
from hf_ddpm.data.images import load_images
from hf_ddpm.evaluation.distances import Moments, frechet_distance, kernel_distance
from hf_ddpm.evaluation.search import search_timesteps, spaced_timesteps
from hf_ddpm.pipeline import DDPMPipeline
from hf_ddpm.runtime.files import weights_sha256
from hf_ddpm.runtime.run_files import read_run
from hf_ddpm.sampling.loading import load_for_sampling
from hf_ddpm.sampling.sampler import seeded_generators
from hf_ddpm.scheduler import complete_config
from hf_ddpm.solvers import named_scheduler

ROWS = Path(__file__).with_name("rows.jsonl")
NUM_IMAGES, NUM_ANCESTRAL, BATCH = 5000, 1000, 250
SDE = {"algorithm_type": "sde-dpmsolver++"}
# Solver, what differs from ours of that name, spacing (a power; "searched"; None: the solver's own), steps, images.
SETTINGS: list[tuple[str, dict[str, Any], float | str | None, int, int]] = [
    ("unipc", {}, None, 20, NUM_IMAGES),
    ("unipc", {"solver_order": 3}, None, 20, NUM_IMAGES),
    ("unipc", {}, "searched", 20, NUM_IMAGES),
    ("dpmsolver++", {}, None, 20, NUM_IMAGES),
    ("dpmsolver++", {"solver_order": 3}, None, 20, NUM_IMAGES),
    ("dpmsolver++", SDE, None, 20, NUM_IMAGES),
    ("dpmsolver++", {}, 0.6, 20, NUM_IMAGES),
    ("dpmsolver++", {}, 0.8, 20, NUM_IMAGES),
    ("dpmsolver++", {}, 1.25, 20, NUM_IMAGES),
    ("dpmsolver++", {}, 2.0, 20, NUM_IMAGES),
    ("dpmsolver++", {}, "searched", 20, NUM_IMAGES),
    ("ddim", {}, None, 20, NUM_IMAGES),
    ("unipc", {}, None, 8, NUM_IMAGES),
    ("unipc", {}, "searched", 8, NUM_IMAGES),
    ("dpmsolver++", {}, None, 8, NUM_IMAGES),
    ("dpmsolver++", {}, "searched", 8, NUM_IMAGES),
    ("ddim", {}, None, 8, NUM_IMAGES),
    ("unipc", {}, None, 5, NUM_IMAGES),
    ("unipc", {}, "searched", 5, NUM_IMAGES),
    ("dpmsolver++", {}, None, 5, NUM_IMAGES),
    ("dpmsolver++", {}, "searched", 5, NUM_IMAGES),
    ("ddim", {}, None, 5, NUM_IMAGES),
    ("unipc", {}, None, 50, NUM_IMAGES),
    ("dpmsolver++", {}, None, 50, NUM_IMAGES),
    ("ddim", {}, None, 50, NUM_IMAGES),
    ("unipc", {}, None, 20, NUM_ANCESTRAL),
    ("ddpm", {}, None, 1000, NUM_ANCESTRAL),
]


def main() -> None:
    """Sample by each setting, compare, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--machine", required=True, help="What the processor is called in the table.")
    options = parser.parse_args()
    weights = weights_sha256(Path(options.run))
    if any(row["weights_sha256"] != weights for row in read_rows()):
        raise SystemExit(f"{ROWS} has rows of another model than {options.run}: remove it to begin anew")
    digits = load_digits()
    pipeline, _ = load_for_sampling(options.run, "ddpm", uniform=True)
    own_scheduler, trained = pipeline.scheduler, read_run(Path(options.run))["training"]["steps"]
    measured = {tuple(row["cell"]) for row in read_rows()}
    for solver, changes, spacing, steps, count in SETTINGS:
        differs = ", ".join(f"{name} {value}" for name, value in changes.items())
        how = {None: "its own", "searched": "searched"}.get(spacing, f"power {spacing}")
        cell = (solver, differs, how, steps, count)
        if cell in measured:
            continue
        pipeline.scheduler = own_scheduler
        timesteps = None
        if spacing == "searched":
            (search,) = search_timesteps(pipeline, [steps], schedulers=[solver], seed=NUM_IMAGES)
            timesteps = [*search.timesteps]
        elif isinstance(spacing, float):
            timesteps = [*spaced_timesteps(own_scheduler.config.num_train_timesteps, steps, spacing)]
        named: Any = named_scheduler(solver, own_scheduler.config, steps)
        pipeline.scheduler = type(named).from_config({**complete_config(named.config), **changes})
        samples = sample(pipeline, count, steps, timesteps)
        kernel = kernel_distance(samples, digits)
        row = {
            "cell": cell,
            "weights_sha256": weights,
            "trained_steps": trained,
            "machine": options.machine,
            "date": time.strftime("%Y-%m-%d"),
            "fd": frechet_distance(Moments.of(samples), Moments.of(digits)),
            "kd": [kernel.distance, kernel.standard_error],
        }
        with ROWS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        write_table(read_rows())


def load_digits() -> Tensor:
    """Return all digits, (N, 64) in [0, 1]."""
    cache = load_images(DataConfig(dataset_name="digits"))
    return torch.stack([torch.tensor(cache.image(i)) for i in range(len(cache))]).flatten(1) / 255


def sample(pipeline: DDPMPipeline, count: int, steps: int, timesteps: list[int] | None) -> Tensor:
    """Sample images from the seeds 0, 1, ..., and return them as `load_digits` does, of eight bits."""
    given: dict[str, Any] = {"num_inference_steps": steps} if timesteps is None else {"timesteps": timesteps}
    parts = []
    for first in range(0, count, BATCH):
        generators = seeded_generators(range(first, first + BATCH), pipeline.device)
        (images,) = pipeline(BATCH, generators, output_type="pt", return_dict=False, **given)
        parts.append((images * 255).round().flatten(1) / 255)
    return torch.cat(parts)


def read_rows() -> list[dict[str, Any]]:
    return [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []


def write_table(rows: list[dict[str, Any]]) -> None:
    """Write table.md, by number of steps."""
    halves = load_digits()[torch.randperm(1797, generator=torch.Generator().manual_seed(1))].chunk(2)
    floor = frechet_distance(*(Moments.of(half) for half in halves))
    text = (
        f"{rows[-1]['date']}, {rows[-1]['machine']}, torch {version('torch')}, diffusers {version('diffusers')}. "
        f"Samples of the same seeds, of a model of the digits after {rows[0]['trained_steps']:,} steps, against all "
        "digits, in pixels. FD is the Fréchet distance, KD the kernel distance with its standard error; lower is "
        "better. Few images make FD larger, so compare it between rows of equally many; two halves of the digits, "
        f"about 900 images each, have {floor:.3f}.\n\n"
        "| steps | solver | differs by | spacing | images | FD | KD |\n|---|---|---|---|---|---|---|\n"
    )
    for row in sorted(rows, key=lambda row: (-row["cell"][4], row["cell"][3])):
        solver, differs, spacing, steps, count = row["cell"]
        kd, error = row["kd"]
        text += (
            f"| {steps} | {solver} | {differs} | {spacing} | {count:,} | {row['fd']:.3f} | {kd:.4f} ± {error:.4f} |\n"
        )
    Path(__file__).with_name("table.md").write_text(text)


if __name__ == "__main__":
    main()
