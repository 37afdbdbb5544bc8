"""Blocks of weights that are not those of softmax: ``sigmoid`` and ``softpick``, for ``backend_blocked_passes``.

With g_i a row of the gradient of the output, dA_ij = g_i . x_j and D_i = sum_j a_ij dA_ij, as for softmax:

    sigmoid   a = sigmoid(l - log n)                            dl = dA a (1 - a)
    softpick  a = relu(x) / S,   x = e^(l - m) - e^-m           dl = (dA [x > 0] - D sign(x)) e^(l - m) / S
              S = eps + sum |x|,   m the row's largest logit or 0

Only visible keys count in n and S. At x = 0 exactly, a logit of 0, where relu and |x| have no derivative, the one of
negative x is taken. Memory is that of two blocks.
"""

from __future__ import annotations

import torch

from .backend_blocked_plan import Block, cut
from .backend_blocked_weights import Buffer, Weights
from .kernel_normalisation import SOFTPICK_EPSILON


class SigmoidWeights(Weights):
    """Weights of ``sigmoid``: each of them for itself, but for the number of keys that a row sees."""

    unit = 1.0
    last_seen = 0
    """Where causality hides later keys: the last key that a query sees, counted from its own."""

    def _log_counts(self, block: Block) -> torch.Tensor:
        """log n_i, ``[pairs, rows, 1]``; 0 for rows that see no key."""
        (rows, keys), pairs, like = block.shape, self.query.shape[0], self.buffer.like
        cuts = self.plan.is_causal or self.last_seen < 0
        last = block.own + self.last_seen
        if self.is_full:
            counts = like.new_full((rows,), float(keys))
            if cuts:
                counts = torch.arange(last + 1, last + 1 + rows, dtype=like.dtype, device=like.device).clamp_(max=keys)
            return counts.clamp(min=1.0).log().view(1, rows, 1).expand(pairs, -1, -1)
        if self.mask is None:
            raise RuntimeError("what hides keys is a mask")
        seen = cut(self.mask, self.group, block)
        seen = seen.expand(*seen.shape[:2], rows, keys)
        if cuts:
            seen = seen.tril(last)
        counts = seen.sum(-1, keepdim=True).clamp(min=1).to(like.dtype)
        return counts.log().expand(*self.group.shape, rows, 1).reshape(pairs, rows, 1)

    def compute(self, block: Block) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As of the parent; the row's two numbers are log n and 1."""
        counts = self._log_counts(block)
        factor = torch.ones_like(counts)
        return self.logits(block).sub_(counts).sigmoid_(), factor, torch.cat((counts, factor), dim=-1)

    def recompute(self, block: Block, row_sums: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As of the parent."""
        counts, factor = row_sums[:, block.rows].split(1, dim=-1)
        return self.logits(block).sub_(counts).sigmoid_(), factor

    def logits_grad(self, d_matrix: torch.Tensor, matrix: torch.Tensor, row_term: torch.Tensor) -> torch.Tensor:
        """As of the parent; D is not needed."""
        d_logits = d_matrix.mul_(matrix)
        return d_logits.addcmul_(d_logits, matrix, value=-1.0)


class SoftpickWeights(Weights):
    """Weights of ``softpick``, up to 1 / S."""

    def _above(self, block: Block, largest: torch.Tensor, exponentials: torch.Tensor) -> torch.Tensor:
        """x in a buffer of its own, from e^(l - m); -e^-m where a key is hidden."""
        if self.second is None:
            self.second = Buffer(self.buffer.like, self.size)
        above = self.second.view(*exponentials.shape)
        return torch.sub(exponentials, torch.exp2(-largest), out=above)

    second: Buffer | None = None
    exponentials: torch.Tensor | None = None
    """e^(l - m) of the block that was computed last."""

    def compute(self, block: Block) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As of the parent; the row's two numbers are m in units of log 2, and 1 / S."""
        scores = self.logits(block)
        largest = scores.amax(-1, keepdim=True).clamp_(min=0.0)
        above = self._above(block, largest, scores.sub_(largest).exp2_())
        sizes = torch.abs(above, out=scores)
        self._clear_(sizes, block)
        factor = sizes.sum(-1, keepdim=True).add_(SOFTPICK_EPSILON).reciprocal_()
        return above.clamp_(min=0.0), factor, torch.cat((largest, factor), dim=-1)

    def _clear_(self, sizes: torch.Tensor, block: Block) -> None:
        """Make 0 of what hidden keys have."""
        if self.future is not None:
            sizes[:, :, min(block.own, block.shape[1]) :].tril_()
        if self.is_full:
            return
        if self.runs is not None:
            self.runs.fill_(sizes.mT, self.group, 0.0, block.first)
        elif self.mask is not None:
            shaped = sizes.view(*self.group.shape, *block.shape)
            shaped.masked_fill_(~cut(self.mask, self.group, block), 0.0)

    def recompute(self, block: Block, row_sums: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As of the parent."""
        largest, factor = row_sums[:, block.rows].split(1, dim=-1)
        self.exponentials = self.logits(block).sub_(largest).exp2_()
        return self._above(block, largest, self.exponentials).clamp_(min=0.0), factor

    def logits_grad(self, d_matrix: torch.Tensor, matrix: torch.Tensor, row_term: torch.Tensor) -> torch.Tensor:
        """As of the parent; both gradient and D have the factor 1 / S already."""
        if self.exponentials is None:
            raise RuntimeError("a block has gradients only after it was computed again")
        d_matrix.sub_(row_term * 2.0)
        torch.ops.aten.threshold_backward.grad_input(d_matrix, matrix, 0.0, grad_input=d_matrix)
        return d_matrix.add_(row_term).mul_(self.exponentials)

    def logits_grad_of(
        self, d_matrix: torch.Tensor, matrix: torch.Tensor, row_term: torch.Tensor, factor: torch.Tensor
    ) -> torch.Tensor:
        """As of the parent."""
        return self.logits_grad(d_matrix.mul_(factor), matrix, row_term * factor)


WEIGHTS: dict[str, type[Weights]] = {"softmax": Weights, "sigmoid": SigmoidWeights, "softpick": SoftpickWeights}
"""Normalisations that are computed block by block."""
