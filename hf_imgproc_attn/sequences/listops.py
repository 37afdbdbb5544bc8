"""ListOps: nested operations on lists of digits; the answer is a digit.

Nangia and Bowman 2018 (arXiv 1804.06028), with the settings of the Long Range Arena (Tay et al. 2020, arXiv
2011.04006): a node is an operation with probability 1/4 and a digit otherwise, always a digit at ``max_depth``;
operations are minimum, maximum, median (halves are rounded down) and sum modulo 10, with 2 to ``max_args`` arguments;
of the trees drawn those are kept whose sequence is longer than ``min_length`` and shorter than ``max_length``.

    [MAX 4 [MED 1 9 6 ] 0 ]  ->  6

The published files write every pair of tokens in parentheses too, which say nothing, count for no length and are
removed before training; they are left out here.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from hf_imgproc_attn.sequences.drawing import below
from hf_imgproc_attn.sequences.splits import check_setting

DIGITS = tuple(str(digit) for digit in range(10))
OPERATIONS = ("[MIN", "[MAX", "[MED", "[SM")
CLOSE = "]"
_CLOSE_ID = len(DIGITS) + len(OPERATIONS)
_OPERATION_PROBABILITY = 0.25


class _Level(NamedTuple):
    """The nodes of one depth of many trees, siblings beside each other; all are int64 ``[nodes]``.

    Attributes:
        parent: index in the level above; at the roots, of the tree.
        operation: index in :data:`OPERATIONS`, -1 for a digit.
        arguments: of an operation, 0 for a digit.
        value: of a digit; of an operation once it is evaluated.
    """

    parent: np.ndarray
    operation: np.ndarray
    arguments: np.ndarray
    value: np.ndarray


@dataclass(frozen=True, kw_only=True)
class ListOps:
    """The task's settings; the defaults are those of the Long Range Arena.

    Attributes:
        min_length: tokens; every sequence is longer.
        max_length: tokens; every sequence is shorter.
        max_depth: of a tree, its root included.
        max_args: of an operation.

    Raises:
        UsageError: for settings that no sequence fits.
    """

    min_length: int = 500
    max_length: int = 2000
    max_depth: int = 10
    max_args: int = 10

    def __post_init__(self) -> None:
        check_setting(self.min_length >= 0, "min_length", "an integer >= 0", self.min_length)
        check_setting(self.max_length >= self.min_length + 2, "max_length", "at least min_length + 2", self.max_length)
        check_setting(2 <= self.max_depth <= 20, "max_depth", "an integer from 2 to 20", self.max_depth)
        check_setting(2 <= self.max_args <= 100, "max_args", "an integer from 2 to 100", self.max_args)

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Digits, operations, the end of an operation."""
        return (*DIGITS, *OPERATIONS, CLOSE)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return self.max_length - 1

    @property
    def classes(self) -> tuple[str, ...]:
        """The digits."""
        return DIGITS

    def draw(self, rng: np.random.Generator, count: int) -> tuple[list[np.ndarray], np.ndarray]:
        """The sequences, of ``count`` trees, that have the right length, int16, and their values, int64."""
        levels = self._trees(rng, count)
        sizes = _sizes(levels)
        kept = np.flatnonzero((sizes[0] > self.min_length) & (sizes[0] < self.max_length))
        levels, sizes = _only(levels, sizes, kept)
        _evaluate(levels)
        return _write(levels, sizes), levels[0].value

    def _trees(self, rng: np.random.Generator, count: int) -> list[_Level]:
        levels: list[_Level] = []
        parent = np.arange(count)
        while len(parent):
            nodes = len(parent)
            is_operation = rng.random(nodes) <= _OPERATION_PROBABILITY
            if len(levels) + 1 >= self.max_depth:
                is_operation[:] = False
            arguments = np.where(is_operation, 2 + below(rng, self.max_args - 1, nodes), 0)
            operation = np.where(is_operation, below(rng, len(OPERATIONS), nodes), -1)
            levels.append(_Level(parent, operation, arguments, below(rng, len(DIGITS), nodes)))
            parent = np.repeat(np.arange(nodes), arguments)
        return levels


def _sizes(levels: list[_Level]) -> list[np.ndarray]:
    """Tokens below and at every node, level by level."""
    sizes: list[np.ndarray] = []
    for level, below_it in zip(reversed(levels), [None, *reversed(levels)], strict=False):
        size = np.where(level.arguments > 0, 2, 1)
        if below_it is not None:
            np.add.at(size, below_it.parent, sizes[-1])
        sizes.append(size)
    return sizes[::-1]


def _only(levels: list[_Level], sizes: list[np.ndarray], kept: np.ndarray) -> tuple[list[_Level], list[np.ndarray]]:
    """The trees of which ``kept`` has the roots."""
    chosen_levels, chosen_sizes = [], []
    nodes, parent = kept, np.arange(len(kept))
    for depth, level in enumerate(levels):
        part = _Level(parent, *(field[nodes] for field in level[1:]))
        chosen_levels.append(part)
        chosen_sizes.append(sizes[depth][nodes])
        first = np.concatenate([[0], np.cumsum(level.arguments)])[:-1]  # child of every node, in the level below
        parent = np.repeat(np.arange(len(nodes)), part.arguments)
        nodes = np.repeat(first[nodes], part.arguments) + _within(part.arguments)
    return chosen_levels, chosen_sizes


def _within(counts: np.ndarray) -> np.ndarray:
    """``[3, 2]`` -> ``[0, 1, 2, 0, 1]``."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


def _evaluate(levels: list[_Level]) -> None:
    """Put the values of the operations into their levels, from the deepest upwards."""
    for level, children in zip(levels[-2::-1], levels[:0:-1], strict=True):
        nodes = np.flatnonzero(level.arguments)
        if not len(nodes):
            continue
        counts, operation = level.arguments[nodes], level.operation[nodes]
        ordered = children.value[np.lexsort((children.value, children.parent))]
        first = np.cumsum(counts) - counts
        middle = ordered[first + (counts - 1) // 2] + ordered[first + counts // 2]
        answers = (ordered[first], ordered[first + counts - 1], middle // 2, np.add.reduceat(ordered, first) % 10)
        level.value[nodes] = np.choose(operation, answers)


def _write(levels: list[_Level], sizes: list[np.ndarray]) -> list[np.ndarray]:
    """The token ids of every tree, int16."""
    ends = np.cumsum(sizes[0])
    flat = np.full(int(sizes[0].sum()), _CLOSE_ID, dtype=np.int16)
    place = ends - sizes[0]
    for depth, level in enumerate(levels):
        if depth:
            # A child begins behind its parent's operation and the siblings before it.
            before = np.cumsum(sizes[depth]) - sizes[depth]
            parents = np.flatnonzero(levels[depth - 1].arguments)
            counts = levels[depth - 1].arguments[parents]
            start_of_first = before[np.cumsum(counts) - counts]
            place = place[level.parent] + 1 + before - np.repeat(start_of_first, counts)
        flat[place] = np.where(level.arguments > 0, len(DIGITS) + level.operation, level.value)
    return np.split(flat, ends[:-1]) if len(ends) else []
