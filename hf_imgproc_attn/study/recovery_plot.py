"""The recovery curves of trained models that got a filter, a panel a record."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..output_paths import write_or_keep
from .recovery import CONTROL, title, unit
from .statistics import summarise

_COLOURS = ("#555555", "#0b6e99", "#b3261e", "#1a7f37", "#8a4fbf", "#b36b00")
_ACROSS = 2
_APART = 0.09
"""Variants stand beside each other, in places of the axis of steps."""


def draw(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw means over seeds (points) and their t intervals of 95 %, against the steps of training.

    The axis of steps has a place for each measurement, which are at 0, the last step, its half, quarter and so on.

    Args:
        records: of ``finetune_real.py``.
        path: a PNG file; replaced.
    """
    import matplotlib

    matplotlib.use("Agg", force=False)
    import matplotlib.pyplot as plt

    across = min(_ACROSS, len(records))
    down = -(-len(records) // across)
    figure, axes = plt.subplots(
        down, across, figsize=(0.6 + 4.3 * across, 0.5 + 3.4 * down), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(records) :]:
        axis.set_visible(False)
    names = list(dict.fromkeys((CONTROL, *(name for record in records for name in record["settings"]["variants"]))))
    for axis, record in zip(axes.flat, records, strict=False):
        _panel(axis, record, names)
    lines = {line.get_label(): line for axis in axes.flat for line in axis.get_lines() if line.get_label() in names}
    figure.legend(
        [lines[name] for name in names], names, loc="outside lower center", ncols=len(names), fontsize=8, frameon=False
    )
    write_or_keep(path, lambda file: figure.savefig(file, dpi=150, format="png"), "the plot")
    plt.close(figure)


def _panel(axis: Any, record: dict[str, Any], names: Sequence[str]) -> None:
    axis.axhline(0, color=_COLOURS[0], linewidth=0.8, linestyle=":")
    steps: list[float] = []
    for index, name in enumerate(names):
        if name not in record["curves"]:
            continue
        curves = list(record["curves"][name].values())
        steps = [step for step, _ in curves[0]]
        colour = _COLOURS[index % len(_COLOURS)]
        found = [summarise([curve[place][1] for curve in curves]) for place in range(len(steps))]
        places = [place + _APART * (index - (len(names) - 1) / 2) for place in range(len(steps))]
        for place, summary in zip(places, found, strict=True):
            ends = summary.t_interval
            if ends.low is not None and ends.high is not None:
                axis.plot([place, place], [ends.low, ends.high], color=colour, linewidth=1.2)
        means = [summary.mean for summary in found]
        axis.plot(places, means, "o-", color=colour, markersize=3.5, linewidth=0.6, label=name)
    axis.set_xticks(range(len(steps)), [f"{step:g}" for step in steps], fontsize=8)
    axis.tick_params(axis="y", labelsize=8)
    axis.set_title(title(record), fontsize=9)
    axis.set_xlabel("steps of training", fontsize=8)
    axis.set_ylabel(unit(record), fontsize=8)
