"""Keys that a whole sample does not see, for blocked attention: mostly padding, a few runs of places side by side.

A boolean mask costs a CPU ten times as much as another pass over the numbers. Runs are written by themselves instead:
what stands there, NaN included, is overwritten, and nothing else is touched.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from .backend_blocked_plan import Group, Plan

MOST_RUNS = 4
"""Runs of a sample, on average, up to which they are written one by one."""
MODERATE = 2.0**20
"""Numbers up to this may stay where a key is hidden: times a weight of 0 they are 0, and so are their products with
gradients up to 1e30."""


class Span(NamedTuple):
    """The keys ``first:stop``, beyond which some samples see none.

    has_gaps: whether one of the samples has hidden keys within.
    """

    first: int
    stop: int
    has_gaps: bool


class KeyRuns(NamedTuple):
    """Runs of keys ``[start, stop)``, for each sample, or once for all of them."""

    runs: tuple[tuple[tuple[int, int], ...], ...]

    def are_many(self, plan: Plan) -> bool:
        """Whether a group has so many samples that one more pass over its scores is cheaper than a call a run."""
        return len(self.runs) > 1 and plan.group_pairs > MOST_RUNS * plan.heads

    def parts(self, x: torch.Tensor, group: Group, first: int = 0) -> Iterator[torch.Tensor]:
        """The views of a tensor that belong to the runs.

        Args:
            x: ``[pairs, keys, ...]`` of a group.
            group: whose pairs these are.
            first: the key that stands first in ``x``.
        """
        if len(self.runs) == 1:
            cuts = [(x, self.runs[0])]
        else:
            cuts = list(zip(x.unflatten(0, group.shape), self.runs[group.batch], strict=True))
        for rows, runs in cuts:
            for start, stop in runs:
                start, stop = max(start - first, 0), min(stop - first, x.shape[1])
                if start < stop:
                    yield rows[:, start:stop]

    def span(self, group: Group, key_length: int) -> Span:
        """From the first to the last key that any sample of a group sees."""
        samples = self.runs if len(self.runs) == 1 else self.runs[group.batch]
        first, stop = key_length, 0
        for runs in samples:
            first = min(first, runs[0][1] if runs and not runs[0][0] else 0)
            stop = max(stop, runs[-1][0] if runs and runs[-1][1] == key_length else key_length)
        has_gaps = any(first < end and start < stop for runs in samples for start, end in runs)
        return Span(first, stop, has_gaps)

    def fill_(self, x: torch.Tensor, group: Group, value: float, first: int = 0) -> None:
        """Write a number into the runs' places; arguments as of :meth:`parts`."""
        for part in self.parts(x, group, first):
            part.fill_(value)


def is_moderate(x: torch.Tensor) -> bool:
    """Whether no number of a contiguous tensor is NaN or larger than ``MODERATE``, as its sum of squares tells."""
    numbers = x.view(-1)
    return bool(numbers.dot(numbers) <= MODERATE**2)


def key_runs(hidden: torch.Tensor, key_length: int) -> KeyRuns | None:
    """The runs of hidden keys; None where they are many, differ between heads, or could not be read without waiting.

    Args:
        hidden: boolean ``[batch or 1, heads or 1, length or 1, key_length or 1]``.
        key_length: number of keys.
    """
    if hidden.device.type != "cpu" or tuple(hidden.shape[1:]) != (1, 1, key_length):
        return None
    edges = torch.nn.functional.pad(hidden[:, 0, 0].to(torch.int8), (1, 1)).diff(dim=-1).nonzero()
    if len(edges) > 2 * MOST_RUNS * hidden.shape[0]:
        return None
    runs: list[list[tuple[int, int]]] = [[] for _ in range(hidden.shape[0])]
    for (sample, start), (_, stop) in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
        runs[sample].append((start, stop))
    return KeyRuns(tuple(map(tuple, runs)))
