"""The ledger of a study as a table: for every task and condition, every variant with its intervals and its verdict."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from ..cards.results import METRICS, Measurement
from ..robustness.scores import mean_corruption_error, mean_errors
from .ledger import DIVERGED, FORMAT
from .measurements import HEADLINES, SIMILARITY
from .plan import Study
from .statistics import Difference, Summary, compare, holm, summarise, verdict

CORRUPTION_ERROR = "mean_corruption_error"
LOWER_IS_BETTER = ("word_perplexity", "perplexity", "loss", SIMILARITY, CORRUPTION_ERROR)
NAMES = {
    **METRICS,
    SIMILARITY: "mean cosine of two tokens",
    CORRUPTION_ERROR: "mean corruption error (baseline 100)",
}
"""The metrics of tables, in words."""
NO_PAIR = "no pair"
"""Instead of a verdict, of a variant whose seeds have no result of the baseline yet, or never will."""
CORRUPTED = "all corruptions"
"""Family of what is said of all corruptions together."""


@dataclass(frozen=True)
class Row:
    """A variant under one condition.

    Attributes:
        variant: its name.
        summary: of its seeds; None where none has ended.
        difference: from the baseline, of the seeds that both have; None of the baseline itself.
        corrected: p-value, corrected for the number of comparisons in this table.
        verdict: in words; empty for the baseline.
        diverged: how many of its seeds have diverged.
        parameters: of the model.
        operations: of a training step a sample.
    """

    variant: str
    summary: Summary | None
    difference: Difference | None
    corrected: float | None
    verdict: str
    diverged: int
    parameters: int | None
    operations: int | None


@dataclass(frozen=True)
class Table:
    """All variants under one condition of one task.

    Attributes:
        task: its name.
        condition: as ``clean`` or ``FGSM, epsilon 8/255``.
        family: as ``clean``, ``noise`` or ``attack``.
        metric: what is measured.
        split: on which data.
        rows: the baseline first.
    """

    task: str
    condition: str
    family: str
    metric: str
    split: str
    rows: list[Row]

    @property
    def comparisons(self) -> int:
        """For how many the p-values are corrected."""
        return sum(row.corrected is not None for row in self.rows)


Key = tuple[str, str, str]
"""Condition, family and metric."""


def build_tables(study: Study, records: dict[str, dict[str, Any]]) -> list[Table]:
    """The tables of a study.

    Args:
        study: says which variants there are, in which order.
        records: name of a run -> its record.
    """
    tables = []
    for task in study.tasks:
        of_task = [record for record in records.values() if record["task"] == task.name]
        values: dict[Key, dict[str, dict[int, float]]] = {}
        for record in of_task:
            base = next((other for other in of_task if _is_baseline(other, study, record["seed"])), None)
            found = measured_values(record, study.split) | _corrupted(record, base, study)
            for key, value in found.items():
                values.setdefault(key, {}).setdefault(record["variant"], {})[record["seed"]] = value
        tables += [_table(study, task.name, key, of_key, of_task) for key, of_key in values.items()]
    return tables


def measured_values(record: dict[str, Any], split: str) -> dict[Key, float]:
    """What a run's record holds of a split: condition, family and metric -> value."""
    if record["status"] == DIVERGED:
        return {}
    metrics = record["metrics"].get(split, {})
    found: dict[Key, float] = {}
    severities: dict[str, list[float]] = {}
    metric = next((name for name in HEADLINES if metrics.get(name) is not None), None)
    if metric is not None:
        found["clean", "clean", metric] = metrics[metric]
    for result in record["measurements"]:
        measurement = Measurement(**result)
        if measurement.family == "clean" or measurement.value is None or measurement.split != split:
            continue
        epsilon = measurement.parameters.get("epsilon")
        if epsilon is not None and epsilon not in record["measured"].get("epsilons", [epsilon]):
            continue  # of a check of the attack, not of the model
        if measurement.metric == "perplexity" and metric == "word_perplexity":
            continue  # the same number in another unit
        if measurement.family == "corruption":
            severities.setdefault(f"{measurement.disturbance}, all severities", []).append(measurement.value)
            continue
        found[measurement.name, measurement.family, measurement.metric] = measurement.value
    return found | {(name, "corruption", "accuracy"): fmean(values) for name, values in severities.items()}


def _is_baseline(record: dict[str, Any], study: Study, seed: int) -> bool:
    return record["variant"] == study.baseline and record["seed"] == seed and record["status"] != DIVERGED


