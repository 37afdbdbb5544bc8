"""Boosters that are linear in V, pair by pair where a head's queries are one block: see ``backend_blocked_whole``.

The formulas are those of ``backend_blocked_passes``. A bias has to be one that all samples share.
"""

from __future__ import annotations

import torch

from .backend_blocked_passes import Call, Computed, Tensors, combine
from .backend_blocked_plan import PAIR_SCORES, PLAINLY
from .backend_blocked_weights import LOG2_E, flat
from .backend_blocked_whole import AFTER, Rooms, is_bare, product_of
from .backend_call import FilterCall, without_autocast
from .kernel_given import BiasPositions, FeaturePositions
from .kernel_position import Positions, UntiedPositions, position_logits


def suits(call: Call, tensors: Tensors) -> bool:
    """Whether a call is served here whose plan is by pairs."""
    plan, bias = call.plan, tensors.bias
    if not is_bare(call) or (plan.past and len(call.booster.streams) > 1):
        return False
    return bias is None or bias.shape == (1, plan.heads, plan.length, plan.key_length)


def as_shared_bias(call: FilterCall) -> FilterCall:
    """The same with positions that all samples share as one bias, made once, where it is short.

    Columns beside queries and keys would widen three products of every pair, and be copied for each.
    """
    query, is_softmax = call.query, call.ignores_row_constants and not call.is_sequential
    if query.shape[0] == 1 or call.groups > 1 or call.dropout or call.by_weights is not None or not is_softmax:
        return call
    is_short = query.device.type == "cpu" and query.shape[-2] * call.key.shape[-2] <= PAIR_SCORES
    if not is_short or not call.visibility.hides_nothing:
        return call
    terms: list[Positions] = []
    shape = (1, query.shape[1], query.shape[-2], call.key.shape[-2])
    for term in call.positions:
        if not isinstance(term, UntiedPositions | FeaturePositions):
            return call
        left, right = term[:2]
        if any(x.shape[0] > 1 and x.stride(0) for x in (left, right)):
            return call
        shared = type(term)(left[:1], right[:1], *term[2:])
        with without_autocast(query.device.type):  # columns may hold large numbers that nearly cancel
            terms.append(BiasPositions(position_logits(shared, query.dtype).expand(shape)))
    return call._replace(positions=tuple(terms))


def _biases(call: Call, tensors: Tensors, dtype: torch.dtype, *, turned: bool = False) -> list[torch.Tensor | None]:
    """The bias of each pair in units of log 2, where the largest of a row is 0."""
    heads: list[torch.Tensor | None] = [None] * call.plan.heads
    if tensors.bias is not None and call.largest_bias is not None:
        scaled = ((tensors.bias - call.largest_bias).to(dtype) * LOG2_E)[0]
        heads = list((scaled.mT if turned else scaled).contiguous())
    return heads * call.plan.batch


def forward_by_pair(call: Call, tensors: Tensors) -> Computed:
    """Output and streams, as ``forward_passes`` computes them."""
    plan, booster, linear, rooms = call.plan, call.booster, product_of(), Rooms(call, tensors)
    like, length, width, num_streams = rooms.like, plan.length, tensors.value.shape[-1], len(booster.streams)
    streams = like.new_empty(plan.batch, plan.heads, length, (num_streams - 1) * width)
    left, biases = like.new_empty(length, tensors.query.shape[-1]), _biases(call, tensors, like.dtype)
    given = (flat(x, like.dtype) for x in tensors[:3])
    results = (rooms.output, streams.flatten(0, 1), rooms.largest, rooms.total)
    everything = zip(*given, biases, *results, strict=True)
    for query, key, value, bias, out, own, most, mass in everything:
        matrix = linear(torch.mul(query, plan.scale * LOG2_E, out=left), key, *PLAINLY)
        if bias is not None:
            matrix.add_(bias)
        rooms.softmax_(matrix, most, mass)
        factor, parts = mass.reciprocal(), own.split(width, dim=-1) if num_streams > 1 else ()
        for m in range(num_streams):
            rows = parts[m - 1].contiguous() if m else value
            common = (m, value, linear(matrix, rows.mT, *PLAINLY), factor)
            for later in range(m + 1, num_streams):
                combine(parts[later - 1], booster.streams[later], *common)
            combine(out, booster.output, *common)
    return Computed(rooms.output, streams, rooms.row_sums())


