"""How blocked attention is cut into pieces that stay in cache.

A *group* is a few (batch, head) pairs whose products run as one batched product; a *block* is a range of query rows
with the keys they may see.

*Which library multiplies.* torch multiplies matrices of single precision with MKL, which keeps to narrower
instructions on processors that are not Intel's. oneDNN, which torch is built with as well, takes the widest that there
are. On an AMD EPYC (Zen 5), one thread, 128 rows, 1,024 keys and head width 64, it has 190 to 200 GFLOP/s, where MKL
has 100. Dense matrices of single precision reach it by one operator, the linear layer that ``torch.compile`` emits on
CPUs: one matrix at a time, each where its numbers stand side by side. Both work in single precision throughout.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch

BLOCK_ROWS = 128
"""Query rows of a block of causal or long attention."""
GROUP_SCORES = 2**21
"""Scores that a block may have over all pairs of a group: 8 MB in float32."""
MIN_GROUP_PAIRS = 4
"""Fewer would leave cores idle: batched products are shared out by pairs."""
TALL_ROWS = 256
"""The same as ``BLOCK_ROWS`` where oneDNN multiplies, whose calls have a price each, for each pair. Only within
``TALL_GROUP_SCORES``: a block takes memory."""
TALL_GROUP_SCORES = 2**20
"""The same as ``GROUP_SCORES`` there. A group may be a single pair: cores share one product."""
BACKWARD_LENGTH = 2048
"""Queries from which on the backward pass takes blocks of ``2 * BLOCK_ROWS``: its sums over keys are half as many."""
WHOLE_GROUP_SCORES = 2**20
"""The same where all rows are one block."""
LEAST_SAMPLE_SCORES = 2**15
"""Scores of a block over all heads from which on a sample whose padding is left out is worth a group of its own."""
PAIR_SCORES = 2**16
"""Scores of a pair up to which its matrices stay in the cache of a core."""
WHOLE_SCORES = 2**20
"""Bidirectional attention with at most so many scores a head is one block: its weights are computed once."""


class Block(NamedTuple):
    """Query rows ``start:stop``, which see keys ``first:keys``."""

    number: int
    start: int
    stop: int
    keys: int
    first: int
    rows: slice
    """Its queries."""
    columns: slice
    """Its keys."""
    shape: tuple[int, int]
    """Number of queries and keys."""
    own: int
    """Where the own key of the first query stands among the block's keys; it may be beyond the last one."""


class Group(NamedTuple):
    """Samples and heads ``[start, stop)``: either some heads of one sample, or whole samples."""

    number: int
    batch: slice
    heads: slice
    pairs: slice
    """Where they are among all pairs, ``sample * heads + head``: side by side."""

    @property
    def shape(self) -> tuple[int, int]:
        """Number of samples and heads."""
        return self.batch.stop - self.batch.start, self.heads.stop - self.heads.start


