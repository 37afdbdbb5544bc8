"""What to measure, and how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..errors import did_you_mean

LISTED_LENGTH = 1024
"""Vectors and maps over tokens are kept in the report up to this length."""


@dataclass(frozen=True)
class LensOptions:
    """What to measure, and how.

    stack: which list of blocks, where a model has several.
    layers: which of its layers; None: all.
    spectra: ``"dense"`` (up to 1,024 tokens), ``"iterative"`` (the largest values also beyond) or ``"none"``.
    noise: standard deviation of the noise in the input, as a share of that of the input; 0: none is put in.
    seed: of the noise.
    token: whose maps are shown; None: one in the middle.
    place: of images: the patch at this place, as shares of width and height, in place of ``token``.
    num_special_tokens: of images: leading tokens that are no patches; None: what is left beside the grid.
    measures: ``"all"``, or ``"summary"``: heads and tokens only, without maps and without what logits are made of.
    """

    stack: str | None = None
    layers: tuple[int, ...] | None = None
    spectra: str = "dense"
    noise: float = 0.1
    seed: int = 0
    token: int | None = None
    place: tuple[float, float] | None = None
    num_special_tokens: int | None = None
    measures: str = "all"

    def __post_init__(self) -> None:
        if self.measures not in ("all", "summary"):
            raise ValueError(f"measures must be all or summary, got {self.measures!r}")
        if self.spectra not in ("dense", "iterative", "none"):
            raise ValueError(f"spectra must be dense, iterative or none, got {self.spectra!r}")
        if isinstance(self.noise, bool) or not isinstance(self.noise, (int, float)) or not 0 <= self.noise < 1e3:
            raise ValueError(
                f"noise must be a number >= 0 (a share of the input's standard deviation), got {self.noise!r}"
            )
        if self.layers is not None and (not isinstance(self.layers, (tuple, list, range)) or not len(self.layers)):
            raise ValueError(f"layers must be some numbers of layers, or None for all, got {self.layers!r}")
        place = self.place
        if place is not None and not (
            isinstance(place, (tuple, list)) and len(place) == 2 and all(_is_share(share) for share in place)
        ):
            raise ValueError(f"place must be two shares of width and height from 0 to 1, got {place!r}")
        for name in ("seed", "token", "num_special_tokens"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
                raise ValueError(f"{name} must be an integer >= 0, got {value!r}")


def lens_options(given: Mapping[str, Any]) -> LensOptions:
    """The options that were given by name.

    Raises:
        TypeError: for one that there is not.
        ValueError: as :class:`LensOptions`.
    """
    known = [field.name for field in fields(LensOptions)]
    for name in given:
        if name not in known:
            hint = did_you_mean(name, known)
            raise TypeError(f"unknown option of the lens {name!r}: it must be one of {', '.join(known)}{hint}")
    return LensOptions(**given)


def _is_share(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1
