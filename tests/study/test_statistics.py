"""Intervals, paired tests and corrected p-values against scipy's own functions and numbers made by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from hf_imgproc_attn.study.statistics import (
    BETTER,
    NO_DIFFERENCE,
    TOO_FEW,
    WORSE,
    Interval,
    bootstrap_interval,
    compare,
    holm,
    summarise,
    verdict,
)
from hf_imgproc_attn.study.study_file import read_study
from hf_imgproc_attn.study.table import build_tables
from tests.study.conftest import WriteStudy

VARIANT = [0.951, 0.962, 0.940, 0.971, 0.955]
BASELINE = [0.930, 0.951, 0.935, 0.944, 0.941]


def test_mean_and_t_interval_by_hand() -> None:
    # 1, 2, 3, 4: mean 2.5, deviation sqrt(5/3), t_{0.975, 3} = 3.1824463052837078
    summary = summarise([1, 2, 3, 4])
    half = 3.1824463052837078 * math.sqrt(5 / 3) / 2
    assert (summary.count, summary.mean) == (4, 2.5)
    assert summary.deviation == pytest.approx(math.sqrt(5 / 3), rel=1e-12)
    assert summary.t_interval.low == pytest.approx(2.5 - half, rel=1e-9)
    assert summary.t_interval.high == pytest.approx(2.5 + half, rel=1e-9)


def test_t_interval_is_scipys() -> None:
    found = summarise(VARIANT).t_interval
    expected = stats.ttest_1samp(VARIANT, 0.0).confidence_interval(0.95)
    assert (found.low, found.high) == (pytest.approx(expected.low, rel=1e-9), pytest.approx(expected.high, rel=1e-9))


def test_bootstrap_covers_the_mean_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(3)
    found = [bootstrap_interval(generator.exponential(1.0, 40)) for _ in range(60)]
    covered = sum(ends.low is not None and ends.high is not None and ends.low <= 1.0 <= ends.high for ends in found)
    assert 51 <= covered <= 60  # 95 % of 60 is 57
    assert bootstrap_interval(VARIANT) == bootstrap_interval(VARIANT)  # the same for the same values


def test_paired_test_is_scipys_and_by_hand() -> None:
    found = compare(VARIANT, BASELINE)
    assert found.p_value == pytest.approx(stats.ttest_rel(VARIANT, BASELINE).pvalue, rel=1e-12)
    differences = np.subtract(VARIANT, BASELINE)
    t = differences.mean() / (differences.std(ddof=1) / math.sqrt(5))
    assert found.p_value == pytest.approx(2 * stats.t.sf(t, 4), rel=1e-9)
    assert found.summary.mean == pytest.approx(0.0156, abs=1e-12)
    low = found.summary.t_interval.low
    assert low is not None
    assert (low > 0) == (found.p_value < 0.05)


def test_pairs_see_what_unpaired_seeds_hide() -> None:
    seeds = np.array([0.1, 0.5, 0.9, 0.3, 0.7])
    found = compare((seeds + np.array([0.011, 0.009, 0.010, 0.012, 0.008])).tolist(), seeds.tolist())
    assert found.p_value is not None
    assert found.p_value < 0.001 < stats.ttest_ind(seeds + 0.01, seeds).pvalue


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),  # Holm's own steps: x4, x3, x2, x1, never falling
        ([0.5, 0.9], [1.0, 1.0]),
        ([0.02], [0.02]),
        ([], []),
        ([0.01, 0.01, 0.01], [0.03, 0.03, 0.03]),
    ],
)
def test_holm_by_hand(given: list[float], expected: list[float]) -> None:
    assert holm(given) == pytest.approx(expected, rel=1e-12)


def test_holm_lies_between_no_correction_and_bonferroni() -> None:
    p_values = np.random.default_rng(0).uniform(0, 0.2, 13).tolist()
    for raw, corrected in zip(p_values, holm(p_values), strict=True):
        assert raw <= corrected <= min(1.0, 13 * raw) + 1e-15


def test_few_or_equal_seeds_show_nothing_that_they_cannot() -> None:
    nothing = Interval(None, None)
    assert summarise([0.5]).t_interval == nothing
    assert compare([0.5, 0.6], [0.4, 0.1]).p_value is None
    assert summarise([0.5, 0.5, 0.5]).bootstrap == summarise([0.5, 0.5, 0.5]).t_interval == nothing
    assert compare([0.5, 0.6, 0.7], [0.5, 0.6, 0.7]).p_value == 1.0
    # Accuracies of few samples come in steps, so that differences may coincide: all of one sign, 2 of 2^5 cases.
    found = compare([0.6, 0.7, 0.8, 0.9, 0.5], [0.5, 0.6, 0.7, 0.8, 0.4])
    assert found.p_value == 2 / 2**5
    assert verdict(found, found.p_value, higher_is_better=True) == NO_DIFFERENCE


def test_what_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="finite numbers"):
        summarise([0.5, math.nan])
    with pytest.raises(ValueError, match="at least one"):
        summarise([])
    with pytest.raises(ValueError, match="as many values"):
        compare([0.5, 0.6], [0.5])


def test_verdicts() -> None:
    up, down = compare(VARIANT, BASELINE), compare(BASELINE, VARIANT)
    assert verdict(up, 0.04, higher_is_better=True) == BETTER
    assert verdict(up, 0.04, higher_is_better=False) == WORSE
    assert verdict(down, 0.04, higher_is_better=True) == WORSE
    assert verdict(down, 0.04, higher_is_better=False) == BETTER
    assert verdict(up, 0.05, higher_is_better=True) == NO_DIFFERENCE
    assert verdict(up, None, higher_is_better=True) == TOO_FEW


def test_a_table_pairs_by_seed_and_corrects_all_its_comparisons_together(write_study: WriteStudy) -> None:
    """By hand. twicing: differences of 1, 2, 3 points, t = 2 sqrt(3), p = 0.074; sos: 1, 1.1, 1.2, t = 11 sqrt(3).

    Records lie in another order than the seeds, and one seed of the baseline is missing.
    """
    study = read_study(write_study(seeds=4, variants=["softmax", "twicing", "sos"]))
    softmax = {2: 0.90, 0: 0.50, 1: 0.70}  # seed 3 has not ended
    twicing = {3: 0.10, 1: 0.72, 0: 0.51, 2: 0.93}
    sos = {0: 0.51, 2: 0.912, 1: 0.711}
    records = {
        f"{name}{seed}": {
            "task": "digits", "variant": name, "seed": seed, "status": "finished", "measurements": [],
            "metrics": {"test": {"accuracy": value}}, "parameters": {"total": 1}, "operations": {"step_per_sample": 1},
        }
        for name, values in (("twicing", twicing), ("sos", sos), ("softmax", softmax))
        for seed, value in values.items()
    }  # fmt: skip
    (table,) = build_tables(study, records)
    rows = {row.variant: row for row in table.rows}
    assert rows["twicing"].difference is not None
    assert rows["sos"].difference is not None
    assert rows["twicing"].difference.summary.values == pytest.approx((0.01, 0.02, 0.03), abs=1e-12)
    assert rows["sos"].difference.summary.values == pytest.approx((0.01, 0.011, 0.012), abs=1e-12)
    raw = {name: 2 * stats.t.sf(t * math.sqrt(3), 2) for name, t in (("twicing", 2), ("sos", 11))}
    assert rows["twicing"].difference.p_value == pytest.approx(raw["twicing"], rel=1e-6)
    assert rows["sos"].corrected == pytest.approx(2 * raw["sos"], rel=1e-6)  # the smallest of two
    assert rows["twicing"].corrected == pytest.approx(raw["twicing"], rel=1e-6)
    assert (rows["sos"].verdict, rows["twicing"].verdict) == (BETTER, NO_DIFFERENCE)
    assert rows["twicing"].summary is not None
    assert rows["twicing"].summary.count == 4  # the mean has the seed that no pair has
