"""The table of variants: equation, source, parameters, cost and limits of every preset.

``imgproc-attn variants`` prints it and ``docs/variants.md`` shows it. What the code knows is asked of the code: the
number of passes by applying the boosters, cached streams by building a layer, fields by the presets themselves. The
rest is their rows in ``presets``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..backbones import BACKBONES, in_words
from ..markdown_tables import table_text
from ..models.boost_operators import BOOSTING, SEQUENTIAL, keep_rows, operator_on_value
from ..models.configuration_imgproc_gpt2 import ImgProcGPT2Config
from ..models.configuration_imgproc_vit import ImgProcViTConfig
from ..models.layer_filter import AttentionFilter
from ..models.spec_axes import (
    FILTER_BACKENDS,
    WEIGHTS_ONE_BY_ONE,
    is_stock_layer,
    uses_position_table,
)
from ..models.spec_fields import PRESETS
from .presets import REASONS, VARIANTS
from .works import PAPERS


class Sizes(NamedTuple):
    """What formulas are made of: width d, heads H, layers L, positions N of the table."""

    d: int
    H: int
    L: int
    N: int


@dataclass(frozen=True)
class Term:
    """A part of a number of parameters: as text, and as a function of the sizes."""

    text: str
    count: Callable[[Sizes], int]


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    preset: str
    equation: str
    source: str
    parameters: str
    cost: str
    back_ends: str
    cached_decoding: str
    causal: str
    not_supported: str


COLUMNS = {
    "preset": "preset",
    "equation": "filter A and head output U",
    "source": "source",
    "parameters": "parameters more than `softmax`",
    "cost": "cost of attention",
    "back_ends": "back-ends",
    "cached_decoding": "cached decoding",
    "causal": "causal",
    "not_supported": "not supported",
}
_CAUSAL = [row for row in BACKBONES.values() if row.is_causal]
_OTHERS = [row for row in BACKBONES.values() if not row.is_causal]
LEGEND = (
    "d is the width of the model (of a head under the root), H the number of heads, L of layers, N of tokens or of "
    "positions in the table. Parameters are those of a GPT-2; a class token adds 3HL where positions are compared. A "
    "pass applies A to values once, in so many floating-point operations forward; `blocked` computes the weights of A "
    f"once for all passes. Causal is {in_words(rows=_CAUSAL)}; {in_words(rows=_OTHERS)} are not. "
    "Not supported, and why: "
    + "; ".join(f"{name}: {reason}" for name, reason in REASONS.items())
    + ". `gradient_boosted` takes more rounds (`boosting_steps`), F_m of F_(m-1) as F_1 of F_0, each with the cost "
    "and the parameters of the second one; as in the authors' experiments Attn_m reads z - F_(m-1) alone, with "
    "`gradient_boosting_source='input'`, the equation of the paper's first version, its keys and values are made of z."
)


def example(preset: str) -> tuple[ImgProcGPT2Config | ImgProcViTConfig, AttentionFilter]:
    """A small model's configuration, a GPT-2's if the preset can be causal, and its last layer's filter."""
    config: ImgProcGPT2Config | ImgProcViTConfig
    if is_causal(preset):
        config = ImgProcGPT2Config.from_preset(preset, n_layer=2, n_head=2, n_embd=8, n_positions=4)
    else:
        sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 8}
        config = ImgProcViTConfig.from_preset(preset, **sizes, image_size=4, patch_size=2)
    layer = AttentionFilter(
        config.layer_specs[1], config, layer_idx=1, head_dim=4, scaling=0.5, longest_side=4, layer_norm_eps=1e-5
    )
    return config, layer


def is_causal(preset: str) -> bool:
    """Whether models with a causal mask can have the preset."""
    return any(preset not in row.refused_presets for row in _CAUSAL)


