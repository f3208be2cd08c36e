"""The errors that a user of the package is told about, and what the errors of other libraries say."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# A token of the Hub, and whatever a request sends as one.
_TOKEN = re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{16,}|(?<=Bearer )[^\s'\"]{16,}")
_HIDDEN = "hf_..."
MIN_TOKEN_LENGTH = 16


class UsageError(ValueError):
    """A setting or an input that cannot work; the message names the value and the remedy."""


class MissingSplitError(UsageError):
    """A split that the data do not have."""


class RunError(RuntimeError):
    """The end of a run that could not continue; the message says why, and how to resume it."""


class UnwrittenError(RunError):
    """A failure to write results that were measured, but could not be written.

    Args:
        message: What could not be written, and why.
        result: The results.
    """

    def __init__(self, message: str, result: dict[str, Any]):
        super().__init__(message)
        self.result = result


class PushError(OSError):
    """A push that failed; the message says what to do.

    Args:
        message: What failed, and the remedy.
        is_transient: Whether the same push may succeed later.
    """

    def __init__(self, message: str, is_transient: bool = False):
        super().__init__(message)
        self.is_transient = is_transient


def in_one_line(error: BaseException, with_type: bool = False) -> str:
    """Return the message of another library's error without line breaks, and without tokens of the Hub.

    Never the `repr` of an error: it shows what str() leaves out, as the header that could not be encoded.

    Args:
        error: Any exception.
        with_type: Begin with the type, without which a KeyError says too little.
    """
    message = " ".join(str(error).split())
    name = type(error).__name__
    text = f"{name}: {message}" if with_type and message else message or name
    return without_tokens(text)


@contextmanager
def explain_full_memory(remedy: str) -> Iterator[None]:
    """Raise what torch and numpy say of memory that they do not get as a RunError, with a remedy.

    Args:
        remedy: What the user can do about it, a sentence or more.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        # torch, which is not imported for the name of its error, has one of GPUs and none of the CPU.
        is_of_torch = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
        if not (is_of_torch or isinstance(error, MemoryError)):
            raise
        first_line = without_tokens(str(error).partition("\n")[0]).rstrip(".")
        raise RunError(f"the memory is full: {first_line or 'MemoryError'}. {remedy}") from error


def without_tokens(text: str, *tokens: str | None) -> str:
    """Return a text in which no token of the Hub can be read.

    A text may show a token in another form, a zero-width space as its escape sequence. So each part of a token that
    looks the same in every form is hidden by itself.

    Args:
        text: A message.
        tokens: Tokens to hide beside those of the environment and of `hf auth login`.
    """
    for token in filter(None, (*tokens, *_known_tokens())):
        if not token.startswith("hf_") and len(token) < MIN_TOKEN_LENGTH:
            continue  # a placeholder as `none`, which is part of other words
        for part in re.findall(r"[A-Za-z0-9_.-]{4,}", token):
            text = text.replace(part, _HIDDEN)
    return _TOKEN.sub(_HIDDEN, text)


def _known_tokens() -> list[str | None]:
    tokens = [os.environ.get(name) for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")]
    hub = sys.modules.get("huggingface_hub")  # what has not been imported has not sent a token
    with contextlib.suppress(OSError):  # what may not be read has not been sent either
        return tokens if hub is None else [*tokens, hub.get_token()]
    return tokens
