"""Position kernels inside the Triton kernels: what they add to a tile of logits, and the sums of their gradients.

The formulas are those of ``models.kernel_blocks``: s = t B(c_ij), linear in a head's few parameters t. From the
coordinates of a tile's rows and columns, so that nothing of size length x length is read:

    SQUARED     B = -|p_i - p_j|^2 / 2      Gaussian, t = 2/h_p^2
    DISTANCE    B = -|p_i - p_j|            ALiBi, t = the slope
    BUCKETS     1 in its own bucket         relative buckets, t = a table: an offset looks up its bucket, then t

A Gaussian of contents is an inner product and a number for each key, -|k_j|^2 / h_y^2: ``key_bias`` is added to all
logits of a key, and its gradient is the sum of dL/ds over the queries. What it lacks, ``query_bias``, is added to all
logits of a query, where weights depend on it; so are the numbers c_i - c_j of ``forget``.

Class tokens have no place: B is 0, and one of three scalars of the head is added (grid to class, class to grid, class
to class). *Gradients*: a block of keys adds dL/ds B over all its queries and writes its sums into a slot of its own,
so that they depend on no order; what calls the kernels adds the slots.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .triton_tiles import hide, seen_keys

NOTHING: tl.constexpr = tl.constexpr(0)
SQUARED: tl.constexpr = tl.constexpr(1)
DISTANCE: tl.constexpr = tl.constexpr(2)
BUCKETS: tl.constexpr = tl.constexpr(3)
ONLY_KEYS: tl.constexpr = tl.constexpr(4)
"""A number for each key and no position kernel."""


class Places(NamedTuple):
    """What is added to the logits, as the kernels take it: a position kernel, a number for each key, or both.

    queries: p of the queries, float32 ``[batch or 1, length, axes]``.
    keys: p of the keys, float32 ``[batch or 1, key_length, axes]``.
    query_step: elements from one item of the batch to the next, 0 where all share their places.
    key_step: likewise.
    nearest: the largest B that each query sees, float32 ``[batch, length]``, which is taken from all B of its row;
        anything where every query sees itself. Neither the softmax nor, since dL/ds sums to 0 over a row, the gradient
        notices, and the logits of near keys keep their digits.
    parameters: float32 ``[heads, count]`` in units of log 2: t, and behind it the scalars of class tokens, if any.
    lookup: of buckets: int32, those of the offsets 0, -1, ..., -reach, then those of 0 to reach seen as positive.
    key_bias: float32 ``[batch, heads, key_length]`` in units of log 2.
    key_bias_grad: where its gradient goes, likewise.
    query_bias: float32 ``[batch, heads, length]`` in units of log 2.
    heads: of the queries.
    key_length: number of keys; ``length`` in the functions below is that of the queries, the last of these tokens.
    has_nearest, has_key_bias, has_query_bias: whether they are there, as ``tl.constexpr``; the last only with the
        second.
    axes, count, class_tokens, buckets, entries, reach: sizes, as ``tl.constexpr``; buckets are those of one axis, and
        entries those of the table, rounded up to a power of two.
    """

    queries: Any
    keys: Any
    query_step: int
    key_step: int
    nearest: Any
    parameters: Any
    lookup: Any
    key_bias: Any
    key_bias_grad: Any
    query_bias: Any
    heads: int
    key_length: int
    has_nearest: Any
    has_key_bias: Any
    has_query_bias: Any
    axes: Any
    count: Any
    class_tokens: Any
    buckets: Any
    entries: Any
    reach: Any


@triton.jit
def _pair(of_queries, of_keys, TRANSPOSED: tl.constexpr):
    """Two vectors along the axes of a tile ``[queries, keys]``, or of ``[keys, queries]``."""
    if TRANSPOSED:
        return of_queries[None, :], of_keys[:, None]
    else:
        return of_queries[:, None], of_keys[None, :]


@triton.jit
def _offset(places, batch, query_rows, key_rows, length, axis: tl.constexpr, TRANSPOSED: tl.constexpr):
    """p_j - p_i along one axis of the grid."""
    queries = places.queries + batch * places.query_step + query_rows * places.axes + axis
    keys = places.keys + batch * places.key_step + key_rows * places.axes + axis
    of_queries = tl.load(queries, mask=query_rows < length, other=0.0)
    of_keys = tl.load(keys, mask=key_rows < places.key_length, other=0.0)
    of_queries, of_keys = _pair(of_queries, of_keys, TRANSPOSED)
    return of_keys - of_queries


@triton.jit
def _compare(places, batch, query_rows, key_rows, length, POSITION: tl.constexpr, TRANSPOSED: tl.constexpr):
    """B of SQUARED and DISTANCE."""
    offset = _offset(places, batch, query_rows, key_rows, length, 0, TRANSPOSED)
    squares = offset * offset
    for axis in tl.static_range(1, places.axes):
        other = _offset(places, batch, query_rows, key_rows, length, axis, TRANSPOSED)
        squares += other * other
    if POSITION == SQUARED:
        compared = -0.5 * squares
    elif places.axes == 1:
        compared = -tl.abs(offset)
    else:
        compared = -tl.sqrt_rn(squares)
    if places.class_tokens > 0:
        query_class, key_class = _pair(query_rows < places.class_tokens, key_rows < places.class_tokens, TRANSPOSED)
        compared = tl.where(query_class | key_class, 0.0, compared)
    if places.has_nearest:
        nearest = tl.load(places.nearest + batch * length + query_rows, mask=query_rows < length, other=0.0)
        of_queries, _ = _pair(nearest, key_rows, TRANSPOSED)
        compared = compared - of_queries
    return compared


@triton.jit
def _bucket(places, offset):
    """The bucket of each offset; that of a fraction is that of the integer nearer to 0."""
    distance = tl.minimum(tl.abs(offset), places.reach * 1.0).to(tl.int32)
    return tl.load(places.lookup + tl.where(offset > 0.0, places.reach + 1, 0) + distance)


@triton.jit
def add_position(
    scores, places, batch, head, query_rows, key_rows, length, POSITION: tl.constexpr, TRANSPOSED: tl.constexpr
):
    """Logits ``[queries, keys]``, or ``[keys, queries]`` if TRANSPOSED, with what :class:`Places` holds added."""
    if POSITION == NOTHING:
        return scores
    else:
        if places.has_key_bias:
            bias = places.key_bias + (batch * places.heads + head) * places.key_length + key_rows
            _, added = _pair(query_rows, tl.load(bias, mask=key_rows < places.key_length, other=0.0), TRANSPOSED)
            if places.has_query_bias:
                own = places.query_bias + (batch * places.heads + head) * length + query_rows
                of_queries, _ = _pair(tl.load(own, mask=query_rows < length, other=0.0), key_rows, TRANSPOSED)
                # First: of two large numbers the difference keeps its digits.
                added = of_queries + added
            scores = scores + added
        return _add_kernel(scores, places, batch, head, query_rows, key_rows, length, POSITION, TRANSPOSED)


@triton.jit
def _add_kernel(
    scores, places, batch, head, query_rows, key_rows, length, POSITION: tl.constexpr, TRANSPOSED: tl.constexpr
):
    """Logits with those of the position kernel added."""
    if POSITION == ONLY_KEYS:
        return scores
    else:
        own = places.parameters + head * places.count
        if POSITION == BUCKETS:
            logits = tl.zeros_like(scores)
            for axis in tl.static_range(0, places.axes):
                offset = _offset(places, batch, query_rows, key_rows, length, axis, TRANSPOSED)
                logits += tl.load(own + axis * places.buckets + _bucket(places, offset))
        else:
            logits = tl.load(own) * _compare(places, batch, query_rows, key_rows, length, POSITION, TRANSPOSED)
        if places.class_tokens > 0:
            to_class = tl.load(own + places.count - 3)
            from_class = tl.load(own + places.count - 2)
            within = tl.load(own + places.count - 1)
            query_class, key_class = _pair(
                query_rows < places.class_tokens, key_rows < places.class_tokens, TRANSPOSED
            )
            of_grid = tl.where(key_class, to_class, logits)
            logits = tl.where(query_class, tl.where(key_class, within, from_class), of_grid)
        return scores + logits


@triton.jit
def no_gradient(places, POSITION: tl.constexpr, BLOCK: tl.constexpr):
    """The sums of a block of keys, before any: of t, and for each key over queries on the grid and class queries."""
    if POSITION == BUCKETS:
        of_parameter = tl.zeros([places.entries], dtype=tl.float32)
    else:
        of_parameter = tl.zeros([BLOCK], dtype=tl.float32)
    return of_parameter, tl.zeros([BLOCK], dtype=tl.float32), tl.zeros([BLOCK], dtype=tl.float32)


@triton.jit
def add_gradient(
    of_parameter, of_grid, of_class, d_scores, places, batch, query_rows, key_rows, length,
    POSITION: tl.constexpr, LEARNS: tl.constexpr,
):  # fmt: skip
    """The sums with a tile's dL/ds, ``[keys, queries]``, added."""
    if POSITION != NOTHING:
        if places.class_tokens == 0 and places.has_key_bias:
            of_grid += tl.sum(d_scores, 1)
        if places.class_tokens > 0 and (LEARNS or places.has_key_bias):
            query_class, key_class = _pair(query_rows < places.class_tokens, key_rows < places.class_tokens, True)
            of_class += tl.sum(tl.where(query_class, d_scores, 0.0), 1)
            of_grid += tl.sum(tl.where(query_class, 0.0, d_scores), 1)
            # Class tokens have no part in what follows.
            d_scores = tl.where(query_class | key_class, 0.0, d_scores)
    if POSITION != NOTHING and POSITION != ONLY_KEYS and LEARNS:
        if POSITION == BUCKETS:
            entries = tl.arange(0, places.entries)
            for axis in tl.static_range(0, places.axes):
                offset = _offset(places, batch, query_rows, key_rows, length, axis, True)
                buckets = _bucket(places, offset)
                # Far tiles have one bucket, so that this loop is short but near the diagonal.
                for bucket in range(tl.min(buckets), tl.max(buckets) + 1):
                    found = tl.sum(tl.where(buckets == bucket, d_scores, 0.0))
                    of_parameter += tl.where(entries == axis * places.buckets + bucket, found, 0.0)
        else:
            compared = _compare(places, batch, query_rows, key_rows, length, POSITION, True)
            of_parameter += tl.sum(d_scores * compared, 1)
    return of_parameter, of_grid, of_class


