"""Measure the time in which a command learns Fashion-MNIST to a fixed distance, for a table of records.

    python -m benchmarks.records.run DATA 2026-11-30-recipe [NEW ...] --machine NAME [--num_seeds 3]
    python -m benchmarks.records.run --table

DATA is a folder or a Hub id of Fashion-MNIST. Each name is a folder beside this script with a `settings.yaml`, the
standing record first. They take turns, seed by seed, so that all meet the same machine. An attempt is `hf-ddpm train
--config settings.yaml` in a process of its own, with an empty cache, timed from its start to its end. `hf-ddpm
evaluate` then measures 5,000 samples. Appends a row to `rows.jsonl` for each attempt, keeps its `metrics.jsonl` in the
folder of its name, and writes `table.md`. README.md has the rules.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from scipy.stats import ttest_ind

FOLDER = Path(__file__).parent
ROWS = FOLDER / "rows.jsonl"
MOST_ROWS, MIN_SEEDS, P = 10, 3, 0.01
EVALUATION = ["--metrics", "fd", "--network", "efficientnet-lite0", "--num_images", "5000", "--scheduler", "unipc"]
EVALUATION += ["--num_inference_steps", "20", "--uniform", "--dtype", "bf16", "--compile", "--json"]
HEAD = """# Records

Seconds from the command to its end, and the Fréchet distance of 5,000 samples to the training images of Fashion-MNIST
(20 steps of UniPC, features of efficientnet-lite0), by `python -m benchmarks.records.run`; mean and standard deviation
over seeds. The distance to reach is {target:.1f}, the mean of the first record. p is that of Welch's test that the new
time is not less than that of the record before it, both measured in turns, in one run.

| record | date | machine | seeds | seconds | FD | the record before it, in the same run | p | stands |
|---|---|---|---|---|---|---|---|---|
"""


def main() -> None:
    """Make the attempts in turns, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?")
    parser.add_argument("names", nargs="*", help="Folders beside this script, the standing record first.")
    parser.add_argument("--num_seeds", type=int, default=MIN_SEEDS)
    parser.add_argument("--machine", help="What the processor is called in the table.")
    parser.add_argument("--table", action="store_true", help="Only write the table again.")
    arguments = parser.parse_args()
    if not arguments.table:
        if not arguments.names or arguments.machine is None:
            parser.error("DATA, at least one folder and --machine are needed, or --table alone")
        for name in arguments.names:
            if not (FOLDER / name / "settings.yaml").is_file():
                parser.error(f"benchmarks/records/{name} must hold settings.yaml: write it, as the rules say")
        run = time.strftime("%Y-%m-%d %H:%M")
        for seed in range(arguments.num_seeds):
            for name in arguments.names:
                row = {"run": run, "standing": arguments.names[0], "machine": arguments.machine}
                row |= attempt(arguments.data, name, seed)
                with ROWS.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(f"{name}, seed {seed}: {row['seconds']:.0f} s, FD {row['fd']:.1f}", flush=True)
    write_table()


def attempt(data: str, name: str, seed: int) -> dict[str, Any]:
    """Train and measure once, and return the figures."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, "-m", "hf_ddpm", "train", "--config", str(FOLDER / name / "settings.yaml")]
        command += ["--dataset_name", data, "--seed", str(seed), "--output_dir", str(out)]
        command += ["--cache_dir", str(Path(folder) / "cache")]
        started = time.monotonic()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds = time.monotonic() - started
        # The reference is measured once, into the cache of the user, and costs no attempt anything.
        command = [sys.executable, "-m", "hf_ddpm", "evaluate", str(out), "--dataset_name", data, *EVALUATION]
        printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        results = {row["metric"]: row["value"] for row in json.loads(printed)["results"]}
        training = json.loads((out / "run.json").read_text())["training"]
        shutil.copyfile(out / "metrics.jsonl", FOLDER / name / f"metrics-{seed}.jsonl")
    return {
        "name": name,
        "seed": seed,
        "seconds": round(seconds, 1),
        "loop_seconds": round(training["seconds"], 1),
        "steps": training["steps"],
        "images": training["images"],
        "device": training["device"],
        "fd": results["fd"],
        "versions": {package: version(package) for package in ("hf_ddpm", "torch", "diffusers")},
    }


def write_table() -> None:
    """Write a row for each name and run, the newest runs last, at most `MOST_ROWS` of them."""
    rows = [json.loads(line) for line in ROWS.read_text().splitlines()]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["run"], row["name"]), []).append(row)
    target = statistics.mean(row["fd"] for row in next(iter(groups.values())))
    lines = []
    for (run, name), attempts in groups.items():
        standing = attempts[0]["standing"]
        if name == standing and lines:
            continue  # a record that was rerun beside another one stands in the row of that one
        before = groups[run, standing] if name != standing else None
        lines.append(describe(name, attempts, before, target))
    (FOLDER / "table.md").write_text(HEAD.format(target=target) + "".join(lines[-MOST_ROWS:]))


def describe(name: str, attempts: list[dict[str, Any]], before: list[dict[str, Any]] | None, target: float) -> str:
    """Return the line of the attempts of one record, judged by the rules."""
    seconds, distances = ([row[key] for row in attempts] for key in ("seconds", "fd"))
    failures = [] if len(attempts) >= MIN_SEEDS else [f"{len(attempts)} of {MIN_SEEDS} seeds"]
    if statistics.mean(distances) > target:
        failures.append("too far")
    beside, p_value = "", ""
    if before is not None:
        times = [row["seconds"] for row in before]
        p = float(ttest_ind(seconds, times, equal_var=False, alternative="less").pvalue)
        beside, p_value = f"{spread(times, 0)} s, FD {spread([row['fd'] for row in before], 1)}", f"{p:.2g}"
        if p >= P:
            failures.append("not faster")
    changed = (FOLDER / name / "settings.yaml").read_text().splitlines()[0].removeprefix("# ")
    return (
        f"| [{name}]({name}/settings.yaml): {changed} | {attempts[0]['run'][:10]} | {attempts[0]['machine']} | "
        f"{len(attempts)} | {spread(seconds, 0)} | {spread(distances, 1)} | {beside} | {p_value} | "
        f"{'no: ' + ', '.join(failures) if failures else 'yes'} |\n"
    )


def spread(values: list[float], digits: int) -> str:
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


if __name__ == "__main__":
    main()
