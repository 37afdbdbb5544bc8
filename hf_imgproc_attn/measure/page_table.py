"""Tables of a page that are measured: each cell is a check that ran."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from ..errors import UsageError
from .gpu_check.report import replace_between

Column = TypeVar("Column")
Outcomes = dict[tuple[str, str], str]
"""(Row, column) -> what was found."""


def measured(rows: Iterable[str], columns: Mapping[str, Column], measure: Callable[[Column, str], str]) -> Outcomes:
    """What is found for every row and column.

    Raises:
        RuntimeError: naming column and row, for an error that ``measure`` does not expect.
    """
    found = {}
    for row in rows:
        for key, column in columns.items():
            try:
                found[row, key] = measure(column, row)
            except Exception as error:
                raise RuntimeError(f"{key} of {row} is at fault") from error
    return found


def written_reasons(text: str) -> Callable[[str], str]:
    """The reason of a cell such as ``no (3)``, from the numbered reasons of a page."""
    reasons = [line.partition("`")[2].removesuffix("`") for line in text.splitlines() if line.startswith("(")]
    return lambda cell: reasons[int(cell.partition("(")[2][:-1]) - 1]


def write_table(page: Path, marks: tuple[str, str], make: Callable[[], str]) -> None:
    """Put what ``make`` measures between two marks of a page.

    Raises:
        UsageError: if it has no such marks, before anything is measured, or PEFT is not installed.
    """
    if importlib.util.find_spec("peft") is None:
        raise UsageError("this needs peft, which is not installed: pip install peft")
    try:
        text = page.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"page must be a Markdown file with this table, got {str(page)!r}: {error}") from error
    if not text.partition(marks[0])[2].partition(marks[1])[1]:
        raise UsageError(f"page must have the marks {' and '.join(map(str.strip, marks))}, got {str(page)!r}")
    replace_between(page, marks, make())
