"""Intervals and tests on the seeds of a study: few values, so that every formula is the textbook's small-sample form.

What is paired, is compared in pairs: variants of one seed have the same start of what they share and the same order of
batches, so the difference of a seed varies less than its two terms.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import stats

LEVEL, CONFIDENCE = 0.05, 0.95
RESAMPLES = 9999
LEAST_PAIRS = 3
"""Two differences of accuracies that come in steps are often equal or nearly so: no verdict rests on them."""
_SEED = 0

BETTER, WORSE, NO_DIFFERENCE, TOO_FEW = "better", "worse", "no difference seen", "too few seeds"


@dataclass(frozen=True)
class Interval:
    """A confidence interval; both ends None where the values do not give one."""

    low: float | None
    high: float | None


@dataclass(frozen=True)
class Summary:
    """Values of several seeds.

    Attributes:
        values: a number a seed.
        mean: of the values.
        deviation: sample standard deviation (divisor n - 1); None of one value.
        t_interval: of the mean, by Student's t.
    """

    values: tuple[float, ...]
    mean: float
    deviation: float | None
    t_interval: Interval

    @property
    def count(self) -> int:
        """Of the values."""
        return len(self.values)

    @property
    def bootstrap(self) -> Interval:
        """Of the mean, by the bootstrap; made when it is asked for, since it takes longer than all else."""
        return bootstrap_interval(self.values)


@dataclass(frozen=True)
class Difference:
    """Paired differences of a variant and the baseline.

    Attributes:
        summary: of the differences, variant minus baseline.
        p_value: of Student's paired t-test that their mean is 0, two-sided; where all differences are equal, that of
            the exact test of their signs; None with fewer than :data:`LEAST_PAIRS` pairs.
    """

    summary: Summary
    p_value: float | None


def summarise(values: Sequence[float]) -> Summary:
    """Mean, deviation and intervals of the mean.

    Raises:
        ValueError: for no values, or one that is not finite.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0 or not np.isfinite(array).all():
        raise ValueError(f"values must be finite numbers, at least one, got {list(values)}")
    mean, given = float(array.mean()), tuple(array.tolist())
    if array.size == 1:
        return Summary(given, mean, None, Interval(None, None))
    deviation = float(array.std(ddof=1))
    if _is_constant(array):  # as accuracies of few samples can be: their spread is not known, it is not nothing
        return Summary(given, mean, deviation, Interval(None, None))
    half = _quantile(array.size - 1) * deviation / math.sqrt(array.size)
    return Summary(given, mean, deviation, Interval(mean - half, mean + half))


@lru_cache  # of few numbers, asked for thousands of times
def _quantile(freedom: int) -> float:
    """Of Student's t, for both ends of an interval."""
    return float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom))


def bootstrap_interval(values: Sequence[float] | np.ndarray) -> Interval:
    """Interval of the mean by the BCa bootstrap (Efron 1987), the same for the same values.

    With a handful of seeds it is rather too narrow, as every bootstrap is; the t interval beside it is not.
    """
    return _bootstrap_interval(tuple(np.asarray(values, dtype=np.float64).tolist()))


@lru_cache(maxsize=8192)  # the same values stand in many tables, as with another baseline
def _bootstrap_interval(values: tuple[float, ...]) -> Interval:
    array = np.asarray(values, dtype=np.float64)
    if array.size < 2 or _is_constant(array):
        return Interval(None, None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a degenerate distribution is told by the nan that is looked for below
        found = stats.bootstrap(
            (array,), np.mean, confidence_level=CONFIDENCE, n_resamples=RESAMPLES, method="BCa",
            rng=np.random.default_rng(_SEED),
        ).confidence_interval  # fmt: skip
    low, high = float(found.low), float(found.high)
    return Interval(low, high) if math.isfinite(low) and math.isfinite(high) else Interval(None, None)


def compare(variant: Sequence[float], baseline: Sequence[float]) -> Difference:
    """Paired comparison of a variant with the baseline.

    Args:
        variant: a value for each seed.
        baseline: the baseline's values for the same seeds, in the same order.

    Raises:
        ValueError: for two different numbers of values, or none.
    """
    if len(variant) != len(baseline):
        raise ValueError(f"pairs need as many values of both, got {len(variant)} and {len(baseline)}")
    differences = np.asarray(variant, dtype=np.float64) - np.asarray(baseline, dtype=np.float64)
    summary = summarise(differences.tolist())
    if len(differences) < LEAST_PAIRS:
        return Difference(summary, None)
    if _is_constant(differences):  # the test's statistic would be infinite: of all signs, only two are so extreme
        return Difference(summary, 1.0 if summary.mean == 0 else 2.0 ** (1 - len(differences)))
    return Difference(summary, float(stats.ttest_rel(variant, baseline).pvalue))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number by Holm's step-down method (1979).

    The probability of one false difference or more among all of them stays below the level, whatever they depend on.

    Args:
        p_values: of all comparisons that are made at once.

    Returns:
        The corrected ones, in the same order, each at most 1.
    """
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    corrected = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def verdict(difference: Difference, corrected: float | None, *, higher_is_better: bool) -> str:
    """What a comparison says, in words: a difference is one if the corrected p-value is below 0.05."""
    if corrected is None:
        return TOO_FEW
    if corrected >= LEVEL:
        return NO_DIFFERENCE
    return BETTER if (difference.summary.mean > 0) == higher_is_better else WORSE


def _is_constant(array: np.ndarray) -> bool:
    return bool(np.ptp(array) <= 1e-12 * max(1.0, float(np.abs(array).max())))
