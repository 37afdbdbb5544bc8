"""The page "What holds": the claims of the papers beside what the ledgers say, every number read from a ledger."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..output_paths import check_output_file, writing
from ..shipped_files import shipped_file
from .claims import CLAIMS, UNTESTED, Claim
from .ledger import HEADER, Ledger
from .plan import Study
from .report import explanation, interval, number, p_value
from .statistics import BETTER, NO_DIFFERENCE, TOO_FEW, WORSE
from .study_file import read_study
from .table import Row, Table, build_tables

LEDGERS = Path("training/results/study")
WIDTH = 119
COMMAND = "imgproc-attn findings docs/what-holds.md"


def write_findings(page: Path, ledgers: Path = LEDGERS) -> None:
    """Write the page; what was there is replaced, for nothing in it is written by hand.

    Args:
        page: the Markdown file.
        ledgers: folder with a ledger for each study.

    Raises:
        UsageError: if there are no ledgers, one of them cannot be used, or the page cannot be written.
    """
    check_output_file(page)
    text = findings(ledgers)
    with writing(page):
        page.write_text(text, encoding="utf-8")


def findings(ledgers: Path) -> str:
    """The page's text.

    Raises:
        UsageError: as :func:`write_findings`.
    """
    if not any(ledgers.glob(f"*/{HEADER}")):
        raise UsageError(f"ledgers must be a folder with a ledger for each study, got {str(ledgers)!r}")
    lines = [
        "# What holds",
        "",
        *paragraph(
            "The claims of the papers beside what this package has measured. Every number comes from a ledger of "
            f"finished runs in `{LEDGERS}`, by `{COMMAND}`: nothing here is written by hand, and what was not found "
            "is said as plainly as what was. [Studies](study.md) says how a ledger is made and a table is read."
        ),
        "",
        *paragraph(
            "All of it is small: a few seeds, small models, small data. A verdict holds for what was run. *No "
            "difference seen* means that these seeds show none, not that there is none: the interval says how "
            "large one could be."
        ),
    ]
    for name in dict.fromkeys(claim.study for claim in CLAIMS):
        folder = ledgers / name
        if not (folder / HEADER).is_file():
            lines += ["", f"## Study {name}", "", "Not run yet."]
            continue
        study = read_study(shipped_file(f"training/configs/studies/{name}.yaml"))
        lines += _study_lines(study, Ledger(folder), [claim for claim in CLAIMS if claim.study == name])
    lines += ["", "## What was not tested", ""]
    for untested in UNTESTED:
        lines += paragraph(f"- **{untested.title}.** {untested.why}", indent="  ")
    return "\n".join(lines) + "\n"


def _study_lines(study: Study, ledger: Ledger, claims: Iterable[Claim]) -> list[str]:
    records = ledger.everything(study)
    diverged = sum(record["status"] == "diverged" for record in records.values())
    planned = len(study.tasks) * len(study.variant_names) * len(study.seeds)
    epochs = {task.name: task.options.get("num_train_epochs") for task in study.tasks}
    trained = ", ".join(f"{name}: {count} epochs" for name, count in epochs.items() if count)
    lines = [
        "",
        f"## Study {study.name}",
        "",
        *paragraph(
            f"{len(records)} of {planned} runs have ended, {diverged} of them diverged: {len(study.variant_names)} "
            f"variants, {len(study.seeds)} seeds ({trained}). {explanation(study)}"
        ),
    ]
    for claim in claims:
        lines += _claim_lines(study, records, claim)
    return lines


def _claim_lines(study: Study, records: dict[str, dict[str, Any]], claim: Claim) -> list[str]:
    found: list[tuple[Table, str, Row]] = []
    for against in claim.against:
        for table in build_tables(replace(study, baseline=against), records):
            rows = {row.variant: row for row in table.rows}
            if table.family in claim.families:
                found += [(table, against, rows[name]) for name in claim.variants if name in rows]
    found = [entry for entry in found if entry[2].difference is not None]
    lines = [
        "",
        f"### {claim.title}",
        "",
        *paragraph(claim.text),
        "",
        f"**Verdict: {in_words([row for _, _, row in found])}**",
        "",
    ]
    if not found:
        return lines[:-1]
    lines += [
        "| condition | variant | mean | against | difference | its interval | p (Holm) | verdict |",
        "|" + "---|" * 8,
    ]
    for table, against, row in found:
        if row.difference is None or row.summary is None:
            continue
        difference = row.difference.summary
        cells = [
            table.condition,
            row.variant,
            number(row.summary.mean, table.metric),
            against,
            number(difference.mean, table.metric, signed=True),
            interval(difference.t_interval, table.metric, signed=True),
            "–" if row.corrected is None else p_value(row.corrected),
            row.verdict,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def paragraph(text: str, indent: str = "") -> list[str]:
    """A text in lines of the width of the other pages; no word or link is cut."""
    return textwrap.wrap(text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def in_words(rows: Sequence[Row]) -> str:
    """What several comparisons say together."""
    if not rows:
        return "not tested, no run has ended."
    words = [row.verdict.partition(",")[0] for row in rows]
    better, worse, none, few = (words.count(word) for word in (BETTER, WORSE, NO_DIFFERENCE, TOO_FEW))
    if few == len(rows):
        return "too few seeds yet."
    if better == len(rows):
        return f"it holds here: better in all {len(rows)} comparisons."
    if worse == len(rows):
        return f"the opposite is seen here: worse in all {len(rows)} comparisons."
    if none == len(rows):
        return f"not seen here: no difference in any of {len(rows)} comparisons."
    seen = [f"better in {better}", f"worse in {worse}", f"no difference seen in {none}"]
    return f"of {len(rows)} comparisons, {', '.join(seen)}" + (f", too few seeds in {few}." if few else ".")
