"""The processes of a run: how they share work, and how all of them learn what one of them computed.

share  a contiguous range of the items 0, ..., count - 1; the shares of all processes, by rank, are all items in order
rank   the number of a process, from 0; the process of rank 0 is the main one, which prints and writes

There is one way to share work. Each process computes the items of its own share, and `gather` brings the results
together in the order of ranks, which is the order of items. A result is therefore the same for any number of processes
if each item is computed in the same way whoever computes it. Items whose last bits depend on what they are computed
with, as images in a forward pass, are shared by whole batches.

Objects travel over gloo, in main memory, whatever backend carries the gradients: no device waits for them.
"""

from __future__ import annotations

import os
import pickle
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm.auto import tqdm

from hf_ddpm.runtime.errors import UsageError, in_one_line
from hf_ddpm.runtime.files import existing_parent
from hf_ddpm.runtime.launch import environment_number, is_on_several_machines
from hf_ddpm.runtime.meeting import explain_lost_process, limit_silence, meeting

Value = TypeVar("Value")

# Work of fewer items than this shows no progress bar.
_MIN_ITEMS_OF_PROGRESS_BAR = 20
# A machine may see a file of another one late.
_SECONDS_OF_A_FILE, _SECONDS_BETWEEN_LOOKS = 5, 0.2


