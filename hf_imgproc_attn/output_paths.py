"""Where a command writes: checked before its work begins, and what can be saved is saved when writing fails after all.

No torch and no transformers are imported here.
"""

import contextlib
import os
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from .errors import UsageError


def check_output_folder(path: str | Path, option: str = "output") -> Path:
    """Check that files can be written into a folder, which may not exist yet. Nothing is left behind.

    Args:
        path: the folder.
        option: the option that it was given with, for the message.

    Raises:
        UsageError: if there is a file in its place or in the place of a folder above it, or it cannot be written.
    """
    folder = Path(path)
    existing = folder
    while not os.path.lexists(existing) and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        what = "which is a file" if existing == folder else f"but {str(existing)!r} is a file"
        raise UsageError(f"{option} must be a folder, got {str(path)!r}, {what}")
    try:
        # Really written: permissions alone do not tell of a read-only or a full disk, or of a special file system.
        with tempfile.TemporaryFile(dir=existing) as probe:
            probe.write(b"x")
            probe.flush()
    except OSError as error:
        raise UsageError(f"{option} {str(path)!r} cannot be written: {error.strerror}") from error
    return folder


def check_output_file(path: str | Path, option: str = "output") -> Path:
    """Check that a file can be written or replaced. Nothing is changed.

    Args:
        path: the file.
        option: the option that it was given with, for the message.

    Raises:
        UsageError: if it is a folder, a device or read-only, or its folder cannot be written.
    """
    file = Path(path)
    try:
        mode = file.stat().st_mode
    except OSError:  # it does not exist; why it could not is what the check of its folder says
        check_output_folder(file.parent, f"the folder of {option}")
        return file
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "no ordinary file"
        raise UsageError(f"{option} must be a file, got {str(path)!r}, which is {kind}")
    try:
        with file.open("ab"):
            pass
    except OSError as error:
        raise UsageError(f"{option} {str(path)!r} cannot be written: {error.strerror}") from error
    check_output_folder(file.parent, f"the folder of {option}")
    return file


def check_new_files(paths: Iterable[str | Path], force: bool, option: str = "output") -> None:
    """Check that files can be written, and that nothing is lost by it: what is there is replaced only on request.

    Args:
        paths: all that is going to be written.
        force: whether what is there may be replaced.
        option: the option that they were given with, for the message.

    Raises:
        UsageError: as :func:`check_output_file`; without ``force`` also if one is there already.
    """
    files = [check_output_file(path, option) for path in paths]
    there = [str(file) for file in files if os.path.lexists(file)]
    if there and not force:
        first, more = repr(there[0]), f" and {len(there) - 1} more files" if len(there) > 2 else ""
        if len(there) == 2:
            more = f" and {there[1]!r}"
        verb, them = ("are", "them") if more else ("is", "it")
        raise UsageError(f"{option} {first}{more} {verb} there already; --force replaces {them}")


@contextlib.contextmanager
def writing(path: str | Path, option: str = "output") -> Iterator[None]:
    """Put what goes wrong while something is written into one line.

    Args:
        path: what is written.
        option: the option that it was given with, for the message.

    Raises:
        UsageError: for an error of the operating system, or of safetensors, in the block.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{option} {str(path)!r} cannot be written: {_reason(error)}") from error


def write_or_keep(path: str | Path, write: Callable[[Path], object], option: str = "output") -> None:
    """Write a result that took work; where that fails, write it to a temporary folder and say where.

    Args:
        path: a file or folder.
        write: is called with the path to write to.
        option: the option that it was given with, for the message.

    Raises:
        UsageError: if ``path`` could not be written; names the reason and where the result is.
    """
    try:
        with writing(path, option):
            write(Path(path))
    except UsageError as error:
        elsewhere = Path(tempfile.gettempdir())
        try:
            elsewhere = Path(tempfile.mkdtemp(prefix="hf_imgproc_attn_")) / (Path(path).name or "output")
            with writing(elsewhere, option):
                write(elsewhere)
        except (OSError, UsageError) as second:
            raise UsageError(f"{error}; nor can {str(elsewhere)!r}: the result is lost") from second
        raise UsageError(f"{error}; the result is kept in {str(elsewhere)!r}") from error


def _reason(error: Exception) -> str:
    reason = getattr(error, "strerror", None)
    return str(reason or " ".join(str(error).split()) or type(error).__name__)
