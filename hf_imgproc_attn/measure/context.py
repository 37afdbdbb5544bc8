"""``imgproc-attn context``: how much a causal language model gains from a longer context.

The same tokens are predicted at every length: windows end at places spread evenly over long documents, and the last
tokens of each window are scored, once with 128 tokens in the window, once with 256, and so on. What differs between
two lengths is therefore the context alone, and their difference is a paired one. Nothing is put before a window, and
none reaches beyond its document.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError, plain_message, refuse_missing_path, require_extras

if TYPE_CHECKING:
    import numpy as np
    import torch

LENGTHS = (128, 256, 512, 1024, 2048, 4096)
FORMAT = 1
_TOKENS_AT_ONCE = 8192
_CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured.

    Attributes:
        lengths: tokens of the windows, ascending; None: those of :data:`LENGTHS` that model and text have room for.
        windows: places at which tokens are scored.
        scored: the last tokens of a window, which are.

    Raises:
        UsageError: for lengths that do not ascend, or numbers that do not fit them.
    """

    lengths: Sequence[int] | None = None
    windows: int = 32
    scored: int = 32

    def __post_init__(self) -> None:
        if self.windows < 2:
            raise UsageError(f"windows must be an integer >= 2, got {self.windows}")
        lengths = list(LENGTHS if self.lengths is None else self.lengths)
        if not lengths or lengths != sorted(set(lengths)):
            raise UsageError(f"lengths must be different numbers that ascend, got {lengths}")
        if not 1 <= self.scored < lengths[0]:
            raise UsageError(
                f"scored must be at least 1 and less than the shortest length {lengths[0]}, got {self.scored}"
            )


def measure(checkpoint: str, files: Sequence[Path], settings: Settings) -> dict[str, Any]:
    """Perplexity of a checkpoint at every length of the context.

    Args:
        checkpoint: a folder or Hub name of a causal language model with its tokenizer.
        files: texts in UTF-8, a document each; none: the topics of Python's manual.
        settings: what is measured.

    Returns:
        The record: ``rows`` with ``length``, ``perplexity`` a token and ``gain`` over the shortest length in nats a
        token, both with an interval of 95 % from the windows; settings, versions, device and the text's fingerprint.

    Raises:
        UsageError: for a checkpoint or text that cannot be read, a length that the model has no positions for, or
            a text without a document that long.
    """
    require_extras("train")
    refuse_missing_path("checkpoint", checkpoint)
    documents = read_documents(files)
    import torch

    from .. import records
    from ..robustness.texts import check_vocabulary
    from ..training_support.data_loading import content_fingerprint

    model, tokenizer = _load(checkpoint)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).eval()
    tokens = {name: _encode(tokenizer, text) for name, text in documents.items()}
    for ids in tokens.values():
        check_vocabulary(model, ids)
    lengths = choose_lengths(settings.lengths, model, max(map(len, tokens.values())))
    started = time.perf_counter()
    losses = window_losses(model, window_ends(tokens, lengths[-1], settings.windows), lengths, settings.scored)
    if not all(math.isfinite(value) for values in losses.values() for value in values):
        raise UsageError("the model must have finite losses, got others")
    parts = (text.encode() for text in documents.values())
    return {
        "format": FORMAT,
        "checkpoint": checkpoint,
        "model_type": model.config.model_type,
        "rows": summarise(losses),
        "windows": len(next(iter(losses.values()))),
        "scored": settings.scored,
        "text": {"documents": len(documents), "sha256": content_fingerprint(parts)},
        "versions": records.package_versions(),
        "git": records.git_state(),
        "device": records.device_description(device, processes=1),
        "seconds": time.perf_counter() - started,
    }


