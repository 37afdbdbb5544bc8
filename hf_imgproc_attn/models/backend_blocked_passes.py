"""Boosted attention block by block: every weight of A is computed as few times as the booster allows, none is kept.

A booster that is linear in its streams reads, with s_m = A x_m and x_0 = V,

    x_m = d_m V + sum_{j<m} c_mj s_j,     out = sum_m o_m s_m     (twicing: x_m = V - sum_{j<m} s_j, o_m = 1)

*Forward.* Where A is causal, row i of x_m needs rows <= i of s_0 .. s_{m-1} only, so one pass over the query blocks,
in order, computes the weights of a block once and multiplies them with all streams: k + 1 matrix products for k
streams instead of 2k. The same holds where all rows are one block. Otherwise there is one pass a stream.

*Backward*, G = dout, blocks in reverse order. T_m = A^T g_m is accumulated; with it

    g_m  = o_m G + sum_{m'>m} c_m'm T_m'                        complete for a block's rows when the block is reached
    dA   = [g_0 .. g_{k-1}] [x_0 .. x_{k-1}]^T                  one product
    dS   = A o (dA - (A o dA) 1)
    dV   = sum_m d_m T_m

2k + 3 products where one pass suffices. Saved are x_1, x_2, ... and the row log-sum-exp: memory is O(length), never
O(length * key_length). Plain attention is the case k = 1 (FlashAttention-2's backward, Dao 2023).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch

from .backend_blocked_plan import Group, Plan
from .backend_blocked_positions import PositionTerm
from .backend_blocked_weights import Buffer, KeyHeads, KeySums, Weights, flat
from .boost_operators import BOOSTING
from .kernel_content import working_dtype
from .kernel_position import BlockedPositions


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
    positions: BlockedPositions | None = None
    """Of the position kernel, or None; its parameters are inputs of their own."""

    def position_term(
        self, parameters: tuple[torch.Tensor, ...], like: torch.Tensor, needs_grad: tuple[bool, ...] = ()
    ) -> PositionTerm | None:
        """The position kernel's part in the blocks; arguments as in :class:`PositionTerm`."""
        if self.positions is None:
            return None
        return PositionTerm(self.positions, parameters, self.plan, like, needs_grad)


class _Inputs:
    """All inputs in working precision, ``[pairs, ..., ...]``, and a group's rows of them."""

    def __init__(
        self,
        call: Call,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        past: torch.Tensor | None,
        streams: torch.Tensor,
    ) -> None:
        plan, dtype = call.plan, working_dtype(query.dtype)
        self.past, self.width = plan.past, value.shape[-1]
        self.key_heads = KeyHeads(plan)
        self._all = tuple(flat(x, dtype) for x in (query, key, value, streams))
        self._past = None if past is None else flat(past, dtype)
        self._hidden = None
        if call.hidden is not None:
            shape = (plan.batch, plan.heads, 1, plan.key_length)
            self._hidden = flat(call.hidden.expand(shape), torch.bool).mT

    def start(self, group: Group) -> None:
        """Turn to a group."""
        query, key, value, streams = self._all
        self.query = query[group.pairs]
        self.key = self.key_heads.read(key, group)
        self.value = self.key_heads.read(value, group)
        self.own_value = self.value[:, self.past :]
        self.own = streams[group.pairs]
        """x_1, x_2, ... of the queries side by side, ``[pairs, length, (k - 1) * d]``: a view of what is saved."""
        self.all = self.own if self._past is None else torch.cat([self._past[group.pairs], self.own], dim=1)
        """The same of all keys, 0 where a key is hidden."""
        self.hidden = None
        if self._hidden is not None:
            self.hidden = self._hidden[group.pairs]
            self.key = self.key.masked_fill(self.hidden, 0.0)
            self.value = self.value.masked_fill(self.hidden, 0.0)
            if self.own.shape[-1]:
                self.all = self.all.masked_fill(self.hidden, 0.0)

    def columns(self, stream: int) -> slice:
        """Where x_1, x_2, ... stand side by side."""
        return slice((stream - 1) * self.width, stream * self.width)

    def stream(self, stream: int) -> torch.Tensor:
        """x_m of all keys, ``[pairs, key_length, d]``."""
        return self.all[..., self.columns(stream)] if stream else self.value

    def publish(self, stream: int, rows: slice) -> None:
        """Make rows of a stream, complete in ``own``, visible to the products."""
        if self.all is self.own:
            return
        keys = slice(self.past + rows.start, self.past + rows.stop)
        values = self.own[:, rows, self.columns(stream)]
        if self.hidden is not None:
            values = values.masked_fill(self.hidden[:, keys], 0.0)
        self.all[:, keys, self.columns(stream)] = values


