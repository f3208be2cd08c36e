"""Measure what a busy machine costs a step, by how idle threads wait, by precision, and by the number of threads.

    python -m benchmarks.waiting.run

Training of the digits takes turns, in a process of its own: its idle threads spin, as by GNU OpenMP's default; they
sleep at once, by OMP_WAIT_POLICY=PASSIVE; they sleep soon, as the commands of the package set it; in float32 and in
bf16; and with one thread fewer than there are processors. Each is run on an idle machine, and beside one Python loop.
Seconds per step are those of metrics.jsonl, without the first steps. Writes `table.md`.
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
from typing import NamedTuple

from hf_ddpm.runtime.launch import WAIT_VARIABLES

STEPS, FIRST_STEPS = 30, 10


class Setting(NamedTuple):
    """How a process trains."""

    precision: str
    threads: int
    waiting: str


SOON = "sleep soon"
# Without a policy the commands choose. 300,000 is what GNU OpenMP chooses.
POLICIES = {"spin": {"GOMP_SPINCOUNT": "300000"}, "sleep at once": {"OMP_WAIT_POLICY": "PASSIVE"}, SOON: {}}
HEAD = """# Beside other work

Seconds per training step of the digits on a machine of {processors} processors, by `python -m benchmarks.waiting.run`
({turns}{machine}, torch {torch}). The busy machine runs one Python loop beside the training.

| precision | threads | idle threads | seconds on an idle machine | seconds on a busy one | busy / idle |
|---|---|---|---|---|---|
"""


def main() -> None:
    """Measure all settings in turns, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    processors = len(os.sched_getaffinity(0))
    kinds = [*((processors, each) for each in POLICIES), (max(1, processors - 1), SOON)]
    settings = [Setting(precision, *kind) for precision in ("no", "bf16") for kind in kinds]
    seconds: dict[tuple[Setting, bool], list[float]] = {}
    for _ in range(options.turns):
        for is_busy in (False, True):
            loop = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if is_busy else None
            try:
                for setting in settings:
                    seconds.setdefault((setting, is_busy), []).append(step_seconds(setting))
                    print(setting, "busy" if is_busy else "idle", seconds[setting, is_busy][-1], flush=True)
            finally:
                if loop is not None:
                    loop.kill()
                    loop.wait()
    turns = "" if options.turns == 1 else f"median of {options.turns} turns; "
    table = HEAD.format(processors=processors, turns=turns, machine=platform.machine(), torch=version("torch"))
    for setting in settings:
        idle, busy = (statistics.median(seconds[setting, is_busy]) for is_busy in (False, True))
        precision = "fp32" if setting.precision == "no" else setting.precision
        table += f"| {precision} | {setting.threads} | {setting.waiting} | {idle:.3f} | {busy:.3f} | "
        table += f"{busy / idle:.2f} |\n"
    Path(__file__).with_name("table.md").write_text(table)
    print(table)


def step_seconds(setting: Setting) -> float:
    """Train, and return the seconds per step after the first ones."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", *WAIT_VARIABLES)
    }
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "hf_ddpm", "train", "--output_dir", folder, "--max_train_steps", str(STEPS)]
        command += ["--logging_steps", "1", "--cpu_threads_per_process", str(setting.threads), "--no_save_figures"]
        command += ["--eval_batch_size", "1", "--lr_warmup_steps", "1", "--mixed_precision", setting.precision]
        policy = POLICIES[setting.waiting]
        subprocess.run(command, check=True, capture_output=True, env={**environment, **policy})
        lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    return (lines[-1]["seconds"] - lines[FIRST_STEPS - 1]["seconds"]) / (STEPS - FIRST_STEPS)


if __name__ == "__main__":
    main()
