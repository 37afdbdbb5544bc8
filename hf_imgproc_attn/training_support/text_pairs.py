"""Pairs of texts with a class each: the arena's retrieval task, any two columns of texts, or Python's manual."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset as TorchDataset

from hf_imgproc_attn.errors import UsageError
from hf_imgproc_attn.training_support.arguments import EMBEDDED_PAIRS
from hf_imgproc_attn.training_support.data_loading import (
    check_splits,
    content_fingerprint,
    load_splits,
    refuse_config_name,
    require_column,
)
from hf_imgproc_attn.training_support.labelled_data import label_splits
from hf_imgproc_attn.training_support.labelled_text import paragraphs
from hf_imgproc_attn.training_support.sequence_arguments import SequenceDataArguments

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

COLUMNS = ("text1", "text2")
"""Of the published files and of the embedded data."""
_PUBLISHED = {"train": "train", "validation": "eval", "test": "test"}
"""Split -> part of the name of a published file, as ``new_aan_pairs.train.tsv``."""
_PAIRS_A_TEXT = 2


class PairSplit:
    """The pairs of one split; rows are read as they are needed, since the published ones are gigabytes.

    Args:
        rows: of the data set.
        columns: the two with the texts.
        labels: class indices ``[rows]``, int64.
    """

    def __init__(self, rows: "Dataset", columns: tuple[str, ...], labels: np.ndarray) -> None:
        self.rows, self.columns, self.labels = rows.select_columns(list(columns)), columns, labels

    def __len__(self) -> int:
        return len(self.labels)

    def texts(self, index: int) -> list[str]:
        """The two texts of a pair."""
        row = self.rows[index]
        return [row[name] for name in self.columns]

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Numbers of rows and words, and a SHA-256 over texts and labels."""
        words = sum(len(text.split()) for index in range(len(self)) for text in self.texts(index))
        parts = (
            "\0".join([str(label), *self.texts(index)]).encode() + b"\n" for index, label in enumerate(self.labels)
        )
        return {"rows": len(self), "words": words, "sha256": content_fingerprint(parts)}


class PairRows(TorchDataset[dict[str, Any]]):
    """Items are ``input_ids`` and ``attention_mask`` of both texts, cut at the tokenizer's length, and ``labels``.

    Args:
        split: the pairs.
        tokenizer: its ``model_max_length`` counts its own first and last token too.
    """

    def __init__(self, split: PairSplit, tokenizer: "PreTrainedTokenizerFast") -> None:
        self.split, self.tokenizer = split, tokenizer

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> dict[str, Any]:
        # No byte is more than one character: what is cut here would be cut below, after more work.
        texts = [text[: self.tokenizer.model_max_length] for text in self.split.texts(index)]
        encoded = self.tokenizer(texts, truncation=True, return_token_type_ids=False)
        return {**encoded, "labels": torch.tensor(self.split.labels[index])}


def load_pairs(args: SequenceDataArguments) -> tuple[dict[str, PairSplit], list[str]]:
    """The pairs of every split, and the names of the classes.

    Returns:
        Split -> pairs: ``train`` and, where there are any, ``validation`` and ``test``; class index -> name.

    Raises:
        UsageError: for data that cannot be loaded, missing columns, texts or labels, or empty splits.
    """
    columns = args.pair_columns
    if args.dataset_name == EMBEDDED_PAIRS:
        refuse_config_name(args, "label_column_name")
        rows = _topic_pairs(args.sequence_seed)
    else:
        rows = _published(args, columns) or load_splits(args, EMBEDDED_PAIRS)
    for split, part in rows.items():
        for column in columns:
            require_column(part, column, "text_pair_columns", split)
            if part.features[column].dtype not in ("string", "large_string"):
                raise UsageError(
                    f"text_pair_columns must be columns of texts, got {column!r} of type {part.features[column]}"
                )
            if missing := part.data.column(column).null_count:
                raise UsageError(f"column {column!r} of the {split} split has {missing} rows without a text")
    found = label_splits(rows, args, "pairs")
    return {
        split: PairSplit(part, columns, found.labels[split]) for split, part in found.rows.items()
    }, found.label_names


def byte_tokenizer() -> "PreTrainedTokenizerFast":
    """Every byte is a token, between a first and a last one; 260 entries with four special tokens."""
    from hf_imgproc_attn.training_support.tokenizer import train_tokenizer

    return train_tokenizer([], 260, for_classifier=True)


def _published(args: SequenceDataArguments, columns: tuple[str, ...]) -> "dict[str, Dataset] | None":
    """The files of the arena's release, if the data set is their folder.

    Tabs between label (0.0 or 1.0), two numbers of papers and two texts; no names of columns, no quoting. The rows lie
    in the cache of `datasets`, not in memory.

    Raises:
        UsageError: for files that are not of this form.
    """
    import datasets

    folder = Path(args.dataset_name).expanduser()
    found = {split: sorted(folder.glob(f"*.{part}.tsv")) for split, part in _PUBLISHED.items()}
    files = {split: str(paths[0]) for split, paths in found.items() if len(paths) == 1}
    if "train" not in files or columns != COLUMNS:
        return None
    refuse_config_name(args, "label_column_name")
    features = datasets.Features({name: datasets.Value("string") for name in ("label", "id1", "id2", *COLUMNS)})
    form: dict[str, Any] = {"sep": "\t", "names": list(features), "quoting": 3, "lineterminator": "\n"}
    try:
        splits = datasets.load_dataset("csv", data_files=files, features=features, keep_default_na=False, **form)
        labels = {label for rows in splits.values() for label in rows.unique("label")}
        if not labels <= {"0.0", "1.0", "0", "1"}:
            raise ValueError(f"labels are {', '.join(sorted(labels)[:3])}")
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        raise UsageError(
            f"dataset_name {args.dataset_name!r} must have files of label, id1, id2, text1 and text2 between tabs: "
            f"{str(cause).strip().splitlines()[0]}"
        ) from error
    check_splits(splits, args.dataset_name)
    return dict(splits)


def _topic_pairs(seed: int) -> "dict[str, Dataset]":
    """Pairs of paragraphs of Python's manual, half of them of one topic: a small stand-in to try things out."""
    import datasets

    features = datasets.Features(
        text1=datasets.Value("string"),
        text2=datasets.Value("string"),
        label=datasets.ClassLabel(names=["different topics", "same topic"]),
    )
    splits = {}
    for place, (split, rows) in enumerate(paragraphs().items()):
        rng = np.random.Generator(np.random.PCG64([seed, place]))
        texts, topics = list(rows["text"]), np.array(rows["label"])
        columns: dict[str, list[Any]] = {"text1": [], "text2": [], "label": []}
        for index in range(_PAIRS_A_TEXT * len(texts)):
            first, same = index % len(texts), index // len(texts) % 2
            others = np.flatnonzero((topics == topics[first]) == bool(same))
            others = others[others != first]
            if len(others):  # a topic may have one paragraph alone
                second = int(rng.choice(others))
                for name, value in (("text1", texts[first]), ("text2", texts[second]), ("label", same)):
                    columns[name].append(value)
        splits[split] = datasets.Dataset.from_dict(columns, features=features)
    return splits
