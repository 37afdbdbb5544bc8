"""Device functions that the Triton kernels share, and the rule of their configurations.

Every tensor is walked by pointers: ``rows`` ``[block]`` along the length, ``columns`` ``[BLOCK_D]`` along the head,
where elements are adjacent. Tensors with strides of their own come as :class:`Rows`, buffers without gaps as pointers.
``BLOCK_D`` is the head width rounded up to a power of two; columns beyond it read as 0.
Logits are in units of log 2 (the scale carries log2 e), because the hardware's exponential is base 2.
"""

import os
from typing import Any, NamedTuple

import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
"""Whether the kernels run on the CPU in Triton's interpreter: decided, as by Triton, when they are first imported."""

EMULATED: tl.constexpr = tl.constexpr(INTERPRETED)


class Rows(NamedTuple):
    """A tensor ``[batch, heads, length, head_dim]`` as a kernel takes it.

    pointer: its first element (a tensor where a kernel is called).
    batch: elements from one item of the batch to the next.
    head: from one head to the next.
    row: from one row to the next.
    group: query heads that share one of its heads: 1, or more for the keys and values of grouped-query attention.
    """

    pointer: Any
    batch: int
    head: int
    row: int
    group: int = 1


def tuned(configs: list[tuple[dict[str, int], int, int]], key: list[str], **options: Any) -> Any:
    """``triton.autotune`` over (block sizes, warps, stages); the interpreter, which cannot time, gets the first one.

    The first configuration of a list therefore has the smallest blocks.
    """
    chosen = configs[:1] if INTERPRETED else configs
    listed = [triton.Config(blocks, num_warps=warps, num_stages=stages) for blocks, warps, stages in chosen]
    return triton.autotune(configs=listed, key=key, **options)


@triton.jit
def item_of(item, heads):
    """The place in the batch and the head of a pair (batch, head) with number ``item``, in 64 bits."""
    return (item // heads).to(tl.int64), (item % heads).to(tl.int64)


@triton.jit
def block_of(length, BLOCK: tl.constexpr, BACKWARDS: tl.constexpr):
    """A program's block of rows, and its pair (batch, head); BACKWARDS: the last block comes first."""
    blocks = tl.cdiv(length, BLOCK)
    block = tl.program_id(0) % blocks
    if BACKWARDS:
        block = blocks - 1 - block
    return block, tl.program_id(0) // blocks


@triton.jit
def base_of(tensor, batch, head):
    """Where a head of :class:`Rows` starts, for a query head."""
    return tensor.pointer + batch * tensor.batch + (head // tensor.group) * tensor.head


@triton.jit
def load_rows(pointer, stride, rows, columns, length, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """``[block, BLOCK_D]``; rows beyond the length and columns beyond the head are 0."""
    inside = rows[:, None] < length
    if HEAD_DIM != BLOCK_D:
        inside = inside & (columns[None, :] < HEAD_DIM)
    return tl.load(pointer + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def store_rows(pointer, stride, rows, columns, tile, length, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write ``[block, BLOCK_D]`` in the destination's dtype, but for what lies outside."""
    inside = rows[:, None] < length
    if HEAD_DIM != BLOCK_D:
        inside = inside & (columns[None, :] < HEAD_DIM)
    tl.store(pointer + rows[:, None] * stride + columns[None, :], rounded(tile, pointer.dtype.element_ty), mask=inside)


@triton.jit
def rounded(tile, dtype: tl.constexpr):
    """float32 to the dtype, to nearest even. (The interpreter cuts bfloat16 off instead: there it is done by hand.)"""
    if EMULATED and tile.dtype == tl.float32 and dtype == tl.bfloat16:
        bits = tile.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return tile.to(dtype)


@triton.jit
def product(left, right):
    """left @ right, accumulated in float32; float32 operands are not rounded to TF32.

    (The interpreter multiplies bfloat16 as the integers that it stores them in: there it gets float32.)
    """
    if EMULATED:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, input_precision="ieee")


@triton.jit
def add_product(left, right, total):
    """total + left @ right, as :func:`product`."""
    if EMULATED:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision="ieee")


@triton.jit
def seen_keys(mask, key_rows, length, HAS_MASK: tl.constexpr):
    """Whether each key exists and is not padding, ``[block]``; ``mask`` is one batch item's."""
    seen = key_rows < length
    if HAS_MASK:
        seen = seen & (tl.load(mask + key_rows, mask=seen, other=0) != 0)
    return seen


@triton.jit
def hide(scores, query_rows, key_rows, seen, CAUSAL: tl.constexpr):
    """Logits ``[queries, keys]`` with -inf where a query does not see a key."""
    visible = seen[None, :]
    if CAUSAL:
        visible = visible & (query_rows[:, None] >= key_rows[None, :])
    return tl.where(visible, scores, float("-inf"))


@triton.jit
def hide_transposed(scores, query_rows, key_rows, seen, CAUSAL: tl.constexpr):
    """:func:`hide` for logits ``[keys, queries]``."""
    visible = seen[:, None]
    if CAUSAL:
        visible = visible & (query_rows[None, :] >= key_rows[:, None])
    return tl.where(visible, scores, float("-inf"))
