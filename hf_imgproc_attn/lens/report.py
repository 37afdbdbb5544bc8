"""What the lens has found, as typed results: to JSON and back, and to Markdown."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import require_extras
from ..markdown_tables import table_text
from ..output_paths import write_or_keep
from .definitions import DEFINITIONS
from .spectrum import Spectrum
from .tokens import TokenMeasures

PLACES = ("entering", "values", "filtered", "after_residual", "leaving")
"""Where tokens are measured: what a block is given, V, what its filter makes of V, after the residual connection,
after the MLP."""


@dataclass
class HeadReport:
    """Of one head; ``docs/lens.md`` defines every number.

    entropy: nats. entropy_share: of that of uniform weights. logit_std, content_bandwidth: of the logits.
    distance: root of the mean square distance attended to, in index or patch units. position_bandwidth: of the
    Gaussian kernel with this moment. sink_weight, sink_value_ratio: of class, register or first tokens. received: A^T
    1, where the tokens are few enough, its largest value and where that is. learned: what the layer's own filter
    holds. shares, exact_shares: of the variance of the logits. method_noise: |V - p(A) V|^2 / |V|^2.
    """

    head: int
    entropy: float
    entropy_share: float
    logit_std: float
    content_bandwidth: float
    distance: float
    position_bandwidth: float
    sink_weight: float
    sink_value_ratio: float
    received_most: float
    received_most_at: int
    method_noise: float
    received: list[float] = field(default_factory=list)
    learned: dict[str, float] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)
    exact_shares: dict[str, float] = field(default_factory=dict)
    filter_spectrum: Spectrum | None = None
    operator_spectrum: Spectrum | None = None


@dataclass
class LayerReport:
    """Of one layer.

    index: its number in the stack. kind: its filter in words. tokens: how alike they are, by place. noise: the ratio
    of signal to noise in decibels, by place. alpha, beta, predicted_gain: see ``tokens.Gains``; the gain in decibels.
    maps: for each kernel what the chosen token receives from where, ``[heads][length]``. method_noise_map:
    |v_i - (p(A) v)_i| of the first sample, ``[heads][length]``.
    """

    name: str
    index: int
    kind: str
    heads: list[HeadReport] = field(default_factory=list)
    tokens: dict[str, TokenMeasures] = field(default_factory=dict)
    noise: dict[str, float] = field(default_factory=dict)
    alpha: float | None = None
    beta: float | None = None
    predicted_gain: float | None = None
    maps: dict[str, list[list[float]]] = field(default_factory=dict)
    method_noise_map: list[list[float]] = field(default_factory=list)


@dataclass
class Report:
    """Of one model on one input.

    model: its name. model_type: of its configuration. parameters: how many. data: what it was shown, in words.
    samples, length: of the input. axes: of the places, 1 or 2. grid: rows and columns of patches, or None. special:
    leading tokens without a place, or the first token of a text. token: whose maps are shown. labels: the first
    sample's tokens as text. picture: the first image, small, as PNG in base64. noise: its standard deviation, as a
    share of the input's. notes: what a reader must know of the input, in a comparison. skipped: what was not measured,
    and why. seconds: of the model alone, of the lens on top of it, and of the run with noise.
    """

    model: str
    model_type: str
    parameters: int
    data: str
    samples: int
    length: int
    axes: int = 1
    grid: list[int] | None = None
    special: int = 1
    token: int = 0
    labels: list[str] = field(default_factory=list)
    picture: str = ""
    noise: float = 0.0
    layers: list[LayerReport] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and names; numbers that are not finite are None."""
        plain: dict[str, Any] = _plain(self)
        return plain

    @classmethod
    def from_dict(cls, held: dict[str, Any]) -> Report:
        """A report of what :meth:`to_dict` gave; its numbers have the digits that were kept."""
        return cls(**{**held, "layers": [_layer_of(layer) for layer in held["layers"]]})

    def to_json(self, path: str | Path | None = None) -> str:
        """JSON text, also written to ``path`` if there is one."""
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"
        if path is not None:
            write_or_keep(path, lambda file: file.write_text(text, encoding="utf-8"))
        return text

    def to_markdown(self, path: str | Path | None = None) -> str:
        """A page of tables, also written to ``path`` if there is one."""
        text = markdown(self)
        if path is not None:
            write_or_keep(path, lambda file: file.write_text(text, encoding="utf-8"))
        return text

    def to_html(self, path: str | Path | None = None) -> str:
        """The page for the browser, also written to ``path`` if there is one.

        Raises:
            UsageError: if the packages of the extra ``lens``, which draw its pictures, are not installed.
        """
        require_extras("lens")
        from .figures import draw_all
        from .page import page

        text = page([self], draw_all([self]))
        if path is not None:
            write_or_keep(path, lambda file: file.write_text(text, encoding="utf-8"))
        return text

    def to_png(self, folder: str | Path) -> list[Path]:
        """Write every picture into a folder, and return the files.

        Raises:
            UsageError: as of :meth:`to_html`.
        """
        require_extras("lens")
        from .figures import draw_all, write_pictures

        written: list[Path] = []
        write_or_keep(Path(folder), lambda place: written.extend(write_pictures(draw_all([self]), place)))
        return written

    def mean(self, name: str) -> list[float]:
        """A measure of the heads, its mean in each layer."""
        return [sum(getattr(head, name) for head in layer.heads) / len(layer.heads) for layer in self.layers]


