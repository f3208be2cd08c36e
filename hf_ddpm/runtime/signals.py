"""A run that is asked to end: by a signal, or by its time being up.

first SIGTERM, SIGINT or SIGUSR1     the step is finished, a checkpoint written; exit code STOPPED
second                               ends at once, as the signal does by default
LAUNCHER_ENDED                       like a first one, never a second
"""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

STOPPED = 75  # EX_TEMPFAIL of sysexits.h: try again later
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]
# torchrun passes on to its workers what all processes of a job have got.
SAME_SECONDS = 1.0 if "TORCHELASTIC_RUN_ID" in os.environ else 0.0
# What `launch.follow_launcher` asks the kernel for.
LAUNCHER_ENDED = getattr(signal, "SIGRTMIN", None)


class StoppedOnPurpose(SystemExit):
    """Ends the process with the code STOPPED: a checkpoint was written, from which the run goes on."""

    def __init__(self) -> None:
        super().__init__(STOPPED)


class StopRequest:
    """Within it, signals are noted instead of obeyed; in a thread other than the main one, only the time counts."""

    def __init__(self, max_hours: float | None, started: float):
        self.deadline = None if max_hours is None else started + 3600 * max_hours
        self.max_hours = max_hours
        self.signal_reason: str | None = None
        self.signal_time = 0.0
        self.handlers: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            numbers = [*SIGNALS, LAUNCHER_ENDED] if LAUNCHER_ENDED is not None else SIGNALS
            self.handlers = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, signal.SIG_IGN if number == LAUNCHER_ENDED else handler)

    def reason(self, num_steps: int) -> str | None:
        """Why the run is to end, or None; after at least one step of this start if its time is up."""
        if self.signal_reason is None and self.deadline is not None and num_steps and time.monotonic() > self.deadline:
            return f"max_train_hours = {self.max_hours:g} are over"
        return self.signal_reason

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.signal_reason is None:
            name = "the end of the launcher" if number == LAUNCHER_ENDED else signal.Signals(number).name
            self.signal_reason, self.signal_time = f"{name} was noticed", time.monotonic()
        elif number != LAUNCHER_ENDED and time.monotonic() > self.signal_time + SAME_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def leave_signals_to_parent(_: int) -> None:
    """For processes that load data: a Ctrl-C or a notice is for the process that trains; SIGTERM ends them."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)
