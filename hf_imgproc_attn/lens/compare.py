"""One look at several checkpoints: the same input, one report each, and the files of the command."""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from ..errors import UsageError, plain_message
from ..output_paths import write_or_keep
from .figures import draw_all, write_pictures
from .inputs import Shown, load_model, show
from .options import LensOptions
from .page import page
from .report import Report, cell, seconds_in_words
from .run import inspect_model
from .same_input import Asked, Seen, common_length, shown_to


def look(options: argparse.Namespace) -> list[Report]:
    """A report of each checkpoint that the command names.

    Raises:
        UsageError: for what the command line asks and cannot be done.
    """
    try:
        chosen = LensOptions(
            stack=options.stack,
            spectra=options.spectra,
            noise=options.noise,
            seed=options.seed,
            token=options.token,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    if options.beside < 0:
        raise UsageError(f"beside must be an integer >= 0, got {options.beside}")
    names = own_names(options.models)
    length = common_length(options.models, options.length)
    asked = Asked(options.input, options.data, options.samples, length, options.seed, options.beside)
    reports: list[Report] = []
    seen: list[Seen] = []
    for checkpoint, name in zip(options.models, names, strict=True):
        model = load_model(checkpoint)
        shown = shown_to(model, checkpoint, name, asked, seen)
        reports.append(inspected(model, checkpoint, name, shown, chosen))
    return reports


def look_at(folder: str, *, name: str, data: str, options: LensOptions) -> Report:
    """A report of one checkpoint under a name."""
    model = load_model(folder)
    return inspected(model, folder, name, show(model, folder, data=data), options)


def inspected(model: nn.Module, checkpoint: str, name: str, shown: Shown, options: LensOptions) -> Report:
    """A report of a model on what it is shown; ``checkpoint`` is named where that fails.

    Raises:
        UsageError: for what the lens refuses.
    """
    try:
        report = inspect_model(
            model, shown.inputs, name=name, data=shown.described, labels=shown.labels, options=options
        )
    except ValueError as error:
        raise UsageError(f"MODEL {checkpoint!r}: {plain_message(error)}") from error
    report.notes += shown.notes
    return report


def short_name(name: str) -> str:
    """The last part of a path, or the two of a Hub name."""
    return own_names([name])[0]


def own_names(checkpoints: Sequence[str]) -> list[str]:
    """Names of checkpoints in reports: ends of their paths, as long as it takes to tell them apart.

    Args:
        checkpoints: folders and Hub names; no two of them are the same.
    """
    whole = [Path(os.path.abspath(name)).parts if os.path.exists(name) else Path(name).parts for name in checkpoints]
    given = [Path(name) for name in checkpoints]
    kept = [2 if len(path.parts) == 2 and not path.is_absolute() else 1 for path in given]
    while True:
        # Also in lower case, which some disks do not tell apart.
        names = [str(Path(*parts[-count:])) for parts, count in zip(whole, kept, strict=True)]
        times = Counter(name.lower() for name in names)
        longer = [
            times[name.lower()] > 1 and count < len(parts)
            for name, count, parts in zip(names, kept, whole, strict=True)
        ]
        if not any(longer):
            return names
        kept = [count + more for count, more in zip(kept, longer, strict=True)]


def refuse_the_same(checkpoints: Sequence[str]) -> None:
    """Refuse a checkpoint that is named twice, however it is written.

    Raises:
        UsageError: names both.
    """
    found: dict[str, str] = {}
    for name in checkpoints:
        place = os.path.realpath(name) if os.path.exists(name) else name.rstrip("/")
        if place in found:
            raise UsageError(f"MODEL must name each checkpoint once, got {found[place]!r} and {name!r}")
        found[place] = name


def write(reports: list[Report], folder: Path) -> None:
    """Write JSON, Markdown, pictures and page into a folder."""
    write_or_keep(folder, lambda place: _write(reports, place))


def _write(reports: list[Report], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps([report.to_dict() for report in reports], indent=1, allow_nan=False)
    (folder / "lens.json").write_text(text + "\n", encoding="utf-8")
    (folder / "lens.md").write_text("\n".join(report.to_markdown() for report in reports), encoding="utf-8")
    pictures = draw_all(reports)
    write_pictures(pictures, folder)
    (folder / "lens.html").write_text(page(reports, pictures), encoding="utf-8")


def summary(reports: list[Report]) -> str:
    """A few lines on each model."""
    lines = []
    for report in reports:
        first, last = report.layers[0], report.layers[-1]
        ends = [layer.tokens.get("leaving") or layer.tokens["filtered"] for layer in (first, last)]
        lines.append(
            f"{report.model}: {len(report.layers)} layers, {report.samples} x {report.length} tokens ({report.data})\n"
            f"  entropy / uniform {cell(min(report.mean('entropy_share')))} to "
            f"{cell(max(report.mean('entropy_share')))}"
            f", weight on sinks up to {cell(max(report.mean('sink_weight')))}\n"
            f"  similarity of tokens {cell(ends[0].similarity)} after the first block, {cell(ends[1].similarity)} "
            "after the last\n"
            f"  time: {seconds_in_words(report)}"
        )
        lines += [f"  note: {note}" for note in report.notes]
        lines += [f"  not measured: {reason}" for reason in report.skipped]
    return "\n".join(lines)
