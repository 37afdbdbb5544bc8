"""Twicing for any length, causal or bidirectional: two kernels forward, two backward, nothing N x N in memory.

    smooth       AV by online softmax; writes W = 2V - AV and the log-sum-exp of each row       2 products
    apply        out = A W with the saved log-sum-exp, so without softmax statistics            2 products
    residual     -H = -(A^T G), the row terms D, and with WITH_DQ also dQ                       2 (+ 4) products
    key_value    dK and dV, and with ADD_DQ also dQ by atomic additions                         5 (+ 1) products

Plain attention has 2 and 5, so the floors are 2.0x forward and 8/5 = 1.6x backward, or 11/5 with a dQ that does not
depend on the order of additions. ``triton_single_pass`` has lower floors where there are heads enough for it.

Programs are numbered block first; causal ones start with the block that has most work.
"""

import triton
import triton.language as tl

from .triton_tiles import (
    add_product,
    hide,
    hide_transposed,
    load_rows,
    product,
    rounded,
    seen_keys,
    store_rows,
    tuned,
)

KEY = ["length_class", "HEAD_DIM", "CAUSAL", "HAS_MASK"]

_FORWARD = [
    ({"BLOCK_M": 64, "BLOCK_N": 32}, 4, 3),
    ({"BLOCK_M": 64, "BLOCK_N": 64}, 4, 3),
    ({"BLOCK_M": 128, "BLOCK_N": 64}, 8, 3),
    ({"BLOCK_M": 128, "BLOCK_N": 128}, 8, 2),
]


@triton.jit
def _smooth_range(
    average, total, highest, query, key_base, value_base, mask, stride_k, stride_v, query_rows, columns, low, high,
    length, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr,
    EDGE: tl.constexpr,
):  # fmt: skip
    """Online softmax over the keys from low to high; EDGE: they may lie beyond the diagonal or the length."""
    for start in range(low, high, BLOCK_N):
        key_rows = start + tl.arange(0, BLOCK_N)
        key = load_rows(key_base, stride_k, key_rows, columns, length, HEAD_DIM, BLOCK_D)
        value = load_rows(value_base, stride_v, key_rows, columns, length, HEAD_DIM, BLOCK_D)
        scores = product(query, tl.trans(key)) * scale
        if EDGE or HAS_MASK:
            scores = hide(scores, query_rows, key_rows, seen_keys(mask, key_rows, length, HAS_MASK), CAUSAL and EDGE)
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        # A row that has seen no key yet: -inf - -inf is not a number.
        base = tl.where(new_highest == float("-inf"), 0.0, new_highest)
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(highest - base)
        total = total * shrink + tl.sum(weights, 1)
        average = add_product(rounded(weights, value.dtype), value, average * shrink[:, None])
        highest = new_highest
    return average, total, highest


