"""``delta`` block by block for weights that are not those of softmax: A' is no multiple of A there.

    s = A' u,    u = v - beta s,    out = A u

with A' the weights over the keys before the query's own: ``sigmoid`` counts one key less, ``softpick`` has another
sum. A block's logits are computed once, and both matrices are made of them. *Backward*, from the last block to the
first, with G = dout and T = A^T G + A'^T ds summed over later blocks,

    (I + A'_own^T beta) du = T + A_own^T G,    ds = -beta du,    dv = du,    dbeta_i = -du_i . s_i
    dl = the normalisation's own of dA = G u^T, with D_i = out_i . G_i, and of dA' = ds u^T, with D_i = s_i . ds_i

3 products forward and 7 backward. One mask of dropout multiplies both. Saved are the output, u, s and the numbers of
the rows: memory is O(length).
"""

from __future__ import annotations

import torch

from .backend_blocked_delta_rows import Gradients, OwnRows, diagonal
from .backend_blocked_normalised import SigmoidWeights, SoftpickWeights
from .backend_blocked_passes import Call, Tensors
from .backend_blocked_plan import Block, Group
from .backend_blocked_weights import Buffer, Weights


class SharedLogits(Weights):
    """Weights whose logits, where they are known already, are not computed again."""

    known: torch.Tensor | None = None
    """Of the next block, in a buffer of its own; used up by the first who asks for them."""

    def raw_logits(self, block: Block) -> torch.Tensor:
        """The logits of a block, which the next computation of weights takes over, ``[pairs, rows, keys]``."""
        self.known = super().logits(block)
        return self.known

    def take(self, logits: torch.Tensor, block: Block) -> None:
        """Copy a block's logits, and hide each query's own key."""
        self.known = self.buffer.view(*logits.shape).copy_(logits)
        diagonal(self.known, slice(block.own, block.keys)).fill_(float("-inf"))

    def logits(self, block: Block) -> torch.Tensor:
        """As of the parent."""
        known, self.known = self.known, None
        return super().logits(block) if known is None else known


class WholeSigmoid(SharedLogits, SigmoidWeights):
    """A of ``sigmoid``."""


class EarlierSigmoid(SharedLogits, SigmoidWeights):
    """A' of ``sigmoid``."""

    last_seen = -1


class WholeSoftpick(SharedLogits, SoftpickWeights):
    """A of ``softpick``, up to 1 / S."""


class EarlierSoftpick(SharedLogits, SoftpickWeights):
    """A' of ``softpick``, up to 1 / S."""

    def _clear_(self, sizes: torch.Tensor, block: Block) -> None:
        super()._clear_(sizes, block)
        diagonal(sizes, slice(block.own, block.keys)).zero_()


KINDS: dict[str, tuple[type[SharedLogits], type[SharedLogits]]] = {
    "sigmoid": (WholeSigmoid, EarlierSigmoid),
    "softpick": (WholeSoftpick, EarlierSoftpick),
}
"""A and A' by normalisation."""


class PairWeights:
    """A and A', block by block.

    Args:
        whole: A.
        earlier: A'.
    """

    numbers = 4

    def __init__(self, whole: SharedLogits, earlier: SharedLogits) -> None:
        self.whole, self.earlier = whole, earlier
        self._matrix = self._factor = whole.buffer.like

    def start(self, group: Group, query: torch.Tensor, key: torch.Tensor) -> None:
        """Turn to a group; see :meth:`Weights.start`."""
        self.whole.start(group, query, key)
        self.earlier.start(group, query, key)

    def compute(self, block: Block) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A' of a block as :meth:`Weights.compute` gives it, and the numbers of both matrices' rows."""
        self.earlier.take(self.whole.raw_logits(block), block)
        self._matrix, self._factor, numbers = self.whole.compute(block)
        before, factor, own_numbers = self.earlier.compute(block)
        return before, factor, torch.cat((numbers, own_numbers), dim=-1)

    def output(self, block: Block, rows: OwnRows, log_sum: torch.Tensor, factors: torch.Tensor | None) -> torch.Tensor:
        """A u of the block that was computed last, ``[pairs, rows, d]``; see :meth:`EarlierWeights.output`."""
        matrix = self._matrix if factors is None else self._matrix.mul_(factors)
        return torch.bmm(matrix, rows.every).mul_(self._factor)

    def recompute(
        self, block: Block, row_sums: torch.Tensor
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
        """A and A' of a block again, each as :meth:`Weights.recompute` gives it."""
        self.earlier.take(self.whole.raw_logits(block), block)
        numbers, own_numbers = row_sums.split(2, dim=-1)
        return self.whole.recompute(block, numbers), self.earlier.recompute(block, own_numbers)


