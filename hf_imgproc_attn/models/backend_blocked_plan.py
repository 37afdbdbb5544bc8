"""How blocked attention is cut into pieces that stay in cache.

A *group* is a few (batch, head) pairs whose products run as one batched product; a *block* is a range of query rows
with the keys they may see.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from .backend_blocked_products import Room, multiply, suits_onednn

BLOCK_ROWS = 128
"""Query rows of a block of causal or long attention."""
GROUP_SCORES = 2**21
"""Scores that a block may have over all pairs of a group: 8 MB in float32."""
MIN_GROUP_PAIRS = 4
"""Fewer would leave cores idle: batched products are shared out by pairs."""
BACKWARD_LENGTH = 2048
"""Queries from which on the backward pass takes blocks of twice the rows: its sums over keys are then half as many."""
WHOLE_GROUP_SCORES = 2**20
"""The same where all rows are one block."""
WHOLE_SCORES = 2**20
"""Bidirectional attention with at most so many scores a head is one block: its weights are computed once."""


class Block(NamedTuple):
    """Query rows ``start:stop``, which see keys ``0:keys``."""

    number: int
    start: int
    stop: int
    keys: int


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
    wanted = (group.batch, group.heads, slice(block.start, block.stop), slice(0, block.keys))
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

    @property
    def backward(self) -> Plan:
        """How the backward pass is cut. A dropout mask belongs to its block, so that there nothing may change."""
        is_long = BLOCK_ROWS <= self.block_rows < self.length >= BACKWARD_LENGTH
        return self._replace(block_rows=2 * self.block_rows) if is_long and not self.dropout else self

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

    def multiply(self, left: torch.Tensor, right: torch.Tensor, room: Room | None = None) -> torch.Tensor:
        """A batched product; see there."""
        return multiply(left, right, room, by_onednn=self.by_onednn)

    def dropout_factors(self, group: Group, block: Block, like: torch.Tensor) -> torch.Tensor:
        """The dropout mask of a block, 0 or 1/(1 - p), ``[pairs, rows, keys]``: the same whenever it is asked for."""
        count = group.number * -(-self.length // self.block_rows) + block.number
        generator = torch.Generator(like.device).manual_seed((self.seed + count) % 2**63)
        shape = (math.prod(group.shape), block.stop - block.start, block.keys)
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
        group_pairs: pairs of a group. None: as many as keep a block within ``GROUP_SCORES`` (``WHOLE_GROUP_SCORES``),
            but at least ``MIN_GROUP_PAIRS``.
    """
    batch, heads, length, _ = query.shape
    key_length = key.shape[-2]
    if block_rows is None:
        whole = not is_causal and (not one_pass or length <= 2 * BLOCK_ROWS) and length * key_length <= WHOLE_SCORES
        block_rows = length if whole else BLOCK_ROWS
    block_rows = max(min(block_rows, length), 1)
    if group_pairs is None:
        most = WHOLE_GROUP_SCORES if block_rows == length else GROUP_SCORES
        group_pairs = max(most // max(block_rows * key_length, 1), MIN_GROUP_PAIRS)
    group_pairs = max(min(group_pairs, batch * heads), 1)
    sizes = (batch, heads, key.shape[1], length, key_length)
    like = query.new_empty(0, dtype=torch.promote_types(query.dtype, torch.float32))
    by_onednn = suits_onednn(like, block_rows * key_length * query.shape[-1])
    return Plan(*sizes, is_causal, scale, dropout, seed, block_rows, group_pairs, by_onednn)
