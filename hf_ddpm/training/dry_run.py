"""The cost of a run, from a few of its own steps: memory, speed, time to its end, disk.

counted     from the tensors themselves, or by torch's counter of FLOPs
computed    from settings and from what was counted and measured
measured    in steps that are those of training; what they do to weights and averages is forgotten

Bytes are of one process: counted ones of the first, measured ones of the largest. Nothing is written.
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import torch
from diffusers import UNet2DModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from hf_ddpm.image_size import format_size, to_resolution, to_size
from hf_ddpm.label_embedding import embedding_of, empty_copy, example_labels
from hf_ddpm.network_config import size_unit
from hf_ddpm.runtime.devices import device_name
from hf_ddpm.runtime.errors import RunError, UsageError
from hf_ddpm.runtime.files import existing_parent
from hf_ddpm.runtime.format import format_amount, format_duration
from hf_ddpm.runtime.run_files import checkpoint_names
from hf_ddpm.scheduler import MAX_TERMINAL_ALPHA_BAR
from hf_ddpm.training import sharding
from hf_ddpm.training.averages import local
from hf_ddpm.training.checkpoint import Progress, checkpoint_bytes
from hf_ddpm.training.checks import check_output_dir
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.loader import explain_loader_failure, next_batches, open_loader
from hf_ddpm.training.posthoc import TRACKED_STDS
from hf_ddpm.training.report import passes_of_a_step, reverse_chain_steps
from hf_ddpm.training.run import Run, naming_compilation, num_steps_left, print_once

# In the first steps torch reserves memory and compiles.
WARM_UP_STEPS = 2
MIN_STEPS = 3
MAX_STEPS = 50
ENOUGH_SECONDS = 10.0

TakeStep = Callable[[Run, Progress, list[dict[str, Any]]], Any]


@dataclass(frozen=True)
class Cost:
    """The cost of a few steps; with several processes, that of the slowest and of the largest.

    Args:
        first_seconds: The seconds of the first step, with all that is done once.
        step_seconds: The seconds of each step after `WARM_UP_STEPS`.
        memory: The name of the memory that is cost.
        peak_bytes: The most bytes held at once, in any of the steps.
        added_bytes: Those of them that were added since before the first step; None where the system does not say.
        num_bad_steps: The steps without finite loss and gradients.
        checkpoint_bytes: The size of a checkpoint.
    """

    first_seconds: float
    step_seconds: list[float]
    memory: str
    peak_bytes: int
    added_bytes: int | None
    num_bad_steps: int
    checkpoint_bytes: int


def estimate_cost(run: Run, progress: Progress, take_step: TakeStep) -> Cost:
    """Take steps from `progress` on and measure them; all processes call it.

    Args:
        take_step: The step of training.

    Raises:
        RunError: There are no images to take a step with.
    """
    processes, device = run.processes, run.device
    text = f"a dry run: {WARM_UP_STEPS + MIN_STEPS} to {WARM_UP_STEPS + MAX_STEPS} steps are taken and forgotten"
    print_once(processes, text)
    memory, bytes_before, peak_of = watch_memory(device)
    seconds: list[float] = []
    failure, num_bad_steps = None, 0
    run.model.train()
    bar = tqdm(desc="Measuring", unit="step", disable=not run.is_main, leave=False)
    with bar, open_loader(run, progress, WARM_UP_STEPS + MAX_STEPS) as loader:
        for number in range(WARM_UP_STEPS + MAX_STEPS):
            started = time.perf_counter()
            micro_batches, failure = next_batches(loader, run.config.gradient_accumulation_steps, lambda: False)
            is_enough = number >= WARM_UP_STEPS + MIN_STEPS and sum(seconds[WARM_UP_STEPS:]) > ENOUGH_SECONDS
            if any(processes.any([is_enough, failure is not None])):
                break
            with naming_compilation(run, number == 0):
                result = take_step(run, progress, micro_batches)
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            seconds.append(time.perf_counter() - started)
            num_bad_steps += bool(result.is_bad)
            bar.update()
            progress = replace(progress, step=progress.step + 1, images=progress.images + run.global_batch_size)
        peak_bytes = peak_of()
        workers = loader.workers
        explanations = processes.gather(lambda: None if failure is None else explain_loader_failure(failure, workers))
        if failures := [text for text in explanations if text]:
            raise RunError(failures[0]) from failure
    del loader  # and its worker processes

    added_bytes = None if bytes_before is None else peak_bytes - bytes_before
    everyones = processes.gather(lambda: (seconds, peak_bytes, added_bytes))
    slowest = [max(times) for times in zip(*(each[0] for each in everyones), strict=True)]
    all_added = [each[2] for each in everyones if each[2] is not None]
    return Cost(
        first_seconds=slowest[0],
        step_seconds=slowest[WARM_UP_STEPS:],
        memory=memory,
        peak_bytes=max(each[1] for each in everyones),
        added_bytes=max(all_added) if len(all_added) == processes.size else None,
        num_bad_steps=num_bad_steps,
        checkpoint_bytes=checkpoint_bytes(run.state, progress, run.is_main),
    )


def print_cost(run: Run, progress: Progress, cost: Cost) -> None:
    """Print a table of what the run would cost from `progress` on, on the first process."""
    if not run.is_main:
        return
    notes: list[str] = []
    rows = [
        *_cost_rows(run, cost),
        *_time_rows(run, progress, cost),
        ("checkpoint", "measured", format_amount(cost.checkpoint_bytes, "B")),
        ("disk", "computed", _disk(run, progress, cost.checkpoint_bytes, notes)),
        ("resolution", "computed", _sizes(run)),
        ("alpha_bar_T", "computed", _signal_left(run, notes)),
    ]
    if cost.num_bad_steps:
        num_steps = WARM_UP_STEPS + len(cost.step_seconds)
        notes.append(f"{cost.num_bad_steps} of {num_steps} steps had no finite loss and gradients")
    try:
        check_output_dir(replace(run.config, dry_run=False))
    except UsageError as error:
        notes.append(str(error))
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    print(_title(run))
    for name, how, text in rows:
        print(f"{name:{widths[0]}}  {how:{widths[1]}}  {text}")
    for note in notes:
        print(f"note: {note}")


def count_flops(unet: Any) -> tuple[int, int]:
    """Count the FLOPs of one image in the network: forward; forward and backward.

    They are counted on a copy that has shapes and no numbers, so they are the same on every device and however the
    network is sharded. Counted are matrix products and convolutions; a multiplication and its addition are two.
    """
    if embedding_of(unet) is None:
        return _count_flops_of(type(unet), unet.to_json_string())
    with torch.device("meta"):
        return _count_flops(empty_copy(unet))


@cache
def _count_flops_of(kind: Any, settings: str) -> tuple[int, int]:
    """Count them for the config of a network, as JSON. Dry runs in one process often have the same network."""
    with torch.device("meta"):
        return _count_flops(kind.from_config(json.loads(settings)))


def _count_flops(copy: Any) -> tuple[int, int]:
    with torch.device("meta"), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        config = copy.config
        x_t = torch.zeros(1, config.in_channels, *to_size(config.sample_size))
        t = torch.zeros(1, dtype=torch.int64)
        output = copy(x_t, t, **example_labels(copy)).sample
        forward = counter.get_total_flops()
        output.square().mean().backward()
    return forward, counter.get_total_flops()


def _title(run: Run) -> str:
    config, images = run.config, run.images
    count = "images" if images.num_images is None else f"{images.num_images:,} images"
    precision = "float32" if config.mixed_precision == "no" else f"{config.mixed_precision}"
    return (
        f"{images.name}: {count} of {format_size(images.size)}, channels {images.channels}; processes "
        f"{run.processes.size}: {device_name(run.device)}; {precision}{', compiled' * (config.compile is True)}"
    )


def _cost_rows(run: Run, cost: Cost) -> list[tuple[str, str, str]]:
    averages = run.state.ema.averages if run.state.ema is not None else {}
    averaged = sum(local(tensor).nbytes for average in averages.values() for tensor in average)
    forward, whole = count_flops(run.state.unet)
    flops = f"{format_amount(forward, '')} forward, {format_amount(whole, '')} a training step"
    held = sharding.bytes_held(run.parameters, run.state.optimizer)
    of_steps = "in the life of the process"
    if cost.added_bytes is not None:
        of_steps = f"{format_amount(cost.added_bytes, 'B')} of it since before the first step"
    peak = f"{format_amount(cost.peak_bytes, 'B')} of {cost.memory}, {of_steps}"
    return [
        ("parameters", "counted", f"{sum(p.numel() for p in run.parameters):,}"),
        ("FLOPs per image", "counted", f"{flops} (a multiply-add is 2)"),
        *((name, "counted", format_amount(size, "B")) for name, size in held.items()),
        ("averages", "counted", f"{format_amount(averaged, 'B')}, copies {len(averages)}"),
        ("peak of a step", "measured", f"{peak}; train_batch_size {run.config.train_batch_size}"),
    ]


def _time_rows(run: Run, progress: Progress, cost: Cost) -> list[tuple[str, str, str]]:
    size, median = run.global_batch_size, statistics.median(cost.step_seconds)
    rate = size / median
    speed = f"{f'{rate:,.0f}' if rate >= 100 else f'{rate:.3g}'} images/s of all processes, {median:.3g} s per step"
    how = f"median of {len(cost.step_seconds)} steps after {WARM_UP_STEPS} to warm up"
    num_steps = num_steps_left(run, progress)
    to_do = f"{num_steps:,} steps of {size:,} images, {num_steps * size:,} images"
    if run.images.num_images is not None:
        to_do += f", {num_steps * size / run.images.num_images:,.1f} epochs"
    to_do += f"; {progress.step:,} steps are done" if progress.step else ""
    without = "without checkpoints, previews, measurements and figures"
    return [
        ("speed", "measured", f"{speed}; {how}, the first in {cost.first_seconds:.3g} s"),
        ("to do", "computed", to_do),
        ("time", "computed", f"{format_duration(num_steps * median)}, {without}"),
        ("figures", "computed", _figures(run, median)),
    ]


def _figures(run: Run, step_seconds: float) -> str:
    if not run.config.save_figures:
        return "none (--no_save_figures)"
    num_steps = reverse_chain_steps(run, run.total_images)
    if not num_steps:
        return "no reverse chain: it would take too long"
    longest = format_duration(num_steps * step_seconds / passes_of_a_step(run))
    return f"a reverse chain of {num_steps:,} of {len(run.scheduler):,} steps at the end, at most {longest}"


def _disk(run: Run, progress: Progress, checkpoint_size: int, notes: list[str]) -> str:
    config, folder = run.config, run.output_dir
    num_steps = num_steps_left(run, progress)
    num_checkpoints = math.ceil((progress.step + num_steps) / config.checkpointing_steps)
    num_kept = min(num_checkpoints, config.checkpoints_total_limit or num_checkpoints)
    max_at_once = num_kept + (num_checkpoints > num_kept)  # the oldest goes when the newest is whole
    needed = max_at_once * checkpoint_size
    text = f"{format_amount(needed, 'B')} for {max_at_once:,} checkpoints at once"
    if config.use_ema and config.ema_snapshots:
        left = min(num_steps, config.ema_snapshots - config.ema_snapshots * progress.images // run.total_images)
        snapshots = left * len(TRACKED_STDS) * sum(p.numel() * p.element_size() for p in run.parameters)
        needed += snapshots
        text += f", {format_amount(snapshots, 'B')} for {left} snapshots of averages"
    free = shutil.disk_usage(existing_parent(folder)).free
    room = free + _replaced_bytes(config, progress)
    if needed > room:
        size, free_size = format_amount(needed, "B"), format_amount(room, "B")
        notes.append(f"output_dir needs {size} on its disk, which has {free_size}")
    return f"{text}; {format_amount(free, 'B')} are free"


def _replaced_bytes(config: TrainingConfig, progress: Progress) -> int:
    """Return the bytes of older checkpoints, which make room for those of this run."""
    if progress.step == 0:  # a run that is overwritten stays until the new one has a model
        return 0
    folder = Path(config.output_dir)
    files = (path for name in checkpoint_names(folder) for path in (folder / name).rglob("*"))
    return sum(path.stat().st_size for path in files if path.is_file())


def _sizes(run: Run) -> str:
    config: Any = run.state.unet.config
    if not isinstance(run.state.unet, UNet2DModel):
        return f"{to_resolution(run.images.size)}, as the network that was passed"
    num_levels, sides = len(config.block_out_channels), dict.fromkeys(run.images.size)
    unit = size_unit(num_levels)
    nearest = (
        f"next to {side}: {' and '.join(str(each) for each in (side - unit, side + unit) if each > 0)}"
        for side in sides
    )
    what = "a multiple" if len(sides) == 1 else "multiples"
    return f"{what} of {unit} (halvings of this network: {num_levels - 1}); {', '.join(nearest)}"


def _signal_left(run: Run, notes: list[str]) -> str:
    alpha_bar_T = float(run.scheduler.alpha_bar[-1])
    if alpha_bar_T > MAX_TERMINAL_ALPHA_BAR:
        notes.append(
            f"alpha_bar_T should be at most {MAX_TERMINAL_ALPHA_BAR:g}, got {alpha_bar_T:.3g}: x_T still shows the "
            "image, but sampling starts from N(0, I); --ddpm_beta_schedule squaredcos_cap_v2 leaves less"
        )
    return f"{alpha_bar_T:.3g} of the signal's power is left in x_T"


def watch_memory(device: torch.device) -> tuple[str, int | None, Callable[[], int]]:
    """Start to watch the memory of this process.

    Where a system does not forget the highest value from before, the peak is that since the start of the process, and
    the bytes now are None.

    Returns:
        The name of the memory, the bytes held now, and a function that returns the peak from now on.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return "GPU memory", torch.cuda.memory_allocated(device), lambda: torch.cuda.max_memory_allocated(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: proc_pid_clear_refs(5)
        before = _resident("VmHWM")
    except (OSError, LookupError):
        return "main memory", None, _highest_resident
    return "main memory", before, lambda: _resident("VmHWM")


def _resident(name: str) -> int:
    """Return a value of /proc/self/status in bytes; raise LookupError where Linux has no such line."""
    lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
    return 1024 * int({line[0]: line[1] for line in lines if len(line) > 1}[f"{name}:"])


def _highest_resident() -> int:
    """Return the peak in bytes since the start of the process."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