def _corrupted(record: dict[str, Any], base: dict[str, Any] | None, study: Study) -> dict[Key, float]:
    """Accuracy and error over all corruptions of a run; the error in percent of that of the same seed's baseline."""
    if not any(result["family"] == "corruption" for result in record["measurements"]):
        return {}
    mean = mean_errors(record["measurements"])["mean"]
    found: dict[Key, float] = {} if mean is None else {("mean of all corruptions", CORRUPTED, "accuracy"): 1 - mean}
    error = None if base is None else mean_corruption_error(record["measurements"], base["measurements"])["mce"]
    if error is not None:
        found[f"mean corruption error, {study.baseline} = 100", CORRUPTED, CORRUPTION_ERROR] = error
    return found


def autoattack_gaps(records: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Of every run and largest change with both attacks: what PGD leaves right and AutoAttack does not, in [-1, 1].

    AutoAttack counts what PGD has fooled, so that no gap is below 0; one that is large says that PGD, which follows
    gradients, was weak there, as where they are masked.
    """
    gaps = {}
    for name, record in records.items():
        values: dict[tuple[Any, Any], dict[str, float]] = {}
        for result in record["measurements"]:
            if result["family"] == "attack" and result["value"] is not None:
                where = result["parameters"].get("epsilon"), result["samples"]
                values.setdefault(where, {})[result["disturbance"]] = result["value"]
        for (epsilon, _), found in values.items():
            if {"AutoAttack", "PGD"} <= found.keys():
                gaps[f"{name} (epsilon {epsilon:g})"] = found["PGD"] - found["AutoAttack"]
    return gaps


def _table(
    study: Study, task: str, key: Key, values: dict[str, dict[int, float]], records: list[dict[str, Any]]
) -> Table:
    condition, family, metric = key
    base = values.get(study.baseline, {})
    rows: list[Row] = []
    for name in study.variant_names:
        seeds = values.get(name, {})
        both = [seed for seed in study.seeds if seed in seeds and seed in base]
        compared = name != study.baseline and bool(both)
        difference = compare([seeds[s] for s in both], [base[s] for s in both]) if compared else None
        own = [record for record in records if record["variant"] == name]
        rows.append(
            Row(
                variant=name,
                summary=summarise([seeds[seed] for seed in study.seeds if seed in seeds]) if seeds else None,
                difference=difference,
                corrected=None,
                verdict="",
                diverged=sum(record["status"] == DIVERGED for record in own),
                parameters=own[0]["parameters"]["total"] if own else None,
                operations=own[0]["operations"]["step_per_sample"] if own else None,
            )
        )
    return Table(task, condition, family, metric, study.split, _with_verdicts(rows, metric, study.baseline))


def _with_verdicts(rows: list[Row], metric: str, baseline: str) -> list[Row]:
    """Correct the p-values of one table together, and say what each comparison shows."""
    tested = [
        index for index, row in enumerate(rows) if row.difference is not None and row.difference.p_value is not None
    ]
    p_values = [row.difference.p_value for row in rows if row.difference is not None]
    corrected = dict(zip(tested, holm([p for p in p_values if p is not None]), strict=True))
    done = []
    for index, row in enumerate(rows):
        if row.difference is not None:
            value = corrected.get(index)
            words = verdict(row.difference, value, higher_is_better=metric not in LOWER_IS_BETTER)
            words += f", {row.diverged} diverged" if row.diverged else ""
            row = Row(**{**vars(row), "corrected": value, "verdict": words})
        else:
            said = [NO_PAIR] if row.summary is not None and row.variant != baseline else []
            said += [f"{row.diverged} diverged"] if row.diverged else []
            row = Row(**{**vars(row), "verdict": ", ".join(said)})
        done.append(row)
    return done


def as_json(study: Study, tables: list[Table], records: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The tables as plain values, with what they were made of."""
    return {
        "format": FORMAT,
        "study": study.name,
        "version": study.version,
        "baseline": study.baseline,
        "seeds": list(study.seeds),
        "runs": {
            "planned": len(study.tasks) * len(study.variant_names) * len(study.seeds),
            "ended": len(records),
            "diverged": sum(record["status"] == DIVERGED for record in records.values()),
        },
        "data": {record["task"]: record["data_fingerprint"]["train"] for record in records.values()},
        "autoattack_gaps": autoattack_gaps(records),
        "tables": [asdict(table) for table in tables],
    }
