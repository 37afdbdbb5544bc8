"""The pictures of a report: one figure a panel, several models side by side with shared axes."""

from __future__ import annotations

import io
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from .definitions import DEFINITIONS
from .map_figures import SEQUENTIAL, draw_maps, draw_removed
from .report import PLACES, LayerReport, Report

OKABE_ITO = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000", "#999999")
"""Colours that colour-blind people tell apart (Okabe, Ito 2008)."""
MARKERS = ("o", "s", "^", "D", "v")
HEAD_MEASURES = (
    "entropy_share",
    "position_bandwidth",
    "content_bandwidth",
    "sink_weight",
    "sink_value_ratio",
    "method_noise",
)
SHOWN_SHARES = (
    "content-content",
    "position-position",
    "content-position",
    "position-content",
    "constant-content",
    "constant-position",
    "residual",
    "position kernel",
    "other",
)

Pictures = dict[str, dict[str, bytes]]
"""Panel -> view -> PNG."""


def draw_all(reports: list[Report]) -> Pictures:
    """Every panel that there is something to show in."""
    heads = [head for report in reports for layer in report.layers for head in layer.heads]
    has = {
        "heads": True,
        "smoothing": True,
        "noise": any(layer.noise for report in reports for layer in report.layers),
        "kernels": any(head.shares or head.exact_shares for head in heads),
        "spectra": any(head.filter_spectrum for head in heads),
    }
    pictures: Pictures = {panel: {"all": draw_panel(panel, reports)} for panel in DRAWINGS if has[panel]}
    for panel, draw in (("maps", draw_maps), ("removed", draw_removed)):
        views: dict[str, bytes] = {}
        for report in reports:
            for layer in report.layers:
                figure = draw(report, layer)
                if figure is not None:
                    views[view_name(report, layer, len(reports))] = _png(figure)
        if views:
            pictures[panel] = views
    return pictures


def view_name(report: Report, layer: LayerReport, reports: int) -> str:
    """How a picture of one layer is called among those of some reports."""
    return f"{report.model} layer {layer.index}" if reports > 1 else f"layer {layer.index}"


