"""Accuracy of an image classifier on clean, noisy, corrupted and attacked images.

A result is a dictionary: ``family`` and name of the ``disturbance``, its ``parameters`` and ``seed`` (None where it
draws no numbers), the ``metric`` and its ``value``, on how many ``samples`` of which ``unit`` it was measured, and
``correct``: which of the images were classified correctly, eight images a pair of hexadecimal digits
(:func:`.classifier.unpack_bits`), so that two models can be compared image by image.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..errors import require_extras
from .attacks import check_gradients, fgsm_withstood, frozen, pgd_withstood, spsa_withstood
from .classifier import PixelClassifier, check_images, correctness, pack_bits, unpack_bits
from .scores import masking_signs, mean_errors
from .settings import ATTACKS, ImageSettings, as_plain
from .severities import TABLES, table_for

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.image_processing_utils import BaseImageProcessor

FORMAT = 1
DEFINITIONS = {
    "Gaussian noise": "white, added to the pixels, which are then clipped",
    "sigma": "standard deviation, in pixel values from 0 to 1",
    "FGSM": "fast gradient sign method (Goodfellow 2015), one step with the gradient of the evaluated model itself",
    "PGD": "projected gradient descent (Madry 2018) from random starts; an image counts as fooled where any step of "
    "any start misleads the evaluated model itself",
    "SPSA": "gradients estimated without derivatives, from random differences of logits (Uesato 2018)",
    "AutoAttack": "APGD on cross-entropy, targeted APGD on the ratio of logit differences, targeted FAB and Square, "
    "which sees logits only (Croce and Hein 2020), each on what withstood the ones before; an image that PGD fooled "
    "counts as fooled too",
    "worst case": "an image counts as right where it withstood every attack of this table with this epsilon",
    "epsilon": "largest change of a pixel, in pixel values from 0 to 1",
    "severity": "1 to 5, as published with CIFAR-10-C or ImageNet-C (Hendrycks and Dietterich 2019)",
    "table": "which of the two sets of published settings the severities mean",
}
"""The disturbances and their parameters."""

Result = dict[str, Any]
_Attacked = tuple[PixelClassifier, torch.Tensor, torch.Tensor]


class _Job(NamedTuple):
    """One measurement: what it is called, on how many images, and what finds which of them are right."""

    about: Result
    samples: int
    measure: Callable[[], tuple[torch.Tensor, Result]]


def evaluate_robustness(
    model: PreTrainedModel,
    processor: BaseImageProcessor,
    images: Any,
    labels: Any,
    settings: ImageSettings | None = None,
    *,
    done: Iterable[Result] = (),
    on_result: Callable[[Result], None] | None = None,
) -> Result:
    """Measure an image classifier on clean and on disturbed images.

    The model is used exactly as it is given, filters and boosters included, in evaluation mode; what the image
    processor does to pixels happens inside, so that images are disturbed as files would be.

    Args:
        model: any image classifier of Transformers.
        processor: its image processor, for rescaling and normalisation.
        images: ``[images, channels, height, width]`` of the size that the model takes, uint8 or floats in [0, 1].
        labels: class indices ``[images]``.
        settings: what is measured; None: clean images only.
        done: results of an earlier call with the same settings, model and images, which are not measured again.
        on_result: is called with each result as soon as it is known.

    Returns:
        ``results`` (a list, clean first), ``errors`` (mean errors of the corruptions), ``gradients`` and ``masking``
        (of the attacks; None without any), ``settings``, ``definitions`` and ``seconds``: as JSON holds them.

    Raises:
        UsageError: for settings or data that are wrong, a missing package, or gradients that are not finite.
    """
    settings = settings or ImageSettings()
    _require_packages(settings)
    classifier = PixelClassifier(model, processor)
    images, labels = check_images(images, labels, classifier)
    if settings.table is None:
        table = table_for(max(images.shape[2:]))
    else:
        table = settings.table
    started = time.perf_counter()
    earlier = {result_key(result): result for result in done}
    results: list[Result] = []
    gradients = None
    with frozen(model):
        if settings.attacks:
            few = images[: settings.attack_samples], labels[: settings.attack_samples]
            gradients = check_gradients(classifier, *few, settings.batch_size)
        for job in _jobs(classifier, images, labels, settings, table, results):
            result = {**job.about, "metric": "accuracy", "samples": job.samples, "unit": "images"}
            if (known := earlier.get(result_key(result))) is not None:
                results.append(known)
                continue
            correct, details = job.measure()
            result |= {"value": correct.float().mean().item(), "correct": pack_bits(correct), **details}
            results.append(result)
            if on_result is not None:
                on_result(result)
    used = {name for result in results for name in (result["disturbance"], *result["parameters"])}
    return {
        "format": FORMAT,
        "task": "image-classification",
        "settings": {**as_plain(settings), "table": table},
        "results": results,
        "errors": mean_errors(results) if settings.corruptions else None,
        "gradients": gradients,
        "masking": masking_signs(results, gradients) if gradients is not None else None,
        "definitions": {name: text for name, text in DEFINITIONS.items() if name in used},
        "seconds": time.perf_counter() - started,
    }


def count_measurements(settings: ImageSettings) -> int:
    """How many results these settings lead to."""
    attacks = len(settings.attacks)
    a_level = attacks + (attacks > 1)
    return (
        1
        + len(settings.sigmas)
        + len(settings.corruptions) * len(settings.severities)
        + a_level * len(settings.epsilons)
        + ("pgd" in settings.attacks)
    )


def result_key(result: Result) -> tuple[Any, ...]:
    """What a result is of: the same for two results that were measured alike."""
    parameters = tuple(sorted(result["parameters"].items()))
    return result["disturbance"], parameters, result["seed"], result.get("metric"), result["samples"], result["unit"]


def gaussian_noise(images: torch.Tensor, sigma: float, seed: int = 0) -> torch.Tensor:
    """Add white Gaussian noise of standard deviation ``sigma``, the same for the same seed, and clip to [0, 1]."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    return (images + sigma * noise).clamp(0, 1)


