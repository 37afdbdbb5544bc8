"""Checkpoint folders: which of the Trainer's is complete and the newest, a saved model's filters, and full disks."""

import contextlib
import json
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hf_imgproc_attn.errors import DISK_FULL, UsageError, disk_problem
from hf_imgproc_attn.training_support.adapters import BASE_FOLDER, base_model

_STATE = "trainer_state.json"
_ADAPTER = "base_model.model."
"""Before the names of a model's tensors in the file of an adapter."""
# What FSDP and DeepSpeed write instead of the usual files.
_SHARDED_OPTIMIZER = ("optimizer.bin", "optimizer_*", "global_step*")
_SHARDED_WEIGHTS = ("pytorch_model_fsdp*", "global_step*")
_SHARDED_FOLDERS = ("pytorch_model_fsdp_*", "optimizer_*")
# How safetensors and torch's archives put a full disk, the latter by finding less in the file than was written.
_DISK_FULL_TEXT = ("No space left", "File too large", "quota exceeded", "inline_container")
# And how they put a folder that cannot be written, or is not there, any more.
_NOT_WRITABLE_TEXT = ("Permission denied", "Read-only file system", "No such file or directory", "Parent directory")


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


def saved_filters(folder: str | Path) -> dict[str, Any] | None:
    """The numbers of the filters of a saved model, as a run record keeps them (``cards.filters.recorded``).

    Read from the files, since the model in memory may be sharded over several processes.

    Args:
        folder: holds configuration and weights (safetensors); or an adapter, and the model below it in a folder.

    Returns:
        None where weights of the filters are missing, as where each process has saved its own share.
    """
    import torch
    import transformers
    from safetensors import safe_open

    from hf_imgproc_attn.backbones import OF_MODEL_TYPE
    from hf_imgproc_attn.cards.filters import recorded
    from hf_imgproc_attn.filtered import applied_summary, auto_class_of
    from hf_imgproc_attn.models.configuration_imgproc_filtered import FILTERED_MODEL_TYPE

    folder = Path(folder)
    adapters = _ADAPTER if (folder / "adapter_config.json").is_file() else ""
    config = transformers.AutoConfig.from_pretrained(folder / BASE_FOLDER if adapters else folder)
    if config.model_type not in (*OF_MODEL_TYPE, FILTERED_MODEL_TYPE):
        return None  # a stock model; a GPT-2 that classifies texts, or a BERT that writes, is one too
    if config.model_type == FILTERED_MODEL_TYPE:
        # Transformers renames tensors of some models when it saves them: it knows how to read them again.
        applied = getattr(transformers, auto_class_of(config)).from_pretrained(folder)
        return recorded(applied_summary(base_model(applied)))
    with torch.device("meta"):  # nothing but the scalars is needed
        model = transformers.AutoModel.from_config(config)
    prefix = f"{model.base_model_prefix}."
    scalars = {}
    files = [*sorted((folder / BASE_FOLDER).glob("*.safetensors")), *sorted(folder.glob("*.safetensors"))]
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  # no dictionary
                if ".scalar_bias." in name:
                    scalars[name.removeprefix(adapters).removeprefix(prefix)] = file.get_tensor(name)
    model.load_state_dict(scalars, strict=False, assign=True)
    if any(value.is_meta for name, value in model.named_parameters() if ".scalar_bias." in name):
        return None
    return recorded(model.filter_summary())


@contextlib.contextmanager
def full_disk_named(output_dir: str | Path) -> Iterator[None]:
    """Put a disk that is full, or a folder that cannot be written any more, in one sentence that says what is left.

    Raises:
        UsageError: naming the newest complete checkpoint.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        full = isinstance(error, OSError) and error.errno in DISK_FULL
        full = full or any(text in str(error) for text in _DISK_FULL_TEXT)
        if not full and not _is_not_writable(error, Path(output_dir)):
            raise
        reason = "the disk is full or a file too large " if full else ""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the one just being written is incomplete is what this is about
            newest = newest_complete_checkpoint(output_dir)
        left = "there is no complete checkpoint yet" if newest is None else f"{newest} is complete"
        raise UsageError(
            f"output_dir {str(output_dir)!r} cannot be written, {reason}({' '.join(str(error).split())}); {left}; "
            f"with {'room made' if full else 'this mended'}, the same command with --resume goes on"
        ) from error


def _is_not_writable(error: Exception, folder: Path) -> bool:
    """Whether an error is about writing into the folder, not about reading something elsewhere."""
    if not isinstance(error, OSError):
        return any(text in str(error) for text in _NOT_WRITABLE_TEXT)
    if error.filename is None:
        return disk_problem(error) is not None
    inside = Path(os.path.abspath(os.fsdecode(error.filename))).is_relative_to(os.path.abspath(folder))
    return inside and (disk_problem(error) is not None or isinstance(error, FileNotFoundError))


def incomplete_because(folder: Path) -> str | None:
    """What a checkpoint folder lacks, or None if it is complete.

    Checked are the Trainer's state, the weights (the header and the length of every safetensors file), the optimizer
    and scheduler, and the random state of each process (PyTorch files are zip archives with checksums; folders of
    shards have a table of contents, against which the files' lengths are held).
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
    if state := _missing_random_state(folder):
        return f"no {state}"
    archives = ("*.pt", "*.pth", "*.bin", "global_step*/*.pt")
    for path in sorted(path for pattern in archives for path in folder.glob(pattern)):
        if not _is_whole_archive(path):
            return f"{path.relative_to(folder)} is cut off"
    for pattern in _SHARDED_FOLDERS:
        for path in sorted(path for path in folder.glob(pattern) if path.is_dir()):
            if problem := _shards_problem(path):
                return f"{path.name} {problem}"
    return None


def _missing_random_state(folder: Path) -> str | None:
    """The first file of random states that is not there: one for each process, of as many as saved the checkpoint."""
    if (folder / "rng_state.pth").is_file():
        return None
    ranks = {int(match[1]) for path in folder.iterdir() if (match := re.fullmatch(r"rng_state_(\d+)\.pth", path.name))}
    if not ranks:
        return "rng_state.pth"
    state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
    try:
        processes = int(state["stateful_callbacks"]["Processes"]["attributes"]["count"])
    except (KeyError, TypeError):  # of an older version
        try:
            record = json.loads((folder.parent / "run.json").read_text(encoding="utf-8"))
            processes = int(record["device"]["processes"])
        except (OSError, ValueError, KeyError, TypeError):
            processes = max(ranks) + 1
    missing = sorted(set(range(processes)) - ranks)
    return f"rng_state_{missing[0]}.pth" if missing else None


def _shards_problem(folder: Path) -> str | None:
    """What a folder of ``torch.distributed.checkpoint`` lacks: its table of contents, or a part that stands there."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    if not (folder / ".metadata").is_file():  # which is written when every process has written its share
        return "has no .metadata"
    try:
        entries = FileSystemReader(folder).read_metadata().storage_data.values()
        sizes: dict[str, int] = {}
        for entry in entries:
            sizes[entry.relative_path] = max(sizes.get(entry.relative_path, 0), entry.offset + entry.length)
    except (EOFError, OSError, ValueError, AttributeError, pickle.UnpicklingError):
        return "has a .metadata that is cut off"
    for name, size in sorted(sizes.items()):
        if not (folder / name).is_file():
            return f"has no {name}"
        if (folder / name).stat().st_size < size:
            return f"has a {name} that is cut off"
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
