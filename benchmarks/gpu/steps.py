"""The parts that time steps of training: how long one takes, where it goes, its share of the peak."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from accelerate import Accelerator
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.case import Case, Measured, open_run, settings_of
from benchmarks.throughput.run import matrix_product, stock_loop, wait_for
from hf_ddpm.objective import Objective
from hf_ddpm.training import loop, sharding
from hf_ddpm.training.averages import EMA
from hf_ddpm.training.checkpoint import Progress
from hf_ddpm.training.dry_run import count_flops
from hf_ddpm.training.loader import Loader, open_loader
from hf_ddpm.training.run import Run

WARM_UP_STEPS, STEPS, TURNS = 3, 20, 3
SUM_TOLERANCE = 0.05
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}


def recipe(case: Case) -> Iterator[Measured]:
    """Time the steps of the recipe cifar10-ddpm."""
    yield from _by_precision("recipe", case, case.precisions)


def default_network(case: Case) -> Iterator[Measured]:
    """Time the steps of the default settings, whose network is sized for the data and trained by Muon."""
    yield from _by_precision("default", case, case.precisions)


def compiled_recipe(case: Case) -> Iterator[Measured]:
    """Time the steps of the recipe, compiled."""
    yield from _by_precision("recipe", case, ("bf16",), compile=True)


def compiled_default_network(case: Case) -> Iterator[Measured]:
    """Time the steps of the default settings, compiled."""
    yield from _by_precision("default", case, ("bf16",), compile=True)


def diffusers_loop(case: Case) -> Iterator[Measured]:
    """Time the steps of diffusers' script on the network of the recipe."""
    with settings_of("recipe", case) as settings, open_run(settings, "no") as (run, _):
        net = dict(run.state.unet.config)
    for precision in ("bf16", "no"):
        seconds: list[float] = []

        def note(times: list[float] = seconds) -> None:
            times.append(time.perf_counter())  # the loop waits for its loss in each step
            if len(times) > WARM_UP_STEPS + _num_steps(case):
                raise StopIteration

        with suppress(StopIteration):
            stock_loop(net, case.batch, note, case.device, precision)
        spent = (seconds[-1] - seconds[WARM_UP_STEPS]) / (len(seconds) - 1 - WARM_UP_STEPS)
        yield Measured(f"{_name(precision)}, a step", 1e3 * spent, "ms", f"{case.batch / spent:,.0f} images/s")


def _by_precision(name: str, case: Case, precisions: tuple[str, ...], compile: bool = False) -> Iterator[Measured]:
    sides = 256 if case.is_small else 8192
    with settings_of(name, case) as settings:
        for precision in precisions:
            with open_run(settings, precision, compile) as (run, progress):
                peak = matrix_product(TYPES[precision], sides, case.device)
                yield from _measure(run, progress, f"{_name(precision)}{', compiled' * compile}", peak, case)


def _measure(run: Run, progress: Progress, name: str, peak: float, case: Case) -> Iterator[Measured]:
    """Measure a step as a whole, and then where it goes."""
    num_steps = _num_steps(case)
    run.model.train()
    with open_loader(run, progress, WARM_UP_STEPS + 2 * TURNS * num_steps + num_steps) as loader:
        started = time.perf_counter()
        progress = _take_steps(run, progress, loader, WARM_UP_STEPS)
        wait_for(case.device)
        first = time.perf_counter() - started
        plain, marked = [], []
        marks = Marks(case.device)
        for _ in range(TURNS):
            started = time.perf_counter()
            progress = _take_steps(run, progress, loader, num_steps)
            wait_for(case.device)
            plain.append((time.perf_counter() - started) / num_steps)
            with marking(marks):
                progress = _take_steps(run, progress, loader, num_steps)
            marked.append(marks.read())
        seconds = statistics.median(plain)
        flops = count_flops(run.state.unet)[1] * case.batch
        note = f"{case.batch / seconds:,.0f} images/s; the first {WARM_UP_STEPS} steps in {first:.1f} s"
        yield Measured(f"{name}, a step", 1e3 * seconds, "ms", note)
        share = flops / seconds / 1e9 / peak
        yield Measured(f"{name}, share of the peak", 100 * share, "%", f"of {peak / 1e3:.3g} TFLOP/s")
        yield from _where(name, marked, num_steps, seconds)
        if case.device == "cuda":
            yield from _kernels(run, progress, loader, name, num_steps, seconds)


