"""The pushes of a run while it trains: in the background, so that no failure stops or delays the training."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path

from hf_ddpm.runtime.errors import PushError, UsageError, in_one_line

RETRY_PAUSES_SECONDS = (15.0, 60.0, 240.0, 900.0)  # after the first failure, the second, ...; the last stays
# The same when the run has ended and waits; after them a push is given up.
FINAL_RETRY_PAUSES_SECONDS = (2.0, 10.0)

# Sends a folder of copies with a message. The function that it gets says, also after a long upload, whether these
# copies are still wanted.
Send = Callable[[Path, str, Callable[[], bool]], None]


class Pusher:
    """A thread that pushes a run while it trains, and that nobody waits for.

    It pushes the newest state. A state that has not left when a newer one arrives is dropped. A failure is reported
    and tried again, each time after a longer pause. `HfApi.run_as_future` would not do: at the end of a process,
    Python waits for its thread.

    Attributes:
        sent: The message of the push that arrived last; None before the first one.

    Args:
        name: The repository, for messages.
        send: A function that sends copies of files there. It raises PushError.
        print_line: Shows a line to the user.
    """

    def __init__(self, name: str, send: Send, print_line: Callable[[str], None]):
        self.name = name
        self.send = send
        self.print_line = print_line
        self.sent: str | None = None
        self._changed = threading.Condition()
        self._pending: tuple[Path, str] | None = None  # the copied files, and the message of their commit
        self._unsent: str | None = None  # the newest message, until it has arrived
        self._is_sending = False
        self._is_finishing = False
        self._is_closed = False
        self._is_abandoned = False
        self._thread = threading.Thread(target=self._work, name="push", daemon=True)
        self._thread.start()

    def start(self, copy: Callable[[], Path], message: str) -> None:
        """Copy files as they are, and return before anything is sent.

        Args:
            copy: A function that returns a new folder with what is sent. The folder stands on the disk of the run:
                there the copies are hard links, and the next start deletes what a killed run left.
            message: The commit's message.

        Raises:
            OSError: When a file cannot be copied, or is damaged.
        """
        try:
            files = copy()
        except UsageError as error:  # somebody is editing a file
            raise OSError(str(error)) from error
        with self._changed:
            self._discard_pending()
            self._pending = files, message
            self._unsent = message
            if self._is_closed:
                self._discard_pending()
            self._changed.notify_all()

    def finish(self, seconds: float) -> str | None:
        """Give what was started `seconds` to arrive, then end.

        Returns:
            The message of the newest push if that has not arrived, or None.
        """
        with self._changed:
            self._is_finishing = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._pending is None and not self._is_sending, seconds)
            unsent, self._unsent = self._unsent, None
        self.close(0)
        return unsent

    def close(self, seconds: float) -> None:
        """Start no further push, and give the one that is on its way `seconds` to arrive."""
        with self._changed:
            self._is_closed = True
            self._discard_pending()
            self._changed.notify_all()
        self._thread.join(seconds)
        self._is_abandoned = True  # it must not replace what is pushed after this

    def unsent(self) -> str | None:
        """Return the message of the newest push if that has not arrived, or None."""
        with self._changed:
            return self._unsent

    def _discard_pending(self) -> None:
        if self._pending is not None:
            shutil.rmtree(self._pending[0], ignore_errors=True)
        self._pending = None

    def _work(self) -> None:
        num_failures = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending is not None or self._is_closed)
                if self._pending is None:
                    return
                (files, message), self._pending = self._pending, None
                self._is_sending = True
            failure = self._push(files, message)
            with self._changed:
                self._is_sending = False
                if failure is None:
                    num_failures, self.sent = 0, message
                    if self._unsent == message:
                        self._unsent = None
                    shutil.rmtree(files, ignore_errors=True)
                    self._changed.notify_all()
                    continue
                pause_seconds = self._handle(failure, files, message, num_failures)
                num_failures += 1
                self._changed.notify_all()
                if self._pause(pause_seconds):
                    num_failures = 0

    def _pause(self, seconds: float) -> bool:
        """Wait after a failure, but no longer than until the run begins to wait; return whether it did."""
        was_finishing = self._is_finishing
        return self._changed.wait_for(lambda: self._is_closed or self._is_finishing != was_finishing, seconds)

    def _push(self, files: Path, message: str) -> PushError | None:
        """Push the copied files, and return the error if that fails."""
        try:
            self.send(files, message, lambda: not self._is_abandoned)
        except PushError as error:
            return error
        except Exception as error:  # nothing that happens here may end a training
            return PushError(in_one_line(error, with_type=True), is_transient=False)
        return None

    def _handle(self, failure: PushError, files: Path, message: str, num_failures: int) -> float:
        """Report a failed push, and put it back unless it can never succeed or a newer state has arrived.

        Returns:
            The seconds until the next push.
        """
        pauses = FINAL_RETRY_PAUSES_SECONDS if self._is_finishing else RETRY_PAUSES_SECONDS
        pause_seconds = pauses[min(num_failures, len(pauses) - 1)]
        is_given_up = self._is_closed or (self._is_finishing and num_failures >= len(pauses))
        is_tried_again = failure.is_transient and not is_given_up and self._pending is None
        if is_tried_again:
            self._pending = files, message
        else:
            shutil.rmtree(files, ignore_errors=True)
        goes_on = "" if self._is_finishing else ", training continues"
        self.print_line(
            f"the push of {message!r} to {self.name} failed{goes_on}: {failure}"
            + (f". It is tried again in {pause_seconds:g} s" if is_tried_again else "")
        )
        return pause_seconds
