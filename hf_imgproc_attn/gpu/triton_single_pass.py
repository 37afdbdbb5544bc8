"""Causal twicing with each tile of scores computed once: one program a head walks its blocks in order.

    forward     blocks of queries in ascending order: every W_j that block b needs, j <= b, is known by then, so that
                AV and AW share one online softmax                            3 products, 1.5x plain attention
    backward    blocks of keys in descending order: H_i is final for every i above the diagonal, and H_j is complete
                when the queries below its diagonal are done                  7 products, 1.4x

The order is what forbids blocks of one head to run side by side, so that only batch * heads programs exist: worth it
where they fill the device. What a program writes and later reads (W, -H) it reads behind a barrier.
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

MAX_HEAD_DIM = 64
"""Up to this width it is chosen by itself: wider tiles leave no registers for three sums."""

KEY = ["length_class", "HEAD_DIM", "HAS_MASK"]


@tuned(
    [
        ({"BLOCK": 64, "BLOCK_N": 32}, 4, 3),
        ({"BLOCK": 64, "BLOCK_N": 64}, 4, 2),
        ({"BLOCK": 128, "BLOCK_N": 64}, 8, 3),
        ({"BLOCK": 128, "BLOCK_N": 128}, 8, 2),
    ],
    KEY,
)
@triton.jit
def single_pass_forward_kernel(
    query_pointer, key_pointer, value_pointer, mask_pointer, residual_pointer, lse_pointer, out_pointer,
    query_b, query_h, query_n, key_b, key_h, key_n, value_b, value_h, value_n, out_b, out_h, out_n,
    heads, length, scale, length_class,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HAS_MASK: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out = A W, W = 2V - AV and the log-sum-exp of one head. BLOCK_N divides BLOCK."""
    item = tl.program_id(0)
    batch, head = (item // heads).to(tl.int64), (item % heads).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    query_base = query_pointer + batch * query_b + head * query_h
    key_base = key_pointer + batch * key_b + head * key_h
    value_base = value_pointer + batch * value_b + head * value_h
    out_base = out_pointer + batch * out_b + head * out_h
    residual_base = residual_pointer + item.to(tl.int64) * length * HEAD_DIM
    lse_base = lse_pointer + item.to(tl.int64) * length
    mask = mask_pointer + batch * length
    for first in range(0, length, BLOCK):
        rows = first + tl.arange(0, BLOCK)
        query = load_rows(query_base, query_n, rows, columns, length, HEAD_DIM, BLOCK_D)
        smooth = tl.zeros([BLOCK, BLOCK_D], dtype=tl.float32)
        output = tl.zeros([BLOCK, BLOCK_D], dtype=tl.float32)
        total = tl.zeros([BLOCK], dtype=tl.float32)
        highest = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
        for start in range(0, first, BLOCK_N):
            key_rows = start + tl.arange(0, BLOCK_N)
            key = load_rows(key_base, key_n, key_rows, columns, length, HEAD_DIM, BLOCK_D)
            value = load_rows(value_base, value_n, key_rows, columns, length, HEAD_DIM, BLOCK_D)
            residual = load_rows(residual_base, HEAD_DIM, key_rows, columns, length, HEAD_DIM, BLOCK_D)
            scores = product(query, tl.trans(key)) * scale
            if HAS_MASK:
                scores = hide(scores, rows, key_rows, seen_keys(mask, key_rows, length, HAS_MASK), False)
            new_highest = tl.maximum(highest, tl.max(scores, 1))
            # A row that has seen no key yet: -inf - -inf is not a number.
            base = tl.where(new_highest == float("-inf"), 0.0, new_highest)
            exponentials = tl.exp2(scores - base[:, None])
            shrink = tl.exp2(highest - base)
            total = total * shrink + tl.sum(exponentials, 1)
            weights = rounded(exponentials, value.dtype)
            smooth = add_product(weights, value, smooth * shrink[:, None])
            output = add_product(weights, residual, output * shrink[:, None])
            highest = new_highest
        # The tile on the diagonal: W of these rows needs it, and their output needs that W.
        own_key = load_rows(key_base, key_n, rows, columns, length, HEAD_DIM, BLOCK_D)
        own_value = load_rows(value_base, value_n, rows, columns, length, HEAD_DIM, BLOCK_D)
        own_scores = product(query, tl.trans(own_key)) * scale
        own_scores = hide(own_scores, rows, rows, seen_keys(mask, rows, length, HAS_MASK), True)
        last_highest = tl.maximum(highest, tl.max(own_scores, 1))
        last_base = tl.where(last_highest == float("-inf"), 0.0, last_highest)
        own_exponentials = tl.exp2(own_scores - last_base[:, None])
        last_shrink = tl.exp2(highest - last_base)
        total = total * last_shrink + tl.sum(own_exponentials, 1)
        own_weights = rounded(own_exponentials, own_value.dtype)
        smooth = add_product(own_weights, own_value, smooth * last_shrink[:, None])
        sees = total > 0.0
        total = tl.where(sees, total, 1.0)
        tl.store(lse_base + rows, tl.where(sees, last_base + tl.log2(total), float("inf")), mask=rows < length)
        own_residual = rounded(2.0 * own_value.to(tl.float32) - smooth / total[:, None], own_value.dtype)
        store_rows(residual_base, HEAD_DIM, rows, columns, own_residual, length, HEAD_DIM, BLOCK_D)
        output = add_product(own_weights, own_residual, output * last_shrink[:, None]) / total[:, None]
        store_rows(out_base, out_n, rows, columns, output, length, HEAD_DIM, BLOCK_D)
        # The blocks that follow read this W in other threads.
        tl.debug_barrier()


@tuned(
    [
        ({"BLOCK": 64, "BLOCK_M": 32}, 4, 2),
        ({"BLOCK": 64, "BLOCK_M": 64}, 4, 2),
        ({"BLOCK": 64, "BLOCK_M": 64}, 8, 2),
        ({"BLOCK": 128, "BLOCK_M": 32}, 8, 2),
        ({"BLOCK": 128, "BLOCK_M": 64}, 8, 2),
    ],
    KEY,
    # Timing runs add to it too.
    reset_to_zero=["dq_sum_pointer"],
)
@triton.jit
def single_pass_backward_kernel(
    query_pointer, key_pointer, value_pointer, mask_pointer, residual_pointer, lse_pointer, out_pointer, grad_pointer,
    negative_h_pointer, delta_pointer, dq_sum_pointer, dk_pointer, dv_pointer,
    query_b, query_h, query_n, key_b, key_h, key_n, value_b, value_h, value_n, out_b, out_h, out_n,
    grad_b, grad_h, grad_n, dk_b, dk_h, dk_n, dv_b, dv_h, dv_n,
    heads, length, scale, softmax_scale, length_class,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HAS_MASK: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """dK, dV and a float32 sum of dQ of one head; only this program adds to it, in one order."""
    item = tl.program_id(0)
    batch, head = (item // heads).to(tl.int64), (item % heads).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    query_base = query_pointer + batch * query_b + head * query_h
    key_base = key_pointer + batch * key_b + head * key_h
    value_base = value_pointer + batch * value_b + head * value_h
    out_base = out_pointer + batch * out_b + head * out_h
    grad_base = grad_pointer + batch * grad_b + head * grad_h
    dk_base = dk_pointer + batch * dk_b + head * dk_h
    dv_base = dv_pointer + batch * dv_b + head * dv_h
    own = item.to(tl.int64) * length
    residual_base = residual_pointer + own * HEAD_DIM
    negative_h_base = negative_h_pointer + own * HEAD_DIM
    dq_sum_base = dq_sum_pointer + own * HEAD_DIM
    blocks = tl.cdiv(length, BLOCK)
    for step in range(blocks):
        first = (blocks - 1 - step) * BLOCK
        rows = first + tl.arange(0, BLOCK)
        seen = seen_keys(mask_pointer + batch * length, rows, length, HAS_MASK)
        key = load_rows(key_base, key_n, rows, columns, length, HEAD_DIM, BLOCK_D)
        value = load_rows(value_base, value_n, rows, columns, length, HEAD_DIM, BLOCK_D)
        residual = load_rows(residual_base, HEAD_DIM, rows, columns, length, HEAD_DIM, BLOCK_D)
        h = tl.zeros([BLOCK, BLOCK_D], dtype=tl.float32)
        dk = tl.zeros([BLOCK, BLOCK_D], dtype=tl.float32)
        minus_smoothed_h = tl.zeros([BLOCK, BLOCK_D], dtype=tl.float32)
        for start in range(first + BLOCK, length, BLOCK_M):
            query_rows = start + tl.arange(0, BLOCK_M)
            query = load_rows(query_base, query_n, query_rows, columns, length, HEAD_DIM, BLOCK_D)
            grad = load_rows(grad_base, grad_n, query_rows, columns, length, HEAD_DIM, BLOCK_D)
            negative_h = load_rows(negative_h_base, HEAD_DIM, query_rows, columns, length, HEAD_DIM, BLOCK_D)
            lse = tl.load(lse_pointer + own + query_rows, mask=query_rows < length, other=float("inf"))
            delta = tl.load(delta_pointer + own + query_rows, mask=query_rows < length, other=0.0)
            scores = product(key, tl.trans(query)) * scale
            if HAS_MASK:
                scores = hide_transposed(scores, query_rows, rows, seen, False)
            weights = tl.exp2(scores - lse[None, :])
            low_weights = rounded(weights, key.dtype)
            h = add_product(low_weights, grad, h)
            minus_smoothed_h = add_product(low_weights, negative_h, minus_smoothed_h)
            d_weights = add_product(value, tl.trans(negative_h), product(residual, tl.trans(grad)))
            d_scores = rounded(weights * (d_weights - delta[None, :]), key.dtype)
            dk = add_product(d_scores, query, dk)
            dq = product(tl.trans(d_scores), key) * softmax_scale
            inside = (query_rows[:, None] < length) & (columns[None, :] < HEAD_DIM)
            target = dq_sum_base + query_rows[:, None] * HEAD_DIM + columns[None, :]
            tl.atomic_add(target, dq, mask=inside, sem="relaxed")
        # The tile on the diagonal completes H of these rows, which its own gradient needs.
        own_query = load_rows(query_base, query_n, rows, columns, length, HEAD_DIM, BLOCK_D)
        own_grad = load_rows(grad_base, grad_n, rows, columns, length, HEAD_DIM, BLOCK_D)
        own_lse = tl.load(lse_pointer + own + rows, mask=rows < length, other=float("inf"))
        own_scores = hide_transposed(product(key, tl.trans(own_query)) * scale, rows, rows, seen, True)
        own_weights = tl.exp2(own_scores - own_lse[None, :])
        own_low_weights = rounded(own_weights, key.dtype)
        # Rounded as the other products see it, so that each row of dS sums to 0.
        own_negative_h = rounded(-add_product(own_low_weights, own_grad, h), key.dtype)
        own_out = load_rows(out_base, out_n, rows, columns, length, HEAD_DIM, BLOCK_D)
        own_smoothed = 2.0 * value.to(tl.float32) - residual.to(tl.float32)
        own_delta = tl.sum(
            own_grad.to(tl.float32) * own_out.to(tl.float32) + own_negative_h.to(tl.float32) * own_smoothed, 1
        )
        tl.store(delta_pointer + own + rows, own_delta, mask=rows < length)
        store_rows(negative_h_base, HEAD_DIM, rows, columns, own_negative_h, length, HEAD_DIM, BLOCK_D)
        minus_smoothed_h = add_product(own_low_weights, own_negative_h, minus_smoothed_h)
        own_d_weights = add_product(value, tl.trans(own_negative_h), product(residual, tl.trans(own_grad)))
        own_d_scores = rounded(own_weights * (own_d_weights - own_delta[None, :]), key.dtype)
        dk = add_product(own_d_scores, own_query, dk)
        own_dq = product(tl.trans(own_d_scores), key) * softmax_scale
        own_inside = (rows[:, None] < length) & (columns[None, :] < HEAD_DIM)
        own_target = dq_sum_base + rows[:, None] * HEAD_DIM + columns[None, :]
        tl.atomic_add(own_target, own_dq, mask=own_inside, sem="relaxed")
        store_rows(dk_base, dk_n, rows, columns, dk * softmax_scale, length, HEAD_DIM, BLOCK_D)
        dv = minus_smoothed_h - 2.0 * own_negative_h.to(tl.float32)
        store_rows(dv_base, dv_n, rows, columns, dv, length, HEAD_DIM, BLOCK_D)
        # The blocks that follow read this -H in other threads.
        tl.debug_barrier()
