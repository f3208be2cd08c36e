"""The errors of the Hub's client, in words that say what to do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)

from hf_ddpm.runtime.errors import PushError, UsageError, in_one_line, without_tokens

NO_TOKEN = "there is no token: hf auth login, or HF_TOKEN in the environment"
# hf-xet, which sends large files, has no type for an answer of the Hub.
_STATUS_OF_XET = re.compile(r"HTTP status (?:client|server) error \((\d{3}) ")
LOCAL_ERRORS = (LookupError, TypeError, AttributeError, FileNotFoundError, PermissionError, IsADirectoryError)


@contextmanager
def as_push_errors(api: HfApi, name: str) -> Iterator[None]:
    """Turn what the client raises in a `with` block into a PushError that says what to do, without the token.

    Args:
        api: The client, whose token must not be shown.
        name: The repository.

    Raises:
        PushError: When the client raises an error. It is transient if the same push may succeed later.
    """
    try:
        yield
        return
    except (PushError, UsageError):
        raise
    except OfflineModeIsEnabled as error:
        raise PushError("HF_HUB_OFFLINE is set: unset it, and try again", is_transient=False) from error
    except LocalTokenNotFoundError as error:
        raise PushError(NO_TOKEN, is_transient=False) from error
    except HFValidationError as error:
        raise PushError(f"{name!r} cannot name a repository: {error}", is_transient=False) from error
    except Exception as error:  # broken connections have many types, none of which huggingface_hub documents
        token = _token_of(api)
        text, is_transient = _explain(hub_error(error), api.endpoint, name, has_token=bool(token))
        text = without_tokens(text, token)
    # Raised outside of the `except` block, so that the client's error, which may show the token, is not its context.
    raise PushError(text, is_transient)


def hub_error(error: BaseException) -> BaseException:
    """Return the error of the Hub's client in a chain of causes, or the first error of the chain if there is none."""
    while not isinstance(error, HfHubHTTPError):
        cause = error.__cause__ or error.__context__
        if cause is None:
            break
        error = cause
    return error


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status with which the Hub answered, or None if it did not answer."""
    response = getattr(error, "response", None) if isinstance(error, HfHubHTTPError) else None
    if response is not None:
        return int(response.status_code)
    status = _STATUS_OF_XET.search(str(error))
    return None if status is None else int(status[1])


def _explain(error: BaseException, endpoint: str, name: str, has_token: bool) -> tuple[str, bool]:
    """Return what went wrong and what to do, and whether the same push may succeed later."""
    status = status_of(error)
    if status is not None:
        answer = str(getattr(error, "server_message", None) or f"HTTP {status}")
        text, is_transient = explain_status(status, name, answer)
        if status == 401 and not has_token:
            text = NO_TOKEN
        return f"{text} ({answer})", is_transient
    if isinstance(error, LOCAL_ERRORS):
        return f"the files here cannot be pushed ({in_one_line(error, with_type=True)})", False
    return f"{endpoint} cannot be reached, or the connection broke ({in_one_line(error, with_type=True)})", True


def explain_status(status: int, name: str, answer: str) -> tuple[str, bool]:
    """Return what an HTTP status of the Hub means for a push, and whether the same push may succeed later."""
    if status in (402, 413, 507) or (status == 403 and "storage" in answer.lower()):
        return f"{name} would be larger than the Hub's limits for it", False
    if status >= 500:
        return "the Hub has an error of its own", True
    meanings = {
        401: ("the Hub does not accept the token: it is wrong or expired, hf auth login makes a new one", False),
        403: (f"the token may not write to {name}: give one with write access, or another name", False),
        404: (f"{name} is not there, or the token may not see it", False),
        409: (f"the name {name} is taken by something else: give another", False),
        412: (f"others are committing to {name} at the same time", True),
        429: ("the Hub asks for fewer requests", True),
    }
    return meanings.get(status, (f"the Hub refuses what was sent to {name}", False))


def _token_of(api: HfApi) -> str:
    """Return the token that the client sends, or "" if there is none."""
    return str(api.token or get_token() or "")
