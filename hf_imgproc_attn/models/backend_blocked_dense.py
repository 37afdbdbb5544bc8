"""Blocked attention's function written densely, for what its own backward cannot do: derivatives of derivatives,
forward-mode derivatives and the transforms of ``torch.func``. Memory is O(length * key_length).
"""

from __future__ import annotations

import torch

from .backend_blocked_passes import Call, Tensors
from .backend_blocked_plan import Plan
from .backend_reference import add_terms, filter_matrix
from .kernel_content import working_dtype
from .kernel_normalisation import Normalisation
from .kernel_position import position_logits


def dense_dropout_factors(plan: Plan, like: torch.Tensor) -> torch.Tensor:
    """What a call multiplies A with, put together densely.

    Args:
        plan: of the call, as :func:`make_plan` gives it.
        like: a tensor of the device and dtype that the call works in.

    Returns:
        ``[batch, heads, length, key_length]``, 0 or 1/(1 - p); 0 where a block does not look.
    """
    factors = like.new_zeros(plan.batch, plan.heads, plan.length, plan.key_length)
    for group in plan.groups():
        for block in plan.blocks():
            part = plan.dropout_factors(group, block, like).unflatten(0, group.shape)
            factors[group.batch, group.heads, block.start : block.stop, : block.keys] = part
    return factors


def dense_logits(call: Call, tensors: Tensors) -> torch.Tensor:
    """log K, in the dtype of query and key."""
    query, key = tensors.query, call.visibility.clean_keys(tensors.key)
    terms = [] if tensors.bias is None else [tensors.bias]
    if call.positions is not None:
        terms.append(position_logits(call.positions.with_parameters(*tensors.parameters), query.dtype))
    logits = torch.matmul(query, key.mT) * call.plan.scale
    return add_terms(logits, terms, call.visibility if call.ignores_row_constants else None)


def dense_matrix(call: Call, tensors: Tensors) -> torch.Tensor:
    """A, without dropout, in the dtype of query and key."""
    logits = dense_logits(call, tensors)
    return filter_matrix(logits, call.visibility, tensors.sinks, Normalisation(call.normalisation))


def dense_map(call: Call, tensors: Tensors) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A after dropout; keys and values of as many heads as queries, 0 where hidden; in working precision."""
    working, repeats = working_dtype(tensors.query.dtype), call.plan.heads // call.plan.key_heads
    query, key, value = (x.to(working) for x in tensors[:3])
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    key, value = call.visibility.clean_keys(key), call.visibility.clean_keys(value)
    matrix = dense_matrix(call, tensors._replace(query=query, key=key))
    if call.plan.dropout:
        matrix = matrix * dense_dropout_factors(call.plan, query.new_empty(0))
    return matrix, key, value


def dense_passes(call: Call, tensors: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    """The output and the streams side by side, as ``BlockedFilter`` returns them."""
    plan, booster, working, dtype = call.plan, call.booster, working_dtype(tensors.query.dtype), tensors.value.dtype
    query, key, value = (x.to(working) for x in tensors[:3])
    past = tensors.past
    repeats = plan.heads // plan.key_heads
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    shown = call.visibility.clean_keys
    own = value[:, :, max(plan.past, 0) :]
    matrix = dense_matrix(call, tensors._replace(query=query, key=key))
    if plan.dropout:
        matrix = matrix * dense_dropout_factors(plan, query.new_empty(0))
    smoothed = [torch.matmul(matrix, shown(value))]
    streams: list[torch.Tensor] = []
    for index, coefficients in enumerate(booster.streams[1:]):
        rows = own * coefficients[0]
        for weight, smooth in zip(coefficients[1:], smoothed, strict=False):
            rows = rows + weight * smooth if weight else rows
        streams.append(rows)
        if past is not None:
            width = value.shape[-1]
            rows = torch.cat((past[..., index * width : (index + 1) * width].to(working), rows), dim=2)
        smoothed.append(torch.matmul(matrix, shown(rows)))
    output = own * booster.output[0] if booster.output[0] else torch.zeros_like(smoothed[0])
    for weight, smooth in zip(booster.output[1:], smoothed, strict=False):
        output = output + weight * smooth if weight else output
    if not streams:
        return output.to(dtype), output.new_empty(*output.shape[:-1], 0)
    return output.to(dtype), torch.cat(streams, dim=-1)
