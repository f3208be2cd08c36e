"""What a run would cost, of a few of its own steps: memory, speed, time to its end, disk.

counted     from the tensors themselves, or by torch's counter of FLOPs
computed    from settings and from what was counted and measured
measured    in steps that are those of training; what they do to weights and averages is forgotten

Bytes are of one process, the first of several, and where they are measured the largest. Nothing is written.
"""

from __future__ import annotations

import math
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from diffusers import UNet2DModel
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hf_ddpm.network import size_unit
from hf_ddpm.runtime.devices import device_name
from hf_ddpm.runtime.errors import RunError, UsageError
from hf_ddpm.runtime.format import format_amount, format_duration
from hf_ddpm.runtime.run_files import checkpoint_names
from hf_ddpm.scheduler import MAX_TERMINAL_ALPHA_BAR
from hf_ddpm.training import sharding
from hf_ddpm.training.averages import local
from hf_ddpm.training.checkpoint import Progress, checkpoint_bytes
from hf_ddpm.training.checks import check_output_dir
from hf_ddpm.training.config import TrainingConfig
from hf_ddpm.training.loader import fetch, open_batches, why_none
from hf_ddpm.training.metrics import Meter
from hf_ddpm.training.posthoc import TRACKED_STDS
from hf_ddpm.training.run import Run, say

# In the first of them torch sets memory aside, and compiles.
WARM_UP_STEPS = 2
MIN_STEPS, MAX_STEPS, ENOUGH_SECONDS = 3, 50, 10.0

TakeStep = Callable[[Run, Progress, list[dict[str, Tensor]], Meter], Any]


@dataclass(frozen=True)
class Measured:
    """Some steps; of several processes, what the slowest and the largest of them did.

    Args:
        first_seconds: of the first step, with all that is done once.
        step_seconds: of each step after `WARM_UP_STEPS`.
        memory: which is measured.
        peak_bytes: held at once, in any of the steps.
        added_bytes: of them since before the first step; None where the system does not say.
        num_bad_steps: without finite loss and gradients.
    """

    first_seconds: float
    step_seconds: list[float]
    memory: str
    peak_bytes: int
    added_bytes: int | None
    num_bad_steps: int


def show_dry_run(run: Run, progress: Progress, take_step: TakeStep) -> None:
    """Prints a table of what `run` would cost from `progress` on; for all processes to call.

    Args:
        take_step: training's own.

    Raises:
        RunError: there are no images to take a step with.
    """
    say(run.processes, "a dry run: some steps are taken, and nothing of the run is written")
    measured = measure(run, progress, take_step)
    checkpoint_size = checkpoint_bytes(run.state, progress, run.accelerator.is_main_process)
    if run.processes.rank > 0:
        return
    notes: list[str] = []
    rows = [
        *_cost_rows(run, measured),
        *_time_rows(run, progress, measured),
        ("checkpoint", "measured", format_amount(checkpoint_size, "B")),
        ("disk", "computed", _disk(run, progress, checkpoint_size, notes)),
        ("resolution", "computed", _sizes(run)),
        ("alpha_bar_T", "computed", _signal_left(run, notes)),
    ]
    if measured.num_bad_steps:
        count = WARM_UP_STEPS + len(measured.step_seconds)
        notes.append(f"{measured.num_bad_steps} of {count} steps had no finite loss and gradients")
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


