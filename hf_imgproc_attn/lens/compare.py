"""One look at several checkpoints: the same input, one report each, and the files of the command."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from torch import nn

from ..errors import UsageError, plain_message
from ..output_paths import write_or_keep
from .figures import draw_all
from .inputs import WRITTEN, Shown, load_model, show
from .options import LensOptions
from .page import page
from .report import Report, cell
from .run import inspect_model


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
    reports: list[Report] = []
    written: dict[int, Shown] = {}
    for name in options.models:
        model = load_model(name)
        # Texts that one model wrote are shown to all that have the same tokens.
        vocabulary = int(getattr(model.config.get_text_config(), "vocab_size", 0) or 0)  # type: ignore[union-attr, operator]
        shown = written.get(vocabulary)
        if shown is None or options.data not in ("auto", "own"):
            shown = show(
                model,
                name,
                files=options.input,
                data=options.data,
                samples=options.samples,
                length=options.length,
                seed=options.seed,
            )
        if shown.described == WRITTEN:
            written[vocabulary] = shown._replace(described=f"texts that {short_name(name)} wrote")
        reports.append(inspected(model, name, short_name(name), shown, chosen))
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
        return inspect_model(
            model, shown.inputs, name=name, data=shown.described, labels=shown.labels, options=options
        )
    except ValueError as error:
        raise UsageError(f"MODEL {checkpoint!r}: {plain_message(error)}") from error


def short_name(name: str) -> str:
    """The last part of a path, or the two of a Hub name."""
    parts = Path(name).parts
    return name if len(parts) < 3 and not Path(name).is_absolute() else parts[-1]


def write(reports: list[Report], folder: Path) -> None:
    """Write JSON, Markdown, pictures and page into a folder."""
    write_or_keep(folder, lambda place: _write(reports, place))


def _write(reports: list[Report], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps([report.to_dict() for report in reports], indent=1, allow_nan=False)
    (folder / "lens.json").write_text(text + "\n", encoding="utf-8")
    (folder / "lens.md").write_text("\n".join(report.to_markdown() for report in reports), encoding="utf-8")
    pictures = draw_all(reports)
    for panel, views in pictures.items():
        for view, picture in views.items():
            name = panel if len(views) == 1 else f"{panel}_{view}"
            file_name = re.sub(r"[^\w.-]+", "_", name)  # names of models may hold anything
            (folder / f"{file_name}.png").write_bytes(picture)
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
            "after the last"
        )
        lines += [f"  not measured: {reason}" for reason in report.skipped]
    return "\n".join(lines)
