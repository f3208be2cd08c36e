"""A run that is asked to end: by a signal, by the loss of whoever reads its output, or by its time being up.

first of SIGNALS      The step is finished and a checkpoint written; the exit code is STOPPED.
second                The process ends at once, as the signal does by default. In a notebook, whose process is to live
                      on, a second SIGINT raises KeyboardInterrupt.
LAUNCHER_ENDED        It counts as a first signal, never as a second.
SIGHUP under nohup    It stays ignored.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

from hf_ddpm.runtime import slurm
from hf_ddpm.runtime.errors import RunError
from hf_ddpm.runtime.format import format_duration

STOPPED = 75  # EX_TEMPFAIL of sysexits.h: try again later
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP") if hasattr(signal, name)]
# torchrun and srun pass signals on, which a terminal or scheduler may have sent to all processes already.
SAME_SECONDS = 1.0 if "TORCHELASTIC_RUN_ID" in os.environ or "SLURM_STEP_ID" in os.environ else 0.0
# A run stops so long before the end of its job, which kills it, or a tenth of the time that is left if that is less.
JOB_MARGIN_SECONDS = 300
# What `accelerate launch` tells every process, and torchrun too.
LAUNCHER_VARIABLES = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")
# The signal that `launch.exit_with_launcher` asks the kernel for.
LAUNCHER_ENDED = getattr(signal, "SIGRTMIN", None)


class StoppedOnPurpose(RunError):
    """The end of a run that was asked to end; a checkpoint was written. A command then ends with the code STOPPED."""


def noted_signals() -> list[signal.Signals]:
    """Return those of SIGNALS that end a run: SIGHUP does not under nohup, which lets it be ignored."""
    return [n for n in SIGNALS if n.name != "SIGHUP" or signal.getsignal(n) != signal.SIG_IGN]


def hours_in_job(started: float) -> tuple[float | None, str | None]:
    """Return the hours after which a run is to end so that its job of SLURM does not end it.

    Args:
        started: The start of the run, in seconds of `time.monotonic`.

    Returns:
        The hours from that start on, None without a limit; and a line that says what was read, None outside a job.
    """
    if slurm.job() is None:
        return None, None
    name = f"job {slurm.job()} of SLURM"
    try:
        left = slurm.job_seconds_left()
    except OSError as error:
        return None, f"the time limit of {name} is not known, {error}: to stop before it, give max_train_hours"
    if left is None:
        return None, f"{name} has no time limit"
    left = max(left, 0)
    margin = min(JOB_MARGIN_SECONDS, left / 10)
    hours = (time.monotonic() - started + left - margin) / 3600
    return hours, (
        f"max_train_hours is {hours:.4g}: {name} ends in {format_duration(left)}, and {format_duration(margin)} are "
        "for a checkpoint"
    )


class StopRequest:
    """A context in which signals are noted instead of obeyed, and output that cannot be written is dropped.

    Only the main thread of a process receives signals; in another thread only the time counts.

    Args:
        max_hours: The hours after which a run is to end; None for no limit.
        started: The start of the run, in seconds of `time.monotonic`.
    """

    def __init__(self, max_hours: float | None, started: float):
        self.deadline = None if max_hours is None else started + 3600 * max_hours
        self.max_hours = max_hours
        self.signal_reason: str | None = None
        self.signal_time = 0.0
        self.handlers: dict[int, Any] = {}
        self.streams: tuple[Any, Any] | None = None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            numbers = noted_signals() + ([] if LAUNCHER_ENDED is None else [LAUNCHER_ENDED])
            self.handlers = {number: signal.signal(number, self._note) for number in numbers}
            self.streams = sys.stdout, sys.stderr
            sys.stdout, sys.stderr = (Output(stream, self._note_lost_reader) for stream in self.streams)
        return self

    def __exit__(self, *_: object) -> None:
        # What is left to do after the steps is not worth ending for the end of the launcher.
        is_launched = any(name in os.environ for name in LAUNCHER_VARIABLES)
        for number, handler in self.handlers.items():
            signal.signal(number, signal.SIG_IGN if number == LAUNCHER_ENDED and is_launched else handler)
        if self.streams is not None:
            sys.stdout, sys.stderr = self.streams

    def reason(self, num_steps: int) -> str | None:
        """Return why the run is to end, or None if it is not.

        Args:
            num_steps: The steps of this start. A run whose time is up takes at least one.
        """
        if self.signal_reason is None and self.deadline is not None and num_steps and time.monotonic() > self.deadline:
            return f"max_train_hours = {self.max_hours:g} are over"
        return self.signal_reason

    def is_due(self, num_steps: int) -> bool:
        """Return whether the run is to end after so many steps of this start."""
        return self.reason(num_steps) is not None

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.signal_reason is None:
            name = "the end of the launcher" if number == LAUNCHER_ENDED else signal.Signals(number).name
            self.signal_reason, self.signal_time = f"{name} was noticed", time.monotonic()
        elif number != LAUNCHER_ENDED and time.monotonic() > self.signal_time + SAME_SECONDS:
            is_interactive = number == signal.SIGINT and hasattr(sys, "ps1")  # as in a notebook
            signal.signal(number, (is_interactive and self.handlers[number]) or signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def _note_lost_reader(self) -> None:
        if self.signal_reason is None:
            self.signal_reason, self.signal_time = "nobody reads the output any more", time.monotonic()


class Output:
    """A text stream that drops what cannot be written, since no line is worth a run.

    Args:
        stream: The stream to write to; it may be None, as `sys.stdout` without a console.
        note_lost_reader: A function to call when nobody reads the stream any more: a closed pipe or terminal.
    """

    def __init__(self, stream: Any, note_lost_reader: Callable[[], None]):
        self.stream = stream
        self.note_lost_reader = note_lost_reader

    def write(self, text: str) -> int:
        """Write a text, or drop it."""
        try:
            return len(text) if self.stream is None else self.stream.write(text)
        except OSError as error:
            self._drop(error)
            return len(text)

    def flush(self) -> None:
        """Flush what was written, or drop it."""
        try:
            if self.stream is not None:
                self.stream.flush()
        except OSError as error:
            self._drop(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def _drop(self, error: OSError) -> None:
        if error.errno not in (errno.EPIPE, errno.EIO):  # as a full disk, on which there may be room again
            return
        self.note_lost_reader()
        # What follows is written to nothing, also by other writers and when the process ends.
        with suppress(OSError), open(os.devnull, "w") as nothing:  # the stream of a notebook has no number
            os.dup2(nothing.fileno(), self.stream.fileno())


def leave_signals_to_parent(_: int) -> None:
    """Ignore signals but SIGTERM, which are meant for the process that trains, in a process that loads data."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)
