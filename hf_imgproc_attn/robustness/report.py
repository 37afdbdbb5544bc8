"""The tables and the figure of a robustness record."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from ..markdown_tables import table_text
from .settings import STANDARD_CORRUPTIONS, in_grey_levels

Record = dict[str, Any]

_PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999")


_METRICS = {"accuracy": "Accuracy in %", "perplexity": "Perplexity a token", "word_perplexity": "Perplexity a word"}


class Table(NamedTuple):
    """A title, and rows of cells with a header first."""

    title: str
    rows: list[list[str]]


def tables(record: Record) -> list[Table]:
    """The tables of a record: single values, corruptions by severity, attacks by ε, changes of texts by their part."""
    results = record["results"]
    found = [_single(results), *_texts(results)]
    if corrupted := [result for result in results if result["family"] == "corruption"]:
        found.append(_corruptions(record, corrupted))
    if attacked := [result for result in results if result["family"] == "attack"]:
        found.append(_attacks(results, attacked))
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
        head, *rows = table.rows
        parts += [f"## {table.title}", table_text(head, rows, right=True)]
    return "\n\n".join([*parts, *_remarks(record)]) + "\n"


def save_figure(record: Record, path: str | Path) -> None:
    """Draw accuracy against severity, and against ε, or perplexity against the part of the words that is changed.

    Args:
        record: with results.
        path: of the picture.
    """
    from matplotlib.figure import Figure

    panels = [panel for panel in (_severity_panel, _epsilon_panel, _text_panel) if panel(record, None)]
    figure = Figure(figsize=(7 * max(len(panels), 1), 4.6), layout="constrained")
    for place, panel in enumerate(panels, start=1):
        panel(record, figure.add_subplot(1, len(panels), place))
    figure.suptitle(record["checkpoint"])
    figure.savefig(path, dpi=150)


def _single(results: list[Record]) -> Table:
    rows = [["disturbance", "measure", "value", "samples"]]
    for result in results:
        if result["family"] in ("clean", "noise"):
            name = ", ".join([result["disturbance"], *(f"{k} {v:g}" for k, v in result["parameters"].items())])
            rows.append([name, result["metric"].replace("_", " "), _value(result), f"{result['samples']:,}"])
    return Table("Results", rows)


def _value(result: Record) -> str:
    return _percent(result["value"]) if result["metric"] == "accuracy" else f"{result['value']:,.2f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _texts(results: list[Record]) -> list[Table]:
    """A table a metric."""
    changed = [result for result in results if "fraction" in result["parameters"]]
    parts = sorted({result["parameters"]["fraction"] for result in changed})
    names = list(dict.fromkeys(result["disturbance"] for result in changed))
    found = []
    for metric in dict.fromkeys(result["metric"] for result in changed):
        (clean,) = [_value(result) for result in results if result["family"] == "clean" and result["metric"] == metric]
        rows = [["change", "clean", *(f"{100 * part:g} %" for part in parts)]]
        for name in names:
            cells = [
                _value(result) for part in parts for result in changed
                if (result["disturbance"], result["metric"], result["parameters"]["fraction"]) == (name, metric, part)
            ]  # fmt: skip
            rows.append([name, clean, *cells])
        found.append(Table(f"{_METRICS[metric]} by the part of the words that is changed", rows))
    return found


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


def _clean_accuracy(results: list[Record], samples: int) -> float:
    """Of the first so many images, which are those that were attacked."""
    bits = int(results[0]["correct"], 16) >> (4 * len(results[0]["correct"]) - samples)
    return bits.bit_count() / samples


def _attacks(results: list[Record], attacked: list[Record]) -> Table:
    names = list(dict.fromkeys(result["disturbance"] for result in attacked))
    epsilons = sorted({result["parameters"]["epsilon"] for result in attacked})
    values = {(result["disturbance"], result["parameters"]["epsilon"]): result["value"] for result in attacked}
    clean = _percent(_clean_accuracy(results, attacked[0]["samples"]))
    rows = [["attack", "clean", *(f"ε {in_grey_levels(epsilon)}" for epsilon in epsilons)]]
    rows += [[name, clean, *(_percent(values.get((name, epsilon))) for epsilon in epsilons)] for name in names]
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
    if parts := sorted({result["parameters"]["fraction"] for result in record["results"] if result.get("unchanged")}):
        said.append(
            f"Of so few words {', '.join(f'{100 * part:g} %' for part in parts)} is less than half a word: no word "
            "was changed there. Take more texts (--max_samples) or a larger part (--fractions)."
        )
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
    counted = [heights for name, heights in lines.items() if name.replace(" ", "_") in STANDARD_CORRUPTIONS]
    if counted:  # as in the tables, of the published ones only
        mean = [sum(heights) / len(counted) for heights in zip(*counted, strict=True)]
        axes.plot([0, *severities], mean, "o-", color="black", linewidth=2.5, label="mean of the published")
    axes.set(xlabel="severity (0: clean)", ylabel="accuracy (%)", ylim=(-2, 103), title="Corruptions")
    axes.set_xticks([0, *severities])
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return True


def _epsilon_panel(record: Record, axes: Any) -> bool:
    """Accuracy against ε, a line an attack; whether there is anything to draw."""
    results = [
        result for result in record["results"]
        if result["family"] == "attack" and result["parameters"]["epsilon"] < 1
    ]  # fmt: skip
    if axes is None or not results:
        return bool(results)
    clean = _clean_accuracy(record["results"], results[0]["samples"])
    markers = dict(zip(dict.fromkeys(result["disturbance"] for result in results), "os^Dv", strict=False))
    for number, (name, marker) in enumerate(markers.items()):
        found = sorted((r["parameters"]["epsilon"], r["value"]) for r in results if r["disturbance"] == name)
        places, heights = zip(*[(0.0, clean), *found], strict=True)
        is_worst = name == "worst case"
        axes.plot(
            [255 * place for place in places],
            [100 * height for height in heights],
            marker + ("--" if is_worst else "-"),
            color="black" if is_worst else _PALETTE[number],
            label=name,
            zorder=1 if is_worst else 2,
        )
    axes.set(xlabel="ε (grey levels of 255; 0: clean)", ylabel="accuracy (%)", ylim=(-2, 103), title="Attacks")
    axes.legend()
    return True


def _text_panel(record: Record, axes: Any) -> bool:
    """Perplexity a word, or accuracy, against the part of the words that is changed; whether there is anything."""
    changed = [result for result in record["results"] if "fraction" in result["parameters"]]
    if axes is None or not changed:
        return bool(changed)
    metric = "word_perplexity" if any(result["metric"] == "word_perplexity" for result in changed) else "accuracy"
    scale = 100 if metric == "accuracy" else 1
    results = [result for result in record["results"] if result["metric"] == metric]
    (clean,) = [result["value"] for result in results if result["family"] == "clean"]
    for name, marker in zip(dict.fromkeys(result["disturbance"] for result in changed), "os^", strict=False):
        found = [(r["parameters"]["fraction"], r["value"]) for r in results if r["disturbance"] == name]
        places, heights = zip(*[(0.0, clean), *sorted(found)], strict=True)
        axes.plot([100 * place for place in places], [scale * height for height in heights], marker + "-", label=name)
    label = "accuracy (%)" if metric == "accuracy" else "perplexity a word"
    axes.set(xlabel="part of the words that is changed (%; 0: clean)", ylabel=label, title="Texts")
    axes.legend()
    return True