def corrupted(
    images: torch.Tensor, name: str, severity: int, table: str, settings: ImageSettings, start: int = 0
) -> torch.Tensor:
    """Images after a corruption, float32 in [0, 1] with 256 grey levels.

    Args:
        images: ``[images, channels, height, width]`` in [0, 1]; rounded to 8 bits first, as files hold them.
        name: of the corruption.
        severity: 1 to 5.
        table: of the settings.
        settings: for the seed and the photographs of frost.
        start: number of the first image.
    """
    import numpy as np

    from .corruptions import corrupt

    pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
    options: dict[str, Any] = {"seed": settings.seed, "frost_pictures": settings.frost_pictures}
    found = [corrupt(image, name, severity, table, index=start + i, **options) for i, image in enumerate(pixels)]
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).float() / 255


def _require_packages(settings: ImageSettings) -> None:
    if settings.corruptions or "autoattack" in settings.attacks:
        require_extras("robustness")
    if "frost" in settings.corruptions:  # before anything is measured
        from .corruptions import frost_photographs

        frost_photographs(settings.frost_pictures)


def _jobs(
    classifier: PixelClassifier,
    images: torch.Tensor,
    labels: torch.Tensor,
    settings: ImageSettings,
    table: str,
    results: list[Result],
) -> Iterator[_Job]:
    """Every measurement, in order; ``results`` grows between two of them, and later ones read it."""
    seen = partial(_seen_correctly, classifier, images, labels, settings.batch_size)
    yield _Job(_about("clean", "clean", None), len(images), partial(seen, lambda part, start: part))
    noise = partial(_about, "noise", "Gaussian noise", settings.seed)
    for sigma in settings.sigmas:
        noisy = gaussian_noise(images, sigma, settings.seed)
        pick = partial(_rows, noisy)
        yield _Job(noise(sigma=sigma), len(images), partial(seen, pick))
    for name in settings.corruptions:
        about = partial(_about, "corruption", name.replace("_", " "), settings.seed, table=TABLES[table])
        for severity in settings.severities:
            disturb = partial(_corrupt_rows, (name, severity, table), settings)
            yield _Job(about(severity=severity), len(images), partial(seen, disturb))
    if settings.attacks:
        count = settings.attack_samples or len(images)
        yield from _attack_jobs((classifier, images[:count], labels[:count]), settings, results)


