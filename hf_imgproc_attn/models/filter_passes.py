"""Boosted attention block by block: every weight of A is computed as few times as the booster allows, none is kept.

A booster that is linear in its streams reads, with s_m = A x_m and x_0 = V,

    x_m = d_m V + sum_{j<m} c_mj s_j,     out = sum_m o_m s_m     (twicing: x_m = V - sum_{j<m} s_j, o_m = 1)

*Forward.* Where A is causal, row i of x_m needs rows <= i of s_0 .. s_{m-1} only, so one pass over the query blocks,
in order, computes the weights of a block once and multiplies them with all streams: k + 1 matrix products for k
streams instead of 2k. The same holds where all rows are one block. Otherwise there is one pass a stream.

*Backward*, G = dout, blocks in reverse order. T_m = A^T g_m is accumulated; with it

    g_m  = o_m G + sum_{m'>m} c_m'm T_m'                        complete for a block's rows when the block is reached
    dA   = [g_0 .. g_{k-1}] [x_0 .. x_{k-1}]^T                  one product
    dS   = A o (dA - D),  D_i = G_i . out_i + sum_{m>=1} T_m,i . (x_m,i - d_m v_i)
    dV   = sum_m d_m T_m

2k + 3 products where one pass suffices. Saved are x_m, the output and the row log-sum-exp: memory is O(length), never
O(length * key_length). Plain attention is the case k = 1 (FlashAttention-2's backward, Dao 2023).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch

from .filter_blocks import LOG2_E, Buffer, Group, KeyHeads, Plan, Weights, rows_of
from .filter_boosting import BOOSTING
from .filter_kernels import working_dtype


class Recurrence(NamedTuple):
    """A linear booster: rows of coefficients on V, s_0, s_1, ...; one a stream x_m, and one of the output."""

    streams: tuple[tuple[float, ...], ...]
    output: tuple[float, ...]


@lru_cache
def recurrence(boosting: str, steps: int) -> Recurrence:
    """Read off a booster's coefficients by running it on unit vectors instead of streams.

    Args:
        boosting: key of ``BOOSTING``.
        steps: k >= 1.
    """
    units = torch.eye(steps + 1, dtype=torch.float64)
    streams: list[torch.Tensor] = []

    def attend(stream: torch.Tensor) -> torch.Tensor:
        streams.append(stream)
        return units[len(streams)]

    output = BOOSTING[boosting](attend, lambda index, rows: rows, units[0], units[0], steps)
    return Recurrence(tuple(tuple(stream.tolist()) for stream in streams), tuple(output.tolist()))


class Call(NamedTuple):
    """What the autograd function needs besides the tensors that have gradients."""

    plan: Plan
    booster: Recurrence
    mask: torch.Tensor | None
    hidden: torch.Tensor | None
    """Keys that no query sees, ``[batch or 1, heads or 1, 1, key_length or 1]``: whatever stands there is not read."""


class _GroupInputs:
    """A group's rows of all inputs, in working precision: ``[pairs, ..., ...]``."""

    def __init__(
        self,
        call: Call,
        group: Group,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        past: torch.Tensor | None,
        streams: torch.Tensor,
    ) -> None:
        plan, dtype = call.plan, working_dtype(query.dtype)
        self.key_heads = KeyHeads(plan, group, query.device)
        self.query = rows_of(query, group, dtype) * (plan.scale * LOG2_E)
        self.key = self.key_heads.read(key, dtype)
        value = self.key_heads.read(value, dtype)
        self.width = value.shape[-1]
        self.own = rows_of(streams, group, dtype)
        """x_1, x_2, ... of the queries side by side, ``[pairs, length, (k - 1) * d]``: a view of what is saved."""
        self.hidden = None
        if len(call.booster.streams) == 1:
            self.raw = value
        else:
            earlier = self.own[:, :0] if past is None else rows_of(past, group, dtype)
            self.raw = torch.cat([value, torch.cat([earlier, self.own], dim=1)], dim=-1)
        """x_0, x_1, ... of all keys side by side, ``[pairs, key_length, k * d]``."""
        self.streams = self.raw
        if call.hidden is not None:
            shape = (plan.batch, plan.heads, 1, plan.key_length)
            self.hidden = rows_of(call.hidden.expand(shape), group, torch.bool).mT
            self.key = self.key.masked_fill(self.hidden, 0.0)
            self.streams = self.raw.masked_fill(self.hidden, 0.0)

    def columns(self, stream: int) -> slice:
        """Where a stream stands among those side by side."""
        return slice(stream * self.width, (stream + 1) * self.width)

    def publish(self, stream: int, rows: slice, past: int) -> None:
        """Make rows of a stream, complete in ``own``, visible to the products."""
        keys = slice(past + rows.start, past + rows.stop)
        values = self.own[:, rows, self.columns(stream - 1)]
        if self.hidden is not None:
            values = values.masked_fill(self.hidden[:, keys], 0.0)
        self.streams[:, keys, self.columns(stream)] = values


