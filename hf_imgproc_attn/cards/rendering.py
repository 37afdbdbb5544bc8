"""Model cards made of measured facts: a run's records -> the README.md of its checkpoint.

Every number of a card comes from ``run.json`` or ``robustness.json``; the template (``model_cards/template.md``) holds
none. What was not measured reads "not measured".
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import records
from ..backbones import FILTERED_MODEL_TYPE, OF_TASK, TASKS
from ..catalogue.presets import VARIANTS
from ..catalogue.works import PACKAGE_PAPERS, PAPERS
from ..errors import UsageError, require_extras
from ..markdown_tables import cell
from ..shipped_files import shipped_file
from . import facts, filter_facts
from .baseline import check_same_recipe, environment_differences
from .evidence import evidence
from .filters import check as check_filters
from .filters import check_lens
from .results import Measurement, check_results, evaluation_results, measurements, result_rows

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

ROBUSTNESS_FILE = "robustness.json"
TEMPLATE = "model_cards/template.md"

_REQUIRED = {"task": str, "arguments": dict, "model_config": dict}
_OPTIONAL = {
    "metrics": dict, "data_fingerprint": dict, "device": dict, "versions": dict, "parameters": dict,
    "weights_sha256": dict, "filter_summary": dict, "train_loss": list, "eval_history": list, "command": list,
    "local_paths": list, "applied_filter": dict, "lens_history": list,
}  # fmt: skip


@dataclass(frozen=True)
class RunResults:
    """What is known of a finished run.

    Attributes:
        record: the content of ``run.json``.
        robustness: the content of ``robustness.json``; None if the run was not evaluated on disturbed data.
        name: of the run: of its folder or results file.
    """

    record: dict[str, Any]
    robustness: dict[str, Any] | None = None
    name: str = ""


def load_results(path: str | Path) -> RunResults:
    """Read a run.

    Args:
        path: a run folder (``run.json`` and, where there is one, ``robustness.json``) or a results file
            (``training/results/NAME.json``).

    Raises:
        UsageError: a ValueError that names the file and what is wrong with it.
    """
    path = Path(path)
    if path.is_dir():
        file = path / records.FILE_NAME
        record = load_record(path)
        robustness = _read_object(path / ROBUSTNESS_FILE) if (path / ROBUSTNESS_FILE).exists() else None
        name = path.resolve().name
    else:
        file, content = path, _read_object(path)
        if not isinstance(content.get("record"), dict) or not isinstance(content.get("robustness"), dict | None):
            raise UsageError(f"{file} must hold a record and, where measured, robustness as objects")
        record, robustness, name = content["record"], content.get("robustness"), content.get("name", path.stem)
        _check_record(file, record)
    if robustness is not None:
        if robustness.get("weights_sha256") != record.get("weights_sha256"):
            raise UsageError(f"{file}: the robustness was measured on other weights than the run's (weights_sha256)")
        try:
            check_results(robustness)
        except UsageError as error:
            raise UsageError(f"{file}: {error}") from error
    return RunResults(record, robustness, name)


def load_record(folder: Path) -> dict[str, Any]:
    """Read the ``run.json`` of a finished run.

    Raises:
        UsageError: names the file and what is wrong with it.
    """
    record = _read_object(folder / records.FILE_NAME)
    _check_record(folder / records.FILE_NAME, record)
    return record


def render_card(
    run: RunResults,
    *,
    repo_id: str,
    revision: str,
    baseline: RunResults | None = None,
    license: str | Mapping[str, Any] | None = None,  # noqa: A002  # the Hub's name of the field
    example: bool = False,
) -> str:
    """The README.md of a checkpoint.

    Args:
        run: the run that made it.
        repo_id: the Hub repository, ``owner/name``.
        revision: the tag, branch or commit that the quick start pins.
        baseline: a run of the same recipe with another preset, shown beside it.
        license: the Hub's identifier of the licence of the weights, or the keys ``license``, ``license_name`` and
            ``license_link`` of a card; None: the card names none.
        example: the card of a run that is kept but whose checkpoint is not published; the card says so.

    Raises:
        UsageError: if the baseline is not of the same recipe (names the first difference), or Jinja is not installed.
    """
    require_extras("hub")
    from huggingface_hub import ModelCard

    record = records.public_record(run.record)
    other = None if baseline is None else records.public_record(baseline.record)
    rows, other_rows = measurements(record, run.robustness), None
    if baseline is not None and other is not None:
        check_same_recipe(record, other)
        other_rows = measurements(other, baseline.robustness)
    preset = filter_facts.variant_of(record)
    variant = None if preset == "custom" else VARIANTS[preset]
    if variant is not None and "applied_filter" in record:
        variant = variant.in_any_model()
    sources = PACKAGE_PAPERS if variant is None else variant.papers
    title = repo_id.rpartition("/")[2]
    card = ModelCard.from_template(
        _front_matter(record, rows, title, {"license": license} if isinstance(license, str) else license or {}),
        template_str=shipped_file(TEMPLATE).read_text(encoding="utf-8"),
        title=title,
        example=example,
        run_name=run.name,
        task=record["task"],
        backbone_title=facts.model_title(record),
        layers=filter_facts.filtered_layers(record),
        repo_id=repo_id,
        revision=revision,
        is_commit=re.fullmatch(r"[0-9a-f]{40}", revision) is not None,
        preset=preset,
        variant=variant,
        stock=filter_facts.is_stock(record),
        fields=filter_facts.changed_fields(record),
        filters=filter_facts.filter_numbers(record),
        compares_positions=filter_facts.compares_positions(record),
        papers=[PAPERS[name].reference for name in sources],
        start=record["arguments"]["model"].get("model_name_or_path"),
        dataset=facts.dataset_title(record),
        sequence=facts.example_sequence(record),
        pairs=bool(record["model_config"].get("classifier_pairs")),
        splits=facts.split_table(record),
        command=facts.command(record),
        git=record.get("git"),
        hyper_parameters=facts.hyper_parameters(record),
        definitions=(run.robustness or {}).get("definitions", {}),
        results=result_rows(
            # One sentence says what an evaluation would add; rows without a number would only bury the others.
            [row for row in rows if row.family == "clean" or run.robustness is not None],
            other_rows,
            record.get("seed"),
            with_disturbed=baseline is not None and baseline.robustness is not None,
        ),
        not_evaluated="" if run.robustness is not None else ", ".join(TASKS[record["task"]].disturbances),
        costs=facts.costs(record, other),
        baseline=None if other is None else filter_facts.variant_of(other),
        baseline_not_evaluated=baseline is not None and baseline.robustness is None and run.robustness is not None,
        baseline_name="" if baseline is None else baseline.name,
        baseline_differences=[] if other is None else environment_differences(record, other),
        evidence=evidence(record, preset),
        curves=bool(record.get("train_loss") or record.get("eval_history")),
        losses=[record["train_loss"][0], record["train_loss"][-1]] if record.get("train_loss") else [],
        predictions=bool(record["arguments"]["data"].get("pictures")) and not example,
        limits=facts.limits(record, rows),
        environment=facts.environment(record, run.robustness),
        citations=[PAPERS[name].bibtex for name in dict.fromkeys([*PACKAGE_PAPERS, *sources])],
        cell=cell,
    )
    return str(card).rstrip() + "\n"


def _front_matter(
    record: dict[str, Any], rows: list[Measurement], title: str, licence: Mapping[str, Any]
) -> ModelCardData:
    from huggingface_hub import ModelCardData

    task = TASKS[record["task"]].pipeline
    results = evaluation_results(rows, record, task=task, dataset_title=facts.dataset_title(record))
    dataset = facts.hub_name(record, "data", "dataset_name")
    return ModelCardData(
        license=licence.get("license"),
        license_name=licence.get("license_name"),
        license_link=licence.get("license_link"),
        library_name="transformers",
        pipeline_tag=task,
        base_model=facts.hub_name(record, "model", "model_name_or_path"),
        datasets=None if dataset is None else [dataset],
        metrics=sorted({result.metric_type for result in results} - {"loss"}) or None,
        tags=[
            "hf_imgproc_attn",
            filter_facts.variant_of(record),
            "attention",
            "image-filtering",
            FILTERED_MODEL_TYPE if "applied_filter" in record else OF_TASK[record["task"]].name,
        ],
        model_name=title,
        eval_results=results or None,
    )


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        hint = ""
        if isinstance(error, FileNotFoundError) and path.name == records.FILE_NAME:
            hint = (
                "; a run is what a training command leaves: train what was only converted or saved, or measure it by "
                "`imgproc-attn robustness`"
            )
        raise UsageError(f"{path} cannot be read: {error.strerror}{hint}") from error
    except ValueError as error:
        raise UsageError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def _check_record(file: Path, record: dict[str, Any]) -> None:
    for name, kind in {**_REQUIRED, **_OPTIONAL}.items():
        if name not in record and name in _REQUIRED:
            raise UsageError(f"{file}: the record of the run has no {name}")
        if name in record and not isinstance(record[name], kind):
            raise UsageError(f"{file}: {name} must be of type {kind.__name__}, got {record[name]!r}")
    if record["task"] not in TASKS:
        raise UsageError(f"{file}: task must be one of {', '.join(TASKS)}, got {record['task']!r}")
    for name, check in (("filter_summary", check_filters), ("lens_history", check_lens)):
        if name not in record:
            continue
        try:
            check(record[name])
        except UsageError as error:
            raise UsageError(f"{file}: {error}") from error
    applied = record.get("applied_filter", {"architecture": "", "layers": []})
    layers = applied.get("layers")
    if not isinstance(applied.get("architecture"), str) or not isinstance(layers, list):
        raise UsageError(f"{file}: applied_filter must have an architecture and a list of layers, got {applied!r}")
    if not all(isinstance(layer, dict) and layer.keys() == layers[0].keys() for layer in layers):
        raise UsageError(f"{file}: the layers of applied_filter must have the same facts, got {layers!r}")
    for part in ("model", "data", "trainer"):
        if not isinstance(record["arguments"].get(part), dict):
            raise UsageError(f"{file}: the arguments have no {part}")
    if record.get("status") != "finished":
        raise UsageError(f"{file}: the run must have finished, got status {record.get('status')!r}")
    for split, values in record.get("metrics", {}).items():
        for metric, value in values.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise UsageError(f"{file}: {metric} of the {split} split must be a number, got {value!r}")
