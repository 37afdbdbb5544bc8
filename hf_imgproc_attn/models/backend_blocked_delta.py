"""``delta`` block by block: every weight computed once in each direction, none kept, a triangular solve in each block.

With A' the weights over the keys before the query's own, alpha_i = a_ii and A = diag(alpha) + diag(1 - alpha) A'

    s = A' u,    u = v - beta s,    out = alpha u + (1 - alpha) s

so that A' u is the only product. Of a block of rows, with the keys of earlier blocks and those of its own,

    s = A'_earlier u_earlier + A'_own u_own,    (I + beta A'_own) u_own = v - beta A'_earlier u_earlier

a unit lower triangular system. *Backward*, from the last block to the first, with G = dout, h = (1 - alpha) G and
T = A'^T ds summed over later blocks,

    (I + A'_own^T beta) du = alpha G + T + A'_own^T h,    ds = h - beta du,    dv = du,    dbeta_i = -du_i . s_i
    dl_ij = a'_ij (ds_i . u_j - ds_i . s_i - e_i),    dl_ii = e_i = alpha_i (1 - alpha_i) G_i . (u_i - s_i)

2 products forward and 5 backward, as plain attention, beside what is done inside the blocks. alpha is the logistic
function of the own logit minus the log-sum-exp of those before, so that neither alpha nor 1 - alpha loses digits. One
mask of dropout multiplies a' and alpha. Saved are u, s and the log-sum-exp: memory is O(length).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from .backend_blocked_dense import dense_dropout_factors, dense_logits
from .backend_blocked_passes import Call, Inputs, Tensors
from .backend_blocked_plan import Block
from .backend_blocked_weights import Buffer, KeySums, Weights, flat
from .backend_call import FilterCall, is_transformed, without_autocast
from .backend_reference import filter_matrix
from .boost_delta import DenseDelta, hidden_rows, strictly_before
from .boost_derivatives import differentiable_gradients
from .cache_streams import boost_stream
from .kernel_content import CONTENT_COLUMNS
from .kernel_normalisation import Normalisation
from .kernel_position import BlockedPositions


def refuses(call: FilterCall) -> str | None:
    """Why blocks cannot serve a call of ``delta``, as the rest of a sentence about them, or None if they can."""
    if call.content.softcap is not None or call.normalisation.name != "softmax":
        return call.own_softmax
    by_place = [term for term in call.positions if isinstance(term, BlockedPositions)]
    if call.sinks is not None and (len(by_place) > 1 or CONTENT_COLUMNS[call.content.kernel] is not None):
        return "has columns that lack a number a row, which these weights depend on"
    length, key_length = call.query.shape[-2], call.key.shape[-2]
    if not call.visibility.causal and key_length > 1:
        return "solves for rows in order, and takes masks that are known to be causal"
    if length != key_length and (call.streams.keeps_places_apart or not call.streams.is_cached):
        return "needs the streams of earlier keys"
    return None


class EarlierWeights(Weights):
    """A', block by block, and the logits of the queries' own tokens."""

    own: torch.Tensor
    """Of the block that was computed last, in units of log 2, ``[pairs, rows, 1]``."""

    def _logits(self, block: Block) -> torch.Tensor:
        scores = super()._logits(block)
        own = scores[:, :, block.keys - (block.stop - block.start) :].diagonal(dim1=1, dim2=2)
        self.own = own.unsqueeze(-1).clone()
        own.fill_(float("-inf"))
        return scores

    def compute(self, block: Block) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As of the parent; with a sink every row has a log-sum-exp."""
        scores = self._logits(block)
        largest = scores.amax(-1, keepdim=True)
        sinks = None if self.sinks is None else self._sink_logits(self.sinks)
        if sinks is not None:
            largest = torch.maximum(largest, sinks)
        alone = largest == float("-inf")
        largest.masked_fill_(alone, 0.0)
        total = scores.sub_(largest).exp2_().sum(-1, keepdim=True)
        if sinks is not None:
            total.add_(torch.exp2(sinks - largest))
        total.masked_fill_(alone, float("inf"))
        factor, log_sum = total.reciprocal(), total.log2_().add_(largest)
        correction = (log_sum - largest).exp2_().mul_(factor).masked_fill_(alone, 1.0)
        return scores, factor, torch.cat((log_sum, correction), dim=-1)

    def shares(self, log_sum: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """alpha and 1 - alpha of the block that was computed last, ``[pairs, rows, 1]``.

        Args:
            log_sum: of its rows, infinite where there is no earlier key, ``[pairs, rows, 1]``.
        """
        gap = self.own - log_sum.masked_fill(log_sum == float("inf"), float("-inf"))
        gap = gap.masked_fill_(self.own == float("-inf"), float("-inf")).mul_(math.log(2.0))
        return torch.sigmoid(gap), torch.sigmoid(-gap)


def _earlier_weights(
    call: Call, tensors: Tensors, like: torch.Tensor, needs_grad: tuple[bool, ...] = ()
) -> EarlierWeights:
    weights = call.weights(tensors, like, needs_grad, EarlierWeights)
    if not isinstance(weights, EarlierWeights):
        raise TypeError(f"weights must be EarlierWeights, got {type(weights).__name__}")
    return weights


class Known(NamedTuple):
    """What the forward pass computes, in working precision.

    output: ``[pairs, length, d]``.
    rows: u, ``[batch, heads, length, d]``.
    smooth: s, ``[pairs, length, d]``.
    row_sums: see :meth:`Weights.compute`, ``[pairs, length, 2]``.
    """

    output: torch.Tensor
    rows: torch.Tensor
    smooth: torch.Tensor
    row_sums: torch.Tensor


@torch.compiler.disable  # as the other blocks
def run(call: Call, given: FilterCall) -> torch.Tensor:
    """``[batch, heads, length, d]`` in the value's dtype; stores u.

    Args:
        call: how it is cut.
        given: plain inner products, and the booster with its beta.
    """
    query, key, value, plan = given.query, given.key, given.value, call.plan
    past = given.streams.earlier(boost_stream(1), given.new_value) if plan.past else None
    if plan.past and (past is None or past.shape[-2] != plan.past):
        raise ValueError(
            f"delta lacks the rows of {plan.past} earlier keys, got {0 if past is None else past.shape[-2]}"
        )
    shape = (plan.batch, plan.heads, plan.length, 1)
    working = torch.promote_types(query.dtype, torch.float32)
    gain = given.booster.gain
    rate = query.new_ones((), dtype=working) if gain is None else gain.to(working)
    parameters = () if call.positions is None else call.positions.parameters()
    tensors = Tensors(query, key, value, given.visibility.bias, past, given.sinks, parameters)
    with without_autocast(query.device.type):
        rate = rate.expand(shape)
        if is_transformed((*tensors[:6], rate, *parameters)):
            output, rows = dense_delta(call, tensors, rate)
        else:
            output, rows = DeltaFilter.apply(*tensors[:6], rate, call, *parameters)
    if given.streams.is_cached:
        given.streams.append(boost_stream(1), rows.to(value.dtype))
    return output


class DeltaFilter(torch.autograd.Function):
    """``apply(query, key, value, bias, past, sinks, rate, call, *parameters)`` -> output, and u of the queries.

    ``rate`` is beta, ``[batch, heads, length, 1]``; the parameters are those of the position kernel.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor | None,
        past: torch.Tensor | None,
        sinks: torch.Tensor | None,
        rate: torch.Tensor,
        call: Call,
        *parameters: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        known = _forward(call, Tensors(query, key, value, bias, past, sinks, parameters), rate)
        ctx.call = call
        ctx.save_for_backward(query, key, value, bias, past, sinks, rate, *known[1:], *parameters)
        ctx.set_materialize_grads(False)
        return known.output.to(value.dtype).unflatten(0, (call.plan.batch, call.plan.heads)), known.rows

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None, rows_grad: torch.Tensor | None) -> tuple[Any, ...]:
        query, key, value, bias, past, sinks, rate, *rest = ctx.saved_tensors
        tensors, needs = Tensors(query, key, value, bias, past, sinks, tuple(rest[3:])), ctx.needs_input_grad
        with without_autocast(query.device.type):
            if torch.is_grad_enabled():  # create_graph=True: the gradients are to be differentiated themselves
                apart, rate = tensors.aliases(), rate.view_as(rate)
                inputs = (*apart[:6], rate, None, *apart.parameters)
                return differentiable_gradients(dense_delta(ctx.call, apart, rate), (grad, rows_grad), inputs, needs)
            # The output is not needed again.
            gradients = Gradients(ctx.call, tensors, rate, Known(rest[1], *rest[:3]), needs)
            gradients.run(grad, rows_grad)
        inputs = (*tensors[:6], rate, None, *tensors.parameters)
        return tuple(
            None if found is None or x is None else found.to(x.dtype)
            for found, x in zip(gradients.found(), inputs, strict=True)
        )


def _forward(call: Call, tensors: Tensors, rate: torch.Tensor) -> Known:
    plan, width = call.plan, tensors.value.shape[-1]
    like = tensors.query.new_empty(0, dtype=torch.promote_types(tensors.query.dtype, torch.float32))
    rows = like.new_empty(plan.batch, plan.heads, plan.length, width)
    output, smooth, row_sums = (like.new_empty(plan.batch * plan.heads, plan.length, n) for n in (width, width, 2))
    weights, inputs = _earlier_weights(call, tensors, like), Inputs(call, tensors, rows)
    rates = flat(rate, like.dtype)
    for group in plan.groups():
        inputs.start(group)
        weights.start(group, inputs.query, inputs.key)
        for block in plan.blocks():
            part, own = slice(block.start, block.stop), slice(plan.past + block.start, block.keys)
            matrix, factor, row_sums[group.pairs, part] = weights.compute(block)
            kept: torch.Tensor | float = 1.0
            if plan.dropout:
                factors = plan.dropout_factors(group, block, like)
                matrix.mul_(factors)
                kept = _diagonal(factors, own)
            scaled = factor * rates[group.pairs, part]
            read = torch.bmm(matrix[:, :, : own.start], inputs.all[:, : own.start])
            system, right = (
                matrix[:, :, own] * scaled,
                torch.addcmul(inputs.own_value[:, part], read, scaled, value=-1),
            )
            if inputs.hidden is not None:
                system.masked_fill_(inputs.hidden[:, own], 0.0), right.masked_fill_(inputs.hidden[:, own], 0.0)
            solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
            inputs.own[:, part] = solved
            inputs.copy_to_keys(1, part)
            read.baddbmm_(matrix[:, :, own], solved).mul_(factor)
            smooth[group.pairs, part] = read
            alpha, rest = weights.shares(row_sums[group.pairs, part, :1])
            output[group.pairs, part] = (alpha * kept * solved).addcmul_(rest, read)
    return Known(output, rows, smooth, row_sums)


def _diagonal(matrix: torch.Tensor, columns: slice) -> torch.Tensor:
    """Of the square of some columns of ``[pairs, rows, keys]``, ``[pairs, rows, 1]``: a view."""
    return matrix[:, :, columns].diagonal(dim1=1, dim2=2).unsqueeze(-1)


class Gradients:
    """The gradients of one call, group by group.

    Args:
        call: what was computed.
        tensors: with what.
        rate: beta, ``[batch, heads, length, 1]``.
        known: in the forward pass.
        needs: which arguments of :class:`DeltaFilter` have a gradient.
    """

    def __init__(
        self, call: Call, tensors: Tensors, rate: torch.Tensor, known: Known, needs: tuple[bool, ...]
    ) -> None:
        call = call._replace(plan=call.plan.backward)
        query, key, value, bias, past, sinks, _ = tensors
        self.plan, self.known = call.plan, known
        self.like = query.new_empty(0, dtype=torch.promote_types(query.dtype, torch.float32))
        self.inputs = Inputs(call, tensors, known.rows)
        self.weights = _earlier_weights(call, tensors, self.like, needs[8:])
        self.rates, self.width = flat(rate, self.like.dtype), value.shape[-1]
        self.query, self.rate = self.like.new_empty(query.shape), self.like.new_empty(rate.shape)
        self.key, self.value = (self.inputs.key_heads.total(x, self.like.dtype) for x in (key, value))
        self.bias = self.like.new_zeros(bias.shape) if bias is not None and needs[3] else None
        self.past = None if past is None else self.like.new_empty(past.shape)
        self.sinks = self.like.new_zeros(sinks.shape) if sinks is not None and needs[5] else None
        self.buffer = Buffer(self.like, self.weights.size)
        widest = max(self.width, key.shape[-1])
        self.scratch = Buffer(self.like, self.plan.group_pairs * self.plan.key_length * widest)

    def found(self) -> tuple[torch.Tensor | None, ...]:
        """All of them, in the order of the arguments."""
        positions = self.weights.positions
        parameters = [] if positions is None else positions.finish(self.plan)
        own = (self.query, self.key, self.value, self.bias, self.past, self.sinks, self.rate)
        return (*own, None, *parameters)

    def run(self, grad: torch.Tensor | None, rows_grad: torch.Tensor | None) -> None:
        """Compute all gradients, from those of the output and of u, ``[batch, heads, length, d]`` or None."""
        plan, dtype, inputs = self.plan, self.like.dtype, self.inputs
        if not plan.groups():  # what was allocated stays unwritten
            for gradient in (self.key, self.value, self.past):
                if gradient is not None:
                    gradient.zero_()
        shape = (plan.batch, plan.heads, plan.length, self.width)
        grads = flat(self.like.new_zeros(shape) if grad is None else grad, dtype)
        rows_grads = None if rows_grad is None else flat(rows_grad, dtype)
        for group in plan.groups():
            inputs.start(group)
            self.weights.start(group, inputs.query, inputs.key)
            self.group, pairs = group, inputs.query.shape[0]
            self.d_key = KeySums(plan, pairs, inputs.key.shape[-1], self.scratch)
            self.total = self.like.new_zeros(pairs, self.width, plan.key_length)  # T, transposed as in KeySums
            if rows_grads is not None:
                self.total[..., plan.past :] += rows_grads[group.pairs].mT
            d_value = self.like.new_zeros(pairs, plan.key_length, self.width)
            for block in plan.blocks()[::-1]:
                self._block(block, grads[group.pairs], d_value)
            everything = slice(0, plan.key_length)
            inputs.key_heads.add(self.key, self.d_key.rows(everything).mul_(plan.scale), group)
            inputs.key_heads.add(self.value, d_value, group)
            if self.past is not None:
                earlier = self.total[..., : plan.past].mT
                hidden = None if inputs.hidden is None else inputs.hidden[:, : plan.past]
                self.past.flatten(0, 1)[group.pairs] = earlier if hidden is None else earlier.masked_fill(hidden, 0.0)

    def _block(self, block: Block, grads: torch.Tensor, d_value: torch.Tensor) -> None:
        """Add a block's share to T, and to all gradients."""
        plan, group, inputs, known = self.plan, self.group, self.inputs, self.known
        part, own = slice(block.start, block.stop), slice(plan.past + block.start, block.keys)
        row_sums = known.row_sums[group.pairs]
        matrix, correction = self.weights.recompute(block, row_sums)
        alpha, rest = self.weights.shares(row_sums[:, part, :1])
        factors = plan.dropout_factors(group, block, self.like) if plan.dropout else None
        dropped = matrix if factors is None else matrix * factors
        shown = alpha if factors is None else alpha * _diagonal(factors, own)
        grad, smooth, solved = grads[:, part], known.smooth[group.pairs, part], inputs.own[:, part]
        hidden, rate = None if inputs.hidden is None else inputs.hidden[:, own], self.rates[group.pairs, part]
        rate = rate if hidden is None else rate.masked_fill(hidden, 0.0)
        # The rounding of the recomputed weights is made good by a factor on what they are multiplied by.
        through = rest * correction * grad
        system = dropped[:, :, own].mT
        right = (shown * grad).add_(self.total[..., own].mT)
        right.baddbmm_(system, through)
        system = system * (rate * correction).mT
        d_rows = torch.linalg.solve_triangular(system, right, upper=True, unitriangular=True)
        if hidden is not None:
            d_rows.masked_fill_(hidden, 0.0)
        d_smooth = through.addcmul_(rate * correction, d_rows, value=-1.0)
        d_value[:, own] = d_rows
        self.rate.flatten(0, 1)[group.pairs, part] = (d_rows * smooth).sum(-1, keepdim=True).neg_()
        if own.start:
            room = self.scratch.view(grad.shape[0], self.width, own.start)
            self.total[..., : own.start] += torch.bmm(d_smooth.mT, dropped[:, :, : own.start], out=room)
        d_share = (shown * solved - alpha * smooth) * grad
        d_own = rest * d_share.sum(-1, keepdim=True)
        row_term = torch.linalg.vecdot(d_smooth, smooth).unsqueeze(-1).addcmul_(correction, d_own)
        d_matrix = torch.bmm(d_smooth, inputs.all[:, : block.keys].mT, out=self.buffer.view(*matrix.shape))
        if factors is not None:
            d_matrix.mul_(factors)
        d_logits = self.weights.logits_grad(d_matrix, matrix, row_term)
        _diagonal(d_logits, own).copy_(d_own)
        self.query.flatten(0, 1)[group.pairs, part].baddbmm_(
            d_logits, inputs.key[:, : block.keys], beta=0.0, alpha=plan.scale
        )
        self.d_key.add(d_logits, inputs.query[:, part])
        if self.bias is not None:
            self.weights.add_to_bias(self.bias, d_logits, block)
        if self.sinks is not None:
            self.weights.add_to_sinks(self.sinks, row_term, row_sums[:, part])
        self.weights.add_to_positions(d_logits, block)


# --------------------------------------------------------------------------------------------------------------------
# Derivatives of derivatives
# --------------------------------------------------------------------------------------------------------------------


def dense_delta(call: Call, tensors: Tensors, rate: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and u written densely, in memory O(length * key_length), for whatever differentiates them."""
    plan, seen, dtype = call.plan, call.visibility, tensors.value.dtype
    query, key, value = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors[:3])
    repeats = plan.heads // plan.key_heads
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    logits = dense_logits(call, tensors._replace(query=query, key=key))
    places = slice(plan.past, plan.key_length)
    normalisation = Normalisation(call.normalisation)
    matrix = filter_matrix(logits, seen, tensors.sinks, normalisation)
    before = filter_matrix(logits, strictly_before(seen, places, logits.device), tensors.sinks, normalisation)
    if plan.dropout:
        factors = dense_dropout_factors(plan, query.new_empty(0))
        matrix, before = matrix * factors, before * factors
    solved = DenseDelta(before, rate, places, hidden_rows(seen, places)).solve(value[:, :, plan.past :], tensors.past)
    every = solved if tensors.past is None else torch.cat((tensors.past.to(solved.dtype), solved), dim=-2)
    return torch.matmul(matrix, seen.clean_keys(every)).to(dtype), solved
