"""The page "What holds": the claims of the papers beside what the ledgers say, every number read from a ledger."""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ..cards.results import PARTS
from ..errors import UsageError
from ..markdown_tables import table_lines
from ..output_paths import check_output_file, writing
from .claims import CLAIMS, Claim
from .comparisons import (
    Chapter,
    Comparison,
    counted,
    in_a_word,
    in_words,
    points_to_the_better,
    read_chapter,
    verdict_of,
)
from .larger import QUESTION, heading, in_a_sentence, lines_of_pairs, with_smaller
from .ledger import HEADER
from .recovery import FOLDER, read_records
from .recovery import QUESTION as RECOVERY
from .recovery import TITLE as RECOVERY_TITLE
from .recovery import chapter as recovery_chapter
from .recovery import in_short as recovery_in_short
from .report import NOTHING, interval, number, on_autoattack, p_value
from .statistics import BETTER, CONFIDENCE, LEVEL, NO_DIFFERENCE, WORSE, Difference, holm
from .subjects import SUBJECTS, UNTESTED
from .table import LOWER_IS_BETTER, NAMES, autoattack_gaps

LEDGERS = Path("training/results/study")
WIDTH = 119
COMMAND = "imgproc-attn findings docs/what-holds.md"
MOST_CERTAIN = 3
"""Differences that are told in plain words on top."""


SHORT_COLUMNS = (
    "claim",
    "seeds",
    "comparisons",
    "better",
    "worse",
    "no difference seen",
    "points to the better",
    "in a word",
)
"""Of the table on top."""
CLAIM_COLUMNS = ("condition", "variant", "mean", "against", "difference", "its interval", "p (Holm)", "verdict")


