"""The plot of a study: for every condition the differences of the variants from the baseline, which is zero."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..cards.results import PARTS
from ..output_paths import write_or_keep
from .plan import Study
from .statistics import BETTER, WORSE
from .table import Table

_COLOURS = {BETTER: "#1a7f37", WORSE: "#b3261e"}
_GREY = "#555555"
_ACROSS = 4


def draw(study: Study, tables: Sequence[Table], path: Path) -> None:
    """Draw mean paired differences (points), those of every seed (ticks) and t intervals, a panel a condition.

    Args:
        study: of the tables.
        tables: from :func:`.table.build_tables`; of corruptions only what all come to is drawn.
        path: a PNG file; replaced.
    """
    import matplotlib

    matplotlib.use("Agg", force=False)
    import matplotlib.pyplot as plt

    tables = [table for table in tables if table.family != "corruption"]
    across = min(_ACROSS, len(tables))
    down = -(-len(tables) // across)
    names = [name for name in study.variant_names if name != study.baseline]
    height = 1.1 + 0.27 * len(names)
    figure, axes = plt.subplots(
        down, across, figsize=(2.2 + 2.9 * across, height * down), squeeze=False, sharey=True, layout="constrained"
    )
    for index, axis in enumerate(axes.flat):
        if index >= len(tables):
            axis.set_visible(False)
            continue
        table = tables[index]
        percent = 100 if table.metric in PARTS else 1
        axis.axvline(0, color=_GREY, linewidth=0.8, linestyle=":")
        for place, name in enumerate(names):
            row = next(row for row in table.rows if row.variant == name)
            if row.difference is None:
                continue
            summary = row.difference.summary
            colour = _COLOURS.get(row.verdict.partition(",")[0], _GREY)
            low, high = summary.t_interval.low, summary.t_interval.high
            if low is not None and high is not None:
                axis.plot([percent * low, percent * high], [place, place], color=colour, linewidth=1.4)
            seeds = [percent * value for value in summary.values]
            axis.plot(seeds, [place] * len(seeds), "|", color=colour, markersize=6, alpha=0.5)
            axis.plot(percent * summary.mean, place, "o", color=colour, markersize=4.5)
        axis.set_ylim(len(names) - 0.4, -0.6)  # the first variant on top
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.tick_params(axis="x", labelsize=8)
        axis.set_title(f"{table.task}: {table.condition}", fontsize=9)
        unit = "points" if percent == 100 else table.metric.replace("_", " ")
        axis.set_xlabel(f"difference from {study.baseline} ({unit})", fontsize=8)
    write_or_keep(path, lambda file: figure.savefig(file, dpi=150, format="png"), "the plot")
    plt.close(figure)
