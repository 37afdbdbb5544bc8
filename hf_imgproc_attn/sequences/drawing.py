"""Random draws that give the same numbers with every version of NumPy.

NumPy keeps the stream of a bit generator and ``Generator.random``, which scales it, as they are; how it makes integers
and permutations of the stream may change. So everything here starts from ``random``.
"""

import numpy as np


def below(rng: np.random.Generator, bound: int | np.ndarray, shape: int | tuple[int, ...]) -> np.ndarray:
    """Uniform integers from 0 up to, not including, ``bound``; int64 ``[*shape]``."""
    return np.asarray(rng.random(shape) * bound, dtype=np.int64)


def distinct(rng: np.random.Generator, rows: int, count: int, bound: int) -> np.ndarray:
    """``count`` different integers below ``bound`` for each row, in random order; int64 ``[rows, count]``."""
    if count**2 > bound:
        return np.argsort(rng.random((rows, bound)), axis=1, kind="stable")[:, :count]
    chosen = below(rng, bound, (rows, count))
    while True:  # rows with a repetition once more; more than half of them have none
        repeated = np.flatnonzero((np.diff(np.sort(chosen, axis=1), axis=1) == 0).any(axis=1))
        if not len(repeated):
            return chosen
        chosen[repeated] = below(rng, bound, (len(repeated), count))


def weighted_places(rng: np.random.Generator, rows: int, count: int, weights: np.ndarray) -> np.ndarray:
    """``count`` different places for each row, drawn one after the other with these weights; int64 ``[rows, count]``.

    The order of independent exponential waiting times is that of successive draws without replacement.
    """
    waiting = -np.log1p(-rng.random((rows, len(weights)))) / weights
    return np.argsort(waiting, axis=1, kind="stable")[:, :count]
