"""Work in processes of its own, what it costs each of them, and what it holds in memory."""

from __future__ import annotations

import ctypes
import gc
import json
import multiprocessing
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

MIB = 2**20
_forking = multiprocessing.get_context("fork")


def in_processes(count: int, work: Callable[..., Any], *arguments: Any, **variables: str) -> list[Any]:
    """Return what each of `count` new processes returned, by rank; their environment is that of a launcher."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        children = []
        for rank in range(count):
            launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
            launched |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
            environment = {**(launched if count > 1 else {}), **variables}
            path = Path(folder, str(rank))
            children.append(_forking.Process(target=_child, args=(path, environment, work, arguments)))
        free.close()
        for child in children:
            child.start()
        for child in children:
            child.join()
        if any(child.exitcode for child in children):
            raise SystemExit(f"{work.__name__}{arguments} failed in {count} processes")
        return [json.loads(Path(folder, str(rank)).read_text()) for rank in range(count)]


def _child(path: Path, environment: dict[str, Any], work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ.update({name: str(value) for name, value in environment.items()})
    torch.set_num_threads(1)
    free_memory()
    path.write_text(json.dumps(work(*arguments)))


def processor_seconds(work: Callable[[], object]) -> float:
    """Return the seconds of the processor that a function takes in this process."""
    started = time.process_time()
    work()
    return time.process_time() - started


def free_memory() -> None:
    """Give memory that is held and not used back: what is measured next would use it, and seem to take less."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def held_bytes() -> int:
    """Return the bytes of memory that this process holds, without files that are mapped."""
    lines = Path("/proc/self/status").read_text().splitlines()
    held = {name: int(value.split()[0]) for name, _, value in (line.partition(":") for line in lines) if "Rss" in name}
    return 1024 * (held["RssAnon"] + held["RssShmem"])


class Peak:
    """The most bytes that were held beyond those at the start of a `with` block.

    Attributes:
        added: They.
    """

    added = 0


@contextmanager
def peak_of_memory() -> Iterator[Peak]:
    """Watch the memory of this process for the duration of a `with` block."""
    free_memory()
    peak, before, is_over = Peak(), held_bytes(), threading.Event()

    def watch() -> None:
        while not is_over.wait(0.002):
            peak.added = max(peak.added, held_bytes() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        is_over.set()
        thread.join()
