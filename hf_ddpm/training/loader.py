"""The micro-batches of this process: who loads them, how far their stream is, and why none came."""

from __future__ import annotations

import gc
import multiprocessing
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import psutil
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from hf_ddpm.data.batches import MicroBatches, epoch_order
from hf_ddpm.data.decoding import name_of
from hf_ddpm.data.given import NAME
from hf_ddpm.data.shard_batches import BlockStart, StreamBatches, newest_block_starts
from hf_ddpm.data.shards import ImageStream
from hf_ddpm.data.tables import open_dataset
from hf_ddpm.runtime.format import format_duration
from hf_ddpm.runtime.processes import Processes
from hf_ddpm.runtime.signals import leave_signals_to_parent
from hf_ddpm.training.checkpoint import Progress
from hf_ddpm.training.run import Run

# How often a wait for images is looked at, and after how long it is said what is waited for.
LOOK_SECONDS, SAY_SECONDS = 2.0, 60.0


class DataWaitError(RuntimeError):
    """The end of the wait for images: none came, and none will."""


class Watch:
    """A thread that watches how long the training process waits for images.

    The wait itself cannot: torch waits for a worker in several places, some of them without a limit. So the thread
    ends the workers when no images will come, which ends the wait. Looks are counted instead of seconds: a run that
    was suspended with its workers has not waited.

    Attributes:
        is_stopped: Whether the run was asked to end, which ends a wait for workers, too.
        reason: Why the workers were ended; "" because the run was asked to end, None if they were not.

    Args:
        workers: The processes that load images; empty if the training process does, whose wait can only be named.
        max_wait_seconds: How long images may be waited for.
    """

    def __init__(self, workers: Sequence[Any], max_wait_seconds: float):
        self.workers, self.max_wait_seconds = workers, max_wait_seconds
        self.is_stopped: Callable[[], bool] = lambda: False
        self.reason: str | None = None
        self._wait_number = 0  # even between two waits
        self._closed = threading.Event()
        threading.Thread(target=self._work, name="watch", daemon=True).start()

    def __enter__(self) -> None:
        self._wait_number += 1

    def __exit__(self, *_: object) -> None:
        self._wait_number += 1

    def close(self) -> None:
        """End the thread."""
        self._closed.set()

    def _work(self) -> None:
        number, num_looks, was_suspended = 0, 0, False
        while not self._closed.wait(LOOK_SECONDS):
            if self._wait_number % 2 == 0 or self._wait_number != number:
                number, num_looks, was_suspended = self._wait_number, 0, False
                continue
            num_looks += 1
            # At two looks: whoever resumes a suspended run resumes its processes one by one.
            suspended = next((worker.pid for worker in self.workers if _is_suspended(worker.pid)), None)
            self.reason = self._reason(num_looks * LOOK_SECONDS, suspended if was_suspended else None)
            if self.reason is not None:
                for worker in self.workers:
                    worker.kill()  # any milder signal waits until a suspended process is resumed
                return
            was_suspended = suspended is not None
            if num_looks == round(SAY_SECONDS / LOOK_SECONDS):
                self._say(num_looks * LOOK_SECONDS)

    def _reason(self, waited: float, suspended: int | None) -> str | None:
        """Return why no images will come, "" because the run is to end, or None if they may come."""
        if not self.workers:
            return None
        if self.is_stopped():
            return ""
        if suspended is not None:
            return f"process {suspended}, which loads data, is suspended (SIGSTOP)"
        if waited < self.max_wait_seconds:
            return None
        return (
            f"no images came for {format_duration(waited)} (max_data_wait_minutes) from the processes that load data, "
            f"{self._pids()}: is their disk there, and room in /dev/shm?"
        )

    def _say(self, waited: float) -> None:
        text = f"no images have come for {format_duration(waited)}: the disk or the network is slow"
        if self.workers:
            limit = format_duration(self.max_wait_seconds)
            text += (
                f", or the processes that load data, {self._pids()}, are stuck; the run ends after {limit} without "
                "any (max_data_wait_minutes)"
            )
        tqdm.write(text, file=sys.stderr)

    def _pids(self) -> str:
        return ", ".join(str(worker.pid) for worker in self.workers)


