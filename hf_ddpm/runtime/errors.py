"""What a run and its user can be told to be wrong."""

from __future__ import annotations


class UsageError(ValueError):
    """A setting or an input that cannot work: the message names the value and the remedy."""


class RunError(RuntimeError):
    """A run that had to end: the message says why, and how it goes on."""


class PushError(OSError):
    """A push that failed; the message says what to do.

    Args:
        is_transient: whether the same push may succeed later.
    """

    def __init__(self, message: str, is_transient: bool = False):
        super().__init__(message)
        self.is_transient = is_transient
