"""A filter some rows at a time: its logits and its weights, without a matrix of length x length.

The rows of a call are a call themselves, so that the dense reference computes them: whatever it knows of kernels,
masks and normalisations, the lens knows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from ..models.backend_blocked import column_scales
from ..models.backend_call import Booster, Difference, FilterCall
from ..models.backend_reference import delta_system, filter_logits, filter_matrix
from ..models.boost_delta import DenseDelta
from ..models.boost_operators import BOOSTING, keep_rows
from ..models.boost_weights import ByWeights, LocalLinear, tilted
from ..models.cache_streams import NO_STREAMS
from ..models.kernel_content import class_token_logits, working_dtype
from ..models.kernel_forget import ForgetPositions
from ..models.kernel_given import BiasPositions, FeaturePositions
from ..models.kernel_normalisation import Normalisation
from ..models.kernel_position import Positions, UntiedPositions
from ..models.visibility import Visibility

BLOCK_SCORES = 2**22
"""Scores that are held at a time, over samples and heads: 16 MiB in float32."""


class Rows(NamedTuple):
    """Some query rows of a filter.

    start, stop: the rows.
    keys: how many keys, from the first on, they may see.
    logits: log K + const_i, ``[batch, heads, rows, keys]``.
    weights: A, of the same shape; its rows sum to 1, or with sinks, ``sigmoid`` and ``softpick`` to something else.
    allowed: boolean, broadcastable to the same shape, or None where everything is visible.
    """

    start: int
    stop: int
    keys: int
    logits: torch.Tensor
    weights: torch.Tensor
    allowed: torch.Tensor | None


def filter_rows(call: FilterCall, scores: int = BLOCK_SCORES) -> Iterator[Rows]:
    """All rows of a filter in order, as many at a time as ``scores`` allows.

    Args:
        call: queries ``[batch, heads, length, head_dim]``, as many as keys.
        scores: the most scores to hold at a time; at least one row is.
    """
    batch, heads, length, _ = call.query.shape
    step = max(scores // max(batch * heads * call.key.shape[-2], 1), 1)
    normalisation, scales = call.normalisation, None
    if normalisation.name == "sinkhorn":  # columns are scaled too: a softmax with a number for each key
        normalisation, scales = Normalisation(), column_scales(call).unsqueeze(-2)
    for start in range(0, length, step):
        stop = min(start + step, length)
        part = rows_of(call, start, stop)
        logits = filter_logits(part)
        scaled = logits if scales is None else logits + scales.to(logits.dtype)
        weights = filter_matrix(scaled, part.visibility, part.sinks, normalisation)
        yield Rows(start, stop, part.key.shape[-2], logits, weights, part.visibility.allowed(logits.device))


def rows_of(call: FilterCall, start: int, stop: int) -> FilterCall:
    """The call of the query rows ``start:stop`` alone, not boosted, with the keys that they may see.

    Positions become a bias of these rows.
    """
    keys = call.key.shape[-2] - call.query.shape[-2] + stop if call.visibility.causal else call.key.shape[-2]
    query, scale = call.query[..., start:stop, :], call.content.scale
    if isinstance(scale, torch.Tensor) and scale.ndim > 2 and scale.shape[-2] == call.query.shape[-2] > 1:
        scale = scale[..., start:stop, :]
    dtype = working_dtype(query.dtype)
    positions = tuple(BiasPositions(position_rows(term, start, stop, keys, dtype)) for term in call.positions)
    return call._replace(
        query=query,
        key=call.key[..., :keys, :],
        value=call.value[..., :keys, :],
        content=call.content._replace(scale=scale),
        visibility=_visibility_rows(call.visibility, start, stop, keys),
        positions=positions,
        booster=call.booster._replace(name="none"),
        by_weights=None,
        difference=None,
        dropout=0.0,
        streams=NO_STREAMS,
        own_value=None,
    )


def _cut_each(visible: Visibility, cut: Callable[[torch.Tensor | None], torch.Tensor | None]) -> Visibility:
    return visible._replace(
        keys=cut(visible.keys),
        mask=cut(visible.mask),
        bias=cut(visible.bias),
        hidden=cut(visible.hidden),
        blind=cut(visible.blind),
        dense=cut(visible.dense),
    )


def _visibility_rows(visible: Visibility, start: int, stop: int, keys: int) -> Visibility:
    def cut(x: torch.Tensor | None) -> torch.Tensor | None:
        if x is None:
            return None
        x = x if x.shape[-1] == 1 else x[..., :keys]
        return x if x.shape[-2] == 1 else x[..., start:stop, :]

    return _cut_each(visible, cut)._replace(length=stop - start, key_length=keys)


def position_rows(term: Positions, start: int, stop: int, keys: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows ``start:stop`` of a position kernel's logits, ``[batch or 1, heads or 1, rows or 1, keys or 1]``."""
    part: Positions
    if isinstance(term, BiasPositions):
        bias = term.bias if term.bias.shape[-1] == 1 else term.bias[..., :keys]
        return (bias if bias.shape[-2] == 1 else bias[..., start:stop, :]).to(dtype)
    if isinstance(term, FeaturePositions):
        part = FeaturePositions(term.query_features[..., start:stop, :], term.key_features[..., :keys, :])
    elif isinstance(term, ForgetPositions):
        part = ForgetPositions(term.query[..., start:stop, :], term.key[..., :keys, :])
    elif isinstance(term, UntiedPositions):
        part = term._replace(query=term.query[..., start:stop, :], key=term.key[..., :keys, :], class_tokens=None)
    else:  # functions of places
        part = term._replace(  # type: ignore[attr-defined]
            coordinates=term.coordinates[..., start:stop, :],  # type: ignore[attr-defined]
            key_coordinates=term.key_coordinates[..., :keys, :],  # type: ignore[attr-defined]
            class_tokens=None,
        )
    logits = part.grid_logits(dtype)
    if term.class_tokens is None:
        return logits
    count, class_logits, _ = term.class_tokens
    bias = class_token_logits(class_logits.to(dtype), stop, keys, count)[..., start:, :]
    is_class = (torch.arange(start, stop, device=logits.device).view(-1, 1) < count) | (
        torch.arange(keys, device=logits.device).view(1, -1) < count
    )
    return logits.masked_fill(is_class, 0.0) + bias


