"""Boosters that look at single weights, block by block: every weight computed once in each direction, none kept.

These boosters finish row by row, so that a block of queries with all keys it sees is all that is needed at a time, and
memory is O(length). ``backend_blocked_rules`` says what each booster makes of a block's weights, and the gradients.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch

from .backend_blocked_dense import dense_map
from .backend_blocked_logits import LogitsGradients, no_streams
from .backend_blocked_passes import Call, Inputs, Tensors
from .backend_blocked_plan import Block, multiply
from .backend_blocked_robust import robust_by_pair, robust_gradients
from .backend_blocked_rules import Kept, Part, Rule, Sums, WeightsGrad, rule_of
from .backend_blocked_weights import Buffer, KeySums, Weights, flat
from .backend_blocked_whole import local_linear_by_pair, local_linear_gradients
from .backend_blocked_whole import suits as suits_pairs
from .boost_derivatives import differentiable_gradients
from .boost_weights import ByWeights, LocalLinear, Robust
from .kernel_content import working_dtype


class RowsCall(NamedTuple):
    """What the autograd function needs besides the tensors that have gradients."""

    call: Call
    by_weights: ByWeights
    """Its tensors are inputs of their own."""

    @property
    def rule(self) -> Rule:
        """The rule of the booster."""
        return rule_of(self.by_weights)

    def is_by_pair(self, tensors: Tensors) -> bool:
        """Whether the call is computed pair by pair."""
        is_served = not isinstance(self.by_weights, Robust) or self.by_weights.cutoff is None
        return is_served and suits_pairs(self.call, tensors)


class RowsFilter(torch.autograd.Function):
    """``apply(query, key, value, bias, own, sinks, call, *parameters)`` -> ``[batch, heads, length, d]``.

    ``own`` are the booster's rows, ``[batch, heads, length, width]``; the parameters are those of the position kernel.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor | None,
        own: torch.Tensor,
        sinks: torch.Tensor | None,
        rows_call: RowsCall,
        *parameters: torch.Tensor,
    ) -> torch.Tensor:
        tensors = Tensors(query, key, value, bias, None, sinks, parameters)
        kept = (_forward_by_pair if rows_call.is_by_pair(tensors) else _forward)(rows_call, tensors, own)
        ctx.call = rows_call
        ctx.save_for_backward(query, key, value, bias, own, sinks, *kept, *parameters)
        plan = rows_call.call.plan
        return kept.output.to(value.dtype).unflatten(0, (plan.batch, plan.heads))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        query, key, value, bias, own, sinks, output, row_sums, rows, *parameters = ctx.saved_tensors
        tensors, needs = Tensors(query, key, value, bias, None, sinks, tuple(parameters)), ctx.needs_input_grad
        if torch.is_grad_enabled():  # create_graph=True: the gradients are to be differentiated themselves
            apart, own = tensors.aliases(), own.view_as(own)
            inputs = (*apart[:4], own, apart.sinks, None, *apart.parameters)
            return differentiable_gradients([dense_rows(ctx.call, apart, own)], [grad], inputs, needs)
        kept = Kept(output, row_sums, rows)
        if ctx.call.is_by_pair(tensors):
            found = _backward_by_pair(ctx.call, tensors, own, kept, grad)
        else:
            found = _backward(ctx.call, tensors, own, kept, grad, needs)
        given = (query, key, value, bias, own, sinks, None, *parameters)
        return tuple(
            None if gradient is None or tensor is None else gradient.to(tensor.dtype)
            for gradient, tensor in zip(found, given, strict=True)
        )


def _forward_by_pair(rows_call: RowsCall, tensors: Tensors, own: torch.Tensor) -> Kept:
    if isinstance(rows_call.by_weights, Robust):
        return robust_by_pair(rows_call.by_weights, rows_call.call, tensors)
    return local_linear_by_pair(rows_call.call, tensors, own)