def parameter_terms(preset: str) -> list[Term]:
    """What a GPT-2 of the preset has more, or less, than the stock model."""
    config, layer = example(preset)
    spec, terms = layer.spec, []
    has_bandwidth = layer.positions.has_bandwidth
    if config.learn_bandwidths:
        terms.append(Term("2HL", lambda s: 2 * s.H * s.L) if has_bandwidth else Term("HL", lambda s: s.H * s.L))
    if spec.position_kernel == "untied":
        if config.share_position_projections:
            terms.append(Term("2d² + 2d", lambda s: 2 * s.d**2 + 2 * s.d))
        else:
            terms.append(Term("(2d² + 2d)L", lambda s: (2 * s.d**2 + 2 * s.d) * s.L))
    if layer.positions.bucket_table is not None:
        axes, buckets = layer.positions.bucket_table
        terms.append(Term(f"{axes * buckets}HL", lambda s: axes * buckets * s.H * s.L))
    if spec.boosting == "learned":
        terms.append(Term("HL", lambda s: s.H * s.L))
    if spec.boosting == "gradient_boosted":
        terms.append(Term("(5d² + 4d)L", lambda s: (5 * s.d**2 + 4 * s.d) * s.L))
    if spec.boosting == "inversion":
        terms.append(Term("2HL", lambda s: 2 * s.H * s.L))
    if spec.boosting == "dynamic_inversion":
        terms.append(Term("(2d + 2)HL", lambda s: (2 * s.d + 2) * s.H * s.L))
    if spec.boosting == "local_linear":
        terms.append(Term("d²L", lambda s: s.d**2 * s.L))
    if spec.boosting == "differential":
        terms.append(Term("(2d² + 2d + H)L", lambda s: (2 * s.d**2 + 2 * s.d + s.H) * s.L))
    if spec.boosting == "delta":
        terms.append(Term("(d + 1)HL", lambda s: (s.d + 1) * s.H * s.L))
    if spec.position_kernel == "forget":
        terms.append(Term("(d + 1)HL", lambda s: (s.d + 1) * s.H * s.L))
    if spec.feedback == "value_residual":
        terms.append(Term("L - 1", lambda s: s.L - 1))
    if spec.normalisation == "sink":
        terms.append(Term("HL", lambda s: s.H * s.L))
    if spec.gate == "elementwise":
        terms.append(Term("d²L", lambda s: s.d**2 * s.L))
    if spec.gate == "headwise":
        terms.append(Term("dHL", lambda s: s.d * s.H * s.L))
    if not uses_position_table(config):
        terms.append(Term("-Nd", lambda s: -s.N * s.d))
    return terms


def parameters(preset: str) -> str:
    """The sum of :func:`parameter_terms` as text."""
    return " + ".join(term.text for term in parameter_terms(preset)).replace("+ -", "- ") or "none"


def passes(preset: str) -> int:
    """How often a boosted layer applies A, counted while its booster runs."""
    spec = example(preset)[0].layer_specs[1]
    if spec.boosting in SEQUENTIAL:
        return 1
    calls = []

    def attend(stream: Any) -> Any:
        calls.append(stream)
        return stream

    one = torch.ones(1)
    BOOSTING[operator_on_value(spec.boosting)](attend, keep_rows, one, one, spec.boosting_steps)
    maps = {"gradient_boosted": spec.boosting_steps, "differential": 2}
    return len(calls) * maps.get(spec.boosting, 1)


def cost(preset: str) -> str:
    """Passes of A, and what comes on top of them, to leading order."""
    spec = example(preset)[1].spec
    extra = {
        "gaussian": "O(N²H) (position logits)",
        "alibi": "O(N²H) (position logits)",
        "relative_buckets": "O(N²H) (position logits)",
        "rotary": "O(Nd)",
        "forget": "O(NdH)",
    }.get(spec.position_kernel)
    each = "6N²d" if spec.position_kernel == "untied" or spec.boosting == "local_linear" else "4N²d"
    number = passes(preset)
    parts = [f"{number} pass of {each}" if number == 1 else f"{number} passes of {each}"]
    if spec.boosting == "differential":
        parts[0] += f", `blocked` {6 if each == '4N²d' else 10}N²d"  # the values once for both maps
    elif number > 1 and spec.boosting != "gradient_boosted":
        # Weights once, then a product with each stream.
        parts[0] += f", `blocked` {(2 if each == '4N²d' else 4) + 2 * number}N²d"
    if extra is not None:
        parts.append(extra)
    by_row = spec.boosting in ("inversion", "exclusive") or spec.feedback != "none" or spec.residual != "standard"
    if spec.content_kernel != "dot_product" or by_row:
        parts.append("O(Nd)")
    if spec.boosting == "dynamic_inversion" or spec.gate == "headwise":
        parts.append("O(NdH)")
    if spec.gate == "elementwise":
        parts.append("2Nd² (gate)")
    if spec.boosting == "local_linear":
        parts.append("2Nd² (projection)")
    if spec.boosting == "delta":  # solves in blocks of a fixed size; fused calls take wider values, and one more pass
        parts += ["O(Nd²)", "O(NdH)"]
    if spec.boosting == "robust":
        parts.append(f"{spec.boosting_steps} steps of 4N²d")
    if spec.boosting == "gradient_boosted":
        parts.append("10Nd² (projections, gate)")
    if spec.boosting == "differential":
        parts.append("4Nd² (projections)")
    if spec.normalisation == "sinkhorn":
        parts.append("3 iterations of 2N²d")
    return " + ".join(parts)