def apply_filter_by_rows(
    call: FilterCall, columns: torch.Tensor, *, transposed: bool = False, scores: int = BLOCK_SCORES
) -> torch.Tensor:
    """A times columns, or its transpose times columns, ``[batch, heads, length, d]``, in linear memory."""
    result = torch.zeros_like(columns)
    for rows in filter_rows(call, scores):
        weights = rows.weights.to(columns.dtype)
        if transposed:
            result[..., : rows.keys, :] += weights.mT @ columns[..., rows.start : rows.stop, :]
        else:
            result[..., rows.start : rows.stop, :] = weights @ columns[..., : rows.keys, :]
    return result


def apply_operator_by_rows(
    call: FilterCall, columns: torch.Tensor, *, transposed: bool = False, scores: int = BLOCK_SCORES
) -> torch.Tensor:
    """What multiplies V, p(A), times columns ``[batch, heads, length, d]``; the transpose of p(A) is p of A's.

    Of ``robust``, which is no operator, what it makes of the columns; transposed A itself. Of ``differential`` A is
    the first map, and p(A) what is left of it without the second.
    """
    if call.difference is not None:
        first, second = (
            apply_filter_by_rows(part, columns, transposed=transposed, scores=scores)
            for part in call.maps()
            if part is not None
        )
        return first - call.difference.share.to(columns.dtype) * second
    name, steps, gain = call.booster
    if call.is_sequential:
        return _delta_by_rows(call, columns, transposed, scores)
    if call.by_weights is not None:
        return _by_weights_by_rows(call, call.by_weights, columns, transposed, scores)

    def attend(rows: torch.Tensor) -> torch.Tensor:
        return apply_filter_by_rows(call, rows, transposed=transposed, scores=scores)

    return BOOSTING[name](attend, keep_rows, columns, columns, steps, None if gain is None else gain.to(columns.dtype))


def _system(call: FilterCall, rows: slice) -> DenseDelta:
    """The system of ``delta`` of some rows."""
    part, gain = rows_of(call, rows.start, rows.stop), call.booster.gain
    if gain is not None and gain.shape[-2] > 1:
        gain = gain[..., rows, :]
    return delta_system(filter_logits(part), part._replace(booster=Booster("delta", 1, gain)), places=rows)