def _is_suspended(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_STOPPED
    except psutil.NoSuchProcess:
        return False  # the loader itself notices that


@dataclass(frozen=True)
class Loader:
    """The micro-batches of this process, in order, the worker processes that load them, and who watches the wait."""

    batches: Iterator[dict[str, Any]]
    workers: list[Any]
    watch: Watch


@contextmanager
def open_loader(run: Run, progress: Progress, num_steps: int) -> Iterator[Loader]:
    """Give the micro-batches of `num_steps` steps from `progress` on, for the duration of a `with` block."""
    config = run.config
    cut: dict[str, Any] = {
        "seed": config.seed,
        "random_flip": config.random_flip,
        "batch_size": config.batch_size,
        "accumulation_steps": config.gradient_accumulation_steps,
        "rank": run.processes.rank,
        "num_processes": run.processes.size,
        "first_position": progress.images,
        "num_steps": num_steps,
    }
    if isinstance(run.images, ImageStream):
        stream: Any = progress.stream
        dataset: Any = StreamBatches(
            run.images,
            **cut,
            num_substreams=stream["num_substreams"],
            chunk_size=stream["chunk_size"],
            shuffle_buffer_images=config.shuffle_buffer_images,
            block_starts=tuple(BlockStart(**start) for start in stream["block_starts"]),
        )
    else:
        dataset = MicroBatches(run.images, **cut, num_extra_images=config.stable_target_images)
    loader = DataLoader(
        dataset,
        batch_size=None,
        shuffle=False,
        num_workers=config.dataloader_num_workers,
        worker_init_fn=leave_signals_to_parent,
        pin_memory=run.device.type == "cuda",
    )
    other_children = multiprocessing.active_children()
    # Garbage collection in the workers would write to every object that they inherit, and copy its page of memory.
    has_workers, was_frozen = config.dataloader_num_workers > 0, gc.get_freeze_count() > 0
    if has_workers:
        gc.freeze()
    batches = iter(loader)
    if has_workers and not was_frozen:  # by the command, after it loaded torch
        gc.unfreeze()
    # torch would raise the death of a worker wherever this process is, perhaps between the halves of a step; without
    # this handler it is the next batch that raises it.
    in_main_thread = threading.current_thread() is threading.main_thread()
    if hasattr(signal, "SIGCHLD") and config.dataloader_num_workers and in_main_thread:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    workers = [child for child in multiprocessing.active_children() if child not in other_children]
    watch = Watch(workers, 60 * config.max_data_wait_minutes)
    try:
        yield Loader(batches, workers, watch)
    finally:
        watch.close()


def next_batches(
    loader: Loader, count: int, is_stopped: Callable[[], bool]
) -> tuple[list[dict[str, Any]], Exception | None]:
    """Return the micro-batches of a step, or the error that kept them from coming; neither if the run is to end.

    The error is returned so that all processes can end together.

    Args:
        loader: The loader.
        count: The number of micro-batches.
        is_stopped: Whether the run was asked to end, which ends a wait for workers, too.
    """
    watch = loader.watch
    watch.is_stopped = is_stopped
    try:
        with watch:
            return [next(loader.batches) for _ in range(count)], None
    except Exception as error:  # a file system and a worker process raise errors of any type
        if watch.reason is None:
            return [], error
        return [], DataWaitError(watch.reason) if watch.reason else None


def explain_loader_failure(error: Exception, workers: list[Any]) -> str:
    """Explain why no batch came: a worker process died, or its error message without the traceback."""
    if isinstance(error, DataWaitError):
        return str(error)
    for worker in workers:
        worker.join(timeout=1)
        if worker.exitcode:
            code = worker.exitcode
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
            return f"process {worker.pid}, which loads data, {how}: is there memory for all dataloader_num_workers?"
    lines = [line for line in str(error).splitlines() if line.strip()]
    # A worker's error begins with its class.
    return re.sub(r"^[\w.]+Error: ", "", lines[-1]) if lines else type(error).__name__


def advance_stream(
    progress: Progress, block_starts: dict[int, BlockStart], micro_batches: list[dict[str, Any]]
) -> Progress:
    """Record the newest block start of each substream that a step was read from, and count its unreadable images.

    Args:
        progress: The progress before the step.
        block_starts: Those that this process has read, by the number of the substream.
        micro_batches: Those of the step.
    """
    for start in (start for batch in micro_batches for start in batch["block_starts"]):
        newest = block_starts.setdefault(start.substream, start)
        if start.element > newest.element:
            block_starts[start.substream] = start
    num_bad = sum(int(batch["num_bad"]) for batch in micro_batches)
    return replace(progress, num_bad_images=progress.num_bad_images + num_bad) if num_bad else progress


def merge_block_starts(
    processes: Processes, progress: Progress, first: Progress, block_starts: dict[int, BlockStart]
) -> Progress:
    """Merge what all processes read of a stream since `first`: the newest block starts, and the unreadable images."""
    own = list(block_starts.values()), progress.num_bad_images - first.num_bad_images
    everyones = processes.gather(lambda: own)
    stream: Any = first.stream
    starts = [BlockStart(**start) for start in stream["block_starts"]]
    starts = newest_block_starts(chain(starts, *(starts for starts, _ in everyones)))
    num_bad = first.num_bad_images + sum(num_bad for _, num_bad in everyones)
    stream = {**stream, "block_starts": [start._asdict() for start in starts]}
    return replace(progress, stream=stream, num_bad_images=num_bad)


def image_names(run: Run, positions: list[int]) -> list[str]:
    """Return what a user finds the images by that are at these positions of the endless stream."""
    if isinstance(run.images, ImageStream):
        return [f"image {position} of the stream" for position in positions]
    rows = []
    for position in positions:
        epoch, index = divmod(position, len(run.images))
        rows.append(int(epoch_order(run.config.seed, epoch, len(run.images))[index]))
    if run.images.name == NAME:
        return [f"item {row} of {NAME}" for row in rows]
    if run.images.num_bad:
        return [f"readable image {row}" for row in rows]
    try:
        dataset = open_dataset(run.config)
        return [name_of(dataset[row][dataset.column_names[0]], row) for row in rows]
    except Exception:  # the images are in the cache, their files may be gone
        return [f"row {row}" for row in rows]
