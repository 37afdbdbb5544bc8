"""What is measured of a trained model beside the clean data, by the measurements that the package has for its task.

Image classifiers: everything of :class:`hf_imgproc_attn.robustness.settings.ImageSettings` (noise, corruptions, FGSM,
PGD, SPSA, AutoAttack). Other tasks: what ``training/evaluate_checkpoint.py`` measures of them. Classifiers of images
and of sequences: how alike tokens become with depth (:mod:`.smoothing`).

The results are those of ``robustness.json``: ``family`` and name of the ``disturbance``, its ``parameters`` and
``seed``, ``metric`` and ``value``, and on how many ``samples`` of which ``unit`` and ``split`` it was measured.
"""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..backbone_row import Task
from ..errors import UsageError, did_you_mean
from ..robustness.settings import ImageSettings, check_fractions, check_integer

if TYPE_CHECKING:
    from transformers.image_processing_utils import BaseImageProcessor

    from hf_imgproc_attn.training_support.image_pixels import PixelDataset

HEADLINES = ("accuracy", "mean_iou", "word_perplexity", "perplexity", "loss")
"""The metrics of a split, the most telling one first: that one is shown."""
SEED = 0
"""Of noise, random starts and the choice of words: the same for every model, whose inputs are then the same."""
SAME = 0.01
"""How far the result on clean data may be from the earlier one, as another device computes it."""
_OF_IMAGES = tuple(field.name for field in dataclasses.fields(ImageSettings) if field.name != "seed")
_OF_MASKS, _OF_TEXTS = ("sigmas", "epsilons"), ("fractions",)
SIMILARITY = "token_similarity"
"""The setting that asks for :mod:`.smoothing`, of how many samples, and the metric of its results."""
_SMOOTHED = ("image-classification", "sequence-classification")
_OF_NOISE, _OF_CORRUPTIONS = ("sigmas",), ("corruptions", "severities", "table", "frost_pictures")
_FAMILIES = ("clean", "noise", "word swap", "corruption", "attack", "over-smoothing")


def check_settings(given: Any, kind: Task, task: str) -> dict[str, Any]:
    """The settings of a task's measurements, checked.

    Args:
        given: for images as ``ImageSettings`` has them, ``sigmas`` and ``epsilons`` as numbers or as ``8/255``; for
            segmentation ``sigmas`` and ``epsilons``; else ``fractions`` of words that are swapped, or rates of noise.
            For classifiers of images and of sequences also ``token_similarity``: of how many samples.
        kind: of the task.
        task: its name, for messages.

    Returns:
        The same, with numbers for fractions.

    Raises:
        UsageError: for a field that the kind of task does not have, or a value outside its range.
    """
    if not isinstance(given, dict):
        raise UsageError(f"measure of task {task} must be a mapping, got {given!r}")
    own = _OF_IMAGES if "corruption" in kind.disturbances else _OF_MASKS if "noise" in kind.disturbances else _OF_TEXTS
    known = (*own, SIMILARITY) if kind.name in _SMOOTHED else own
    settings: dict[str, Any] = {}
    for name, value in given.items():
        if name not in known:
            hint = did_you_mean(str(name), known)
            raise UsageError(f"measure of task {task} must name {', '.join(known)}, got {name!r}{hint}")
        listed = name in ("sigmas", "epsilons", "fractions")
        if listed and (not isinstance(value, list) or not value):
            raise UsageError(f"{name} of task {task} must be a list that is not empty, got {value!r}")
        if name in ("corruptions", "severities", "attacks") and not isinstance(value, list):
            raise UsageError(f"{name} of task {task} must be a list, got {value!r}")
        settings[name] = [_number(item, f"{name} of task {task}") for item in value] if listed else value
    others = {name: value for name, value in settings.items() if name != SIMILARITY}
    try:
        if own is _OF_IMAGES:
            ImageSettings(**others)
        for name in () if own is _OF_IMAGES else others:
            check_fractions(name, others[name])
        if SIMILARITY in settings and settings[SIMILARITY] is None:
            raise UsageError(f"{SIMILARITY} must be an integer >= 1, got None")
        check_integer(SIMILARITY, settings.get(SIMILARITY), 1)
    except (UsageError, TypeError) as error:
        raise UsageError(f"measure of task {task}: {error}") from error
    return settings


def _number(value: Any, what: str) -> float:
    try:
        if isinstance(value, bool):
            raise TypeError
        return float(Fraction(value) if isinstance(value, str) else value)
    except (ValueError, TypeError, ZeroDivisionError):
        raise UsageError(f"{what} must be numbers or fractions such as 8/255, got {value!r}") from None


