"""The token of the Hub: whether a request can carry it."""

from __future__ import annotations

import os
import unicodedata

import huggingface_hub

from hf_ddpm.runtime.errors import UsageError


def stored_token() -> str | None:
    """Return the token that the client finds, or None.

    Raises:
        UsageError: When the file of the token may not be read.
    """
    try:
        return huggingface_hub.get_token()
    except OSError as error:
        raise UsageError(
            f"the token of hf auth login must be readable, got {error.filename!r}: {error.strerror}; allow it, or put "
            "a folder of your own into HF_HOME"
        ) from error


def check_token(token: str | None = None) -> None:
    """Check that a request can carry the token: the client's own error would show it.

    Args:
        token: The token that was given, if one was; else the one that the client finds is checked.

    Raises:
        UsageError: When the token has a character that no header can carry, as text copied from a page may have.
    """
    origin = "the token that was given"
    if token is None:
        token = stored_token() or ""  # which strips spaces and line breaks at its ends
        origin = "HF_TOKEN" if os.environ.get("HF_TOKEN") else "the token of hf auth login"
    for number, character in enumerate(token, 1):
        if not "!" <= character <= "~":
            name = unicodedata.name(character, "a control character")
            raise UsageError(
                f"{origin} must consist of letters, digits and signs of ASCII, got U+{ord(character):04X} ({name}) as "
                f"character {number} of {len(token)}: copy the token again, without what stands around it"
            )
