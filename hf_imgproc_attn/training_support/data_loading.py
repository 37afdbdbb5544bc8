"""Data sets from the Hub or a local path as train, validation and test splits, and what images and text share."""

import difflib
import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_imgproc_attn.errors import UsageError
from hf_imgproc_attn.training_support.arguments import DataArguments

if TYPE_CHECKING:
    from datasets import Dataset

SPLIT_SEED = 0
"""The seed of every split and subset. It is not an option: the split does not move with the seed of a run."""

_VALIDATION_NAMES = ("validation", "valid", "val", "dev")
_FILE_FORMATS = {"csv": "csv", "tsv": "csv", "json": "json", "jsonl": "json", "parquet": "parquet", "txt": "text"}


def load_splits(args: DataArguments, embedded: str, *, streaming: bool = False) -> dict[str, Any]:
    """Load a data set by Hub name or local path.

    A path is a folder that ``datasets.load_dataset`` reads (parquet, csv, json, text, image folder), a folder written
    by ``save_to_disk``, or one data file, which becomes the training split.

    Args:
        args: the data options.
        embedded: name of the embedded data set, for the message.
        streaming: whether rows are read as they are needed.

    Returns:
        ``train`` and, where the data set has them, ``validation`` and ``test``: data sets, none of them empty, or
        streams of rows.

    Raises:
        UsageError: if there is nothing to load under that name, no training split, or an empty split.
    """
    import datasets

    name, path = args.dataset_name, Path(args.dataset_name).expanduser()
    saved = (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()
    if path.is_file() or saved:
        refuse_config_name(args)
    if path.exists() and args.dataset_revision is not None:
        raise UsageError(
            f"dataset_revision must be none for the local data set {name!r}, got {args.dataset_revision!r}"
        )
    try:
        if path.is_file():
            suffix = path.suffix.lstrip(".").lower()
            if suffix not in _FILE_FORMATS:
                raise UsageError(f"dataset_name must be a file of type {', '.join(_FILE_FORMATS)}, got {name!r}")
            options = {"sep": "\t"} if suffix == "tsv" else {}
            loaded = datasets.load_dataset(
                _FILE_FORMATS[suffix], data_files={"train": str(path)}, streaming=streaming, **options
            )
        elif saved:
            loaded = datasets.load_from_disk(str(path))
        else:
            config, revision = args.dataset_config_name, args.dataset_revision
            if revision is not None and revision.startswith("refs/convert/"):
                loaded = datasets.load_dataset(name, data_dir=config, revision=revision, streaming=streaming)
            else:
                where = str(path) if path.is_dir() else name
                loaded = datasets.load_dataset(where, config, revision=revision, streaming=streaming)
    except UsageError:
        raise
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        if empty := re.search(r'Instruction "(.+)" corresponds to no data', str(error)):
            raise UsageError(f"the {empty[1]} split of data set {name!r} is empty") from error
        if isinstance(error, datasets.exceptions.DatasetGenerationError) and isinstance(error.__cause__, Exception):
            error = error.__cause__  # its own message says that an error occurred, and not which
        # Among these: no such data set, no network, files of mixed types, an unknown configuration, a broken file.
        raise UsageError(
            f"dataset_name must be {embedded}, a local path or a Hub data set, got {name!r}, which cannot be loaded: "
            f"{str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}"
        ) from error
    if not isinstance(loaded, dict):
        loaded = {"train": loaded}
    if saved and streaming:  # written by save_to_disk
        loaded = {split: rows.to_iterable_dataset() for split, rows in loaded.items()}
    if "train" not in loaded:
        raise UsageError(f"data set {name!r} has no train split, only {', '.join(loaded)}")
    splits = {"train": loaded["train"]}
    validation = next((split for split in _VALIDATION_NAMES if split in loaded), None)
    if validation is not None:
        splits["validation"] = loaded[validation]
    if "test" in loaded:
        splits["test"] = loaded["test"]
    if not streaming:
        check_splits(splits, name)
    return splits


def refuse_config_name(args: DataArguments, *unused: str) -> None:
    """Data that have no configurations must not be given one, nor a revision.

    Args:
        args: the data options.
        *unused: further options that the data have no use for.

    Raises:
        UsageError: if ``dataset_config_name``, ``dataset_revision`` or one of the further options is set.
    """
    for option in ("dataset_config_name", "dataset_revision", *unused):
        value = getattr(args, option)
        if value is not None:
            raise UsageError(f"{option} must be none for data set {args.dataset_name!r}, got {value!r}")


def check_splits(splits: dict[str, "Dataset"], name: str) -> None:
    """Refuse splits without rows.

    Raises:
        UsageError: names the split and the data set.
    """
    for split, rows in splits.items():
        if len(rows) == 0:
            raise UsageError(f"the {split} split of data set {name!r} is empty")


def require_column(rows: "Dataset", given: str | None, option: str, split: str) -> str | None:
    """Check a column that the user named.

    Args:
        rows: one split.
        given: the column, or None if it is to be detected.
        option: the option it was given with, for the message.
        split: name of the split, for the message.

    Raises:
        UsageError: if the column does not exist; names those that do.
    """
    if given is not None and given not in rows.column_names:
        near = difflib.get_close_matches(given, rows.column_names, n=1)
        raise UsageError(
            f"{option} must be a column of the {split} split ({', '.join(rows.column_names)}), got {given!r}"
            + (f"; did you mean {near[0]}?" if near else "")
        )
    return given


def choose_column(candidates: Sequence[str], common: Sequence[str], what: str, option: str, rows: "Dataset") -> str:
    """Pick the one column that fits.

    Args:
        candidates: columns of the right type.
        common: usual names; the first one among the candidates wins, however many there are.
        what: ``"image"``, ``"label"`` or ``"text"``.
        option: the option that chooses the column.
        rows: the split, for the message.

    Raises:
        UsageError: if no column or several fit; names the columns there are.
    """
    for name in common:
        if name in candidates:
            return name
    if len(candidates) == 1:
        return candidates[0]
    problem = f"no {what} column" if not candidates else f"several possible {what} columns ({', '.join(candidates)})"
    raise UsageError(
        f"the data set has {problem}; its columns are {', '.join(rows.column_names)}: choose with --{option}"
    )


def content_fingerprint(parts: Iterable[bytes]) -> str:
    """SHA-256 over the given bytes, in order, as hexadecimal digits."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
