"""The pushes of a run while it trains: in the background, so that no failure stops or delays the training."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import HfApi

from hf_ddpm.hub.upload import commit, copy_for_upload, create_repository
from hf_ddpm.runtime.errors import PushError, UsageError, in_one_line

RETRY_PAUSES_SECONDS = (15.0, 60.0, 240.0, 900.0)  # after the first failure, the second, ...; the last stays


class Pusher:
    """A thread that pushes a run while it trains, and that nobody waits for.

    It pushes the newest state. A state that has not left when a newer one arrives is dropped. A failure is reported
    and tried again, each time after a longer pause. `HfApi.run_as_future` would not do: at the end of a process,
    Python waits for its thread.

    Args:
        folder: The output folder of the run, which holds its lock. The copies of what is pushed stand in it: there
            they are hard links, and the next start deletes what a killed run left.
        repo_id: The repository.
        token: Default: the token of `hf auth login` or HF_TOKEN.
        revision: The branch.
        public: Create the repository public.
        print_line: Shows a line to the user.
    """

    def __init__(
        self,
        folder: Path,
        repo_id: str,
        token: str | None,
        revision: str,
        public: bool,
        print_line: Callable[[str], None],
    ):
        self.folder = folder
        self.repo_id = repo_id
        self.revision = revision
        self.public = public
        self.print_line = print_line
        self._api = HfApi(token=token)
        self._changed = threading.Condition()
        self._pending: tuple[Path, str] | None = None  # the copied files, and the message of their commit
        self._is_closed = False
        self._is_abandoned = False
        self._thread = threading.Thread(target=self._work, name="push", daemon=True)
        self._thread.start()

    def start(self, message: str, preview: Path | None = None) -> None:
        """Copy the run's files as they are, and return before anything is sent.

        Args:
            message: The commit's message.
            preview: A picture of samples of these weights.

        Raises:
            OSError: When a file cannot be copied, or is damaged.
        """
        try:
            files = copy_for_upload(self.folder, preview=preview, parent=self.folder)
        except UsageError as error:  # somebody is editing a file
            raise OSError(str(error)) from error
        with self._changed:
            self._discard_pending()
            self._pending = files, message
            if self._is_closed:
                self._discard_pending()
            self._changed.notify_all()

    def close(self, seconds: float) -> None:
        """Start no further push, and give the one that is on its way `seconds` to arrive."""
        with self._changed:
            self._is_closed = True
            self._discard_pending()
            self._changed.notify_all()
        self._thread.join(seconds)
        self._is_abandoned = True  # it must not replace what is pushed after this

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
            failure = self._push(files, message)
            if failure is None:
                num_failures = 0
                shutil.rmtree(files, ignore_errors=True)
                continue
            pause_seconds = RETRY_PAUSES_SECONDS[min(num_failures, len(RETRY_PAUSES_SECONDS) - 1)]
            num_failures += 1
            with self._changed:
                self._handle(failure, files, message, pause_seconds)
                self._changed.wait_for(lambda: self._is_closed, pause_seconds)

    def _push(self, files: Path, message: str) -> PushError | None:
        """Push the copied files, and return the error if that fails."""
        try:
            name = create_repository(self._api, self.repo_id, self.public)
            commit(self._api, files, name, self.revision, message, lambda: not self._is_abandoned)
        except PushError as error:
            return error
        except Exception as error:  # nothing that happens here may end a training
            return PushError(in_one_line(error, with_type=True), is_transient=False)
        return None

    def _handle(self, failure: PushError, files: Path, message: str, pause_seconds: float) -> None:
        """Report a failed push, and put it back unless it can never succeed or a newer state has arrived."""
        is_tried_again = failure.is_transient and not self._is_closed and self._pending is None
        if is_tried_again:
            self._pending = files, message
        else:
            shutil.rmtree(files, ignore_errors=True)
        self.print_line(
            f"the push of {message!r} to {self.repo_id} failed, training continues: {failure}"
            + (f". It is tried again in {pause_seconds:g} s" if is_tried_again else "")
        )
