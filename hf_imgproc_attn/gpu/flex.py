"""The back-end ``flex``: PyTorch's FlexAttention, one call a booster pass, with any mask and bias.

On a CUDA device the calls are compiled to a fused kernel. Mask and bias are looked up inside it, and position kernels
of places (Gaussian, ALiBi, buckets) are computed inside it, so that no bias of length x key_length is formed. On the
CPU FlexAttention runs dense and forward only, which is enough to test it.
*Not measured* on a GPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch

from ..models.backend_call import FilterCall, autocast_dtype, without_autocast
from ..models.backend_sdpa import augment
from ..models.kernel_blocks import DistanceKernel
from ..models.kernel_position import BlockedPositions
from ..models.visibility import Visibility

NO_STREAMS = "does not hand out the streams that a cache of boosted attention keeps"


def refuses(call: FilterCall) -> str | None:
    """Why FlexAttention cannot serve a call, as the rest of a sentence about it, or None if it can."""
    if call.streams.is_cached and call.is_boosted:
        return NO_STREAMS
    if call.dropout > 0.0:
        return f"drops nothing out, got dropout_p={call.dropout}"
    needs_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in _tensors(call))
    if needs_gradient and call.query.device.type == "cpu":
        return "has no backward pass on the CPU"
    return None


def _tensors(x: Any) -> Iterator[torch.Tensor]:
    """All tensors of a call, however deep."""
    if isinstance(x, torch.Tensor):
        yield x
    elif isinstance(x, tuple):
        for part in x:
            yield from _tensors(part)


def run(call: FilterCall) -> torch.Tensor:
    """Serve a call that is not refused: ``[batch, heads, length, d]`` in the value's dtype."""
    dtype = autocast_dtype(call.query)
    by_place, rest = call.split_positions()
    query, key, scale, bias = augment(rest, dtype)
    _, value = call.repeated()
    if key.shape[1] != query.shape[1]:
        key = key.repeat_interleave(call.groups, dim=1)
    if call.visibility.bias is not None:
        bias = call.visibility.bias if bias is None else bias + call.visibility.bias
    # A number a row changes no softmax, and a large one would leave the products no digits.
    terms = [] if bias is None else [bias - call.visibility.largest_seen(bias)]
    seen, hidden_rows = visible_places(call.visibility, key.device)
    score = _score(seen, terms, None if by_place is None else place_score(by_place))
    attention = _attention(query.device.type)

    def attend(rows: torch.Tensor) -> torch.Tensor:
        with without_autocast(query.device.type):
            out = attention(query, key, rows.to(dtype), score_mod=score, scale=scale)
        return out if hidden_rows is None else out.masked_fill(hidden_rows, 0.0)

    return call.boost(attend, call.new_value, value).to(call.value.dtype)


def _four_axes(x: torch.Tensor) -> torch.Tensor:
    return x.view((1,) * (4 - x.ndim) + tuple(x.shape))


Place = Callable[[Any, Any, Any, Any], torch.Tensor]
"""(sample, head, query, key) to a number or a boolean."""


def _look_up(x: torch.Tensor, *index: Any) -> torch.Tensor:
    """An entry of a tensor with four axes, some of which may be 1."""
    return x[tuple(at * (size > 1) for at, size in zip(index, x.shape, strict=True))]


def visible_places(visibility: Visibility, device: torch.device) -> tuple[Place | None, torch.Tensor | None]:
    """Whether a query sees a key, as FlexAttention asks it, and the queries that see none (``[..., length, 1]``).

    None stands for "all" and for "no query". Padding and causality are told from the places: no mask of
    length x key_length is formed. A row of nothing but -inf has no softmax, so that queries which see nothing see
    everything here; their output has to be set to 0.
    """
    if visibility.hides_nothing:
        return None, None
    past = visibility.key_length - visibility.length
    if visibility.hides_only_padding:
        keys = visibility.keys
        if keys is None:
            return lambda b, h, i, j: j <= i + past, None
        some = keys.long().cumsum(-1).mT[..., past:, :] > 0 if visibility.causal else keys.any(-1, keepdim=True)
        hidden_rows = ~some

        def see(b: Any, h: Any, i: Any, j: Any) -> torch.Tensor:
            seen = _look_up(keys, b, h, i, j)
            if visibility.causal:
                seen = seen & (j <= i + past)
            return seen | _look_up(hidden_rows, b, h, i, j)

        return see, hidden_rows
    allowed = visibility.allowed(device)
    if allowed is None:
        return None, None
    hidden_rows = ~allowed.any(-1, keepdim=True)
    every = _four_axes(allowed | hidden_rows)
    return lambda b, h, i, j: _look_up(every, b, h, i, j), hidden_rows