def _where(
    name: str, marked: list[dict[str, tuple[float, float]]], num_steps: int, seconds: float
) -> Iterator[Measured]:
    """Yield the parts of a step, and whether they add up to it."""
    parts = {
        part: [1e3 * statistics.median(turn[part][kind] for turn in marked) / num_steps for kind in (0, 1)]
        for part in marked[0]
    }
    for part, (on_device, on_host) in parts.items():
        yield Measured(f"{name}, {part}", on_device, "ms", f"host {on_host:.3g} ms")
    total = sum(on_device for on_device, _ in parts.values())
    off = total / (1e3 * seconds) - 1
    verdict = "they add up to the step" if abs(off) <= SUM_TOLERANCE else "they do NOT add up to the step"
    yield Measured(f"{name}, sum of these", total, "ms", f"{verdict}: {off:+.1%}")


def _kernels(
    run: Run, progress: Progress, loader: Loader, name: str, num_steps: int, seconds: float
) -> Iterator[Measured]:
    """Yield the time that kernels of a step take, and for how long none runs."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        _take_steps(run, progress, loader, num_steps)
        wait_for("cuda")
    events = [event for event in profiled.key_averages() if event.device_type == DeviceType.CUDA]
    busy = sum(event.self_device_time_total for event in events) / 1e3 / num_steps
    count = sum(event.count for event in events) / num_steps
    yield Measured(f"{name}, kernels", busy, "ms", f"{count:,.0f} kernels and copies")
    yield Measured(f"{name}, waits", 1e3 * seconds - busy, "ms", "the step without its kernels")


def _take_steps(run: Run, progress: Progress, loader: Loader, count: int) -> Progress:
    for _ in range(count):
        batches, failure = loop.next_batches(loader, run.config.gradient_accumulation_steps, lambda: False)
        if failure is not None:
            raise failure
        loop.take_step(run, progress, batches)
        progress = replace(progress, step=progress.step + 1, images=progress.images + run.global_batch_size)
    return progress


class Marks:
    """Marks in the stream of a device: the time between two of them belongs to the part that the second one names.

    A mark waits for nothing. A part that the device does while the host is ahead has no waits in it, and one whose
    kernels the host starts too late has these, too.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.marks: list[tuple[str, Any, float]] = []

    def mark(self, name: str) -> None:
        event = None
        if self.device == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        self.marks.append((name, event, time.perf_counter()))

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function between two marks: what was before it belongs to the rest."""

        def marked(*arguments: Any, **named: Any) -> Any:
            self.mark("rest")
            result = function(*arguments, **named)
            self.mark(name)
            return result

        return marked

    def read(self) -> dict[str, tuple[float, float]]:
        """Return the seconds of each part on the device and on the host, and forget the marks."""
        wait_for(self.device)
        found: dict[str, tuple[float, float]] = {}
        for (_, event, at), (name, next_event, next_at) in zip(self.marks, self.marks[1:], strict=False):
            host = next_at - at
            own = host if event is None else event.elapsed_time(next_event) / 1e3
            on_device, on_host = found.get(name, (0.0, 0.0))
            found[name] = (on_device + own, on_host + host)
        self.marks = []
        return found


@contextmanager
def marking(marks: Marks) -> Iterator[None]:
    """Put marks around the parts of each step, for the duration of a `with` block."""
    places = (
        ("data", loop, "next_batches"),
        ("draws", loop, "draw"),
        ("network, forward", Objective, "__call__"),
        ("network, backward", Accelerator, "backward"),
        ("clipping and optimizer", sharding, "step"),
        ("averages", EMA, "update"),
    )
    with ExitStack() as patches:
        for name, owner, function in places:
            patches.enter_context(patch.object(owner, function, marks.around(name, getattr(owner, function))))
        marks.mark("rest")
        yield
        marks.mark("rest")


def _num_steps(case: Case) -> int:
    return 3 if case.is_small else STEPS


def _name(precision: str) -> str:
    return "float32" if precision == "no" else precision