def _layer_of(held: dict[str, Any]) -> LayerReport:
    heads = []
    for head in held["heads"]:
        numbers: dict[str, Any] = {name: math.nan if value is None else value for name, value in head.items()}
        for kind in ("filter_spectrum", "operator_spectrum"):
            found = head[kind]
            if found is not None:
                pairs = [(float(real), float(imaginary)) for real, imaginary in found["eigenvalues"]]
                found = Spectrum(**{**found, "eigenvalues": pairs})
            numbers[kind] = found
        heads.append(HeadReport(**numbers))
    tokens = {place: TokenMeasures(**measured) for place, measured in held["tokens"].items()}
    return LayerReport(**{**held, "heads": heads, "tokens": tokens})


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {each.name: _plain(getattr(value, each.name)) for each in dataclasses.fields(value)}
    if hasattr(value, "_asdict"):
        return _plain(value._asdict())
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def cell(value: float | None, digits: int = 3) -> str:
    """A number in a table; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:.{digits}g}" if abs(value) < 1e4 else f"{value:.1e}"


HEAD_COLUMNS = (
    "entropy_share",
    "logit_std",
    "content_bandwidth",
    "position_bandwidth",
    "sink_weight",
    "sink_value_ratio",
    "received_most",
    "method_noise",
)
"""Measures of heads in tables."""


def titles_of(names: Iterable[str]) -> list[str]:
    """What numbers are called in tables, as their definitions have it."""
    return [DEFINITIONS[name].title for name in names]


def learned_names(report: Report) -> list[str]:
    """Names of what the layers' own filters hold."""
    return list(dict.fromkeys(name for layer in report.layers for head in layer.heads for name in head.learned))


def counted(number: int, word: str) -> str:
    """``1 sample``, ``2 samples``."""
    return f"{number} {word}{'s' * (number != 1)}"


def seconds_in_words(report: Report) -> str:
    """What the look has cost: the model alone, the measuring on top of it, and the run with noise."""
    return ", ".join(f"{name} {value:.1f} s" for name, value in report.seconds.items())


def kinds_of(report: Report) -> str:
    """The filters of all layers in words; the layers are named where they differ."""
    layers: dict[str, list[str]] = {}
    for layer in report.layers:
        layers.setdefault(layer.kind, []).append(str(layer.index))
    if len(layers) == 1:
        return next(iter(layers))
    return "; ".join(
        f"{kind} in {'layers' if len(held) > 1 else 'layer'} {', '.join(held)}" for kind, held in layers.items()
    )