def write_findings(page: Path, ledgers: Path = LEDGERS) -> None:
    """Write the page; what was there is replaced, for nothing in it is written by hand.

    Args:
        page: the Markdown file.
        ledgers: folder with a ledger for each study; records of ``finetune_real.py`` lie in ``recovery`` beside it.

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
    _check_ledgers(ledgers)
    chapters = [read_chapter(name, ledgers) for name in dict.fromkeys(claim.study for claim in CLAIMS)]
    recoveries = read_records(sorted((ledgers.parent / FOLDER).glob("*.json")))
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
        "",
        "## In short",
        "",
        *paragraph(
            "A comparison is one variant against one baseline under one condition. Differences are paired by seed, "
            f"their intervals hold {100 * CONFIDENCE:.0f} % (Student's t), and a verdict is *better* or *worse* where "
            "the p-value of the paired t-test, corrected by Holm's method for all variants under that condition, is "
            f"below {LEVEL:g}. *Points to the better* counts the comparisons whose mean difference is on the "
            "claim's side, whatever its interval: half of them would be by chance. Comparisons of one study are not "
            "independent: the same models stand in all of them."
        ),
        "",
        *paragraph(_in_all(chapters)),
        "",
        *_most_certain(chapters),
        "",
        *_with_more_data(chapters),
    ]
    if recoveries:
        which = f"[Which](#{anchor(RECOVERY_TITLE)})."
        lines += [*paragraph(f"**{RECOVERY}** {recovery_in_short(recoveries)} {which}"), ""]
    short = []
    for chapter in chapters:
        short.append([f"**{SUBJECTS[chapter.name].title}**"])
        short += [_short_row(chapter, claim, found) for claim, found in chapter.claims]
    lines += table_lines(SHORT_COLUMNS, short)
    smaller = {larger.name: smaller for smaller, larger in with_smaller(chapters)}
    for chapter in chapters:
        lines += _chapter_lines(chapter, smaller.get(chapter.name))
    if recoveries:
        lines += recovery_chapter(recoveries, paragraph)
    lines += ["", "## What was not tested", ""]
    for untested in UNTESTED:
        lines += paragraph(f"- **{untested.title}.** {untested.why}", indent="  ")
    return "\n".join(lines) + "\n"


def _check_ledgers(ledgers: Path) -> None:
    """Refuse a folder from which nothing but an empty page could be made, and say what is of use there.

    Raises:
        UsageError: for a folder that has no ledgers, is one itself, or has only those of studies without claims.
    """
    if (ledgers / HEADER).is_file():
        raise UsageError(
            f"ledgers must be a folder with a ledger for each study, got the ledger {str(ledgers)!r} itself: "
            "its tables are in report.md there"
        )
    found = sorted(path.parent.name for path in ledgers.glob(f"*/{HEADER}"))
    if not found:
        raise UsageError(f"ledgers must be a folder with a ledger for each study, got {str(ledgers)!r}")
    if not set(found) & set(SUBJECTS):
        raise UsageError(
            f"ledgers must be a folder with a ledger of one of the studies that the page has claims on "
            f"({', '.join(SUBJECTS)}), got {', '.join(found)} in {str(ledgers)!r}: the tables of another study are in "
            "the report.md of its ledger"
        )


def _with_more_data(chapters: Sequence[Chapter]) -> list[str]:
    """What is said on top of studies that repeat a smaller one."""
    lines = []
    for smaller, larger in with_smaller(chapters):
        where = f"[Which](#{anchor(heading(larger))})."
        lines += [*paragraph(f"**{QUESTION}** {in_a_sentence(smaller, larger)} {where}"), ""]
    return lines


def _in_all(chapters: Sequence[Chapter]) -> str:
    """All comparisons of the page in one sentence, with the variants that any difference was seen of."""
    rows = [entry.row for chapter in chapters for _, found in chapter.claims for entry in found]
    none = sum(verdict_of(row) == NO_DIFFERENCE for row in rows)
    seen = {word: Counter(row.variant for row in rows if verdict_of(row) == word) for word in (BETTER, WORSE)}
    parts = [
        f"{word} in {counts.total()}"
        + (f" ({', '.join(f'`{name}` {count}' for name, count in counts.most_common())})" if counts else "")
        for word, counts in seen.items()
    ]
    few = len(rows) - none - sum(counts.total() for counts in seen.values())
    what = " and ".join(parts)
    rest = f"; {few} have too few seeds yet" if few else ""
    return f"**In all, of {len(rows)} comparisons the variant is {what}; in {none} no difference is seen{rest}.**"


def _most_certain(chapters: Sequence[Chapter]) -> list[str]:
    """The comparisons with the smallest p-values in plain words, one of a study and variant.

    Chosen among all of the page, they are corrected for all of the page too: the table's own correction would not be
    enough for what was picked because it stands out.
    """
    tested = [
        (difference.p_value, claim, entry, difference)
        for chapter in chapters
        for claim, entries in chapter.claims
        for entry in entries
        if (difference := entry.row.difference) is not None and difference.p_value is not None
    ]
    corrected = holm([p for p, *_ in tested])
    chosen: dict[tuple[str, str], str] = {}
    for of_page, (p, claim, entry, difference) in sorted(
        zip(corrected, tested, strict=True), key=lambda item: item[1][0]
    ):
        key = (claim.study, entry.row.variant)
        if key not in chosen and len(chosen) < MOST_CERTAIN:
            chosen[key] = _in_plain_words(claim, entry, difference, p, of_page)
    lines = paragraph(
        f"The {len(chosen)} most certain differences: the smallest p-values of the page, one of a study and variant. "
        "They were picked because they stand out, so each is corrected here for all "
        f"{len(tested)} tests of the page:"
    )
    return [*lines, "", *(line for text in chosen.values() for line in paragraph(f"1. {text}", indent="   "))]


def _in_plain_words(claim: Claim, entry: Comparison, difference: Difference, p: float, of_page: float) -> str:
    metric, summary = entry.table.metric, difference.summary
    side = "better" if points_to_the_better(entry) else "worse"
    holds = "remains" if of_page < LEVEL else "does not remain below " + f"{LEVEL:g}"
    return (
        f"{SUBJECTS[claim.study].title}: `{entry.row.variant}` is {side} than `{entry.against}` under the condition "
        f"*{entry.condition}* by {number(summary.mean, metric, signed=True)} {_unit(metric)}, interval "
        f"{interval(summary.t_interval, metric, signed=True)}, {summary.count} seeds; p {p:.2g}, which {holds} after "
        f"correction for the page ({p_value(of_page)}). What else is to be said of it: "
        f"[{claim.title}](#{anchor(claim.title)})."
    )


def _unit(metric: str) -> str:
    return "points of " + NAMES[metric] if metric in PARTS else f"({NAMES[metric]})"


def _short_row(chapter: Chapter, claim: Claim, found: Sequence[Comparison]) -> list[str]:
    words = [verdict_of(comparison.row) for comparison in found]
    counts = [words.count(word) for word in (BETTER, WORSE, NO_DIFFERENCE)]
    seeds = [comparison.row.difference.summary.count for comparison in found if comparison.row.difference is not None]
    return [
        claim.title if chapter.study is None else f"[{claim.title}](#{anchor(claim.title)})",
        counted(seeds),
        *(str(count) for count in (len(found), *counts)),
        str(sum(points_to_the_better(comparison) for comparison in found)),
        in_a_word([comparison.row for comparison in found]),
    ]


def _chapter_lines(chapter: Chapter, smaller: Chapter | None) -> list[str]:
    subject = SUBJECTS[chapter.name]
    lines = ["", f"## {subject.title}", "", *paragraph(subject.text), ""]
    study = chapter.study
    if study is None:
        return [*lines, *paragraph(f"`{chapter.name}.yaml` has not been run yet.")]
    diverged = sum(record["status"] == "diverged" for record in chapter.records.values())
    planned = len(study.tasks) * len(study.variant_names) * len(study.seeds)
    lines += paragraph(
        f"Study `{chapter.name}`: {len(chapter.records)} of {planned} runs have ended, {diverged} of them diverged; "
        f"{len(study.variant_names)} variants, {len(study.seeds)} seeds, {study.split} split. " + _values(chapter)
    )
    gaps = autoattack_gaps(chapter.records)
    if gaps:
        lines += ["", *paragraph(on_autoattack(gaps))]
    if smaller is not None:
        lines += ["", f"### {heading(chapter)}", "", *paragraph(in_a_sentence(smaller, chapter))]
        table = lines_of_pairs(smaller, chapter)
        lines += ["", *table] if table else []
    for claim, found in chapter.claims:
        lines += _claim_lines(claim, found)
    return lines


def _values(chapter: Chapter) -> str:
    """What the numbers of a chapter are."""
    metrics = dict.fromkeys(entry.table.metric for _, found in chapter.claims for entry in found)
    names = [
        NAMES[metric]
        + (" in percent" if metric in PARTS else "")
        + (", lower is better" if metric in LOWER_IS_BETTER else "")
        for metric in metrics
    ]
    return f"Values: {'; '.join(names)}." if names else ""


def _claim_lines(claim: Claim, found: Sequence[Comparison]) -> list[str]:
    lines = [
        "",
        f"### {claim.title}",
        "",
        *paragraph(claim.text),
        "",
        f"**Verdict: {in_words([comparison.row for comparison in found])}**",
        "",
    ]
    if not found:
        return lines[:-1]
    rows = []
    for table, against, row, condition in found:
        if row.difference is None or row.summary is None:
            continue
        difference = row.difference.summary
        cells = [
            condition,
            row.variant,
            number(row.summary.mean, table.metric),
            against,
            number(difference.mean, table.metric, signed=True),
            interval(difference.t_interval, table.metric, signed=True),
            NOTHING if row.corrected is None else p_value(row.corrected),
            row.verdict,
        ]
        rows.append(cells)
    return [*lines, *table_lines(CLAIM_COLUMNS, rows)]


def anchor(title: str) -> str:
    """Where a heading of the page is, as MkDocs and GitHub name it."""
    return re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower())


def paragraph(text: str, indent: str = "") -> list[str]:
    """A text in lines of the width of the other pages; no word or link is cut."""
    return textwrap.wrap(text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
