"""Errors that a user can mend, shown as one line, and the check for optional packages."""

import argparse
import difflib
import errno
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

_EXTRAS: dict[str, tuple[str, ...]] = {
    "train": ("accelerate", "datasets", "evaluate", "numpy", "PIL", "psutil", "sklearn", "tokenizers", "yaml"),
    "peft": ("peft",),
    "robustness": ("PIL", "art", "cv2", "numpy", "scipy", "skimage"),
    "study": ("scipy",),
    "cluster": ("ray",),
    "viz": ("matplotlib",),
    "hub": ("jinja2", "matplotlib"),
    "app": ("gradio",),
    "lens": ("matplotlib", "numpy", "PIL", "scipy", "skimage"),
    "filters": ("matplotlib", "numpy", "PIL", "skimage"),
}

DISK_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
"""Error numbers of a disk without room, or of a file larger than is allowed."""
# What the system says where a file cannot be written at all.
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)


class UsageError(ValueError):
    """A wrong argument, data set or folder: the message names the field, the rule and what was got."""


class OneLineParser(argparse.ArgumentParser):
    """A parser whose mistakes are one line instead of the whole usage text, with the nearest choice if there is one.

    Raises:
        UsageError: for a command line that does not fit.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})  # half an option may be another one, misspelt

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As usual; an option that there is not is refused with the nearest one that there is."""
        words = sys.argv[1:] if args is None else list(args)
        parsed, extras = self.parse_known_args(words, namespace)
        if extras:
            name = extras[0].partition("=")[0]
            hint = did_you_mean(name, self._options_of(words)) if name.startswith("-") else ""
            self.error(f"unrecognized arguments: {' '.join(extras)}{hint}")
        return parsed

    def _options_of(self, words: Sequence[str]) -> list[str]:
        """The options of the sub-command that ``words`` names, or of this parser."""
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                for word in words:
                    if word in action.choices:
                        return list(action.choices[word]._option_string_actions)
        return list(self._option_string_actions)

    def error(self, message: str) -> NoReturn:
        choice = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)$", message)
        hint = did_you_mean(choice[1], re.split(r",\s*", choice[2].replace("'", ""))) if choice else ""
        raise UsageError(message + hint)


def with_values_joined(words: Sequence[str], options: Sequence[str]) -> list[str]:
    """``--layers -2,-1`` as ``--layers=-2,-1``: what begins with a minus is taken for an option otherwise.

    Args:
        words: of a command line.
        options: those that take numbers.
    """
    joined: list[str] = []
    for word in words:
        if joined and joined[-1] in options and re.match(r"-\d", word):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def did_you_mean(got: str, known: Iterable[str]) -> str:
    """``"; did you mean NAME?"`` with the nearest of the known names, or nothing where none is near."""
    near = difflib.get_close_matches(got, sorted(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def refuse_missing_path(option: str, value: str | None) -> None:
    """Refuse what looks like a local path and does not exist: asked for it, the Hub would speak of something else.

    Args:
        option: the option that it was given with.
        value: a path or a Hub name; None: not given.

    Raises:
        UsageError: naming option and value.
    """
    if value is None:
        return
    is_path = os.path.isabs(value) or value.startswith((".", "~")) or value.count("/") > 1
    if is_path and not os.path.exists(os.path.expanduser(value)):
        raise UsageError(f"{option} must be a local path or a Hub name, got {value!r}, which does not exist")


def plain_message(error: BaseException) -> str:
    """The message of an exception on one line, without what a library wraps around it.

    The strict dataclasses of Transformers' configurations put the name of an internal validator before the message
    that it raised, and torch puts the traceback of a data-loader worker before its own. Of files of weights that are
    none, Python's unpickler and torch say how to trust them, or nothing at all.
    """
    if type(error).__name__.startswith("StrictDataclass") and error.__cause__ is not None:
        error = error.__cause__
    if type(error).__name__ in ("SafetensorError", "UnpicklingError", "EOFError"):
        return f"the file is damaged, or holds other things than weights ({_first_sentence(error)})"
    text = str(error)
    if "Original Traceback (most recent call last):" in text:
        text = text.strip().splitlines()[-1].partition(": ")[2]
    return " ".join(text.split()) or type(error).__name__


def broken_files() -> tuple[type[Exception], ...]:
    """What libraries raise for a checkpoint whose files are damaged, or are something else."""
    from pickle import UnpicklingError

    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    unreadable = (StrictDataclassError, SafetensorError, UnpicklingError, EOFError, ImportError)
    return (*unreadable, OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError)


def _first_sentence(error: BaseException) -> str:
    return re.split(r"(?<=[^.])\.\s|\n", str(error).strip())[0].rstrip(".") or type(error).__name__


def disk_problem(error: OSError) -> str | None:
    """What is wrong with the disk or the rights of a path, as one line; None for every other error."""
    if error.errno not in (*DISK_FULL, *_NOT_WRITABLE):
        return None
    return f"{str(error.filename) if error.filename else 'output'!r}: {error.strerror}"


def require_extras(*extras: str) -> None:
    """Check that the packages of the named extras are installed.

    Args:
        extras: keys of ``_EXTRAS``, as ``train`` or ``viz``.

    Raises:
        UsageError: names the packages that are missing and the extra that brings them.
    """
    for extra in extras:
        missing = missing_packages(extra)
        if missing:
            raise UsageError(f"this needs {', '.join(missing)}, which is not installed: {install_hint(extra)}")


def missing_packages(extra: str) -> list[str]:
    """The packages of an extra that are not installed."""
    return [name for name in _EXTRAS[extra] if importlib.util.find_spec(name) is None]


def install_hint(extra: str) -> str:
    """How to install an extra. The package is not on an index, so it is installed from a checkout."""
    return f'pip install ".[{extra}]" in a checkout of this package'


def exit_code(work: Callable[[], object], interrupted: str = "interrupted") -> int:
    """Run ``work`` as the body of a command.

    Args:
        work: is called without arguments.
        interrupted: what is printed after Ctrl-C.

    Returns:
        0 on success, 2 after a :class:`UsageError` or a disk that cannot be written (printed as one line, without a
        traceback), 130 when interrupted.
    """
    try:
        work()
    except UsageError as error:
        print(f"error: {plain_message(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
    except OSError as error:
        problem = disk_problem(error)
        if problem is None:
            raise
        print(f"error: {problem}", file=sys.stderr)
        return 2
    return 0