class Processes:
    """The processes that share the work: those of torch.distributed's process group, or this one alone.

    Attributes:
        rank: The number of this process, in [0, size).
        size: The number of processes.

    Args:
        timeout: The longest time for which one process may work while the others wait for it.
    """

    def __init__(self, timeout: timedelta = timedelta(days=7)) -> None:
        self.rank, self.size = 0, 1
        self._group: Any = None
        if dist.is_available() and dist.is_initialized():
            self.rank, self.size = dist.get_rank(), dist.get_world_size()
        if self.size > 1:
            self._group = dist.new_group(backend="gloo", timeout=timeout)
            limit_silence()

    def split(self, count: int) -> range:
        """Return the share of this process of `count` items.

        Shares differ in length by one at most; the first ones are the longer ones, and one of no items is possible.
        """
        first, end = (-(-count * rank // self.size) for rank in (self.rank, self.rank + 1))
        return range(first, end)

    def split_evenly(self, count: int) -> list[int]:
        """Return the share of this process of `count` items, at least one, made as long as the longest share.

        The last item is repeated for it. A network whose weights are divided among the processes needs this: each
        forward pass is one of all processes.
        """
        share = [*self.split(count)] or [count - 1]
        longest = -(-count // self.size)
        return share + share[-1:] * (longest - len(share))

    def gather(self, compute: Callable[[], Value]) -> list[Value]:
        """Return what each process computed, by rank.

        Raises:
            Exception: On all processes, what `compute` raised on one of them.
        """
        outcome = self._outcome(compute)
        outcomes: list[Any] = [outcome]
        if self.size > 1:
            outcomes = [None] * self.size
            dist.all_gather_object(outcomes, outcome, group=self._group)
            outcomes[self.rank] = outcome  # an error with its traceback, which a copy has lost
        for _, error in outcomes:
            if error is not None:
                raise error
        return [value for value, _ in outcomes]

    def _outcome(self, compute: Callable[[], Value]) -> Any:
        """Return what `compute` returned and None, or None and what it raised; one process alone raises it."""
        try:
            return compute(), None
        except Exception as error:
            if self.size == 1:
                raise
            return None, _sendable(error)

    def map(self, compute: Callable[[int], Value], count: int, label: str) -> list[Value]:
        """Return compute(0), ..., compute(count - 1), each computed by one process and known to all.

        Args:
            compute: A function of an item's number.
            label: What the progress bar of the main process is called. The bar counts the items of its own share.

        Raises:
            Exception: On all processes, what `compute` raised on one of them.
        """
        is_quiet = self.rank > 0 or count < _MIN_ITEMS_OF_PROGRESS_BAR

        def compute_share() -> list[Value]:
            share = self.split(count)
            return [compute(item) for item in tqdm(share, self.label(label), unit="batch", disable=is_quiet)]

        return [value for share in self.gather(compute_share) for value in share]

    def gather_rows(self, rows: Tensor, count: int) -> Tensor:
        """Return the rows of all processes in order, on the CPU.

        Args:
            rows: One row for each item of this process' share of `count` items; rows after those, which
                `split_evenly` asks for, are dropped.

        Returns:
            A tensor of `count` rows.
        """
        own = rows[: len(self.split(count))].cpu()
        # A view would be sent with all that it is a view of.
        return torch.cat(self.gather(own.clone))

    def label(self, text: str) -> str:
        """Return the label of a progress bar, which says that there are more processes."""
        return text if self.size == 1 else f"{text} (process {self.rank + 1} of {self.size})"

    def require_equal(
        self, value: object, what: str, remedy: str = "give all machines the same files, and start again"
    ) -> None:
        """Check that all processes have the same value.

        Args:
            what: The value's name, for the message.
            remedy: What to do about it, likewise.

        Raises:
            UsageError: On all processes, when one has another value than the main one.
        """
        values = self.gather(lambda: value)
        differing_ranks = [rank for rank, other in enumerate(values) if other != values[0]]
        if differing_ranks:
            raise UsageError(
                f"all processes must have the same {what}, but process {differing_ranks[0]} differs from process 0: "
                f"{remedy}"
            )

    def require_shared_folder(self, name: str, folder: Path) -> None:
        """Check that all machines see the same folder: one writes a file where it is or will be, all look for it.

        Args:
            name: The setting that names the folder, for the message.
            folder: The folder, which need not exist.

        Raises:
            UsageError: On all processes, when a machine does not see it.
            OSError: On all processes, when the main one cannot write there.
        """
        if not is_on_several_machines():
            return
        own = folder.absolute()

        def write() -> tuple[int, str]:
            existing = existing_parent(own)
            mark = f".hf-ddpm-{secrets.token_hex(8)}"
            (existing / mark).touch()
            # How far up, since machines may have mounted the folder at other places.
            return len(own.parts) - len(existing.parts), mark

        num_up, mark = self.on_main(write)
        path = [own, *own.parents][num_up] / mark
        try:
            seen = self.gather(lambda: (_appears(path), socket.gethostname()))
        finally:
            if self.rank == 0:
                path.unlink(missing_ok=True)
        for rank, (is_seen, host) in enumerate(seen):
            if not is_seen:
                raise UsageError(
                    f"{name} must be a folder that all machines share, got {str(folder)!r}, in which process {rank} "
                    f"on {host} does not see what process 0 on {seen[0][1]} writes: give one of a shared file system"
                )

    def main_then_rest(self, compute: Callable[[], Value], is_main: bool | None = None) -> Value:
        """Compute a value on the main process, then on the others, which find what the main one left on the disk.

        Args:
            compute: A function that leaves on the disk what takes long.
            is_main: Whether this process is one of those that compute first; None: the main process alone does.
                Machines that share no disk need one each.

        Raises:
            Exception: On all processes, what `compute` raised on one of them.
        """
        comes_first = self.rank == 0 if is_main is None else is_main
        values: list[Value] = []
        self.gather(lambda: values.append(compute()) if comes_first else None)
        self.gather(lambda: None if comes_first else values.append(compute()))
        return values[0]

    def on_main(self, compute: Callable[[], Value]) -> Value:
        """Compute a value on the main process alone, and return it on all processes.

        Raises:
            Exception: On all processes, what `compute` raised.
        """
        outcomes: list[Any] = [self._outcome(compute) if self.rank == 0 else None]
        if self.size > 1:
            # A gather would send as many bytes for each of the others, which have nothing to say.
            dist.broadcast_object_list(outcomes, src=0, group=self._group)
        [(value, error)] = outcomes
        if error is not None:
            raise error
        return value

    def any(self, flags: list[bool]) -> list[bool]:
        """Return for each flag whether it is set on any process; this is cheap enough for each training step."""
        if self.size == 1:
            return flags
        votes = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(votes, dist.ReduceOp.MAX, group=self._group)
        return [bool(vote) for vote in votes]


def _appears(path: Path) -> bool:
    """Return whether a file that another machine has written is seen here, some seconds later if need be."""
    end = time.monotonic() + _SECONDS_OF_A_FILE
    while not path.exists():
        if time.monotonic() >= end:
            return False
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    return True


def _sendable(error: Exception) -> Exception:
    """Return the error, or one with its text if another process could not unpickle it."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(in_one_line(error, with_type=True))
    return error


@contextmanager
def join_processes() -> Iterator[Processes]:
    """Join the processes that `accelerate launch` or torchrun started, for the duration of a `with` block.

    A process group that exists already is used, and left as it is. Without either, this process works alone.
    """
    is_launched = environment_number("WORLD_SIZE", 1) > 1
    must_join = is_launched and dist.is_available() and not dist.is_initialized()
    if must_join:
        with meeting():
            dist.init_process_group("gloo")
    try:
        with explain_lost_process("Start all processes again."):
            yield Processes()
    finally:
        if must_join:
            dist.destroy_process_group()


def share_cores(num_processes: int = 1, num_threads: int | None = None) -> None:
    """Give this process its part of the machine's cores.

    A launcher sets OMP_NUM_THREADS to 1 unless it is told otherwise, so that most cores would be idle.

    Args:
        num_processes: The processes of this machine, unless the launcher says how many there are.
        num_threads: The number of threads. None: the cores divided by the processes, unless OMP_NUM_THREADS asks for
            more than one.
    """
    processes = environment_number("LOCAL_WORLD_SIZE", num_processes)
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    elif os.environ.get("OMP_NUM_THREADS", "1") == "1":
        torch.set_num_threads(max(1, available // processes))
