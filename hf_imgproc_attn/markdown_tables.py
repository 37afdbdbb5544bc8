"""Tables in Markdown, for every page and record that has one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


def table_lines(head: Sequence[str], rows: Iterable[Sequence[str]], *, right: bool = False) -> list[str]:
    """A table in Markdown, a line a row.

    What would end a cell is kept out of it: a bar is escaped (unless it is already), also inside code, as GitHub and
    MkDocs want it, and line breaks become spaces.

    Args:
        head: titles of the columns.
        rows: their cells; a row with fewer cells than titles is filled up with empty ones.
        right: whether all columns but the first stand on the right.

    Raises:
        ValueError: for a row with more cells than there are titles, which Markdown would drop without a word.
    """
    rule = "|---|" + ("---:|" if right else "---|") * (len(head) - 1)
    return [_line(head, len(head)), rule, *(_line(row, len(head)) for row in rows)]


def table_text(head: Sequence[str], rows: Iterable[Sequence[str]], *, right: bool = False) -> str:
    """:func:`table_lines` as one text, without a line break at its end."""
    return "\n".join(table_lines(head, rows, right=right))


def cell(text: object) -> str:
    """A text inside a table."""
    return re.sub(r"(?<!\\)\|", r"\\|", " ".join(str(text).splitlines()))


def _line(cells: Sequence[str], columns: int) -> str:
    if len(cells) > columns:
        raise ValueError(f"a row must have at most {columns} cells, as the head of its table, got {list(cells)!r}")
    filled = [cell(text) for text in (*cells, *[""] * (columns - len(cells)))]
    return "|" + "".join(f" {text} |" if text else " |" for text in filled)
