"""The tests' own tools."""

from __future__ import annotations

import itertools
import time

import pytest

from tests.helpers import pairwise_cover, run_command


def test_a_pairwise_cover_has_every_pair_and_few_rows() -> None:
    axes = [list("abcdefg"), [0, 1, 2, 3], [True, False], list("xyz")]
    rows = pairwise_cover(axes)
    for one, other in itertools.combinations(range(4), 2):
        wanted = set(itertools.product(axes[one], axes[other]))
        assert {(row[one], row[other]) for row in rows} == wanted
    assert len(rows) <= 32
    assert rows == pairwise_cover(axes)


def test_a_command_that_leaves_a_process_behind_fails_in_time() -> None:
    """`sleep` holds the pipes when bash has been killed."""
    started = time.monotonic()
    with pytest.raises(pytest.fail.Exception, match=r"ran for more than 1 s\nhere"):
        run_command(["bash", "-c", "echo here; sleep 60; true"], timeout=1)
    assert time.monotonic() - started < 30
