"""Numbers that are not defined on what a model was shown, named: no dash in a table without its reason."""

from __future__ import annotations

import math
from collections.abc import Iterator

from .definitions import DEFINITIONS
from .report import HEAD_COLUMNS, LayerReport, Report

_PLACED = ("position_bandwidth",)
"""Need the places of tokens; that these are not known is said where it is found."""


def missing_numbers(report: Report) -> Iterator[str]:
    """What is not measured in some layers because it would divide by zero, and why.

    Args:
        report: of a look that has ended.
    """
    if report.special == 0:
        yield "weight on sinks, and the norm of their values: there are no class or register tokens"
    for name in HEAD_COLUMNS:
        if name in _PLACED or (report.special == 0 and name.startswith("sink")):
            continue
        layers = [layer for layer in report.layers if not _all_finite([getattr(head, name) for head in layer.heads])]
        if layers:
            yield f"{DEFINITIONS[name].title} of some heads in {_named(layers)}: it would divide by zero"
    for kind, words in (("shares", "kernel decomposition"), ("exact_shares", "exact kernel decomposition")):
        layers = [
            layer
            for layer in report.layers
            if not _all_finite([value for head in layer.heads for value in getattr(head, kind).values()])
        ]
        if layers:
            yield f"{words} of some heads in {_named(layers)}: their logits are the same for all keys"
    layers = [
        layer
        for layer in report.layers
        if not _all_finite([value for measured in layer.tokens.values() for value in measured])
    ]
    if layers:
        yield f"how alike tokens are at some places in {_named(layers)}: they are all zero there"


def _all_finite(values: list[float]) -> bool:
    return all(map(math.isfinite, values))


def _named(layers: list[LayerReport]) -> str:
    return f"{'layers' if len(layers) > 1 else 'layer'} {', '.join(str(layer.index) for layer in layers)}"
