"""The measured values of a run: as rows of its card's table, and as the ``model-index`` of its front matter."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from huggingface_hub import EvalResult

from ..backbones import TASKS
from ..errors import UsageError

NOT_MEASURED = "not measured"
METRICS = {
    "accuracy": "accuracy",
    "mean_iou": "mean IoU",
    "pixel_accuracy": "accuracy of the pixels",
    "perplexity": "perplexity a token",
    "word_perplexity": "perplexity a word",
    "loss": "loss (nats)",
}
"""The metrics that there are, the most telling one first, and their names in a card."""
PARTS = ("accuracy", "mean_iou", "pixel_accuracy")
"""Those that are parts of a whole, which a card shows in percent."""
# The same samples measured twice, by the training script and with the disturbed ones, differ by rounding only.
_SAME = 1e-3


@dataclass(frozen=True)
class Measurement:
    """One number and what it was measured on.

    Attributes:
        family: ``clean``, ``noise``, ``attack``, ``corruption`` or ``word swap``.
        disturbance: its name, as ``Gaussian noise``.
        metric: a key of :data:`METRICS`.
        split: of the data set.
        value: None if it was not measured.
        samples: how many, None if that is not recorded.
        unit: of the samples: images, tokens or words.
        seed: of the disturbance, None where it does not draw any numbers.
        parameters: of the disturbance.
    """

    family: str
    disturbance: str
    metric: str
    split: str
    value: float | None = None
    samples: int | None = None
    unit: str = ""
    seed: int | None = None
    parameters: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The same for two runs that were measured alike."""
        return json.dumps(vars(replace(self, value=None)), sort_keys=True)

    @property
    def name(self) -> str:
        """The disturbance with its parameters, as ``FGSM, epsilon 8/255``."""
        parameters = (f"{name} {_parameter(value)}" for name, value in self.parameters.items())
        return ", ".join([self.disturbance, *parameters])


def check_results(robustness: dict[str, Any]) -> None:
    """Check that every result of a ``robustness.json`` is one that a card can show.

    Raises:
        UsageError: names the result and what is wrong with it.
    """
    results = robustness.get("results")
    if not isinstance(results, list):
        raise UsageError(f"robustness must have a list of results, got {results!r}")
    for result in results:
        try:
            row = Measurement(**result)
        except TypeError as error:
            raise UsageError(f"robustness has a result that is none: {result!r}") from error
        if row.metric not in METRICS:
            raise UsageError(f"metric of a robustness result must be one of {', '.join(METRICS)}, got {row.metric!r}")
        if isinstance(row.value, bool) or not isinstance(row.value, int | float):
            raise UsageError(f"value of the robustness result {row.name!r} must be a number, got {row.value!r}")


def measurements(record: dict[str, Any], robustness: dict[str, Any] | None) -> list[Measurement]:
    """Everything that was measured, and a row without a value for each thing that was not.

    Args:
        record: the content of ``run.json``.
        robustness: the content of ``robustness.json``.
    """
    task = record["task"]
    rows = []
    for split in ("validation", "test"):
        values = record.get("metrics", {}).get(split, {})
        counts = record.get("data_fingerprint", {}).get(split, {})
        for metric in [name for name in METRICS if name in values] or [TASKS[task].metric]:
            unit, samples = _samples(task, metric, counts)
            rows.append(Measurement("clean", "clean", metric, split, values.get(metric), samples, unit))
    for row in [Measurement(**result) for result in (robustness or {}).get("results", [])]:
        if row.family != "clean":
            rows.append(row)
        elif not any(_is_repeated(row, clean) for clean in rows):
            rows.append(replace(row, disturbance="clean, as evaluated with the disturbed"))
    measured = {row.family for row in rows}
    for family in TASKS[task].disturbances:
        if family not in measured:
            rows.append(Measurement(family, family, TASKS[task].metric, "test"))
    return rows


def format_value(metric: str, value: float | None) -> str:
    """A number as a card shows it: parts of a whole in percent."""
    if value is None:
        return NOT_MEASURED
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "infinite"
    if metric in PARTS:
        return f"{100 * value:.2f} %"
    return f"{value:.4f}" if metric == "loss" else f"{value:,.2f}"


def result_rows(
    rows: Iterable[Measurement],
    baseline: Iterable[Measurement] | None,
    training_seed: int | None,
    *,
    with_disturbed: bool = True,
) -> list[list[str]]:
    """The rows of the table of results.

    Args:
        rows: from :func:`measurements`.
        baseline: those of the run beside it; None leaves its column out.
        training_seed: None if it is not recorded.
        with_disturbed: whether the baseline was evaluated on disturbed data; if not, its cells are a dash there.
    """
    others = None if baseline is None else {row.key: row.value for row in baseline}
    table = []
    for row in rows:
        samples = "not recorded" if row.samples is None else f"{row.samples:,} {row.unit}"
        seeds = "not recorded" if training_seed is None else f"training {training_seed}"
        if row.seed is not None:
            seeds += f", disturbance {row.seed}"
        cells = [row.name, METRICS[row.metric], row.split]
        cells += [NOT_MEASURED] * 2 if row.value is None else [samples, seeds]
        cells.append(format_value(row.metric, row.value))
        if others is not None:
            left_out = row.family != "clean" and not with_disturbed
            cells.append("–" if left_out else format_value(row.metric, others.get(row.key)))
        table.append(cells)
    return table


def evaluation_results(
    rows: Iterable[Measurement], record: dict[str, Any], *, task: str, dataset_title: str
) -> list[EvalResult]:
    """The measured values for the front matter. Those that are no finite number, which the Hub refuses, are left out.

    Args:
        rows: from :func:`measurements`.
        record: the content of ``run.json``.
        task: the Hub's name of the task.
        dataset_title: name of the data set for people.
    """
    data = record["arguments"]["data"]
    return [
        EvalResult(
            task_type=task,
            dataset_type=data["dataset_name"],
            dataset_name=dataset_title,
            dataset_config=data.get("dataset_config_name"),
            dataset_split=row.split,
            metric_type=row.metric,
            metric_name=f"{METRICS[row.metric]}, {row.name}",
            metric_value=row.value,
            metric_args={
                **row.parameters,
                "disturbance": row.disturbance,
                "disturbance_seed": row.seed,
                "training_seed": record.get("seed"),
                "samples": row.samples,
            },
        )
        for row in rows
        if row.value is not None and math.isfinite(row.value)
    ]


def _samples(task: str, metric: str, counts: dict[str, Any]) -> tuple[str, int | None]:
    if "answers" in counts:  # several in a sequence
        return "answers", counts["answers"]
    if TASKS[task].metric in PARTS:
        return TASKS[task].rows, counts.get("rows")
    if metric == "word_perplexity":
        return "words", counts.get("words")
    tokens = counts.get("tokens")
    return "tokens", None if tokens is None else tokens - 1  # the first one is given, not predicted


def _is_repeated(row: Measurement, clean: Measurement) -> bool:
    return row.key == clean.key and math.isclose(row.value or 0.0, clean.value or 0.0, rel_tol=_SAME)


def _parameter(value: Any) -> str:
    """A number as people write it: multiples of the grey level 1/255 as such, unless they are short decimals."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    levels = round(255 * value)
    is_fraction = float(f"{value:g}") != value and math.isclose(255 * value, levels, rel_tol=1e-9)
    return f"{levels}/255" if is_fraction else f"{value:g}"