def _combine(
    target: torch.Tensor,
    coefficients: tuple[float, ...],
    index: int,
    value: torch.Tensor,
    product: torch.Tensor,
    factor: torch.Tensor,
) -> None:
    """Add s_index = ``product * factor`` to a stream or the output; the first s_j of each brings the share of V."""
    share, weight = coefficients[0], coefficients[index + 1]
    if not weight:
        return
    if any(coefficients[1 : index + 1]):
        target.addcmul_(product, factor, value=weight)
    elif share:
        torch.addcmul(value if share == 1.0 else value * share, product, factor, value=weight, out=target)
    else:
        torch.mul(product, factor if weight == 1.0 else factor * weight, out=target)


def _passes(plan: Plan, num_streams: int) -> list[range]:
    """The streams of each pass over the blocks, in order."""
    if plan.is_causal or len(plan.blocks()) == 1:
        return [range(num_streams)]
    return [range(m, m + 1) for m in range(num_streams)]


class BlockedFilter(torch.autograd.Function):
    """``apply(query, key, value, bias, past, call, *parameters)`` -> output, and x_1, x_2, ... of the queries.

    The streams stand side by side; the parameters are those of the position kernel.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor | None,
        past: torch.Tensor | None,
        call: Call,
        *parameters: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        plan, booster = call.plan, call.booster
        work, width, num_streams = working_dtype(query.dtype), value.shape[-1], len(booster.streams)
        like = query.new_empty(0, dtype=work)
        streams = like.new_empty(plan.batch, plan.heads, plan.length, (num_streams - 1) * width)
        output, log_sums = (like.new_empty(plan.batch * plan.heads, plan.length, size) for size in (width, 1))
        weights = Weights(plan, call.mask, bias, call.position_term(parameters, like), like)
        one = like.new_ones(1)
        blocks = plan.blocks()
        inputs = _Inputs(call, query, key, value, past, streams)
        for group in plan.groups():
            inputs.start(group)
            out, log_sum = output[group.pairs], log_sums[group.pairs]
            weights.start(group, inputs.query, inputs.key)
            for steps in _passes(plan, num_streams):
                if steps.start:
                    inputs.publish(steps.start, slice(0, plan.length))
                for block in blocks:
                    rows = slice(block.start, block.stop)
                    if steps.start:
                        matrix, factor = weights.recall(block, log_sum), one
                    else:
                        matrix, factor, log_sum[:, rows] = weights.compute(block)
                    if plan.dropout:
                        matrix = matrix.mul_(plan.kept(group, block, like))
                    for m in steps:
                        if m > steps.start:
                            inputs.publish(m, rows)
                        product = torch.bmm(matrix, inputs.stream(m)[:, : block.keys])
                        common = (m, inputs.own_value[:, rows], product, factor)
                        for later in range(m + 1, num_streams):
                            _combine(inputs.own[:, rows, inputs.columns(later)], booster.streams[later], *common)
                        _combine(out[:, rows], booster.output, *common)
        ctx.call = call
        ctx.save_for_backward(query, key, value, bias, past, streams, log_sums, *parameters)
        ctx.set_materialize_grads(False)
        return output.to(value.dtype).unflatten(0, (plan.batch, plan.heads)), streams

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor | None, stream_grad: torch.Tensor | None) -> tuple[Any, ...]:
        saved = ctx.saved_tensors
        with torch.autocast(saved[0].device.type, enabled=False):
            return _backward(ctx.call, saved, grad, stream_grad, ctx.needs_input_grad)


def _backward(
    call: Call,
    saved: tuple[Any, ...],
    grad: torch.Tensor | None,
    stream_grad: torch.Tensor | None,
    needs_grad: tuple[bool, ...],
) -> tuple[Any, ...]:
    query, key, value, bias, past, streams, log_sums, *parameters = saved
    call = call._replace(plan=call.plan.backward)
    plan, booster = call.plan, call.booster
    work, width, num_streams = working_dtype(query.dtype), value.shape[-1], len(booster.streams)
    like = query.new_empty(0, dtype=work)
    if grad is None:
        grad = like.new_zeros(*query.shape[:3], width)
    inputs = _Inputs(call, query, key, value, past, streams)
    query_grad = query.new_empty(query.shape, dtype=work)
    key_grad, value_grad = (inputs.key_heads.total(x, work) for x in (key, value))
    bias_grad = like.new_zeros(bias.shape) if needs_grad[3] else None
    past_grad = None if past is None else torch.empty(past.shape, dtype=work, device=past.device)
    all_grads, stream_grads = flat(grad, work), None if stream_grad is None else flat(stream_grad, work)
    positions = call.position_term(tuple(parameters), like, needs_grad[6:])
    weights = Weights(plan, call.mask, bias, positions, like)
    weight_grads = Buffer(like, weights.size)
    blocks = plan.blocks()[::-1]
    passes = _passes(plan, num_streams)[::-1]
    scratch = Buffer(like, plan.group_pairs * plan.key_length * max(width, key.shape[-1]) if len(blocks) > 1 else 0)
    for group in plan.groups():
        inputs.start(group)
        pairs = inputs.query.shape[0]
        grad_rows, log_sum = all_grads[group.pairs], log_sums[group.pairs]
        d_query = query_grad.flatten(0, 1)[group.pairs]
        side_by_side = torch.cat([inputs.value, inputs.all], dim=-1) if num_streams > 1 else inputs.value
        d_key = KeySums(plan, pairs, key.shape[-1], scratch)
        totals = [KeySums(plan, pairs, width, scratch) for _ in range(num_streams)]
        if stream_grads is not None:
            for m in range(1, num_streams):
                totals[m].begin(stream_grads[group.pairs, :, inputs.columns(m)])
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
                    d_smooth = smooth_grads[..., m * width : (m + 1) * width]
                    first = grad_rows[:, rows]
                    if booster.output[m + 1] != 1.0:
                        first = first * booster.output[m + 1]
                    for later in range(m + 1, num_streams):
                        if booster.streams[later][m + 1]:
                            weight = booster.streams[later][m + 1]
                            first = torch.add(first, totals[later].rows(own), alpha=weight, out=d_smooth)
                    if first is not d_smooth:
                        d_smooth.copy_(first)
                    if m in steps:
                        totals[m].add(dropped, d_smooth)
                if steps.start:
                    continue
                d_matrix = weight_grads.view(*matrix.shape)
                torch.bmm(smooth_grads, side_by_side[:, keys].mT, out=d_matrix)
                if kept is not None:
                    d_matrix.mul_(kept)
                d_logits = weights.through_softmax(d_matrix, matrix)
                d_query[:, rows].baddbmm_(d_logits, inputs.key[:, keys], beta=0.0, alpha=plan.scale)
                d_key.add(d_logits, inputs.query[:, rows])
                if bias_grad is not None:
                    weights.add_to_bias(bias_grad, d_logits, block)
                weights.add_to_positions(d_logits, block)
        every, own = slice(0, plan.key_length), slice(plan.past, plan.key_length)
        inputs.key_heads.add(key_grad, d_key.rows(every).mul_(plan.scale), group)
        # Of earlier keys only x_0 is a function of V here; the rest came in as streams.
        d_value = totals[0].rows(every)
        for m in range(1, num_streams):
            if booster.streams[m][0]:
                d_value[:, own].add_(totals[m].rows(own), alpha=booster.streams[m][0])
            if past_grad is not None:
                earlier = totals[m].rows(slice(0, plan.past))
                past_grad.flatten(0, 1)[group.pairs, :, inputs.columns(m)] = earlier
        inputs.key_heads.add(value_grad, d_value, group)
    return (
        query_grad.to(query.dtype),
        key_grad.to(key.dtype),
        value_grad.to(value.dtype),
        None if bias_grad is None else bias_grad.to(bias.dtype),
        None if past_grad is None else past_grad.to(past.dtype),
        None,
        *_parameter_grads(parameters, positions),
    )


def _parameter_grads(parameters: list[torch.Tensor], positions: PositionTerm | None) -> list[torch.Tensor | None]:
    """The gradients of the position kernel's parameters, in their own dtypes."""
    gradients = [] if positions is None else positions.gradients
    return [
        None if gradient is None else gradient.to(parameter.dtype)
        for parameter, gradient in zip(parameters, gradients, strict=True)
    ]