def _passes(plan: Plan, num_streams: int) -> list[range]:
    """The streams of each pass over the blocks, in order."""
    if plan.is_causal or len(plan.blocks()) == 1:
        return [range(num_streams)]
    return [range(m, m + 1) for m in range(num_streams)]


class BlockedFilter(torch.autograd.Function):
    """``apply(query, key, value, bias, past, call)`` -> output, and x_1, x_2, ... of the queries side by side."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor | None,
        past: torch.Tensor | None,
        call: Call,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        plan, booster = call.plan, call.booster
        work, width, num_streams = working_dtype(query.dtype), value.shape[-1], len(booster.streams)
        shape = (plan.batch, plan.heads, plan.length)
        like = query.new_empty(0, dtype=work)
        output = like.new_zeros(*shape, width)
        streams = like.new_zeros(*shape, (num_streams - 1) * width)
        log_sums = like.new_empty(*shape, 1)
        weights = Weights(plan, call.mask, bias, like)
        blocks = plan.blocks()
        for group in plan.groups():
            inputs = _GroupInputs(call, group, query, key, value, past, streams)
            out, log_sum = rows_of(output, group, work), rows_of(log_sums, group, work)
            for m in range(1, num_streams):
                if booster.streams[m][0]:
                    own_value = inputs.raw[:, plan.past :, :width]
                    inputs.own[..., inputs.columns(m - 1)] = own_value * booster.streams[m][0]
            weights.start(group, inputs.query, inputs.key)
            factor: torch.Tensor | None
            for number, steps in enumerate(_passes(plan, num_streams)):
                if number:
                    inputs.publish(steps.start, slice(0, plan.length), plan.past)
                for block in blocks:
                    rows = slice(block.start, block.stop)
                    if number == 0:
                        matrix, factor, log_sum[:, rows] = weights.compute(block)
                    else:
                        matrix, factor = weights.recall(block, log_sum), None
                    if plan.dropout:
                        matrix = matrix.mul_(plan.kept(group, block, like))
                    for m in steps:
                        if m > steps.start:
                            inputs.publish(m, rows, plan.past)
                        smooth = torch.bmm(matrix, inputs.streams[:, : block.keys, inputs.columns(m)])
                        if factor is not None:
                            smooth.mul_(factor)
                        for later in range(m + 1, num_streams):
                            if booster.streams[later][m + 1]:
                                target = inputs.own[:, rows, inputs.columns(later - 1)]
                                target.add_(smooth, alpha=booster.streams[later][m + 1])
                        if booster.output[m + 1]:
                            out[:, rows].add_(smooth, alpha=booster.output[m + 1])
        output = output.to(value.dtype)
        ctx.call = call
        ctx.save_for_backward(query, key, value, bias, past, output, streams, log_sums)
        ctx.set_materialize_grads(False)
        return output, streams

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor | None, stream_grad: torch.Tensor | None) -> tuple[Any, ...]:
        with torch.autocast(ctx.saved_tensors[0].device.type, enabled=False):
            return _backward(ctx.call, ctx.saved_tensors, grad, stream_grad, ctx.needs_input_grad[3])


def _backward(
    call: Call,
    saved: tuple[Any, ...],
    grad: torch.Tensor | None,
    stream_grad: torch.Tensor | None,
    needs_bias_grad: bool,
) -> tuple[Any, ...]:
    query, key, value, bias, past, output, streams, log_sums = saved
    plan, booster = call.plan, call.booster
    work, width, num_streams = working_dtype(query.dtype), value.shape[-1], len(booster.streams)
    like = query.new_empty(0, dtype=work)
    if grad is None:
        grad = torch.zeros_like(output)
    query_grad = query.new_empty(query.shape, dtype=work)
    key_grad, value_grad = (x.new_zeros(x.shape, dtype=work) for x in (key, value))
    bias_grad = like.new_zeros(bias.shape) if needs_bias_grad else None
    past_grad = None if past is None else torch.empty_like(past, dtype=work)
    weights = Weights(plan, call.mask, bias, like)
    weight_grads = Buffer(like, weights.size)
    products = Buffer(like, plan.group_pairs * max(width, key.shape[-1]) * plan.key_length)
    blocks = plan.blocks()[::-1]
    passes = _passes(plan, num_streams)[::-1]
    for group in plan.groups():
        inputs = _GroupInputs(call, group, query, key, value, past, streams)
        pairs = inputs.query.shape[0]
        grad_rows, out_rows = rows_of(grad, group, work), rows_of(output, group, work)
        log_sum, d_query = rows_of(log_sums, group, work), rows_of(query_grad, group, work)
        # Transposed, [pairs, d, keys]: a product with A on the right is faster than one with A^T on the left.
        d_key = like.new_zeros(pairs, key.shape[-1], plan.key_length)
        totals = like.new_zeros(pairs, num_streams * width, plan.key_length)
        read = inputs.streams
        if stream_grad is not None:
            totals[:, width:, plan.past :] = rows_of(stream_grad, group, work).mT
            read = inputs.raw
        weights.start(group, inputs.query, inputs.key)
        for steps in passes:
            for block in blocks:
                rows, keys = slice(block.start, block.stop), slice(0, block.keys)
                own = slice(plan.past + block.start, plan.past + block.stop)
                matrix = weights.recall(block, log_sum)
                kept = plan.kept(group, block, like) if plan.dropout else None
                dropped = matrix if kept is None else matrix * kept
                smooth_grads = like.new_empty(pairs, block.stop - block.start, num_streams * width)
                for m in reversed(range(steps.start, num_streams)):
                    d_smooth = smooth_grads[..., inputs.columns(m)]
                    torch.mul(grad_rows[:, rows], booster.output[m + 1], out=d_smooth)
                    for later in range(m + 1, num_streams):
                        if booster.streams[later][m + 1]:
                            total = totals[:, inputs.columns(later), own].mT
                            d_smooth.add_(total, alpha=booster.streams[later][m + 1])
                    if m in steps:
                        part = products.view(pairs, width, block.keys)
                        totals[:, inputs.columns(m), keys] += torch.bmm(d_smooth.mT, dropped, out=part)
                if steps.start:
                    continue
                row_term = (grad_rows[:, rows] * out_rows[:, rows]).sum(-1, keepdim=True)
                for m in range(1, num_streams):
                    rest = read[:, own, inputs.columns(m)]
                    if booster.streams[m][0]:
                        rest = rest - read[:, own, :width] * booster.streams[m][0]
                    row_term += (totals[:, inputs.columns(m), own].mT * rest).sum(-1, keepdim=True)
                d_matrix = weight_grads.view(pairs, block.stop - block.start, block.keys)
                torch.bmm(smooth_grads, inputs.streams[:, keys].mT, out=d_matrix)
                if kept is not None:
                    d_matrix.mul_(kept)
                d_logits = d_matrix.sub_(row_term).mul_(matrix)
                d_query[:, rows] = torch.bmm(d_logits, inputs.key[:, keys])
                part = products.view(pairs, key.shape[-1], block.keys)
                d_key[..., keys] += torch.bmm(inputs.query[:, rows].mT, d_logits, out=part)
                if bias_grad is not None:
                    weights.add_to_bias(bias_grad, d_logits, block)
        inputs.key_heads.add(key_grad, d_key.mT)
        for m in range(num_streams):
            if booster.streams[m][0]:
                factor = booster.streams[m][0]
                # Of earlier keys only x_0 is a function of V here; the rest came in as streams.
                first = 0 if m == 0 else plan.past
                total = totals[:, inputs.columns(m), first:].mT
                inputs.key_heads.add(value_grad[:, :, first:], total if factor == 1.0 else total * factor)
        if past_grad is not None:
            rows_of(past_grad, group, work).copy_(totals[:, width:, : plan.past].mT)
    query_grad.mul_(plan.scale)
    key_grad.mul_(1.0 / LOG2_E)  # the queries above carried scale / log 2
    return (
        query_grad.to(query.dtype),
        key_grad.to(key.dtype),
        value_grad.to(value.dtype),
        None if bias_grad is None else bias_grad.to(bias.dtype),
        None if past_grad is None else past_grad.to(past.dtype),
        None,
    )
