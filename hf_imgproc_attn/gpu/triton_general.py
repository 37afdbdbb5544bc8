"""Any length, causal or bidirectional, boosted or not: two kernels forward, two backward, nothing N x N in memory.

    smooth       AV by online softmax; writes W = 2V - AV and the log-sum-exp of each row       2 products
    apply        out = A W with the saved log-sum-exp, so without softmax statistics            2 products
    residual     -H = -(A^T G), the row terms D, and with WITH_DQ also dQ                       2 (+ 4) products
    key_value    dK and dV, and with ADD_DQ also dQ by atomic additions                         5 (+ 1) products

Plain attention has 2 and 5, so the floors are 2.0x forward and 8/5 = 1.6x backward, or 11/5 with a dQ that does not
depend on the order of additions. ``triton_single_pass`` has lower floors where there are heads enough for it.

Not BOOSTED, out = AV: ``smooth`` writes it in place of W, ``apply`` is not needed, and ``residual`` has no H to make.

Programs are numbered block first; causal ones start with the block that has most work.
"""

import triton
import triton.language as tl

from .triton_logits import load_lse, softmax_end, softmax_step, tile_of_keys, weights_of_queries
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

KEY = ["length_class", "HEAD_DIM", "CAUSAL", "HAS_MASK", "POSITION", "BOOSTED"]

_FORWARD = [
    ({"BLOCK_M": 64, "BLOCK_N": 32}, 4, 3),
    ({"BLOCK_M": 64, "BLOCK_N": 64}, 4, 3),
    ({"BLOCK_M": 128, "BLOCK_N": 64}, 8, 3),
    ({"BLOCK_M": 128, "BLOCK_N": 128}, 8, 2),
]


@triton.jit
def _ends(block, length, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr):
    """Up to where a block of queries sees all keys of its tiles, and up to where it sees any."""
    if CAUSAL:
        return block * BLOCK_M // BLOCK_N * BLOCK_N, tl.minimum((block + 1) * BLOCK_M, length)
    else:
        return length // BLOCK_N * BLOCK_N, length


