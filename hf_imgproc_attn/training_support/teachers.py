"""A trained model as the teacher of a copy of itself: what it sets to learn, and how far a copy is from it."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.nn import functional
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from ..conversion_probe import longest_text, sample_texts
from ..errors import UsageError, plain_message
from .data_loading import content_fingerprint
from .text_data import paragraphs_of, pydoc_topics

HELD_OUT_SEED = 10**6
"""Of the texts that nobody trains on; seeds of training are below it."""
MANUAL = "Python's manual"
LEAST_NEIGHBOURS = 3
"""Held-out texts of an encoder: of two, each is the other's neighbour in any model."""

Lesson = dict[str, torch.Tensor]
"""``input_ids`` and ``attention_mask``, each ``[texts, tokens]``."""


class Teacher(abc.ABC):
    """A trained model that is not changed, and the texts that copies of it learn from and are measured on.

    Args:
        model: in evaluation mode.
        length: tokens of a text, at most.
        batch: texts that are read at once.

    Raises:
        UsageError: for texts longer than the model can read.
    """

    measures: ClassVar[tuple[str, ...]]
    """What :meth:`score` returns: first how far a copy is from the teacher, 0 where it computes the same."""

    def __init__(self, model: PreTrainedModel, length: int, batch: int) -> None:
        longest = longest_text(model.config.get_text_config())
        if length > longest:
            raise UsageError(f"length must be an integer <= {longest}, what this model can read, got {length}")
        self.model, self.length, self.batch = model.requires_grad_(False), length, batch

    @abc.abstractmethod
    def lessons(self, seed: int, steps: int) -> list[Lesson]:
        """Texts to learn from, a batch for each step, others for another seed."""

    @abc.abstractmethod
    def loss(self, student: PreTrainedModel, lesson: Lesson) -> torch.Tensor:
        """What a student minimises: how far it is from the teacher on a lesson, a scalar."""

    @abc.abstractmethod
    def score(self, student: PreTrainedModel) -> tuple[float, ...]:
        """A number for each of :attr:`measures`, on the held-out texts."""

    @abc.abstractmethod
    def facts(self) -> dict[str, Any]:
        """What a record says of the teacher and its texts."""


class LanguageTeacher(Teacher):
    """A causal language model, which writes its texts itself and teaches the next words.

    Args:
        model: as of :class:`Teacher`.
        length: as of :class:`Teacher`.
        batch: as of :class:`Teacher`.
        held_out: texts that students are measured on.
    """

    measures = ("cross_entropy",)

    def __init__(self, model: PreTrainedModel, length: int, batch: int, held_out: int) -> None:
        super().__init__(model, length, batch)
        self.held_out = sample_texts(model, _generator(HELD_OUT_SEED), length, held_out)
        self.entropy = cross_entropy(model, self.held_out, batch)

    def lessons(self, seed: int, steps: int) -> list[Lesson]:
        texts = sample_texts(self.model, _generator(seed), self.length, steps * self.batch)
        return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in texts.split(self.batch)]

    def loss(self, student: PreTrainedModel, lesson: Lesson) -> torch.Tensor:
        """Kullback-Leibler divergence of the next words, in nats a token."""
        with torch.no_grad():
            wanted = self.model(**lesson, use_cache=False).logits.float().log_softmax(-1)
        found = student(**lesson, use_cache=False).logits.float().log_softmax(-1)
        return functional.kl_div(found, wanted, log_target=True, reduction="none").sum(-1).mean()

    def score(self, student: PreTrainedModel) -> tuple[float, ...]:
        """Cross-entropy above the teacher's own, in nats a token."""
        return (cross_entropy(student, self.held_out, self.batch) - self.entropy,)

    def facts(self) -> dict[str, Any]:
        return {"texts": "written by the teacher", "teacher_cross_entropy": self.entropy}