def cut(x: torch.Tensor, group: Group, block: Block) -> torch.Tensor:
    """A block's part of a tensor with four axes that is broadcastable to ``[batch, heads, length, key_length]``."""
    wanted = (group.batch, group.heads, block.rows, block.columns)
    return x[tuple(slice(None) if size == 1 else part for size, part in zip(x.shape, wanted, strict=True))]


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
        by_onednn: whether products go to oneDNN.
        by_pair: whether all rows are one block, so small that a pair at a time is fastest where little else is done.
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
    by_onednn: bool = False
    by_pair: bool = False

    @property
    def backward(self) -> Plan:
        """How the backward pass is cut. A dropout mask belongs to its block, so that there nothing may change."""
        is_long = self.block_rows == BLOCK_ROWS < self.length >= BACKWARD_LENGTH
        return self._replace(block_rows=2 * self.block_rows) if is_long and not self.dropout else self

    @property
    def past(self) -> int:
        """Keys before the first query's own."""
        return self.key_length - self.length

    def by_sample(self) -> Plan:
        """With groups of one sample, if that leaves enough to do in each: samples see different keys."""
        is_large = self.heads * self.block_rows * self.key_length >= LEAST_SAMPLE_SCORES
        return self._replace(group_pairs=min(self.group_pairs, self.heads)) if is_large else self

    def blocks(self, first: int = 0, end: int | None = None) -> list[Block]:
        """The blocks in order, those of the keys ``first:end`` only: without queries that come before all of these."""
        past, blocks = self.key_length - self.length, []
        end = self.key_length if end is None else end
        for number, begin in enumerate(range(0, self.length, self.block_rows)):
            stop = min(begin + self.block_rows, self.length)
            start, keys = (max(begin, first - past), min(past + stop, end)) if self.is_causal else (begin, end)
            if start < stop and (first < keys or not self.key_length):
                parts = slice(start, stop), slice(first, keys)
                shape, own = (stop - start, keys - first), past + start - first
                blocks.append(Block(number, start, stop, keys, first, *parts, shape, own))
        return blocks

    def groups(self) -> list[Group]:
        """All groups, in order; none without samples, heads or queries."""
        if not self.batch * self.heads * self.length:
            return []
        samples = max(self.group_pairs // self.heads, 1)
        heads = -(-self.heads // -(-self.heads // self.group_pairs))  # of equal size, as far as that goes
        groups: list[Group] = []
        for b in range(0, self.batch, samples):
            for h in range(0, self.heads, heads):
                batch, part = slice(b, min(b + samples, self.batch)), slice(h, min(h + heads, self.heads))
                pairs = slice(b * self.heads + h, (batch.stop - 1) * self.heads + part.stop)
                groups.append(Group(len(groups), batch, part, pairs))
        return groups

    def dropout_factors(self, group: Group, block: Block, like: torch.Tensor) -> torch.Tensor:
        """The dropout mask of a block, 0 or 1/(1 - p), ``[pairs, rows, keys]``: the same whenever it is asked for."""
        count = group.number * -(-self.length // self.block_rows) + block.number
        generator = torch.Generator(like.device).manual_seed((self.seed + count) % 2**63)
        shape = (math.prod(group.shape), *block.shape)
        factors = torch.empty(shape, dtype=like.dtype, device=like.device).bernoulli_(
            1.0 - self.dropout, generator=generator
        )
        return factors.mul_(1.0 / (1.0 - self.dropout))


def make_plan(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    is_causal: bool,
    scale: float,
    dropout: float,
    seed: int,
    one_pass: bool,
    may_be_tall: bool = False,
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
        may_be_tall: whether the work in a block is products and little else, so that it may have ``TALL_ROWS``.
        block_rows: rows of a block. None: all of them where a head's weights fit in cache and no causal half would be
            wasted, else ``BLOCK_ROWS``.
        group_pairs: pairs of a group. None: as many as keep a block within ``GROUP_SCORES`` (``WHOLE_GROUP_SCORES``),
            but at least ``MIN_GROUP_PAIRS``.
    """
    batch, heads, length, _ = query.shape
    key_length = key.shape[-2]
    like = query.new_empty(0, dtype=torch.promote_types(query.dtype, torch.float32))
    if block_rows is None:
        whole = not is_causal and (not one_pass or length <= 2 * BLOCK_ROWS) and length * key_length <= WHOLE_SCORES
        held = 2 if dropout else 1  # the mask and the weights without what it drops take as much again
        is_tall = may_be_tall and length > TALL_ROWS and held * TALL_ROWS * key_length <= TALL_GROUP_SCORES
        is_tall = is_tall and suits_onednn(like, TALL_ROWS * key_length * query.shape[-1])
        block_rows = length if whole else TALL_ROWS if is_tall else BLOCK_ROWS
    block_rows = max(min(block_rows, length), 1)
    by_onednn = suits_onednn(like, block_rows * key_length * query.shape[-1])
    is_alone = not is_causal and not dropout and block_rows == length and group_pairs is None
    by_pair = is_alone and suits_pairs(query, key_length)
    if group_pairs is None:
        most, least = WHOLE_GROUP_SCORES if block_rows == length else GROUP_SCORES, MIN_GROUP_PAIRS
        if by_onednn and may_be_tall:
            most, least = TALL_GROUP_SCORES, 1
        group_pairs = max(most // max(block_rows * key_length, 1), least)
    group_pairs = max(min(group_pairs, batch * heads), 1)
    sizes = (batch, heads, key.shape[1], length, key_length)
    return Plan(*sizes, is_causal, scale, dropout, seed, block_rows, group_pairs, by_onednn, by_pair)


# --------------------------------------------------------------------------------------------------------------------
# Products
# --------------------------------------------------------------------------------------------------------------------

LEAST_WORK = 2**21
"""Multiplications of a product, rows x keys x width, from which on oneDNN is worth a call for each matrix."""
MOST_THREADS = 8
"""With more, a batched product has a matrix for each of them."""

LONGEST_SUM = 384
"""Terms of a sum that oneDNN adds at once: its error grows with their number (1.4 times that of ``torch.bmm`` for 384
terms, 1.7 times for 1,024, 2.2 times for 2,048). Pieces are copied first: in those of 384 products take half as long
again."""
LEAST_COLUMNS = 32
"""Columns from which on sums in pieces are faster than ``torch.bmm``."""

Linear = Callable[..., torch.Tensor]
"""(x ``[rows, inner]``, w ``[columns, inner]``, *PLAINLY) -> x w^T."""

PLAINLY: tuple[Any, ...] = (None, "none", [], "")
"""Arguments of the operator: no bias, nothing after the product."""

Room = Callable[[], torch.Tensor]
"""Gives memory of a product's shape; its content is what was there before."""


@lru_cache
def onednn_linear() -> Linear | None:
    """oneDNN's product, or None where it is not there, does not work or is not faster."""
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return None
    try:
        operator = torch.ops.mkldnn._linear_pointwise.default
        probe = operator(torch.ones(2, 3), torch.full((4, 3), 0.5), *PLAINLY)
    except (AttributeError, RuntimeError, TypeError):  # another version of torch
        return None
    if not torch.equal(probe, torch.full((2, 4), 1.5)):
        return None
    return operator


def suits_onednn(like: torch.Tensor, work: int) -> bool:
    """Whether a call's products go to oneDNN: all of them, since both directions must round logits alike.

    Args:
        like: a tensor of the dtype and device that products are computed in.
        work: multiplications of one product, rows x keys x width.
    """
    if like.dtype != torch.float32 or like.device.type != "cpu" or work < LEAST_WORK:
        return False
    return torch.get_num_threads() <= MOST_THREADS and onednn_linear() is not None


def suits_pairs(query: torch.Tensor, key_length: int) -> bool:
    """Whether bare attention of ``[batch, heads, length, head_dim]`` is fastest a pair at a time, all rows at once."""
    length, width = query.shape[-2:]
    if length * key_length > PAIR_SCORES or torch.get_num_threads() > 1:
        return False
    like = query.new_empty(0, dtype=torch.promote_types(query.dtype, torch.float32))
    return suits_onednn(like, length * key_length * width)


def multiply(left: torch.Tensor, right: torch.Tensor, room: Room | None = None, *, by_onednn: bool) -> torch.Tensor:
    """A batched product.

    Args:
        left: ``[pairs, rows, inner]``.
        right: ``[pairs, inner, columns]``.
        room: gives memory for the product, and is asked for it only where it is of use. None: there is none.
        by_onednn: as :func:`suits_onednn` said; long sums of few columns are left to ``torch.bmm``.

    Returns:
        ``[pairs, rows, columns]``.
    """
    inner, columns = right.shape[-2:]
    in_pieces = inner > LONGEST_SUM
    linear = onednn_linear() if by_onednn and not (in_pieces and columns < LEAST_COLUMNS) else None
    if linear is None:
        return torch.bmm(left, right) if room is None else torch.bmm(left, right, out=room())
    if in_pieces:
        out = left.new_zeros(*left.shape[:2], columns) if room is None else room().zero_()
        for x, w in zip(left.split(LONGEST_SUM, -1), right.split(LONGEST_SUM, -2), strict=True):
            add_product(out, x, w)
        return out
    left, right = _dense(left), _dense(right)
    if left.shape[0] == 1:
        return linear(left[0], right[0].mT, *PLAINLY).unsqueeze(0)
    out = left.new_empty(*left.shape[:2], columns) if room is None else room()
    for x, w, own in zip(left.unbind(), right.mT.unbind(), out.unbind(), strict=True):
        own.copy_(linear(x, w, *PLAINLY))
    return out


def add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add a batched product to what stands in ``total``, ``[pairs, rows, columns]``, matrix by matrix by oneDNN."""
    linear = onednn_linear()
    if linear is None:
        total.baddbmm_(left, right)
        return
    for x, w, own in zip(_dense(left).unbind(), _dense(right).mT.unbind(), total.unbind(), strict=True):
        own.add_(linear(x, w, *PLAINLY))


def _dense(matrices: torch.Tensor) -> torch.Tensor:
    """The same with each matrix in one piece, its transpose being as good: oneDNN is slow with anything else."""
    rows, columns = matrices.stride()[-2:]
    is_dense = (rows, columns) in ((matrices.shape[-1], 1), (1, matrices.shape[-2]))
    return matrices if is_dense else matrices.contiguous()
