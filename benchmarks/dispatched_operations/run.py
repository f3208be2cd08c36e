"""Count the operations that a training step dispatches, part by part, and the seconds that the host takes for them.

    python -m benchmarks.dispatched_operations.run --machine NAME [--state NAME]

A GPU that is done before the host has started its next kernel waits for the host, whose time goes with the number of
operations and not with that of the images. Counted are the operations of one step of a recipe, in bfloat16 and not
compiled, as torch dispatches them on a CPU: all of them, and those that compute, which views and allocations do not.
Waits are reads of a tensor by the host; in the loss they are checks and choices that only a CPU makes. Copies are
calls of `to` with a device, also where the tensor is there. No step is one that logs.

The host's time is that of the CPU, of one thread, with an eighth of the channels, one image of 8x8 pixels and float32,
so that hardly anything but the dispatch takes time: medians of 20 steps. It is given as a share of what the network's
two passes take in the same steps, as a machine that does other work, too, is slower in both.

Each call adds rows of `--state` (a name, as before or after a change) to `rows.jsonl` and writes `table.md`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import UNet2DModel
from PIL import Image
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu.case import open_run
from hf_ddpm import recipes
from hf_ddpm.network_config import sized_config
from hf_ddpm.objective import Objective
from hf_ddpm.training import loop, sharding
from hf_ddpm.training.averages import EMA
from hf_ddpm.training.loader import open_loader
from hf_ddpm.training.metrics import Meter

FOLDER = Path(__file__).parent
WARM_UP_STEPS, STEPS = 3, 20
NARROWER, SIDE = 8, 8
# A recipe -> the side of its images and their channels.
RECIPES = {"cifar10-ddpm": (32, 3), "fashion-mnist": (28, 1)}
PLACES: tuple[tuple[str, Any, str], ...] = (
    ("batch", loop, "next_batches"),
    ("draws", loop, "draw"),
    ("draws", loop, "seed_step"),
    ("loss", Objective, "__call__"),
    ("network, forward", UNet2DModel, "forward"),
    ("network, backward", Accelerator, "backward"),
    ("clipping", Accelerator, "clip_grad_norm_"),
    ("optimizer", sharding, "step"),
    ("averages", EMA, "update"),
    ("metrics", Meter, "add"),
)
PARTS = (*dict.fromkeys(name for name, _, _ in PLACES), "rest")
COUNTS = ("operations", "computing", "waits", "copies")
ALLOCATIONS = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "detach")


@dataclass
class Account:
    """The operations, waits, copies and seconds of a step by part; what a part calls that is another counts there."""

    part: str = "rest"
    operations: Counter = field(default_factory=Counter)
    computing: Counter = field(default_factory=Counter)
    waits: Counter = field(default_factory=Counter)
    copies: Counter = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    since: float = field(default_factory=time.thread_time)

    def clear(self) -> None:
        """Forget all of it."""
        for each in (self.operations, self.computing, self.waits, self.copies, self.seconds):
            each.clear()
        self.since = time.thread_time()

    def enter(self, part: str) -> str:
        """Begin a part and return the one that ends."""
        now, before = time.thread_time(), self.part
        self.seconds[before] += now - self.since
        self.part, self.since = part, now
        return before

    def of(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function as a part."""

        def counted(*arguments: Any, **named: Any) -> Any:
            before = self.enter(part)
            result = function(*arguments, **named)
            self.enter(before)
            return result

        return counted


class Operations(TorchDispatchMode):
    """Counts what is dispatched."""

    def __init__(self, account: Account) -> None:
        super().__init__()
        self.account = account

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        account, name = self.account, func.overloadpacket.__name__
        account.operations[account.part] += 1
        account.waits[account.part] += name in ("_local_scalar_dense", "nonzero", "equal")
        aliases = [each.alias_info for each in func._schema.returns]
        is_view = any(each is not None and not each.is_write for each in aliases)
        account.computing[account.part] += not is_view and name not in ALLOCATIONS
        return func(*args, **(kwargs or {}))


class Copies(TorchFunctionMode):
    """Counts calls of `Tensor.to` with a device."""

    def __init__(self, account: Account) -> None:
        super().__init__()
        self.account = account

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        values = (*args, *(kwargs or {}).values())
        if func is torch.Tensor.to and any(isinstance(value, torch.device) for value in values):
            self.account.copies[self.account.part] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def taking_account(account: Account) -> Iterator[None]:
    """Tell the account which part of a step runs, for the duration of a `with` block."""
    with ExitStack() as patches:
        for part, owner, function in PLACES:
            patches.enter_context(patch.object(owner, function, account.of(part, getattr(owner, function))))
        yield


