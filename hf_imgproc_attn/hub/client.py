"""Calls to a Hub that may be busy, and what went wrong with one in a single sentence.

``huggingface_hub`` retries uploads and downloads of files, but not commits, the creation of repositories or look-ups
(seen with 2.4.0): one "too many requests" in the wrong place would end a publication half-way.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError: of whichever HTTP library it uses
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..errors import UsageError

ATTEMPTS = 6
LONGEST_WAIT = 60.0
"""Seconds; a server that asks for more (Retry-After) is not waited for."""
_BUSY = (429, 500, 502, 503, 504)
_HUB_ERRORS = (HTTPError, OSError, HFValidationError)

ResultT = TypeVar("ResultT")


class HubError(UsageError):
    """What a Hub refused or could not do, in one sentence. Contains no token."""


def connect(endpoint: str | None = None) -> HfApi:
    """A client of a Hub; its token is the Hub's own login or ``HF_TOKEN``, never an argument.

    Args:
        endpoint: URL of a Hub; None: ``HF_ENDPOINT``, else the public one.

    Raises:
        HubError: for an endpoint that is no URL, or in offline mode.
    """
    if endpoint is not None and not endpoint.startswith(("http://", "https://")):
        raise HubError(f"endpoint must be a URL such as https://huggingface.co, got {endpoint!r}")
    if constants.is_offline_mode():
        raise HubError("the Hub cannot be asked in offline mode: unset HF_HUB_OFFLINE")
    from hf_imgproc_attn import __version__

    return HfApi(endpoint=endpoint, library_name="hf_imgproc_attn", library_version=__version__)


def patiently(what: str, call: Callable[[], ResultT], *, wait: float = 1.0) -> ResultT:
    """Make a call, again where the Hub is busy or the connection broke.

    Args:
        what: for the message, e.g. ``"create the repository ann/vit"``.
        call: must be safe to repeat after a reply was lost: creations with ``exist_ok``, commits of the same files.
        wait: seconds before the second attempt, doubled every time; a Retry-After of the Hub goes first.

    Raises:
        HubError: when the Hub refuses, or after :data:`ATTEMPTS` attempts.
    """
    attempt = 0
    while True:
        attempt += 1
        try:
            return call()
        except (*_HUB_ERRORS, RuntimeError) as raised:
            # Uploads and downloads hand on what went wrong wrapped in an error that says less.
            wrapped = isinstance(raised, (RuntimeError, LocalEntryNotFoundError))
            error = raised.__cause__ if wrapped and isinstance(raised.__cause__, _HUB_ERRORS) else raised
            if not isinstance(error, _HUB_ERRORS):
                raise
            pause = _pause(error, wait * 2 ** (attempt - 1))
            if pause is None or attempt == ATTEMPTS:
                again = f" (after {attempt} attempts)" if attempt > 1 else ""
                raise HubError(f"could not {what}{again}: {explain(error)}") from error
            if pause > 0:
                print(f"the Hub is busy ({explain(error)}); trying again in {pause:.0f} s", flush=True)
            time.sleep(pause)


def _pause(error: Exception, usual: float) -> float | None:
    """Seconds to wait before another attempt; None where another attempt is of no use."""
    if isinstance(error, (HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled)):
        return None
    response = getattr(error, "response", None) if isinstance(error, HfHubHTTPError) else None
    if response is None:
        # A broken connection; other errors of the operating system (a full disk) do not mend themselves.
        return usual if isinstance(error, (HTTPError, ConnectionError, TimeoutError)) else None
    if response.status_code not in _BUSY:
        return None
    asked = response.headers.get("Retry-After", "")
    pause = float(asked) if asked.isdecimal() else usual
    return pause if pause <= LONGEST_WAIT else None


def explain(error: Exception) -> str:
    """A Hub client's exception in words: what a user can do, without request ids and URLs."""
    if isinstance(error, LocalTokenNotFoundError):
        return "there is no token: log in with `hf auth login`, or set HF_TOKEN"
    if isinstance(error, RevisionNotFoundError):
        return "there is no such revision"
    if isinstance(error, RepositoryNotFoundError):
        return "there is no such repository, or it is private and the token does not open it"
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if status == 401:
        return "the Hub does not know the token (or none was given): log in with `hf auth login`, or set HF_TOKEN"
    if status == 403:
        return f"the token may not do that: {_server_message(error)}"
    if status == 429:
        return "too many requests"
    if status is not None:
        return f"the Hub answered {status}: {_server_message(error)}"
    return f"{type(error).__name__}: {' '.join(str(error).split()) or 'the connection broke'}"


def _server_message(error: Exception) -> str:
    message: Any = getattr(error, "server_message", None)
    return " ".join(str(message or "no reason given").split())
