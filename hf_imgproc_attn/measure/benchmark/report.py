"""Tables, plot and the summary in ``docs/speed.md`` of a benchmark, all made of its JSON file."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import UsageError, require_extras
from ...markdown_tables import table_text
from ...output_paths import check_output_file, write_or_keep

FIT_FROM = 1024
"""Slopes are fitted to lengths from here on: below, fixed costs weigh."""
LEAST = {"milliseconds": 0.0, "peak_mib": 32.0}
"""Smaller values say nothing: pages that the process holds already do not count as new memory."""


class Goal(NamedTuple):
    """A ratio to plain attention, to the stock model or to batches without padding, on two CPU cores.

    Attributes:
        words: what is meant.
        case: of the row.
        method: of the row.
        limits: by direction.
    """

    words: str
    case: str
    method: str
    limits: dict[str, float]


_BOTH = "forward + backward"
_CAUSAL, _LONG = "causal (2, 12, 1024, 64) float32", "causal (1, 12, 4096, 64) float32"
_VIT, _WHOLE = "bidirectional (16, 12, 197, 64) float32", "bidirectional (2, 12, 1024, 64) float32"
_TRAINING = "GPT-2, one text of 1024 tokens"
_SHORT = ("causal (16, 4, 64, 64) float32", "bidirectional (16, 4, 64, 64) float32")
GOALS = (
    Goal("causal twicing, N = 1,024", _CAUSAL, "twicing, auto", {"forward": 1.50, _BOTH: 1.60}),
    Goal("causal twicing, N = 4,096", _LONG, "twicing, auto", {"forward": 1.50, _BOTH: 1.60}),
    Goal("causal twicing, 3 steps, N = 1,024", _CAUSAL, "twicing, 3 steps", {"forward": 1.55, _BOTH: 1.60}),
    Goal("bidirectional twicing, N = 1,024", _WHOLE, "twicing, auto", {"forward": 1.55, _BOTH: 1.55}),
    Goal("ViT twicing, 197 tokens", _VIT, "twicing, auto", {"forward": 1.45, _BOTH: 1.50}),
    Goal("bilateral Gaussian, causal", _CAUSAL, "bilateral gaussian", {"forward": 1.15, _BOTH: 1.30}),
    Goal("bilateral Gaussian, ViT", _VIT, "bilateral gaussian", {"forward": 1.15, _BOTH: 1.30}),
    Goal("bilateral untied, causal", _CAUSAL, "bilateral untied", {"forward": 1.30, _BOTH: 1.50}),
    Goal("bilateral untied, ViT", _VIT, "bilateral untied", {"forward": 1.30, _BOTH: 1.50}),
    Goal("padding, causal twicing, N = 1,024", _CAUSAL, "on the right", {_BOTH: 1.05}),
    Goal("padding, ViT twicing", _VIT, "on the right", {_BOTH: 1.05}),
    *(
        Goal(f"padding, {case.split()[0]} twicing, 64 tokens of 4 heads", case, "on the right", {_BOTH: 1.05})
        for case in _SHORT
    ),
    Goal("decoding step, attention alone", "attention alone, 1024 cached tokens", "twicing", {"step": 1.60}),
    Goal("decoding step, GPT-2 small", "whole model, 1024 cached tokens", "twicing", {"step": 1.15}),
    Goal("decoding step, GPT-2 small, bilateral", "whole model, 1024 cached tokens", "bilateral", {"step": 1.10}),
    Goal("training step, GPT-2 small, twicing in all layers", _TRAINING, "twicing in all layers", {"step": 1.08}),
    Goal("training step, GPT-2 small, twicing in 3 layers", _TRAINING, "twicing in the last 3 layers", {"step": 1.03}),
)
"""What the table of ``docs/speed.md`` shows."""


def render(rows: Sequence[dict[str, Any]]) -> str:
    """The measured rows as a text table for each suite and case, the skipped ones named below."""
    blocks = []
    for case in dict.fromkeys((row["suite"], row["case"], row["direction"]) for row in rows):
        mine = [row for row in rows if (row["suite"], row["case"], row["direction"]) == case]
        with_floors = any(row["flop_floor"] for row in mine)
        header = ["method", "ms", "ratio (quartiles)"] + ["floor", "peak MiB", "least MiB moved"] * with_floors
        table = [header]
        for row in mine:
            if row["ratio"] is None:
                continue
            cells = [row["method"], f"{row['milliseconds']:,.2f}", _ratio(row)]
            if with_floors:
                cells += [
                    _number(row["flop_floor"], ".2f"),
                    _number(row["peak_mib"], ",.0f"),
                    _number(row["byte_floor_mib"], ",.1f"),
                ]
            table.append(cells)
        left_out = [f"  {row['method']}: {row['skipped']}" for row in mine if row["skipped"]]
        blocks.append("\n".join([f"{case[1]}, {case[2]}", *_aligned(table), *left_out]))
    return "\n\n".join(blocks)


def slopes(rows: Iterable[dict[str, Any]], value: str = "milliseconds") -> dict[tuple[str, str, str], float]:
    """Exponent of N in time or memory, for (kind, method, direction), fitted to lengths from 1,024 on.

    Args:
        rows: measured rows of the attention suite, of which those with one batch row and two heads count.
        value: ``milliseconds`` or ``peak_mib``.
    """
    points: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
    for row in rows:
        kind, _, shape = row["case"].partition(" ")
        is_sweep = row["suite"] == "attention" and shape.startswith("(1, 2,") and row["length"] >= FIT_FROM
        if is_sweep and row[value] and row[value] >= LEAST[value]:
            points.setdefault((kind, row["method"], row["direction"]), []).append(
                (math.log(row["length"]), math.log(row[value]))
            )
    return {key: _slope(found) for key, found in points.items() if len(found) >= 2}


def slope_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The :func:`slopes` of time and memory, one dictionary for each."""
    return [
        {"kind": kind, "method": method, "direction": direction, "value": value, "exponent": round(slope, 3)}
        for value in LEAST
        for (kind, method, direction), slope in slopes(rows, value).items()
    ]


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Time and memory of forward + backward against N on logarithmic axes; the legend has the slopes.

    Raises:
        UsageError: if matplotlib is not installed.
    """
    require_extras("viz")
    from matplotlib.figure import Figure  # without pyplot: no window system and no global state

    sweep = [
        row
        for row in rows
        if row["suite"] == "attention" and "(1, 2," in row["case"] and row["direction"] == "forward + backward"
    ]
    kinds = sorted({row["case"].partition(" ")[0] for row in sweep}, reverse=True)
    figure = Figure(figsize=(13, 4.6 * max(len(kinds), 1)), layout="constrained")
    panels = figure.subplots(max(len(kinds), 1), 2, squeeze=False, sharex=True)
    for kind, pair in zip(kinds, panels, strict=False):
        mine = [row for row in sweep if row["case"].startswith(kind)]
        for axes, value, unit in zip(pair, LEAST, ("milliseconds", "peak memory, MiB"), strict=True):
            _draw_panel(axes, mine, value, slopes(mine, value))
            axes.set_xlabel("tokens N")
            axes.set_ylabel(unit)
            axes.set_title(f"{kind}, forward + backward")
    figure.savefig(path, dpi=110)


def _draw_panel(
    axes: Any, rows: Sequence[dict[str, Any]], value: str, exponents: dict[tuple[str, str, str], float]
) -> None:
    """A line for each method through all that was measured; what is below the resolution lies on its edge, hollow."""
    least, below = LEAST[value], dict[int, list[int]]()
    for index, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
        points = [(row["length"], row[value]) for row in rows if row["method"] == method and row[value] is not None]
        if not points:
            continue
        slope = next((exponent for (_, name, _), exponent in exponents.items() if name == method), None)
        if slope is not None:
            label = f"{method}: N^{slope:.2f}"
        else:
            label = method if any(found > least for _, found in points) else f"{method}: below {least:.0f} MiB"
        lengths, heights = zip(*((length, max(found, least)) for length, found in points), strict=True)
        axes.loglog(lengths, heights, marker="o", markersize=3, label=label, color=f"C{index}")
        for length, found in points:
            if found <= least:
                below.setdefault(length, []).append(index)
    if least and below:
        # Several methods lie in the same place there: one mark for all of them.
        axes.plot(list(below), [least] * len(below), "o", color="grey", markerfacecolor="white", zorder=5)
        axes.axhspan(least / 2, least, color="grey", alpha=0.2, label=f"below {least:.0f} MiB: not resolved")
        axes.set_ylim(bottom=least / 2)
    axes.grid(alpha=0.3, which="both")
    if axes.lines:
        axes.legend(fontsize=7)


def redraw(path: Path) -> None:
    """Draw the plot beside a record, which all of it is made of; one that is there is replaced.

    Raises:
        UsageError: if it is no record of a benchmark, or the plot cannot be written.
    """
    plot = check_output_file(path.with_suffix(".png"))
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"--redraw must be a record of a benchmark, got {str(path)!r}: {error!r}") from error
    write_or_keep(plot, lambda file: draw(rows, file))


def goals_table(record: dict[str, Any]) -> str:
    """The table of costs of ``docs/speed.md``: what was measured beside what was to be reached."""
    measured = {(row["case"], row["method"], row["direction"]): row for row in record["rows"] if row["ratio"]}
    cells = []
    for goal in GOALS:
        for direction, limit in goal.limits.items():
            row = measured.get((goal.case, goal.method, direction))
            found, reached = "not measured", ""
            if row is not None:
                found = _ratio(row)
                reached = "yes" if row["ratio"] <= limit + 0.005 else f"no, {row['ratio'] / limit - 1:+.0%}"
            cells.append([goal.words, direction, found, f"{limit:.2f}", reached])
    return table_text(["case", "direction", "× plain (quartiles)", "goal", "reached"], cells)


def _ratio(row: dict[str, Any]) -> str:
    return f"{row['ratio']:.2f} ({row['ratio_low']:.2f} to {row['ratio_high']:.2f})"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    return ["  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in table]


def _slope(points: Sequence[tuple[float, float]]) -> float:
    mean_x, mean_y = (sum(point[axis] for point in points) / len(points) for axis in (0, 1))
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread
