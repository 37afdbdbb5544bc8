"""The tests' own tools."""

from __future__ import annotations

import itertools

from tests.helpers import pairwise_cover


def test_a_pairwise_cover_has_every_pair_and_few_rows() -> None:
    axes = [list("abcdefg"), [0, 1, 2, 3], [True, False], list("xyz")]
    rows = pairwise_cover(axes)
    for one, other in itertools.combinations(range(4), 2):
        wanted = set(itertools.product(axes[one], axes[other]))
        assert {(row[one], row[other]) for row in rows} == wanted
    assert len(rows) <= 32
    assert rows == pairwise_cover(axes)
