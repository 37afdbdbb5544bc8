"""What a part of the check is, what a case is, and the table of parts. No torch: the runner must not need it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PACKAGE = __package__


@dataclass(frozen=True)
class Part:
    """A part of the check.

    Attributes:
        letter: what ``--parts`` calls it.
        title: in words.
        module: has ``cases(bench)``, the cases in order of value.
        share: of the time that is left when the part starts, in (0, 1]; what it does not use goes to those after it.
        workers: processes at a time, at most. More than one only where nothing is timed.
    """

    letter: str
    title: str
    module: str
    share: float
    workers: int = 1


PARTS = (
    Part("a", "Whole models against float64", f"{PACKAGE}.part_models", share=0.30, workers=6),
    Part("b", "Back-ends against float64", f"{PACKAGE}.part_backends", share=0.35, workers=6),
    Part("f", "Filters in other models, attacks and the lens", f"{PACKAGE}.part_any_model", share=0.20, workers=6),
    Part("c", "Times of one filter", f"{PACKAGE}.part_times", share=0.45),
    Part("d", "Training steps and decoding", f"{PACKAGE}.part_steps", share=0.50),
    Part("e", "A small training comparison", f"{PACKAGE}.part_training", share=1.0),
)
"""In order of value; a letter stays with its part, so that an earlier record can be gone on with."""


@dataclass(frozen=True)
class Bench:
    """What the cases of a part are given.

    Attributes:
        device: ``"cuda"`` or ``"cpu"``.
        data: the folder of part e's images, or None.
        earlier: values of the part's cases that were measured before, by name; grows as cases are measured.
    """

    device: str
    data: Path | None = None
    earlier: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def tiny(self) -> bool:
        """Whether this is a rehearsal, where sizes are tiny and times mean nothing."""
        return self.device == "cpu"


@dataclass(frozen=True)
class Case:
    """A case: measured on its own, in a process that may crash.

    Attributes:
        name: unique in its part, the same on every run.
        run: given the seconds that are left to the part, returns values that JSON can hold. May raise anything:
            :class:`Refused` and :class:`Wrong` are verdicts, all else is a failure.
        seconds: limit; after it the process is killed.
        about: what is measured, for those who read the record; it is there whatever the verdict.
    """

    name: str
    run: Callable[[float], dict[str, Any]]
    seconds: float = 45.0
    about: dict[str, Any] = field(default_factory=dict)


class Refused(Exception):
    """The case cannot be had here: a kernel that does not take the call, data that is not there. Not a failure."""


class Wrong(Exception):
    """A result that is not what it should be, with the values that were measured."""

    def __init__(self, message: str, values: dict[str, Any]) -> None:
        super().__init__(message)
        self.values = values


MEASURED, WRONG, REFUSED, FAILED, CRASHED, TOO_SLOW = "measured", "wrong", "refused", "failed", "crashed", "too slow"
STATUSES = (MEASURED, WRONG, REFUSED, FAILED, CRASHED, TOO_SLOW)
"""A case's verdicts: as it should be; measured and not as it should be; see :class:`Refused`; an exception; the
process ended (or lost its device) with it; it was killed at its limit."""
BAD = (WRONG, FAILED, CRASHED, TOO_SLOW)
"""What a developer has to look at."""
