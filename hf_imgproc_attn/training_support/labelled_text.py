"""Texts with a class each, from the Hub, a path or Python's own manual, as tokens for a classifier."""

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset as TorchDataset

from hf_imgproc_attn.errors import UsageError
from hf_imgproc_attn.training_support.arguments import EMBEDDED_TEXT, LabelledTextDataArguments
from hf_imgproc_attn.training_support.data_loading import (
    content_fingerprint,
    load_splits,
    refuse_config_name,
    require_column,
)
from hf_imgproc_attn.training_support.labelled_data import label_splits
from hf_imgproc_attn.training_support.text_data import paragraphs_of, pydoc_topics, text_column

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

TOPICS = (
    "compound", "debugger", "formatstrings", "specialnames", "string-methods", "types", "typesmapping", "typesseq",
)  # fmt: skip
"""The longest topics of Python's manual: the classes of the embedded data."""


@dataclass
class LabelledTexts:
    """The texts of one split and their classes.

    Attributes:
        texts: one a row.
        labels: class indices ``[rows]``, int64.
    """

    texts: list[str]
    labels: np.ndarray

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Number of rows and words, and a SHA-256 over texts and labels."""
        parts = (f"{label} {text}".encode() for text, label in zip(self.texts, self.labels, strict=True))
        words = sum(len(text.split()) for text in self.texts)
        return {"rows": len(self.texts), "words": words, "sha256": content_fingerprint(parts)}


def load_labelled_texts(args: LabelledTextDataArguments) -> tuple[dict[str, LabelledTexts], list[str]]:
    """The texts of every split, and the names of the classes.

    Returns:
        Split -> texts: ``train`` and, where there are any, ``validation`` and ``test``; class index -> name.

    Raises:
        UsageError: for data that cannot be loaded, missing or ambiguous columns, empty splits, or missing labels
            or texts.
    """
    if args.dataset_name == EMBEDDED_TEXT:
        refuse_config_name(args, "text_column_name")
        rows = paragraphs()
    else:
        rows = load_splits(args, EMBEDDED_TEXT)
    column = text_column(rows["train"], args.text_column_name)
    for split in rows:
        require_column(rows[split], column, "text_column_name", split)
    found = label_splits(rows, args, "texts")
    splits = {}
    for split, part in found.rows.items():
        texts = list(part[column])
        if missing := sum(text is None for text in texts):
            raise UsageError(f"column {column!r} of the {split} split has {missing} rows without a text")
        splits[split] = LabelledTexts(texts, found.labels[split])
    return splits, found.label_names


class TokenizedTexts(TorchDataset[dict[str, Any]]):
    """Items are the tokenizer's ``input_ids`` and ``attention_mask`` of a text, cut to a length, and ``labels``.

    Args:
        split: the texts.
        tokenizer: adds its own first and last token.
        max_length: tokens that are kept, with these two.
    """

    def __init__(self, split: LabelledTexts, tokenizer: "PreTrainedTokenizerBase", max_length: int) -> None:
        encoded = tokenizer(split.texts, truncation=True, max_length=max_length, return_token_type_ids=False)
        self.tokens, self.labels = encoded, split.labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = {name: values[index] for name, values in self.tokens.items()}
        return {**item, "labels": torch.tensor(self.labels[index])}


def paragraphs() -> dict[str, "Dataset"]:
    """Paragraphs of the longest topics, labelled by their topic: 80 % training, 10 % validation, 10 % test.

    A hash of a paragraph decides where it goes, so it never moves, although the manual changes with Python. What
    stands in two topics is left out.
    """
    import datasets

    topics = pydoc_topics()
    found = {topic: paragraphs_of(topics[topic]) for topic in TOPICS}
    times: dict[str, int] = {}
    for text in (text for texts in found.values() for text in texts):
        times[text] = times.get(text, 0) + 1
    splits: dict[str, dict[str, list[Any]]] = {
        split: {"text": [], "label": []} for split in ("train", "validation", "test")
    }
    for label, topic in enumerate(TOPICS):
        for text in (text for text in found[topic] if times[text] == 1):
            place = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % 10
            split = splits[{7: "test", 6: "validation"}.get(place, "train")]
            split["text"].append(text)
            split["label"].append(label)
    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=list(TOPICS)))
    return {split: datasets.Dataset.from_dict(columns, features=features) for split, columns in splits.items()}
