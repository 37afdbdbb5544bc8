"""What the ledgers say of each claim: its comparisons, and what several of them say together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from ..shipped_files import shipped_file
from .claims import CLAIMS, Claim
from .ledger import HEADER, Ledger
from .plan import Study
from .report import NOTHING
from .statistics import BETTER, NO_DIFFERENCE, TOO_FEW, WORSE
from .study_file import read_study
from .table import LOWER_IS_BETTER, NAMES, Row, Table, build_tables


class Comparison(NamedTuple):
    """A variant under one condition, against one baseline.

    Attributes:
        table: of the condition.
        against: the baseline.
        row: of the variant.
        condition: as the page names it: with the task and the metric where a claim is about several of them.
    """

    table: Table
    against: str
    row: Row
    condition: str


@dataclass(frozen=True)
class Chapter:
    """A study and what it says.

    Attributes:
        name: of the study.
        study: None where it has no ledger.
        records: name of a run -> its record.
        claims: with their comparisons.
    """

    name: str
    study: Study | None
    records: dict[str, dict[str, Any]]
    claims: list[tuple[Claim, list[Comparison]]]


def read_chapter(name: str, ledgers: Path) -> Chapter:
    """What the ledger of a study says of its claims; nothing where it has not been run."""
    claims = [claim for claim in CLAIMS if claim.study == name]
    folder = ledgers / name
    if not (folder / HEADER).is_file():
        return Chapter(name, None, {}, [(claim, []) for claim in claims])
    study = read_study(shipped_file(f"training/configs/studies/{name}.yaml"))
    ledger = Ledger(folder)
    ledger.check(study)
    records = ledger.everything(study)
    baselines = dict.fromkeys(against for claim in claims for against in claim.against)
    tables = {against: build_tables(replace(study, baseline=against), records) for against in baselines}
    return Chapter(name, study, records, [(claim, _comparisons(tables, claim)) for claim in claims])


def _comparisons(tables: dict[str, list[Table]], claim: Claim) -> list[Comparison]:
    """Every comparison that a claim is about and that has seeds, of the tables with each baseline."""
    found = []
    for against in claim.against:
        for table in tables[against]:
            rows = {row.variant: row for row in table.rows}
            if table.family in claim.families:
                names = [name for name in claim.variants if name in rows and rows[name].difference is not None]
                found += [Comparison(table, against, rows[name], table.condition) for name in names]
    if len({entry.table.task for entry in found}) > 1:
        found = [entry._replace(condition=f"{entry.table.task}, {entry.condition}") for entry in found]
    metrics: dict[str, set[str]] = {}
    for entry in found:
        metrics.setdefault(entry.condition, set()).add(entry.table.metric)
    return [
        entry._replace(condition=f"{entry.condition}: {NAMES[entry.table.metric]}")
        if len(metrics[entry.condition]) > 1
        else entry
        for entry in found
    ]


def counted(numbers: Iterable[int]) -> str:
    """Numbers of seeds in words: ``3``, or ``1 to 3`` where they differ; none as a dash."""
    different = sorted(set(numbers))
    return " to ".join(str(count) for count in dict.fromkeys((different[0], different[-1]))) if different else NOTHING


def seeds_in_words(numbers: Iterable[int]) -> str:
    """:func:`counted` with its noun: ``1 seed``, ``1 to 3 seeds``."""
    words = counted(numbers)
    return f"{words} seed" if words == "1" else f"{words} seeds"


def verdict_of(row: Row) -> str:
    """The verdict without what is said of diverged seeds."""
    return row.verdict.partition(",")[0]


def points_to_the_better(comparison: Comparison) -> bool:
    """Whether the mean difference is on the side of the better, however little it says."""
    difference = comparison.row.difference
    if difference is None or difference.summary.mean == 0:
        return False
    return (difference.summary.mean > 0) != (comparison.table.metric in LOWER_IS_BETTER)


def in_words(rows: Sequence[Row]) -> str:
    """What several comparisons say together."""
    if not rows:
        return "not tested, no run has ended."
    words = [verdict_of(row) for row in rows]
    better, worse, none, few = (words.count(word) for word in (BETTER, WORSE, NO_DIFFERENCE, TOO_FEW))
    if few == len(rows):
        return "too few seeds yet."
    every = "the only comparison" if len(rows) == 1 else f"all {len(rows)} comparisons"
    if better == len(rows):
        return f"it holds here: better in {every}."
    if worse == len(rows):
        return f"the opposite is seen here: worse in {every}."
    if none == len(rows):
        return f"not seen here: no difference in {every.replace('all', 'any of')}."
    seen = [f"better in {better}", f"worse in {worse}", f"no difference seen in {none}"]
    return f"of {len(rows)} comparisons, {', '.join(seen)}" + (f", too few seeds in {few}." if few else ".")


def in_a_word(rows: Sequence[Row]) -> str:
    """:func:`in_words` for a cell of the table on top."""
    better, worse = ([verdict_of(row) for row in rows].count(word) for word in (BETTER, WORSE))
    if not rows or all(verdict_of(row) == TOO_FEW for row in rows):
        return "too few seeds" if rows else "not tested"
    if better == len(rows):
        return "holds here"
    if worse == len(rows):
        return "the opposite"
    if better and worse:
        return "depends on the variant"
    return "in part" if better else "not seen, worse in part" if worse else "not seen"
