"""The trackers of ``report_to``: can each be used, and what they refuse in the middle of a run as one line."""

import netrc
import os
import urllib.parse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from hf_imgproc_attn.errors import UsageError, plain_message

if TYPE_CHECKING:
    from transformers import TrainingArguments


def check_trackers(training_args: "TrainingArguments") -> None:
    """Check that every tracker of ``report_to`` is installed and, for wandb, that it can log in.

    Raises:
        UsageError: naming the tracker and what is missing.
    """
    from transformers.integrations import get_reporting_integration_callbacks

    for name in training_args.report_to:
        try:
            (callback,) = get_reporting_integration_callbacks([name])
            callback()
        except (ValueError, RuntimeError, ImportError) as error:
            raise UsageError(f"report_to {name}: {plain_message(error)}") from error
        if name == "wandb" and training_args.process_index == 0 and not _wandb_can_log_in():
            raise UsageError(
                "report_to wandb: there is no key; `wandb login` or the environment variable WANDB_API_KEY gives one, "
                "and WANDB_MODE=offline needs none"
            )


def _wandb_can_log_in() -> bool:
    if os.environ.get("WANDB_MODE", "online").lower() in ("offline", "disabled", "dryrun"):
        return True
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    address = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    try:
        return netrc.netrc(str(path)).authenticators(urllib.parse.urlsplit(address).hostname or "") is not None
    except (OSError, netrc.NetrcParseError):
        return False


@contextmanager
def tracker_named(names: Sequence[str]) -> Iterator[None]:
    """Put what a tracker of ``report_to`` refuses, such as a wrong key, into one line.

    Raises:
        UsageError: for an exception that one of the trackers' packages defines.
    """
    try:
        yield
    except Exception as error:
        package = type(error).__module__.partition(".")[0]
        if package not in names:
            raise
        raise UsageError(f"report_to {package}: {plain_message(error)}") from error
