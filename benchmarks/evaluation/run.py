"""Measure a model: quality by steps and solver, bits per dimension, nearness of samples to training images.

    accelerate launch --mixed_precision bf16 train_accelerate.py --recipe fashion-mnist --compile \
        --output_dir runs/fashion
    python -m benchmarks.evaluation.run runs/fashion

Writes `table.md`, `steps.png` and `memorization.png` from what `hf-ddpm evaluate` wrote into the folder of the run.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hf_ddpm.evaluation.evaluate import evaluate
from hf_ddpm.evaluation.search import search_and_keep
from hf_ddpm.hub.card import result_cells
from hf_ddpm.runtime.run_files import read_run
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.parsing import load_config

NUM_IMAGES, GRID = 5000, {"dpmsolver++": (5, 8, 20), "unipc": (20,)}
SEARCHED = (5, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--dataset_name", help="default: the run's")
    options = parser.parse_args()
    data = load_config(str(options.run / "config.yaml"))
    if options.dataset_name is not None:
        data = replace(data, dataset_name=options.dataset_name)
    for i, (solver, steps) in enumerate(GRID.items()):
        measure(options.run, data, solver, steps, ["memorization"] if i == 0 else [], uniform=True)
    for _ in search_and_keep(str(options.run), SEARCHED, schedulers=["dpmsolver++"], dtype="bf16", compile=True):
        pass
    measure(options.run, data, "dpmsolver++", SEARCHED)
    evaluate(options.run, metrics=["nll"], data=data, num_images=1000, timesteps_per_image=10)
    write(options.run, Path(__file__).parent)


def measure(
    run: Path, data: TrainingConfig, solver: str, steps: Sequence[int], more: Sequence[str] = (), uniform: bool = False
) -> None:
    evaluate(
        run,
        metrics=["fd", "kid", "precision", *more],
        data=data,
        network="efficientnet-lite0",
        num_images=NUM_IMAGES,
        num_inference_steps=steps,
        schedulers=[solver],
        dtype="bf16",
        compile=True,
        uniform=uniform,
    )


def write(run: Path, folder: Path) -> None:
    """Write the results of `run`: a row for each solver and number of steps, and what does not depend on them."""
    rows = json.loads((run / "evaluation.json").read_text("utf-8"))["results"]
    training, by_metric = read_run(run)["training"], {row["metric"]: row for row in rows}
    cells = {}
    for row in rows:
        if "sampling" in row and not row["metric"].startswith("memorization"):
            settings = row["sampling"]
            spacing = ", searched" if settings.get("timesteps") else ""
            cell = (settings["scheduler"] + spacing, settings["num_inference_steps"])
            cells.setdefault(cell, {})[row["metric"]] = row
    fd = by_metric["fd"]
    text = (
        f"{training['steps']:,} steps, {training['images']:,} images, {training['seconds'] / 60:.1f} minutes on "
        f"{training['device']}.\n"
        f"{fd['num_compared'][0]:,} samples from the seeds {fd['sampling']['seed']} on against "
        f"{fd['reference']['count']:,} images of {fd['reference']['split']}; {fd['network']['network']}.\n"
        "FD and KD: lower is better; precision, recall, density and coverage: higher is better.\n\n"
        "| images | solver steps | " + " | ".join(row["name"] for row in cells[next(iter(cells))].values()) + " |\n"
        "|---|---|" + "---|" * len(cells[next(iter(cells))]) + "\n"
        "| real images of test | | "
        + " | ".join(f"{row['real_vs_real']['value']:.4g}" for row in cells[next(iter(cells))].values())
        + " |\n"
    )
    for (solver, steps), measured in cells.items():
        values = [result_cells(row)["Value"] for row in measured.values()]
        text += f"| {solver} | {steps} | " + " | ".join(values) + " |\n"
    for row in rows:
        if "sampling" not in row or row["metric"].startswith("memorization"):
            of = row.get("held_out") or row["reference"]
            text += (
                f"\n- {row['name']}: {result_cells(row)['Value']}, {row['num_compared'][0]:,} images ({of['split']})"
            )
            text += f"; {row['remark']}" if row.get("remark") else ""
    commands = dict.fromkeys(row["command"] for row in rows)
    text += "\n\n```\n" + "\n".join(commands) + "\n```\n"
    (folder / "table.md").write_text(text)
    for name in ("steps.png", "memorization.png"):
        shutil.copy(run / "figures" / name, folder / name)
    print(text)


if __name__ == "__main__":
    main()
