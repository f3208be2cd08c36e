"""Pushing a run while it trains: in the background, which no failure stops or delays."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import HfApi

from hf_ddpm.hub.upload import commit, create, stage
from hf_ddpm.runtime.errors import PushError, UsageError

PAUSES_SECONDS = (15.0, 60.0, 240.0, 900.0)  # between the attempts of one push


class Pusher:
    """Pushes a run while it trains, from a thread that is not waited for.

    The newest state goes; one that has not left when a newer is there does not go any more. A failure is said and
    tried again, each time after a longer pause. `HfApi.run_as_future` would hold up the end of a process that was
    asked to stop: Python waits for its thread.

    Args:
        say: shows a line to the user.
    """

    def __init__(
        self, folder: Path, repo_id: str, token: str | None, revision: str, public: bool, say: Callable[[str], None]
    ):
        self.folder, self.repo_id, self.revision, self.public, self.say = folder, repo_id, revision, public, say
        self._api = HfApi(token=token)
        self._changed = threading.Condition()
        self._newest: tuple[Path, str] | None = None
        self._is_over = self._is_abandoned = False
        self._thread = threading.Thread(target=self._work, name="push", daemon=True)
        self._thread.start()

    def start(self, message: str, preview: Path | None = None) -> None:
        """Takes the run's files as they are, and returns before anything is sent. Raises: OSError."""
        try:
            files = stage(self.folder, preview=preview)
        except UsageError as error:  # a file that somebody edits
            raise OSError(str(error)) from error
        with self._changed:
            self._drop()
            self._newest = files, message
            if self._is_over:
                self._drop()
            self._changed.notify_all()

    def close(self, seconds: float) -> None:
        """Starts nothing more; what is on its way has `seconds` to arrive."""
        with self._changed:
            self._is_over = True
            self._drop()
            self._changed.notify_all()
        self._thread.join(seconds)
        self._is_abandoned = True  # it must not replace what is pushed after this

    def _drop(self) -> None:
        if self._newest is not None:
            shutil.rmtree(self._newest[0], ignore_errors=True)
        self._newest = None

    def _work(self) -> None:
        num_failures = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._newest is not None or self._is_over)
                if self._newest is None:
                    return
                (files, message), self._newest = self._newest, None
            try:
                name = create(self._api, self.repo_id, self.public)
                commit(self._api, files, name, self.revision, message, lambda: not self._is_abandoned)
                num_failures, failure = 0, None
            except PushError as error:
                failure = error
            except Exception as error:  # nothing that happens here may end a training
                failure = PushError(f"{type(error).__name__}: {error}", is_transient=False)
            if failure is None:
                shutil.rmtree(files, ignore_errors=True)
                continue
            pause = PAUSES_SECONDS[min(num_failures, len(PAUSES_SECONDS) - 1)]
            num_failures += 1
            with self._changed:
                again = failure.is_transient and not self._is_over and self._newest is None
                if again:
                    self._newest = files, message
                self.say(
                    f"the push of {message!r} to {self.repo_id} failed, training goes on: {failure}"
                    + (f". It is tried again in {pause:g} s" if again else "")
                )
                if not again:
                    shutil.rmtree(files, ignore_errors=True)
                self._changed.wait_for(lambda: self._is_over, pause)
