"""The errors that a user of the package is told about."""

from __future__ import annotations


class UsageError(ValueError):
    """A setting or an input that cannot work; the message names the value and the remedy."""


class MissingSplitError(UsageError):
    """A split that the data do not have."""


class RunError(RuntimeError):
    """The end of a run that could not continue; the message says why, and how to resume it."""


class PushError(OSError):
    """A push that failed; the message says what to do.

    Args:
        message: What failed, and the remedy.
        is_transient: Whether the same push may succeed later.
    """

    def __init__(self, message: str, is_transient: bool = False):
        super().__init__(message)
        self.is_transient = is_transient
