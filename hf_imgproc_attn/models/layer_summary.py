"""The numbers of a model's filters in natural units, layer by layer and head by head."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from .layer_filter import AttentionFilter
from .layer_parameters import bounded_log_bandwidth
from .spec_axes import KERNELS_WITH_BANDWIDTH

_CLASS_LOGITS = ("class_to", "class_from", "class_within")
_SINK = ("sink",)
_INVERSION = ("alpha", "beta")
_FEEDBACK = {"neutreno": ("lambda",), "pid": ("P", "I", "D")}


class FilterSummary(NamedTuple):
    """What the filters of a model hold; prints as a table.

    rows: one dictionary of plain numbers for each layer and head: ``layer``, ``head``, and what the layer has of
        ``h_y``, the content bandwidth, in units of the distance between queries and keys; ``h_p``, the position
        bandwidth, in tokens or patches for ``gaussian``, in units of the projected position vectors for ``untied``;
        ``class_to``, ``class_from``, ``class_within``, logits to, from and within the class token; ``gain``, the
        booster's gamma; ``alpha``, ``beta``, factors of ``inversion``; ``share``, the second map's; ``delta``, beta
        of ``delta`` where the token's part is 0; ``sink``, its logit; ``lambda`` or ``P``, ``I``, ``D``, factors of
        the feedback; ``buckets``, logits of the buckets of offsets, a list for each axis.
    learned: the names of those that are trained in some layer; others are as the configuration has them.
    """

    rows: list[dict[str, Any]]
    learned: list[str]

    def __str__(self) -> str:
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        titles = [name + "*" * (name in self.learned) for name in names]
        cells = [titles, *([_cell(row.get(name)) for name in names] for row in self.rows)]
        widths = [max(len(line[column]) for line in cells) for column in range(len(names))]
        padded = [[cell.rjust(width) for cell, width in zip(line, widths, strict=True)] for line in cells]
        lines = ["  ".join(line).rstrip() for line in padded]
        return "\n".join([*lines, "* learned"] if self.learned else lines)


def filter_summary(model: nn.Module) -> FilterSummary:
    """The numbers of all filters of a model, as they act: bandwidths inside their bounds.

    Args:
        model: any module that holds filters, a backbone or a model with a head.
    """
    rows: list[dict[str, Any]] = []
    learned: set[str] = set()
    for module in model.modules():
        if isinstance(module, AttentionFilter):
            rows += _rows(module)
            learned |= _learned(module)
    return FilterSummary(rows, sorted(learned))


@torch.no_grad()
def _rows(layer: AttentionFilter) -> list[dict[str, Any]]:
    """The rows of a layer, one a head."""
    values = dict(_values(layer))
    rows = []
    for head in range(layer.num_heads):
        numbers = {name: value[head].tolist() for name, value in values.items()}
        rows.append({"layer": layer.layer_idx, "head": head, **numbers})
    return rows


def _values(layer: AttentionFilter) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and values ``[heads]`` or ``[heads, axes, buckets]`` of a layer."""
    scalars, kernel = layer.scalar_bias(), layer.spec.position_kernel
    yield "h_y", _bandwidth(scalars.content_log_bandwidth, layer._content_bandwidths)
    if kernel in KERNELS_WITH_BANDWIDTH:
        yield "h_p", _bandwidth(scalars.position_log_bandwidth, layer.positions.bandwidths)
    if scalars.class_token is not None:
        yield from zip(_CLASS_LOGITS, scalars.class_token.unbind(-1), strict=True)
    if scalars.boosting_gain is not None:
        yield "gain", scalars.boosting_gain
    if scalars.inversion_gains is not None:
        yield from zip(_INVERSION, scalars.inversion_gains.unbind(-1), strict=True)
    if scalars.differential is not None:
        yield "share", scalars.differential
    if scalars.delta is not None:
        yield "delta", torch.tanh(scalars.delta)
    if scalars.sink is not None:
        yield "sink", scalars.sink
    if scalars.value_residual is not None:
        yield "lambda", scalars.value_residual.expand(layer.num_heads)
    names = _FEEDBACK.get(layer.spec.feedback, ()) if layer.layer_idx > 0 else ()
    if scalars.feedback_gains is not None:
        yield from zip(names, scalars.feedback_gains.unbind(-1), strict=True)
    else:
        fixed = layer._feedback_gains if names else []
        yield from ((name, torch.full((layer.num_heads,), gain)) for name, gain in zip(names, fixed, strict=True))
    if scalars.relative_buckets is not None:
        yield "buckets", scalars.relative_buckets


def _bandwidth(log_bandwidth: torch.Tensor | None, fixed: list[float]) -> torch.Tensor:
    """h of each head, ``[heads]``."""
    if log_bandwidth is None:
        return torch.tensor(fixed)
    return bounded_log_bandwidth(log_bandwidth, log_bandwidth.dtype).exp()


def _learned(layer: AttentionFilter) -> set[str]:
    """Names of the numbers of a layer that are parameters."""
    names = {
        "content_log_bandwidth": ("h_y",),
        "position_log_bandwidth": ("h_p",),
        "class_token": _CLASS_LOGITS,
        "relative_buckets": ("buckets",),
        "boosting_gain": ("gain",),
        "inversion_gains": _INVERSION,
        "sink": _SINK,
        "differential": ("share",),
        "delta": ("delta",),
        "value_residual": ("lambda",),
        "feedback_gains": _FEEDBACK.get(layer.spec.feedback, ()),
    }
    held = layer.scalar_bias()._asdict()
    return {name for parameter, value in held.items() if value is not None for name in names[parameter]}


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(f"{number:.2f}" for axis in value for number in axis)
    return f"{value:.3f}" if isinstance(value, float) else "" if value is None else str(value)
