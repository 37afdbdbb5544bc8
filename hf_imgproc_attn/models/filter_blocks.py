"""How boosted attention is cut into pieces that stay in cache, and the attention weights of one piece.

A *group* is a few (batch, head) pairs whose products run as one batched product; a *block* is a range of query rows
with the keys they may see. Nothing here knows of boosting: ``filter_blocked`` does.

Weights are powers of two, A_ij = 2^(s_ij - L_i) with s the logits in units of log 2 and L_i the row's base-2
log-sum-exp: the exponential of base 2 takes a third of the time of that of base e on a CPU.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from .filter_masks import visible

LOG2_E = math.log2(math.e)
BLOCK_ROWS = 128
"""Query rows of a block of causal or long attention."""
GROUP_SCORES = 2**19
"""Scores that a block may have over all pairs of a group: 2 MB in float32."""
WHOLE_SCORES = 2**20
"""Bidirectional attention with at most so many scores a head is one block: its weights are computed once."""


class Block(NamedTuple):
    """Query rows ``start:stop``, which see keys ``0:keys``."""

    number: int
    start: int
    stop: int
    keys: int


class Group(NamedTuple):
    """Samples and heads ``[first, last)``: either one sample, or whole samples."""

    number: int
    batch: slice
    heads: slice

    @property
    def shape(self) -> tuple[int, int]:
        """Number of samples and heads."""
        return self.batch.stop - self.batch.start, self.heads.stop - self.heads.start


class Plan(NamedTuple):
    """What one call computes besides its tensors, and how it is cut.

    Args:
        batch: samples.
        heads: query heads.
        key_heads: heads of keys and values, a divisor of ``heads``.
        length: queries; they are the last ones of the keys.
        key_length: keys.
        is_causal: whether query i sees no key after its own, ``key_length - length + i``.
        scale: factor on q.k.
        dropout: probability on A.
        seed: of the dropout masks.
        block_rows: rows of a block.
        group_pairs: (batch, head) pairs of a group.
    """

    batch: int
    heads: int
    key_heads: int
    length: int
    key_length: int
    is_causal: bool
    scale: float
    dropout: float
    seed: int
    block_rows: int
    group_pairs: int

    @property
    def past(self) -> int:
        """Keys before the first query's own."""
        return self.key_length - self.length

    def blocks(self) -> list[Block]:
        """All blocks, in order."""
        starts = range(0, self.length, self.block_rows)
        stops = [min(start + self.block_rows, self.length) for start in starts]
        return [
            Block(index, start, stop, self.past + stop if self.is_causal else self.key_length)
            for index, (start, stop) in enumerate(zip(starts, stops, strict=True))
        ]

    def groups(self) -> list[Group]:
        """All groups, in order."""
        samples = max(self.group_pairs // self.heads, 1)
        heads = -(-self.heads // -(-self.heads // self.group_pairs))  # of equal size, as far as that goes
        cuts = [
            (slice(b, min(b + samples, self.batch)), slice(h, min(h + heads, self.heads)))
            for b in range(0, self.batch, samples)
            for h in range(0, self.heads, heads)
        ]
        return [Group(index, *cut) for index, cut in enumerate(cuts)]

    def kept(self, group: Group, block: Block, like: torch.Tensor) -> torch.Tensor:
        """The dropout mask of a block, 0 or 1/(1 - p), ``[pairs, rows, keys]``: the same whenever it is asked for."""
        count = group.number * -(-self.length // self.block_rows) + block.number
        generator = torch.Generator(like.device).manual_seed((self.seed + count) % 2**63)
        shape = (math.prod(group.shape), block.stop - block.start, block.keys)
        kept = torch.empty(shape, dtype=like.dtype, device=like.device).bernoulli_(
            1.0 - self.dropout, generator=generator
        )
        return kept.mul_(1.0 / (1.0 - self.dropout))


def make_plan(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    is_causal: bool,
    scale: float,
    dropout: float,
    seed: int,
    one_pass: bool,
    block_rows: int | None = None,
    group_pairs: int | None = None,
) -> Plan:
    """Choose how to cut a call.

    Args:
        query: ``[batch, heads, length, head_dim]``.
        key: ``[batch, key_heads, key_length, head_dim]``.
        is_causal: see :class:`Plan`.
        scale: see :class:`Plan`.
        dropout: see :class:`Plan`.
        seed: see :class:`Plan`.
        one_pass: whether every block is visited once however long the queries are.
        block_rows: rows of a block. None: all of them where a head's weights fit in cache and no causal half would be
            wasted, else ``BLOCK_ROWS``.
        group_pairs: pairs of a group. None: as many as keep a block within ``GROUP_SCORES``.
    """
    batch, heads, length, _ = query.shape
    key_length = key.shape[-2]
    if block_rows is None:
        whole = not is_causal and (not one_pass or length <= 2 * BLOCK_ROWS) and length * key_length <= WHOLE_SCORES
        block_rows = length if whole else BLOCK_ROWS
    block_rows = max(min(block_rows, length), 1)
    if group_pairs is None:
        group_pairs = GROUP_SCORES // max(block_rows * key_length, 1)
    group_pairs = max(min(group_pairs, batch * heads), 1)
    sizes = (batch, heads, key.shape[1], length, key_length)
    return Plan(*sizes, is_causal, scale, dropout, seed, block_rows, group_pairs)


def cut(x: torch.Tensor, group: Group, block: Block) -> torch.Tensor:
    """A block's part of a tensor with four axes that is broadcastable to ``[batch, heads, length, key_length]``."""
    wanted = (group.batch, group.heads, slice(block.start, block.stop), slice(0, block.keys))
    return x[tuple(slice(None) if size == 1 else part for size, part in zip(x.shape, wanted, strict=True))]


def rows_of(x: torch.Tensor, group: Group, dtype: torch.dtype) -> torch.Tensor:
    """A group's part of ``[batch, heads, n, d]`` as ``[pairs, n, d]``: a view where layout and dtype allow it."""
    return x[group.batch, group.heads].to(dtype).flatten(0, 1)


class KeyHeads:
    """Which key head each query head of a group reads: grouped-query attention without a repeated copy of all keys."""

    def __init__(self, plan: Plan, group: Group, device: torch.device) -> None:
        repeats = plan.heads // plan.key_heads
        first, last = group.heads.start // repeats, (group.heads.stop - 1) // repeats + 1
        self.part = (group.batch, slice(first, last))
        self.index = torch.arange(group.heads.start, group.heads.stop, device=device) // repeats - first
        self.repeats = repeats

    def read(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """``[batch, key_heads, n, d]`` to the group's ``[pairs, n, d]``."""
        x = x[self.part].to(dtype)
        return (x if self.repeats == 1 else x.index_select(1, self.index)).flatten(0, 1)

    @staticmethod
    def total(plan: Plan, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Room for the gradient of keys or values ``[batch, key_heads, n, d]``, to be filled by :meth:`add`."""
        # Groups may share a key head, and then add to it.
        return (torch.empty_like if plan.heads == plan.key_heads else torch.zeros_like)(x, dtype=dtype)

    def add(self, total: torch.Tensor, x: torch.Tensor) -> None:
        """Bring in the group's ``[pairs, n, d]``."""
        x = x.unflatten(0, (-1, self.index.shape[0]))
        if self.repeats == 1:
            total[self.part] = x
        else:
            total[self.part].index_add_(1, self.index, x)


class Buffer:
    """Memory for one product at a time: a fresh allocation for every block would cost page faults."""

    def __init__(self, like: torch.Tensor, size: int) -> None:
        self.memory = like.new_empty(size)

    def view(self, *shape: int) -> torch.Tensor:
        """A contiguous tensor of this shape; its content is what was there before."""
        return self.memory[: math.prod(shape)].view(shape)


class KeySums:
    """A sum over blocks of products A^T g with the rows of keys, begun by the last block, which sees all keys.

    Held transposed where there are several blocks: a product with A on the right is faster than one with A^T on the left,
    but has to be turned in the end.

    Args:
        plan: what is computed.
        pairs: of the group.
        width: d.
        scratch: for one product.
    """

    def __init__(self, plan: Plan, pairs: int, width: int, scratch: Buffer) -> None:
        self.plan, self.shape, self.scratch = plan, (pairs, width, plan.key_length), scratch
        self.transposed = plan.block_rows < plan.length
        self.given: torch.Tensor | None = None
        self.sums: torch.Tensor | None = None

    def begin(self, given: torch.Tensor) -> None:
        """Add a term to the queries' own rows, ``[pairs, length, d]``."""
        self.given = given

    def add(self, matrix: torch.Tensor, rows: torch.Tensor) -> None:
        """Add A^T g of a block: ``[pairs, rows, keys]`` and ``[pairs, rows, d]``."""
        pairs, width, _ = self.shape
        left, right = (rows.mT, matrix) if self.transposed else (matrix.mT, rows)
        if self.sums is not None:
            part = self.scratch.view(pairs, width, matrix.shape[-1])
            self.sums[..., : matrix.shape[-1]] += torch.bmm(left, right, out=part)
            return
        self.sums = torch.bmm(left, right)
        if self.given is not None:
            self.rows(slice(self.plan.past, self.plan.key_length)).add_(self.given)

    def rows(self, keys: slice) -> torch.Tensor:
        """The sum so far for some keys, ``[pairs, keys, d]``, a view."""
        if self.sums is None:
            raise RuntimeError("the sum has not begun")
        return (self.sums.mT if self.transposed else self.sums)[:, keys]


class Weights:
    """The attention weights of a group, block by block, in buffers that are used again and again.

    Args:
        plan: what is computed.
        mask: boolean or additive float ``[batch or 1, heads or 1, length or 1, key_length or 1]``, or None.
        bias: added to the logits, of the same form, or None.
        like: a tensor of the device and dtype to work in.
    """

    def __init__(self, plan: Plan, mask: torch.Tensor | None, bias: torch.Tensor | None, like: torch.Tensor) -> None:
        self.plan, self.mask, self.bias = plan, mask, bias
        rows = min(plan.block_rows, plan.length)
        self.size = plan.group_pairs * rows * plan.key_length
        self.buffer = Buffer(like, self.size)
        # Adding -inf is several times faster than filling in by a boolean mask.
        self.future = like.new_full((rows, rows), float("-inf")).triu(1) if plan.is_causal else None
        self.group = Group(0, slice(0, 0), slice(0, 0))
        self.query = self.key = like

    def start(self, group: Group, query: torch.Tensor, key: torch.Tensor) -> None:
        """Turn to a group's queries ``[pairs, length, d]`` and keys ``[pairs, key_length, d]``."""
        self.group, self.query, self.key = group, query, key

    def _logits(self, block: Block) -> torch.Tensor:
        rows = block.stop - block.start
        scores = self.buffer.view(self.query.shape[0], rows, block.keys)
        query, key = self.query[:, block.start : block.stop], self.key[:, : block.keys].mT
        torch.baddbmm(scores, query, key, beta=0.0, alpha=self.plan.scale * LOG2_E, out=scores)
        shaped = scores.view(*self.group.shape, rows, block.keys)
        if self.bias is not None:
            shaped.add_(cut(self.bias, self.group, block), alpha=LOG2_E)
        if self.mask is not None:
            part = cut(self.mask, self.group, block)
            allowed, additive = visible(part, False, rows, block.keys, part.device)
            if additive is not None:
                shaped.add_(additive, alpha=LOG2_E)
            if allowed is not None:
                shaped.masked_fill_(~allowed, float("-inf"))
        if self.future is not None:
            scores[:, :, block.keys - rows :].add_(self.future[:rows, :rows])
        return scores

    def compute(self, block: Block) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Weights up to a factor a row, without dropout.

        Returns:
            ``[pairs, rows, keys]``, valid until the next block; the factor that normalises them, ``[pairs, rows, 1]``,
            0 for rows that see no key; and the base-2 log-sum-exp, ``[pairs, rows, 1]``, infinite for those rows.
        """
        scores = self._logits(block)
        largest = scores.amax(-1, keepdim=True)
        if self.mask is None and self.bias is None:
            total = scores.sub_(largest).exp2_().sum(-1, keepdim=True)
            return scores, total.reciprocal(), total.log2_().add_(largest)
        empty = largest == float("-inf")
        largest.masked_fill_(empty, 0.0)
        total = scores.sub_(largest).exp2_().sum(-1, keepdim=True).masked_fill_(empty, float("inf"))
        return scores, total.reciprocal(), total.log2_().add_(largest)

    def recall(self, block: Block, log_sum: torch.Tensor) -> torch.Tensor:
        """A's block again, normalised and without dropout, from the log-sum-exp of all rows ``[pairs, length, 1]``."""
        return self._logits(block).sub_(log_sum[:, block.start : block.stop]).exp2_()

    @staticmethod
    def through_softmax(d_matrix: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        """The gradient of the logits, A o (dA - (A o dA) 1), in the memory of dA."""
        softmax_backward = torch.ops.aten._softmax_backward_data.out
        softmax_backward(d_matrix, matrix, -1, matrix.dtype, grad_input=d_matrix)
        return d_matrix

    def add_to_bias(self, total: torch.Tensor, d_logits: torch.Tensor, block: Block) -> None:
        """Add a block's gradient of the logits, ``[pairs, rows, keys]``, to that of the bias."""
        part = cut(total, self.group, block)
        part += d_logits.view(*self.group.shape, *d_logits.shape[1:]).sum_to_size(part.shape)