@triton.jit
def _smooth_range(
    average, total, highest, query, keys, values, mask, places, batch, head, query_rows, low, high,
    length, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr,
    POSITION: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Online softmax over the keys from low to high; EDGE: they may lie beyond the diagonal or the length."""
    key_base, value_base = base_of(keys, batch, head), base_of(values, batch, head)
    for start in range(low, high, BLOCK_N):
        key_rows = start + tl.arange(0, BLOCK_N)
        _, value, scores = tile_of_keys(
            query, key_base, keys.row, value_base, values.row, mask, length, scale, places, batch, head, query_rows,
            key_rows, length, length, HEAD_DIM, BLOCK_D, HEAD_DIM, BLOCK_D,
            POSITION, HAS_MASK, CAUSAL and EDGE, EDGE or HAS_MASK,
        )  # fmt: skip
        weights, shrink, total, highest = softmax_step(scores, highest, total)
        average = add_product(rounded(weights, value.dtype), value, average * shrink[:, None])
    return average, total, highest


@tuned(_FORWARD, KEY)
@triton.jit
def smooth_kernel(
    queries, keys, values, results, mask_pointer, lse_pointer, residual_pointer, places,
    heads, length, scale, length_class,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr,
    POSITION: tl.constexpr, BOOSTED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """W = 2V - AV, or, not BOOSTED, AV into ``results``; and the log-sum-exp (+inf for a row without keys: A = 0)."""
    block, item = block_of(length, BLOCK_M, CAUSAL)
    batch, head = item_of(item, heads)
    columns = tl.arange(0, BLOCK_D)
    query_rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = mask_pointer + batch * length
    query = load_rows(base_of(queries, batch, head), queries.row, query_rows, columns, length, HEAD_DIM, BLOCK_D)
    average = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    highest = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    inner, end = _ends(block, length, BLOCK_M, BLOCK_N, CAUSAL)
    average, total, highest = _smooth_range(
        average, total, highest, query, keys, values, mask, places, batch, head, query_rows, 0, inner,
        length, scale, HEAD_DIM, BLOCK_D, BLOCK_N, CAUSAL, HAS_MASK, POSITION, False,
    )  # fmt: skip
    average, total, highest = _smooth_range(
        average, total, highest, query, keys, values, mask, places, batch, head, query_rows, inner, end,
        length, scale, HEAD_DIM, BLOCK_D, BLOCK_N, CAUSAL, HAS_MASK, POSITION, True,
    )  # fmt: skip
    total, lse = softmax_end(highest, total)
    tl.store(lse_pointer + item.to(tl.int64) * length + query_rows, lse, mask=query_rows < length)
    average = average / total[:, None]
    if BOOSTED:
        value_base = base_of(values, batch, head)
        value = load_rows(value_base, values.row, query_rows, columns, length, HEAD_DIM, BLOCK_D)
        residual_base = residual_pointer + item.to(tl.int64) * length * HEAD_DIM
        residual = 2.0 * value.to(tl.float32) - average
        if HAS_MASK:  # a padded query may hold anything
            residual = tl.where(seen_keys(mask, query_rows, length, HAS_MASK)[:, None], residual, 0.0)
        store_rows(residual_base, HEAD_DIM, query_rows, columns, residual, length, HEAD_DIM, BLOCK_D)
    else:
        result_base = base_of(results, batch, head)
        store_rows(result_base, results.row, query_rows, columns, average, length, HEAD_DIM, BLOCK_D)


@triton.jit
def _apply_range(
    output, query, lse, keys, residual_base, mask, places, batch, head, query_rows, low, high, length, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr,
    POSITION: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    key_base = base_of(keys, batch, head)
    for start in range(low, high, BLOCK_N):
        key_rows = start + tl.arange(0, BLOCK_N)
        _, residual, scores = tile_of_keys(
            query, key_base, keys.row, residual_base, HEAD_DIM, mask, length, scale, places, batch, head, query_rows,
            key_rows, length, length, HEAD_DIM, BLOCK_D, HEAD_DIM, BLOCK_D,
            POSITION, HAS_MASK, CAUSAL and EDGE, EDGE or HAS_MASK,
        )  # fmt: skip
        weights = tl.exp2(scores - lse[:, None])
        output = add_product(rounded(weights, residual.dtype), residual, output)
    return output


@tuned(_FORWARD, KEY)
@triton.jit
def apply_kernel(
    queries, keys, outputs, mask_pointer, lse_pointer, residual_pointer, places,
    heads, length, scale, length_class,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr,
    POSITION: tl.constexpr, BOOSTED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out = A W."""
    block, item = block_of(length, BLOCK_M, CAUSAL)
    batch, head = item_of(item, heads)
    columns = tl.arange(0, BLOCK_D)
    query_rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    residual_base = residual_pointer + item.to(tl.int64) * length * HEAD_DIM
    mask = mask_pointer + batch * length
    query = load_rows(base_of(queries, batch, head), queries.row, query_rows, columns, length, HEAD_DIM, BLOCK_D)
    lse = load_lse(lse_pointer + item.to(tl.int64) * length, query_rows, length)
    output = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    inner, end = _ends(block, length, BLOCK_M, BLOCK_N, CAUSAL)
    output = _apply_range(
        output, query, lse, keys, residual_base, mask, places, batch, head, query_rows, 0, inner, length,
        scale, HEAD_DIM, BLOCK_D, BLOCK_N, CAUSAL, HAS_MASK, POSITION, False,
    )  # fmt: skip
    output = _apply_range(
        output, query, lse, keys, residual_base, mask, places, batch, head, query_rows, inner, end, length,
        scale, HEAD_DIM, BLOCK_D, BLOCK_N, CAUSAL, HAS_MASK, POSITION, True,
    )  # fmt: skip
    store_rows(base_of(outputs, batch, head), outputs.row, query_rows, columns, output, length, HEAD_DIM, BLOCK_D)


@tuned(
    [
        ({"BLOCK_M": 32, "BLOCK_N": 64}, 4, 1),
        ({"BLOCK_M": 32, "BLOCK_N": 64}, 4, 3),
        ({"BLOCK_M": 64, "BLOCK_N": 64}, 4, 2),
        ({"BLOCK_M": 64, "BLOCK_N": 128}, 8, 2),
    ],
    [*KEY, "WITH_DQ"],
)
@triton.jit
def residual_gradient_kernel(
    queries, keys, values, outputs, grads, dqs, mask_pointer, lse_pointer, residual_pointer,
    negative_h_pointer, delta_pointer, places,
    heads, length, scale, softmax_scale, length_class,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr,
    POSITION: tl.constexpr, BOOSTED: tl.constexpr, WITH_DQ: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """-H = -(A^T G) of a block of keys, D_i = g_i.out_i - h_i.(2v_i - w_i) of the same rows, and their dQ.

    With WITH_DQ a program has the same work whatever its block: it walks the queries below and the keys above it.
    """
    block, item = block_of(length, BLOCK_N, False)
    batch, head = item_of(item, heads)
    columns = tl.arange(0, BLOCK_D)
    rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
    query_base, key_base = base_of(queries, batch, head), base_of(keys, batch, head)
    value_base, grad_base = base_of(values, batch, head), base_of(grads, batch, head)
    own = item.to(tl.int64) * length
    residual_base = residual_pointer + own * HEAD_DIM
    mask = mask_pointer + batch * length
    own_out = load_rows(base_of(outputs, batch, head), outputs.row, rows, columns, length, HEAD_DIM, BLOCK_D)
    own_grad = load_rows(grad_base, grads.row, rows, columns, length, HEAD_DIM, BLOCK_D)
    own_delta = tl.sum(own_grad.to(tl.float32) * own_out.to(tl.float32), 1)
    if BOOSTED:
        seen = seen_keys(mask, rows, length, HAS_MASK)
        key = load_rows(key_base, keys.row, rows, columns, length, HEAD_DIM, BLOCK_D)
        h = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
        first = 0
        if CAUSAL:
            first = block * BLOCK_N // BLOCK_M * BLOCK_M
        for start in range(first, length, BLOCK_M):
            query_rows = start + tl.arange(0, BLOCK_M)
            query = load_rows(query_base, queries.row, query_rows, columns, length, HEAD_DIM, BLOCK_D)
            grad = load_rows(grad_base, grads.row, query_rows, columns, length, HEAD_DIM, BLOCK_D)
            lse = load_lse(lse_pointer + own, query_rows, length)
            transposed = weights_of_queries(
                key, query, lse, scale, places, batch, head, query_rows, rows, seen, length, length,
                POSITION, CAUSAL, True,
            )  # fmt: skip
            h = add_product(rounded(transposed, grad.dtype), grad, h)
        own_value = load_rows(value_base, values.row, rows, columns, length, HEAD_DIM, BLOCK_D)
        own_residual = load_rows(residual_base, HEAD_DIM, rows, columns, length, HEAD_DIM, BLOCK_D)
        # Rounded as the other products see it, so that each row of dS sums to 0.
        own_negative_h = rounded(-h, key.dtype)
        smoothed = 2.0 * own_value.to(tl.float32) - own_residual.to(tl.float32)
        own_delta += tl.sum(own_negative_h.to(tl.float32) * smoothed, 1)
        h_base = negative_h_pointer + own * HEAD_DIM
        store_rows(h_base, HEAD_DIM, rows, columns, own_negative_h, length, HEAD_DIM, BLOCK_D)
    tl.store(delta_pointer + own + rows, own_delta, mask=rows < length)
    if WITH_DQ:
        own_query = load_rows(query_base, queries.row, rows, columns, length, HEAD_DIM, BLOCK_D)
        own_lse = load_lse(lse_pointer + own, rows, length)
        dq = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
        end = length
        if CAUSAL:
            end = tl.minimum((block + 1) * BLOCK_N, length)
        for start in range(0, end, BLOCK_M):
            key_rows = start + tl.arange(0, BLOCK_M)
            key_tile, value_tile, tile_scores = tile_of_keys(
                own_query, key_base, keys.row, value_base, values.row, mask, length, scale, places, batch, head, rows,
                key_rows, length, length, HEAD_DIM, BLOCK_D, HEAD_DIM, BLOCK_D, POSITION, HAS_MASK, CAUSAL, True,
            )  # fmt: skip
            weights = tl.exp2(tile_scores - own_lse[:, None])
            if BOOSTED:
                residual_tile = load_rows(residual_base, HEAD_DIM, key_rows, columns, length, HEAD_DIM, BLOCK_D)
                d_weights = product(own_grad, tl.trans(residual_tile))
                d_weights = add_product(own_negative_h, tl.trans(value_tile), d_weights)
            else:
                d_weights = product(own_grad, tl.trans(value_tile))
            d_scores = weights * (d_weights - own_delta[:, None])
            dq = add_product(rounded(d_scores, key_tile.dtype), key_tile, dq)
        dq_base = base_of(dqs, batch, head)
        store_rows(dq_base, dqs.row, rows, columns, dq * softmax_scale, length, HEAD_DIM, BLOCK_D)


@tuned(
    [
        ({"BLOCK_M": 32, "BLOCK_N": 64}, 4, 1),
        ({"BLOCK_M": 32, "BLOCK_N": 64}, 4, 2),
        ({"BLOCK_M": 32, "BLOCK_N": 128}, 8, 2),
        ({"BLOCK_M": 64, "BLOCK_N": 64}, 4, 2),
        ({"BLOCK_M": 64, "BLOCK_N": 128}, 8, 2),
    ],
    [*KEY, "ADD_DQ", "LEARNS"],
    # Timing runs add to it too, or write more sums than the blocks that are chosen.
    reset_to_zero=["dq_sum_pointer", "sums_pointer"],
)
@triton.jit
def key_value_gradient_kernel(
    queries, keys, values, grads, dks, dvs, mask_pointer, lse_pointer, residual_pointer,
    negative_h_pointer, delta_pointer, dq_sum_pointer, sums_pointer, places,
    heads, length, slots, scale, softmax_scale, length_class,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr,
    POSITION: tl.constexpr, BOOSTED: tl.constexpr, LEARNS: tl.constexpr, ADD_DQ: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dK and dV = 2H - A^T H, or, not BOOSTED, A^T G, of a block of keys, and its sums for the position kernel.

    With ADD_DQ also its part of dQ, added to a float32 sum.
    """
    block, item = block_of(length, BLOCK_N, False)
    batch, head = item_of(item, heads)
    columns = tl.arange(0, BLOCK_D)
    rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
    query_base, key_base = base_of(queries, batch, head), base_of(keys, batch, head)
    value_base, grad_base = base_of(values, batch, head), base_of(grads, batch, head)
    own = item.to(tl.int64) * length
    negative_h_base = negative_h_pointer + own * HEAD_DIM
    dq_sum_base = dq_sum_pointer + own * HEAD_DIM
    seen = seen_keys(mask_pointer + batch * length, rows, length, HAS_MASK)
    key = load_rows(key_base, keys.row, rows, columns, length, HEAD_DIM, BLOCK_D)
    value = load_rows(value_base, values.row, rows, columns, length, HEAD_DIM, BLOCK_D)
    if BOOSTED:
        residual_base = residual_pointer + own * HEAD_DIM
        residual = load_rows(residual_base, HEAD_DIM, rows, columns, length, HEAD_DIM, BLOCK_D)
    dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    of_parameter, of_grid, of_class = no_gradient(places, POSITION, BLOCK_N)
    first = 0
    if CAUSAL:
        first = block * BLOCK_N // BLOCK_M * BLOCK_M
    for start in range(first, length, BLOCK_M):
        query_rows = start + tl.arange(0, BLOCK_M)
        query = load_rows(query_base, queries.row, query_rows, columns, length, HEAD_DIM, BLOCK_D)
        grad = load_rows(grad_base, grads.row, query_rows, columns, length, HEAD_DIM, BLOCK_D)
        lse = load_lse(lse_pointer + own, query_rows, length)
        delta = tl.load(delta_pointer + own + query_rows, mask=query_rows < length, other=0.0)
        weights = weights_of_queries(
            key, query, lse, scale, places, batch, head, query_rows, rows, seen, length, length, POSITION, CAUSAL, True
        )
        # dA = G W^T - H V^T, or G V^T, transposed.
        if BOOSTED:
            negative_h = load_rows(negative_h_base, HEAD_DIM, query_rows, columns, length, HEAD_DIM, BLOCK_D)
            d_weights = add_product(value, tl.trans(negative_h), product(residual, tl.trans(grad)))
            dv = add_product(rounded(weights, key.dtype), negative_h, dv)
        else:
            d_weights = product(value, tl.trans(grad))
            dv = add_product(rounded(weights, key.dtype), grad, dv)
        d_scores = weights * (d_weights - delta[None, :])
        of_parameter, of_grid, of_class = add_gradient(
            of_parameter, of_grid, of_class, d_scores, places, batch, query_rows, rows, length, POSITION, LEARNS
        )
        low_d_scores = rounded(d_scores, key.dtype)
        dk = add_product(low_d_scores, query, dk)
        if ADD_DQ:
            dq = product(tl.trans(low_d_scores), key) * softmax_scale
            inside = query_rows[:, None] < length
            if HEAD_DIM != BLOCK_D:
                inside = inside & (columns[None, :] < HEAD_DIM)
            target = dq_sum_base + query_rows[:, None] * HEAD_DIM + columns[None, :]
            tl.atomic_add(target, dq, mask=inside, sem="relaxed")
    slot = item * slots + block
    store_gradient(
        sums_pointer, slot, of_parameter, of_grid, of_class, places, batch, head, rows, length, POSITION, LEARNS
    )
    if BOOSTED:  # so far -A^T H
        own_negative_h = load_rows(negative_h_base, HEAD_DIM, rows, columns, length, HEAD_DIM, BLOCK_D)
        dv -= 2.0 * own_negative_h.to(tl.float32)
    store_rows(base_of(dks, batch, head), dks.row, rows, columns, dk * softmax_scale, length, HEAD_DIM, BLOCK_D)
    store_rows(base_of(dvs, batch, head), dvs.row, rows, columns, dv, length, HEAD_DIM, BLOCK_D)
