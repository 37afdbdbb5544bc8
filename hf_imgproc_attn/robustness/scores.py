"""What many results come to: mean corruption errors, and signs that an attack was weak rather than a model robust."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

from .settings import STANDARD_CORRUPTIONS, in_grey_levels

Result = dict[str, Any]

MASKING_SHARE = 0.01
"""More than this part of the images must speak for masking before it is said."""


def mean_errors(results: Iterable[Result]) -> Result:
    """Errors of a model under corruption.

    Returns:
        ``clean`` error; ``by_corruption``: name -> mean error over the severities measured; ``mean``: the mean of
        these over the published 15 as far as measured, ``counted``: their names. All in [0, 1].
    """
    clean, errors = _errors(results)
    by_corruption = {name: sum(values.values()) / len(values) for name, values in errors.items()}
    counted = [name for name in by_corruption if name in STANDARD_CORRUPTIONS]
    mean = sum(by_corruption[name] for name in counted) / len(counted) if counted else None
    return {"clean": clean, "by_corruption": by_corruption, "mean": mean, "counted": counted}


def mean_corruption_error(results: Iterable[Result], baseline: Iterable[Result]) -> Result:
    """The mean corruption error and its relative form against a baseline, in percent (Hendrycks and Dietterich 2019).

    ``CE_c = Σ_s E_{s,c} / Σ_s E^b_{s,c}`` and ``relative CE_c = Σ_s (E_{s,c} - E_clean) / Σ_s (E^b_{s,c} -
    E^b_clean)``, and their means over the corruptions. Below 100 the model errs less under corruption than the
    baseline does.

    Args:
        results: of a model.
        baseline: of another one, on the same images with the same settings.

    Returns:
        ``mce`` and ``relative_mce``, ``by_corruption``, ``relative_by_corruption``, and ``counted``: the corruptions
        among the published 15 that both were measured with. None stands where the baseline makes no error, or loses
        nothing by the corruption: the ratio is then undefined, and so is the mean.
    """
    (clean, errors), (base_clean, base_errors) = _errors(results), _errors(baseline)
    counted = [
        name
        for name in errors
        if name in STANDARD_CORRUPTIONS and errors[name].keys() == base_errors.get(name, {}).keys()
    ]
    plain: dict[str, float | None] = {}
    relative: dict[str, float | None] = {}
    for name in counted:
        own, other = sum(errors[name].values()), sum(base_errors[name].values())
        count = len(errors[name])
        plain[name] = 100 * own / other if other > 0 else None
        lost, base_lost = own - count * clean, other - count * base_clean
        relative[name] = 100 * lost / base_lost if base_lost > 0 else None
    return {
        "mce": _mean(plain.values()),
        "relative_mce": _mean(relative.values()),
        "by_corruption": plain,
        "relative_by_corruption": relative,
        "counted": counted,
    }


def masking_signs(results: Iterable[Result], gradients: dict[str, int]) -> list[str]:
    """Signs that gradients are masked, in words; none means that none was seen, not that there is no masking.

    The signs of Athalye, Carlini and Wagner 2018 (arXiv 1802.00420) and of Carlini et al. 2019 (arXiv 1902.06705): no
    gradient, one step better than many, an attack without gradients better than one with them, accuracy that does not
    fall as ε grows, and images that an unbounded attack does not fool.

    Args:
        results: of the attacks.
        gradients: from :func:`.attacks.check_gradients`.
    """
    signs = []
    for name, meaning in (
        ("zero_margin", "the gradient of the logits is zero in every pixel"),
        ("zero_cross_entropy", "the gradient of the cross-entropy is zero in every pixel, which FGSM and PGD follow"),
    ):
        if gradients[name]:
            signs.append(f"for {gradients[name]} of {gradients['images']} images {meaning}")
    table: dict[str, dict[float, Result]] = {}
    for result in results:
        if result["family"] == "attack":
            table.setdefault(result["disturbance"], {})[result["parameters"]["epsilon"]] = result
    pgd = {epsilon: result["value"] for epsilon, result in table.get("PGD", {}).items()}
    for other, why in (("FGSM", "one step"), ("SPSA", "an attack without gradients")):
        for epsilon, result in table.get(other, {}).items():
            if epsilon in pgd and pgd[epsilon] - result["value"] > MASKING_SHARE:
                signs.append(f"{other}, {why}, fools more images than PGD does with ε = {in_grey_levels(epsilon)}")
    for epsilon, result in table.get("AutoAttack", {}).items():
        by_square = result.get("fooled_by", {}).get("Square", 0) / result["samples"]
        if by_square > MASKING_SHARE:
            signs.append(
                f"Square, an attack without gradients, fools another {100 * by_square:.1f} % of all images, which "
                f"withstood APGD and FAB with ε = {in_grey_levels(epsilon)}"
            )
    for name, by_epsilon in table.items():
        values = [by_epsilon[epsilon]["value"] for epsilon in sorted(by_epsilon)]
        if any(later - before > MASKING_SHARE for before, later in itertools.pairwise(values)):
            signs.append(f"accuracy under {name} grows with ε")
    if pgd.get(1.0, 0) > MASKING_SHARE:
        signs.append(f"PGD without a bound (ε = 1) leaves {100 * pgd[1.0]:.1f} % of the images right")
    return signs


def _errors(results: Iterable[Result]) -> tuple[float, dict[str, dict[int, float]]]:
    """The clean error, and corruption -> severity -> error."""
    clean, errors = float("nan"), dict[str, dict[int, float]]()
    for result in results:
        if result["family"] == "clean":
            clean = 1 - result["value"]
        elif result["family"] == "corruption":
            name = result["disturbance"].replace(" ", "_")
            errors.setdefault(name, {})[result["parameters"]["severity"]] = 1 - result["value"]
    return clean, errors


def _mean(values: Iterable[float | None]) -> float | None:
    found = list(values)
    known = [value for value in found if value is not None]
    return sum(known) / len(known) if known and len(known) == len(found) else None
