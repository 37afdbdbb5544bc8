"""How trained models that get a filter recover: tables and verdicts of the records of ``finetune_real.py``."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..markdown_tables import table_lines
from .report import NOTHING
from .statistics import (
    BETTER,
    LEVEL,
    NO_DIFFERENCE,
    TOO_FEW,
    WORSE,
    Difference,
    Summary,
    compare,
    holm,
    summarise,
    verdict,
)

CONTROL = "stock"
"""The variant without a filter, which goes through the same steps."""
QUESTION = "Does a trained model get used to a filter?"
TITLE = "A trained model gets used to a filter"
"""Of the claim."""
_SUBJECT = (
    "Trained models of other people: a filter in some layers, then a short training of all parameters on what the "
    "model itself computes, with three seeds of the texts. A copy without a filter goes through the same steps. "
    "Values: how far the copies are from the model as it was, on texts that nobody trained on, where 0 is the same "
    "and lower is better: nats a token for language models, 1 - cosine of sentence vectors for encoders. "
    "[Recovery](recovery.md) has recipes and curves. These comparisons are not among those counted on top."
)
_CLAIM = (
    "A question of this package: a fixed filter changes at once what a trained model computes; does training make up "
    "for it? *Won back* is the part of that cost that is gone after training. *Beside the control* is paired by seed, "
    "its p-value corrected by Holm's method for the filters of one model. `learned_twicing` starts as the model was: "
    "it has nothing to win back."
)
FOLDER = "recovery"
"""Of the records, beside that of the ledgers."""
UNITS = {
    "cross_entropy": "nats a token above the model as it was",
    "distance": "1 - cosine to its sentence vectors",
}
"""What the first measure of a record is, in words."""
_NO_COST = 1e-5
"""A filter that costs less at once, in the record's unit, computes what the model did."""

Curve = list[list[float]]
"""``[step, value]`` for every measurement."""


@dataclass(frozen=True)
class Recovered:
    """What one variant of a record comes to.

    Attributes:
        variant: a preset, or :data:`CONTROL`.
        start: its cost before training, the same for all seeds.
        end: after training.
        won: end minus start, of every seed.
        beside: end minus the control's, paired by seed; None of the control itself.
        corrected: p-value of the latter, corrected for the variants of the record.
        neighbours: share of texts whose nearest neighbour is the model's own, before and after; None of words.
    """

    variant: str
    start: float
    end: Summary
    won: Difference
    beside: Difference | None
    corrected: float | None
    neighbours: tuple[float, float] | None

    @property
    def verdict(self) -> str:
        """Beside the control, where less is better; empty of the control."""
        return "" if self.beside is None else verdict(self.beside, self.corrected, higher_is_better=False)

    @property
    def costs(self) -> bool:
        """Whether the filter changes at once what the model computes."""
        return self.start > _NO_COST

    @property
    def recovers(self) -> bool:
        """Whether a filter that costs something costs less after training, beyond chance."""
        p = self.won.p_value
        return self.costs and p is not None and p < LEVEL and self.won.summary.mean < 0


def recovered(record: dict[str, Any]) -> list[Recovered]:
    """What every variant of a record comes to, the control first."""
    curves: dict[str, dict[str, Curve]] = record["curves"]
    seeds = list(curves[CONTROL])
    names = (CONTROL, *record["settings"]["variants"])  # files have their keys in alphabetical order
    ends = {name: [curves[name][seed][-1][1] for seed in seeds] for name in names}
    beside = {name: compare(values, ends[CONTROL]) for name, values in ends.items() if name != CONTROL}
    tested = [name for name, found in beside.items() if found.p_value is not None]
    corrected = dict(zip(tested, holm([beside[name].p_value or 0.0 for name in tested]), strict=True))
    return [
        Recovered(
            variant=name,
            start=curves[name][seeds[0]][0][1],
            end=summarise(values),
            won=compare(values, [curves[name][seed][0][1] for seed in seeds]),
            beside=beside.get(name),
            corrected=corrected.get(name),
            neighbours=_neighbours(record, name),
        )
        for name, values in ends.items()
    ]