def _attack_jobs(subject: _Attacked, settings: ImageSettings, results: list[Result]) -> Iterator[_Job]:
    def job(name: str, epsilon: float) -> _Job:
        seed = None if name in ("fgsm", "worst case") else settings.seed
        about = _about("attack", ATTACKS.get(name, name), seed, epsilon=epsilon)
        return _Job(about, len(subject[1]), partial(_withstood, name, subject, epsilon, settings, results))

    for epsilon in settings.epsilons:
        # AutoAttack last: it also counts what PGD fooled.
        for name in sorted(settings.attacks, key="autoattack".__eq__):
            yield job(name, epsilon)
        if len(settings.attacks) > 1:
            yield job("worst case", epsilon)
    if "pgd" in settings.attacks and 1.0 not in settings.epsilons:
        yield job("pgd", 1.0)


def _about(family: str, name: str, seed: int | None, **parameters: Any) -> Result:
    return {"family": family, "disturbance": name, "parameters": parameters, "seed": seed}


def _seen_correctly(
    classifier: PixelClassifier,
    images: torch.Tensor,
    labels: torch.Tensor,
    batch_size: int,
    disturb: Callable[[torch.Tensor, int], torch.Tensor],
) -> tuple[torch.Tensor, Result]:
    """Disturb and classify a batch at a time; ``disturb`` gets some images and the number of their first."""
    found = []
    for start in range(0, len(images), batch_size):
        rows = slice(start, start + batch_size)
        found.append(correctness(classifier, disturb(images[rows], start), labels[rows], batch_size))
    return torch.cat(found), {}


def _rows(of: torch.Tensor, images: torch.Tensor, start: int) -> torch.Tensor:
    return of[start : start + len(images)]


def _corrupt_rows(
    what: tuple[str, int, str], settings: ImageSettings, images: torch.Tensor, start: int
) -> torch.Tensor:
    return corrupted(images, *what, settings, start)


def _withstood(
    name: str, subject: _Attacked, epsilon: float, settings: ImageSettings, results: list[Result]
) -> tuple[torch.Tensor, Result]:
    """Which images are classified correctly whatever an attack does, and what else is to be said of it."""
    size, seed = settings.batch_size, settings.seed
    if name == "worst case":
        return _all_withstood(results, epsilon), {}
    if name == "fgsm":
        return fgsm_withstood(*subject, epsilon, size), {}
    if name == "pgd":
        steps, restarts = settings.steps, settings.restarts
        return pgd_withstood(*subject, epsilon, size, steps=steps, restarts=restarts, seed=seed), {}
    if name == "spsa":
        steps, samples = settings.spsa_steps, settings.spsa_samples
        return spsa_withstood(*subject, epsilon, size, steps=steps, samples=samples, seed=seed), {}
    from .ensemble import auto_attack_withstood

    standing, fooled = auto_attack_withstood(*subject, epsilon, settings)
    details: Result = {"alone": standing.float().mean().item(), "fooled_by": fooled}
    for result in results:
        if result["disturbance"] == "PGD" and result["parameters"] == {"epsilon": epsilon}:
            standing = standing & unpack_bits(result["correct"], result["samples"])
            details["counted_with"] = ["PGD"]
    return standing, details


def _all_withstood(results: list[Result], epsilon: float) -> torch.Tensor:
    """Which images withstood every attack with this epsilon."""
    found = [
        unpack_bits(result["correct"], result["samples"])
        for result in results
        if result["family"] == "attack" and result["parameters"] == {"epsilon": epsilon}
    ]
    return torch.stack(found).all(0)
