"""What the property tests are made of: odd values, and how many examples a run makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis
import numpy as np
import torch
from hypothesis import strategies as st

FULL = False
"""Set before the tests are collected, by their conftest."""
NUMBERS = (0, 1, 2, 3, -1, 17, 2**31, 10**400, 0.0, -0.0, 0.5, 1.0, 1e-320, 1e30, 1e308, float("nan"), float("inf"))
ODD = (
    None,
    True,
    False,
    "",
    " ",
    "2",
    "none",
    "None",
    "twicing",
    "\udcff",
    "\0",
    "é",
    b"2",
    [],
    [[]],
    [1],
    [1, 1],
    [0.5, 0.5],
    [True, False],
    [[1], [2]],
    ["twicing"],
    ["none", "none"],
    [None, None],
    [float("nan"), 1.0],
    (),
    (1, 2),
    {},
    {"a": 1},
    {1},
    1j,
    object,
    np.int64(2),
    np.float32(0.5),
    np.bool_(True),
    np.array([1.0, 2.0]),
    np.array(2),
    torch.tensor(2),
    torch.tensor([1.0, 2.0]),
    range(2),
)

# Of few characters: to list all of Unicode takes longer than a few hundred examples.
TEXT = st.text("abzAZ019 _-.,:/[{'\"=\n\t\0\x1b\xa0\u00e9\u2028\u202e\u4e2d\ud800\U0001f600", max_size=6)

anything: st.SearchStrategy[Any] = st.one_of(
    st.sampled_from(NUMBERS),
    st.sampled_from(ODD),
    st.integers(),
    st.floats(),
    TEXT,
    st.lists(st.one_of(st.integers(-3, 20), st.floats(), st.booleans(), st.none()), max_size=4),
)
"""Any value that somebody may write where another one belongs."""


def examples(short: int, full: int) -> Callable[[Any], Any]:
    """The same examples in every run: ``short`` of them, with ``--full`` ``full``."""
    return hypothesis.settings(
        max_examples=full if FULL else short,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
