"""What is measured of a trained model beside the clean data: noise, FGSM and PGD on images, word swap on texts.

The results are those of ``robustness.json``: ``family`` and name of the ``disturbance``, its ``parameters`` and
``seed``, ``metric`` and ``value``, and on how many ``samples`` of which ``unit`` and ``split`` it was measured.
"""

from __future__ import annotations

import dataclasses
import warnings
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..backbones import Task
from ..errors import UsageError, did_you_mean, require_extras

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.image_processing_utils import BaseImageProcessor

    from hf_imgproc_attn.training_support.image_pixels import PixelDataset

PGD_STEPS = 20
_OF_IMAGES = ("noise", "fgsm", "pgd")
_OF_TEXTS = ("word_swap",)
SEED = 0
"""Of noise, random starts and the choice of words: the same for every model, whose inputs are then the same."""


def check_settings(given: Any, kind: Task, task: str) -> dict[str, Any]:
    """The settings of a task's measurements, checked.

    Args:
        given: ``noise``: standard deviations; ``fgsm``, ``pgd``: largest changes of a pixel, in pixel values from 0 to
            1 or as ``8/255``; ``word_swap``: parts of the words.
        kind: of the task.
        task: its name, for messages.

    Returns:
        Name of a measurement -> its values as numbers.

    Raises:
        UsageError: for a measurement that the kind of task does not have, or values outside (0, 1].
    """
    if not isinstance(given, dict):
        raise UsageError(f"measure of task {task} must be a mapping, got {given!r}")
    known = _OF_IMAGES if "noise" in kind.disturbances else _OF_TEXTS if "word swap" in kind.disturbances else ()
    settings = {}
    for name, values in given.items():
        if name not in known:
            hint = did_you_mean(str(name), known)
            raise UsageError(f"measure of task {task} must name {', '.join(known) or 'nothing'}, got {name!r}{hint}")
        if not isinstance(values, list) or not values:
            raise UsageError(f"{name} of task {task} must be a list that is not empty, got {values!r}")
        settings[name] = [_part(value, f"{name} of task {task}") for value in values]
    return settings


def _part(value: Any, what: str) -> float:
    try:
        number = float(Fraction(value) if isinstance(value, str) else value)
    except (ValueError, TypeError, ZeroDivisionError):
        number = 0.0
    if isinstance(value, bool) or not 0 < number <= 1:
        raise UsageError(f"{what} must be > 0 and <= 1, a number or a fraction such as 8/255, got {value!r}")
    return number


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
    from .plan import training_script

    script = training_script(dataclasses.replace(kind, script="evaluate_checkpoint"))
    shared = {"seed": SEED, "split": split}
    if "noise" not in kind.disturbances:
        results = []
        for fraction in settings.get("word_swap", []):
            measured = script.evaluate(folder, script.Settings(fraction=fraction, **shared), force=True)["results"]
            results += [result for result in measured if result not in results]
        return results
    options = {"sigmas": settings.get("noise", []), "epsilons": settings.get("fgsm", [])}
    results = script.evaluate(folder, script.Settings(**options, **shared), force=True)["results"]
    for epsilon in settings.get("pgd", []):
        results.append(_pgd_result(folder, split, epsilon))
    return list(results)


def _pgd_result(folder: Path, split: str, epsilon: float) -> dict[str, Any]:
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    from hf_imgproc_attn.cards.rendering import load_record

    processor = AutoImageProcessor.from_pretrained(folder)
    dataset = _images(load_record(folder), processor, split)
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModelForImageClassification.from_pretrained(folder).to(device)
    value = pgd_accuracy(model, processor, dataset, epsilon)
    parameters = {"epsilon": epsilon, "steps": PGD_STEPS}
    return {
        "family": "attack",
        "disturbance": "PGD",
        "parameters": parameters,
        "seed": SEED,
        "metric": "accuracy",
        "value": value,
        "samples": len(dataset),
        "unit": "images",
        "split": split,
    }


def _images(record: dict[str, Any], processor: BaseImageProcessor, split: str) -> PixelDataset:
    """The pixels of a split, as the run had them."""
    from hf_imgproc_attn.training_support.arguments import ImageDataArguments
    from hf_imgproc_attn.training_support.image_data import load_image_splits
    from hf_imgproc_attn.training_support.image_pixels import load_pixels

    args = ImageDataArguments(**record["arguments"]["data"])
    splits = load_image_splits(args)
    only = dataclasses.replace(splits, rows={split: splits.rows[split]}, labels={split: splits.labels[split]})
    return load_pixels(only, processor, args, SEED)[split]


def pgd_accuracy(
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    dataset: PixelDataset,
    epsilon: float,
    batch_size: int = 256,
) -> float:
    """Accuracy under projected gradient descent (Madry 2018) in the maximum norm, by the ``foolbox`` library.

    One random start, :data:`PGD_STEPS` steps of epsilon / 8; images are clipped to [0, 1].

    Args:
        model: an image classifier; attacked exactly as it is used.
        processor: its image processor.
        dataset: the split.
        epsilon: largest change of a pixel, in pixel values from 0 to 1.
        batch_size: images attacked at once.

    Returns:
        In [0, 1].

    Raises:
        UsageError: if ``foolbox`` is not installed.
    """
    require_extras("robustness")
    import torch

    from hf_imgproc_attn.robustness.classifier import PixelClassifier, unit_images

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # foolbox 3.3 imports SciPy by a path that is going away
        from foolbox.attacks import LinfPGD
        from foolbox.models.pytorch import PyTorchModel

    classifier = PixelClassifier(model, processor)
    images, labels = unit_images(dataset)
    device = model.device
    target = PyTorchModel(classifier, bounds=(0, 1), device=device)
    attack = LinfPGD(rel_stepsize=1 / 8, steps=PGD_STEPS, random_start=True)
    fooled = 0
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            _, _, success = attack(target, x.to(device), y.to(device), epsilons=epsilon)
            fooled += int(success.sum())
    return 1 - fooled / len(labels)