@tuned(_FORWARD, KEY)
@triton.jit
def smooth_kernel(
    query_pointer, key_pointer, value_pointer, mask_pointer, residual_pointer, lse_pointer,
    query_b, query_h, query_n, key_b, key_h, key_n, value_b, value_h, value_n,
    heads, length, scale, length_class,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """W = 2V - AV and the log-sum-exp (+inf for a row that sees no key, whose A is 0)."""
    blocks = tl.cdiv(length, BLOCK_M)
    block = tl.program_id(0) % blocks
    if CAUSAL:
        block = blocks - 1 - block
    item = tl.program_id(0) // blocks
    batch, head = (item // heads).to(tl.int64), (item % heads).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    query_rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    query_base = query_pointer + batch * query_b + head * query_h
    key_base = key_pointer + batch * key_b + head * key_h
    value_base = value_pointer + batch * value_b + head * value_h
    mask = mask_pointer + batch * length
    query = load_rows(query_base, query_n, query_rows, columns, length, HEAD_DIM, BLOCK_D)
    average = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    highest = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    if CAUSAL:
        inner, end = block * BLOCK_M // BLOCK_N * BLOCK_N, tl.minimum((block + 1) * BLOCK_M, length)
    else:
        inner, end = length // BLOCK_N * BLOCK_N, length
    average, total, highest = _smooth_range(
        average, total, highest, query, key_base, value_base, mask, key_n, value_n, query_rows, columns, 0, inner,
        length, scale, HEAD_DIM, BLOCK_D, BLOCK_N, CAUSAL, HAS_MASK, False,
    )  # fmt: skip
    average, total, highest = _smooth_range(
        average, total, highest, query, key_base, value_base, mask, key_n, value_n, query_rows, columns, inner, end,
        length, scale, HEAD_DIM, BLOCK_D, BLOCK_N, CAUSAL, HAS_MASK, True,
    )  # fmt: skip
    sees = total > 0.0
    total = tl.where(sees, total, 1.0)
    lse = tl.where(sees, highest + tl.log2(total), float("inf"))
    tl.store(lse_pointer + item.to(tl.int64) * length + query_rows, lse, mask=query_rows < length)
    value = load_rows(value_base, value_n, query_rows, columns, length, HEAD_DIM, BLOCK_D)
    residual = 2.0 * value.to(tl.float32) - average / total[:, None]
    residual_base = residual_pointer + item.to(tl.int64) * length * HEAD_DIM
    store_rows(residual_base, HEAD_DIM, query_rows, columns, residual, length, HEAD_DIM, BLOCK_D)


@triton.jit
def _apply_range(
    output, query, lse, key_base, residual_base, mask, stride_k, query_rows, columns, low, high, length, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr,
    EDGE: tl.constexpr,
):  # fmt: skip
    for start in range(low, high, BLOCK_N):
        key_rows = start + tl.arange(0, BLOCK_N)
        key = load_rows(key_base, stride_k, key_rows, columns, length, HEAD_DIM, BLOCK_D)
        residual = load_rows(residual_base, HEAD_DIM, key_rows, columns, length, HEAD_DIM, BLOCK_D)
        scores = product(query, tl.trans(key)) * scale
        if EDGE or HAS_MASK:
            scores = hide(scores, query_rows, key_rows, seen_keys(mask, key_rows, length, HAS_MASK), CAUSAL and EDGE)
        weights = tl.exp2(scores - lse[:, None])
        output = add_product(rounded(weights, residual.dtype), residual, output)
    return output


@tuned(_FORWARD, KEY)
@triton.jit
def apply_kernel(
    query_pointer, key_pointer, mask_pointer, residual_pointer, lse_pointer, out_pointer,
    query_b, query_h, query_n, key_b, key_h, key_n, out_b, out_h, out_n,
    heads, length, scale, length_class,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out = A W."""
    blocks = tl.cdiv(length, BLOCK_M)
    block = tl.program_id(0) % blocks
    if CAUSAL:
        block = blocks - 1 - block
    item = tl.program_id(0) // blocks
    batch, head = (item // heads).to(tl.int64), (item % heads).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    query_rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    query_base = query_pointer + batch * query_b + head * query_h
    key_base = key_pointer + batch * key_b + head * key_h
    residual_base = residual_pointer + item.to(tl.int64) * length * HEAD_DIM
    mask = mask_pointer + batch * length
    query = load_rows(query_base, query_n, query_rows, columns, length, HEAD_DIM, BLOCK_D)
    lse_rows = lse_pointer + item.to(tl.int64) * length + query_rows
    lse = tl.load(lse_rows, mask=query_rows < length, other=float("inf"))
    output = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    if CAUSAL:
        inner, end = block * BLOCK_M // BLOCK_N * BLOCK_N, tl.minimum((block + 1) * BLOCK_M, length)
    else:
        inner, end = length // BLOCK_N * BLOCK_N, length
    output = _apply_range(
        output, query, lse, key_base, residual_base, mask, key_n, query_rows, columns, 0, inner, length, scale,
        HEAD_DIM, BLOCK_D, BLOCK_N, CAUSAL, HAS_MASK, False,
    )  # fmt: skip
    output = _apply_range(
        output, query, lse, key_base, residual_base, mask, key_n, query_rows, columns, inner, end, length, scale,
        HEAD_DIM, BLOCK_D, BLOCK_N, CAUSAL, HAS_MASK, True,
    )  # fmt: skip
    out_base = out_pointer + batch * out_b + head * out_h
    store_rows(out_base, out_n, query_rows, columns, output, length, HEAD_DIM, BLOCK_D)


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
    query_pointer, key_pointer, value_pointer, mask_pointer, residual_pointer, lse_pointer, out_pointer, grad_pointer,
    negative_h_pointer, delta_pointer, dq_pointer,
    query_b, query_h, query_n, key_b, key_h, key_n, value_b, value_h, value_n, out_b, out_h, out_n,
    grad_b, grad_h, grad_n, dq_b, dq_h, dq_n,
    heads, length, scale, softmax_scale, length_class,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr,
    WITH_DQ: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """-H = -(A^T G) of a block of keys, D_i = g_i.out_i - h_i.(2v_i - w_i) of the same rows, and their dQ.

    With WITH_DQ a program has the same work whatever its block: it walks the queries below and the keys above it.
    """
    blocks = tl.cdiv(length, BLOCK_N)
    block = tl.program_id(0) % blocks
    item = tl.program_id(0) // blocks
    batch, head = (item // heads).to(tl.int64), (item % heads).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
    query_base = query_pointer + batch * query_b + head * query_h
    key_base = key_pointer + batch * key_b + head * key_h
    value_base = value_pointer + batch * value_b + head * value_h
    grad_base = grad_pointer + batch * grad_b + head * grad_h
    own = item.to(tl.int64) * length
    mask = mask_pointer + batch * length
    seen = seen_keys(mask, rows, length, HAS_MASK)
    key = load_rows(key_base, key_n, rows, columns, length, HEAD_DIM, BLOCK_D)
    h = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    first = 0
    if CAUSAL:
        first = block * BLOCK_N // BLOCK_M * BLOCK_M
    for start in range(first, length, BLOCK_M):
        query_rows = start + tl.arange(0, BLOCK_M)
        query = load_rows(query_base, query_n, query_rows, columns, length, HEAD_DIM, BLOCK_D)
        grad = load_rows(grad_base, grad_n, query_rows, columns, length, HEAD_DIM, BLOCK_D)
        lse = tl.load(lse_pointer + own + query_rows, mask=query_rows < length, other=float("inf"))
        scores = product(key, tl.trans(query)) * scale
        scores = hide_transposed(scores, query_rows, rows, seen, CAUSAL)
        h = add_product(rounded(tl.exp2(scores - lse[None, :]), grad.dtype), grad, h)
    residual_base = residual_pointer + own * HEAD_DIM
    own_out = load_rows(out_pointer + batch * out_b + head * out_h, out_n, rows, columns, length, HEAD_DIM, BLOCK_D)
    own_grad = load_rows(grad_base, grad_n, rows, columns, length, HEAD_DIM, BLOCK_D)
    own_value = load_rows(value_base, value_n, rows, columns, length, HEAD_DIM, BLOCK_D)
    own_residual = load_rows(residual_base, HEAD_DIM, rows, columns, length, HEAD_DIM, BLOCK_D)
    # Rounded as the other products see it, so that each row of dS sums to 0.
    own_negative_h = rounded(-h, key.dtype)
    smoothed = 2.0 * own_value.to(tl.float32) - own_residual.to(tl.float32)
    own_delta = tl.sum(own_grad.to(tl.float32) * own_out.to(tl.float32) + own_negative_h.to(tl.float32) * smoothed, 1)
    tl.store(delta_pointer + own + rows, own_delta, mask=rows < length)
    store_rows(negative_h_pointer + own * HEAD_DIM, HEAD_DIM, rows, columns, own_negative_h, length, HEAD_DIM, BLOCK_D)
    if WITH_DQ:
        own_query = load_rows(query_base, query_n, rows, columns, length, HEAD_DIM, BLOCK_D)
        own_lse = tl.load(lse_pointer + own + rows, mask=rows < length, other=float("inf"))
        dq = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
        end = length
        if CAUSAL:
            end = tl.minimum((block + 1) * BLOCK_N, length)
        for start in range(0, end, BLOCK_M):
            key_rows = start + tl.arange(0, BLOCK_M)
            key_tile = load_rows(key_base, key_n, key_rows, columns, length, HEAD_DIM, BLOCK_D)
            value_tile = load_rows(value_base, value_n, key_rows, columns, length, HEAD_DIM, BLOCK_D)
            residual_tile = load_rows(residual_base, HEAD_DIM, key_rows, columns, length, HEAD_DIM, BLOCK_D)
            tile_scores = product(own_query, tl.trans(key_tile)) * scale
            tile_scores = hide(tile_scores, rows, key_rows, seen_keys(mask, key_rows, length, HAS_MASK), CAUSAL)
            weights = tl.exp2(tile_scores - own_lse[:, None])
            d_weights = add_product(own_negative_h, tl.trans(value_tile), product(own_grad, tl.trans(residual_tile)))
            d_scores = weights * (d_weights - own_delta[:, None])
            dq = add_product(rounded(d_scores, key_tile.dtype), key_tile, dq)
        dq_base = dq_pointer + batch * dq_b + head * dq_h
        store_rows(dq_base, dq_n, rows, columns, dq * softmax_scale, length, HEAD_DIM, BLOCK_D)


@tuned(
    [
        ({"BLOCK_M": 32, "BLOCK_N": 64}, 4, 1),
        ({"BLOCK_M": 32, "BLOCK_N": 64}, 4, 2),
        ({"BLOCK_M": 32, "BLOCK_N": 128}, 8, 2),
        ({"BLOCK_M": 64, "BLOCK_N": 64}, 4, 2),
        ({"BLOCK_M": 64, "BLOCK_N": 128}, 8, 2),
    ],
    [*KEY, "ADD_DQ"],
    # Timing runs add to it too.
    reset_to_zero=["dq_sum_pointer"],
)
@triton.jit
def key_value_gradient_kernel(
    query_pointer, key_pointer, value_pointer, mask_pointer, residual_pointer, lse_pointer, grad_pointer,
    negative_h_pointer, delta_pointer, dq_sum_pointer, dk_pointer, dv_pointer,
    query_b, query_h, query_n, key_b, key_h, key_n, value_b, value_h, value_n, grad_b, grad_h, grad_n,
    dk_b, dk_h, dk_n, dv_b, dv_h, dv_n,
    heads, length, scale, softmax_scale, length_class,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr,
    ADD_DQ: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dK and dV = 2H - A^T H of a block of keys; with ADD_DQ its part of dQ, added to a float32 sum."""
    blocks = tl.cdiv(length, BLOCK_N)
    block = tl.program_id(0) % blocks
    item = tl.program_id(0) // blocks
    batch, head = (item // heads).to(tl.int64), (item % heads).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
    query_base = query_pointer + batch * query_b + head * query_h
    key_base = key_pointer + batch * key_b + head * key_h
    value_base = value_pointer + batch * value_b + head * value_h
    grad_base = grad_pointer + batch * grad_b + head * grad_h
    own = item.to(tl.int64) * length
    residual_base = residual_pointer + own * HEAD_DIM
    negative_h_base = negative_h_pointer + own * HEAD_DIM
    dq_sum_base = dq_sum_pointer + own * HEAD_DIM
    seen = seen_keys(mask_pointer + batch * length, rows, length, HAS_MASK)
    key = load_rows(key_base, key_n, rows, columns, length, HEAD_DIM, BLOCK_D)
    value = load_rows(value_base, value_n, rows, columns, length, HEAD_DIM, BLOCK_D)
    residual = load_rows(residual_base, HEAD_DIM, rows, columns, length, HEAD_DIM, BLOCK_D)
    dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    minus_smoothed_h = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    first = 0
    if CAUSAL:
        first = block * BLOCK_N // BLOCK_M * BLOCK_M
    for start in range(first, length, BLOCK_M):
        query_rows = start + tl.arange(0, BLOCK_M)
        query = load_rows(query_base, query_n, query_rows, columns, length, HEAD_DIM, BLOCK_D)
        grad = load_rows(grad_base, grad_n, query_rows, columns, length, HEAD_DIM, BLOCK_D)
        negative_h = load_rows(negative_h_base, HEAD_DIM, query_rows, columns, length, HEAD_DIM, BLOCK_D)
        lse = tl.load(lse_pointer + own + query_rows, mask=query_rows < length, other=float("inf"))
        delta = tl.load(delta_pointer + own + query_rows, mask=query_rows < length, other=0.0)
        scores = product(key, tl.trans(query)) * scale
        scores = hide_transposed(scores, query_rows, rows, seen, CAUSAL)
        weights = tl.exp2(scores - lse[None, :])
        # dA = G W^T - H V^T, transposed.
        d_weights = add_product(value, tl.trans(negative_h), product(residual, tl.trans(grad)))
        d_scores = rounded(weights * (d_weights - delta[None, :]), key.dtype)
        minus_smoothed_h = add_product(rounded(weights, key.dtype), negative_h, minus_smoothed_h)
        dk = add_product(d_scores, query, dk)
        if ADD_DQ:
            dq = product(tl.trans(d_scores), key) * softmax_scale
            inside = query_rows[:, None] < length
            if HEAD_DIM != BLOCK_D:
                inside = inside & (columns[None, :] < HEAD_DIM)
            target = dq_sum_base + query_rows[:, None] * HEAD_DIM + columns[None, :]
            tl.atomic_add(target, dq, mask=inside, sem="relaxed")
    own_negative_h = load_rows(negative_h_base, HEAD_DIM, rows, columns, length, HEAD_DIM, BLOCK_D)
    dv = minus_smoothed_h - 2.0 * own_negative_h.to(tl.float32)
    dk_base = dk_pointer + batch * dk_b + head * dk_h
    store_rows(dk_base, dk_n, rows, columns, dk * softmax_scale, length, HEAD_DIM, BLOCK_D)
    dv_base = dv_pointer + batch * dv_b + head * dv_h
    store_rows(dv_base, dv_n, rows, columns, dv, length, HEAD_DIM, BLOCK_D)