def place_score(positions: BlockedPositions) -> Place:
    """A position kernel as FlexAttention computes it: from the places of one query and one key, inside the kernel.

    Args:
        positions: Gaussian, ALiBi or relative buckets; see ``models.kernel_blocks`` for the formulas.
    """
    kernel, (parameter, *class_logits) = positions.block_kernel(), positions.parameters()
    new, everywhere = positions.coordinates, positions.key_coordinates
    axes, several, several_keys = new.shape[-1], int(new.shape[0] > 1), int(everywhere.shape[0] > 1)
    count = 0 if positions.class_tokens is None else positions.class_tokens.num_tokens

    def offset(b: Any, i: Any, j: Any, axis: int) -> torch.Tensor:
        return everywhere[b * several_keys, j, axis] - new[b * several, i, axis]

    def distance(b: Any, h: Any, i: Any, j: Any) -> torch.Tensor:
        total = offset(b, i, j, 0) ** 2
        for axis in range(1, axes):
            total = total + offset(b, i, j, axis) ** 2
        is_squared = isinstance(kernel, DistanceKernel) and kernel.squared
        return parameter.flatten()[h] * (total * -0.5 if is_squared else -total.sqrt())

    def buckets(b: Any, h: Any, i: Any, j: Any) -> torch.Tensor:
        total = parameter[h, 0, bucket_of(offset(b, i, j, 0), kernel)]
        for axis in range(1, axes):
            total = total + parameter[h, axis, bucket_of(offset(b, i, j, axis), kernel)]
        return total

    on_grid = distance if isinstance(kernel, DistanceKernel) else buckets
    if not count:
        return on_grid
    (scalars,) = class_logits

    def with_class_tokens(b: Any, h: Any, i: Any, j: Any) -> torch.Tensor:
        from_class = torch.where(j < count, scalars[h, 2], scalars[h, 1])
        from_grid = torch.where(j < count, scalars[h, 0], on_grid(b, h, i, j))
        return torch.where(i < count, from_class, from_grid)

    return with_class_tokens


def bucket_of(offset: torch.Tensor, kernel: Any) -> torch.Tensor:
    """``kernel_relative.relative_buckets`` of one offset, in comparisons that a kernel can be compiled of."""
    distance = offset.abs() if kernel.bidirectional else (-offset).clamp(min=0)
    behind = len(kernel.boundaries) + 1 if kernel.bidirectional else 0
    bucket = (offset > 0).long() * behind
    for boundary in kernel.boundaries:
        bucket = bucket + (distance >= boundary).long()
    return bucket


def _score(seen: Place | None, terms: list[torch.Tensor], place: Place | None) -> Callable[..., torch.Tensor] | None:
    """What FlexAttention does with each score: adds the terms, hides what may not be seen."""
    if seen is None and not terms and place is None:
        return None

    def modify(score: torch.Tensor, b: Any, h: Any, i: Any, j: Any) -> torch.Tensor:
        for term in terms:
            score = score + _look_up(term, b, h, i, j)
        if place is not None:
            score = score + place(b, h, i, j)
        return score if seen is None else torch.where(seen(b, h, i, j), score, float("-inf"))

    return modify


@cache
def _attention(device_type: str) -> Callable[..., torch.Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    if device_type == "cuda":
        compiled: Callable[..., torch.Tensor] = torch.compile(flex_attention, dynamic=False)
        return compiled

    def dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        with warnings.catch_warnings():  # it advises to compile
            warnings.simplefilter("ignore")
            # It refuses leaves that require a gradient on the CPU, even under no_grad; here none is wanted.
            output: torch.Tensor = flex_attention(query.detach(), key.detach(), value.detach(), **kwargs)
        return output

    return dense
