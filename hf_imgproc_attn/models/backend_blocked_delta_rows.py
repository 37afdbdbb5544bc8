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
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch

from .backend_blocked_passes import Call, Inputs, Tensors
from .backend_blocked_plan import Block, Group
from .backend_blocked_weights import Buffer, KeySums, Weights, flat
from .kernel_content import working_dtype


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


class EarlierWeights(Weights):
    """A', block by block, and the logits of the queries' own tokens."""

    numbers = 2
    counts_sinks = True
    own: torch.Tensor
    """Of the block that was computed last, in units of log 2, ``[pairs, rows, 1]``."""

    def logits(self, block: Block) -> torch.Tensor:
        """As of the parent; a query's own is kept apart, and hidden."""
        scores = super().logits(block)
        own = scores[:, :, block.own :].diagonal(dim1=1, dim2=2)
        self.own = own.unsqueeze(-1).clone()
        own.fill_(float("-inf"))
        return scores

    def shares(self, log_sum: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """alpha and 1 - alpha of the block that was computed last, ``[pairs, rows, 1]``.

        Args:
            log_sum: of its rows, infinite where there is no earlier key, ``[pairs, rows, 1]``.
        """
        gap = self.own - log_sum.masked_fill(log_sum == float("inf"), float("-inf"))
        gap = gap.masked_fill_(self.own == float("-inf"), float("-inf")).mul_(math.log(2.0))
        return torch.sigmoid(gap), torch.sigmoid(-gap)

    def output(self, block: Block, rows: OwnRows, log_sum: torch.Tensor, factors: torch.Tensor | None) -> torch.Tensor:
        """A u of the block that was computed last, ``[pairs, rows, d]``.

        Args:
            block: the block.
            rows: u and s of its rows.
            log_sum: of its rows, with what :meth:`compute` found beside it.
            factors: of dropout, ``[pairs, rows, keys]``, or None.
        """
        alpha, rest = self.shares(log_sum[..., :1])
        if factors is not None:
            alpha = alpha * diagonal(factors, slice(block.own, block.keys))
        return (alpha * rows.solved).addcmul_(rest, rows.smooth)


class OwnRows(NamedTuple):
    """What is known of a block's own rows.

    solved: u, ``[pairs, rows, d]``.
    smooth: s, the same.
    every: u of all keys up to the block's last, ``[pairs, keys, d]``, 0 where a key is hidden.
    """

    solved: torch.Tensor
    smooth: torch.Tensor
    every: torch.Tensor


def earlier_weights(
    call: Call, tensors: Tensors, like: torch.Tensor, needs_grad: tuple[bool, ...] = ()
) -> EarlierWeights:
    """Those of a call; arguments as of :meth:`Call.weights`."""
    weights = call.weights(tensors, like, needs_grad, EarlierWeights)
    if not isinstance(weights, EarlierWeights):
        raise TypeError(f"weights must be EarlierWeights, got {type(weights).__name__}")
    return weights


class BlockWeights(Protocol):
    """What :func:`forward` computes with: :class:`EarlierWeights`, or both A and A'."""

    numbers: int
    """What is kept of a row."""

    def start(self, group: Group, query: torch.Tensor, key: torch.Tensor) -> None:
        """See :meth:`Weights.start`."""

    def compute(self, block: Block) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A' up to a factor a row, that factor, and what is kept of the rows; see :meth:`Weights.compute`."""

    def output(self, block: Block, rows: OwnRows, log_sum: torch.Tensor, factors: torch.Tensor | None) -> torch.Tensor:
        """See :meth:`EarlierWeights.output`."""


def forward(call: Call, tensors: Tensors, rate: torch.Tensor, make: Callable[..., BlockWeights]) -> Known:
    """Compute output and u block by block.

    Args:
        call: how it is cut.
        tensors: with what.
        rate: beta, ``[batch, heads, length, 1]``.
        make: the weights, of a call, its tensors and a tensor of the dtype to work in.
    """
    plan, width = call.plan, tensors.value.shape[-1]
    like = tensors.query.new_empty(0, dtype=working_dtype(tensors.query.dtype))
    rows = like.new_empty(plan.batch, plan.heads, plan.length, width)
    weights, inputs = make(call, tensors, like), Inputs(call, tensors, rows)
    sizes = (width, width, weights.numbers)
    output, smooth, row_sums = (like.new_empty(plan.batch * plan.heads, plan.length, size) for size in sizes)
    rates = flat(rate, like.dtype)
    for group in plan.groups():
        inputs.start(group)
        weights.start(group, inputs.query, inputs.key)
        for block in plan.blocks():
            part, own = block.rows, slice(block.own, block.keys)
            matrix, factor, row_sums[group.pairs, part] = weights.compute(block)
            factors = plan.dropout_factors(group, block, like) if plan.dropout else None
            if factors is not None:
                matrix.mul_(factors)
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
            own_rows = OwnRows(solved, read, inputs.all[:, : block.keys])
            output[group.pairs, part] = weights.output(block, own_rows, row_sums[group.pairs, part], factors)
    return Known(output, rows, smooth, row_sums)


def diagonal(matrix: torch.Tensor, columns: slice) -> torch.Tensor:
    """The diagonal of the square of some columns of ``[pairs, rows, keys]``, ``[pairs, rows, 1]``: a view."""
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

    needs_output = False
    """Whether the output has to be known."""

    def __init__(
        self, call: Call, tensors: Tensors, rate: torch.Tensor, known: Known, needs: tuple[bool, ...]
    ) -> None:
        call = call._replace(plan=call.plan.backward)
        query, key, value, bias, past, sinks, _ = tensors
        self.plan, self.known = call.plan, known
        self.like = query.new_empty(0, dtype=working_dtype(query.dtype))
        self.inputs = Inputs(call, tensors, known.rows)
        self.weights = self.make(call, tensors, needs[8:])
        self.rates, self.width = flat(rate, self.like.dtype), value.shape[-1]
        self.query, self.rate = self.like.new_empty(query.shape), self.like.new_empty(rate.shape)
        self.key, self.value = (self.inputs.key_heads.total(x, self.like.dtype) for x in (key, value))
        self.bias = self.like.new_zeros(bias.shape) if bias is not None and needs[3] else None
        self.past = None if past is None else self.like.new_empty(past.shape)
        self.sinks = self.like.new_zeros(sinks.shape) if sinks is not None and needs[5] else None
        self.buffer = Buffer(self.like, self.weights.size)
        widest = max(self.width, key.shape[-1])
        self.scratch = Buffer(self.like, self.plan.group_pairs * self.plan.key_length * widest)

    def make(self, call: Call, tensors: Tensors, needs_grad: tuple[bool, ...]) -> Weights:
        """The weights, through which bias and positions get their gradients."""
        self.earlier = earlier_weights(call, tensors, self.like, needs_grad)
        return self.earlier

    def start(self, group: Group) -> None:
        """Turn to a group."""
        self.group = group
        self.inputs.start(group)
        self.weights.start(group, self.inputs.query, self.inputs.key)

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
            self.start(group)
            pairs = inputs.query.shape[0]
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
        part, own = block.rows, slice(block.own, block.keys)
        row_sums = known.row_sums[group.pairs]
        matrix, correction = self.weights.recompute(block, row_sums)
        alpha, rest = self.earlier.shares(row_sums[:, part, :1])
        factors = plan.dropout_factors(group, block, self.like) if plan.dropout else None
        dropped = matrix if factors is None else matrix * factors
        shown = alpha if factors is None else alpha * diagonal(factors, own)
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
        diagonal(d_logits, own).copy_(d_own)
        if self.sinks is not None:
            self.weights.add_to_sinks(self.sinks, row_term, row_sums[:, part])
        self._add(block, d_logits)

    def _add(self, block: Block, d_logits: torch.Tensor) -> None:
        """Add what the gradient of a block's logits brings to those of queries, keys, bias and positions."""
        part, inputs = block.rows, self.inputs
        self.query.flatten(0, 1)[self.group.pairs, part].baddbmm_(
            d_logits, inputs.key[:, : block.keys], beta=0.0, alpha=self.plan.scale
        )
        self.d_key.add(d_logits, inputs.query[:, part])
        if self.bias is not None:
            self.weights.add_to_bias(self.bias, d_logits, block)
        self.weights.add_to_positions(d_logits, block)