def read_documents(files: Sequence[Path]) -> dict[str, str]:
    """Name -> text of every document.

    Raises:
        UsageError: for a file that cannot be read as text, or has none.
    """
    if not files:
        from ..training_support.text_data import pydoc_topics

        return pydoc_topics()
    documents = {}
    for path in files:
        try:
            documents[str(path)] = path.read_text(encoding="utf-8")
        except OSError as error:
            raise UsageError(f"text must be a readable file, got {str(path)!r}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise UsageError(f"text must be in UTF-8, got {str(path)!r}: {error}") from error
        if not documents[str(path)].strip():
            raise UsageError(f"text must not be empty, got {str(path)!r}")
    return documents


def choose_lengths(given: Sequence[int] | None, model: Any, longest: int) -> list[int]:
    """The lengths that model and text have room for.

    Args:
        given: by the user, or None.
        model: the language model; without a table of positions it may be asked for more than it was trained on.
        longest: tokens of the longest document.

    Raises:
        UsageError: if a length that was given has no room, or none has.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    if given is None:
        lengths = [length for length in LENGTHS if length <= min(limit, longest)]
        if not lengths:
            raise UsageError(
                f"lengths must be given: the shortest, {LENGTHS[0]}, is more than the model's {limit} positions or "
                f"the {longest} tokens of the longest document"
            )
        return lengths
    if given[-1] > limit and has_position_table(model):
        raise UsageError(f"lengths must not exceed the model's {limit} positions, got {given[-1]}")
    if given[-1] > longest:
        raise UsageError(f"lengths must not exceed the {longest} tokens of the longest document, got {given[-1]}")
    return list(given)


def has_position_table(model: Any) -> bool:
    """Whether a model looks positions up in a table, which ends, and does not compute them."""
    from torch import nn

    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    words = model.get_input_embeddings()
    tables = (part for part in model.modules() if isinstance(part, nn.Embedding) and part is not words)
    return limit is not None and any(limit <= table.num_embeddings <= limit + 2 for table in tables)


def window_ends(tokens: Mapping[str, np.ndarray], longest: int, windows: int) -> list[np.ndarray]:
    """Windows of the longest length, spread evenly over all places where one can end.

    Args:
        tokens: of every document; those that are too short are left out.
        longest: tokens of a window.
        windows: how many; fewer where there are fewer places.

    Returns:
        Token ids ``[longest]`` of each window.

    Raises:
        UsageError: for a text with room for less than two.
    """
    places = [(name, end) for name, ids in tokens.items() for end in range(longest, len(ids) + 1)]
    if len(places) < 2:
        raise UsageError(f"text must have room for two windows of {longest} tokens, got {len(places)}")
    count = min(windows, len(places))
    chosen = [places[(2 * index + 1) * len(places) // (2 * count)] for index in range(count)]
    return [tokens[name][end - longest : end] for name, end in chosen]


def window_losses(
    model: Any, windows: Sequence[np.ndarray], lengths: Sequence[int], scored: int
) -> dict[int, np.ndarray]:
    """Length -> mean negative log-likelihood of every window's last tokens, in nats, float64 ``[windows]``.

    Args:
        model: the language model.
        windows: token ids of the longest length.
        lengths: of the context, scored tokens included.
        scored: tokens at the end of each window.
    """
    import numpy as np
    import torch

    options: dict[str, Any] = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = scored + 1
    found = {}
    with torch.inference_mode():
        for length in lengths:
            size = max(1, _TOKENS_AT_ONCE // length)
            parts = []
            for first in range(0, len(windows), size):
                ids = torch.from_numpy(np.stack([window[-length:] for window in windows[first : first + size]]))
                ids = ids.to(model.device)
                logits = model(input_ids=ids, **options).logits[:, -scored - 1 : -1].float()
                parts.append(_cross_entropy(logits, ids[:, -scored:]).double().cpu())
            found[length] = torch.cat(parts).numpy()
    return found


def _cross_entropy(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), wanted, reduction="none").mean(1)


def summarise(losses: Mapping[int, np.ndarray]) -> list[dict[str, Any]]:
    """A row for every length, with intervals of 95 % (Student's t over the windows)."""
    rows = []
    base = next(iter(losses.values()))
    for length, values in losses.items():
        mean, low, high = _interval(values)
        gain, least, most = _interval(base - values)
        rows.append(
            {
                "length": length,
                "perplexity": _exp(mean),
                "perplexity_interval": [_exp(low), _exp(high)],
                "gain": gain,
                "gain_interval": [least, most],
            }
        )
    return rows


def table(record: dict[str, Any]) -> list[list[str]]:
    """The record's rows as a table of words, with a head."""
    rows = [["context", "perplexity", "95 % interval", "nats gained", "95 % interval"]]
    for row in record["rows"]:
        (low, high), (least, most) = row["perplexity_interval"], row["gain_interval"]
        gain = [f"{row['gain']:.3f}", f"{least:.3f} to {most:.3f}"]
        rows.append([str(row["length"]), f"{row['perplexity']:.2f}", f"{low:.2f} to {high:.2f}", *gain])
    return rows


def _interval(values: np.ndarray) -> tuple[float, float, float]:
    """The mean and the ends of its interval."""
    from scipy.stats import t

    mean, count = float(values.mean()), len(values)
    half = float(t.ppf((1 + _CONFIDENCE) / 2, count - 1) * values.std(ddof=1) / math.sqrt(count))
    return mean, mean - half, mean + half


def _exp(value: float) -> float:
    """exp, infinite instead of an overflow error."""
    return math.exp(value) if value < 700 else math.inf


def _load(checkpoint: str) -> tuple[Any, Any]:
    """The model and its tokenizer.

    Raises:
        UsageError: if there are none under this name.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ..filtered import refuse_what_sees_ahead

    try:
        model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(
            f"checkpoint must be a causal language model with its tokenizer, got {checkpoint!r}: "
            f"{plain_message(error)}"
        ) from error
    refuse_what_sees_ahead(model, f"checkpoint {checkpoint!r}")
    return model, tokenizer


def _encode(tokenizer: Any, text: str) -> np.ndarray:
    """Token ids ``[tokens]``, int64, without special tokens."""
    import numpy as np

    return np.array(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int64)
