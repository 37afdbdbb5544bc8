"""Whether what a study of few data has shown is seen in a larger one too."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ..markdown_tables import table_lines
from .comparisons import Chapter, Comparison, seeds_in_words, verdict_of
from .report import NOTHING, interval, number
from .statistics import BETTER, NO_DIFFERENCE, TOO_FEW, WORSE
from .subjects import SUBJECTS

QUESTION = "Does it hold with more data?"
COLUMNS = ("condition", "variant", "against")
_VERDICTS = (BETTER, WORSE)


class Pair(NamedTuple):
    """One comparison in two studies."""

    small: Comparison
    large: Comparison


def pairs(smaller: Chapter, larger: Chapter) -> list[Pair]:
    """The comparisons that two studies have both, each once, in the order of the smaller one."""
    of_small, of_large = dict(_by_subject(smaller)), dict(_by_subject(larger))
    return [Pair(entry, of_large[key]) for key, entry in of_small.items() if key in of_large]


def _by_subject(chapter: Chapter) -> Iterator[tuple[tuple[str, str, str, str], Comparison]]:
    for _, found in chapter.claims:
        for entry in found:
            yield (entry.table.condition, entry.table.metric, entry.row.variant, entry.against), entry


def with_smaller(chapters: Sequence[Chapter]) -> Iterator[tuple[Chapter, Chapter]]:
    """The studies, both of which have comparisons, that are of the same data: the smaller and the larger one."""
    named = {chapter.name: chapter for chapter in chapters}
    for larger in chapters:
        smaller = named.get(SUBJECTS[larger.name].smaller or "")
        if smaller is not None and pairs(smaller, larger):
            yield smaller, larger


def heading(larger: Chapter) -> str:
    """Of this part of a larger study's chapter; no two chapters have the same one, for the sake of links."""
    return f"{QUESTION} {SUBJECTS[larger.name].title}"


def in_a_sentence(smaller: Chapter, larger: Chapter) -> str:
    """How many verdicts of the smaller study are seen in the larger one, and how many differences point alike."""
    both = pairs(smaller, larger)
    stood_out = [pair for pair in both if verdict_of(pair.small.row) in _VERDICTS]
    now = [verdict_of(pair.large.row) for pair in stood_out]
    same = sum(word == verdict_of(pair.small.row) for pair, word in zip(stood_out, now, strict=True))
    counts = {
        "the same is seen": same,
        "the opposite": sum(word in _VERDICTS for word in now) - same,
        "no difference": now.count(NO_DIFFERENCE),
        "too few seeds yet": now.count(TOO_FEW),
    }
    told = ", ".join(f"{words} in {count}" for words, count in counts.items() if count)
    text = (
        f"*{SUBJECTS[larger.name].title}* ({_seeds(larger)}) repeats {len(both)} comparisons of "
        f"*{SUBJECTS[smaller.name].title}* ({_seeds(smaller)}). "
    )
    if stood_out:
        text += (
            f"In the smaller study the variant is better or worse in {len(stood_out)} of them; of these, in the "
            f"larger one {told}. The mean difference has the same sign in both studies in {_alike(stood_out)} of "
            f"these {len(stood_out)}, and in {_alike(both)} of all {len(both)}."
        )
    else:
        text += (
            "In the smaller study the variant is better or worse in none of them. The mean difference has the same "
            f"sign in both studies in {_alike(both)} of the {len(both)}."
        )
    if all(verdict_of(pair.large.row) == TOO_FEW for pair in both):
        return text
    found = [pair for pair in both if verdict_of(pair.large.row) in _VERDICTS]
    new = sum(verdict_of(pair.small.row) not in _VERDICTS for pair in found)
    return f"{text} A difference that the smaller one does not show is seen in {new}."


def _alike(both: Sequence[Pair]) -> int:
    """How many mean differences have the same sign in both studies."""
    return sum(_side(pair.small) == _side(pair.large) for pair in both)


def lines_of_pairs(smaller: Chapter, larger: Chapter) -> list[str]:
    """A table of the comparisons that are better or worse in one of the two studies."""
    told = [pair for pair in pairs(smaller, larger) if any(verdict_of(entry.row) in _VERDICTS for entry in pair)]
    if not told:
        return []
    columns = [*COLUMNS]
    for chapter in (smaller, larger):
        columns += [f"`{chapter.name}`: difference, its interval", "verdict"]
    rows = []
    for pair in told:
        cells = [pair.small.condition, pair.small.row.variant, pair.small.against]
        for entry in pair:
            cells += [_difference(entry), entry.row.verdict]
        rows.append(cells)
    return table_lines(columns, rows)


def _difference(entry: Comparison) -> str:
    if entry.row.difference is None:
        return NOTHING
    summary, metric = entry.row.difference.summary, entry.table.metric
    ends = interval(summary.t_interval, metric, signed=True)
    return number(summary.mean, metric, signed=True) + ("" if ends == NOTHING else f" {ends}")


def _side(entry: Comparison) -> int:
    """The sign of the mean difference."""
    mean = 0.0 if entry.row.difference is None else entry.row.difference.summary.mean
    return (mean > 0) - (mean < 0)


def _seeds(chapter: Chapter) -> str:
    """How many seeds a study's comparisons have."""
    return seeds_in_words(
        entry.row.difference.summary.count
        for _, found in chapter.claims
        for entry in found
        if entry.row.difference is not None
    )
