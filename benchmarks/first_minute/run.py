"""Measure where the time of a short run goes, from the command to the prompt.

    python -m benchmarks.first_minute.run --machine NAME [--before CHECKOUT]

Two runs are measured: the digits of `hf-ddpm train` without arguments, decoded anew, and a few steps on 28x28 images
in a folder. Each is a process of its own, in which functions of the package are wrapped, and the loading of modules.
All time counts to the innermost of them that is at work, so that the rows add up to the whole. Seconds of the
processor are those of all threads, and of processes that have ended. A checkout of the package of another day may take
turns with this one. Commands that only print are measured beside them.

Appends the times of each process to `rows.jsonl`, and writes `table.md`: medians over the turns.
"""

from __future__ import annotations

import argparse
import atexit
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from importlib.machinery import ExtensionFileLoader, SourceFileLoader
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT, FOLDER = Path(__file__).parents[2], Path(__file__).parent
START, REST, FIRST_STEP, STEPS = "starting Python", "all else", "first step, with compilation", "the other steps"
# A package -> the row that the loading of its modules counts to; a package that is not named counts to what loads it.
PACKAGES = {
    "torch._dynamo": "import torch._dynamo",
    "torch": "import torch",
    "transformers": "import transformers",
    "scipy": "import scipy",
    "diffusers": "import diffusers",
    "accelerate": "import accelerate, datasets, matplotlib",
    "datasets": "import accelerate, datasets, matplotlib",
    "matplotlib": "import accelerate, datasets, matplotlib",
    "hf_ddpm": "import hf_ddpm and all else",
}
# A module -> the row of each of its functions.
FUNCTIONS = {
    "hf_ddpm.data.sources": {"check_source": "reading the data, cache"},
    "hf_ddpm.data.images": {"load_images": "reading the data, cache"},
    "hf_ddpm.data.description": {"describe_images": "reading the data, cache"},
    "hf_ddpm.training.trial": {"try_run": "building network and optimizer"},
    "hf_ddpm.training.setup": {"build_run": "building network and optimizer"},
    "hf_ddpm.training.loop": {"run_loop": STEPS, "take_step": STEPS},
    "hf_ddpm.training.previews": {"save_preview": "previews", "validate": "validation"},
    "hf_ddpm.training.validation": {"open_validation": "validation"},
    "hf_ddpm.training.checkpoint": {"save_checkpoint": "checkpoints, models"},
    "hf_ddpm.training.saving": {
        "save_model": "checkpoints, models",
        "save_models": "checkpoints, models",
        "save_snapshot": "checkpoints, models",
        "save_guide": "checkpoints, models",
    },
    "hf_ddpm.training.report": {"write_report": "figures and report"},
    "hf_ddpm.hub.card": {"write_card": "card"},
}
END = "ending Python"
IMPORTS = "of it the rows of imports"
ROWS = [START, *dict.fromkeys(PACKAGES.values())]
ROWS += [*dict.fromkeys(row for rows in FUNCTIONS.values() for row in rows.values() if row != STEPS)]
ROWS[-5:-5] = [FIRST_STEP, STEPS]
ROWS += [REST, END]
HEAD = """# The first minute

Seconds from the command to the prompt by `python -m benchmarks.first_minute.run` ({machines}, torch {torch}, diffusers
{diffusers}), of the processor and on the wall; medians, fewer are better. Other programs kept the machine busy, more
in some processes than in others, so seconds on the wall say little. `before` is the package before commands loaded
torch and diffusers without garbage collection. A row holds what no other row holds: what scipy loads counts to scipy.
Neither run compiles or validates, by its settings.
"""
PRINTING = {
    "hf-ddpm --help": ["--help"],
    "hf-ddpm train --help": ["train", "--help"],
    "hf-ddpm train --stepz 3, an unknown flag": ["train", "--stepz", "3"],
    "hf-ddpm train --max_train_steps 0, a wrong value": ["train", "--max_train_steps", "0"],
}