def measure(run: Run, progress: Progress, take_step: TakeStep) -> Measured:
    """Takes steps from `progress` on, on all processes together.

    Raises:
        RunError: there are no images to take a step with.
    """
    processes, device = run.processes, run.accelerator.device
    memory, before, highest = _watch_memory(device)
    meter = Meter(run.accelerator, progress.losses, progress.seconds)
    batches, workers = open_batches(run, progress, WARM_UP_STEPS + MAX_STEPS)
    seconds: list[float] = []
    failure, num_bad = None, 0
    run.model.train()
    for number in range(WARM_UP_STEPS + MAX_STEPS):
        started = time.perf_counter()
        micro_batches, failure = fetch(batches, run.config.gradient_accumulation_steps)
        is_enough = number >= WARM_UP_STEPS + MIN_STEPS and sum(seconds[WARM_UP_STEPS:]) > ENOUGH_SECONDS
        if any(processes.any([is_enough, failure is not None])):
            break
        outcome = take_step(run, progress, micro_batches, meter)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        seconds.append(time.perf_counter() - started)
        num_bad += outcome.is_bad()
        progress = replace(progress, step=progress.step + 1, images=progress.images + run.global_batch_size)
    peak = highest()
    reasons = [r for r in processes.gather(lambda: None if failure is None else why_none(failure, workers)) if r]
    if reasons:
        raise RunError(reasons[0]) from failure
    del batches  # and the processes that load them

    added = None if before is None else peak - before
    everyones_seconds, peaks, all_added = zip(*processes.gather(lambda: (seconds, peak, added)), strict=True)
    slowest = [max(times) for times in zip(*everyones_seconds, strict=True)]
    return Measured(
        first_seconds=slowest[0],
        step_seconds=slowest[WARM_UP_STEPS:],
        memory=memory,
        peak_bytes=max(peaks),
        added_bytes=None if None in all_added else max(all_added),
        num_bad_steps=num_bad,
    )


def count_flops(unet: Any) -> tuple[int, int]:
    """FLOPs of one image in the network: forward; forward and backward.

    Counted on a copy that has shapes and no numbers, so that they are the same on every device and engine: products of
    matrices and convolutions, in which a multiplication and the addition after it are two.
    """
    config = unet.config
    with torch.device("meta"), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        copy: Any = UNet2DModel.from_config(config)
        x_t = torch.zeros(1, config.in_channels, config.sample_size, config.sample_size)
        t = torch.zeros(1, dtype=torch.int64)
        conditions = {} if config.num_class_embeds is None else {"class_labels": t}
        output = copy(x_t, t, **conditions).sample
        forward = counter.get_total_flops()
        output.square().mean().backward()
    return forward, counter.get_total_flops()


def _title(run: Run) -> str:
    config, images = run.config, run.images
    count = "images" if images.num_images is None else f"{images.num_images:,} images"
    precision = "float32" if config.mixed_precision == "no" else f"{config.mixed_precision}"
    return (
        f"{images.name}: {count} of {images.resolution} x {images.resolution}, channels {images.channels}; processes "
        f"{run.processes.size}: {device_name(run.accelerator.device)}; {precision}{', compiled' * config.compile}"
    )


def _cost_rows(run: Run, measured: Measured) -> list[tuple[str, str, str]]:
    averages = run.state.ema.averages if run.state.ema is not None else {}
    averaged = sum(local(tensor).nbytes for average in averages.values() for tensor in average)
    forward, whole = count_flops(run.state.unet)
    flops = f"{format_amount(forward, '')} forward, {format_amount(whole, '')} a training step"
    held = sharding.held_bytes(run.parameters, run.state.optimizer)
    of_steps = "in the life of the process"
    if measured.added_bytes is not None:
        of_steps = f"{format_amount(measured.added_bytes, 'B')} of it since before the first step"
    peak = f"{format_amount(measured.peak_bytes, 'B')} of {measured.memory}, {of_steps}"
    return [
        ("parameters", "counted", f"{sum(p.numel() for p in run.parameters):,}"),
        ("FLOPs per image", "counted", f"{flops} (a multiply-add is 2)"),
        *((name, "counted", format_amount(size, "B")) for name, size in held.items()),
        ("averages", "counted", f"{format_amount(averaged, 'B')}, copies {len(averages)}"),
        ("peak of a step", "measured", f"{peak}; train_batch_size {run.config.train_batch_size}"),
    ]


