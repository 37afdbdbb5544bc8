"""One input for several checkpoints: shared where they have the same tokens, and said plainly where they do not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ..conversion_probe import longest_text
from ..errors import UsageError
from .inputs import TEXT_LENGTH, WRITTEN, Shown, load_config, show, tokenizer_of, with_company

OTHER_INPUT = "not the input of"
"""Beginning of the note of a checkpoint that sees something else than the first one."""


class Asked(NamedTuple):
    """What the command line asks for: see :func:`.inputs.show`, and :func:`.inputs.with_company` for ``beside``."""

    files: Sequence[str] = ()
    data: str = "auto"
    samples: int = 16
    length: int | None = None
    seed: int = 0
    beside: int = 0

    def show(self, model: Any, checkpoint: str) -> Shown:
        """What a checkpoint is shown by itself."""
        shown = show(
            model,
            checkpoint,
            files=self.files,
            data=self.data,
            samples=self.samples,
            length=self.length,
            seed=self.seed,
        )
        return with_company(model, checkpoint, shown, self.beside if self.files else 0, self.seed)


class Seen(NamedTuple):
    """What a checkpoint was shown.

    name: of the checkpoint in the reports.
    vocabulary: how many tokens it has; 0 for models of images.
    tokens: word -> number of its tokenizer; None: it has none.
    """

    name: str
    shown: Shown
    vocabulary: int
    tokens: dict[str, int] | None


def common_length(checkpoints: Sequence[str], length: int | None) -> int | None:
    """The length of texts that all checkpoints have places for, before any of them is loaded.

    Args:
        checkpoints: folders or Hub names.
        length: what is asked for; None: :data:`.inputs.TEXT_LENGTH`, or fewer.

    Raises:
        UsageError: for a length that one of them has no places for.
    """
    configs = {name: load_config(name).get_text_config() for name in checkpoints}
    places = {name: longest_text(config) for name, config in configs.items() if hasattr(config, "vocab_size")}
    for name, longest in places.items():
        if isinstance(length, int) and length > longest:
            raise UsageError(f"length must be at most {longest}, the places of {name!r}, got {length}")
    return min((TEXT_LENGTH, *places.values())) if length is None else length


def shown_to(model: Any, checkpoint: str, name: str, asked: Asked, seen: list[Seen]) -> Shown:
    """What a checkpoint is shown: what an earlier one was, where it can be.

    Args:
        model: the checkpoint, loaded.
        checkpoint: where it is.
        name: in the reports.
        asked: by the command line.
        seen: by the earlier checkpoints; this one is put behind them.

    Raises:
        UsageError: as of :func:`.inputs.show`.
    """
    if getattr(model, "main_input_name", "") == "input_ids":
        found = _texts(model, checkpoint, name, asked, seen)
    else:
        shown = asked.show(model, checkpoint)
        found = Seen(name, _with_note(shown, _other_images(shown, seen), seen), 0, None)
    seen.append(found)
    return found.shown


def _with_note(shown: Shown, difference: str, seen: list[Seen]) -> Shown:
    return shown._replace(notes=(f"{OTHER_INPUT} {seen[0].name}: {difference}",)) if difference else shown


def _texts(model: Any, checkpoint: str, name: str, asked: Asked, seen: list[Seen]) -> Seen:
    vocabulary = int(getattr(model.config.get_text_config(), "vocab_size", 0) or 0)
    tokenizer = tokenizer_of(checkpoint)
    tokens = None if tokenizer is None else dict(tokenizer.get_vocab())
    differences = []
    for earlier in seen:
        difference = _other_tokens(earlier, vocabulary, tokens)
        if not difference:
            notes = [note for note in earlier.shown.notes if note.startswith(OTHER_INPUT)]
            if (tokens is None) != (earlier.tokens is None):
                without = name if tokens is None else earlier.name
                notes.append(f"{without} has no tokenizer: its {vocabulary:,} tokens are taken for those of the other")
            return Seen(name, earlier.shown._replace(notes=tuple(notes)), vocabulary, tokens)
        differences.append(difference)
    shown = asked.show(model, checkpoint)
    if shown.described == WRITTEN:
        shown = shown._replace(described=f"texts that {name} wrote")
    return Seen(name, _with_note(shown, differences[0] if differences else "", seen), vocabulary, tokens)


def _other_tokens(earlier: Seen, vocabulary: int, tokens: dict[str, int] | None) -> str:
    """Why a model cannot be shown what an earlier one was; empty: it can."""
    ids = earlier.shown.inputs.get("input_ids")
    if ids is None:
        return "one takes texts, the other images"
    if tokens is not None and earlier.tokens is not None:
        if tokens != earlier.tokens:
            return "it has other tokens, and cuts texts in its own way"
    elif vocabulary != earlier.vocabulary:
        return f"it has other tokens ({vocabulary:,}, not {earlier.vocabulary:,})"
    if int(ids.max()) >= vocabulary:
        return f"it has vectors for {vocabulary:,} tokens only"
    return ""


def _other_images(shown: Shown, seen: list[Seen]) -> str:
    """How images differ from those of the first model; empty: they do not, or are only normalised otherwise."""
    if not seen:
        return ""
    given = next(iter(shown.inputs.values()))
    first = next(iter(seen[0].shown.inputs.values()))
    if given.ndim != first.ndim:
        return "one takes images, the other texts"
    if shown.described != seen[0].shown.described:
        return f"it is shown {shown.described}"
    if given.shape != first.shape:
        same = "other ones, in" if shown.described == "random pixels" else "the same pictures, in"
        return f"{same} {_size(given)} instead of {_size(first)}"
    return ""


def _size(pixels: torch.Tensor) -> str:
    channels, height, width = pixels.shape[1:]
    return f"{height} x {width} pixels of {channels} channel{'s' * (channels > 1)}"
