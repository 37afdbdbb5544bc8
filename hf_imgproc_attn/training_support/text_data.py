"""Text for causal language models: columns, splits, tokens in blocks, and the counts that perplexity needs.

Definitions. A row of the data set is a line (or a document of several lines); a text ends each of its lines with a
line break, whether the source kept it or not. The *words* of a text are its whitespace-separated words plus one end of
sentence a line, as WikiText counts them; its line break is the end of sentence. The *tokens* are those of all lines,
one after another, behind one end-of-text token, which gives the first word something to be predicted from.

Blocks overlap by one token, so that every token of the text is predicted exactly once; the first tokens of a block see
only what the block holds before them.
"""

import hashlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset as TorchDataset

from hf_imgproc_attn.errors import UsageError
from hf_imgproc_attn.training_support.arguments import EMBEDDED_TEXT, TextDataArguments
from hf_imgproc_attn.training_support.data_loading import (
    choose_column,
    content_fingerprint,
    load_splits,
    refuse_config_name,
    require_column,
)
from hf_imgproc_attn.training_support.streams import FIRST_ROWS, Blocks, Stream, StreamedSamples

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TrainingArguments

IGNORED_LABEL = -100
TOKENIZER_ROWS = 10_000
"""Of a stream: those that a tokenizer is trained on."""

_CHUNK = 1000
_SHORTEST_PARAGRAPH = 8
"""In words."""