class SentenceTeacher(Teacher):
    """An encoder of texts, which teaches the states of its tokens and is known by its sentence vectors.

    A sentence vector is the mean of the last states of a text's tokens, of length 1, as MiniLM's users make it.

    Args:
        model: as of :class:`Teacher`.
        length: as of :class:`Teacher`; longer texts are cut.
        batch: as of :class:`Teacher`.
        held_out: texts that students are measured on.
        tokenizer: of the model.
        source: a text file with a text on each line; None: paragraphs of Python's manual.
        steps: batches of texts that a seed needs beside these.

    Raises:
        UsageError: for too few texts, a file that cannot be read, or a tokenizer that knows no words.
    """

    measures = ("distance", "neighbours")

    def __init__(
        self, model: PreTrainedModel, length: int, batch: int, held_out: int,
        tokenizer: PreTrainedTokenizerBase | None, source: Path | None, steps: int,
    ) -> None:  # fmt: skip
        super().__init__(model, length, batch)
        if held_out < LEAST_NEIGHBOURS:
            raise UsageError(f"held_out must be an integer >= {LEAST_NEIGHBOURS} for an encoder, got {held_out}")
        if tokenizer is None or not tokenizer("a word").input_ids:
            raise UsageError("model must come with a tokenizer if it is an encoder: it writes no texts itself")
        self.tokenizer, self.source = tokenizer, MANUAL if source is None else source.name
        texts = manual_paragraphs() if source is None else _lines(source)
        encoded = tokenizer(texts, truncation=True, max_length=length, return_token_type_ids=False).input_ids
        rows = [
            list(row) for row in dict.fromkeys(tuple(ids) for ids in encoded)
        ]  # what was cut may have become equal
        if len(rows) < held_out + steps * batch:
            raise UsageError(
                f"texts must be {held_out + steps * batch:,} different ones or more (held_out + steps x batch), got "
                f"{len(rows):,} in {self.source if source is None else str(source)!r}"
            )
        self.fingerprint = {"rows": len(rows), "sha256": content_fingerprint(repr(row).encode() for row in rows)}
        rows = _shuffled(rows, HELD_OUT_SEED)
        self.rows = rows[held_out:]
        self.held_out = self._batches(rows[:held_out])
        self.vectors = self._vectors_of(model)
        self.neighbours = nearest(self.vectors)

    def lessons(self, seed: int, steps: int) -> list[Lesson]:
        return self._batches(_shuffled(self.rows, seed)[: steps * self.batch])

    def loss(self, student: PreTrainedModel, lesson: Lesson) -> torch.Tensor:
        """Mean over tokens of 1 - cosine of the student's state and the teacher's."""
        with torch.no_grad():
            wanted = self.model(**lesson).last_hidden_state
        found = student(**lesson).last_hidden_state
        shown = lesson["attention_mask"].bool()
        return 1 - functional.cosine_similarity(found[shown].float(), wanted[shown].float(), dim=-1).mean()

    def score(self, student: PreTrainedModel) -> tuple[float, ...]:
        """1 - cosine of sentence vectors, mean over texts; share of texts with the teacher's nearest neighbour."""
        vectors = self._vectors_of(student)
        return (
            float(1 - (vectors * self.vectors).sum(-1).mean()),
            float((nearest(vectors) == self.neighbours).double().mean()),
        )

    def facts(self) -> dict[str, Any]:
        return {"texts": self.source, **self.fingerprint}

    def _batches(self, rows: Sequence[Sequence[int]]) -> list[Lesson]:
        parts = (rows[start : start + self.batch] for start in range(0, len(rows), self.batch))
        return [self._padded(part) for part in parts]

    def _padded(self, rows: Sequence[Sequence[int]]) -> Lesson:
        given = BatchEncoding({"input_ids": [list(row) for row in rows]})
        return dict(self.tokenizer.pad(given, return_tensors="pt").to(self.model.device))

    @torch.no_grad()
    def _vectors_of(self, model: PreTrainedModel) -> torch.Tensor:
        return torch.cat([sentence_vectors(model(**part).last_hidden_state, part) for part in self.held_out])


def sentence_vectors(states: torch.Tensor, lesson: Lesson) -> torch.Tensor:
    """Mean states of the tokens that are no padding, of length 1 and in float64: ``[texts, width]``.

    Args:
        states: ``[texts, tokens, width]``.
        lesson: whose mask is used.
    """
    shown = lesson["attention_mask"].unsqueeze(-1)
    return functional.normalize((states.double() * shown).sum(1), dim=-1)


def nearest(vectors: torch.Tensor) -> torch.Tensor:
    """For each of the vectors of length 1 ``[n, width]``, which other one is the nearest: ``[n]``."""
    return (vectors @ vectors.T).fill_diagonal_(-2).argmax(-1)


@torch.no_grad()
def cross_entropy(model: PreTrainedModel, texts: torch.Tensor, batch: int) -> float:
    """Mean negative log-likelihood of all tokens but the first, in nats.

    Args:
        model: a causal language model.
        texts: token ids ``[texts, length]``.
        batch: texts that are read at once.
    """
    total = 0.0
    for part in texts.split(batch):
        logits = model(part, use_cache=False).logits[:, :-1].double()
        total += float(functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum"))
    return total / texts[:, 1:].numel()


def manual_paragraphs() -> list[str]:
    """Paragraphs of all topics of Python's manual, in the order of the topics' titles."""
    return [text for _, topic in sorted(pydoc_topics().items()) for text in paragraphs_of(topic)]


def _lines(source: Path) -> list[str]:
    try:
        lines = source.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"texts must be a text file in UTF-8, got {str(source)!r}: {plain_message(error)}") from error
    found = [line for line in lines if line.strip()]
    if not found:
        raise UsageError(f"texts must be a file with a text on each line, got {str(source)!r}, which has none")
    return found


def _shuffled(rows: Sequence[list[int]], seed: int) -> list[list[int]]:
    return [rows[index] for index in torch.randperm(len(rows), generator=_generator(seed)).tolist()]


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
