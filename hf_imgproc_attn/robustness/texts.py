"""Perplexity of a causal language model, or accuracy of a text classifier, on texts with changed words.

Results have the form of :mod:`.images`. A language model gives two for each text: perplexity a token, and a word,
which can be compared between tokenizers; words are counted in the text that is read, changed or not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from ..errors import UsageError
from .classifier import pack_bits
from .images import FORMAT, Result, result_key
from .settings import TEXT_CHANGES, TextSettings, as_plain
from .text_changes import CHANGES, SWAPPED_WORD

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..training_support.text_data import TextSplit

DEFINITIONS = {
    "word swap": f"randomly chosen words replaced by {SWAPPED_WORD}, which a language model has to predict like the "
    "others",
    "word deletion": "randomly chosen words left out; perplexity a word is that of the words that are left",
    "typos": "one letter swapped, dropped, put in or changed in each of randomly chosen words",
    "fraction": "part of the words that is changed",
}
"""The disturbances and their parameter."""
DEFAULT_BLOCK_SIZE = 256
UNCHANGED = "unchanged"
"""Of results on texts so short that no word was changed."""


def evaluate_text_robustness(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    settings: TextSettings | None = None,
    *,
    labels: Sequence[int] | None = None,
    block_size: int | None = None,
    first_token: int | None = None,
    done: Iterable[Result] = (),
    on_result: Callable[[Result], None] | None = None,
) -> Result:
    """Measure a language model, or with labels a text classifier, on texts as they are and with changed words.

    Args:
        model: any causal language model or text classifier of Transformers, used as it is.
        tokenizer: its tokenizer.
        texts: lines of a text, or for a classifier texts.
        settings: what is measured; None: all changes at 1.5, 2.5 and 5 %.
        labels: class indices of the texts, for a classifier.
        block_size: tokens that are read at once; None: 256 for a language model, what it can read for a classifier,
            or the model's positions if these are fewer.
        first_token: that a language model reads before the text; None: the tokenizer's first or last special one.
        done: results of an earlier call with the same settings, model and texts, which are not measured again.
        on_result: is called with each result as soon as it is known.

    Returns:
        ``results`` (clean first; with ``unchanged`` where the part is less than half a word), ``settings``,
        ``definitions`` and ``seconds``: as JSON holds them.

    Raises:
        UsageError: for texts or labels that do not fit the model.
    """
    settings = settings or TextSettings()
    started = time.perf_counter()
    lines = _checked(texts, labels, model)
    length = _length(model, tokenizer, block_size, labels is not None)
    measure = (
        _classifier(model, tokenizer, labels, length, settings)
        if labels is not None
        else _reader(model, tokenizer, length, first_token, settings)
    )
    earlier: dict[tuple[Any, ...], list[Result]] = {}
    for result in done:
        earlier.setdefault(_change_key(result), []).append(result)
    wanted = 1 if labels is not None else 2
    plans: list[tuple[str, str, int | None, float]] = [("clean", "clean", None, 0.0)]
    plans += [
        (TEXT_CHANGES[name], name, settings.seed, part) for name in settings.changes for part in settings.fractions
    ]
    results: list[Result] = []
    for title, name, seed, fraction in plans:
        about: Result = {
            "family": title,
            "disturbance": title,
            "parameters": {"fraction": fraction} if seed is not None else {},
        }
        known = earlier.get(_change_key({**about, "seed": seed}), [])
        if len(known) == wanted:
            results += known
            continue
        changed = lines if seed is None else CHANGES[name](lines, fraction, seed)
        if seed is not None and changed == lines:
            about[UNCHANGED] = True
        for measured in measure(changed):
            results.append({**about, "seed": seed, **measured})
            if on_result is not None:
                on_result(results[-1])
    used = {name for result in results for name in (result["disturbance"], *result["parameters"])}
    return {
        "format": FORMAT,
        "task": "causal-lm" if labels is None else "text-classification",
        "settings": {**as_plain(settings), "block_size": length},
        "results": results,
        "definitions": {name: text for name, text in DEFINITIONS.items() if name in used},
        "seconds": time.perf_counter() - started,
    }


def count_measurements(settings: TextSettings, is_classifier: bool) -> int:
    """How many results these settings lead to."""
    return (1 + len(settings.changes) * len(settings.fractions)) * (1 if is_classifier else 2)


@torch.no_grad()
def text_perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: TextSplit,
    block_size: int,
    batch_size: int = 16,
    first_token: int | None = None,
) -> list[Result]:
    """Perplexity a token and a word on a text, as defined in :mod:`..training_support.text_data`.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        text: lines of a split.
        block_size: tokens in a block.
        batch_size: blocks at once.
        first_token: that is read before the text; None: the tokenizer's end-of-text token.

    Returns:
        Their ``metric``, ``value``, ``samples`` and ``unit``.

    Raises:
        UsageError: for a model whose tokens see later ones, a tokenizer with more tokens than the model, or losses
            that are not finite.
    """
    from ..filtered import refuse_what_sees_ahead
    from ..training_support.metrics import Perplexity, token_losses
    from ..training_support.text_data import IGNORED_LABEL, TokenBlocks, encode

    refuse_what_sees_ahead(model, "the model")
    tokens = encode(text, tokenizer, "tokenising", first_token)
    check_vocabulary(model, tokens)
    blocks = TokenBlocks(tokens, block_size, int(tokenizer.pad_token_id or 0))
    model.eval()
    losses = []
    for batch in DataLoader(blocks, batch_size=batch_size):
        labels = batch["labels"].to(model.device)
        found = token_losses(model(input_ids=batch["input_ids"].to(model.device), use_cache=False).logits, labels)
        losses.append(found[labels[:, 1:] != IGNORED_LABEL].cpu())
    scored = torch.cat(losses)
    if not scored.isfinite().all():
        raise UsageError(
            f"the model must have finite losses, got others for {int((~scored.isfinite()).sum())} of {len(scored)} "
            "tokens"
        )
    values = Perplexity(keep_in_memory=True).compute(predictions=scored.numpy(), words=text.num_words) or {}
    return [
        {"metric": "perplexity", "value": values["perplexity"], "samples": len(scored), "unit": "tokens"},
        {"metric": "word_perplexity", "value": values["word_perplexity"], "samples": text.num_words, "unit": "words"},
    ]


def check_vocabulary(model: PreTrainedModel, tokens: Any) -> None:
    """Refuse a tokenizer that belongs to a larger model: torch's own error names neither.

    Args:
        model: of texts.
        tokens: their ids, an array or tensor of any shape.

    Raises:
        UsageError: if an id is beyond the model's embeddings.
    """
    rows = getattr(model.get_input_embeddings(), "num_embeddings", None)
    largest = int(tokens.max()) if len(tokens) else -1
    if rows is not None and largest >= rows:
        raise UsageError(
            f"the tokenizer must give tokens that the model has, 0 to {rows - 1}, got {largest}: it is another model's"
        )


def _reader(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    first_token: int | None,
    settings: TextSettings,
) -> Callable[[list[str]], list[Result]]:
    from ..training_support.text_data import TextSplit

    first = first_token
    for name in ("bos_token_id", "eos_token_id", "cls_token_id"):
        first = getattr(tokenizer, name) if first is None else first
    if first is None:
        raise UsageError("the tokenizer must have a first or last special token to begin a text with, got none")

    def measure(lines: list[str]) -> list[Result]:
        return text_perplexity(model, tokenizer, TextSplit(lines), length, settings.batch_size, first)

    return measure


def _classifier(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    labels: Sequence[int],
    length: int,
    settings: TextSettings,
) -> Callable[[list[str]], list[Result]]:
    from transformers import DataCollatorWithPadding

    from ..training_support.labelled_text import LabelledTexts, TokenizedTexts

    # Without a padding token of its own a model cannot tell the end of a text in a batch of several, and without one
    # of its tokenizer there is none.
    pads = getattr(model.config, "pad_token_id", None) is not None and tokenizer.pad_token_id is not None
    size = settings.batch_size if pads else 1
    collate = DataCollatorWithPadding(tokenizer, padding=size > 1)

    @torch.no_grad()
    def measure(texts: list[str]) -> list[Result]:
        rows = TokenizedTexts(LabelledTexts(texts, np.asarray(labels)), tokenizer, length)
        model.eval()
        found = []
        for batch in DataLoader(rows, batch_size=size, collate_fn=collate):
            wanted = batch.pop("labels")
            check_vocabulary(model, batch["input_ids"])
            logits = model(**{name: tensor.to(model.device) for name, tensor in batch.items()}).logits
            if not logits.isfinite().all():
                raise UsageError("the model must have finite logits, got others")
            found.append(logits.argmax(-1).cpu() == wanted)
        correct = torch.cat(found)
        measured = {
            "metric": "accuracy",
            "value": correct.float().mean().item(),
            "samples": len(rows),
            "unit": "texts",
        }
        return [{**measured, "correct": pack_bits(correct)}]

    return measure


def _checked(texts: Sequence[str], labels: Sequence[int] | None, model: PreTrainedModel) -> list[str]:
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise UsageError("texts must be a list of strings")
    if not any(text.strip() for text in texts):
        raise UsageError(f"texts must have a word, got {len(texts)} texts without any")
    if labels is None:
        return [text.rstrip("\r\n") + "\n" for text in texts]
    if len(labels) != len(texts):
        raise UsageError(f"labels must be one class index a text, {len(texts)}, got {len(labels)}")
    for label in labels:
        if not 0 <= int(label) < model.config.num_labels:
            raise UsageError(
                f"labels must be classes of the model, 0 to {model.config.num_labels - 1}, got {int(label)}: the data "
                "set has other classes than the model"
            )
    return list(texts)


def _length(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, block_size: int | None, is_classifier: bool
) -> int:
    """Tokens that are read at once."""
    names = ("max_position_embeddings", "n_positions")
    known = [int(size) for name in names if (size := getattr(model.config, name, None))]
    most = min([*known, int(tokenizer.model_max_length)])
    wanted = block_size or (most if is_classifier else DEFAULT_BLOCK_SIZE)
    if block_size is not None and not 2 <= block_size <= most:
        raise UsageError(f"block_size must be an integer from 2 to {most}, what the model can read, got {block_size}")
    return min(wanted, most)


def _change_key(result: Result) -> tuple[Any, ...]:
    return result_key({**result, "metric": None, "samples": None, "unit": None})
