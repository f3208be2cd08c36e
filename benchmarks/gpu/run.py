"""Check and measure all that a GPU decides, in at most five minutes on one GPU, without a network.

    python -m benchmarks.gpu.run [--only PART ...] [--out FOLDER]
    python -m benchmarks.gpu.run --device cpu --small      # the same parts on tiny networks: does the script work?

The essentials come first. Each part is a process of its own with a time limit, and what it found until then is kept.
First those that compare bits, at once; then, one after the other, those that take the time. `PARTS` lists them.

Writes `table.md` and `rows.jsonl` in a folder with the name of the device beside this file; of a CPU in a temporary
one. The exit code is 1 if a part failed, or what must be equal differs.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

import psutil
import torch

from benchmarks.gpu import equality, memory, sampling, steps
from benchmarks.gpu.case import Case, Measured
from hf_ddpm.runtime.devices import device_name

ROOT = Path(__file__).parents[2]
TOTAL_SECONDS, CPU_SECONDS = 300, 1200
BAD = ("failed", "differs")


@dataclass(frozen=True)
class Part:
    """A part of the whole.

    Args:
        work: Yield what is measured.
        limit_seconds: How long it may take.
        is_timed: Whether it measures time, and so runs alone.
    """

    work: Callable[[Case], Iterator[Measured]]
    limit_seconds: int
    is_timed: bool = True


PARTS = {
    "tests": Part(equality.tests, 120, is_timed=False),
    "resume": Part(equality.resumes, 150, is_timed=False),
    "stock_images": Part(equality.stock_images, 60, is_timed=False),
    "recipe": Part(steps.recipe, 60),
    "default_network": Part(steps.default_network, 60),
    "diffusers_loop": Part(steps.diffusers_loop, 45),
    "memory": Part(memory.peaks, 60),
    "sampling": Part(sampling.eager, 45),
    "recipe_compiled": Part(steps.compiled_recipe, 120),
    "default_network_compiled": Part(steps.compiled_default_network, 120),
    "sampling_compiled": Part(sampling.compiled, 90),
}


@dataclass(frozen=True)
class Row:
    """A row of the table: the part, and what it measured."""

    part: str
    what: str
    value: float | str
    unit: str = ""
    note: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny networks and few steps")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), metavar="PART", default=list(PARTS))
    parser.add_argument("--out", type=Path, help="the folder of the table")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    case = Case(options.device, options.small)
    if options.child:
        for measured in PARTS[options.only[0]].work(case):
            print("measured", json.dumps(asdict(measured)), flush=True)
        return
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no GPU here: --device cpu --small shows that the script works")
    started = time.monotonic()
    rows = run_parts(options.only, case, started)
    text = table(rows, case, time.monotonic() - started)
    out = options.out or folder_of(case)
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.md").write_text(text)
    (out / "rows.jsonl").write_text("".join(f"{json.dumps(asdict(row))}\n" for row in rows))
    print(f"{text}\nwritten to {out}")
    sys.exit(any(row.value in BAD for row in rows))


def run_parts(names: Sequence[str], case: Case, started: float) -> list[Row]:
    """Run parts, those that are not timed at once, and return the rows of all."""
    at_once = [name for name in names if not PARTS[name].is_timed]
    in_turn = [name for name in names if PARTS[name].is_timed]
    with ThreadPoolExecutor(max(1, len(at_once)) if case.device == "cuda" else 1) as threads:
        found = list(threads.map(lambda name: run_part(name, case, started), at_once))
    found += [run_part(name, case, started) for name in in_turn]
    return [row for rows in found for row in rows]


def run_part(name: str, case: Case, started: float) -> list[Row]:
    """Run a part in a process of its own, and return what it measured until its end or its time limit."""
    began = time.monotonic()
    limit = min(PARTS[name].limit_seconds, TOTAL_SECONDS - (began - started))
    if case.device == "cpu":  # where no time says anything
        limit = CPU_SECONDS
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu.run", "--child", "--only", name]
    command += ["--device", case.device, *["--small"] * case.is_small]
    rows = []
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT)
        with ThreadPoolExecutor(1) as threads:
            is_late = threads.submit(_end_after, process, limit)
            for line in process.stdout:
                if line.startswith("measured "):
                    rows.append(Row(name, **json.loads(line.removeprefix("measured "))))
                    print(f"{name}: {rows[-1].what}: {_value(rows[-1])}", flush=True)
            code = process.wait()
        errors.seek(0)
        last = ([line.strip() for line in errors if line.strip()] or [f"exit code {code}"])[-1]
    if is_late.result():
        rows.append(Row(name, "the part", "failed", note=f"it took more than {limit:.0f} s"))
    elif code != 0:
        rows.append(Row(name, "the part", "failed", note=last[-300:]))
    print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
    return rows


def _end_after(process: subprocess.Popen, seconds: float) -> bool:
    """End a process and all that it started if it takes longer; return whether it did."""
    try:
        process.wait(max(0.0, seconds))
        return False
    except subprocess.TimeoutExpired:
        with suppress(psutil.NoSuchProcess):  # it has ended just now
            for each in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
                each.kill()
        return True


def table(rows: Sequence[Row], case: Case, seconds: float) -> str:
    """Return the table, under a paragraph that says what it is of."""
    cuda = f", CUDA {torch.version.cuda}" if case.device == "cuda" else ""
    text = (
        f"{date.today()}, {device_name(torch.device(case.device))}, torch {version('torch')}{cuda}, diffusers "
        f"{version('diffusers')}, Python {platform.python_version()}; {seconds:.0f} s{', small' * case.is_small}. "
        "Fewer ms and more images/s are better; a share of the peak is of the matrix product of its own type. "
        "Where a step goes is read from marks in the device's stream; host is the time of the process.\n\n"
        "| part | what | value | unit | note |\n|---|---|---|---|---|\n"
    )
    return text + "".join(f"| {row.part} | {row.what} | {_value(row)} | {row.unit} | {row.note} |\n" for row in rows)


def _value(row: Row) -> str:
    return f"{row.value:.4g}" if isinstance(row.value, float) else str(row.value)


def folder_of(case: Case) -> Path:
    """Return the folder of the table: beside this file for a GPU, a temporary one for a CPU."""
    if case.device == "cpu":
        return Path(tempfile.mkdtemp(prefix="gpu-"))
    return Path(__file__).with_name(re.sub(r"\W+", "-", device_name(torch.device("cuda"))).strip("-").lower())


if __name__ == "__main__":
    main()
