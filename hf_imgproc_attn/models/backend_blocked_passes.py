"""Boosted attention block by block: every weight of A is computed as few times as the booster allows, none is kept.

A booster that is linear in its streams reads, with s_m = A x_m and x_0 = V,

    x_m = d_m V + sum_{j<m} c_mj s_j,     out = sum_m o_m s_m     (twicing: x_m = V - sum_{j<m} s_j, o_m = 1)

*Forward.* Where A is causal, row i of x_m needs rows <= i of s_0 .. s_{m-1} only, so one pass over the query blocks,
in order, computes the weights of a block once and multiplies them with all streams: k + 1 matrix products for k
streams instead of 2k. The same holds where all rows are one block. Otherwise there is one pass a stream.

*Backward*, G = dout, blocks in reverse order. T_m = A^T g_m is accumulated; with it

    g_m  = o_m G + sum_{m'>m} c_m'm T_m'                        complete for a block's rows when the block is reached
    D    = sum_m g_m . s_m                                      a number per row
    dA   = [g_0 .. g_{k-1}] [x_0 .. x_{k-1}]^T                  one product
    dS   = A o (dA - D 1^T)
    dV   = sum_m d_m T_m

2k + 3 products where one pass suffices. Saved are out, x_1, x_2, ... and the row log-sum-exp, from which the s_m
follow: memory is O(length), never O(length * key_length). Plain attention is the case k = 1 (FlashAttention-2's
backward, Dao 2023).

D is also the row sum of A o dA, if the rows of A sum to 1. They do not quite: recomputed from a rounded log-sum-exp at
logits of 1e4, they sum to 1 within 1e-3 only, and that error times all of dA would swamp dS = A o (dA - D) where one
key has all the weight and dA = D. The D of the s_m has no such error. The rounding itself is known, and a factor a row
on all g_m, and so on D, makes it good.

Weights of other normalisations are in ``backend_blocked_normalised``; a sink is one more key, of value 0, which
changes nothing but the log-sum-exp. This file computes forward; ``backend_blocked_backward`` is the other direction.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from .backend_blocked_hidden import KeyRuns, Span, is_moderate
from .backend_blocked_normalised import WEIGHTS
from .backend_blocked_plan import Block, Group, Plan, multiply
from .backend_blocked_positions import PositionTerm
from .backend_blocked_weights import KeyHeads, Weights, flat
from .boost_operators import BOOSTING, extra_streams
from .kernel_position import BlockedPositions
from .visibility import Visibility


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
    # One for V and one for each application of A; "learned" has two whatever its steps.
    units = torch.eye(max(steps, extra_streams(boosting, steps) + 1) + 1, dtype=torch.float64)
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
    visibility: Visibility
    """Without its bias, which is an input of its own."""
    largest_bias: torch.Tensor | None = None
    """The largest bias that each query sees, ``[batch or 1, heads or 1, length or 1, 1]``, or None without a bias."""
    positions: BlockedPositions | None = None
    """Of the position kernel, or None; its parameters are inputs of their own."""
    normalisation: str = "softmax"
    """A key of ``WEIGHTS``."""
    ignores_row_constants: bool = True
    """Whether a number that is added to a whole row of logits changes nothing."""
    runs: KeyRuns | None = None
    """Of the keys that no query sees, where these are few."""

    def weights(
        self,
        tensors: Tensors,
        like: torch.Tensor,
        needs_grad: tuple[bool, ...] = (),
        kind: type[Weights] | None = None,
    ) -> Weights:
        """The attention weights, block by block.

        Args:
            tensors: bias, sinks and parameters of the position kernel.
            like: a tensor of the device and dtype to work in.
            needs_grad: which parameters' gradients are wanted; none in the forward pass.
            kind: how weights are computed; None: as the normalisation says.
        """
        mask, runs = self.visibility.mask, None
        if mask is None and self.visibility.hidden is not None:
            mask, runs = self.visibility.keys, self.runs
            is_plain = self.positions is None and tensors.bias is None  # which may be NaN where a key is hidden
            if is_plain and runs is not None and runs.are_many(self.plan):
                runs = None
        terms = None if tensors.bias is None or self.largest_bias is None else (tensors.bias, self.largest_bias)
        positions = None
        if self.positions is not None:
            places = self.positions, tensors.parameters
            positions = PositionTerm(*places, self.plan, mask, like, needs_grad, exact=not self.ignores_row_constants)
        make = kind or WEIGHTS[self.normalisation]
        may_be_blind = self.visibility.blind is not None
        return make(self.plan, mask, terms, positions, like, tensors.sinks, runs, may_be_blind=may_be_blind)


class Tensors(NamedTuple):
    """What a call computes with, and may have gradients.

    query: ``[batch, heads, length, head_dim]``.
    key: ``[batch, key_heads, key_length, head_dim]``.
    value: ``[batch, key_heads, key_length, d]``.
    bias: added to the logits, with four axes, or None.
    past: x_1, x_2, ... of the earlier keys side by side, ``[batch, heads, past, (k - 1) * d]``, or None.
    sinks: ``[heads]``, the logit of one more key, or None.
    parameters: those of the position kernel.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    bias: torch.Tensor | None
    past: torch.Tensor | None
    sinks: torch.Tensor | None
    parameters: tuple[torch.Tensor, ...] = ()

    def aliases(self) -> Tensors:
        """The same as nodes of their own in autograd's graph, none of which was made of another."""
        query, key, value = (x.view_as(x) for x in self[:3])
        bias, past, sinks = (None if x is None else x.view_as(x) for x in (self.bias, self.past, self.sinks))
        return Tensors(query, key, value, bias, past, sinks, tuple(x.view_as(x) for x in self.parameters))


