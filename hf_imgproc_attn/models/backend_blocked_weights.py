"""The attention weights of one block, and what is read and summed around them, for ``backend_blocked_passes``.

Nothing here knows of boosting. Weights are powers of two, A_ij = 2^(s_ij - L_i) with s the logits in units of log 2
and L_i the row's base-2 log-sum-exp: the exponential of base 2 takes a third of the time of that of base e on a CPU.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import torch

from .backend_blocked_hidden import KeyRuns
from .backend_blocked_plan import Block, Group, Plan, add_product, cut, multiply
from .backend_blocked_positions import PositionTerm

LOG2_E = math.log2(math.e)


def flat(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``[batch, heads, n, d]`` as ``[pairs, n, d]``, contiguous: a view where it is so already."""
    return x.to(dtype).contiguous().flatten(0, 1)


class KeyHeads(NamedTuple):
    """Which key head each pair reads: grouped-query attention without a repeated copy of all keys.

    repeats: query heads to a key head.
    """

    repeats: int

    def _index(self, group: Group, device: torch.device) -> torch.Tensor:
        return torch.arange(group.pairs.start, group.pairs.stop, device=device) // self.repeats

    def read(self, x: torch.Tensor, group: Group) -> torch.Tensor:
        """All pairs of samples and key heads ``[..., n, d]`` to the group's ``[pairs, n, d]``."""
        return x[group.pairs] if self.repeats == 1 else x[self._index(group, x.device)]

    def total(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Room for the gradient of keys or values, of the shape of ``x``, to be filled by :meth:`add`."""
        # Groups may share a key head, and then add to it.
        return (torch.empty if self.repeats == 1 else torch.zeros)(x.shape, dtype=dtype, device=x.device)

    def add(self, total: torch.Tensor, x: torch.Tensor, group: Group) -> None:
        """Bring in the group's ``[pairs, n, d]``."""
        if self.repeats == 1 and x.stride(-1) == 1:
            total.flatten(0, 1)[group.pairs] = x
        elif self.repeats == 1:  # a matrix at a time, or the copy would not go by tiles
            for room, part in zip(total.flatten(0, 1)[group.pairs], x, strict=True):
                room.copy_(part)
        else:
            total.flatten(0, 1).index_add_(0, self._index(group, x.device), x)


class Buffer:
    """Memory for one product at a time: a fresh allocation for every block would cost page faults.

    Args:
        like: a tensor of the device and dtype to work in.
        size: numbers that there is room for, once there is need of it.
    """

    def __init__(self, like: torch.Tensor, size: int) -> None:
        self.like, self.size = like, size
        self._memory: torch.Tensor | None = None

    def view(self, *shape: int) -> torch.Tensor:
        """A contiguous tensor of this shape; its content is what was there before."""
        if self._memory is None:
            self._memory = self.like.new_empty(self.size)
        return self._memory[: math.prod(shape)].view(shape)


class KeySums:
    """Accumulates A^T g over query blocks. Blocks run in reverse: if the first one sees all keys, it makes the sum.

    Held transposed where there are several blocks: a product with A on the right is faster than one with A^T on the
    left. The sum is transposed back at the end.

    Args:
        plan: what is computed.
        pairs: of the group.
        width: d.
        scratch: for one product.
    """

    def __init__(self, plan: Plan, pairs: int, width: int, scratch: Buffer) -> None:
        self.plan, self.shape, self.scratch = plan, (pairs, width, plan.key_length), scratch
        self.transposed = plan.block_rows < plan.length or plan.by_onednn
        self.given: torch.Tensor | None = None
        self.sums: torch.Tensor | None = None

    def begin(self, given: torch.Tensor) -> None:
        """Add a term to the queries' own rows, ``[pairs, length, d]``."""
        self.given = given

    def add(self, matrix: torch.Tensor, rows: torch.Tensor, first: int = 0) -> None:
        """Add A^T g of a block: ``[pairs, rows, keys]``, of the keys from ``first``, and ``[pairs, rows, d]``."""
        pairs, width, length = self.shape
        left, right = (rows.mT, matrix) if self.transposed else (matrix.mT, rows)
        if self.sums is None and matrix.shape[-1] == length:
            self._begin(multiply(left, right, by_onednn=self.plan.by_onednn))
            return
        sums = self._begin(self._zeros()) if self.sums is None else self.sums
        sums = sums.narrow(-1 if self.transposed else -2, first, matrix.shape[-1])
        if self.plan.by_onednn:
            add_product(sums, left, right)
        elif not self.transposed:  # several products of the only block
            sums.baddbmm_(left, right)
        else:
            sums += torch.bmm(left, right, out=self.scratch.view(pairs, width, matrix.shape[-1]))

    def _zeros(self) -> torch.Tensor:
        pairs, width, length = self.shape
        return self.scratch.like.new_zeros((pairs, width, length) if self.transposed else (pairs, length, width))

    def _begin(self, sums: torch.Tensor) -> torch.Tensor:
        self.sums = sums
        if self.given is not None:
            self.rows(slice(self.plan.past, self.plan.key_length)).add_(self.given)
        return sums

    def rows(self, keys: slice) -> torch.Tensor:
        """The sum so far for some keys, ``[pairs, keys, d]``, a view."""
        sums = self._begin(self._zeros()) if self.sums is None else self.sums  # without a block: no query, or no key
        return (sums.mT if self.transposed else sums)[:, keys]


class Weights:
    """The attention weights of softmax of a group, block by block, in buffers that are used again and again.

    Args:
        plan: what is computed.
        mask: boolean ``[batch or 1, heads or 1, length or 1, key_length or 1]``, or None.
        bias: added to the logits, of the same form, and the largest of it that each query sees, which is subtracted
            first: a number a row changes no softmax, and a large one would leave the products no digits. Or None.
        positions: the position kernel's term, or None.
        like: a tensor of the device and dtype to work in.
        sinks: ``[heads]``, the logit of one more key, whose value is 0, or None.
        runs: of the keys that the mask hides, the same for all queries, where these are few, or None.
        may_be_blind: whether mask and causality may leave a query no key. Parts of A that hide more see to theirs.
    """

    unit = LOG2_E
    """Of the logits: those of a natural exponential, times this."""
    counts_sinks = False
    """Whether a row has weights that sees a sink and no key; then every row is asked, whatever may be blind."""

    def __init__(
        self,
        plan: Plan,
        mask: torch.Tensor | None,
        bias: tuple[torch.Tensor, torch.Tensor] | None,
        positions: PositionTerm | None,
        like: torch.Tensor,
        sinks: torch.Tensor | None = None,
        runs: KeyRuns | None = None,
        *,
        may_be_blind: bool,
    ) -> None:
        self.plan, self.mask, self.bias, self.positions, self.runs = plan, mask, bias, positions, runs
        self.may_be_blind = may_be_blind
        # Where the same keys are hidden for all queries, in many runs: -inf is added at these, else 0.
        self.barred = None
        if mask is not None and runs is None and mask.shape[2:] == (1, plan.key_length):
            self.barred = torch.where(mask, 0.0, float("-inf")).to(like.dtype)
        self.sinks = None if sinks is None else sinks.detach().to(like.dtype) * self.unit
        rows = min(plan.block_rows, plan.length)
        self.size = plan.group_pairs * rows * plan.key_length
        self.buffer = Buffer(like, self.size)
        # Adding -inf is several times faster than filling in by a boolean mask.
        self.future = like.new_full((rows, rows), float("-inf")).triu(1) if plan.is_causal else None
        self.group = Group(0, *(slice(0, 0),) * 3)
        self.query = self.key = like
        self.is_full = mask is None

    def start(self, group: Group, query: torch.Tensor, key: torch.Tensor, *, is_full: bool = False) -> None:
        """Turn to a group's queries ``[pairs, length, d]`` and keys ``[pairs, key_length, d]``.

        Args:
            group: whose pairs these are.
            query: of the group.
            key: of the group.
            is_full: whether nothing but causality hides a key of a block, and every row sees one; so it is without
                a mask.
        """
        self.group, self.query, self.key, self.is_full = group, query, key, is_full or self.mask is None
        if self.plan.by_onednn:  # whose products have no factor
            self.query = query * (self.plan.scale * self.unit)

    def logits(self, block: Block) -> torch.Tensor:
        """Those of a block times ``unit``, -inf at what is hidden, ``[pairs, rows, keys]``; valid until the next."""
        query, key = self.query[:, block.rows], self.key[:, block.columns].mT
        if self.plan.by_onednn:
            room = partial(self.buffer.view, query.shape[0], *block.shape)
            scores = multiply(query, key, room, by_onednn=True)
        else:
            scores = self.buffer.view(query.shape[0], *block.shape)
            start, beta = scores, 0.0
            if self.barred is not None and not self.is_full:  # the product is added to it, which takes no other pass
                barred = cut(self.barred, self.group, block).expand(*self.group.shape, -1, -1)
                start, beta = barred.flatten(0, 1), 1.0
            torch.baddbmm(start, query, key, beta=beta, alpha=self.plan.scale * self.unit, out=scores)
        is_plain = self.positions is None and self.bias is None and self.is_full
        shaped = scores if is_plain else scores.view(*self.group.shape, *block.shape)
        if self.positions is not None:
            self.positions.add_(shaped, self.group, block, self.unit)
        if self.bias is not None:
            bias, largest = (cut(x, self.group, block).to(scores.dtype) for x in self.bias)
            shaped.add_(bias - largest, alpha=self.unit)
        if not self.is_full:
            self._hide_(shaped, scores, block)
        if self.future is not None:
            own = scores[:, :, min(block.own, block.shape[1]) :]
            future = self.future[: own.shape[1], : own.shape[2]]
            if self.mask is None or self.runs is not None or self.barred is not None:
                own.add_(future)
            else:  # a query that sees no key may be NaN, which adding -inf does not hide
                own.masked_fill_(future < 0.0, float("-inf"))
        return scores

    def _hide_(self, shaped: torch.Tensor, scores: torch.Tensor, block: Block) -> None:
        """Make -inf of the logits that the mask hides, ``[samples, heads, rows, keys]``, the same as ``scores``."""
        if self.runs is not None:
            self.runs.fill_(scores.mT, self.group, float("-inf"), block.first)
        elif self.barred is not None:
            if self.plan.by_onednn:
                shaped.add_(cut(self.barred, self.group, block))
        elif self.mask is not None:
            shaped.masked_fill_(~cut(self.mask, self.group, block), float("-inf"))

    def compute(self, block: Block) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Weights up to a factor a row, without dropout.

        Returns:
            ``[pairs, rows, keys]``, valid until the next block; the factor that normalises them, ``[pairs, rows, 1]``,
            0 for rows that see no key; and what :meth:`recompute` needs, ``[pairs, rows, 2]``: the base-2 log-sum-exp,
            infinite for rows that see no key, and the factor that makes good its rounding.
        """
        scores = self.logits(block)
        of_keys, empty = scores.amax(-1, keepdim=True), None
        sinks = None if self.sinks is None else self._sink_logits(self.sinks)
        largest = of_keys if sinks is None else torch.maximum(of_keys, sinks)
        if self.counts_sinks or (self.may_be_blind and not self.is_full) or self.bias is not None:
            empty = (largest if self.counts_sinks else of_keys) == float("-inf")
            largest.masked_fill_(empty, 0.0)
        total = scores.sub_(largest).exp2_().sum(-1, keepdim=True)
        if sinks is not None:
            total.add_(torch.exp2(sinks - largest))
        if empty is not None:
            total.masked_fill_(empty, float("inf"))
        factor, log_sum = total.reciprocal(), total.log2_().add_(largest)
        correction = (log_sum - largest).exp2_().mul_(factor)
        if empty is not None:
            correction.masked_fill_(empty, 1.0)
        return scores, factor, torch.cat((log_sum, correction), dim=-1)

    def _sink_logits(self, sinks: torch.Tensor) -> torch.Tensor:
        """``[heads]`` to those of each pair, ``[pairs, 1, 1]``."""
        samples, heads = self.group.shape
        return sinks[self.group.heads].expand(samples, heads).reshape(-1, 1, 1)

    def recompute(self, block: Block, row_sums: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A's block again, without dropout, from what :meth:`compute` found of all rows, ``[pairs, length, 2]``.

        Returns:
            ``[pairs, rows, keys]``, and the factor near 1 that normalises them, ``[pairs, rows, 1]``.
        """
        log_sum, correction = row_sums[:, block.rows].split(1, dim=-1)
        return self.logits(block).sub_(log_sum).exp2_(), correction

    def logits_grad(self, d_matrix: torch.Tensor, matrix: torch.Tensor, row_term: torch.Tensor) -> torch.Tensor:
        """The gradient of a block's logits, in the memory of ``d_matrix``.

        Args:
            d_matrix: dA, with the factor of :meth:`recompute`, ``[pairs, rows, keys]``.
            matrix: as :meth:`recompute` returned it, of the same block.
            row_term: D, with the factor too, ``[pairs, rows, 1]``.
        """
        return d_matrix.sub_(row_term).mul_(matrix)

    def logits_grad_of(
        self, d_matrix: torch.Tensor, matrix: torch.Tensor, row_term: torch.Tensor, factor: torch.Tensor
    ) -> torch.Tensor:
        """The same where the matrix has the factor of :meth:`recompute`, ``factor``, and the others do not."""
        return self.logits_grad(d_matrix, matrix, row_term)

    def add_to_sinks(self, total: torch.Tensor, row_term: torch.Tensor, row_sums: torch.Tensor) -> None:
        """Add a block's share to the gradient of the sinks, ``[heads]``: -D of each row times the sink's weight.

        Args:
            total: what is added to.
            row_term: D, with the factor of :meth:`recompute`, ``[pairs, rows, 1]``.
            row_sums: of the same rows, ``[pairs, rows, 2]``.
        """
        if self.sinks is not None:
            share = (
                torch.exp2(self._sink_logits(self.sinks) - row_sums[..., :1])
                .mul_(row_term)
                .sum((1, 2))
                .view(self.group.shape)
            )
            total[self.group.heads] -= share.sum(0)

    def add_to_positions(self, d_logits: torch.Tensor, block: Block) -> None:
        """Add a block's gradient of the logits, which may be overwritten, to those of the position kernel."""
        if self.positions is not None:
            self.positions.accumulate(d_logits.unflatten(0, self.group.shape), self.group, block)

    def add_to_bias(self, total: torch.Tensor, d_logits: torch.Tensor, block: Block) -> None:
        """Add a block's gradient of the logits, ``[pairs, rows, keys]``, to that of the bias."""
        part = cut(total, self.group, block)
        part += d_logits.view(*self.group.shape, *d_logits.shape[1:]).sum_to_size(part.shape)
