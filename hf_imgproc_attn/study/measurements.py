"""What is measured of a trained model beside the clean data, by the measurements that the package has for its task.

Image classifiers: everything of :class:`hf_imgproc_attn.robustness.settings.ImageSettings` (noise, corruptions, FGSM,
PGD, SPSA, AutoAttack). Other tasks: what ``training/evaluate_checkpoint.py`` measures of them.

The results are those of ``robustness.json``: ``family`` and name of the ``disturbance``, its ``parameters`` and
``seed``, ``metric`` and ``value``, and on how many ``samples`` of which ``unit`` and ``split`` it was measured.
"""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..backbones import Task
from ..errors import UsageError, did_you_mean
from ..robustness.settings import ImageSettings, check_fractions

if TYPE_CHECKING:
    from transformers.image_processing_utils import BaseImageProcessor

    from hf_imgproc_attn.training_support.image_pixels import PixelDataset

HEADLINES = ("accuracy", "mean_iou", "word_perplexity", "perplexity", "loss")
"""The metrics of a split, the most telling one first: that one is shown."""
SEED = 0
"""Of noise, random starts and the choice of words: the same for every model, whose inputs are then the same."""
_OF_IMAGES = tuple(field.name for field in dataclasses.fields(ImageSettings) if field.name != "seed")
_OF_MASKS, _OF_TEXTS = ("sigmas", "epsilons"), ("fractions",)


def check_settings(given: Any, kind: Task, task: str) -> dict[str, Any]:
    """The settings of a task's measurements, checked.

    Args:
        given: for images as ``ImageSettings`` has them, ``sigmas`` and ``epsilons`` as numbers or as ``8/255``; for
            segmentation ``sigmas`` and ``epsilons``; else ``fractions`` of words that are swapped, or rates of noise.
        kind: of the task.
        task: its name, for messages.

    Returns:
        The same, with numbers for fractions.

    Raises:
        UsageError: for a field that the kind of task does not have, or a value outside its range.
    """
    if not isinstance(given, dict):
        raise UsageError(f"measure of task {task} must be a mapping, got {given!r}")
    known = (
        _OF_IMAGES if "corruption" in kind.disturbances else _OF_MASKS if "noise" in kind.disturbances else _OF_TEXTS
    )
    settings: dict[str, Any] = {}
    for name, value in given.items():
        if name not in known:
            hint = did_you_mean(str(name), known)
            raise UsageError(f"measure of task {task} must name {', '.join(known)}, got {name!r}{hint}")
        listed = name in ("sigmas", "epsilons", "fractions")
        if listed and (not isinstance(value, list) or not value):
            raise UsageError(f"{name} of task {task} must be a list that is not empty, got {value!r}")
        settings[name] = [_number(item, f"{name} of task {task}") for item in value] if listed else value
    try:
        if known is _OF_IMAGES:
            ImageSettings(**settings)
        for name in () if known is _OF_IMAGES else settings:
            check_fractions(name, settings[name])
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


def measure(folder: Path, kind: Task, settings: dict[str, Any], split: str) -> list[dict[str, Any]]:
    """Measure a finished run on the clean and on the disturbed data of a split.

    Args:
        folder: of the run.
        kind: of its task.
        settings: from :func:`check_settings`.
        split: ``test`` or ``validation``.

    Raises:
        UsageError: as ``training/evaluate_checkpoint.py`` does.
    """
    if "corruption" in kind.disturbances:
        return _measure_images(folder, settings, split)
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
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    from hf_imgproc_attn.cards.rendering import load_record
    from hf_imgproc_attn.robustness.classifier import unit_images
    from hf_imgproc_attn.robustness.images import evaluate_robustness

    chosen = ImageSettings(**settings, seed=SEED)
    processor = AutoImageProcessor.from_pretrained(folder)
    dataset = _images(load_record(folder), processor, split)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModelForImageClassification.from_pretrained(folder).to(device)
    results = evaluate_robustness(model, processor, *unit_images(dataset), chosen)["results"]
    fields = ("family", "disturbance", "parameters", "seed", "metric", "value", "samples", "unit")
    return [{**{name: result[name] for name in fields}, "split": split} for result in results]


def _images(record: dict[str, Any], processor: BaseImageProcessor, split: str) -> PixelDataset:
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
