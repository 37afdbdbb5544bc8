"""The tests' own tools."""

from __future__ import annotations

import itertools
import time

import pytest
import torch

from tests.helpers import pairwise_cover, readable_id, run_command

pytest_plugins = ("pytester",)


def test_a_pairwise_cover_has_every_pair_and_few_rows() -> None:
    axes = [list("abcdefg"), [0, 1, 2, 3], [True, False], list("xyz")]
    rows = pairwise_cover(axes)
    for one, other in itertools.combinations(range(4), 2):
        wanted = set(itertools.product(axes[one], axes[other]))
        assert {(row[one], row[other]) for row in rows} == wanted
    assert len(rows) <= 32
    assert rows == pairwise_cover(axes)


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ((2, 3, 4), "2x3x4"),
        ({"steps": 2, "boosting": "twicing"}, "steps=2,boosting=twicing"),
        ([{"a": None}, True], "a=None,True"),
        (torch.float16, "float16"),
        (torch.zeros(2, 3), "float32[2x3]"),
        ({"b", "a"}, "a,b"),
        ([], "[]"),
        (object(), "object"),
        ("text", None),
        (len, None),
    ],
)
def test_values_have_readable_names(value: object, name: str | None) -> None:
    assert readable_id(value) == name


BROKEN = """
import pytest

@pytest.mark.elementary
def test_law():
    assert {law}

@pytest.mark.parametrize("number", range(3))
def test_of_a_model(number):
    assert number == 0
"""


@pytest.mark.parametrize("law", [True, False], ids=["law holds", "law is broken"])
def test_a_broken_law_is_one_failure(pytester: pytest.Pytester, law: bool) -> None:
    """What fails beside it is counted in one line, and fails where the law holds or is not tested."""
    pytester.makeconftest("from tests.elementary import *")
    pytester.makeini("[pytest]\nmarkers =\n    elementary: a law")
    pytester.makepyfile(BROKEN.format(law=law))
    if law:
        pytester.inline_run().assertoutcome(passed=2, failed=2)
    else:
        pytester.inline_run().assertoutcome(passed=1, failed=1, skipped=2)
        pytester.inline_run("-k", "model").assertoutcome(passed=1, failed=2)


def test_a_command_that_leaves_a_process_behind_fails_in_time() -> None:
    """`sleep` holds the pipes when bash has been killed."""
    started = time.monotonic()
    with pytest.raises(pytest.fail.Exception, match=r"ran for more than 1 s\nhere"):
        run_command(["bash", "-c", "echo here; sleep 60; true"], timeout=1)
    assert time.monotonic() - started < 30


@pytest.mark.xdist_group("together")
def test_groups_of_tests_stay_in_one_worker(request: pytest.FixtureRequest) -> None:
    """By their names, in which pytest-xdist finds the group; else what they share is made once in every worker."""
    assert request.node.nodeid.endswith("@together") == bool(getattr(request.config.option, "loadgroup", False))
