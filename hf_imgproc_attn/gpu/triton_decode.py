"""Decoding: a few new tokens against cached keys, values and streams of the booster, each read from memory once.

A single token has one row of A, which cannot fill a GPU: the cached keys are cut into chunks, a program each.

    chunk       of its keys the largest logit, the sum of exponentials, and the products with V and every stream
    combine     one program a head joins the chunks, adds the new tokens' own keys, and runs the booster: the rows that
                it adds to the streams need A only among the new tokens

Rows of a chunk's tile are the new tokens of all query heads that share a key head, so that a key is loaded once for
its group. What is hidden is not read.
"""

import triton
import triton.language as tl

from .triton_logits import softmax_step
from .triton_positions import add_position
from .triton_tiles import (
    add_product,
    base_of,
    hide,
    item_of,
    load_rows,
    product,
    rounded,
    seen_keys,
    store_rows,
    tuned,
)

NONE: tl.constexpr = tl.constexpr(0)
TWICING: tl.constexpr = tl.constexpr(1)
LEARNED: tl.constexpr = tl.constexpr(2)
DIFFUSION: tl.constexpr = tl.constexpr(3)
SOS: tl.constexpr = tl.constexpr(4)
BOOSTERS = {"none": NONE, "twicing": TWICING, "learned": LEARNED, "diffusion": DIFFUSION, "sos": SOS}
"""Keys of ``boost_operators.BOOSTING`` -> what the kernels call them."""
MOST_STREAMS = 3
MOST_QUERIES = 16
"""New tokens at a time: the rows of the smallest tile that products have."""


