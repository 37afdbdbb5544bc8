"""The numbers of a model's filters, as ``run.json`` keeps them and as a card shows them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..markdown_tables import table_text

if TYPE_CHECKING:
    from ..models.layer_summary import FilterSummary

BUCKETS = {"buckets": ("bucket_least", "bucket_most")}
"""Numbers of which a head has a list -> the names of the smallest and the largest of them, which a record keeps."""

MEANINGS = {
    "h_y": "content bandwidth, in units of the distance between queries and keys",
    "h_p": "position bandwidth (`gaussian`: in tokens or patches; `untied`: in units of the position vectors)",
    "class_to": "logit to the class token",
    "class_from": "logit from the class token",
    "class_within": "logit of the class token to itself",
    "gain": "γ of the booster",
    "alpha": "α of the booster, on what A passes",
    "share": "λ of the second map",
    "sink": "logit of the sink",
    "beta": "β of the booster, on what A removes",
    "lambda": "λ of the feedback",
    "P": "λ_P of the feedback",
    "I": "λ_I of the feedback",
    "D": "λ_D of the feedback",
    "bucket_least": "smallest logit of a bucket of offsets",
    "bucket_most": "largest logit of a bucket of offsets",
}
"""What the numbers are; every name that ``layer_summary`` gives has its entry."""

NOTHING_LEARNED = "Beside the projections nothing in the filters is learned."

_DIGITS = 6
_PLACES = ("layer", "head")


def recorded(summary: FilterSummary) -> dict[str, Any]:
    """What a record keeps of a model's ``filter_summary()``: plain numbers of six digits, little of long lists.

    Returns:
        ``rows``, one dictionary for each layer and head, and ``learned``, the names of those that are trained.
    """
    rows = [_short(row) for row in summary.rows]
    return {"rows": rows, "learned": [short for name in summary.learned for short in BUCKETS.get(name, (name,))]}


def check(summary: Any) -> None:
    """Refuse what is not of the form that :func:`recorded` makes.

    Raises:
        UsageError: says what is wrong, without the name of the file.
    """
    rows, learned = (summary.get(name) if isinstance(summary, dict) else None for name in ("rows", "learned"))
    if not isinstance(rows, list) or not isinstance(learned, list):
        raise UsageError("filter_summary must have lists of rows and of learned names")
    for row in rows:
        if not isinstance(row, dict) or not set(_PLACES) <= row.keys():
            raise UsageError(f"a row of filter_summary must have a layer and a head, got {row!r}")
        for name, value in row.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise UsageError(f"{name} in filter_summary must be a number, got {value!r}")
    if not all(isinstance(name, str) for name in learned):
        raise UsageError(f"learned in filter_summary must be names, got {learned!r}")


def in_markdown(summary: dict[str, Any]) -> str:
    """A table of what is learned or differs between heads, and sentences about the rest.

    Args:
        summary: as :func:`recorded` made it.
    """
    rows, learned = summary["rows"], set(summary["learned"])
    found = {name for row in rows for name in row}.difference(_PLACES)
    names = sorted(found, key=[*MEANINGS, *sorted(found)].index)  # a file has them in the order of the alphabet
    values = {name: [row[name] for row in rows if name in row] for name in names}
    constant = [name for name in names if name not in learned and len(set(values[name])) == 1]
    shown = [name for name in names if name not in constant]
    paragraphs = []
    if shown:
        kinds = {name: "learned" if name in learned else "fixed" for name in shown}
        header = ["layer", *(f"`{name}` ({kinds[name]})" for name in shown)]
        layers = dict.fromkeys(row["layer"] for row in rows)
        cells = [[str(layer), *(_heads(rows, layer, name) for name in shown)] for layer in layers]
        paragraphs.append("One value for each head, in their order.\n\n" + table_text(header, cells))
    else:
        paragraphs.append(NOTHING_LEARNED)
    if constant:
        listed = ", ".join(f"`{name}` = {_number(values[name][0])}" for name in constant)
        paragraphs.append(f"The same in all heads, and fixed: {listed}.")
    meanings = "; ".join(f"`{name}`: {MEANINGS[name]}" for name in names if name in MEANINGS)
    return "\n\n".join([*paragraphs, f"{meanings}."] if meanings else paragraphs)


LENS = {
    "entropy_share": "entropy of the weights, as a share of that of uniform ones",
    "position_bandwidth": "bandwidth of the Gaussian position kernel that would look as far, in tokens or patches",
    "content_bandwidth": "bandwidth between directions of queries and keys on the unit sphere",
    "sink_weight": "weight on class tokens, of a text on its first token",
    "similarity": "mean cosine of two tokens as they leave the layer",
}
"""What ``lens_every`` records, by layer."""


LENS_PREFIX = "lens_"
"""Beginning of the names under which it is logged."""


def lens_history(log: Iterable[Mapping[str, Any]]) -> list[list[Any]]:
    """Steps and what was seen at each, ``[[step, {measure: [of each layer]}], ...]``, from a Trainer's log."""
    history: list[list[Any]] = []
    for entry in log:
        seen: dict[str, dict[int, float]] = {}
        for name, value in entry.items():
            if name.startswith(LENS_PREFIX):
                measure, _, layer = name.removeprefix(LENS_PREFIX).rpartition("_")
                seen.setdefault(measure, {})[int(layer)] = value
        if seen:
            history.append([entry["step"], {name: [held[i] for i in sorted(held)] for name, held in seen.items()}])
    return history


def check_lens(history: Any) -> None:
    """Refuse what is not of the form of a run's ``lens_history``.

    Raises:
        UsageError: says what is wrong, without the name of the file.
    """
    for entry in history:
        fits = isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], dict)
        values = [value for held in entry[1].values() for value in held] if fits else [None]
        if any(isinstance(value, bool) or not isinstance(value, int | float) for value in values):
            raise UsageError(f"lens_history must hold a step and lists of numbers by name, got {entry!r}")


def lens_in_markdown(history: list[list[Any]]) -> str:
    """What the attention did with a few samples at the end of the training, by layer, and before it.

    Args:
        history: as ``lens_every`` recorded it.
    """
    (_, first), (step, last) = history[0], history[-1]
    names = [name for name in LENS if name in last]
    layers = max(len(last[name]) for name in names)
    header = ["layer", *(f"`{name}`" for name in names)]
    rows = [
        [str(layer), *(f"{_at(first, name, layer)} → {_at(last, name, layer)}" for name in names)]
        for layer in range(layers)
    ]
    meanings = "; ".join(f"`{name}`: {LENS[name]}" for name in names)
    return (
        f"What the attention did with a few samples, means over heads, before training → after {step} steps.\n\n"
        + table_text(header, rows)
        + f"\n\n{meanings}."
    )


def _at(seen: dict[str, list[float]], name: str, layer: int) -> str:
    held = seen.get(name, [])
    return _number(held[layer]) if layer < len(held) else "-"


def _short(row: dict[str, Any]) -> dict[str, Any]:
    short: dict[str, Any] = {}
    for name, value in row.items():
        if name in BUCKETS:
            flat = [number for axis in value for number in axis]
            short |= zip(BUCKETS[name], map(_rounded, (min(flat), max(flat))), strict=True)
        else:
            short[name] = value if name in _PLACES else _rounded(value)
    return short


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


def _heads(rows: list[dict[str, Any]], layer: int, name: str) -> str:
    """The values of a layer's heads, or a dash where the layer has no such number."""
    return ", ".join(_number(row[name]) for row in rows if row["layer"] == layer and name in row) or "-"


def _number(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "not a number" if math.isnan(value) else "infinite"