def _time_rows(run: Run, progress: Progress, measured: Measured) -> list[tuple[str, str, str]]:
    size, median = run.global_batch_size, statistics.median(measured.step_seconds)
    rate = size / median
    speed = f"{f'{rate:,.0f}' if rate >= 100 else f'{rate:.3g}'} images/s of all processes, {median:.3g} s per step"
    how = f"median of {len(measured.step_seconds)} steps after {WARM_UP_STEPS} to warm up"
    num_steps = _steps_left(run, progress)
    to_do = f"{num_steps:,} steps of {size:,} images, {num_steps * size:,} images"
    if run.images.num_images is not None:
        to_do += f", {num_steps * size / run.images.num_images:,.1f} epochs"
    to_do += f"; {progress.step:,} steps are done" if progress.step else ""
    return [
        ("speed", "measured", f"{speed}; {how}, the first in {measured.first_seconds:.3g} s"),
        ("to do", "computed", to_do),
        ("time", "computed", f"{format_duration(num_steps * median)}, without checkpoints, previews and measurements"),
    ]


def _steps_left(run: Run, progress: Progress) -> int:
    return math.ceil((run.total_images - progress.images) / run.global_batch_size)


def _disk(run: Run, progress: Progress, checkpoint_size: int, notes: list[str]) -> str:
    config, folder = run.config, run.output_dir
    num_steps = _steps_left(run, progress)
    num_checkpoints = math.ceil((progress.step + num_steps) / config.checkpointing_steps)
    kept = min(num_checkpoints, config.checkpoints_total_limit or num_checkpoints)
    most = kept + (num_checkpoints > kept)  # the oldest goes when the newest is whole
    needed = most * checkpoint_size
    text = f"{format_amount(needed, 'B')} for {most:,} checkpoints at once"
    if config.use_ema and config.ema_snapshots:
        left = min(num_steps, config.ema_snapshots - config.ema_snapshots * progress.images // run.total_images)
        snapshots = left * len(TRACKED_STDS) * sum(p.numel() * p.element_size() for p in run.parameters)
        needed += snapshots
        text += f", {format_amount(snapshots, 'B')} for {left} snapshots of averages"
    free = shutil.disk_usage(next(p for p in (folder, *folder.absolute().parents) if p.exists())).free
    room = free + _replaced_bytes(config, progress)
    if needed > room:
        size, free_size = format_amount(needed, "B"), format_amount(room, "B")
        notes.append(f"output_dir needs {size} on its disk, which has {free_size}")
    return f"{text}; {format_amount(free, 'B')} are free"


def _replaced_bytes(config: TrainingConfig, progress: Progress) -> int:
    """Of checkpoints that are there, and make room for those of this run."""
    if not config.overwrite_output_dir and progress.step == 0:
        return 0
    folder = Path(config.output_dir)
    files = (path for name in checkpoint_names(folder) for path in (folder / name).rglob("*"))
    return sum(path.stat().st_size for path in files if path.is_file())


def _sizes(run: Run) -> str:
    num_levels, resolution = len(run.state.unet.config.block_out_channels), run.images.resolution
    unit = size_unit(num_levels)
    nearest = " and ".join(str(side) for side in (resolution - unit, resolution + unit) if side > 0)
    return f"a multiple of {unit} (halvings of this network: {num_levels - 1}); next to {resolution}: {nearest}"


def _signal_left(run: Run, notes: list[str]) -> str:
    alpha_bar_T = float(run.scheduler.alpha_bar[-1])
    if alpha_bar_T > MAX_TERMINAL_ALPHA_BAR:
        notes.append(
            f"alpha_bar_T should be at most {MAX_TERMINAL_ALPHA_BAR:g}, got {alpha_bar_T:.3g}: x_T still shows the "
            "image, but sampling starts from N(0, I); --ddpm_beta_schedule squaredcos_cap_v2 leaves less"
        )
    return f"{alpha_bar_T:.3g} of the signal's power is left in x_T"


def _watch_memory(device: torch.device) -> tuple[str, int | None, Callable[[], int]]:
    """What is watched, how much of it is held now, and what tells the most that was held from now on.

    Where a system does not forget the highest value from before, it is that of the process since its start, and
    nothing is said of now.
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
    """Bytes; raises LookupError where Linux does not say them."""
    lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
    return 1024 * int({line[0]: line[1] for line in lines if len(line) > 1}[f"{name}:"])


def _highest_resident() -> int:
    """Bytes, since the start of the process."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
