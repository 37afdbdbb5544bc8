"""What the ledgers say of each filter on undisturbed data, as the table of the page "Which filter?"."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..cards.results import METRICS
from ..errors import UsageError
from ..markdown_tables import table_text
from ..measure.gpu_check.report import replace_between
from ..output_paths import writing
from ..shipped_files import shipped_file
from .claims import CLAIMS
from .comparisons import seeds_in_words
from .ledger import HEADER, Ledger
from .report import NOTHING, interval, number
from .statistics import BETTER, WORSE
from .study_file import read_study
from .subjects import SUBJECTS
from .table import LOWER_IS_BETTER, Row, Table, build_tables

BEGIN, END = "<!-- evidence: begin -->\n", "<!-- evidence: end -->\n"
STOCK = "softmax"


@dataclass(frozen=True)
class Found:
    """The table of one study's undisturbed data, against softmax."""

    study: str
    table: Table

    @property
    def seeds(self) -> str:
        """How many the comparisons have."""
        return seeds_in_words(row.difference.summary.count for row in self.table.rows if row.difference is not None)


def found_in(ledgers: Path) -> Iterator[Found]:
    """The studies with a claim on undisturbed data that compare with softmax on the test split and have runs."""
    asked = {claim.study for claim in CLAIMS if "clean" in claim.families}
    for name in SUBJECTS:
        if name not in asked or not (ledgers / name / HEADER).is_file():
            continue
        study = read_study(shipped_file(f"training/configs/studies/{name}.yaml"))
        if study.baseline != STOCK or study.split != "test":
            continue
        ledger = Ledger(ledgers / name)
        ledger.check(study)
        tables = build_tables(study, ledger.everything(study))
        yield from (Found(name, table) for table in tables if table.family == "clean")


def evidence_table(ledgers: Path) -> str:
    """The table in Markdown: what softmax itself reaches, then a row for each variant; a column for each study.

    A cell of a variant is the mean paired difference from softmax and its 95 % interval; bold where the corrected
    p-value is below 0.05.
    """
    columns = list(found_in(ledgers))
    names = dict.fromkeys(row.variant for found in columns for row in found.table.rows if row.variant != STOCK)
    rows = [[f"`{STOCK}`, its own value", *map(_stock_value, columns)]]
    for name in names:
        cells = [
            next((_cell(row, found.table.metric) for row in found.table.rows if row.variant == name), NOTHING)
            for found in columns
        ]
        rows.append([f"`{name}`", *cells])
    return table_text(["variant", *map(_heading, columns)], rows) + "\n"


def write_evidence(page: Path, ledgers: Path) -> None:
    """Put the table between its marks in a page.

    Raises:
        UsageError: if there is no such page, it cannot be written, or it has no such marks.
    """
    if not page.is_file():
        raise UsageError(f"--evidence must be a Markdown file with such a table, got {str(page)!r}")
    with writing(page):
        replace_between(page, (BEGIN, END), f"\n{evidence_table(ledgers)}\n")


def _heading(found: Found) -> str:
    metric = METRICS[found.table.metric] + (", lower is better" if found.table.metric in LOWER_IS_BETTER else "")
    return f"{found.study} ({metric}, {found.seeds})"


def _stock_value(found: Found) -> str:
    """What the differences are from: the mean of all seeds that softmax has."""
    values = [row.summary.mean for row in found.table.rows if row.variant == STOCK and row.summary is not None]
    return number(values[0], found.table.metric) if values else NOTHING


def _cell(row: Row, metric: str) -> str:
    if row.difference is None:
        return NOTHING
    summary = row.difference.summary
    text = f"{number(summary.mean, metric, signed=True)} {interval(summary.t_interval, metric, signed=True)}"
    return f"**{text}**" if row.verdict.partition(",")[0] in (BETTER, WORSE) else text
