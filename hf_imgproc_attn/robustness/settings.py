"""What is measured: plain data and its checks, without torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from ..errors import UsageError, did_you_mean
from .severities import CORRUPTIONS, SEVERITIES, TABLES, check_corruption, check_severity

ATTACKS = {
    "fgsm": "FGSM",
    "pgd": "PGD",
    "spsa": "SPSA",
    "autoattack": "AutoAttack",
}
"""The attacks on images, and their names in results."""
TEXT_CHANGES = {"word_swap": "word swap", "deletion": "word deletion", "typo": "typos"}
"""What is done to texts, and its names in results."""
STANDARD_CORRUPTIONS = tuple(name for name, corruption in CORRUPTIONS.items() if not corruption.is_extra)
"""The 15 corruptions of the mean corruption error."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageSettings:
    """What is done to images.

    Attributes:
        corruptions: names of corruptions (:data:`.severities.CORRUPTIONS`).
        severities: 1 to 5.
        table: ``cifar10-c`` or ``imagenet-c``, the published settings that the severities mean; None: by the size of
            the images, up to 96 pixels the former.
        frost_pictures: folder with the photographs that the corruption ``frost`` needs.
        sigmas: standard deviations of white Gaussian noise, pixels in [0, 1], beside the corruptions.
        attacks: ``fgsm``, ``pgd``, ``spsa``, ``autoattack``.
        epsilons: largest changes of a pixel in [0, 1] by the attacks, as 8/255.
        attack_samples: attack only the first so many images; None: all.
        steps: of PGD.
        restarts: of PGD, each from another random start.
        spsa_steps: of SPSA.
        spsa_samples: random directions, two evaluations each, that SPSA estimates a gradient from.
        autoattack_steps: of each APGD and FAB in AutoAttack; the published number is 100.
        autoattack_targets: classes that the targeted APGD and FAB try; the published number is 9.
        square_queries: evaluations that the Square attack may make an image; the published number is 5,000.
        batch_size: images at once.
        seed: of everything random.

    Raises:
        UsageError: for a value outside its range, naming it.
    """

    corruptions: Sequence[str] = ()
    severities: Sequence[int] = SEVERITIES
    table: str | None = None
    frost_pictures: str | None = None
    sigmas: Sequence[float] = ()
    attacks: Sequence[str] = ()
    epsilons: Sequence[float] = (2 / 255, 4 / 255, 8 / 255)
    attack_samples: int | None = None
    steps: int = 20
    restarts: int = 2
    spsa_steps: int = 20
    spsa_samples: int = 64
    autoattack_steps: int = 100
    autoattack_targets: int = 9
    square_queries: int = 5000
    batch_size: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        for name in self.corruptions:
            check_corruption(name)
        for severity in self.severities:
            check_severity(severity)
        if self.table is not None and self.table not in TABLES:
            raise UsageError(f"table must be one of {', '.join(TABLES)}, got {self.table!r}")
        check_names("attacks", self.attacks, ATTACKS)
        check_fractions("sigmas", self.sigmas)
        check_fractions("epsilons", self.epsilons, "; pixels are in [0, 1]: eight grey levels are 8/255")
        for name in ("corruptions", "severities", "sigmas", "attacks", "epsilons"):
            check_distinct(name, getattr(self, name))
        if self.corruptions and not self.severities:
            raise UsageError("severities must name one at least, got none")
        if self.attacks and not self.epsilons:
            raise UsageError("epsilons must name one at least, got none")
        least_one = ("steps", "restarts", "spsa_steps", "spsa_samples", "autoattack_steps", "autoattack_targets")
        for name in (*least_one, "square_queries", "batch_size", "attack_samples"):
            check_integer(name, getattr(self, name), 1)
        check_integer("seed", self.seed, 0)
        if "frost" in self.corruptions and self.frost_pictures is None:
            raise UsageError("frost needs frost_pictures, the folder of its photographs, got none")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextSettings:
    """What is done to texts.

    Attributes:
        changes: ``word_swap``, ``deletion``, ``typo``.
        fractions: parts of the words that are changed.
        batch_size: blocks or texts at once.
        seed: of the choice of words and letters.

    Raises:
        UsageError: for a value outside its range, naming it.
    """

    changes: Sequence[str] = tuple(TEXT_CHANGES)
    fractions: Sequence[float] = (0.015, 0.025, 0.05)
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        check_names("changes", self.changes, TEXT_CHANGES)
        check_fractions("fractions", self.fractions)
        for name in ("changes", "fractions"):
            check_distinct(name, getattr(self, name))
        check_integer("batch_size", self.batch_size, 1)
        check_integer("seed", self.seed, 0)


def check_names(field: str, names: Sequence[str], known: dict[str, str]) -> None:
    """Refuse a name that there is not.

    Raises:
        UsageError: naming field and name.
    """
    for name in names:
        if name not in known:
            hint = did_you_mean(name, known)
            raise UsageError(f"{field} must be names among {', '.join(known)}, got {name!r}{hint}")


def check_fractions(field: str, values: Sequence[float], hint: str = "") -> None:
    """Refuse what is no number above 0 and up to 1.

    Raises:
        UsageError: naming field and value.
    """
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
            raise UsageError(f"{field} must be > 0 and <= 1, got {value!r}{hint}")


def check_distinct(field: str, values: Sequence[Any]) -> None:
    """Refuse a value that is there twice.

    Raises:
        UsageError: naming field and values.
    """
    if len(set(values)) < len(values):
        raise UsageError(f"{field} must name every value once, got {' '.join(map(str, values))}")


def check_integer(field: str, value: object, least: int) -> None:
    """Refuse what is no integer of a least size; None, where a field allows it, is one.

    Raises:
        UsageError: naming field and value.
    """
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
        raise UsageError(f"{field} must be an integer >= {least}, got {value!r}")


def as_plain(settings: ImageSettings | TextSettings) -> dict[str, Any]:
    """The settings as JSON holds them."""
    values = dataclasses.asdict(settings)
    return {name: list(value) if isinstance(value, list | tuple) else value for name, value in values.items()}


def in_grey_levels(epsilon: float) -> str:
    """An epsilon as people write it, ``8/255`` where it is a whole number of grey levels, 1 where it is no bound."""
    if epsilon == 1:
        return "1 (no bound)"
    levels = epsilon * 255
    return f"{round(levels)}/255" if math.isclose(levels, round(levels), rel_tol=1e-6) else f"{epsilon:g}"