@contextmanager
def settings_of(recipe: str, is_narrow: bool) -> Iterator[dict[str, Any]]:
    """Write random images and give the settings of a run of the recipe on them, for the duration of a `with` block."""
    side, channels = RECIPES[recipe]
    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = {"recipe": recipe, "train_data_dir": f"{folder}/images", "resolution": side}
        if is_narrow:
            path = recipes.model_config(recipe)
            net = sized_config((side, side), channels, channels) if path is None else json.loads(path.read_text())
            net["block_out_channels"] = [each // NARROWER for each in net["block_out_channels"]]
            for name in ("norm_num_groups", "attention_head_dim"):
                net[name] = None if net.get(name) is None else max(1, net[name] // NARROWER)
            net["sample_size"] = SIDE
            Path(folder, "unet.json").write_text(json.dumps(net))
            settings |= {"resolution": SIDE, "model_config_name_or_path": f"{folder}/unet.json"}
        num_images = 4200
        shape = (num_images, settings["resolution"], settings["resolution"], channels)
        Path(folder, "images").mkdir()
        for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)):
            Image.fromarray(pixels if channels == 3 else pixels[..., 0]).save(f"{folder}/images/{i:04d}.png")
        settings |= {"cache_dir": f"{folder}/cache", "output_dir": f"{folder}/run", "dataloader_num_workers": 0}
        settings |= {"train_batch_size": 1 if is_narrow else 2, "cpu_threads_per_process": 1}
        yield settings


def take_steps(settings: dict[str, Any], precision: str, num_steps: int, is_counting: bool) -> list[Account]:
    """Take steps after a few to warm up, and return the account of each."""
    accounts, account = [], Account()
    with ExitStack() as opened:
        opened.enter_context(taking_account(account))  # before Accelerate wraps the forward pass
        run, progress = opened.enter_context(open_run(settings, precision))
        loader = opened.enter_context(open_loader(run, progress, WARM_UP_STEPS + num_steps))
        meter = Meter(run.processes, run.device, [], 0.0)
        run.model.train()
        for _ in range(WARM_UP_STEPS + num_steps):
            account.clear()
            with ExitStack() as modes:
                if is_counting:
                    modes.enter_context(Operations(account))
                    modes.enter_context(Copies(account))
                batches, failure = loop.next_batches(loader, run.config.gradient_accumulation_steps, lambda: False)
                assert failure is None, failure
                result = loop.take_step(run, progress, batches)
                meter.add([loss for loss, _, _ in result.evaluated], result.is_bad)
                account.enter("rest")
            progress = replace(progress, step=progress.step + 1, images=progress.images + run.global_batch_size)
            accounts.append(deepcopy(account))
    return accounts[WARM_UP_STEPS:]


def measure(recipe: str) -> list[dict[str, Any]]:
    """Return a row for each part of a step."""
    with settings_of(recipe, is_narrow=False) as settings:
        (counted,) = take_steps(settings, "bf16", 1, is_counting=True)
    with settings_of(recipe, is_narrow=True) as settings:
        timed = take_steps(settings, "no", STEPS, is_counting=False)
    return [
        {
            "recipe": recipe,
            "part": part,
            "operations": counted.operations[part],
            "computing": counted.computing[part],
            "waits": counted.waits[part],
            "copies": counted.copies[part],
            "host_ms": round(1e3 * statistics.median(each.seconds[part] for each in timed), 3),
        }
        for part in PARTS
    ]


def network_ms(rows: list[dict[str, Any]], state: str, recipe: str) -> float:
    """Return the milliseconds of the network's two passes."""
    return sum(
        row["host_ms"]
        for row in rows
        if (row["state"], row["recipe"]) == (state, recipe) and row["part"].startswith("network")
    )


def write_table(rows: list[dict[str, Any]]) -> str:
    """Write a table of all rows, states beside each other, and return it."""
    states = [*dict.fromkeys(row["state"] for row in rows)]
    heading = (
        f"torch {version('torch')}, diffusers {version('diffusers')}. Operations that a step dispatches, in brackets "
        "those that compute; waits, and calls of `to` with a device; the host's time as a share of that of the "
        "network's two passes, with an eighth of the channels, on "
        f"{', '.join(sorted({row['machine'] for row in rows}))}. Less is better."
    )
    lines = [heading]
    for recipe in RECIPES:
        lines += ["", f"`{recipe}`", "", "| part | " + " | ".join(f"{s}, operations | time" for s in states) + " |"]
        lines += ["|---|" + "---|---|" * len(states)]
        for part in (*PARTS, "step"):
            cells = []
            for state in states:
                of_part = [
                    row
                    for row in rows
                    if (row["state"], row["recipe"]) == (state, recipe) and part in (row["part"], "step")
                ]
                total = {key: sum(row[key] for row in of_part) for key in (*COUNTS, "host_ms")}
                extra = [f"{total[key]} {key}" for key in ("waits", "copies") if total[key]]
                text = ", ".join([f"{total['operations']:,} ({total['computing']:,})", *extra])
                cells += [text, f"{total['host_ms'] / network_ms(rows, state, recipe):.1%}"]
            lines.append(f"| {part} | " + " | ".join(cells) + " |")
    text = "\n".join(lines) + "\n"
    (FOLDER / "table.md").write_text(text)
    return text


def main() -> None:
    """Measure, append the rows and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", required=True, help="What the processor is called in the table.")
    parser.add_argument("--state", default="now", help="What the rows are called; rows of the same name are replaced.")
    options = parser.parse_args()
    path = FOLDER / "rows.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    rows = [row for row in rows if row["state"] != options.state]
    for recipe in RECIPES:
        rows += [{"state": options.state, "machine": options.machine, **row} for row in measure(recipe)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(write_table(rows))


if __name__ == "__main__":
    main()