def back_ends(preset: str) -> str:
    """What computes the preset's layers: values of ``filter_backend``, or the stock model's own code."""
    config, layer = example(preset)
    if all(is_stock_layer(config, spec) for spec in config.layer_specs):
        return "stock"
    spec, missing = layer.spec, set[str]()
    if spec.normalisation in ("sigmoid", "softpick"):
        missing |= {"sdpa", "flex"}
    if spec.boosting in WEIGHTS_ONE_BY_ONE:
        missing |= {"sdpa", "flex", "triton"}
    if spec.boosting in SEQUENTIAL:
        missing |= {"flex", "triton"}
    names = [name for name in FILTER_BACKENDS if name not in ("auto", "triton", *missing)]
    return ", ".join([*names, *({"triton"} - missing)])


def cached_decoding(preset: str) -> str:
    """What a cache keeps beside keys and values."""
    layer = example(preset)[1]
    if not is_causal(preset):
        return "-"
    parts = []
    count = len(layer.stream_names)
    if layer.forget_gates is not None:
        parts.append("log f of each token and head")
    elif count:
        parts.append(f"{count} stream{'s' * (count > 1)} as wide as V")
    if layer.spec.position_kernel == "untied":
        parts.append("U_K p")
    elif layer.spec.compares_positions:
        parts.append("the position")
    return f"yes; keeps {', '.join(parts)} too" if parts else "yes"


def limits(preset: str) -> list[str]:
    """What the preset does not support: keys of :data:`REASONS`."""
    config, _ = example(preset)
    found = []
    if not all(is_stock_layer(config, spec) for spec in config.layer_specs):
        found.append("continuous batching")
    if uses_position_table(config):
        found.append("longer texts")
    if not is_causal(preset):
        found.append("causal models")
    if all(preset in row.refused_presets for row in _OTHERS):
        found.append("models without a causal mask")
    elif any(preset in row.refused_presets for row in _OTHERS):
        found.append("encoders of texts")
    return [*found, *VARIANTS[preset].limits]


def source(preset: str, markdown: bool = False) -> str:
    """The works of a preset: authors and year, with a link where there is one."""
    return "; ".join(_cite(PAPERS[key].reference, markdown) for key in VARIANTS[preset].papers)


def row(preset: str, markdown: bool = False) -> Row:
    """The line of a preset."""
    return Row(
        preset,
        VARIANTS[preset].text,
        source(preset, markdown),
        parameters(preset),
        cost(preset),
        back_ends(preset),
        cached_decoding(preset),
        "yes" if is_causal(preset) else "no",
        ", ".join(limits(preset)) or "-",
    )


def plain_text() -> str:
    """All rows as paragraphs, one line a column: the table is too wide for a terminal."""
    width = max(map(len, COLUMNS.values()))
    paragraphs = []
    for preset in PRESETS:
        cells = {name: value for name, value in vars(row(preset)).items() if name != "preset"}
        lines = [f"  {COLUMNS[name].replace('`', '').ljust(width)}  {value}" for name, value in cells.items()]
        paragraphs.append("\n".join([preset, *lines]))
    return "\n\n".join([*paragraphs, LEGEND])


def markdown_table() -> str:
    """All rows as a Markdown table, formulas as code."""
    rows = []
    for preset in PRESETS:
        cells = vars(row(preset, markdown=True)).copy()
        for name in ("preset", "equation", "parameters"):
            if cells[name] != "none":
                cells[name] = f"`{cells[name]}`"
        rows.append(list(cells.values()))
    return table_text(list(COLUMNS.values()), rows)


def _cite(reference: str, markdown: bool) -> str:
    """``Authors 2025, [Title](link)`` to ``[Authors 2025](link)`` or to ``Authors 2025 (link)``."""
    found = re.match(r"(.*?\b\d{4}), (?:\[.*\]\((.*)\))?", reference)
    if found is None:
        raise ValueError(f"a reference must start with authors and year, got {reference!r}")
    authors, link = found.groups()
    if link is None:
        return authors
    return f"[{authors}]({link})" if markdown else f"{authors} ({link.replace('https://arxiv.org/abs/', 'arXiv:')})"