def pair_weights(call: Call, tensors: Tensors, like: torch.Tensor, needs_grad: tuple[bool, ...] = ()) -> PairWeights:
    """Those of a call; arguments as of :meth:`Call.weights`."""
    kind, earlier_kind = KINDS[call.normalisation]
    whole = call.weights(tensors, like, needs_grad, kind)
    # Its logits are those of the other one, with all that is added to them.
    bare = call._replace(positions=None)
    earlier = bare.weights(tensors._replace(bias=None, parameters=()), like, (), earlier_kind)
    if not isinstance(whole, SharedLogits) or not isinstance(earlier, SharedLogits):
        raise TypeError(f"weights must be SharedLogits, got {type(whole).__name__} and {type(earlier).__name__}")
    return PairWeights(whole, earlier)


class PairGradients(Gradients):
    """See the file's formulas."""

    needs_output = True

    def make(self, call: Call, tensors: Tensors, needs_grad: tuple[bool, ...]) -> Weights:
        """As of the parent: those of A."""
        self.pair = pair_weights(call, tensors, self.like, needs_grad)
        self.second = Buffer(self.like, self.pair.whole.size)
        return self.pair.whole

    def start(self, group: Group) -> None:
        """As of the parent."""
        super().start(group)
        self.pair.start(group, self.inputs.query, self.inputs.key)

    def _block(self, block: Block, grads: torch.Tensor, d_value: torch.Tensor) -> None:
        """As of the parent."""
        plan, inputs, pairs = self.plan, self.inputs, self.group.pairs
        part, own = block.rows, slice(block.own, block.keys)
        (whole, factor), (earlier, earlier_factor) = self.pair.recompute(block, self.known.row_sums[pairs])
        factors = plan.dropout_factors(self.group, block, self.like) if plan.dropout else None
        grad, smooth = grads[:, part], self.known.smooth[pairs, part]
        hidden, rate = None if inputs.hidden is None else inputs.hidden[:, own], self.rates[pairs, part]
        rate = rate if hidden is None else rate.masked_fill(hidden, 0.0)
        # Both matrices lack a factor a row, which goes into what they are multiplied by.
        through, scaled = factor * grad, rate * earlier_factor
        dropped = (whole, earlier) if factors is None else (whole * factors, earlier * factors)
        right = torch.baddbmm(self.total[..., own].mT, dropped[0][:, :, own].mT, through)
        system = dropped[1][:, :, own].mT * scaled.mT
        d_rows = torch.linalg.solve_triangular(system, right, upper=True, unitriangular=True)
        if hidden is not None:
            d_rows.masked_fill_(hidden, 0.0)
        d_smooth = -scaled * d_rows
        d_value[:, own] = d_rows
        self.rate.flatten(0, 1)[pairs, part] = (d_rows * smooth).sum(-1, keepdim=True).neg_()
        for matrix, rows in zip(dropped, (through, d_smooth), strict=True):
            if own.start:
                room = self.scratch.view(grad.shape[0], self.width, own.start)
                self.total[..., : own.start] += torch.bmm(rows.mT, matrix[:, :, : own.start], out=room)
        d_logits = self._logits_grad(self.pair.whole, whole, (through, self.known.output[pairs, part]), factors)
        d_logits += self._logits_grad(self.pair.earlier, earlier, (d_smooth, smooth), factors)
        self._add(block, d_logits)

    def _logits_grad(
        self,
        weights: SharedLogits,
        matrix: torch.Tensor,
        rows: tuple[torch.Tensor, torch.Tensor],
        factors: torch.Tensor | None,
    ) -> torch.Tensor:
        """The gradient of a block's logits through one of the matrices, ``[pairs, rows, keys]``.

        Args:
            weights: whose matrix it is.
            matrix: without dropout and the factor of its rows.
            rows: the gradient of what it gave, with that factor, and what it gave, ``[pairs, rows, d]``.
            factors: of dropout, or None.
        """
        memory = self.buffer if weights is self.pair.whole else self.second
        room = memory.view(*matrix.shape)
        d_matrix = torch.bmm(rows[0], self.inputs.all[:, : matrix.shape[-1]].mT, out=room)
        if factors is not None:
            d_matrix.mul_(factors)
        return weights.logits_grad(d_matrix, matrix, torch.linalg.vecdot(*rows).unsqueeze(-1))
