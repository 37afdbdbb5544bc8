"""The tables and the figure of a robustness record."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from .settings import in_grey_levels

Record = dict[str, Any]

_PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#f0e442")


class Table(NamedTuple):
    """A title, and rows of cells with a header first."""

    title: str
    rows: list[list[str]]


def tables(record: Record) -> list[Table]:
    """The tables of a record: what is measured by itself, corruptions against severity, attacks against ε."""
    results = record["results"]
    found = [_single(results)]
    if corrupted := [result for result in results if result["family"] == "corruption"]:
        found.append(_corruptions(record, corrupted))
    if attacked := [result for result in results if result["family"] == "attack"]:
        found.append(_attacks(attacked))
    return [table for table in found if len(table.rows) > 1]


def plain_text(record: Record) -> str:
    """The tables, and what is to be said of them, for a terminal."""
    parts = []
    for table in tables(record):
        widths = [max(len(row[column]) for row in table.rows) for column in range(len(table.rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in table.rows]
        parts.append("\n".join([table.title, *(line.rstrip() for line in lines)]))
    return "\n\n".join([*parts, *_remarks(record)])


def markdown(record: Record) -> str:
    """The same in Markdown."""
    parts = [f"# Robustness of {record['checkpoint']}"]
    for table in tables(record):
        header, *rows = ("| " + " | ".join(row) + " |" for row in table.rows)
        rule = "|---|" + "---:|" * (len(table.rows[0]) - 1)
        parts += [f"## {table.title}", "\n".join([header, rule, *rows])]
    return "\n\n".join([*parts, *_remarks(record)]) + "\n"


def save_figure(record: Record, path: str | Path) -> None:
    """Draw accuracy against severity, and against ε, or perplexity against the part of the words that is changed.

    Args:
        record: with results.
        path: of the picture.
    """
    from matplotlib.figure import Figure

    panels = [panel for panel in (_severity_panel, _epsilon_panel) if panel(record, None)]
    figure = Figure(figsize=(6.4 * max(len(panels), 1), 4.4), layout="constrained")
    for place, panel in enumerate(panels, start=1):
        panel(record, figure.add_subplot(1, len(panels), place))
    figure.suptitle(record["checkpoint"])
    figure.savefig(path, dpi=150)


def _single(results: list[Record]) -> Table:
    rows = [["disturbance", "measure", "value", "samples"]]
    for result in results:
        if result["family"] not in ("corruption", "attack"):
            name = ", ".join([result["disturbance"], *(f"{k} {v:g}" for k, v in result["parameters"].items())])
            rows.append([name, result["metric"].replace("_", " "), _value(result), f"{result['samples']:,}"])
    return Table("Results", rows)


def _value(result: Record) -> str:
    return _percent(result["value"]) if result["metric"] == "accuracy" else f"{result['value']:,.2f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _corruptions(record: Record, corrupted: list[Record]) -> Table:
    severities = sorted({result["parameters"]["severity"] for result in corrupted})
    names = list(dict.fromkeys(result["disturbance"] for result in corrupted))
    values = {(result["disturbance"], result["parameters"]["severity"]): result["value"] for result in corrupted}
    scores = record.get("mean_corruption_error")
    rows = [["corruption", *(f"severity {severity}" for severity in severities), "mean", *(["CE"] if scores else [])]]
    for name in names:
        found = [values[name, severity] for severity in severities]
        row = [name, *map(_percent, found), _percent(sum(found) / len(found))]
        if scores:
            error = scores["by_corruption"].get(name.replace(" ", "_"))
            row.append("-" if error is None else f"{error:.1f}")
        rows.append(row)
    table = corrupted[0]["parameters"]["table"]
    return Table(f"Accuracy in % under corruption, severities of {table}", rows)


def _attacks(attacked: list[Record]) -> Table:
    names = list(dict.fromkeys(result["disturbance"] for result in attacked))
    epsilons = sorted({result["parameters"]["epsilon"] for result in attacked})
    values = {(result["disturbance"], result["parameters"]["epsilon"]): result["value"] for result in attacked}
    rows = [["attack", *(f"ε {in_grey_levels(epsilon)}" for epsilon in epsilons)]]
    rows += [[name, *(_percent(values.get((name, epsilon))) for epsilon in epsilons)] for name in names]
    return Table(f"Accuracy in % under attack, {attacked[0]['samples']:,} images", rows)


def _remarks(record: Record) -> list[str]:
    """Sentences below the tables."""
    said = []
    errors = record.get("errors")
    if errors and errors["mean"] is not None:
        said.append(
            f"Mean error over {len(errors['counted'])} of the 15 published corruptions: {_percent(errors['mean'])} % "
            f"(clean {_percent(errors['clean'])} %)."
        )
    if scores := record.get("mean_corruption_error"):
        plain, relative = ("not defined" if scores[name] is None else f"{scores[name]:.1f} %"
                           for name in ("mce", "relative_mce"))  # fmt: skip
        said.append(
            f"Mean corruption error (mCE) against {record['baseline']['name']}: {plain}; relative: {relative}."
        )
    for name, why in (record.get("left_out") or {}).items():
        said.append(f"Left out: {name}, {why}.")
    if record.get("masking"):
        said.append("Signs of masked gradients: " + "; ".join(record["masking"]) + ".")
    elif record.get("masking") is not None:
        said.append("No sign of masked gradients was seen.")
    return said


def _severity_panel(record: Record, axes: Any) -> bool:
    """Accuracy against severity: each corruption thin, their mean thick; whether there is anything to draw."""
    results = [result for result in record["results"] if result["family"] == "corruption"]
    severities = sorted({result["parameters"]["severity"] for result in results})
    if axes is None or not results:
        return bool(results)
    names = list(dict.fromkeys(result["disturbance"] for result in results))
    clean = 100 * record["results"][0]["value"]
    lines: dict[str, list[float]] = {name: [clean] for name in names}
    for result in sorted(results, key=lambda result: result["parameters"]["severity"]):
        lines[result["disturbance"]].append(100 * result["value"])
    styles = ("-", "--", ":")
    for number, (name, heights) in enumerate(lines.items()):
        colour, style = _PALETTE[number % 7], styles[number // 7 % 3]
        axes.plot([0, *severities], heights, style, color=colour, linewidth=1, label=name)
    mean = [sum(heights) / len(lines) for heights in zip(*lines.values(), strict=True)]
    axes.plot([0, *severities], mean, "o-", color="black", linewidth=2.5, label="mean")
    axes.set(xlabel="severity (0: clean)", ylabel="accuracy (%)", ylim=(0, 101), title="Corruptions")
    axes.set_xticks([0, *severities])
    axes.legend(fontsize="x-small", ncols=2, loc="lower left")
    return True


def _epsilon_panel(record: Record, axes: Any) -> bool:
    """Accuracy against ε, a line an attack; whether there is anything to draw."""
    results = [
        result for result in record["results"]
        if result["family"] == "attack" and result["parameters"]["epsilon"] < 1
    ]  # fmt: skip
    if axes is None or not results:
        return bool(results)
    clean = 100 * record["results"][0]["value"]
    markers = dict(zip(dict.fromkeys(result["disturbance"] for result in results), "os^Dv", strict=False))
    for number, (name, marker) in enumerate(markers.items()):
        found = sorted((r["parameters"]["epsilon"], r["value"]) for r in results if r["disturbance"] == name)
        places, heights = zip(*[(0.0, clean / 100), *found], strict=True)
        is_worst = name == "worst case"
        axes.plot(
            [255 * place for place in places],
            [100 * height for height in heights],
            marker + ("--" if is_worst else "-"),
            color="black" if is_worst else _PALETTE[number],
            label=name,
            zorder=1 if is_worst else 2,
        )
    axes.set(xlabel="ε (grey levels of 255; 0: clean)", ylabel="accuracy (%)", ylim=(-1, 101), title="Attacks")
    axes.legend()
    return True