class Clock:
    """The wall time and the processor time of each row, of which one is at work at any time."""

    def __init__(self) -> None:
        self.times: dict[str, list[float]] = {}
        self.row = START
        self.last = (float(os.environ["STARTED"]), 0.0)
        self.enter(REST)

    def enter(self, row: str) -> str:
        """Count the time until now to the row that was at work, and return it."""
        times, now = self.times.setdefault(self.row, [0.0, 0.0]), (time.time(), sum(os.times()[:4]))
        times[0] += now[0] - self.last[0]
        times[1] += now[1] - self.last[1]
        before, self.row, self.last = self.row, row, now
        return before

    @contextmanager
    def at_work(self, row: str) -> Iterator[None]:
        before = self.enter(row)
        try:
            yield
        finally:
            self.enter(before)

    def wrapped(self, function: Callable, row: str) -> Callable:
        """Return a function that counts to its row; the first training step has a row of its own."""

        @wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            is_first = function.__name__ == "take_step" and FIRST_STEP not in self.times
            with self.at_work(FIRST_STEP if is_first else row):
                return function(*arguments, **named)

        return call


def watch_loading(clock: Clock) -> None:
    """Count the loading of modules, and wrap the functions of each of the package's once it is loaded."""
    for loader in (SourceFileLoader, ExtensionFileLoader):
        loader.create_module = _watched(clock, loader.create_module, lambda spec: spec.name)
        loader.exec_module = _watched(clock, loader.exec_module, lambda module: module.__name__)


def _watched(clock: Clock, load: Callable, name_of: Callable[[Any], str]) -> Callable:
    def watched(loader: Any, subject: Any) -> Any:
        name = name_of(subject)
        with clock.at_work(_row_of(name, clock.row)):
            result = load(loader, subject)
        for function, row in FUNCTIONS.get(name, {}).items() if isinstance(subject, ModuleType) else ():
            setattr(subject, function, clock.wrapped(getattr(subject, function), row))
        return result

    return watched


def _row_of(module: str, loading: str) -> str:
    """Return the row of a module: that of what loads it, if its package has none of its own."""
    package = next((name for name in PACKAGES if f"{module}.".startswith(f"{name}.")), None)
    if package is None:
        return loading if loading.startswith("import") else PACKAGES["hf_ddpm"]
    # torch loads many of its modules for torch._dynamo alone.
    return loading if package == "torch" and loading == PACKAGES["torch._dynamo"] else PACKAGES[package]


def run_watched(path: str, words: list[str]) -> None:
    """Run `hf-ddpm` with `words`, and write the times of the rows into the file `path`."""
    clock = Clock()
    watch_loading(clock)

    @atexit.register
    def write() -> None:
        clock.enter(END)
        Path(path).write_text(json.dumps(clock.times))

    sys.argv = ["hf-ddpm", *words]
    from hf_ddpm.cli import app

    app(prog_name="hf-ddpm")


def measure(checkout: Path, words: list[str], folder: Path, is_watched: bool = True) -> dict[str, list[float]]:
    """Run `hf-ddpm` of a checkout in `folder`; return the wall and processor seconds of each row, and of all of it."""
    path = folder / "times.json"
    command = [sys.executable, str(FOLDER / "run.py"), "--watched", str(path)]
    command = [*command, *words] if is_watched else [sys.executable, "-m", "hf_ddpm", *words]
    before, started = os.times(), time.time()
    environment = {**os.environ, "PYTHONPATH": str(checkout), "STARTED": str(started)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    whole = [time.time() - started, sum(os.times()[2:4]) - sum(before[2:4])]
    if is_watched and done.returncode != 0:
        raise RuntimeError(done.stderr[-2000:])
    times = json.loads(path.read_text()) if is_watched else {}
    if is_watched:
        times[END] = [all_of_it - sum(row[i] for row in times.values()) for i, all_of_it in enumerate(whole)]
    return {**times, "whole": whole}


def write_images(folder: Path) -> None:
    """Write 256 images of 28x28 gray pixels, one blot each."""
    import numpy as np
    from PIL import Image

    rng, (y, x) = np.random.default_rng(0), np.mgrid[:28, :28]
    folder.mkdir()
    for number in range(256):
        center, radius = rng.uniform(8, 20, 2), rng.uniform(2, 6)
        pixels = 255 * np.exp(-((y - center[0]) ** 2 + (x - center[1]) ** 2) / (2 * radius**2))
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number:03d}.png")


def cases(folder: Path) -> dict[str, list[str]]:
    """Return what is measured: a name -> the words after `hf-ddpm`."""
    # The images that an earlier run decoded would be there already.
    out = ["--output_dir", str(folder / "run"), "--overwrite_output_dir", "--cache_dir", str(folder / "cache")]
    short = ["--max_train_steps", "10", "--train_batch_size", "16", "--lr_warmup_steps", "1"]
    short += ["--cpu_threads_per_process", "1"]
    return {
        "digits": ["train", *out],
        "a folder of images, 10 steps": ["train", "--train_data_dir", str(folder / "images"), *short, *out],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", required=True, help="What the processor is called in the table.")
    parser.add_argument("--before", type=Path, help="Another checkout, which takes turns with this one.")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--only", default="", help="Measure only the cases whose names begin so.")
    options = parser.parse_args()
    checkouts = {"now": ROOT} if options.before is None else {"before": options.before.resolve(), "now": ROOT}
    rows = []
    for turn in range(options.turns):
        for checkout, root in checkouts.items():
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                write_images(folder / "images")
                about = {"checkout": checkout, "turn": turn, "machine": options.machine}
                for case, words in {**cases(folder), **PRINTING}.items():
                    if case.startswith(options.only):
                        seconds = measure(root, words, folder, is_watched=case not in PRINTING)
                        rounded = {row: [round(value, 3) for value in times] for row, times in seconds.items()}
                        rows.append({"case": case, **about, "seconds": rounded})
    with (FOLDER / "rows.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    text = table([json.loads(line) for line in (FOLDER / "rows.jsonl").read_text().splitlines()])
    (FOLDER / "table.md").write_text(text)
    print(text)


def table(rows: list[dict[str, Any]]) -> str:
    """Return the tables of all that was measured: medians, of a checkout and a case each."""
    checkouts = [name for name in ("before", "now") if any(row["checkout"] == name for row in rows)]
    machines = ", ".join(sorted({row["machine"] for row in rows}))
    text = HEAD.format(machines=machines, torch=version("torch"), diffusers=version("diffusers"))
    for case in cases(Path()):
        of_case = [row["seconds"] for row in rows if row["case"] == case]
        for seconds in of_case:
            seconds[IMPORTS] = [sum(seconds[row][i] for row in {*PACKAGES.values()}) for i in (0, 1)]
        if of_case:
            turns = f"{len(of_case) // len(checkouts)} for each checkout"
            text += f"\n## `hf-ddpm train`: {case}\n\nProcesses: {turns}.\n\n" + _head_of_table(checkouts)
            names = [row for row in ROWS if any(row in seconds for seconds in of_case)]
            text += "".join(_line(rows, checkouts, case, row, row) for row in [*names, "whole", IMPORTS])
    printing = [case for case in PRINTING if any(row["case"] == case for row in rows)]
    if printing:
        text += "\n## Commands that only print\n\n" + _head_of_table(checkouts)
        text += "".join(_line(rows, checkouts, case, "whole", case) for case in printing)
    return text


def _head_of_table(checkouts: list[str]) -> str:
    columns = [f"{what}, {name}" for what in ("processor", "wall") for name in checkouts]
    return f"| | {' | '.join(columns)} |\n|---{'|---' * len(columns)}|\n"


def _line(rows: list[dict[str, Any]], checkouts: list[str], case: str, row: str, name: str) -> str:
    """Return a line of a table: the median seconds of a row, of the processor and on the wall."""
    cells = []
    for which in (1, 0):
        for checkout in checkouts:
            of_case = [one["seconds"] for one in rows if (one["case"], one["checkout"]) == (case, checkout)]
            values = [seconds[row][which] for seconds in of_case if row in seconds]
            cells.append(f"{statistics.median(values):.2f}" if values else "-")
    return f"| {name} | {' | '.join(cells)} |\n"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--watched"]:
        run_watched(sys.argv[2], sys.argv[3:])
    else:
        main()
