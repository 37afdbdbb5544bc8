"""Runs and rendered cards that the tests of cards share."""

from __future__ import annotations

import copy
import re
from typing import Any

import make_results
import yaml

from hf_imgproc_attn.cards.rendering import RunResults, render_card
from tests.helpers import ROOT

RESULTS, CARDS = ROOT / "training" / "results", ROOT / "model_cards"
NAMES = make_results.NAMES


def changed(run: RunResults, **changes: Any) -> RunResults:
    """A copy of a run with some fields of its record replaced; a dotted name, with ``__``, reaches into it."""
    record = copy.deepcopy(run.record)
    for name, value in changes.items():
        *parents, last = name.split("__")
        target = record
        for parent in parents:
            target = target[parent]
        target[last] = value
    return RunResults(record, copy.deepcopy(run.robustness), run.name)


def render(run: RunResults, **options: Any) -> str:
    return render_card(run, **({"repo_id": "you/model", "revision": "v1"} | options))


def tables(card: str) -> list[list[list[str]]]:
    """The cells of every table, header first."""
    found = re.findall(r"(?:^\|.*\|$\n?)+", card, re.MULTILINE)
    rows = [[re.split(r"(?<!\\)\|", line)[1:-1] for line in table.splitlines()] for table in found]
    return [[[cell.strip() for cell in row] for row in (table[0], *table[2:])] for table in rows]


def front_matter(card: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return content


def recipe_of(name: str) -> str:
    """The recipe of a result."""
    return next(recipe for recipe in make_results.RECIPES if name.startswith(f"{recipe}_"))
