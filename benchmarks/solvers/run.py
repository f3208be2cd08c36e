"""Find the best solver and spacing of the timesteps in 20 steps, beside 50 steps and 1000 ancestral ones.

    python -m benchmarks.solvers.run MODEL DATA

MODEL is a run of `--recipe fashion-mnist`, DATA a folder or Hub id of Fashion-MNIST. Each row samples images of the
same seeds and compares them with the test images, by efficientnet-lite0. The Fréchet distance of so few images is
mostly bias, so compare rows with each other only. A spacing of power p is t_i = round((T - 1) (1 - i / n)^p); a
searched one is that of `hf-ddpm schedule`, from other seeds. Bfloat16, compiled. Appends each row to `rows.jsonl` as
soon as it is measured, unless it is in the file already, and writes `table.md`.
"""

from __future__ import annotations

import argparse
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.recipe.run import load_data
from hf_ddpm.evaluation.distances import Moments, frechet_distance, kernel_distance
from hf_ddpm.evaluation.features import load_network
from hf_ddpm.evaluation.search import search_timesteps, spaced_timesteps
from hf_ddpm.pipeline import DDPMPipeline
from hf_ddpm.runtime.files import weights_sha256
from hf_ddpm.runtime.run_files import read_run
from hf_ddpm.sampling.sampler import FORWARD_BATCH, load_for_sampling, seeded_generators
from hf_ddpm.scheduler import complete_config
from hf_ddpm.solvers import named_scheduler

ROWS = Path(__file__).with_name("rows.jsonl")
NUM_IMAGES, NUM_ANCESTRAL = 512, 256
SDE = {"algorithm_type": "sde-dpmsolver++"}
# Solver, what differs from ours of that name, spacing (a power; "searched"; None: the solver's own), steps.
SETTINGS: list[tuple[str, dict[str, Any], float | str | None, int]] = [
    ("unipc", {}, None, 20),
    ("dpmsolver++", {}, None, 20),
    ("ddpm", {}, None, 1000),
    ("dpmsolver++", SDE, None, 20),
    ("unipc", {"solver_order": 3}, None, 20),
    ("unipc", {}, None, 50),
    ("dpmsolver++", {"solver_order": 3}, None, 20),
    ("ddim", {}, None, 20),
    ("dpmsolver++", {}, 0.6, 20),
    ("dpmsolver++", {}, 0.8, 20),
    ("dpmsolver++", {}, 1.25, 20),
    ("dpmsolver++", {}, 2.0, 20),
    ("dpmsolver++", {}, "searched", 20),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data")
    options = parser.parse_args()
    weights = weights_sha256(Path(options.model))
    if any(row["weights_sha256"] != weights for row in read_rows()):
        raise SystemExit(f"{ROWS} has rows of another model than {options.model}: remove it to begin anew")
    _, moments, features = load_data(options.data)
    network = load_network("efficientnet-lite0", None, "cpu")
    pipeline, _ = load_for_sampling(options.model, "ddpm", dtype="bf16", compile=True, uniform=True)
    own_scheduler, trained = pipeline.scheduler, read_run(Path(options.model))["training"]["steps"]
    measured = {tuple(row["cell"]) for row in read_rows()}
    for solver, changes, spacing, steps in SETTINGS:
        differs = ", ".join(f"{name} {value}" for name, value in changes.items())
        how = {None: "its own", "searched": "searched"}.get(spacing, f"power {spacing}")
        cell = (solver, differs, how, steps)
        if cell in measured:
            continue
        pipeline.scheduler = own_scheduler
        timesteps = None
        if spacing == "searched":
            (search,) = search_timesteps(pipeline, [steps], schedulers=["dpmsolver++"], seed=NUM_IMAGES)
            timesteps = [*search.timesteps]
        elif isinstance(spacing, float):
            timesteps = [*spaced_timesteps(own_scheduler.config.num_train_timesteps, steps, spacing)]
        named: Any = named_scheduler(solver, own_scheduler.config, steps)
        pipeline.scheduler = type(named).from_config({**complete_config(named.config), **changes})
        images = sample(pipeline, NUM_ANCESTRAL if solver == "ddpm" else NUM_IMAGES, steps, timesteps)
        own = torch.cat([network(part) for part in images.split(64)])
        parts = [own[:count] for count in (NUM_ANCESTRAL, NUM_IMAGES) if count <= len(own)]
        row = {
            "cell": cell,
            "weights_sha256": weights,
            "trained_steps": trained,
            "fd": [frechet_distance(Moments.of(part), moments) for part in parts],
            "kid": [kernel_distance(part, features).distance for part in parts],
        }
        with ROWS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        write_table()


def read_rows() -> list[dict[str, Any]]:
    return [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []


def write_table() -> None:
    """Write table.md from rows.jsonl."""
    rows = read_rows()
    text = (
        f"torch {version('torch')}, diffusers {version('diffusers')}; a model of {rows[0]['trained_steps']:,} steps; "
        "images of the same seeds against test images of Fashion-MNIST, efficientnet-lite0; bfloat16, compiled. "
        "FD and KD: lower is better; of so few images most of FD is bias, so compare rows with each other only.\n\n"
        f"| solver | differs by | spacing | steps | FD of {NUM_ANCESTRAL} | KD of {NUM_ANCESTRAL} | "
        f"FD of {NUM_IMAGES} | KD of {NUM_IMAGES} |\n|---|---|---|---|---|---|---|---|\n"
    )
    for row in rows:
        text += f"| {' | '.join(map(str, row['cell']))} |"
        for fd, kid in zip(row["fd"], row["kid"], strict=True):
            text += f" {fd:.1f} | {kid:.3f} |"
        text += " | |" * (2 - len(row["fd"])) + "\n"
    Path(__file__).with_name("table.md").write_text(text)


def sample(pipeline: DDPMPipeline, count: int, steps: int, timesteps: list[int] | None) -> torch.Tensor:
    """Sample images from the seeds 0, 1, ... (count, C, H, W) uint8."""
    parts = []
    for first in range(0, count, FORWARD_BATCH):
        generators = seeded_generators(range(first, first + FORWARD_BATCH), pipeline.device)
        given = {"num_inference_steps": steps} if timesteps is None else {"timesteps": timesteps}
        (images,) = pipeline(FORWARD_BATCH, generators, output_type="pt", return_dict=False, **given)
        parts.append((images * 255).round().to(torch.uint8))
    return torch.cat(parts)


if __name__ == "__main__":
    main()