def _neighbours(record: dict[str, Any], variant: str) -> tuple[float, float] | None:
    curves = list(record.get("neighbours", {}).get(variant, {}).values())
    return (curves[0][0][1], summarise([curve[-1][1] for curve in curves]).mean) if curves else None


def table(record: dict[str, Any]) -> str:
    """A record as Markdown."""
    rows = recovered(record)
    columns = ["variant", "at once", "after training", "won back", "beside the control", "p (Holm)"]
    if rows[0].neighbours is not None:
        columns += ["same neighbour at once", "after training"]
    return "\n".join(table_lines(columns, map(_cells, rows)))


def _cells(row: Recovered) -> list[str]:
    cells = [
        row.variant,
        _number(row.start),
        _told(row.end),
        f"{100 * (1 - row.end.mean / row.start):.0f} %" if row.costs else NOTHING,
        NOTHING if row.beside is None else _told(row.beside.summary),
        NOTHING if row.corrected is None else f"{row.corrected:.2g}",
    ]
    return cells + ([] if row.neighbours is None else [f"{100 * share:.1f} %" for share in row.neighbours])


def _told(summary: Summary) -> str:
    ends = summary.t_interval
    around = "" if ends.low is None or ends.high is None else f" ({_number(ends.low)} to {_number(ends.high)})"
    return _number(summary.mean) + around


def _number(value: float) -> str:
    return f"{round(value, 4) + 0.0:+.4f}"  # no -0.0000


def title(record: dict[str, Any]) -> str:
    """What a record is of, in a few words."""
    size = record["parameters"]
    layers = record["settings"]["layers"]
    where = (
        "all layers"
        if layers is None
        else "the last two layers"
        if list(layers) == [-2, -1]
        else f"layers {list(layers)}"
    )
    return f"{record['model_type']} of {f'{size / 1e6:.1f}M' if size >= 1e6 else f'{size / 1e3:.0f}K'}, {where}"


def unit(record: dict[str, Any]) -> str:
    """Of the values of a record, in words; older ones are all of language models."""
    return UNITS[record.get("measure", "cross_entropy")]


def read_records(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Records from their files.

    Raises:
        UsageError: for a file that is no such record.
    """
    records = []
    for path in paths:
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            recovered(record)
            title(record)
            unit(record)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise UsageError(f"records must be files of finetune_real.py, got {str(path)!r}") from error
        records.append(record)
    return records


def in_short(records: Sequence[dict[str, Any]]) -> str:
    """The answer to :data:`QUESTION` in a sentence."""
    rows = [row for record in records for row in recovered(record) if row.beside is not None]
    costly = [row for row in rows if row.costs]
    words = Counter(row.verdict for row in rows)
    few = f", in {words[TOO_FEW]} there are too few seeds" if words[TOO_FEW] else ""
    better = f", in {words[BETTER]} it is better" if words[BETTER] else ""
    recover = sum(row.recovers for row in costly)
    return (
        f"Of {len(rows)} filters in trained models {len(costly)} cost something at once, and {recover} of these cost "
        f"less after a short training (p < {LEVEL:g} each). Beside a copy without a filter that was trained alike, "
        f"{words[WORSE]} of the {len(rows)} are still worse, in {words[NO_DIFFERENCE]} no difference is "
        f"seen{better}{few}."
    )


def chapter(records: Sequence[dict[str, Any]], wrapped: Callable[[str], list[str]]) -> list[str]:
    """The part of the page on claims, line by line.

    Args:
        records: of ``finetune_real.py``.
        wrapped: cuts a paragraph into lines.
    """
    rows = []
    for record in records:
        last = record["settings"]["steps"]
        for row in recovered(record)[1:]:
            _, start, end, won, beside, p = _cells(row)[:6]
            rows.append([title(record), str(last), row.variant, start, end, won, beside, p, row.verdict])
    columns = (
        "model, layers", "steps", "variant", "at once", "after training", "won back", "beside the control", "p (Holm)",
        "verdict",
    )  # fmt: skip
    lines = ["", "## Trained models that get a filter", "", *wrapped(_SUBJECT), "", f"### {TITLE}", ""]
    lines += [*wrapped(_CLAIM), "", *wrapped(f"**Verdict: {in_short(records)}**"), ""]
    return [*lines, *table_lines(columns, rows)]
