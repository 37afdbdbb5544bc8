"""The matrix applied once, out = A x, whatever the filter: the step that every linear booster is made of.

Queries and keys may be wider or narrower than x, the queries may be the last of the tokens only (with a cache, or a
prompt in chunks), and weights may be dropped by a mask that a seed gives again at every step and in the backward pass.

    forward        out by online softmax (or another normalisation), and L of each row        2 products
    of queries     D_i = g_i.out_i and dQ, of a block of queries                              3 products
    of keys        dK and dx, of a block of keys, and its sums for the position kernel        4 products

Plain attention has 2 and 5; here the sums of dQ do not depend on an order, at the price of two products.

:class:`Matrix` is all that A is made of. A tile of A is computed again wherever it is needed, by :func:`_tile`, from
queries and keys, positions and what is hidden, and :func:`_dropped` thins it out.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .triton_logits import (
    SIGMOID,
    SINK,
    end_of_rows,
    gradient_of_logits,
    load_lse,
    logits_of_queries,
    start_of_rows,
    step_of_rows,
    tile_of_keys,
    weights_of,
)
from .triton_positions import add_gradient, no_gradient, store_gradient
from .triton_tiles import (
    add_product,
    base_of,
    block_of,
    item_of,
    load_rows,
    product,
    rounded,
    seen_keys,
    store_rows,
    tuned,
)

KEY = ["length_class", "key_length_class", "kind"]
ROUNDS: tl.constexpr = tl.constexpr(7)
"""Of Philox: the fewest that pass the tests of Salmon et al. 2011, which gave it."""


class Matrix(NamedTuple):
    """A as the kernels take it.

    queries: ``[batch, heads, length, width]``, the last tokens.
    keys: ``[batch, key_heads, key_length, width]``, of all tokens.
    mask: uint8 ``[batch, key_length]``, which keys are visible; anything where all inside the spans are.
    spans: int32 ``[batch, 2]``, the first visible key of a sample and the one behind the last; anything where all are.
    lse: float32 ``[batch, heads, length]``, L of each row, see ``triton_logits``: log2-sum-exp2 of softmax, +inf for a
        row without keys.
    given: float32 ``[batch, heads, length]``, b of each row, see there; anything where the normalisation has none.
    seed: int64 ``[1]``, or anything where nothing is dropped.
    places: what is added to the logits, or None.
    heads, length, key_length: sizes.
    scale: on products of queries and keys, in units of log 2.
    dropped: how many of 2^24 weights are dropped.
    kept_factor: 1 / (1 - p), on the others.
    width, block_width, causal, has_mask, has_spans, position, drops, normalisation: as ``tl.constexpr``.
    """

    queries: Any
    keys: Any
    mask: Any
    spans: Any
    lse: Any
    given: Any
    seed: Any
    places: Any
    heads: int
    length: int
    key_length: int
    scale: float
    dropped: int
    kept_factor: float
    width: Any
    block_width: Any
    causal: Any
    has_mask: Any
    has_spans: Any
    position: Any
    drops: Any
    normalisation: Any


def _fitting(configs: list[Any], named: dict[str, Any], **arguments: Any) -> list[Any]:
    """The configurations for the widths: of rows wider than 128, small tiles, which shared memory and registers hold.

    Their sums need the registers of eight warps; on narrow rows these would be idle.
    """
    wide = max(arguments["matrix"].block_width.value, arguments["BLOCK_W"]) > WIDE
    tiles = [(config, config.kwargs["BLOCK_M"] * config.kwargs["BLOCK_N"]) for config in configs]
    if wide:
        return [config for config, tile in tiles if tile <= 64 * 64]
    return [config for config, tile in tiles if tile > 64 * 32 or config.num_warps == 4]


WIDE = 128
_FITS = {"early_config_prune": _fitting}


@triton.jit
def _load_queries(matrix, batch, head, rows):
    columns = tl.arange(0, matrix.block_width)
    base = base_of(matrix.queries, batch, head)
    return load_rows(base, matrix.queries.row, rows, columns, matrix.length, matrix.width, matrix.block_width)


@triton.jit
def _load_keys(matrix, batch, head, rows):
    columns = tl.arange(0, matrix.block_width)
    base = base_of(matrix.keys, batch, head)
    return load_rows(base, matrix.keys.row, rows, columns, matrix.key_length, matrix.width, matrix.block_width)


@triton.jit
def _span(matrix, batch):
    """The first visible key of a sample, and the one behind the last."""
    if matrix.has_spans:
        return tl.load(matrix.spans + 2 * batch), tl.load(matrix.spans + 2 * batch + 1)
    else:
        return matrix.key_length * 0, matrix.key_length


@triton.jit
def _key_ranges(matrix, batch, block, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """For a block of queries: the first tile of keys, up to where it sees all keys of its tiles, and any at all."""
    first, end = _span(matrix, batch)
    low = first // BLOCK_N * BLOCK_N
    inner = end // BLOCK_N * BLOCK_N
    if matrix.causal:
        past = matrix.key_length - matrix.length
        inner = tl.minimum(inner, tl.maximum(block * BLOCK_M + past + 1, 0) // BLOCK_N * BLOCK_N)
        end = tl.minimum(end, (block + 1) * BLOCK_M + past)
    return low, tl.maximum(inner, low), end


@triton.jit
def _seen(matrix, batch, key_rows):
    """Whether each key exists and is not padding."""
    _, end = _span(matrix, batch)
    return seen_keys(matrix.mask + batch * matrix.key_length, key_rows, end, matrix.has_mask)


@triton.jit
def _tile(
    query, matrix, rows_base, rows_step, batch, head, query_rows, key_rows,
    WIDTH: tl.constexpr, BLOCK_W: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Keys, rows of x and logits ``[queries, keys]``; EDGE: some keys may be later than a query, or beyond the end."""
    _, end = _span(matrix, batch)
    return tile_of_keys(
        query, base_of(matrix.keys, batch, head), matrix.keys.row, rows_base, rows_step,
        matrix.mask + batch * matrix.key_length, end, matrix.scale, matrix.places, batch, head, query_rows, key_rows,
        matrix.length, matrix.key_length, matrix.width, matrix.block_width, WIDTH, BLOCK_W,
        matrix.position, matrix.has_mask, matrix.causal and EDGE, EDGE or matrix.has_mask,
    )  # fmt: skip


