"""``sinkhorn`` in linear memory: it ends with a step over rows, so that A is a softmax with a number for each key.

    c_j <- -log sum_i e^(l_ij + r_i),    r_i <- -log sum_j e^(l_ij + c_j),    r = 0 at first, t times

and A_ij = softmax_j(l_ij + c_j) with the last c. So c becomes one more column beside the keys, and whatever computes a
softmax computes A. Here c is made block by block: one visit to each block an iteration, rows first, then their part of
the columns' sums, which are kept relative to a running maximum. Only r and c of each iteration are saved.

*Backward*, from the last iteration to the first, with dc from the attention, in one visit to each block:

    B_ij = e^(l_ij + r_i + c_j)   columns sum to 1:    dr_i = -sum_j B_ij dc_j,    dl_ij = -B_ij dc_j
    P_ij = e^(l_ij + r_i + c'_j)  rows sum to 1:       dc'_j = -sum_i P_ij dr_i,   dl_ij -= P_ij dr_i

with c' the iteration's before. Rows of padding, tokens that nobody sees, have r = -inf: they count in no column.
1 product an iteration forward and 3 backward.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .backend_blocked_dense import dense_logits
from .backend_blocked_logits import LogitsGradients, no_streams
from .backend_blocked_passes import Call, Inputs, Tensors
from .backend_blocked_plan import Block
from .backend_blocked_weights import LOG2_E, Buffer, Weights
from .backend_call import FilterCall, is_transformed, without_autocast
from .boost_derivatives import differentiable_gradients
from .kernel_content import working_dtype
from .kernel_given import KeyNumbers
from .kernel_normalisation import Normalisation, sinkhorn_steps


def scales_refuse(call: FilterCall) -> str | None:
    """Why a call of ``sinkhorn`` is no softmax with a number for each key, as the rest of a sentence, or None."""
    if call.visibility.hides_later_keys:
        return "scales columns too, and normalisation 'sinkhorn' needs attention without a causal mask"
    if call.content.softcap is not None:
        return "knows no logits with a soft cap"
    length, key_length = call.query.shape[-2], call.key.shape[-2]
    if length != key_length:
        return f"scales all rows of A together and needs as many queries as keys, got {length} and {key_length}"
    return None


def as_softmax(call: FilterCall, scales: torch.Tensor | None) -> FilterCall:
    """The call of a softmax whose A is that of ``sinkhorn``.

    Args:
        call: of ``sinkhorn``.
        scales: c, ``[batch, heads, key_length]``; None: zeros, to ask who would serve it.
    """
    working = working_dtype(call.query.dtype)
    ones = call.query.new_ones((1, 1, 1, 1), dtype=working)
    if scales is None:
        scales = ones.view(1, 1, 1).expand(1, 1, call.key.shape[-2])
    column = KeyNumbers(ones.expand(1, 1, call.query.shape[-2], 1), scales.to(working).unsqueeze(-1))
    return call._replace(normalisation=Normalisation(), positions=(*call.positions, column))


class LogScales(torch.autograd.Function):
    """``apply(query, key, bias, call, iterations, *parameters)`` -> c, ``[batch, heads, key_length]``.

    In at least float32; ``parameters`` are those of the position kernel.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        bias: torch.Tensor | None,
        call: Call,
        iterations: int,
        *parameters: torch.Tensor,
    ) -> torch.Tensor:
        tensors = Tensors(query, key, key[..., :0], bias, None, None, parameters)
        found = _forward(call, tensors, iterations)
        ctx.call, ctx.iterations = call, iterations
        ctx.save_for_backward(query, key, bias, *found, *parameters)
        return found.columns[-1].unflatten(0, (call.plan.batch, call.plan.heads)) / LOG2_E

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        query, key, bias, rows, columns, *parameters = ctx.saved_tensors
        tensors, needs = Tensors(query, key, key[..., :0], bias, None, None, tuple(parameters)), ctx.needs_input_grad
        with without_autocast(query.device.type):
            if torch.is_grad_enabled():  # create_graph=True: the gradients are to be differentiated themselves
                apart = tensors.aliases()
                inputs = (apart.query, apart.key, apart.bias, None, None, *apart.parameters)
                result = dense_scales(ctx.call, apart, ctx.iterations)
                return differentiable_gradients((result,), (grad,), inputs, needs)
            gradients = Gradients(ctx.call, tensors, Scales(rows, columns), (needs[2], *needs[5:]))
            gradients.run(grad.flatten(0, 1))
        found = (gradients.query, gradients.key, gradients.bias, None, None, *gradients.parameters())
        inputs = (query, key, bias, None, None, *parameters)
        return tuple(
            None if x is None or given is None else x.to(given.dtype) for x, given in zip(found, inputs, strict=True)
        )


class Scales(NamedTuple):
    """r and c of each iteration, in units of log 2.

    rows: ``[iterations, pairs, length, 1]``, those that the step over columns started from; -inf where a row does not
        count.
    columns: ``[iterations, pairs, key_length]``.
    """

    rows: torch.Tensor
    columns: torch.Tensor


def _log_sum(logits: torch.Tensor, dim: int) -> torch.Tensor:
    """log2 of a sum of powers of 2, 0 where all of them are 0; uses up ``logits``."""
    largest = logits.amax(dim, keepdim=True)
    empty = largest == float("-inf")
    largest.masked_fill_(empty, 0.0)
    total = logits.sub_(largest).exp2_().sum(dim, keepdim=True)
    return total.log2_().add_(largest).masked_fill_(empty, 0.0)


