"""Measure time to quality: what a number of minutes of training gives, with the command that a user types.

    python -m benchmarks.quality.run --minutes 15 [--seed 0] DATA NAME [-- FLAGS OF train_accelerate.py]

DATA is a folder or Hub id of Fashion-MNIST. A dry run says how long a step takes and so how many fit into the minutes,
compilation included. `train_accelerate.py --recipe fashion-mnist` takes them, and `hf-ddpm evaluate` compares 5,000
samples of 20 steps with the training images, by efficientnet-lite0. Appends a row to `rows.jsonl` and writes
`table.md`; the run stays in `quality-runs/`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
ROWS = Path(__file__).with_name("rows.jsonl")
RUNS = Path("quality-runs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("name")
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("flags", nargs="*")
    options = parser.parse_args()
    with ROWS.open("a") as file:
        file.write(json.dumps(measure(options)) + "\n")
    write_table()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Train for the minutes, evaluate, and return the row."""
    folder = RUNS / f"{options.name}-{options.minutes:g}-{options.seed}".replace(" ", "-")
    command = [sys.executable, str(ROOT / "train_accelerate.py"), "--recipe", "fashion-mnist"]
    command += ["--dataset_name", options.data, "--output_dir", str(folder), "--seed", str(options.seed)]
    command += ["--mixed_precision", "bf16", "--compile", *options.flags]
    output = subprocess.run([*command, "--dry_run"], check=True, capture_output=True, text=True).stdout
    step, first = (float(n) for n in re.search(r"([\d.e+-]+) s per step.*the first in ([\d.e+-]+) s", output).groups())
    steps = int((60 * options.minutes - first) / step)
    started = time.monotonic()
    # No checkpoint on the way: they refresh previews, which are no part of training.
    subprocess.run([*command, "--max_train_steps", str(steps), "--checkpointing_steps", str(steps)], check=True)
    wall = time.monotonic() - started
    # Kilobytes, on Linux, of the largest process so far: training, before anything is measured.
    peak = 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    evaluate = ["-m", "hf_ddpm", "evaluate", str(folder), "--metrics", "fd,kid"]
    evaluate += ["--network", "efficientnet-lite0", "--dtype", "bf16", "--compile"]
    # Whatever the default is, so that rows can be compared.
    evaluate += ["--scheduler", "dpmsolver++", "--num_inference_steps", "20", "--uniform"]
    subprocess.run([sys.executable, *evaluate], check=True)
    training = json.loads((folder / "run.json").read_text())["training"]
    results = json.loads((folder / "evaluation.json").read_text())["results"]
    return {
        "name": options.name,
        "minutes": options.minutes,
        "seed": options.seed,
        "flags": options.flags,
        "steps": training["steps"],
        "images_per_second": training["images"] / training["seconds"],
        "seconds": training["seconds"],
        "wall_seconds": wall,
        "peak_bytes": peak,
        "device": training["device"],
        "cores": os.cpu_count(),
        "results": {row["metric"]: {"value": row["value"], "floor": row["real_vs_real"]["value"]} for row in results},
    }


def write_table() -> None:
    """Write table.md from rows.jsonl."""
    rows = [json.loads(line) for line in ROWS.read_text().splitlines()]
    text = (
        "Fashion-MNIST, 28x28; distances of 5,000 samples, 20 steps of DPM-Solver++, to the training images "
        f"(efficientnet-lite0); test images: FD {rows[0]['results']['fd']['floor']:.1f}. {rows[-1]['device']}. "
        "The minutes are those of the loop, compilation included. Rows of `--stable_target_images 0` were run without "
        "that flag, before the recipe had another value. FD and KD: lower is better.\n\n"
        "| settings | seed | flags | minutes | steps | images/s | peak memory, GB | FD | KD |\n"
        "|---|---|---|---|---|---|---|---|---|\n"
    )
    for row in rows:
        flags = f"`{' '.join(row['flags'])}`" if row["flags"] else ""
        text += (
            f"| {row['name']} | {row['seed']} | {flags} | {row['seconds'] / 60:.1f} | {row['steps']:,} | "
            f"{row['images_per_second']:.0f} | {row['peak_bytes'] / 1e9:.1f} | {row['results']['fd']['value']:.1f} | "
            f"{row['results']['kid']['value']:.3f} |\n"
        )
    Path(__file__).with_name("table.md").write_text(text)


if __name__ == "__main__":
    main()