def write_pictures(pictures: Pictures, folder: Path) -> list[Path]:
    """Write a PNG for each picture, and return the files: the panel's name, and that of the view where it has several.

    Names of models may hold anything, and some disks do not tell capitals apart: no two files have one name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    taken: Counter[str] = Counter()
    files = []
    for panel, views in pictures.items():
        for view, picture in views.items():
            name = re.sub(r"[^\w.-]+", "_", panel if len(views) == 1 else f"{panel}_{view}")
            taken[name.lower()] += 1
            number = taken[name.lower()]
            files.append(folder / f"{name}{f'_{number}' if number > 1 else ''}.png")
            files[-1].write_bytes(picture)
    return files


def draw_panel(panel: str, reports: list[Report]) -> bytes:
    """One of :data:`DRAWINGS` as PNG."""
    return _png(DRAWINGS[panel](reports))


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    # Without the version of matplotlib in it, so that the same numbers give the same file.
    figure.savefig(buffer, format="png", dpi=100, metadata={"Software": None})
    return buffer.getvalue()


def _figure(rows: int, columns: int, width: float, height: float, **options: Any) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def _depth(axes: Any, report: Report) -> None:
    """Name a vertical axis of layers or a horizontal one."""
    axes.set_xlabel("layer")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_title(report.model, fontsize=9)


# --------------------------------------------------------------------------------------------------------------------
# Heads
# --------------------------------------------------------------------------------------------------------------------


def _heads(reports: list[Report]) -> Figure:
    """Layers x heads, a picture a measure, two rows a model; a measure has the same colours in every model."""
    columns = -(-len(HEAD_MEASURES) // 2)
    figure, grid = _figure(2 * len(reports), columns, 3.7, 2.4)
    for number, name in enumerate(HEAD_MEASURES):
        tables = [_table(report, name) for report in reports]
        values = np.concatenate([table[np.isfinite(table)] for table in tables])
        limits = (values.min(), values.max()) if len(values) else (0.0, 1.0)
        for row, (table, report) in enumerate(zip(tables, reports, strict=True)):
            axes = grid[2 * row + number // columns, number % columns]
            image = axes.imshow(table, cmap=SEQUENTIAL, vmin=limits[0], vmax=limits[1], aspect="auto")
            axes.set_title(f"{DEFINITIONS[name].title}\n{report.model}", fontsize=9)
            axes.set_xlabel("head")
            axes.set_ylabel("layer")
            axes.set_yticks(range(len(report.layers)), [str(layer.index) for layer in report.layers], fontsize=7)
            figure.colorbar(image, ax=axes, shrink=0.9)
    return figure


def _table(report: Report, name: str) -> Any:
    heads = max(len(layer.heads) for layer in report.layers)
    table = np.full((len(report.layers), heads), np.nan)
    for row, layer in enumerate(report.layers):
        table[row, : len(layer.heads)] = [getattr(head, name) for head in layer.heads]
    return table


# --------------------------------------------------------------------------------------------------------------------
# By depth
# --------------------------------------------------------------------------------------------------------------------


def _smoothing(reports: list[Report]) -> Figure:
    """A model a row, a measure a column with one scale."""
    names = ("similarity", "high_frequency", "stable_rank")
    figure, grid = _figure(len(reports), len(names), 3.9, 3.0, sharey="col")
    for row, report in zip(grid, reports, strict=True):
        for axes, name in zip(row, names, strict=True):
            for number, place in enumerate(PLACES):
                points = [
                    (layer.index, getattr(layer.tokens[place], name))
                    for layer in report.layers
                    if place in layer.tokens
                ]
                _line(axes, points, number, DEFINITIONS[place].title)
            _depth(axes, report)
            axes.set_ylabel(DEFINITIONS[name].title)
    grid[0, 0].legend(fontsize=7)
    return figure


def _line(axes: Any, points: Sequence[tuple[float, float]], number: int, label: str) -> None:
    if points:
        x, y = zip(*points, strict=True)
        axes.plot(x, y, color=OKABE_ITO[number], marker=MARKERS[number % len(MARKERS)], markersize=4, label=label)
        axes.grid(alpha=0.25)


STEPS = {
    "filter: p(A) V over V": ("values", "filtered"),
    "attention with its residual": ("entering", "after_residual"),
    "whole block": ("entering", "leaving"),
}
"""Parts of a block whose gain is drawn: from where to where."""


def _noise(reports: list[Report]) -> Figure:
    """A model a row: the ratio at each place, and what parts of a block gain."""
    figure, grid = _figure(len(reports), 2, 5.6, 3.4, sharey="col")
    for (axes, gains), report in zip(grid, reports, strict=True):
        for number, place in enumerate(PLACES):
            points = [(layer.index, layer.noise[place]) for layer in report.layers if place in layer.noise]
            _line(axes, [point for point in points if math.isfinite(point[1])], number, DEFINITIONS[place].title)
        for number, (label, (before, after)) in zip((1, 2, 4), STEPS.items(), strict=True):
            points = [
                (layer.index, layer.noise[after] - layer.noise[before])
                for layer in report.layers
                if before in layer.noise and after in layer.noise
            ]
            _line(gains, [point for point in points if math.isfinite(point[1])], number, label)
        promised = [(layer.index, layer.predicted_gain) for layer in report.layers if layer.predicted_gain is not None]
        if promised:
            gains.plot(*zip(*promised, strict=True), color="black", linestyle=":", label="proposition III.1")
        gains.axhline(0.0, color="grey", linewidth=0.8)
        axes.set_ylabel(f"{DEFINITIONS['noise'].title}, dB")
        gains.set_ylabel("gain, dB (above 0: removes noise)")
        for each in (axes, gains):
            _depth(each, report)
            if each.get_legend_handles_labels()[0]:
                each.legend(fontsize=7)
    # By what is measured alone: what is promised may be far beyond.
    measured = [0.0, *(gain for report in reports for gain in _gains(report) if math.isfinite(gain))]
    margin = 0.05 * (max(measured) - min(measured)) or 1.0
    grid[0, 1].set_ylim(min(measured) - margin, max(measured) + margin)
    return figure


def _gains(report: Report) -> list[float]:
    """Every gain that is drawn, in decibels."""
    return [
        layer.noise[after] - layer.noise[before]
        for layer in report.layers
        for before, after in STEPS.values()
        if before in layer.noise and after in layer.noise
    ]


def _kernels(reports: list[Report]) -> Figure:
    """Stacked shares by layer, mean over heads; the exact ones of the first layer stand left of the others."""
    columns = min(len(reports), 2)
    figure, grid = _figure(-(-len(reports) // columns), columns, 6.0, 3.4, sharey=True)
    named: dict[str, Any] = {}
    for axes in grid.flat[len(reports) :]:
        axes.set_visible(False)
    for axes, report in zip(grid.flat, reports, strict=False):
        bars = [
            (f"{layer.index}{mark}", {name: _mean(held, name) for name in held[0]})
            for layer in report.layers
            for kind, mark in (("exact_shares", "\nexact"), ("shares", ""))
            if (held := [getattr(head, kind) for head in layer.heads]) and held[0]
        ]
        above, below = np.zeros(len(bars)), np.zeros(len(bars))
        for number, name in enumerate(SHOWN_SHARES):
            values = np.array([shares.get(name, 0.0) for _, shares in bars])
            start = np.where(values >= 0, above, below)
            if np.abs(values).max(initial=0.0) > 1e-3:
                named[name] = axes.bar(range(len(bars)), values, bottom=start, color=OKABE_ITO[number], width=0.8)
            above, below = above + values.clip(min=0), below + values.clip(max=0)
        axes.axhline(0.0, color="black", linewidth=0.8)
        axes.set_xticks(range(len(bars)), [label for label, _ in bars], fontsize=7)
        _depth_title(axes, report)
    for axes in grid[:, 0]:
        axes.set_ylabel(DEFINITIONS["shares"].title)
    figure.legend(list(named.values()), list(named), loc="outside lower center", ncols=4, fontsize=7)
    return figure


def _depth_title(axes: Any, report: Report) -> None:
    axes.set_xlabel("layer")
    axes.set_title(report.model, fontsize=9)


def _mean(held: list[dict[str, float]], name: str) -> float:
    return sum(each[name] for each in held) / len(held)


# --------------------------------------------------------------------------------------------------------------------
# Spectra
# --------------------------------------------------------------------------------------------------------------------


SPECTRAL_MEASURES = ("radius", "gain", "effective_rank")
"""Of spectra: drawn by depth."""


def _spectra(reports: list[Report]) -> Figure:
    """Eigenvalues of some layers in the complex plane, and radius and gain by depth below."""
    shown = [_some_layers(report) for report in reports]
    columns = max(len(SPECTRAL_MEASURES), *map(len, shown))
    figure, grid = _figure(2 * len(reports), columns, 3.2, 3.0)
    for number, report in enumerate(reports):
        for axes, layer in zip(grid[2 * number], shown[number], strict=False):
            _complex_plane(axes, report, layer)
        for axes in grid[2 * number][len(shown[number]) :]:
            axes.set_visible(False)
        below = grid[2 * number + 1]
        for axes, name in zip(below, SPECTRAL_MEASURES, strict=False):
            _spectral_depth(axes, report, name)
        for axes in below[3:]:
            axes.set_visible(False)
    for column in grid[1::2].T[:3]:
        limits = [axes.get_ylim() for axes in column]
        for axes in column:
            axes.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
    return figure


def _some_layers(report: Report) -> list[LayerReport]:
    """First, middle and last, and the first with a booster."""
    chosen = {0, len(report.layers) // 2, len(report.layers) - 1}
    boosted = [i for i, layer in enumerate(report.layers) if any(_is_boosted(head) for head in layer.heads)]
    return [report.layers[i] for i in sorted(chosen | set(boosted[:1]) | set(boosted[-1:]))][:4]


def _is_boosted(head: Any) -> bool:
    return head.operator_spectrum is not None and head.operator_spectrum != head.filter_spectrum


def _complex_plane(axes: Any, report: Report, layer: LayerReport) -> None:
    angles = np.linspace(0, 2 * np.pi, 200)
    axes.plot(np.cos(angles), np.sin(angles), color="grey", linewidth=0.8)
    boosted = [head.operator_spectrum for head in layer.heads if _is_boosted(head)]
    plain = [head.filter_spectrum for head in layer.heads]
    for spectra, colour, marker, label in ((boosted, OKABE_ITO[1], "x", "p(A)"), (plain, OKABE_ITO[0], ".", "A")):
        points = [np.array(found.eigenvalues) for found in spectra if found is not None]
        if points:
            x, y = np.concatenate(points).T
            axes.scatter(x, y, s=7, color=colour, marker=marker, linewidths=0.6, label=label)
    axes.set_aspect("equal", adjustable="datalim")
    axes.set_title(f"{report.model}\neigenvalues, layer {layer.index}", fontsize=8)
    axes.legend(fontsize=7, loc="upper left")


def _spectral_depth(axes: Any, report: Report, name: str) -> None:
    for kind, label, number in (("filter_spectrum", "A", 0), ("operator_spectrum", "p(A)", 1)):
        for layer in report.layers:
            found = [getattr(head, kind) for head in layer.heads]
            values = [value for each in found if each is not None and (value := getattr(each, name)) is not None]
            if kind == "operator_spectrum" and not any(_is_boosted(head) for head in layer.heads):
                continue
            first = label if layer is report.layers[0] or label not in axes.get_legend_handles_labels()[1] else None
            places = [layer.index + 0.15 * number] * len(values)
            axes.scatter(places, values, s=9, color=OKABE_ITO[number], marker=MARKERS[number], label=first, alpha=0.7)
    if name != "effective_rank":
        axes.axhline(1.0, color="grey", linewidth=0.8)
    axes.set_ylabel(DEFINITIONS[name].title)
    axes.set_xlabel("layer (a dot a head)")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=7)


DRAWINGS: dict[str, Callable[[list[Report]], Figure]] = {
    "heads": _heads,
    "smoothing": _smoothing,
    "noise": _noise,
    "kernels": _kernels,
    "spectra": _spectra,
}
"""Panels of all models and layers together."""
