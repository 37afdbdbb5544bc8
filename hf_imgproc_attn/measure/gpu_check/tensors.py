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
from ...models.backend_call import Booster, Content, FilterCall
from ...models.backend_table import run_filter
from ...models.kernel_position import GaussianPositions
from ...models.kernel_relative import AlibiPositions, BucketPositions
from ...models.visibility import attention_visibility
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
        parameter: t of a kernel of places, float32, or None: ``[heads, 1, 1]``, or a table ``[heads, 1, buckets]``.
            Tokens stand at 0, 1, 2, ...
        kept: boolean ``[batch, heads, length, length]``, the weights that dropout keeps, for :func:`exact`; or None.
        dropout: probability, of ``kept``.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    gradient: torch.Tensor
    is_causal: bool
    features: tuple[torch.Tensor, torch.Tensor] | None = None
    bias: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    parameter: torch.Tensor | None = None
    kept: torch.Tensor | None = None
    dropout: float = 0.0

    def to(self, dtype: torch.dtype, device: str) -> Inputs:
        """Every floating tensor in a dtype, on a device, laid out as a model's projections leave them.

        But for the parameter, which models keep in at least float32.
        """

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
            parameter=None
            if self.parameter is None
            else self.parameter.to(device, torch.promote_types(dtype, torch.float32)),
        )

    def with_leaves(self) -> tuple[Inputs, tuple[torch.Tensor, ...]]:
        """The same with query, key, value and, if there is one, the parameter as leaves that want gradients."""
        given = (self.query, self.key, self.value, *([] if self.parameter is None else [self.parameter]))
        query, key, value, *parameter = leaves = tuple(x.detach().requires_grad_() for x in given)
        return replace(self, query=query, key=key, value=value, parameter=parameter[0] if parameter else None), leaves


class Filter(NamedTuple):
    """A filter that is checked and timed.

    Attributes:
        steps: times that A is applied; 1: not boosted.
        positions: ``None``, ``"gaussian"``, ``"untied"`` (feature columns), ``"bias"`` (ALiBi's slopes), or a kernel
            that is computed from places, with a gradient of its parameter: one of :data:`BY_PLACE`.
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
    "twicing, Gaussian by place": Filter(steps=2, positions="gaussian by place", products=(3.0, 7.0)),
    "ALiBi by place": Filter(positions="alibi by place"),
    "twicing, buckets by place": Filter(steps=2, positions="buckets by place", products=(3.0, 7.0)),
}
"""Products of k steps: S, then k A r; backward S, k dA, dQ, dK, k - 1 H, dV. Columns widen S, dQ and dK."""


BY_PLACE = ("gaussian by place", "alibi by place", "buckets by place")
BOUNDARIES = (1, 2, 4, 8, 16, 32, 64)
"""The least distance of every bucket but the first; keys behind the query have buckets of their own."""


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
    elif positions in BY_PLACE:
        inputs = replace(inputs, parameter=place_parameter(positions, heads).double())
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


def place_parameter(kernel: str, heads: int) -> torch.Tensor:
    """t of :data:`BY_PLACE`, float32: bandwidths of 8, 16, ... places, slopes of 1/16, 1/32, ..., or a table."""
    head = torch.arange(heads, dtype=torch.float32).view(-1, 1, 1)
    if kernel == "gaussian by place":
        return 2.0 / 8.0**2 / 4.0**head
    if kernel == "alibi by place":
        return 2.0 ** -(4 + head)
    entry = torch.arange(2 * (len(BOUNDARIES) + 1), dtype=torch.float32)
    return torch.sin(entry + head).bfloat16().float()


def place_logits(kernel: str, parameter: torch.Tensor, length: int) -> torch.Tensor:
    """s(i, j) from the formulas, ``[heads, length, length]``."""
    place = torch.arange(length, dtype=parameter.dtype, device=parameter.device)
    offset = place - place.view(-1, 1)
    if kernel == "gaussian by place":
        return parameter * (-0.5 * offset.square())
    if kernel == "alibi by place":
        return -parameter * offset.abs()
    bucket = (offset > 0).long() * (len(BOUNDARIES) + 1)
    for boundary in BOUNDARIES:
        bucket = bucket + (offset.abs() >= boundary)
    return parameter[:, 0][:, bucket]


def by_place(name: str, inputs: Inputs) -> Any:
    """A filter's position kernel as this package's layers hand it to a back-end, or None."""
    kernel, parameter = FILTERS[name].positions, inputs.parameter
    if parameter is None:
        return None
    places = torch.arange(inputs.query.shape[-2], dtype=parameter.dtype, device=parameter.device).view(1, -1, 1)
    if kernel == "gaussian by place":
        return GaussianPositions(places, places, parameter, None, 8.0, True, True)
    if kernel == "alibi by place":
        return AlibiPositions(places, places, parameter, None, 1 / 16, inputs.is_causal, True)
    return BucketPositions(places, places, parameter, None, list(BOUNDARIES), True)


def exact(name: str, inputs: Inputs) -> torch.Tensor:
    """The filter from its formula: A = softmax(q.k / sqrt(d) + a.b + bias), out = (I - (I - A)^steps) V."""
    logits = inputs.query @ inputs.key.mT * inputs.query.shape[-1] ** -0.5
    if inputs.features is not None:
        logits = logits + inputs.features[0] @ inputs.features[1].mT
    if inputs.bias is not None:
        logits = logits + inputs.bias
    kernel = FILTERS[name].positions
    if kernel is not None and inputs.parameter is not None:
        logits = logits + place_logits(kernel, inputs.parameter, logits.shape[-1])
    if inputs.mask is not None:
        logits = logits.masked_fill(~inputs.mask, float("-inf"))
    if inputs.is_causal:
        later = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).triu(1)
        logits = logits.masked_fill(later, float("-inf"))
    weights = logits.softmax(-1)
    if inputs.kept is not None:
        weights = weights * inputs.kept / (1.0 - inputs.dropout)
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
        positions = by_place(name, inputs)
        if positions is not None:
            return run_filter(_call(inputs, positions, "twicing" if steps > 1 else "none"), backend)
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


def _call(inputs: Inputs, positions: Any, boosting: str) -> FilterCall:
    """A filter whose positions are no columns and no bias, which ``filter_attention`` has no argument for."""
    query, shape = inputs.query, (*inputs.query.shape[:3], inputs.key.shape[2])
    return FilterCall(
        query,
        inputs.key,
        inputs.value,
        Content("dot_product", query.shape[-1] ** -0.5),
        attention_visibility(inputs.mask, shape=shape, causal=inputs.is_causal),
        positions=(positions,),
        booster=Booster(boosting),
    )


def results(run: Attend, inputs: Inputs, backward: bool = True) -> list[torch.Tensor]:
    """Output, then the gradients of query, key, value and, if there is one, the parameter."""
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
