"""What the app does for its visitor, without the browser: one look at one checkpoint, as a page and as numbers."""

from __future__ import annotations

import copy
import functools
import json
import shutil
import tempfile
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torch import nn

from ..errors import UsageError, plain_message
from ..markdown_tables import table_text
from ..models.any_fields import FilterFields
from ..models.any_filter import apply_filter
from ..models.spec_fields import PRESETS
from .compare import inspected, short_name
from .definitions import DEFINITIONS
from .figures import draw_all
from .inputs import Shown, load_model, show, with_company
from .options import LensOptions
from .page import page
from .report import Report, cell

AS_IT_IS = "as it is"
"""The choice of no preset."""
MOST_BESIDE = 31
KEPT_MODELS = 2
"""Checkpoints that stay in memory."""
KEPT_FOLDERS = 8
"""Answers whose files stay on the disk."""
_saved: deque[Path] = deque()


@dataclass(frozen=True)
class Question:
    """What a visitor asks.

    checkpoint: a folder or a Hub name.
    name: how it is called on the page; empty: by the end of that.
    preset: of ``apply_filter``, put into all layers and shown beside the checkpoint as it is; or :data:`AS_IT_IS`.
    text: a text, or token numbers as JSON; empty: real data that is there.
    image: a file; None: likewise.
    beside: further samples of real data, which let position and content be told apart.
    token: whose maps are shown; None: one in the middle.
    place: of an image, as shares of width and height, in place of ``token``.
    noise: in the input, as a share of its deviation.
    spectra: whether eigenvalues are computed.
    """

    checkpoint: str
    preset: str = AS_IT_IS
    text: str = ""
    image: str | None = None
    beside: int = 15
    token: int | None = None
    place: tuple[float, float] | None = None
    noise: float = 0.1
    spectra: bool = True
    name: str = ""

    def __post_init__(self) -> None:
        if not self.checkpoint.strip():
            raise UsageError("choose a checkpoint: a folder or a Hub name")
        if self.preset not in (AS_IT_IS, *usable_presets()):
            raise UsageError(f"preset must be one of {', '.join((AS_IT_IS, *usable_presets()))}, got {self.preset!r}")
        if isinstance(self.beside, bool) or not isinstance(self.beside, int) or not 0 <= self.beside <= MOST_BESIDE:
            raise UsageError(f"samples beside it must be an integer from 0 to {MOST_BESIDE}, got {self.beside!r}")
        if self.text.strip() and self.image:
            raise UsageError("give a text or an image, not both: a model takes one of them")


class Answer(NamedTuple):
    """The reports, a table of them in Markdown, and the page of the lens."""

    reports: list[Report]
    summary: str
    page: str


@functools.cache
def usable_presets() -> tuple[str, ...]:
    """Presets that can be put into the layers of another model."""
    usable = []
    for name in PRESETS:
        try:
            FilterFields.of(name, {})
        except ValueError:
            continue
        usable.append(name)
    return tuple(usable)


def answer(question: Question) -> Answer:
    """Look at a checkpoint, and beside it at the same with a preset's filters, on the same input.

    Raises:
        UsageError: for what cannot be loaded, shown or filtered, in one line.
    """
    name = question.checkpoint.strip()
    title = question.name or short_name(name)
    model = _loaded(name)
    shown = _shown(model, name, question)
    options = LensOptions(
        spectra="dense" if question.spectra else "none",
        noise=question.noise,
        token=question.token,
        place=question.place,
    )
    reports = [inspected(model, name, title, shown, options)]
    if question.preset != AS_IT_IS:
        filtered = copy.deepcopy(model)
        try:
            apply_filter(filtered, question.preset)
        except ValueError as error:
            raise UsageError(f"{question.preset} cannot be put into {name!r}: {plain_message(error)}") from error
        reports.append(inspected(filtered, name, f"{title} with {question.preset}", shown, options))
    return Answer(reports, summary(reports), page(reports, draw_all(reports)))


@functools.lru_cache(maxsize=KEPT_MODELS)
def _loaded(checkpoint: str) -> nn.Module:
    return load_model(checkpoint)


def _shown(model: nn.Module, name: str, question: Question) -> Shown:
    takes_images = getattr(model, "main_input_name", "") == "pixel_values"
    if takes_images and question.text.strip():
        raise UsageError(f"{name!r} takes images, got a text")
    if question.image and not takes_images:
        raise UsageError(f"{name!r} takes texts, got an image")
    given = question.text.strip() or None
    if not (given or question.image):
        return show(model, name, samples=question.beside + 1)
    shown = show(model, name, text=given, files=[question.image] if question.image else ())
    if question.image:
        shown = shown._replace(described="the given image")
    return with_company(model, name, shown, question.beside)


def summary(reports: list[Report]) -> str:
    """The first numbers of each report, as a Markdown table with a column a report, and what was not measured."""
    columns = [_first_numbers(report) for report in reports]
    rows = [[name, *(column[name] for column in columns)] for name in columns[0]]
    skipped = list(dict.fromkeys(reason for report in reports for reason in report.skipped))
    lines = [table_text(["", *(report.model for report in reports)], rows)]
    return "\n\n".join([*lines, *(f"Not measured: {reason}." for reason in skipped)])


def _first_numbers(report: Report) -> dict[str, str]:
    first, last = report.layers[0].tokens, report.layers[-1].tokens
    begin, end = first.get("entering", first["values"]), last.get("leaving", last["filtered"])
    spans = {name: report.mean(name) for name in ("entropy_share", "position_bandwidth", "sink_weight")}
    return {
        **{DEFINITIONS[name].title: f"{cell(min(span))} to {cell(max(span))}" for name, span in spans.items()},
        "similarity of tokens, entering the first layer → leaving the last": (
            f"{cell(begin.similarity)} → {cell(end.similarity)}"
        ),
    }


def save(found: Answer) -> list[str]:
    """The page and the numbers as files in a new folder, to be downloaded."""
    folder = Path(tempfile.mkdtemp(prefix="imgproc-lens-"))
    _saved.append(folder)
    if len(_saved) > KEPT_FOLDERS:
        shutil.rmtree(_saved.popleft(), ignore_errors=True)
    (folder / "lens.html").write_text(found.page, encoding="utf-8")
    numbers = json.dumps([report.to_dict() for report in found.reports], indent=1, allow_nan=False)
    (folder / "lens.json").write_text(numbers + "\n", encoding="utf-8")
    return [str(folder / "lens.html"), str(folder / "lens.json")]
