"""Blocked attention's function written densely, for what its own backward cannot do: derivatives of derivatives,
forward-mode derivatives and the transforms of ``torch.func``. Memory is O(length * key_length).
"""

from __future__ import annotations

import torch

from .backend_blocked_passes import Call, Tensors
from .backend_blocked_plan import Plan
from .kernel_content import working_dtype
from .kernel_position import position_logits
from .visibility import causal_mask, split_mask


def dropout_factors(plan: Plan, like: torch.Tensor) -> torch.Tensor:
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
            part = plan.kept(group, block, like).unflatten(0, group.shape)
            factors[group.batch, group.heads, block.start : block.stop, : block.keys] = part
    return factors


def _allowed(call: Call, device: torch.device) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """What may be seen, causality included, and what is added to the logits; each None if there is nothing."""
    plan = call.plan
    allowed, additive = (None, None) if call.mask is None else split_mask(call.mask)
    if plan.is_causal:
        causal = causal_mask(plan.length, plan.key_length, device)
        allowed = causal if allowed is None else allowed & causal
    return allowed, additive


def _filter_matrix(
    call: Call, tensors: Tensors, allowed: torch.Tensor | None, additive: torch.Tensor | None
) -> torch.Tensor:
    """A, without dropout, in the dtype of query and key; rows that see no key are 0, whatever they hold."""
    query, key = tensors.query, tensors.key
    if allowed is not None:
        query = query.masked_fill(~allowed.any(-1, keepdim=True), 0.0)
    logits = torch.matmul(query, key.mT) * call.plan.scale
    if call.positions is not None:
        logits = logits + position_logits(call.positions.with_parameters(*tensors.parameters), query.dtype)
    for term in (tensors.bias, additive):
        if term is not None:
            logits = logits + term.to(query.dtype)
    if allowed is None:
        return logits.softmax(-1)
    sees_something = allowed.any(-1, keepdim=True)
    return logits.masked_fill(~allowed & sees_something, float("-inf")).softmax(-1).masked_fill(~sees_something, 0.0)


def dense_passes(call: Call, tensors: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    """The output and the streams side by side, as ``BlockedFilter`` returns them."""
    plan, booster, work, dtype = call.plan, call.booster, working_dtype(tensors.query.dtype), tensors.value.dtype
    query, key, value = (x.to(work) for x in tensors[:3])
    past = tensors.past
    repeats = plan.heads // plan.key_heads
    query, key, value = query.to(work), key.to(work), value.to(work)
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    allowed, additive = _allowed(call, query.device)
    hidden = None if allowed is None else ~allowed.any(-2, keepdim=True).mT

    def shown(rows: torch.Tensor) -> torch.Tensor:
        """What stands at keys that no query sees, NaN perhaps, has no part."""
        return rows if hidden is None else rows.masked_fill(hidden, 0.0)

    own = value[:, :, max(plan.past, 0) :]
    matrix = _filter_matrix(call, tensors._replace(query=query, key=shown(key)), allowed, additive)
    if plan.dropout:
        matrix = matrix * dropout_factors(plan, query.new_empty(0))
    smoothed = [torch.matmul(matrix, shown(value))]
    streams: list[torch.Tensor] = []
    for index, coefficients in enumerate(booster.streams[1:]):
        rows = own * coefficients[0]
        for weight, smooth in zip(coefficients[1:], smoothed, strict=False):
            rows = rows + weight * smooth if weight else rows
        streams.append(rows)
        if past is not None:
            width = value.shape[-1]
            rows = torch.cat((past[..., index * width : (index + 1) * width].to(work), rows), dim=2)
        smoothed.append(torch.matmul(matrix, shown(rows)))
    output = own * booster.output[0] if booster.output[0] else torch.zeros_like(smoothed[0])
    for weight, smooth in zip(booster.output[1:], smoothed, strict=False):
        output = output + weight * smooth if weight else output
    if not streams:
        return output.to(dtype), output.new_empty(*output.shape[:-1], 0)
    return output.to(dtype), torch.cat(streams, dim=-1)
