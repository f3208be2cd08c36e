"""Measure what it costs and what it saves that OpenMP's idle threads sleep instead of spin.

    python -m benchmarks.waiting.run

Training of the digits in a process of two threads takes turns: by GNU OpenMP's own waiting, and by
OMP_WAIT_POLICY=PASSIVE, which the commands set. Each pair is run on an idle machine, and beside a program that keeps
both processors busy. Seconds per step are those of metrics.jsonl, without the first steps. Writes `table.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

STEPS, FIRST_STEPS = 30, 10
# What GNU OpenMP does unless it is told how to wait: it spins so often before a thread sleeps.
POLICIES = {"as by default": {"GOMP_SPINCOUNT": "300000"}, "passive": {"OMP_WAIT_POLICY": "PASSIVE"}}
HEAD = """# Idle threads that sleep

Seconds per training step of the digits, in a process of two threads on two processors, by `python -m
benchmarks.waiting.run` ({pairs} pairs; {machine}, torch {torch}). The busy program is one Python loop for each
processor.

| machine | spinning, as by default | sleeping (`PASSIVE`) | sleeping / spinning: median of pairs, range |
|---|---|---|---|
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3)
    options = parser.parse_args()
    table = HEAD.format(pairs=options.pairs, machine=platform.machine(), torch=version("torch"))
    for machine, num_busy in (("idle", 0), ("busy", 2)):
        busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(num_busy)]
        try:
            pairs = [{name: step_seconds(POLICIES[name]) for name in POLICIES} for _ in range(options.pairs)]
        finally:
            for process in busy:
                process.kill()
                process.wait()
        medians = [statistics.median(pair[name] for pair in pairs) for name in POLICIES]
        ratios = sorted(pair["passive"] / pair["as by default"] for pair in pairs)
        table += f"| {machine} | {medians[0]:.3f} | {medians[1]:.3f} | {statistics.median(ratios):.2f} "
        table += f"({ratios[0]:.2f} to {ratios[-1]:.2f}) |\n"
    Path(__file__).with_name("table.md").write_text(table)
    print(table)


def step_seconds(policy: dict[str, str]) -> float:
    """Train, and return the seconds per step after the first ones."""
    environment = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS",)}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "hf_ddpm", "train", "--output_dir", folder, "--max_train_steps", str(STEPS)]
        command += ["--logging_steps", "1", "--cpu_threads_per_process", "2", "--no_save_figures"]
        command += ["--eval_batch_size", "1", "--lr_warmup_steps", "1"]
        subprocess.run(command, check=True, capture_output=True, env={**environment, **policy})
        lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    return (lines[-1]["seconds"] - lines[FIRST_STEPS - 1]["seconds"]) / (STEPS - FIRST_STEPS)


if __name__ == "__main__":
    main()
