"""Checkpoint folders of the Trainer: which of them is complete, the newest one to resume from, and full disks."""

import contextlib
import errno
import json
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path

from hf_imgproc_attn.errors import UsageError

_STATE = "trainer_state.json"
# What FSDP and DeepSpeed write instead of the usual files.
_SHARDED_OPTIMIZER = ("optimizer.bin", "optimizer_*", "global_step*")
_SHARDED_WEIGHTS = ("pytorch_model_fsdp*", "global_step*")
_DISK_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
# How safetensors and torch's archives put the same thing, the latter by finding less in the file than was written.
_DISK_FULL_TEXT = ("No space left", "File too large", "quota exceeded", "inline_container")


def newest_complete_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest ``checkpoint-N`` folder that a run can go on from.

    A run that was killed while it saved leaves an incomplete folder behind, which the Trainer would stumble over. Such
    folders are passed over with a warning that names the folder and what is wrong with it.

    Args:
        output_dir: folder of the run.

    Returns:
        The folder, or None if there is no complete one.
    """
    steps = {
        int(match[1]): folder
        for folder in Path(output_dir).glob("checkpoint-*")
        if folder.is_dir() and (match := re.fullmatch(r"checkpoint-(\d+)", folder.name))
    }
    for _, folder in sorted(steps.items(), reverse=True):
        problem = incomplete_because(folder)
        if problem is None:
            return folder
        warnings.warn(f"{folder} is incomplete and is passed over: {problem}", stacklevel=2)
    return None


@contextlib.contextmanager
def full_disk_named(output_dir: str | Path) -> Iterator[None]:
    """Put a disk that is full, or a file size that is not allowed, in one sentence that says what is left.

    Raises:
        UsageError: naming the newest complete checkpoint.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        full = isinstance(error, OSError) and error.errno in _DISK_FULL
        if not full and not any(text in str(error) for text in _DISK_FULL_TEXT):
            raise
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the one just being written is incomplete is what this is about
            newest = newest_complete_checkpoint(output_dir)
        left = "there is no complete checkpoint yet" if newest is None else f"{newest} is complete"
        raise UsageError(
            f"output_dir {str(output_dir)!r} cannot be written, the disk is full or a file too large "
            f"({' '.join(str(error).split())}); {left}; with room made, the same command with --resume goes on"
        ) from error


def incomplete_because(folder: Path) -> str | None:
    """What a checkpoint folder lacks, or None if it is complete.

    Checked are the Trainer's state, the weights (the header and the length of every safetensors file), and the
    optimizer, scheduler and random states (PyTorch files are zip archives with checksums).
    """
    try:
        json.loads((folder / _STATE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"no {_STATE}"
    except ValueError:
        return f"{_STATE} is cut off"
    weights = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            expected = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError):
            return f"{index.name} is cut off"
        missing = sorted(expected - {path.name for path in weights})
        if missing:
            return f"no {missing[0]}"
    if not weights and not _any(folder, _SHARDED_WEIGHTS):
        return "no weights"
    for path in weights:
        if not _is_whole_safetensors(path):
            return f"{path.name} is cut off"
    if not (folder / "optimizer.pt").is_file() and not _any(folder, _SHARDED_OPTIMIZER):
        return "no optimizer.pt"
    if not (folder / "scheduler.pt").is_file():
        return "no scheduler.pt"
    if not _any(folder, ("rng_state*.pth",)):
        return "no rng_state.pth"
    for path in sorted(path for pattern in ("*.pt", "*.pth", "optimizer.bin") for path in folder.glob(pattern)):
        if not _is_whole_archive(path):
            return f"{path.name} is cut off"
    return None


def _any(folder: Path, patterns: tuple[str, ...]) -> bool:
    return any(True for pattern in patterns for _ in folder.glob(pattern))


def _is_whole_safetensors(path: Path) -> bool:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="np"):
            return True
    except (SafetensorError, OSError):
        return False


def _is_whole_archive(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, OSError, EOFError):
        return False
