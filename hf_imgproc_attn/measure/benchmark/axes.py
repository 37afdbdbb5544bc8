"""One attention with each value of the axes beside plain attention, on the same tensors.

What a value adds to attention itself: projections of its own (of gates, second maps, gains for each token) are matrix
products that the backbone's width decides, and are left out; their results are given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from ...models.backend_call import Booster, Content, Difference, FilterCall
from ...models.backend_table import run_filter
from ...models.boost_depth import mixed_value
from ...models.boost_gate import gated
from ...models.boost_weights import LocalLinear, Robust
from ...models.kernel_content import unit_vectors
from ...models.kernel_forget import ForgetPositions
from ...models.kernel_normalisation import Normalisation
from ...models.visibility import Visibility
from .attention import Shape
from .timing import Row, direction_rows

PLAIN = "plain"
SHAPES = (Shape(2, 12, 1024), Shape(16, 12, 197, is_causal=False))
"""Of the table in ``docs/which-filter.md``: GPT-2, and ViT-B at 224 pixels."""
QUICK = (Shape(1, 2, 24), Shape(1, 2, 9, is_causal=False))


class Tensors(NamedTuple):
    """What a value computes with, all with gradients.

    query: ``[batch, heads, length, head_dim]``.
    key: the same.
    value: the same.
    second_query: of another map, or the values of the first layer, or the logits of a gate, or
        the slopes of ``local_linear``, the same.
    second_key: the same.
    scalars: one a head, ``[heads, 1, 1]``.
    kept: c of ``forget``, or logits of ``delta``'s beta, ``[batch, heads, length, 1]``.
    is_causal: whether causality hides keys.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    second_query: torch.Tensor
    second_key: torch.Tensor
    scalars: torch.Tensor
    kept: torch.Tensor
    is_causal: bool

    def call(self, **changes: Any) -> FilterCall:
        """Plain attention, with changes."""
        length, width = self.query.shape[-2:]
        content, seen = Content("dot_product", width**-0.5), Visibility(length, length, self.is_causal)
        return FilterCall(self.query, self.key, self.value, content, seen)._replace(**changes)


def _changed(**changes: Any) -> Callable[[Tensors], torch.Tensor]:
    return lambda tensors: run_filter(tensors.call(**changes), "auto")


def _inversion(tensors: Tensors) -> torch.Tensor:
    gains = torch.stack((tensors.scalars, 1.0 - tensors.scalars))
    return run_filter(tensors.call(booster=Booster("inversion", 1, gains)), "auto")


def _dynamic_inversion(tensors: Tensors) -> torch.Tensor:
    gains = torch.stack((tensors.kept, 1.0 - tensors.kept))
    return run_filter(tensors.call(booster=Booster("dynamic_inversion", 1, gains)), "auto")


def _differential(tensors: Tensors) -> torch.Tensor:
    other = Difference(tensors.second_query, tensors.second_key, tensors.scalars)
    return run_filter(tensors.call(difference=other), "auto")


def _gated(tensors: Tensors) -> torch.Tensor:
    return gated(run_filter(tensors.call(), "auto"), tensors.second_query)


def _cosine(tensors: Tensors) -> torch.Tensor:
    query, key = unit_vectors(tensors.query), unit_vectors(tensors.key)
    return run_filter(tensors.call(query=query, key=key), "auto")


def _forget(tensors: Tensors) -> torch.Tensor:
    total = nn.functional.logsigmoid(tensors.kept).cumsum(-2)
    return run_filter(tensors.call(positions=(ForgetPositions(total, total),)), "auto")


def _value_residual(tensors: Tensors) -> torch.Tensor:
    value = mixed_value(tensors.value, tensors.second_key, tensors.scalars)
    return run_filter(tensors.call(value=value), "auto")


def _sink(tensors: Tensors) -> torch.Tensor:
    return run_filter(tensors.call(sinks=tensors.scalars.flatten()), "auto")


def _delta(tensors: Tensors) -> torch.Tensor:
    return run_filter(tensors.call(booster=Booster("delta", 1, torch.tanh(tensors.kept))), "auto")


def _local_linear(tensors: Tensors) -> torch.Tensor:
    return run_filter(tensors.call(by_weights=LocalLinear(tensors.second_query)), "auto")


VALUES: dict[str, Callable[[Tensors], torch.Tensor]] = {
    PLAIN: lambda tensors: nn.functional.scaled_dot_product_attention(*tensors[:3], is_causal=tensors.is_causal),
    "twicing": _changed(booster=Booster("twicing", 2)),
    "inversion": _inversion,
    "dynamic_inversion": _dynamic_inversion,
    "exclusive": _changed(booster=Booster("exclusive", 1)),
    "differential": _differential,
    "local_linear": _local_linear,
    "robust": _changed(by_weights=Robust.of(3)),
    "delta": _delta,
    "sink": _sink,
    "sigmoid": _changed(normalisation=Normalisation("sigmoid")),
    "softpick": _changed(normalisation=Normalisation("softpick")),
    "sinkhorn": _changed(normalisation=Normalisation("sinkhorn")),
    "elementwise": _gated,
    "value_residual": _value_residual,
    "cosine": _cosine,
    "forget": _forget,
}
"""Value of an axis -> what it computes of :class:`Tensors`."""
ONLY_CAUSAL, NEVER_CAUSAL = ("forget", "delta"), ("sinkhorn",)


def run_axes(shape: Shape, *, budget: float, say: Callable[[str], None] = print) -> Iterator[Row]:
    """Time all values on one shape.

    Args:
        shape: of the comparison.
        budget: seconds for all rounds of a direction.
        say: told what is being timed.
    """
    generator = torch.Generator().manual_seed(0)
    sizes = [shape.size] * 5 + [(shape.heads, 1, 1), (*shape.size[:3], 1)]
    leaves = [torch.randn(size, generator=generator).requires_grad_() for size in sizes]
    query, key, value, second_query, second_key, scalars, kept = leaves
    tensors = Tensors(query, key, value, second_query, second_key, scalars, kept, shape.is_causal)
    gradient = torch.randn(shape.size, generator=generator)
    left_out = NEVER_CAUSAL if shape.is_causal else ONLY_CAUSAL
    attentions = {name: partial(value, tensors) for name, value in VALUES.items() if name not in left_out}
    place = ("axes", shape.name(torch.float32), shape.length)
    yield from direction_rows(place, attentions, PLAIN, leaves, gradient, budget=budget, say=say)