def measure(
    folder: Path,
    kind: Task,
    settings: dict[str, Any],
    split: str,
    earlier: tuple[dict[str, Any], list[dict[str, Any]]] = ({}, []),
) -> list[dict[str, Any]]:
    """Measure a finished run on the clean and on the disturbed data of a split.

    Args:
        folder: of the run.
        kind: of its task.
        settings: from :func:`check_settings`.
        split: ``test`` or ``validation``.
        earlier: settings and results of an earlier call for this run. What its settings say alike is not measured
            again.

    Raises:
        UsageError: as ``training/evaluate_checkpoint.py`` does, or if the clean data give another result than earlier.
    """
    results, left = _still_valid(kind, settings, *earlier)
    samples = left.pop(SIMILARITY, None)
    if left:
        of_task = _measure_images if "corruption" in kind.disturbances else partial(_measure_others, kind)
        seen = {result["family"]: result for result in results}
        found = of_task(folder, left, split)
        _check_same_model(folder, seen, found)
        results += [result for result in found if result["family"] not in seen]
    if samples is not None:
        from .smoothing import token_similarity

        results += token_similarity(folder, split, samples)
    return sorted(results, key=lambda result: _FAMILIES.index(result["family"]))


def _still_valid(
    kind: Task, settings: dict[str, Any], before: dict[str, Any], results: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The earlier results that settings still ask for, and the settings of what is to be measured."""
    parts: dict[tuple[str, ...], tuple[str, ...]]
    if "corruption" in kind.disturbances:
        of_attacks = tuple(name for name in _OF_IMAGES if name not in (*_OF_NOISE, *_OF_CORRUPTIONS))
        parts = {_OF_NOISE: ("noise",), _OF_CORRUPTIONS: ("corruption",), of_attacks: ("attack",)}
    else:
        parts = {(*_OF_MASKS, *_OF_TEXTS): ("noise", "attack", "word swap")}
    parts[SIMILARITY,] = ("over-smoothing",)
    families, left = {"clean"}, dict[str, Any]()
    for names, of_part in parts.items():
        asked = {name: settings[name] for name in names if name in settings}
        if asked == {name: before[name] for name in names if name in before}:
            families |= {*of_part}
        else:
            left |= asked
    return [result for result in results if result["family"] in families], left


def _check_same_model(folder: Path, before: dict[str, dict[str, Any]], found: list[dict[str, Any]]) -> None:
    """Refuse to put results of one model beside those of another: a later version may compute it otherwise."""
    for result in found:
        earlier = before.get(result["family"])
        if result["family"] != "clean" or earlier is None or earlier["value"] is None:
            continue
        is_alike = math.isclose(earlier["value"], result["value"], rel_tol=SAME, abs_tol=SAME)
        if earlier["metric"] == result["metric"] and not is_alike:
            raise UsageError(
                f"the kept model {folder.name} must give the {result['metric'].replace('_', ' ')} on clean data that "
                f"its record has ({earlier['value']:.4g}), got {result['value']:.4g}: measurements of the two are "
                "never mixed; train it again"
            )


def _measure_others(kind: Task, folder: Path, settings: dict[str, Any], split: str) -> list[dict[str, Any]]:
    from .plan import training_script

    script = training_script(dataclasses.replace(kind, script="evaluate_checkpoint"))
    if "noise" in kind.disturbances:
        every = [{"sigmas": settings.get("sigmas", []), "epsilons": settings.get("epsilons", [])}]
    else:
        every = [{"fraction": fraction} for fraction in settings.get("fractions", [])]
    results: list[dict[str, Any]] = []
    for options in every:
        found = script.evaluate(folder, script.Settings(**options, seed=SEED, split=split), force=True)["results"]
        results += [result for result in found if result not in results]
    return results


def _measure_images(folder: Path, settings: dict[str, Any], split: str) -> list[dict[str, Any]]:
    import torch
    from transformers import AutoModelForImageClassification
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    from hf_imgproc_attn.cards.rendering import load_record
    from hf_imgproc_attn.robustness.classifier import unit_images
    from hf_imgproc_attn.robustness.images import evaluate_robustness

    chosen = ImageSettings(**settings, seed=SEED)
    processor = AutoImageProcessor.from_pretrained(folder)
    dataset = images_of(load_record(folder), processor, split)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModelForImageClassification.from_pretrained(folder).to(device)
    results = evaluate_robustness(model, processor, *unit_images(dataset), chosen)["results"]
    fields = ("family", "disturbance", "parameters", "seed", "metric", "value", "samples", "unit")
    return [{**{name: result[name] for name in fields}, "split": split} for result in results]


def images_of(record: dict[str, Any], processor: BaseImageProcessor, split: str) -> PixelDataset:
    """The pixels of a split, as the run had them.

    Raises:
        UsageError: if the data have no such split.
    """
    from hf_imgproc_attn.training_support.arguments import ImageDataArguments
    from hf_imgproc_attn.training_support.image_data import load_image_splits
    from hf_imgproc_attn.training_support.image_pixels import load_pixels

    args = ImageDataArguments(**record["arguments"]["data"])
    splits = load_image_splits(args)
    if split not in splits.rows:
        raise UsageError(f"split must be one that {args.dataset_name!r} has ({', '.join(splits.rows)}), got {split!r}")
    only = dataclasses.replace(splits, rows={split: splits.rows[split]}, labels={split: splits.labels[split]})
    return load_pixels(only, processor, args, SEED)[split]