@dataclass
class TextSplit:
    """The lines of one split, each with its line break."""

    lines: list[str]

    @property
    def num_words(self) -> int:
        """Whitespace-separated words plus one end of sentence a line."""
        return sum(len(line.split()) + line.count("\n") for line in self.lines)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Number of rows and words, and a SHA-256 over the text."""
        content = content_fingerprint(line.encode() for line in self.lines)
        return {"rows": len(self.lines), "words": self.num_words, "sha256": content}


def load_text_splits(args: TextDataArguments) -> dict[str, TextSplit]:
    """Load the text, hold out the end of the training split for validation where there is none, apply the limits.

    Returns:
        ``train`` (not with ``streaming``) and, where there are any, ``validation`` and ``test``.

    Raises:
        UsageError: for data that cannot be loaded, a missing or ambiguous column, or an empty split.
    """
    if args.streaming:
        return load_text_stream(args, seed=0)[1]
    if args.dataset_name == EMBEDDED_TEXT:
        refuse_config_name(args, "text_column_name")
        splits = _manual()
    else:
        rows = load_splits(args, EMBEDDED_TEXT)
        column = text_column(rows["train"], args.text_column_name)
        for split in rows:
            require_column(rows[split], column, "text_column_name", split)
        splits = {split: [_as_line(text) for text in part[column] if text is not None] for split, part in rows.items()}
    if "validation" not in splits and args.validation_fraction > 0:
        # The end, not a random part: neighbouring lines belong to one text.
        kept = len(splits["train"]) - round(len(splits["train"]) * args.validation_fraction)
        splits["validation"], splits["train"] = splits["train"][kept:], splits["train"][:kept]
    for split, lines in splits.items():
        limit = args.max_train_samples if split == "train" else args.max_eval_samples
        splits[split] = lines[:limit]
        if not any(line.strip() for line in splits[split]):
            raise UsageError(
                f"the {split} split of data set {args.dataset_name!r} has no text in its {len(lines)} rows"
            )
    return {split: TextSplit(lines) for split, lines in splits.items()}


@dataclass
class StreamedText:
    """The training split as a stream.

    Attributes:
        stream: its rows.
        column: with the texts.
        lines: those of its first rows, of which a tokenizer may be trained.
    """

    stream: Stream
    column: str
    lines: list[str]

    def blocks(
        self, tokenizer: "PreTrainedTokenizerBase", block_size: int, training_args: "TrainingArguments"
    ) -> StreamedSamples:
        """The blocks of one process, as :class:`TokenBlocks` cuts them, without an end."""

        def line(row: dict[str, Any]) -> str | None:
            text = row[self.column]
            return None if text is None else _as_line(text)

        def ids(lines: list[str]) -> list[list[int]]:
            encoded: list[list[int]] = tokenizer(lines, add_special_tokens=False, verbose=False)["input_ids"]
            return encoded

        blocks = Blocks(line, ids, block_size, tokenizer.eos_token_id, IGNORED_LABEL)
        sha256 = content_fingerprint(line.encode() for line in self.lines[:FIRST_ROWS])
        return StreamedSamples(self.stream, blocks, training_args, sha256)


def load_text_stream(args: TextDataArguments, seed: int) -> tuple[StreamedText, dict[str, TextSplit]]:
    """The training split as a stream, and the others in memory, where there are any.

    Args:
        args: the data options.
        seed: of the order of rows.

    Raises:
        UsageError: for data that cannot be loaded, a missing or ambiguous column, or an empty split.
    """
    import datasets

    rows = load_splits(args, EMBEDDED_TEXT, streaming=True)
    stream = Stream(rows.pop("train"), args.dataset_name, seed, args.shuffle_buffer)
    if args.max_train_samples is not None:
        stream = stream._replace(rows=stream.rows.take(args.max_train_samples))
    first = stream.first(TOKENIZER_ROWS)
    column = text_column(datasets.Dataset.from_list(first[:FIRST_ROWS]), args.text_column_name)
    lines = [_as_line(row[column]) for row in first if row[column] is not None]
    if not any(line.strip() for line in lines):
        raise UsageError(f"the first {len(first)} rows of data set {args.dataset_name!r} have no text")
    others = {}
    for split, part in rows.items():
        taken = list(part if args.max_eval_samples is None else part.take(args.max_eval_samples))
        if taken:
            require_column(datasets.Dataset.from_list(taken[:1]), column, "text_column_name", split)
        others[split] = TextSplit([_as_line(row[column]) for row in taken if row[column] is not None])
        if not any(line.strip() for line in others[split].lines):
            raise UsageError(f"the {split} split of data set {args.dataset_name!r} has no text in {len(taken)} rows")
    return StreamedText(stream, column, lines), others


def encode(
    split: TextSplit, tokenizer: "PreTrainedTokenizerBase", description: str, first_token: int | None = None
) -> np.ndarray:
    """Tokens of a whole split, one after another, behind one end-of-text token.

    Args:
        split: the text.
        tokenizer: has an end-of-text token (see :func:`.tokenizer.load_tokenizer`).
        description: shown with the progress bar.
        first_token: that stands first; None: the end-of-text token.

    Returns:
        Token ids ``[tokens]``, int32.
    """
    from datasets.utils import tqdm

    parts = [np.array([tokenizer.eos_token_id if first_token is None else first_token], dtype=np.int32)]
    chunks = range(0, len(split.lines), _CHUNK)
    for begin in tqdm(chunks, desc=description, unit=f"x {_CHUNK} lines", leave=False, delay=1.0):
        ids = tokenizer(split.lines[begin : begin + _CHUNK], add_special_tokens=False, verbose=False)["input_ids"]
        parts += [np.array(line, dtype=np.int32) for line in ids]
    return np.concatenate(parts)


class TokenBlocks(TorchDataset[dict[str, torch.Tensor]]):
    """Blocks of ``block_size`` tokens, each starting with the last token of the one before.

    An item is ``{"input_ids": [block_size], "labels": [block_size]}``; the first label, which a causal model cannot
    predict, and the filling of the last block are -100.

    Args:
        tokens: ids ``[tokens]``.
        block_size: at least 2.
        padding: id that fills the last block; it comes after all that counts, so no attention mask is needed.
    """

    def __init__(self, tokens: np.ndarray, block_size: int, padding: int) -> None:
        self.tokens, self.block_size, self.padding = tokens, block_size, padding

    def __len__(self) -> int:
        return -(-(len(self.tokens) - 1) // (self.block_size - 1))

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = index * (self.block_size - 1)
        block = torch.from_numpy(self.tokens[start : start + self.block_size].astype(np.int64))
        filling = self.block_size - len(block)
        labels = block.clone()
        labels[0] = IGNORED_LABEL
        return {
            "input_ids": torch.nn.functional.pad(block, (0, filling), value=self.padding),
            "labels": torch.nn.functional.pad(labels, (0, filling), value=IGNORED_LABEL),
        }


def _as_line(text: str) -> str:
    return text.rstrip("\r\n") + "\n"


def text_column(rows: Any, given: str | None) -> str:
    """The column with the texts: the one that was given, else the one that is called so, else the only one.

    Raises:
        UsageError: if there is none, or several.
    """
    import datasets

    strings = [
        name
        for name, feature in rows.features.items()
        if isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")
    ]
    if require_column(rows, given, "text_column_name", "train") is None:
        return choose_column(strings, ("text",), "text", "text_column_name", rows)
    if given not in strings:
        raise UsageError(f"text_column_name must be a column of texts, got {given!r} of type {rows.features[given]}")
    return str(given)


def pydoc_topics() -> dict[str, str]:
    """The manual inside Python: title of a topic -> its text.

    Raises:
        UsageError: if this Python has none.
    """
    try:
        from pydoc_data.topics import topics
    except ModuleNotFoundError as error:
        raise UsageError(
            f"{EMBEDDED_TEXT} needs pydoc_data of the standard library, which this Python lacks"
        ) from error
    return dict(topics)


def paragraphs_of(text: str) -> list[str]:
    """The paragraphs of a text that are sentences: grammar lines and headings are too short to be told apart."""
    return [part for part in re.split(r"\n\s*\n", text) if len(part.split()) >= _SHORTEST_PARAGRAPH]


def _manual() -> dict[str, list[str]]:
    """The topics of Python's manual, by topic: 80 % training, 10 % validation, 10 % test.

    A hash of its title decides where a topic goes, so it never moves, although the manual changes with Python.
    """
    splits: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for title, text in sorted(pydoc_topics().items()):
        place = int.from_bytes(hashlib.sha256(title.encode()).digest()[:4], "big") % 10
        split = {7: "test", 6: "validation"}.get(place, "train")
        splits[split] += [line + "\n" for line in text.splitlines()]
    return splits