def _backward_by_pair(
    rows_call: RowsCall, tensors: Tensors, own: torch.Tensor, kept: Kept, grad: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    """Gradients in the order of the function's arguments."""
    if isinstance(rows_call.by_weights, Robust):
        found = robust_gradients(rows_call.by_weights, rows_call.call, tensors, kept, grad)
        return (*found, None, torch.zeros_like(own), None, None)
    d_query, d_key, d_value, d_own = local_linear_gradients(rows_call.call, tensors, own, kept, grad)
    return d_query, d_key, d_value, None, d_own, None, None


def _forward(rows_call: RowsCall, tensors: Tensors, own: torch.Tensor) -> Kept:
    """The output, and what else is kept."""
    call, plan, rule = rows_call.call, rows_call.call.plan, rows_call.rule
    like = tensors.query.new_empty(0, dtype=working_dtype(tensors.query.dtype))
    width = tensors.value.shape[-1]
    sizes = (width, 2, rule.kept(width))
    output, row_sums, kept = (like.new_empty(plan.batch * plan.heads, plan.length, size) for size in sizes)
    weights, inputs = (
        call.weights(tensors, like),
        Inputs(call, tensors, no_streams(call, like)),
    )
    own_rows, buffers = flat(own, like.dtype), [Buffer(like, weights.size * count) for count in rule.rooms]
    for group in plan.groups():
        inputs.start(group)
        weights.start(group, inputs.query, inputs.key)
        for block in plan.blocks():
            rows = block.rows
            matrix, factor, row_sums[group.pairs, rows] = weights.compute(block)
            if plan.dropout:
                matrix.mul_(plan.dropout_factors(group, block, like))
            mine = (own_rows[group.pairs, rows], kept[group.pairs, rows], like)
            output[group.pairs, rows] = rule.forward(_part(inputs, block, (matrix, factor), mine, buffers, rows_call))
    return Kept(output, row_sums, kept)


def _part(
    inputs: Inputs,
    block: Block,
    weights: tuple[torch.Tensor, torch.Tensor | None],
    mine: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    buffers: list[Buffer],
    rows_call: RowsCall,
) -> Part:
    (matrix, factor), call, counts = weights, rows_call.call, rows_call.rule.rooms
    key, value = inputs.key[:, : block.keys], inputs.value[:, : block.keys]
    is_whole = call.ignores_row_constants and not call.plan.dropout

    def room(number: int) -> torch.Tensor:
        return buffers[number].view(matrix.shape[0], counts[number] * matrix.shape[1], matrix.shape[2])

    return Part(matrix, factor, key, value, *mine, room, partial(multiply, by_onednn=call.plan.by_onednn), is_whole)


def _backward(
    rows_call: RowsCall,
    tensors: Tensors,
    own: torch.Tensor,
    found: Kept,
    grad: torch.Tensor,
    needs: tuple[bool, ...],
) -> tuple[torch.Tensor | None, ...]:
    """Gradients in the order of the function's arguments; ``found``: what is kept."""
    output, row_sums, kept = found
    rows_call = rows_call._replace(call=rows_call.call._replace(plan=rows_call.call.plan.backward))
    call, plan, rule = rows_call.call, rows_call.call.plan, rows_call.rule
    key, value = tensors.key, tensors.value
    like = key.new_empty(0, dtype=working_dtype(key.dtype))
    widths = key.shape[-1], value.shape[-1] + rule.has_columns
    scratch = Buffer(like, plan.group_pairs * plan.key_length * max(widths))
    found_of = LogitsGradients(call, tensors, (needs[3], needs[5], *needs[7:]), scratch)
    inputs, weights = found_of.inputs, found_of.weights
    buffers = [Buffer(like, weights.size * count) for count in rule.rooms]
    d_own, d_value = like.new_empty(own.shape), inputs.key_heads.total(value, like.dtype)
    if not plan.groups():
        d_value.zero_()
    grads, own_rows = flat(grad, like.dtype), flat(own, like.dtype)
    for group in plan.groups():
        found_of.start(group)
        pairs = inputs.query.shape[0]
        # Of products of unlike scale each has a sum of its own.
        by_rule, by_value = (KeySums(plan, pairs, width, scratch) for width in widths)
        for block in plan.blocks()[::-1]:
            rows = block.rows
            matrix, correction = weights.recompute(block, row_sums[group.pairs])
            factors = plan.dropout_factors(group, block, like) if plan.dropout else None
            matrix.mul_(correction)
            dropped = matrix if factors is None else matrix * factors
            mine = (own_rows[group.pairs, rows], kept[group.pairs, rows], output[group.pairs, rows])
            part = _part(inputs, block, (dropped, None), mine, buffers, rows_call)
            sums = Sums(by_rule, by_value, d_own.flatten(0, 1)[group.pairs, rows])
            found_grad = rule.backward(part, grads[group.pairs, rows], sums)
            d_logits, row_term = _logits_grad(weights, part, (matrix, factors), found_grad, correction)
            found_of.add(block, d_logits, row_term * correction, row_sums[group.pairs])
        all_keys = slice(0, plan.key_length)
        found_of.finish(by_rule.rows(all_keys))
        by_value_rows = by_value.rows(all_keys)
        if rule.has_columns:
            by_value_rows, columns = by_value_rows.split((value.shape[-1], 1), dim=-1)
            by_value_rows = by_value_rows.addcmul(inputs.value, columns, value=-1.0)
        inputs.key_heads.add(d_value, by_value_rows, group)
    return found_of.query, found_of.key, d_value, found_of.bias, d_own, found_of.sinks, None, *found_of.parameters()


def _logits_grad(
    weights: Weights,
    part: Part,
    undropped: tuple[torch.Tensor, torch.Tensor | None],
    found: WeightsGrad,
    correction: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of a block's logits, and the sums of A o dA of its rows; ``undropped``: A, and its dropout."""
    (matrix, factors), (d_matrix, shift, row_term) = undropped, found
    if part.is_whole:  # softmax takes numbers that rows have in common away again
        row_term = row_term - shift
    else:
        d_matrix.add_(shift)
    if factors is not None:
        d_matrix.mul_(factors)
    return weights.logits_grad_of(d_matrix, matrix, row_term, correction), row_term


# --------------------------------------------------------------------------------------------------------------------
# Derivatives of derivatives
# --------------------------------------------------------------------------------------------------------------------


def dense_rows(rows_call: RowsCall, tensors: Tensors, own: torch.Tensor) -> torch.Tensor:
    """The same function written densely, in memory O(length * key_length), for whatever differentiates it."""
    matrix, key, value = dense_map(rows_call.call, tensors)
    by_weights = rows_call.by_weights
    if isinstance(by_weights, LocalLinear):
        by_weights = LocalLinear(own.to(matrix.dtype))
    return by_weights.apply(matrix, value, key).to(tensors.value.dtype)
