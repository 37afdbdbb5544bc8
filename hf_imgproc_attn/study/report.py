"""The tables of a study as Markdown, LaTeX and JSON, and its plot; all made of the ledger alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..cards.results import PARTS
from ..errors import missing_packages
from ..markdown_tables import table_lines
from ..output_paths import writing
from ..records import write_json
from .ledger import Ledger
from .measurements import SIMILARITY
from .plan import Study
from .statistics import CONFIDENCE, Interval
from .table import NAMES, Row, Table, as_json, build_tables

COLUMNS = (
    "variant", "seeds", "mean", "t interval", "bootstrap", "difference", "its interval", "p (Holm)", "verdict",
    "parameters", "operations",
)  # fmt: skip
NOTHING = "–"
FILES = ("report.md", "report.tex", "report.json", "report.png")


def write_report(study: Study, ledger: Ledger, say: Callable[[str], None] = print) -> list[Table]:
    """Write ``report.md``, ``report.tex``, ``report.json`` and, with matplotlib, ``report.png`` into the ledger.

    They are made anew each time: nothing in them is not in the ledger.

    Args:
        study: what is in the table, in which order.
        ledger: where the runs are.
        say: prints a line.

    Returns:
        The tables.

    Raises:
        UsageError: for a ledger of another study, or one that cannot be written.
    """
    records = ledger.everything(study)
    tables = build_tables(study, records)
    content = as_json(study, tables, records)
    for name, text in (("report.md", markdown(study, tables, content)), ("report.tex", latex(study, tables))):
        with writing(ledger.folder / name, "the report"):
            (ledger.folder / name).write_text(text, encoding="utf-8")
    with writing(ledger.folder, "the report"):
        write_json(ledger.folder / "report.json", content)
    if missing_packages("viz"):
        say(f"no plot is drawn without {', '.join(missing_packages('viz'))}")
    elif tables:
        from .plot import draw

        draw(study, tables, ledger.folder / "report.png")
    return tables


def shown(study: Study, ledger: Ledger, tables: Sequence[Table]) -> str:
    """The tables for a terminal, or why there are none, and where the files of the report are."""
    text = plain_text(tables) or without_tables(as_json(study, [], ledger.everything(study))["runs"])
    names = [name for name in FILES if (ledger.folder / name).is_file()]
    return f"{text}\n\n{', '.join(names[:-1])} and {names[-1]} are in {ledger.folder}"


def markdown(study: Study, tables: Sequence[Table], content: dict[str, Any]) -> str:
    """The report as Markdown."""
    runs = content["runs"]
    lines = [
        f"# Study {study.name}, version {study.version}",
        "",
        f"{runs['ended']} of {runs['planned']} runs have ended, {runs['diverged']} of them diverged. "
        f"Seeds: {', '.join(map(str, study.seeds))}. Split: {study.split}.",
        "",
        explanation(study),
    ]
    if own := of_their_own(study):
        lines += ["", own]
    if content["autoattack_gaps"]:
        lines += ["", on_autoattack(content["autoattack_gaps"])]
    if not tables:
        lines += ["", without_tables(runs)]
    for table in tables:
        lines += ["", f"## {heading(table)}", "", *markdown_rows(table)]
    return "\n".join(lines) + "\n"


def without_tables(runs: Mapping[str, int]) -> str:
    """Why there is no table, in words, of the counts of :func:`.table.as_json`."""
    if runs["ended"] == 0:
        return "no run has ended yet"
    if runs["diverged"] == runs["ended"]:
        return f"all {runs['ended']} runs that have ended have diverged: there is nothing to compare"
    return f"{runs['ended']} runs have ended, but none of them has a result for this split"


def explanation(study: Study) -> str:
    """How a table of this study is read, as one paragraph."""
    return (
        f"Intervals hold {100 * CONFIDENCE:.0f} %: Student's t, and the BCa bootstrap, of the mean over seeds. A "
        f"difference is the variant minus {study.baseline}, paired by seed; its p-value is that of the paired t-test, "
        "corrected by "
        "Holm's method for the number of comparisons in its table; below 0.05 the verdict is better or worse. "
        "Operations: of a training step a sample."
    )


def of_their_own(study: Study) -> str:
    """What the study's file gives to single variants, in one sentence; empty if it gives nothing."""
    said = []
    for variant in study.variants:
        values = [f"{name} {value}" for name, value in {**variant.fields, **variant.options}.items()]
        if values:
            preset = [] if variant.name == variant.preset else [f"preset {variant.preset}"]
            said.append(f"{variant.name} ({', '.join([*preset, *values])})")
    return f"With values of their own: {', '.join(said)}." if said else ""


