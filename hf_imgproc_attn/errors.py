"""Errors that a user can mend, shown as one line, and the check for optional packages."""

import importlib.util
import sys
from collections.abc import Callable

_EXTRAS: dict[str, tuple[str, ...]] = {
    "train": ("accelerate", "datasets", "evaluate", "numpy", "PIL", "sklearn", "tokenizers", "yaml"),
    "robustness": ("foolbox",),
    "viz": ("matplotlib",),
    "hub": ("jinja2", "matplotlib"),
    "filters": ("matplotlib", "numpy", "PIL", "skimage"),
}


class UsageError(ValueError):
    """A wrong argument, data set or folder: the message names the field, the rule and what was got."""


def require_extras(*extras: str) -> None:
    """Check that the packages of the named extras are installed.

    Args:
        extras: names among ``train``, ``robustness``, ``viz``, ``hub`` and ``filters``.

    Raises:
        UsageError: names the packages that are missing and the extra that brings them.
    """
    for extra in extras:
        missing = [name for name in _EXTRAS[extra] if importlib.util.find_spec(name) is None]
        if missing:
            raise UsageError(
                f"this needs {', '.join(missing)}, which is not installed: pip install 'hf-imgproc-attn[{extra}]'"
            )


def exit_code(work: Callable[[], object]) -> int:
    """Run ``work`` as the body of a command.

    Returns:
        0 on success, 2 after a :class:`UsageError` (printed as one line, without a traceback), 130 when interrupted.
    """
    try:
        work()
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command with --resume goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0