@triton.jit
def _kept(matrix, item, query_rows, key_rows):
    """Whether dropout keeps each weight, of two broadcastable vectors of rows: the same at every call for a seed.

    A number is that of its token, so that a prompt in chunks drops what the whole prompt would.
    """
    places = query_rows + (matrix.key_length - matrix.length)
    columns = key_rows + tl.zeros_like(places)
    rows = places + tl.zeros_like(columns)
    pairs = item + tl.zeros_like(columns)
    bits, _, _, _ = tl.philox(tl.load(matrix.seed), columns, rows, pairs, tl.zeros_like(columns), ROUNDS)
    return (bits >> 8).to(tl.int32) >= matrix.dropped


@triton.jit
def _forward_range(
    average, total, highest, query, matrix, rows, item, query_rows, low, high,
    WIDTH: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_N: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Online softmax, or another normalisation, over the keys from low to high."""
    batch, head = item_of(item, matrix.heads)
    rows_base = base_of(rows, batch, head)
    for start in range(low, high, BLOCK_N):
        key_rows = start + tl.arange(0, BLOCK_N)
        _, x, scores = _tile(
            query, matrix, rows_base, rows.row, batch, head, query_rows, key_rows, WIDTH, BLOCK_W, EDGE
        )
        weights, shrink, total, highest = step_of_rows(scores, highest, total, matrix.normalisation)
        if matrix.drops:
            weights = tl.where(_kept(matrix, item, query_rows[:, None], key_rows[None, :]), weights, 0.0)
        average = add_product(rounded(weights, x.dtype), x, average * shrink[:, None])
    return average, total, highest


@tuned(
    [
        ({"BLOCK_M": 64, "BLOCK_N": 32}, 4, 2),
        ({"BLOCK_M": 64, "BLOCK_N": 32}, 8, 2),
        ({"BLOCK_M": 64, "BLOCK_N": 64}, 4, 3),
        ({"BLOCK_M": 128, "BLOCK_N": 64}, 8, 3),
        ({"BLOCK_M": 128, "BLOCK_N": 128}, 8, 2),
    ],
    KEY,
    prune_configs_by=_FITS,
)
@triton.jit
def forward_kernel(
    matrix, rows, outputs, length_class, key_length_class,
    kind: tl.constexpr, WIDTH: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out = A x of a block of queries, and their log-sum-exp."""
    block, item = block_of(matrix.length, BLOCK_M, matrix.causal)
    batch, head = item_of(item, matrix.heads)
    query_rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    query = _load_queries(matrix, batch, head, query_rows)
    average = tl.zeros([BLOCK_M, BLOCK_W], dtype=tl.float32)
    own = item.to(tl.int64) * matrix.length + query_rows
    given = tl.zeros([BLOCK_M], dtype=tl.float32)
    if matrix.normalisation == SINK or matrix.normalisation == SIGMOID:
        given = tl.load(matrix.given + own, mask=query_rows < matrix.length, other=0.0)
    highest, total = start_of_rows(given, matrix.normalisation)
    low, inner, end = _key_ranges(matrix, batch, block, BLOCK_M, BLOCK_N)
    average, total, highest = _forward_range(
        average, total, highest, query, matrix, rows, item, query_rows, low, inner, WIDTH, BLOCK_W, BLOCK_N, False
    )
    average, total, highest = _forward_range(
        average, total, highest, query, matrix, rows, item, query_rows, inner, end, WIDTH, BLOCK_W, BLOCK_N, True
    )
    total, lse = end_of_rows(highest, total, matrix.normalisation)
    tl.store(matrix.lse + own, lse, mask=query_rows < matrix.length)
    if matrix.drops:
        average = average * matrix.kept_factor
    columns, base = tl.arange(0, BLOCK_W), base_of(outputs, batch, head)
    store_rows(base, outputs.row, query_rows, columns, average / total[:, None], matrix.length, WIDTH, BLOCK_W)


@triton.jit
def _query_range(
    dq, row_sum, query, grad, lse, delta, matrix, rows, item, query_rows, low, high,
    WIDTH: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_N: tl.constexpr, EDGE: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """dS K over the keys from low to high; with SUMS the sums of the rows of dS too."""
    batch, head = item_of(item, matrix.heads)
    rows_base = base_of(rows, batch, head)
    for start in range(low, high, BLOCK_N):
        key_rows = start + tl.arange(0, BLOCK_N)
        key, x, scores = _tile(
            query, matrix, rows_base, rows.row, batch, head, query_rows, key_rows, WIDTH, BLOCK_W, EDGE
        )
        d_weights = product(grad, tl.trans(x))
        if matrix.drops:
            kept = _kept(matrix, item, query_rows[:, None], key_rows[None, :])
            d_weights = tl.where(kept, d_weights * matrix.kept_factor, 0.0)
        weights = weights_of(scores, lse[:, None], matrix.normalisation)
        d_scores = gradient_of_logits(
            scores, weights, d_weights, lse[:, None], delta[:, None], matrix.normalisation
        )  # fmt: skip
        if SUMS:
            row_sum += tl.sum(d_scores, 1)
        dq = add_product(rounded(d_scores, key.dtype), key, dq)
    return dq, row_sum


@tuned(
    [
        ({"BLOCK_M": 64, "BLOCK_N": 32}, 4, 2),
        ({"BLOCK_M": 64, "BLOCK_N": 32}, 8, 2),
        ({"BLOCK_M": 64, "BLOCK_N": 64}, 4, 2),
        ({"BLOCK_M": 128, "BLOCK_N": 64}, 8, 2),
    ],
    KEY,
    prune_configs_by=_FITS,
)
@triton.jit
def query_gradient_kernel(
    matrix, rows, outputs, grads, dqs, delta_pointer, row_sums_pointer, softmax_scale, length_class, key_length_class,
    kind: tl.constexpr, SUMS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_W: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dQ of a block of queries, and D_i = g_i.out_i, the sum of A_ij dA_ij over j; with SUMS that of dS_ij."""
    block, item = block_of(matrix.length, BLOCK_M, matrix.causal)
    batch, head = item_of(item, matrix.heads)
    query_rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    columns, own = tl.arange(0, BLOCK_W), item.to(tl.int64) * matrix.length
    out = load_rows(base_of(outputs, batch, head), outputs.row, query_rows, columns, matrix.length, WIDTH, BLOCK_W)
    grad = load_rows(base_of(grads, batch, head), grads.row, query_rows, columns, matrix.length, WIDTH, BLOCK_W)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_pointer + own + query_rows, delta, mask=query_rows < matrix.length)
    query = _load_queries(matrix, batch, head, query_rows)
    lse = load_lse(matrix.lse + own, query_rows, matrix.length)
    dq = tl.zeros([BLOCK_M, matrix.block_width], dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    low, inner, end = _key_ranges(matrix, batch, block, BLOCK_M, BLOCK_N)
    dq, row_sum = _query_range(
        dq, row_sum, query, grad, lse, delta, matrix, rows, item, query_rows, low, inner,
        WIDTH, BLOCK_W, BLOCK_N, False, SUMS,
    )  # fmt: skip
    dq, row_sum = _query_range(
        dq, row_sum, query, grad, lse, delta, matrix, rows, item, query_rows, inner, end,
        WIDTH, BLOCK_W, BLOCK_N, True, SUMS,
    )  # fmt: skip
    if SUMS:
        tl.store(row_sums_pointer + own + query_rows, row_sum, mask=query_rows < matrix.length)
    own_columns, base = tl.arange(0, matrix.block_width), base_of(dqs, batch, head)
    dq = dq * softmax_scale
    store_rows(base, dqs.row, query_rows, own_columns, dq, matrix.length, matrix.width, matrix.block_width)


@tuned(
    [
        ({"BLOCK_M": 32, "BLOCK_N": 64}, 4, 1),
        ({"BLOCK_M": 32, "BLOCK_N": 64}, 8, 1),
        ({"BLOCK_M": 32, "BLOCK_N": 64}, 4, 2),
        ({"BLOCK_M": 32, "BLOCK_N": 128}, 8, 2),
        ({"BLOCK_M": 64, "BLOCK_N": 128}, 8, 2),
    ],
    [*KEY, "LEARNS"],
    # Timing runs may write more sums than the blocks that are chosen.
    reset_to_zero=["sums_pointer"],
    prune_configs_by=_FITS,
)
@triton.jit
def key_gradient_kernel(
    matrix, rows, grads, dks, dxs, delta_pointer, sums_pointer, slots, softmax_scale, length_class, key_length_class,
    kind: tl.constexpr, LEARNS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_W: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dK and dx = A^T G of a block of keys, and its sums for the position kernel; tiles are ``[keys, queries]``."""
    block, item = block_of(matrix.key_length, BLOCK_N, False)
    batch, head = item_of(item, matrix.heads)
    key_rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
    columns, own = tl.arange(0, BLOCK_W), item.to(tl.int64) * matrix.length
    seen, past = _seen(matrix, batch, key_rows), matrix.key_length - matrix.length
    key, grad_base = _load_keys(matrix, batch, head, key_rows), base_of(grads, batch, head)
    x = load_rows(base_of(rows, batch, head), rows.row, key_rows, columns, matrix.key_length, WIDTH, BLOCK_W)
    dk = tl.zeros([BLOCK_N, matrix.block_width], dtype=tl.float32)
    dx = tl.zeros([BLOCK_N, BLOCK_W], dtype=tl.float32)
    of_parameter, of_grid, of_class = no_gradient(matrix.places, matrix.position, BLOCK_N)
    first, end = matrix.length * 0, matrix.length
    if matrix.causal:  # the first query that sees one of the keys
        first = tl.maximum(block * BLOCK_N - past, 0) // BLOCK_M * BLOCK_M
    if matrix.has_spans:  # a block of padding
        end = tl.where(tl.max(seen.to(tl.int32)) > 0, end, 0)
    for start in range(first, end, BLOCK_M):
        query_rows = start + tl.arange(0, BLOCK_M)
        query = _load_queries(matrix, batch, head, query_rows)
        grad = load_rows(grad_base, grads.row, query_rows, columns, matrix.length, WIDTH, BLOCK_W)
        lse = load_lse(matrix.lse + own, query_rows, matrix.length)
        delta = tl.load(delta_pointer + own + query_rows, mask=query_rows < matrix.length, other=0.0)
        scores = logits_of_queries(
            key, query, matrix.scale, matrix.places, batch, head, query_rows, key_rows, seen,
            matrix.length, matrix.key_length, matrix.position, matrix.causal, True,
        )  # fmt: skip
        weights = weights_of(scores, lse[None, :], matrix.normalisation)
        d_weights, thinned = product(x, tl.trans(grad)), weights
        if matrix.drops:
            kept = _kept(matrix, item, query_rows[None, :], key_rows[:, None])
            thinned = tl.where(kept, weights * matrix.kept_factor, 0.0)
            d_weights = tl.where(kept, d_weights * matrix.kept_factor, 0.0)
        dx = add_product(rounded(thinned, x.dtype), grad, dx)
        d_scores = gradient_of_logits(
            scores, weights, d_weights, lse[None, :], delta[None, :], matrix.normalisation
        )  # fmt: skip
        of_parameter, of_grid, of_class = add_gradient(
            of_parameter, of_grid, of_class, d_scores, matrix.places, batch, query_rows, key_rows, matrix.length,
            matrix.position, LEARNS,
        )  # fmt: skip
        dk = add_product(rounded(d_scores, key.dtype), query, dk)
    store_gradient(
        sums_pointer, item * slots + block, of_parameter, of_grid, of_class, matrix.places, batch, head, key_rows,
        matrix.length, matrix.position, LEARNS,
    )  # fmt: skip
    dk, key_columns = dk * softmax_scale, tl.arange(0, matrix.block_width)
    dk_base, dx_base = base_of(dks, batch, head), base_of(dxs, batch, head)
    store_rows(dk_base, dks.row, key_rows, key_columns, dk, matrix.key_length, matrix.width, matrix.block_width)
    store_rows(dx_base, dxs.row, key_rows, columns, dx, matrix.key_length, WIDTH, BLOCK_W)
