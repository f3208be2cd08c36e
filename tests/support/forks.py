"""Processes that fork from one in which everything is imported and nothing has happened yet.

A Python of its own takes ten seconds to import what training imports.
"""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import pickle
import runpy
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module, reload
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image
from torch.distributed.elastic.rendezvous import dynamic_rendezvous

from hf_ddpm.hub.card import write_card

IMPORTED = ("hf_ddpm.cli", "hf_ddpm.training.loop", "datasets", "matplotlib.figure", "matplotlib.backends.backend_agg")

forking = multiprocessing.get_context("fork")
_mother: Any = None  # the connection to it


@contextmanager
def mother_of_processes() -> Iterator[None]:
    """Fork the process from which all `Process` fork: a copy of this one, before its first test."""
    global _mother
    for name in IMPORTED:
        import_module(name)
    Image.init()  # which imports what reads each format
    with TemporaryDirectory() as folder:
        write_card(folder)  # whose template each process would compile
    # torch names the caller in each event of its elastic agent. It looks through the thousands of modules that are
    # imported here for each caller that is in none of them, which takes more time than all else that the agent does.
    dynamic_rendezvous.get_method_name = lambda depth=2: sys._getframe(depth).f_code.co_name
    _mother, there = multiprocessing.Pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, of which the copy has none
        pid = os.fork()
    if pid == 0:
        try:
            _mother.close()
            _forget_pytest()
            signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup lets be ignored
            gc.freeze()  # else each process visits, and so copies, all that it has in common with this one
            _serve(there)
        finally:
            os._exit(0)
    there.close()
    try:
        yield
    finally:
        _mother.close()
        _mother = None
        os.waitpid(pid, 0)


def _forget_pytest() -> None:
    """Write to stdout and stderr again, as they are in each process that forks; make no error of a warning."""
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    warnings.resetwarnings()
    warnings.simplefilter("ignore", DeprecationWarning)
    for logger in (logging.root, *logging.root.manager.loggerDict.values()):
        for handler in getattr(logger, "handlers", ()):
            if type(handler) is logging.StreamHandler:
                handler.setStream(sys.stderr)


def _serve(requests: Connection) -> None:
    """Start a process for each target, and answer with its id; wait for a process for each id and time."""
    children: dict[int, Any] = {}
    while True:
        try:
            request = requests.recv()
        except EOFError:  # the tests have ended
            return
        if isinstance(request, bytes):
            child: Any = forking.Process(target=_run, args=(request,))
            child.start()
            children[child.pid] = child
            requests.send(child.pid)
        else:
            pid, timeout = request
            children[pid].join(timeout)
            requests.send(children[pid].exitcode)


def _run(pickled: bytes) -> None:
    target, arguments = pickle.loads(pickled)
    target(*arguments)


class Process:
    """What `multiprocessing.Process` is, but forked from the mother of processes."""

    def __init__(self, target: Callable[..., object], args: Sequence[Any] = ()) -> None:
        self.pickled = pickle.dumps((target, args))
        self.pid = 0
        self.exitcode: int | None = None

    def start(self) -> None:
        self.pid = self._ask(self.pickled)

    def join(self, timeout: float | None = None) -> None:
        if self.exitcode is None:
            self.exitcode = self._ask((self.pid, timeout))

    def kill(self) -> None:
        if self.exitcode is None:
            os.kill(self.pid, signal.SIGKILL)

    @staticmethod
    def _ask(request: bytes | tuple[int, float | None]) -> Any:
        assert _mother is not None, "conftest.py forks it when tests.support.forks was imported with the tests"
        _mother.send(request)
        return _mother.recv()


def write_output_to(path: Path | str, errors: Path | str | None = None) -> None:
    """Append what this process writes to stdout and stderr to a file, or to two."""
    for stream, file in enumerate((path, errors or path), 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT), stream)


def python(
    words: Sequence[str],
    folder: Path,
    environment: Mapping[str, str] | None,
    log: Path,
    errors: Path | None = None,
) -> Process:
    """Return a process that does what `python WORDS` does in a folder, but has everything imported already.

    Args:
        words: A script, or `-m` and a module, or `-c` and code; and its arguments.
        environment: All of it; None for that of the tests.
        log: To what it appends its stdout and stderr.
        errors: To what it appends its stderr instead, if not None.
    """
    environment = dict(os.environ if environment is None else environment)
    return Process(_be_python, (list(words), folder, environment, log, errors))


def _be_python(words: list[str], folder: Path, environment: dict[str, str], log: Path, errors: Path | None) -> None:
    write_output_to(log, errors)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    _read_environment_again()
    warnings.simplefilter("ignore")
    import torch

    torch.set_num_threads(1)
    kind = words[0] if words[0] in ("-m", "-c") else "script"
    sys.argv = words if kind == "script" else words[1:] if kind == "-m" else ["-c", *words[2:]]
    if kind == "-m":
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        runpy.run_path(words[0], run_name="__main__")


def _read_environment_again() -> None:
    """Let huggingface_hub and Accelerate read what they read when they are imported."""
    import huggingface_hub
    from accelerate.commands import config
    from huggingface_hub import constants

    reload(config.config_args)
    reload(config)
    reload(constants)
    huggingface_hub.hf_api.api.endpoint = constants.ENDPOINT
