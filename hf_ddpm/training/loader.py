"""The micro-batches of this process: who loads them, how far their stream is, and why none came."""

from __future__ import annotations

import gc
import multiprocessing
import re
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch.utils.data import DataLoader

from hf_ddpm.data.batches import MicroBatches, epoch_order
from hf_ddpm.data.decoding import name_of
from hf_ddpm.data.shard_batches import BlockStart, StreamBatches, newest_block_starts
from hf_ddpm.data.shards import ImageStream
from hf_ddpm.data.sources import open_dataset
from hf_ddpm.runtime.processes import Processes
from hf_ddpm.runtime.signals import leave_signals_to_parent
from hf_ddpm.training.checkpoint import Progress
from hf_ddpm.training.run import Run


@dataclass(frozen=True)
class Loader:
    """The micro-batches of this process, in order, and the worker processes that load them."""

    batches: Iterator[dict[str, Any]]
    workers: list[Any]


def open_loader(run: Run, progress: Progress, num_steps: int) -> Loader:
    """Open the micro-batches of `num_steps` steps from `progress` on."""
    config = run.config
    cut: dict[str, Any] = {
        "seed": config.seed,
        "random_flip": config.random_flip,
        "batch_size": config.train_batch_size,
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
    # Garbage collection in the workers would write to every object that they inherit, and so copy its page of memory.
    gc.freeze()
    batches = iter(loader)
    gc.unfreeze()
    # torch would raise the death of a worker wherever this process is, perhaps between the halves of a step; without
    # this handler it is the next batch that raises it.
    in_main_thread = threading.current_thread() is threading.main_thread()
    if hasattr(signal, "SIGCHLD") and config.dataloader_num_workers and in_main_thread:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    return Loader(batches, [child for child in multiprocessing.active_children() if child not in other_children])


def next_batches(loader: Loader, count: int) -> tuple[list[dict[str, Any]], Exception | None]:
    """Return the micro-batches of a step, or the error that kept them from coming.

    The error is returned so that all processes can end together.
    """
    try:
        return [next(loader.batches) for _ in range(count)], None
    except Exception as error:  # a file system and a worker process raise errors of any type
        return [], error


def explain_loader_failure(error: Exception, workers: list[Any]) -> str:
    """Explain why no batch came: a worker process died, or its error message without the traceback."""
    for worker in workers:
        worker.join(timeout=1)
        if worker.exitcode:
            code = worker.exitcode
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
            return f"process {worker.pid}, which loads data, {how}: is there memory for all dataloader_num_workers?"
    lines = [line for line in str(error).splitlines() if line.strip()]
    # A worker's error begins with its class.
    return re.sub(r"^[\w.]+Error: ", "", lines[-1]) if lines else type(error).__name__


def advance_stream(progress: Progress, micro_batches: list[dict[str, Any]]) -> Progress:
    """Record the newest block start of each substream, and count the unreadable images."""
    stream: Any = progress.stream
    starts = [BlockStart(**start) for start in stream["block_starts"]]
    starts += [start for batch in micro_batches for start in batch["block_starts"]]
    num_bad = sum(int(batch["num_bad"]) for batch in micro_batches)
    stream = {**stream, "block_starts": [start._asdict() for start in newest_block_starts(starts)]}
    return replace(progress, stream=stream, num_bad_images=progress.num_bad_images + num_bad)


def merge_block_starts(processes: Processes, progress: Progress, first: Progress) -> Progress:
    """Merge what all processes read of a stream: the newest block starts, and the unreadable images since `first`."""
    stream: Any = progress.stream
    everyones = processes.gather(lambda: (stream["block_starts"], progress.num_bad_images - first.num_bad_images))
    starts = newest_block_starts(BlockStart(**start) for starts, _ in everyones for start in starts)
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
    if run.images.num_bad:
        return [f"readable image {row}" for row in rows]
    try:
        dataset = open_dataset(run.config)
        return [name_of(dataset[row][dataset.column_names[0]], row) for row in rows]
    except Exception:  # the images are in the cache, their files may be gone
        return [f"row {row}" for row in rows]