def _delta_by_rows(call: FilterCall, columns: torch.Tensor, transposed: bool, scores: int) -> torch.Tensor:
    """A (I + beta A')^-1 times columns, or its transpose: rows in order, or from the last to the first."""
    batch, heads, length, _ = call.query.shape
    step, seen = max(scores // max(batch * heads * call.key.shape[-2], 1), 1), call.visibility
    blocks = [slice(start, min(start + step, length)) for start in range(0, length, step)]
    if not transposed:
        solved = torch.zeros_like(columns)
        for rows in blocks:
            solved[..., rows, :] = _system(call, rows).solve(columns[..., rows, :], solved)
        return apply_filter_by_rows(call, seen.clean_keys(solved), scores=scores)
    solved = seen.clean_keys(apply_filter_by_rows(call, columns, transposed=True, scores=scores)).clone()
    for rows in blocks[::-1]:
        weights = _system(call, rows).weights().to(columns.dtype)
        own = weights[..., rows].mT
        solved[..., rows, :] = torch.linalg.solve_triangular(own, solved[..., rows, :], upper=True, unitriangular=True)
        solved[..., : rows.start, :] -= weights[..., : rows.start].mT @ solved[..., rows, :]
    return seen.clean_keys(solved)


def _by_weights_by_rows(
    call: FilterCall, by_weights: ByWeights, columns: torch.Tensor, transposed: bool, scores: int
) -> torch.Tensor:
    result, key = torch.zeros_like(columns), call.repeated()[0].to(columns.dtype)
    for rows in filter_rows(call, scores):
        weights, seen = rows.weights.to(columns.dtype), key[..., : rows.keys, :]
        mine = by_weights.of_rows(slice(rows.start, rows.stop))
        if not transposed:
            result[..., rows.start : rows.stop, :] = mine.apply(weights, columns[..., : rows.keys, :], seen)
            continue
        operator = tilted(weights, mine.slope, seen) if isinstance(mine, LocalLinear) else weights
        result[..., : rows.keys, :] += operator.mT @ columns[..., rows.start : rows.stop, :]
    return result


def has_operator(call: FilterCall) -> bool:
    """Whether what multiplies V is not A alone."""
    return call.is_boosted or call.difference is not None


def some_samples(call: FilterCall, samples: slice) -> FilterCall:
    """The call of some rows of the batch."""
    batch = call.query.shape[0]

    def cut(x: torch.Tensor | None) -> torch.Tensor | None:
        return x if x is None or x.shape[0] != batch else x[samples]

    scale = call.content.scale
    if isinstance(scale, torch.Tensor) and scale.ndim == 4:
        scale = scale if scale.shape[0] == 1 else scale[samples]
    return call._replace(
        query=call.query[samples],
        key=call.key[samples],
        value=call.value[samples],
        content=call.content._replace(scale=scale),
        visibility=_cut_each(call.visibility, cut),
        positions=tuple(_samples_of(term, batch, samples) for term in call.positions),
        streams=NO_STREAMS,
        own_value=cut(call.own_value),
        booster=call.booster._replace(gain=_gain_of(call, samples)),
        by_weights=None if call.by_weights is None else call.by_weights.of_heads(samples, slice(None)),
        difference=difference_of(call, samples, slice(None)),
    )


def difference_of(call: FilterCall, samples: slice, heads: slice) -> Difference | None:
    """The second map of some samples and query heads, or None where there is none."""
    if call.difference is None:
        return None
    query, key, share = call.difference
    return Difference(query[samples, heads], key[samples, heads], share[heads])


def _gain_of(call: FilterCall, samples: slice) -> torch.Tensor | None:
    """Gains of some samples, where they have some for each: ``[2, batch, heads, length, 1]``, of ``delta`` one."""
    gain, axes = call.booster.gain, 4 if call.is_sequential else 5
    if gain is None or gain.ndim < axes or gain.shape[-4] != call.query.shape[0]:
        return gain
    return gain[..., samples, :, :, :]


def _samples_of(term: Positions, batch: int, samples: slice) -> Positions:
    axes = ("bias", "query_features", "key_features", "query", "key", "coordinates", "key_coordinates")
    held = {name: getattr(term, name) for name in axes if hasattr(term, name)}
    cut = {name: x if x.shape[0] != batch else x[samples] for name, x in held.items()}
    replaced: Positions = term._replace(**cut)  # type: ignore[attr-defined]
    return replaced