class Inputs:
    """All inputs in working precision, ``[pairs, ..., ...]``, and a group's rows of them.

    Args:
        call: what is computed.
        tensors: with what.
        streams: x_1, x_2, ... of the queries side by side, ``[batch, heads, length, (k - 1) * d]``.
        leaves_out: whether a group's blocks leave something out, so that no key before the first and after the
            last that its samples see is read, and hidden rows that are moderate numbers stay: their weights are 0.
        are_moderate: whether all rows are, where that is known.
    """

    def __init__(
        self,
        call: Call,
        tensors: Tensors,
        streams: torch.Tensor,
        *,
        leaves_out: bool = False,
        are_moderate: bool | None = None,
    ) -> None:
        plan, dtype = call.plan, torch.promote_types(tensors.query.dtype, torch.float32)
        self.plan, self._leaves_out = plan, leaves_out and not plan.dropout
        self._span: Span | None = None
        self.past, self.width = plan.past, tensors.value.shape[-1]
        self.key_heads = KeyHeads(plan.heads // plan.key_heads)
        self._all = tuple(flat(x, dtype) for x in (*tensors[:3], streams))
        self._past = None if tensors.past is None else flat(tensors.past, dtype)
        self._keeps_moderate = leaves_out and call.normalisation == "softmax" and tensors.query.device.type == "cpu"
        self.are_moderate = are_moderate
        """Whether hidden rows stay; None: nobody has asked."""
        self._hidden = self._runs = None
        hidden = call.visibility.hidden
        if hidden is not None:
            self._hidden = flat(hidden.expand(plan.batch, plan.heads, 1, plan.key_length), torch.bool).mT
            self._runs = call.runs

    def start(self, group: Group) -> None:
        """Turn to a group."""
        query, key, value, streams = self._all
        self.group = group
        self.query = query[group.pairs]
        self.key = self.key_heads.read(key, group)
        self.value = self.key_heads.read(value, group)
        self.own_value = self.value[:, self.past :]
        self.own = streams[group.pairs]
        """x_1, x_2, ... of the queries side by side, ``[pairs, length, (k - 1) * d]``: a view of what is saved."""
        self.all = self.own if self._past is None else torch.cat([self._past[group.pairs], self.own], dim=1)
        """The same of all keys, 0 where a key is hidden."""
        self._span, hidden = None, None if self._hidden is None else self._hidden[group.pairs]
        self.hidden = hidden
        if self._runs is not None and self._leaves_out:
            self._span = self._runs.span(group, self.plan.key_length)
        self.blocks = self.plan.blocks() if self._span is None else self.plan.blocks(self._span.first, self._span.stop)
        """The group's blocks, in order. A dropout mask belongs to a whole block, so that there nothing is left out."""
        self.is_full = self._hidden is None or (self._span is not None and not self._span.has_gaps)
        """Whether no key is hidden between the first and the last of the group's blocks."""
        if hidden is not None and not self.is_full and not self._stay():
            self.key, self.value = self._clean(self.key, hidden), self._clean(self.value, hidden)
            if self.own.shape[-1]:
                self.all = self._clean(self.all, hidden)

    def _stay(self) -> bool:
        """Whether hidden rows need not be made 0: neither they nor sums with weights overflow."""
        if self.are_moderate is None:
            given = [*self._all[:3], *([] if self._past is None else [self._past])]
            self.are_moderate = self._keeps_moderate and all(map(is_moderate, given))
        return self.are_moderate

    def _clean(self, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """A copy of ``[pairs, key_length, width]`` with 0 where a key is hidden."""
        if self._runs is None:
            return x.masked_fill(hidden, 0.0)
        x = x.clone()
        self._runs.fill_(x, self.group, 0.0)
        return x

    def clear_lost_(self, rows: torch.Tensor) -> None:
        """Make 0 of what is not finite in the queries' rows ``[pairs, length, width]`` whose own keys are hidden."""
        if self.hidden is None or self.are_moderate:
            return
        if self._runs is None:
            rows.masked_fill_(self.hidden[:, self.past :] & ~rows.isfinite(), 0.0)
            return
        for part in self._runs.parts(rows, self.group, self.past):
            part.masked_fill_(~part.isfinite(), 0.0)

    def columns(self, stream: int) -> slice:
        """Where x_1, x_2, ... stand side by side."""
        return slice((stream - 1) * self.width, stream * self.width)

    def copy_to_keys(self, stream: int, rows: slice) -> None:
        """Make rows of a stream, complete in ``own``, visible to the products."""
        if self.all is self.own:
            return
        keys = slice(self.past + rows.start, self.past + rows.stop)
        values, room = self.own[:, rows, self.columns(stream)], self.all[:, keys, self.columns(stream)]
        if self.hidden is not None and self._runs is None:
            values = values.masked_fill(self.hidden[:, keys], 0.0)
        room.copy_(values)
        if self._runs is not None:
            self._runs.fill_(room, self.group, 0.0, keys.start)


def combine(
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


@lru_cache
def passes_over_blocks(in_one: bool, num_streams: int) -> list[range]:
    """The streams of each pass over the blocks, in order: all in one pass, or one each.

    One pass does where no row needs a later row's streams: with a causal mask, or in a single block.
    """
    return [range(num_streams)] if in_one else [range(m, m + 1) for m in range(num_streams)]


class Computed(NamedTuple):
    """What the forward passes compute, all in working precision.

    output: ``[pairs, length, d]``.
    streams: x_1, x_2, ... of the queries side by side, ``[batch, heads, length, (k - 1) * d]``.
    row_sums: of each row of logits, ``[pairs, length, 2]``; see :meth:`Weights.compute`.
    are_moderate: see :class:`Inputs`; the tensors of the backward pass are the same.
    """

    output: torch.Tensor
    streams: torch.Tensor
    row_sums: torch.Tensor
    are_moderate: bool | None = None


def _fill_blind(booster: Recurrence, inputs: Inputs, output: torch.Tensor, blocks: list[Block]) -> None:
    """Write what the queries of a group have that are in none of its blocks: they see no key, and their s_m are 0."""
    blind = slice(0, blocks[0].start if blocks else inputs.plan.length)
    value = inputs.own_value[:, blind]
    output[:, blind] = value * booster.output[0] if booster.output[0] else 0.0
    for m, coefficients in enumerate(booster.streams[1:], start=1):
        inputs.own[:, blind, inputs.columns(m)] = value * coefficients[0] if coefficients[0] else 0.0


def forward_passes(call: Call, tensors: Tensors) -> Computed:
    """Compute output and streams block by block."""
    plan, booster = call.plan, call.booster
    width, num_streams = tensors.value.shape[-1], len(booster.streams)
    like = tensors.query.new_empty(0, dtype=torch.promote_types(tensors.query.dtype, torch.float32))
    streams = like.new_empty(plan.batch, plan.heads, plan.length, (num_streams - 1) * width)
    output, row_sums = (like.new_empty(plan.batch * plan.heads, plan.length, size) for size in (width, 2))
    weights = call.weights(tensors, like)
    inputs = Inputs(call, tensors, streams, leaves_out=True)
    for group in plan.groups():
        inputs.start(group)
        blocks, out, row_sum = inputs.blocks, output[group.pairs], row_sums[group.pairs]
        weights.start(group, inputs.query, inputs.key, is_full=inputs.is_full and call.visibility.mask is None)
        if not blocks or blocks[0].start:
            _fill_blind(booster, inputs, out, blocks)
        for steps in passes_over_blocks(plan.is_causal or plan.block_rows >= plan.length, num_streams):
            if steps.start:
                inputs.copy_to_keys(steps.start, slice(0, plan.length))
            for block in blocks:
                rows = block.rows
                if steps.start:
                    matrix, factor = weights.recompute(block, row_sum)
                else:
                    matrix, factor, row_sum[:, rows] = weights.compute(block)
                if plan.dropout:
                    matrix = matrix.mul_(plan.dropout_factors(group, block, like))
                for m in steps:
                    if m > steps.start:
                        inputs.copy_to_keys(m, rows)
                    rows_of_keys = inputs.all[..., inputs.columns(m)] if m else inputs.value
                    product = multiply(matrix, rows_of_keys[:, block.columns], by_onednn=plan.by_onednn)
                    common = (m, inputs.own_value[:, rows], product, factor)
                    for later in range(m + 1, num_streams):
                        combine(inputs.own[:, rows, inputs.columns(later)], booster.streams[later], *common)
                    combine(out[:, rows], booster.output, *common)
    return Computed(output, streams, row_sums, inputs.are_moderate)