def _forward(call: Call, tensors: Tensors, iterations: int) -> Scales:
    plan = call.plan
    like = tensors.query.new_empty(0, dtype=working_dtype(tensors.query.dtype))
    pairs = plan.batch * plan.heads
    rows = like.new_zeros(iterations, pairs, plan.length, 1)
    columns = like.new_zeros(iterations, pairs, plan.key_length)
    weights, inputs = call.weights(tensors, like, kind=Weights), Inputs(call, tensors, no_streams(call, like))
    for group in plan.groups():
        inputs.start(group)
        weights.start(group, inputs.query, inputs.key)
        hidden = inputs.hidden
        for step in range(iterations):
            largest = like.new_full((inputs.query.shape[0], 1, plan.key_length), float("-inf"))
            total = torch.zeros_like(largest)
            for block in plan.blocks():
                part = block.rows
                logits, own = weights.logits(block), rows[step, group.pairs, part]
                if step:
                    scaled = logits + columns[step - 1, group.pairs].unsqueeze(-2)
                    own.copy_(_log_sum(scaled, -1).neg_())
                if hidden is not None:
                    own.masked_fill_(hidden[:, part], float("-inf"))
                logits.add_(own)
                most = torch.maximum(largest, logits.amax(-2, keepdim=True))
                shift = most.masked_fill(most == float("-inf"), 0.0)
                total.mul_((largest - shift).exp2_()).add_(logits.sub_(shift).exp2_().sum(-2, keepdim=True))
                largest = most
            found = total.log2_().add_(largest).neg_()
            columns[step, group.pairs] = found.masked_fill_(largest == float("-inf"), 0.0).squeeze(-2)
    return Scales(rows, columns)


class Gradients(LogitsGradients):
    """The gradients of c, group by group, each block visited once an iteration.

    Args:
        call: what was computed.
        tensors: with what.
        scales: in the forward pass.
        needs: whether the bias and each of the position kernel's parameters have a gradient.
    """

    def __init__(self, call: Call, tensors: Tensors, scales: Scales, needs: tuple[bool, ...]) -> None:
        query, plan = tensors.query, call.plan
        self.like = query.new_empty(0, dtype=working_dtype(query.dtype))
        scratch = Buffer(self.like, plan.group_pairs * plan.key_length * query.shape[-1])
        super().__init__(call, tensors, (needs[0], False, *needs[1:]), scratch, Weights)
        self.scales = scales
        self.query.zero_()

    def run(self, grad: torch.Tensor) -> None:
        """Compute all gradients, from that of c, ``[pairs, key_length]``."""
        for group in self.plan.groups():
            self.start(group)
            d_columns = grad[group.pairs].to(self.like.dtype).unsqueeze(-2)
            for step in range(len(self.scales.rows))[::-1]:
                earlier = torch.zeros_like(d_columns)
                for block in self.plan.blocks()[::-1]:
                    self._block(block, step, d_columns, earlier)
                d_columns = earlier
            self.finish()

    def _block(self, block: Block, step: int, d_columns: torch.Tensor, earlier: torch.Tensor) -> None:
        """Add a block's share of an iteration, and to the gradient of the iteration's before, ``earlier``."""
        part, pairs = block.rows, self.group.pairs
        rows, columns = self.scales
        logits = self.weights.logits(block).add_(rows[step, pairs, part])
        d_logits = (logits + columns[step, pairs].unsqueeze(-2)).exp2_().mul_(d_columns).neg_()
        if step:
            d_rows = d_logits.sum(-1, keepdim=True)
            by_rows = logits.add_(columns[step - 1, pairs].unsqueeze(-2)).exp2_().mul_(d_rows)
            earlier.sub_(by_rows.sum(-2, keepdim=True))
            d_logits.sub_(by_rows)
        self.add_without_sinks(block, d_logits)

    def _to_queries(self, room: torch.Tensor, product: torch.Tensor) -> None:
        """As of the parent, added up over the iterations."""
        room.add_(product, alpha=self.plan.scale)


def dense_scales(call: Call, tensors: Tensors, iterations: int) -> torch.Tensor:
    """c written densely, in memory O(length * key_length), for whatever differentiates it."""
    plan, seen = call.plan, call.visibility
    query, key = (x.to(working_dtype(x.dtype)) for x in tensors[:2])
    if plan.heads > plan.key_heads:
        key = key.repeat_interleave(plan.heads // plan.key_heads, dim=1)
    logits = dense_logits(call, tensors._replace(query=query, key=key))
    allowed = seen.allowed(logits.device)
    if allowed is not None:
        logits = logits.masked_fill(~allowed, float("-inf"))
    return sinkhorn_steps(logits, seen.hidden, iterations)[1]


def log_scales(call: Call, given: FilterCall, iterations: int) -> torch.Tensor:
    """c, ``[batch, heads, key_length]`` in at least float32.

    Args:
        call: how it is cut.
        given: plain inner products, and at most a bias beside them.
        iterations: t.
    """
    parameters = () if call.positions is None else call.positions.parameters()
    query, key, bias = given.query, given.key, given.visibility.bias
    with without_autocast(query.device.type):
        if is_transformed((query, key, bias, *parameters)):
            tensors = Tensors(query, key, key[..., :0], bias, None, None, parameters)
            return dense_scales(call, tensors, iterations)
        scales: torch.Tensor = LogScales.apply(query, key, bias, call, iterations, *parameters)
    return scales