@triton.jit
def load_seen(pointer, stride, rows, seen, columns, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """``[block, BLOCK]``; 0 in rows that are not seen, which may hold anything."""
    inside = seen[:, None]
    if WIDTH != BLOCK:
        inside = inside & (columns[None, :] < WIDTH)
    return tl.load(pointer + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _add_key_bias(scores, bias_pointer, item, key_rows, seen, key_length, HAS_BIAS: tl.constexpr):
    """Logits with the number of each key added; ``item`` is that of each row, ``[rows]``."""
    if HAS_BIAS:
        of_keys = bias_pointer + item[:, None].to(tl.int64) * key_length + key_rows[None, :]
        scores = scores + tl.load(of_keys, mask=seen[None, :], other=0.0)
    return scores


@triton.jit
def _add_stream(
    total, weights, members, stream, batch, head, key_rows, seen, columns,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Each row's product with the stream of its own head; ``head`` is the first of the group."""
    for member in tl.static_range(0, GROUP):
        rows = load_seen(base_of(stream, batch, head + member), stream.row, key_rows, seen, columns, WIDTH, BLOCK)
        own = weights
        if GROUP > 1:
            own = tl.where((members == member)[:, None], weights, 0.0)
        total = add_product(rounded(own, rows.dtype), rows, total)
    return total


@tuned(
    # The first one fits whatever the widths, streams and heads of a group: it loads nothing ahead.
    [
        ({"BLOCK_N": 32}, 4, 1),
        ({"BLOCK_N": 64}, 4, 2),
        ({"BLOCK_N": 64}, 4, 3),
        ({"BLOCK_N": 128}, 4, 2),
        ({"BLOCK_N": 128}, 8, 2),
    ],
    ["chunk_length", "WIDTH", "VALUE_WIDTH", "HAS_MASK", "POSITION", "STREAMS", "GROUP"],
)
@triton.jit
def decode_chunk_kernel(
    queries, keys, values, stream_1, stream_2, stream_3, mask_pointer, bias_pointer,
    highest_pointer, total_pointer, sums_pointer, places,
    heads, length, key_length, chunks, chunk_length, scale,
    WIDTH: tl.constexpr, BLOCK_W: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_V: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_BIAS: tl.constexpr, POSITION: tl.constexpr, STREAMS: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One chunk of a key head's cached keys; nothing in it is divided by the sum of exponentials."""
    chunk, item = tl.program_id(0) % chunks, tl.program_id(0) // chunks
    batch, key_head = item_of(item, heads // GROUP)
    head, past = key_head * GROUP, key_length - length
    rows = tl.arange(0, ROWS)
    members, tokens = tl.minimum(rows // length, GROUP - 1), rows % length
    row_heads, inside = head + members, rows < GROUP * length
    columns, value_columns = tl.arange(0, BLOCK_W), tl.arange(0, BLOCK_V)
    query_rows = queries.pointer + batch * queries.batch + row_heads[:, None] * queries.head
    query = tl.load(
        query_rows + tokens[:, None] * queries.row + columns[None, :],
        mask=inside[:, None] & (columns[None, :] < WIDTH),
        other=0.0,
    )
    mask = mask_pointer + batch * key_length
    low, high = chunk * chunk_length, tl.minimum((chunk + 1) * chunk_length, past)
    highest = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    smooth = tl.zeros([ROWS, BLOCK_V], dtype=tl.float32)
    sum_1, sum_2, sum_3 = smooth, smooth, smooth
    for start in range(low, high, BLOCK_N):
        key_rows = start + tl.arange(0, BLOCK_N)
        seen = seen_keys(mask, key_rows, high, HAS_MASK)
        key = load_rows(base_of(keys, batch, head), keys.row, key_rows, columns, high, WIDTH, BLOCK_W)
        scores = product(query, tl.trans(key)) * scale
        scores = add_position(scores, places, batch, row_heads[:, None], tokens, key_rows, length, POSITION, False)
        scores = _add_key_bias(scores, bias_pointer, batch * heads + row_heads, key_rows, seen, key_length, HAS_BIAS)
        scores = hide(scores, tokens, key_rows, seen, False)
        weights, shrink, total, highest = softmax_step(scores, highest, total)
        value = load_seen(
            base_of(values, batch, head), values.row, key_rows, seen, value_columns, VALUE_WIDTH, BLOCK_V
        )
        smooth = add_product(rounded(weights, value.dtype), value, smooth * shrink[:, None])
        if STREAMS > 0:
            sum_1 = _add_stream(
                sum_1 * shrink[:, None], weights, members, stream_1, batch, head, key_rows, seen, value_columns,
                VALUE_WIDTH, BLOCK_V, GROUP,
            )  # fmt: skip
        if STREAMS > 1:
            sum_2 = _add_stream(
                sum_2 * shrink[:, None], weights, members, stream_2, batch, head, key_rows, seen, value_columns,
                VALUE_WIDTH, BLOCK_V, GROUP,
            )  # fmt: skip
        if STREAMS > 2:
            sum_3 = _add_stream(
                sum_3 * shrink[:, None], weights, members, stream_3, batch, head, key_rows, seen, value_columns,
                VALUE_WIDTH, BLOCK_V, GROUP,
            )  # fmt: skip
    place = (batch * heads + row_heads) * chunks + chunk
    tl.store(highest_pointer + place * length + tokens, highest, mask=inside)
    tl.store(total_pointer + place * length + tokens, total, mask=inside)
    stored = inside[:, None] & (value_columns[None, :] < VALUE_WIDTH)
    into = sums_pointer + (place * (STREAMS + 1) * length + tokens)[:, None] * VALUE_WIDTH + value_columns[None, :]
    tl.store(into, smooth, mask=stored)
    if STREAMS > 0:
        tl.store(into + length * VALUE_WIDTH, sum_1, mask=stored)
    if STREAMS > 1:
        tl.store(into + 2 * length * VALUE_WIDTH, sum_2, mask=stored)
    if STREAMS > 2:
        tl.store(into + 3 * length * VALUE_WIDTH, sum_3, mask=stored)


@triton.jit
def _joined(
    highest_base, sums_base, base, total, rows, columns, length, chunks, number,
    VALUE_WIDTH: tl.constexpr, BLOCK_V: tl.constexpr, STREAMS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A's product with the cached rows of V (number 0) or of a stream, for the new tokens: all chunks together."""
    joined = tl.zeros([ROWS, BLOCK_V], dtype=tl.float32)
    for chunk in range(chunks):
        highest = tl.load(highest_base + chunk * length + rows, mask=rows < length, other=float("-inf"))
        part = sums_base + (chunk * (STREAMS + 1) + number) * length * VALUE_WIDTH
        found = load_rows(part, VALUE_WIDTH, rows, columns, length, VALUE_WIDTH, BLOCK_V)
        joined += found * tl.exp2(highest - base)[:, None]
    return joined / total[:, None]


@triton.jit
def decode_combine_kernel(
    queries, keys, values, outputs, mask_pointer, bias_pointer, gain_pointer,
    highest_pointer, total_pointer, sums_pointer, rows_pointer, places,
    heads, items, length, key_length, chunks, scale,
    WIDTH: tl.constexpr, BLOCK_W: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_V: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_BIAS: tl.constexpr, POSITION: tl.constexpr, CAUSAL: tl.constexpr,
    BOOSTER: tl.constexpr, STREAMS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The output of one head's new tokens, and the rows that they add to the booster's streams."""
    item = tl.program_id(0)
    batch, head = item_of(item, heads)
    rows = tl.arange(0, ROWS)
    columns, value_columns = tl.arange(0, BLOCK_W), tl.arange(0, BLOCK_V)
    past = key_length - length
    key_base = base_of(keys, batch, head) + past.to(tl.int64) * keys.row
    query = load_rows(base_of(queries, batch, head), queries.row, rows, columns, length, WIDTH, BLOCK_W)
    key = load_rows(key_base, keys.row, rows, columns, length, WIDTH, BLOCK_W)
    seen = seen_keys(mask_pointer + batch * key_length + past, rows, length, HAS_MASK)
    scores = product(query, tl.trans(key)) * scale
    scores = add_position(scores, places, batch, head, rows, past + rows, length, POSITION, False)
    scores = _add_key_bias(scores, bias_pointer, item + rows * 0, past + rows, seen, key_length, HAS_BIAS)
    scores = hide(scores, rows, rows, seen, CAUSAL)
    highest_base = highest_pointer + item.to(tl.int64) * chunks * length
    highest = tl.max(scores, 1)
    for chunk in range(chunks):
        found = tl.load(highest_base + chunk * length + rows, mask=rows < length, other=float("-inf"))
        highest = tl.maximum(highest, found)
    base = tl.where(highest == float("-inf"), 0.0, highest)
    weights = tl.exp2(scores - base[:, None])
    total = tl.sum(weights, 1)
    total_base = total_pointer + item.to(tl.int64) * chunks * length
    for chunk in range(chunks):
        of_chunk = tl.load(highest_base + chunk * length + rows, mask=rows < length, other=float("-inf"))
        part = tl.load(total_base + chunk * length + rows, mask=rows < length, other=0.0)
        total += part * tl.exp2(of_chunk - base)
    total = tl.where(total > 0.0, total, 1.0)  # a row that sees no key gives 0
    value_base = base_of(values, batch, head) + past.to(tl.int64) * values.row
    value = load_seen(value_base, values.row, rows, seen, value_columns, VALUE_WIDTH, BLOCK_V)
    own = rounded(weights / total[:, None], value.dtype)
    sums_base = sums_pointer + item.to(tl.int64) * chunks * (STREAMS + 1) * length * VALUE_WIDTH
    smooth = _joined(
        highest_base, sums_base, base, total, rows, value_columns, length, chunks, 0,
        VALUE_WIDTH, BLOCK_V, STREAMS, ROWS,
    )  # fmt: skip
    smooth = add_product(own, value, smooth)
    output, stream = smooth, value.to(tl.float32)
    for step in tl.static_range(0, STREAMS):
        if BOOSTER == SOS:
            stream = value.to(tl.float32) + output
        elif BOOSTER == DIFFUSION:
            stream = smooth
        else:
            stream = stream - smooth
        new = rounded(tl.where(seen[:, None], stream, 0.0), value.dtype)
        new_base = rows_pointer + (step * items + item).to(tl.int64) * length * VALUE_WIDTH
        store_rows(new_base, VALUE_WIDTH, rows, value_columns, new, length, VALUE_WIDTH, BLOCK_V)
        smooth = _joined(
            highest_base, sums_base, base, total, rows, value_columns, length, chunks, step + 1,
            VALUE_WIDTH, BLOCK_V, STREAMS, ROWS,
        )  # fmt: skip
        smooth = add_product(own, new, smooth)
        if BOOSTER == SOS:
            output = smooth - output
        elif BOOSTER == DIFFUSION:
            output = smooth
        elif BOOSTER == LEARNED:
            output = output + tl.load(gain_pointer + head) * smooth
        else:
            output = output + smooth
    out_base = base_of(outputs, batch, head)
    store_rows(out_base, outputs.row, rows, value_columns, output, length, VALUE_WIDTH, BLOCK_V)