@triton.jit
def store_gradient(
    sums_pointer, slot, of_parameter, of_grid, of_class, places, batch, head, key_rows, length,
    POSITION: tl.constexpr, LEARNS: tl.constexpr,
):  # fmt: skip
    """Write the sums of a block of keys: those of parameters into a slot of ``[slots, count]``."""
    if POSITION != NOTHING:  # noqa: SIM102  # the compiler looks at both sides of `and`
        if places.has_key_bias:
            of_keys = places.key_bias_grad + (batch * places.heads + head) * places.key_length + key_rows
            tl.store(of_keys, of_grid + of_class, mask=key_rows < places.key_length)
    if POSITION != NOTHING and POSITION != ONLY_KEYS and LEARNS:
        own = sums_pointer + slot.to(tl.int64) * places.count
        if POSITION == BUCKETS:
            entries = tl.arange(0, places.entries)
            tl.store(own + entries, of_parameter, mask=entries < places.axes * places.buckets)
        else:
            tl.store(own, tl.sum(of_parameter))
        if places.class_tokens > 0:
            key_class = key_rows < places.class_tokens
            tl.store(own + places.count - 3, tl.sum(tl.where(key_class, of_grid, 0.0)))
            tl.store(own + places.count - 2, tl.sum(tl.where(key_class, 0.0, of_class)))
            tl.store(own + places.count - 1, tl.sum(tl.where(key_class, of_class, 0.0)))


@triton.jit
def nearest_kernel(
    places, mask_pointer, nearest_pointer, length,
    POSITION: tl.constexpr, CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The largest B that each query sees, ``[batch, length]``; 0 where it sees nothing."""
    blocks = tl.cdiv(length, BLOCK)
    block, batch = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    query_rows = block * BLOCK + tl.arange(0, BLOCK)
    nearest = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    past = places.key_length - length
    end = places.key_length
    if CAUSAL:
        end = tl.minimum((block + 1) * BLOCK + past, places.key_length)
    for start in range(0, end, BLOCK):
        key_rows = start + tl.arange(0, BLOCK)
        compared = _compare(places, batch, query_rows, key_rows, length, POSITION, False)
        seen = seen_keys(mask_pointer + batch * places.key_length, key_rows, places.key_length, HAS_MASK)
        nearest = tl.maximum(nearest, tl.max(hide(compared, query_rows + past, key_rows, seen, CAUSAL), 1))
    nearest = tl.where(nearest == float("-inf"), 0.0, nearest)
    tl.store(nearest_pointer + batch * length + query_rows, nearest, mask=query_rows < length)