class GradientsByPair:
    """The gradients of one call, as ``backend_blocked_backward.Gradients`` computes them.

    Args:
        call: what was computed.
        tensors: with what.
        computed: in the forward pass.
        needs_bias: whether the bias has a gradient.
    """

    def __init__(self, call: Call, tensors: Tensors, computed: Computed, *, needs_bias: bool) -> None:
        self.call, self.plan, self.booster, self.tensors, self.computed = (
            call,
            call.plan,
            call.booster,
            tensors,
            computed,
        )
        self.like, self.width = computed.output.new_empty(0), tensors.value.shape[-1]
        self.query, self.key, self.value = (self.like.new_empty(x.shape) for x in tensors[:3])
        self.past = self.sinks = None
        self._turned: torch.Tensor | None = None
        if tensors.bias is not None and needs_bias:
            self._turned = self.like.new_zeros(tensors.bias.mT.shape)

    @property
    def bias(self) -> torch.Tensor | None:
        """Of the bias, if it has a gradient."""
        return None if self._turned is None else self._turned.mT

    def parameters(self) -> list[torch.Tensor | None]:
        """Of a position kernel, which there is none of."""
        return []

    def run(self, grad: torch.Tensor | None, stream_grad: torch.Tensor | None) -> None:
        """Compute all gradients; arguments as of ``Gradients.run``."""
        plan, linear, dtype, computed = self.plan, product_of(), self.like.dtype, self.computed
        length, scale = plan.length, plan.scale
        if grad is None:
            grad = self.like.new_zeros(plan.batch, plan.heads, length, self.width)
        nothing: list[torch.Tensor | None] = [None] * len(computed.output)
        stream_grads = nothing if stream_grad is None else list(flat(stream_grad, dtype))
        totals = nothing if self._turned is None else list(self._turned[0]) * plan.batch
        left = self.like.new_empty(length, self.tensors.query.shape[-1])
        given = (flat(x, dtype) for x in (*self.tensors[:3], grad))
        gradients = (x.flatten(0, 1) for x in (self.query, self.key, self.value))
        kept = computed.output, computed.streams.flatten(0, 1), *computed.row_sums.unbind(-1)
        biases = _biases(self.call, self.tensors, dtype, turned=True)
        everything = zip(*given, biases, totals, stream_grads, *kept, *gradients, strict=True)
        for query, key, value, above, bias, total, of_streams, *found, d_query, d_key, d_value in everything:
            output, streams, log_sum, correction = found
            left = torch.mul(query, scale * LOG2_E, out=left)
            if bias is None:
                matrix = linear(key, left, -log_sum, *AFTER).exp2_()
            else:  # as in the forward pass: first the bias
                matrix = linear(key, left, *PLAINLY).add_(bias).sub_(log_sum).exp2_()
            rows = [value, *(x.contiguous() for x in streams.split(self.width, dim=-1) if x.shape[-1])]
            grads = self._row_grads(matrix, above, correction.unsqueeze(-1), of_streams, d_value)
            row_term = self._row_term(rows, output, grads)
            d_logits = linear(rows[0], grads[0], -row_term, *AFTER)
            for x, g in zip(rows[1:], grads[1:], strict=True):
                d_logits.add_(linear(x, g, *PLAINLY))
            d_logits.mul_(matrix)
            torch.mul(linear(d_logits, query.mT, *PLAINLY), scale, out=d_key)
            torch.mul(linear(key.mT.contiguous(), d_logits.mT, *PLAINLY).mT, scale, out=d_query)
            if total is not None:
                total.add_(d_logits)

    def _row_grads(
        self,
        matrix: torch.Tensor,
        above: torch.Tensor,
        correction: torch.Tensor,
        of_streams: torch.Tensor | None,
        d_value: torch.Tensor,
    ) -> list[torch.Tensor]:
        """g_0, g_1, ... with the correction, each ``[rows, d]``; V's gradient is written."""
        booster, linear = self.booster, product_of()
        num_streams = len(booster.streams)
        totals: list[torch.Tensor] = []  # T_m, the last stream's first
        grads: list[torch.Tensor] = []
        corrected = above * correction
        for m in reversed(range(num_streams)):
            weight = booster.output[m + 1]
            row_grad = corrected if weight == 1.0 else corrected * weight
            for later, of_later in zip(range(num_streams - 1, m, -1), totals, strict=True):
                weight = booster.streams[later][m + 1]
                if weight:
                    row_grad = torch.addcmul(row_grad, of_later, correction, value=weight)
            total = linear(matrix, row_grad.mT, *PLAINLY)
            if m and of_streams is not None:
                total.add_(of_streams[:, (m - 1) * self.width : m * self.width])
            totals.append(total)
            grads.append(row_grad)
        of_value = totals.pop()
        for total, coefficients in zip(totals[::-1], booster.streams[1:], strict=True):
            if coefficients[0]:
                of_value.add_(total, alpha=coefficients[0])
        d_value.copy_(of_value)
        return grads[::-1]

    def _row_term(self, rows: list[torch.Tensor], output: torch.Tensor, grads: list[torch.Tensor]) -> torch.Tensor:
        """D = sum_m g_m . s_m with its correction, ``[rows]``; the s_m follow from streams and output."""
        smoothed: list[torch.Tensor] = []
        total = output.new_zeros(len(output))
        results = zip([*rows[1:], output], (*self.booster.streams[1:], self.booster.output), grads, strict=True)
        for m, (part, coefficients, row_grad) in enumerate(results):
            share, *earlier, weight = coefficients[: m + 2]
            if share:
                part = torch.sub(part, rows[0][: len(part)], alpha=share)
            for factor, other in zip(earlier, smoothed, strict=True):
                if factor:
                    part = torch.sub(part, other, alpha=factor)
            smoothed.append(part if weight == 1.0 else part / weight)
            total.add_((row_grad * smoothed[-1]).sum(-1))
        return total
