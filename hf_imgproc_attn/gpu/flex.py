"""The back-end ``flex``: PyTorch's FlexAttention, one call a booster pass, with any mask and bias.

On a CUDA device the calls are compiled to a fused kernel, with mask and bias looked up inside it: the fallback where
the Triton kernels refuse. On the CPU FlexAttention runs dense and forward only, which is enough to test it.
*Not measured* on a GPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from ..models.backend_call import FilterCall
from ..models.backend_sdpa import augment
from ..models.kernel_content import autocast_dtype, without_autocast

NO_STREAMS = "does not hand out the streams that a cache of boosted attention keeps"


def refuses(call: FilterCall) -> str | None:
    """Why FlexAttention cannot serve a call, as the rest of a sentence about it, or None if it can."""
    if call.streams.is_cached and call.is_boosted:
        return NO_STREAMS
    if call.dropout > 0.0:
        return f"drops nothing out, got dropout_p={call.dropout}"
    inputs = (call.query, call.key, call.value, call.visibility.bias)
    needs_gradient = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    if needs_gradient and call.query.device.type == "cpu":
        return "has no backward pass on the CPU"
    return None


def run(call: FilterCall) -> torch.Tensor:
    """Serve a call that is not refused: ``[batch, heads, length, d]`` in the value's dtype."""
    dtype = autocast_dtype(call.query)
    query, key, scale, bias = augment(call, dtype)
    _, value = call.repeated()
    if key.shape[1] != query.shape[1]:
        key = key.repeat_interleave(call.groups, dim=1)
    allowed = call.visibility.allowed(key.device)
    terms = [term for term in (bias, call.visibility.bias) if term is not None]
    hidden_rows = None if allowed is None else ~allowed.any(-1, keepdim=True)
    if allowed is not None and hidden_rows is not None:
        # A row of nothing but -inf has no softmax: such rows see everything here, and give 0 below.
        allowed = _four_axes(allowed | hidden_rows)
    attention, score = _attention(query.device.type), _score(allowed, [_four_axes(term) for term in terms])

    def attend(rows: torch.Tensor) -> torch.Tensor:
        with without_autocast(query.device.type):
            out = attention(query, key, rows.to(dtype), score_mod=score, scale=scale)
        return out if hidden_rows is None else out.masked_fill(hidden_rows, 0.0)

    return call.boost(attend, call.new_value, value).to(call.value.dtype)


def _four_axes(x: torch.Tensor) -> torch.Tensor:
    return x.view((1,) * (4 - x.ndim) + tuple(x.shape))


def _score(allowed: torch.Tensor | None, terms: list[torch.Tensor]) -> Callable[..., torch.Tensor] | None:
    """What FlexAttention does with each score: adds the terms, hides what may not be seen."""
    if allowed is None and not terms:
        return None

    def look_up(x: torch.Tensor, *place: torch.Tensor) -> torch.Tensor:
        return x[tuple(index * (size > 1) for index, size in zip(place, x.shape, strict=True))]

    def modify(score: torch.Tensor, b: Any, h: Any, i: Any, j: Any) -> torch.Tensor:
        for term in terms:
            score = score + look_up(term, b, h, i, j)
        return score if allowed is None else torch.where(look_up(allowed, b, h, i, j), score, float("-inf"))

    return modify


@cache
def _attention(device_type: str) -> Callable[..., torch.Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    if device_type == "cuda":
        compiled: Callable[..., torch.Tensor] = torch.compile(flex_attention, dynamic=False)
        return compiled

    def dense(*args: Any, **kwargs: Any) -> torch.Tensor:
        with warnings.catch_warnings():  # it advises to compile
            warnings.simplefilter("ignore")
            output: torch.Tensor = flex_attention(*args, **kwargs)
        return output

    return dense
