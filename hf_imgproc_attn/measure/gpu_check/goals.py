"""What a GPU check is to reach, in units of plain attention's time, and whether its record says so. No torch here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from .parts import MEASURED


class Goal(NamedTuple):
    """A ratio to plain attention, or to the stock model, that the fastest right method should not pass.

    Attributes:
        title: in words.
        letter: the part that measures it.
        about: what a case that counts says of itself.
        limits: by direction of a case; ``""`` for cases that have one ratio only.
    """

    title: str
    letter: str
    about: dict[str, Any]
    limits: dict[str, float]


_BOTH = "forward + backward"
GOALS = (
    Goal(
        "twicing, ViT-B's shape",
        "c",
        {"filter": "twicing", "shape": [64, 12, 197, 64], "graph": False},
        {"forward": 1.15, _BOTH: 1.3},
    ),
    Goal(
        "twicing, causal, 2,048 tokens, width 64",
        "c",
        {"filter": "twicing", "shape": [8, 12, 2048, 64], "graph": False},
        {"forward": 1.3, _BOTH: 1.4},
    ),
    Goal(
        "twicing, one token after 4,096",
        "c",
        {"what": "decoding", "shape": [1, 12, 4096, 64], "graph": True},
        {"": 1.5},
    ),
    Goal(
        "twicing in GPT-2 small, one token after 4,096",
        "d",
        {"what": "decoding after 4,096 tokens", "variant": "twicing"},
        {"": 1.1},
    ),
)


def goal_lines(record: dict[str, Any]) -> list[str]:
    """A line for each goal and direction: the fastest that was measured, and whether the goal is met."""
    return [line for goal in GOALS for line in _lines(goal, record)]


def _lines(goal: Goal, record: dict[str, Any]) -> Iterator[str]:
    for direction, limit in goal.limits.items():
        words = f"{goal.title}{', ' * bool(direction)}{direction}: goal {limit:.2f}"
        found = list(_ratios(goal, direction, record))
        if not found:
            yield f"{words}, not measured"
            continue
        ratio, method = min(found)
        yield f"{words}, {'met' if ratio <= limit else 'missed'}: {ratio:.2f} by {method}"


def _ratios(goal: Goal, direction: str, record: dict[str, Any]) -> Iterator[tuple[float, str]]:
    for case in record["parts"].get(goal.letter, {}).get("cases", {}).values():
        about, values = case["about"], case.get("values", {})
        if case["status"] != MEASURED or any(about.get(name) != value for name, value in goal.about.items()):
            continue
        found = values["directions"][direction] if direction else values
        yield found["ratio"], about.get("backend") or ("compiled" if about.get("compiled") else "eager")


def decoding_rows(cases: dict[str, Any]) -> list[list[str]]:
    """Cells of a table of the times of single tokens: method, shape, how, ratio to plain attention, microseconds."""
    rows = []
    for case in cases.values():
        about, values = case["about"], case.get("values")
        if case["status"] == MEASURED and about.get("what") == "decoding" and values:
            how = "CUDA graph" if about["graph"] else "eager"
            ratio = f"{values['ratio']:.2f} ({values['ratio_low']:.2f} to {values['ratio_high']:.2f})"
            both = f"{1000 * values['milliseconds']:.3g} / {1000 * values['plain_milliseconds']:.3g}"
            rows.append([about["backend"], str(tuple(about["shape"])), how, ratio, both])
    return rows
