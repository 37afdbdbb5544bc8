"""What several test files share."""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def pairwise_cover(axes: Sequence[Sequence[Any]]) -> list[tuple[Any, ...]]:
    """Few combinations in which every pair of values of two axes occurs; the same whenever it is asked for."""
    missing = {
        (one, i, other, j)
        for one, other in itertools.combinations(range(len(axes)), 2)
        for i in range(len(axes[one]))
        for j in range(len(axes[other]))
    }

    def covered(row: tuple[int, ...]) -> set[tuple[int, int, int, int]]:
        return {(one, row[one], other, row[other]) for one, other in itertools.combinations(range(len(row)), 2)}

    everything = list(itertools.product(*(range(len(values)) for values in axes)))
    rows = []
    while missing:
        best = max(everything, key=lambda row: len(covered(row) & missing))
        missing -= covered(best)
        rows.append(tuple(values[index] for values, index in zip(axes, best, strict=True)))
    return rows


RunPython = Callable[..., "subprocess.CompletedProcess[str]"]
"""The type of the fixture ``run_python``."""
