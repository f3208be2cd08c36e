"""The processes of a run: what each computes of a whole, and what all of them know.

Objects travel over gloo, in main memory, whatever backend carries the gradients. A launcher gives a process one thread
unless told otherwise, which `share_cores` mends.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from tqdm.auto import tqdm

from hf_ddpm.runtime.errors import UsageError

Value = TypeVar("Value")


class Processes:
    """The processes that share the work.

    Args:
        timeout: the longest that one of them may work alone.
    """

    def __init__(self, timeout: timedelta = timedelta(days=7)) -> None:
        self.rank, self.size, self._group = 0, 1, None
        if dist.is_available() and dist.is_initialized():
            self.rank, self.size = dist.get_rank(), dist.get_world_size()
        if self.size > 1:
            # Whatever carries gradients, this carries objects in main memory: nothing waits for a device.
            self._group = dist.new_group(backend="gloo", timeout=timeout)

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

    def gather_rows(self, rows: torch.Tensor, count: int) -> torch.Tensor:
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

    def gather(self, compute: Callable[[], Value]) -> list[Value]:
        """What all processes computed, by rank. Raises: on all of them what one of them raised."""
        mine: tuple[Any, Exception | None]
        try:
            mine = compute(), None
        except Exception as error:
            if self.size == 1:
                raise
            mine = None, _sendable(error)
        found: list[Any] = [mine]
        if self.size > 1:
            found = [None] * self.size
            dist.all_gather_object(found, mine, group=self._group)
            found[self.rank] = mine  # an error with its traceback, which a copy has lost
        for _, error in found:
            if error is not None:
                raise error
        return [value for value, _ in found]

    def require_equal(self, value: object, what: str) -> None:
        """Raises: UsageError on all of them if a process has another value than the first."""
        found = self.gather(lambda: value)
        if odd := [rank for rank, other in enumerate(found) if other != found[0]]:
            raise UsageError(
                f"all processes must have the same {what}, but process {odd[0]} has other than process 0: give all "
                "machines the same files, and start again"
            )

    def main_then_rest(self, compute: Callable[[], Value]) -> Value:
        """Computed by the first process and then by the others, which find what it left on the disk."""
        done: list[Value] = []
        self.gather(lambda: done.append(compute()) if self.rank == 0 else None)
        return done[0] if done else compute()

    def local_main_then_rest(self, compute: Callable[[], Value], is_first: bool) -> Value:
        """Computed by the first process of each machine and then by its others, which find what it left there."""
        done: list[Value] = []
        self.gather(lambda: done.append(compute()) if is_first else None)
        self.gather(lambda: None if is_first else done.append(compute()))
        return done[0]

    def on_main(self, compute: Callable[[], Value]) -> Value:
        """Computed by the first process, known to all."""
        return self.gather(lambda: compute() if self.rank == 0 else None)[0]  # pyright: ignore[reportReturnType]

    def any(self, flags: list[bool]) -> list[bool]:
        """Which of the flags are set on any process; cheap enough for each step."""
        if self.size == 1:
            return flags
        votes = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(votes, dist.ReduceOp.MAX, group=self._group)
        return [bool(vote) for vote in votes]

    def in_rank_order(self, mine: Iterator[Value], count: int, label: str) -> Iterator[Value]:
        """Items 0, ..., count - 1 in order, of which `mine` makes rank, rank + size, ..."""
        with tqdm(desc=label, total=count, unit="batch", disable=self.rank > 0 or count < 20) as progress:
            for first in range(0, count, self.size):
                found: list[Any] = self.gather(lambda: next(mine, None))
                yield from found[: count - first]
                progress.update(min(self.size, count - first))


def _sendable(error: Exception) -> Exception:
    """The error, or one with its text if another process could not make it out."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


@contextmanager
def join_processes() -> Iterator[Processes]:
    """The processes that `accelerate launch` or torchrun started; those of a running process group; or this alone."""
    joins = int(os.environ.get("WORLD_SIZE", "1")) > 1 and dist.is_available() and not dist.is_initialized()
    if joins:
        dist.init_process_group("gloo")
    try:
        yield Processes()
    finally:
        if joins:
            dist.destroy_process_group()


def share_cores(num_processes: int = 1, num_threads: int | None = None) -> None:
    """Gives this process its part of the cores, or `num_threads`, unless OMP_NUM_THREADS asks for more than one."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", str(num_processes)))
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    elif os.environ.get("OMP_NUM_THREADS", "1") == "1":
        torch.set_num_threads(max(1, available // processes))