def on_autoattack(gaps: Mapping[str, float]) -> str:
    """What AutoAttack adds to PGD, of :func:`.table.autoattack_gaps`."""
    largest, below = max(gaps.values()), [name for name, gap in gaps.items() if gap < 0]
    mean = sum(gaps.values()) / len(gaps)
    text = (
        f"AutoAttack, which counts what PGD has fooled, leaves {100 * mean:.1f} points fewer of the images right than "
        f"PGD on average, {100 * largest:.1f} at most."
    )
    return text + (f" It cannot leave more, but does in {', '.join(below)}: look at these records." if below else "")


def heading(table: Table) -> str:
    """What a table shows, on one line."""
    metric = NAMES.get(table.metric, table.metric.replace("_", " "))
    return f"{table.task}: {metric}, {table.split} split, {table.condition} ({table.comparisons} comparisons)"


def markdown_rows(table: Table) -> list[str]:
    """A table in Markdown, a line a row."""
    return table_lines(COLUMNS, (cells(row, table.metric) for row in table.rows))


def cells(row: Row, metric: str) -> list[str]:
    """The cells of a row, as :data:`COLUMNS`."""
    one, two = row.summary, row.difference
    return [
        row.variant,
        "0" if one is None else str(one.count),
        NOTHING if one is None else number(one.mean, metric),
        NOTHING if one is None else interval(one.t_interval, metric),
        NOTHING if one is None else interval(one.bootstrap, metric),
        NOTHING if two is None else number(two.summary.mean, metric, signed=True),
        NOTHING if two is None else interval(two.summary.t_interval, metric, signed=True),
        NOTHING if row.corrected is None else p_value(row.corrected),
        row.verdict or ("baseline" if two is None and one is not None else NOTHING),
        NOTHING if row.parameters is None else f"{row.parameters:,}",
        NOTHING if row.operations is None else f"{row.operations / 1e6:,.2f}M",
    ]


def number(value: float, metric: str, *, signed: bool = False) -> str:
    """A value or a difference; accuracies in percent."""
    sign = "+" if signed else ""
    if metric in PARTS:
        return f"{100 * value:{sign}.2f}"
    digits = {"loss": 4, SIMILARITY: 4}.get(metric, 2)
    return f"{value:{sign},.{digits}f}"


def interval(ends: Interval, metric: str, *, signed: bool = False) -> str:
    """An interval in brackets."""
    if ends.low is None or ends.high is None:
        return NOTHING
    return f"[{number(ends.low, metric, signed=signed)}, {number(ends.high, metric, signed=signed)}]"


def p_value(value: float) -> str:
    """A p-value with two digits."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


def latex(study: Study, tables: Sequence[Table]) -> str:
    """The tables as LaTeX (booktabs), one after the other."""
    parts = []
    for table in tables:
        rows = [r" & ".join(_latex_text(cell) for cell in cells(row, table.metric)) + r" \\" for row in table.rows]
        parts.append(
            "\n".join(
                [
                    r"\begin{table}",
                    r"  \centering\footnotesize",
                    rf"  \caption{{{_latex_text(heading(table))}. {_latex_text(explanation(study))}}}",
                    rf"  \begin{{tabular}}{{l{'r' * (len(COLUMNS) - 1)}}}",
                    r"    \toprule",
                    "    " + " & ".join(map(_latex_text, COLUMNS)) + r" \\",
                    r"    \midrule",
                    *(f"    {row}" for row in rows),
                    r"    \bottomrule",
                    r"  \end{tabular}",
                    r"\end{table}",
                ]
            )
        )
    return "% needs the package booktabs\n" + "\n\n".join(parts) + "\n"


def _latex_text(text: str) -> str:
    for character in "\\":
        text = text.replace(character, r"\textbackslash ")
    for character in "&%$#_{}":
        text = text.replace(character, f"\\{character}")
    return text.replace("<", "$<$").replace("–", "--")


def plain_text(tables: Sequence[Table]) -> str:
    """The tables for a terminal, without the columns that are wide."""
    kept = [0, 1, 2, 3, 5, 6, 7, 8]
    parts = []
    for table in tables:
        rows = [list(COLUMNS), *(cells(row, table.metric) for row in table.rows)]
        rows = [[row[column] for column in kept] for row in rows]
        widths = [max(len(row[column]) for row in rows) for column in range(len(kept))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        ]
        parts.append("\n".join([heading(table), *lines]))
    return "\n\n".join(parts)
