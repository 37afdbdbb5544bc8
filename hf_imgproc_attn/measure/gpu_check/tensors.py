"""Filters on plain tensors: what goes in, what should come out, and how far off a result is.

The exact results follow from the formulas alone, densely and in float64 on the CPU; nothing of the package's models is
used for them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from ...functional import filter_attention
from ..benchmark.attention import Shape
from ..benchmark.methods import untied_features

Attend = Callable[["Inputs"], torch.Tensor]


@dataclass(frozen=True)
class Inputs:
    """Tensors of one filter.

    Attributes:
        query: ``[batch, heads, length, head_dim]``; key, value and gradient (of the output) have its shape.
        features: position columns of queries and keys, or None.
        bias: ``[1, heads, length, length]``, added to the logits, or None.
        mask: boolean ``[batch, 1, 1, length]``, True = visible, or None.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    gradient: torch.Tensor
    is_causal: bool
    features: tuple[torch.Tensor, torch.Tensor] | None = None
    bias: torch.Tensor | None = None
    mask: torch.Tensor | None = None

    def to(self, dtype: torch.dtype, device: str) -> Inputs:
        """Every floating tensor in a dtype, on a device, laid out as a model's projections leave them."""

        def move(x: torch.Tensor) -> torch.Tensor:
            return x.to(device, dtype).transpose(1, 2).contiguous().transpose(1, 2)

        return replace(
            self,
            query=move(self.query),
            key=move(self.key),
            value=move(self.value),
            gradient=move(self.gradient),
            features=None
            if self.features is None
            else (self.features[0].to(device, dtype), self.features[1].to(device, dtype)),
            bias=None if self.bias is None else self.bias.to(device, dtype),
            mask=None if self.mask is None else self.mask.to(device),
        )

    def with_leaves(self) -> tuple[Inputs, tuple[torch.Tensor, ...]]:
        """The same with query, key and value as leaves that want gradients."""
        leaves = tuple(x.detach().requires_grad_() for x in (self.query, self.key, self.value))
        return replace(self, query=leaves[0], key=leaves[1], value=leaves[2]), leaves


class Filter(NamedTuple):
    """A filter that is checked and timed.

    Attributes:
        steps: times that A is applied; 1: not boosted.
        positions: ``None``, ``"gaussian"``, ``"untied"`` (feature columns) or ``"bias"`` (ALiBi's slopes).
        masked: whether keys of the first batch row are hidden.
        products: least number of N x N matrix products, forward and backward (plain attention: 2 and 5), of the width
            of a head.
    """

    steps: int = 1
    positions: str | None = None
    masked: bool = False
    products: tuple[float, float] = (2.0, 5.0)


FILTERS: dict[str, Filter] = {
    "plain": Filter(),
    "twicing": Filter(steps=2, products=(3.0, 7.0)),
    "twicing, hidden keys": Filter(steps=2, masked=True, products=(3.0, 7.0)),
    "twicing, 3 steps": Filter(steps=3, products=(4.0, 9.0)),
    "bilateral untied": Filter(positions="untied", products=(3.0, 8.0)),
    "bilateral gaussian": Filter(positions="gaussian", products=(2.125, 5.375)),
    "bilateral untied twicing": Filter(steps=2, positions="untied", products=(4.0, 10.0)),
    "additive bias": Filter(positions="bias"),
}
"""Products of k steps: S, then k A r; backward S, k dA, dQ, dK, k - 1 H, dV. Columns widen S, dQ and dK."""