def head_table(report: Report) -> tuple[list[str], list[list[str]]]:
    """Titles and cells of the table of heads."""
    learned = learned_names(report)
    rows = [
        [
            str(layer.index),
            str(head.head),
            *(cell(getattr(head, name)) for name in HEAD_COLUMNS),
            *(cell(head.learned.get(name)) for name in learned),
        ]
        for layer in report.layers
        for head in layer.heads
    ]
    return [*titles_of(("index", "head", *HEAD_COLUMNS)), *(f"its {name}" for name in learned)], rows


def markdown(report: Report) -> str:
    """The report as Markdown."""
    parts = [
        f"# What {report.model} filters",
        f"`{report.model_type}`, {report.parameters:,} parameters, {len(report.layers)} layers, "
        f"{kinds_of(report)}; {counted(report.samples, 'sample')} of {report.length} tokens: "
        f"{report.data}. Every number is defined in `docs/lens.md`.",
        "## Heads",
        table_text(*head_table(report)),
        "## Tokens by depth",
        _tokens_table(report),
    ]
    if any(layer.noise for layer in report.layers):
        parts += [f"## Noise ({100 * report.noise:g} % of the input)", _noise_table(report)]
    if any(head.shares or head.exact_shares for layer in report.layers for head in layer.heads):
        parts += ["## What the logits are made of", _shares_table(report)]
    if any(head.filter_spectrum for layer in report.layers for head in layer.heads):
        parts += ["## Spectra", _spectra_table(report)]
    parts[2:2] = [f"**Note:** {note}." for note in report.notes]
    if report.skipped:
        parts += ["## Not measured", "\n".join(f"- {reason}" for reason in report.skipped)]
    parts.append(f"Time: {seconds_in_words(report)}.")
    return "\n\n".join(parts) + "\n"


def _tokens_table(report: Report) -> str:
    rows = [
        [str(layer.index), DEFINITIONS[place].title, *(cell(value) for value in layer.tokens[place])]
        for layer in report.layers
        for place in PLACES
        if place in layer.tokens
    ]
    return table_text(["layer", "place", *titles_of(TokenMeasures._fields)], rows)


def _noise_table(report: Report) -> str:
    rows = [
        [
            str(layer.index),
            *(cell(layer.noise.get(place)) for place in PLACES),
            *(cell(value) for value in (layer.alpha, layer.beta, layer.predicted_gain)),
        ]
        for layer in report.layers
    ]
    titles = [f"{title}, dB" for title in titles_of(PLACES)]
    return table_text(["layer", *titles, *titles_of(("alpha", "beta")), "predicted gain, dB"], rows)


def _shares_table(report: Report) -> str:
    rows = []
    for layer in report.layers:
        for kind in ("exact_shares", "shares"):
            held = [getattr(head, kind) for head in layer.heads]
            if held and held[0]:
                means = {name: sum(each[name] for each in held) / len(held) for name in held[0]}
                text = ", ".join(f"{name} {value:+.2f}" for name, value in means.items() if abs(value) >= 0.005)
                rows.append([str(layer.index), "exact" if kind == "exact_shares" else "mean effects", text])
    return table_text(["layer", "parts", "shares of the logits' variance, mean over heads"], rows)


SPECTRAL_COLUMNS = ("effective_rank", "stable_rank", "radius", "gain")
"""Measures of spectra in tables."""


def _spectra_table(report: Report) -> str:
    rows = []
    for layer in report.layers:
        for head in layer.heads:
            for name, found in (("A", head.filter_spectrum), ("p(A)", head.operator_spectrum)):
                if found is not None:
                    numbers = [getattr(found, measure) for measure in SPECTRAL_COLUMNS]
                    rows.append([str(layer.index), str(head.head), name, *(cell(number) for number in numbers)])
    return table_text(["layer", "head", "of", *titles_of(SPECTRAL_COLUMNS)], rows)
