"""Tables in Markdown: what stands in a cell stays in it."""

from __future__ import annotations

import pytest

from hf_imgproc_attn.markdown_tables import table_lines, table_text


def test_rows_stand_below_their_titles() -> None:
    assert (
        table_text(["name", "value"], [["a", "1"], ["b", "2"]]) == "| name | value |\n|---|---|\n| a | 1 |\n| b | 2 |"
    )
    assert table_lines(["", "x"], [["**group**"], ["a", ""]], right=True) == [
        "| | x |",
        "|---|---:|",
        "| **group** | |",
        "| a | |",
    ]


def test_what_would_end_a_cell_is_kept_in_it() -> None:
    (line,) = table_lines(["a", "b"], [["|x|², `\\|y\\|`", "two\nlines"]])[2:]
    assert line == "| \\|x\\|², `\\|y\\|` | two lines |"


def test_rows_that_are_too_long_are_refused() -> None:
    with pytest.raises(ValueError, match=r"at most 1 cells, as the head of its table, got \['a', 'b'\]"):
        table_text(["x"], [["a", "b"]])