def draw(name: str, shape: Shape) -> Inputs:
    """Inputs of a filter in float64 on the CPU, of numbers that bfloat16 and float16 both hold exactly."""
    generator = torch.Generator().manual_seed(0)

    def representable(x: torch.Tensor) -> torch.Tensor:
        return x.bfloat16().half().double()

    query, key, value, gradient = (
        representable(torch.randn(shape.size, generator=generator, dtype=torch.float64)) for _ in range(4)
    )
    inputs = Inputs(query, key, value, gradient, shape.is_causal)
    batch, heads, length, _ = shape.size
    positions = FILTERS[name].positions
    if positions in ("gaussian", "untied"):
        left, right = (gaussian_features if positions == "gaussian" else untied_features)(query[:1])
        inputs = replace(inputs, features=(representable(left), representable(right)))
    elif positions == "bias":
        index = torch.arange(length, dtype=torch.float64)
        slopes = 2.0 ** -(1 + torch.arange(heads, dtype=torch.float64)) / 8
        bias = -slopes.view(1, heads, 1, 1) * (index.view(-1, 1) - index).abs()
        inputs = replace(inputs, bias=representable(bias))
    if FILTERS[name].masked:
        mask = torch.ones(batch, 1, 1, length, dtype=torch.bool)
        mask[0, ..., length - length // 3 :] = False
        inputs = replace(inputs, mask=mask)
    return inputs


def gaussian_features(query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns of a spatial Gaussian over the token index, 8 wide with padding; h_p is a quarter of the length.

    In units of h_p no number is above 4, which float16 holds at every length: 2 u_i u_j - u_j^2, u = i / h_p.
    """
    heads, length = query.shape[1], query.shape[2]
    place = (torch.arange(length, dtype=torch.float64) - (length - 1) / 2) / (length / 4)
    left, right = torch.stack((2 * place, -torch.ones_like(place)), -1), torch.stack((place, place.square()), -1)
    shape = (1, heads, length, 8)
    return tuple(torch.nn.functional.pad(columns, (0, 6)).expand(shape) for columns in (left, right))  # type: ignore[return-value]


def exact(name: str, inputs: Inputs) -> torch.Tensor:
    """The filter from its formula: A = softmax(q.k / sqrt(d) + a.b + bias), out = (I - (I - A)^steps) V."""
    logits = inputs.query @ inputs.key.mT * inputs.query.shape[-1] ** -0.5
    if inputs.features is not None:
        logits = logits + inputs.features[0] @ inputs.features[1].mT
    if inputs.bias is not None:
        logits = logits + inputs.bias
    if inputs.mask is not None:
        logits = logits.masked_fill(~inputs.mask, float("-inf"))
    if inputs.is_causal:
        later = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).triu(1)
        logits = logits.masked_fill(later, float("-inf"))
    weights = logits.softmax(-1)
    output, residual = torch.zeros_like(inputs.value), inputs.value
    for _ in range(FILTERS[name].steps):
        filtered = weights @ residual
        output, residual = output + filtered, residual - filtered
    return output


def attend(name: str, backend: str) -> Attend:
    """The filter by one of this package's back-ends."""
    steps = FILTERS[name].steps
    options: dict[str, Any] = {"backend": backend}
    if steps > 1:
        options |= {"boosting": "twicing", "boosting_steps": steps}

    def run(inputs: Inputs) -> torch.Tensor:
        left, right = inputs.features or (None, None)
        mask, is_causal = inputs.mask, inputs.is_causal
        if mask is not None and is_causal:
            length = mask.shape[-1]
            mask, is_causal = mask & torch.ones(length, length, dtype=torch.bool, device=mask.device).tril(), False
        return filter_attention(
            inputs.query,
            inputs.key,
            inputs.value,
            attn_mask=mask,
            is_causal=is_causal,
            position_bias=inputs.bias,
            query_features=left,
            key_features=right,
            **options,
        )

    return run


def results(run: Attend, inputs: Inputs, backward: bool = True) -> list[torch.Tensor]:
    """Output, then the gradients of query, key and value."""
    if not backward:
        with torch.no_grad():
            return [run(inputs)]
    inputs, leaves = inputs.with_leaves()
    output = run(inputs)
    return [output.detach(), *torch.autograd.grad(output, leaves, inputs.gradient)]


def relative_error(got: torch.Tensor, truth: torch.Tensor, least: float = 0.0) -> float:
    """Norm of the error over that of the truth, or over ``least`` if that is more; NaN stays NaN."""
    if got.device != truth.device:
        got = got.to(truth.device)
    got, truth = got.detach().double(), truth.detach().double()
    return float((got - truth).norm() / truth.norm().clamp(min=max(least, 1e-300)))
