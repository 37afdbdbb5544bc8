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

from .triton_positions import add_gradient, add_position, no_gradient, store_gradient
from .triton_tiles import (
    add_product,
    base_of,
    hide,
    hide_transposed,
    item_of,
    load_rows,
    product,
    rounded,
    seen_keys,
    store_rows,
    tuned,
)

MAX_HEAD_DIM = 64
"""Up to this width it is chosen by itself: wider tiles leave no registers for three sums."""

KEY = ["length_class", "HEAD_DIM", "HAS_MASK", "POSITION"]


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
    queries, keys, values, outputs, mask_pointer, lse_pointer, residual_pointer, places,
    heads, length, scale, length_class,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HAS_MASK: tl.constexpr, POSITION: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out = A W, W = 2V - AV and the log-sum-exp of one head. BLOCK_N divides BLOCK."""
    item = tl.program_id(0)
    batch, head = item_of(item, heads)
    columns = tl.arange(0, BLOCK_D)
    query_base, key_base = base_of(queries, batch, head), base_of(keys, batch, head)
    value_base, out_base = base_of(values, batch, head), base_of(outputs, batch, head)
    residual_base = residual_pointer + item.to(tl.int64) * length * HEAD_DIM
    lse_base = lse_pointer + item.to(tl.int64) * length
    mask = mask_pointer + batch * length
    for first in range(0, length, BLOCK):
        rows = first + tl.arange(0, BLOCK)
        query = load_rows(query_base, queries.row, rows, columns, length, HEAD_DIM, BLOCK_D)
        smooth = tl.zeros([BLOCK, BLOCK_D], dtype=tl.float32)
        output = tl.zeros([BLOCK, BLOCK_D], dtype=tl.float32)
        total = tl.zeros([BLOCK], dtype=tl.float32)
        highest = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
        for start in range(0, first, BLOCK_N):
            key_rows = start + tl.arange(0, BLOCK_N)
            key = load_rows(key_base, keys.row, key_rows, columns, length, HEAD_DIM, BLOCK_D)
            value = load_rows(value_base, values.row, key_rows, columns, length, HEAD_DIM, BLOCK_D)
            residual = load_rows(residual_base, HEAD_DIM, key_rows, columns, length, HEAD_DIM, BLOCK_D)
            scores = product(query, tl.trans(key)) * scale
            scores = add_position(scores, places, batch, head, rows, key_rows, length, POSITION, False)
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
        own_key = load_rows(key_base, keys.row, rows, columns, length, HEAD_DIM, BLOCK_D)
        own_value = load_rows(value_base, values.row, rows, columns, length, HEAD_DIM, BLOCK_D)
        own_scores = product(query, tl.trans(own_key)) * scale
        own_scores = add_position(own_scores, places, batch, head, rows, rows, length, POSITION, False)
        own_seen = seen_keys(mask, rows, length, HAS_MASK)
        own_scores = hide(own_scores, rows, rows, own_seen, True)
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
        own_residual = 2.0 * own_value.to(tl.float32) - smooth / total[:, None]
        if HAS_MASK:  # a padded query may hold anything
            own_residual = tl.where(own_seen[:, None], own_residual, 0.0)
        own_residual = rounded(own_residual, own_value.dtype)
        store_rows(residual_base, HEAD_DIM, rows, columns, own_residual, length, HEAD_DIM, BLOCK_D)
        output = add_product(own_weights, own_residual, output * last_shrink[:, None]) / total[:, None]
        store_rows(out_base, outputs.row, rows, columns, output, length, HEAD_DIM, BLOCK_D)
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
    [*KEY, "LEARNS"],
    # Timing runs add to it too, or write more sums than the blocks that are chosen.
    reset_to_zero=["dq_sum_pointer", "sums_pointer"],
)
@triton.jit
def single_pass_backward_kernel(
    queries, keys, values, outputs, grads, dks, dvs, mask_pointer, lse_pointer, residual_pointer,
    negative_h_pointer, delta_pointer, dq_sum_pointer, sums_pointer, places,
    heads, length, slots, scale, softmax_scale, length_class,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HAS_MASK: tl.constexpr, POSITION: tl.constexpr,
    LEARNS: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """dK, dV and a float32 sum of dQ of one head; only this program adds to it, in one order."""
    item = tl.program_id(0)
    batch, head = item_of(item, heads)
    columns = tl.arange(0, BLOCK_D)
    query_base, key_base = base_of(queries, batch, head), base_of(keys, batch, head)
    value_base, out_base = base_of(values, batch, head), base_of(outputs, batch, head)
    grad_base = base_of(grads, batch, head)
    dk_base, dv_base = base_of(dks, batch, head), base_of(dvs, batch, head)
    own = item.to(tl.int64) * length
    residual_base = residual_pointer + own * HEAD_DIM
    negative_h_base = negative_h_pointer + own * HEAD_DIM
    dq_sum_base = dq_sum_pointer + own * HEAD_DIM
    blocks = tl.cdiv(length, BLOCK)
    for step in range(blocks):
        first = (blocks - 1 - step) * BLOCK
        rows = first + tl.arange(0, BLOCK)
        seen = seen_keys(mask_pointer + batch * length, rows, length, HAS_MASK)
        key = load_rows(key_base, keys.row, rows, columns, length, HEAD_DIM, BLOCK_D)
        value = load_rows(value_base, values.row, rows, columns, length, HEAD_DIM, BLOCK_D)
        residual = load_rows(residual_base, HEAD_DIM, rows, columns, length, HEAD_DIM, BLOCK_D)
        h = tl.zeros([BLOCK, BLOCK_D], dtype=tl.float32)
        dk = tl.zeros([BLOCK, BLOCK_D], dtype=tl.float32)
        minus_smoothed_h = tl.zeros([BLOCK, BLOCK_D], dtype=tl.float32)
        of_parameter, of_grid, of_class = no_gradient(places, POSITION, BLOCK)
        for start in range(first + BLOCK, length, BLOCK_M):
            query_rows = start + tl.arange(0, BLOCK_M)
            query = load_rows(query_base, queries.row, query_rows, columns, length, HEAD_DIM, BLOCK_D)
            grad = load_rows(grad_base, grads.row, query_rows, columns, length, HEAD_DIM, BLOCK_D)
            negative_h = load_rows(negative_h_base, HEAD_DIM, query_rows, columns, length, HEAD_DIM, BLOCK_D)
            lse = tl.load(lse_pointer + own + query_rows, mask=query_rows < length, other=float("inf"))
            delta = tl.load(delta_pointer + own + query_rows, mask=query_rows < length, other=0.0)
            scores = product(key, tl.trans(query)) * scale
            scores = add_position(scores, places, batch, head, query_rows, rows, length, POSITION, True)
            if HAS_MASK:
                scores = hide_transposed(scores, query_rows, rows, seen, False)
            weights = tl.exp2(scores - lse[None, :])
            low_weights = rounded(weights, key.dtype)
            h = add_product(low_weights, grad, h)
            minus_smoothed_h = add_product(low_weights, negative_h, minus_smoothed_h)
            d_weights = add_product(value, tl.trans(negative_h), product(residual, tl.trans(grad)))
            exact_d_scores = weights * (d_weights - delta[None, :])
            of_parameter, of_grid, of_class = add_gradient(
                of_parameter, of_grid, of_class, exact_d_scores, places, batch, query_rows, rows, length,
                POSITION, LEARNS,
            )  # fmt: skip
            d_scores = rounded(exact_d_scores, key.dtype)
            dk = add_product(d_scores, query, dk)
            dq = product(tl.trans(d_scores), key) * softmax_scale
            inside = (query_rows[:, None] < length) & (columns[None, :] < HEAD_DIM)
            target = dq_sum_base + query_rows[:, None] * HEAD_DIM + columns[None, :]
            tl.atomic_add(target, dq, mask=inside, sem="relaxed")
        # The tile on the diagonal completes H of these rows, which its own gradient needs.
        own_query = load_rows(query_base, queries.row, rows, columns, length, HEAD_DIM, BLOCK_D)
        own_grad = load_rows(grad_base, grads.row, rows, columns, length, HEAD_DIM, BLOCK_D)
        own_lse = tl.load(lse_pointer + own + rows, mask=rows < length, other=float("inf"))
        own_scores = product(key, tl.trans(own_query)) * scale
        own_scores = add_position(own_scores, places, batch, head, rows, rows, length, POSITION, True)
        own_scores = hide_transposed(own_scores, rows, rows, seen, True)
        own_weights = tl.exp2(own_scores - own_lse[None, :])
        own_low_weights = rounded(own_weights, key.dtype)
        # Rounded as the other products see it, so that each row of dS sums to 0.
        own_negative_h = rounded(-add_product(own_low_weights, own_grad, h), key.dtype)
        own_out = load_rows(out_base, outputs.row, rows, columns, length, HEAD_DIM, BLOCK_D)
        own_smoothed = 2.0 * value.to(tl.float32) - residual.to(tl.float32)
        own_delta = tl.sum(
            own_grad.to(tl.float32) * own_out.to(tl.float32) + own_negative_h.to(tl.float32) * own_smoothed, 1
        )
        tl.store(delta_pointer + own + rows, own_delta, mask=rows < length)
        store_rows(negative_h_base, HEAD_DIM, rows, columns, own_negative_h, length, HEAD_DIM, BLOCK_D)
        minus_smoothed_h = add_product(own_low_weights, own_negative_h, minus_smoothed_h)
        own_d_weights = add_product(value, tl.trans(own_negative_h), product(residual, tl.trans(own_grad)))
        own_exact_d_scores = own_weights * (own_d_weights - own_delta[None, :])
        of_parameter, of_grid, of_class = add_gradient(
            of_parameter, of_grid, of_class, own_exact_d_scores, places, batch, rows, rows, length, POSITION, LEARNS
        )
        slot = item * slots + blocks - 1 - step
        store_gradient(
sums_pointer, slot, of_parameter, of_grid, of_class, places, batch, head, rows, length,
        POSITION, LEARNS,
)  # fmt: skip
        own_d_scores = rounded(own_exact_d_scores, key.dtype)
        dk = add_product(own_d_scores, own_query, dk)
        own_dq = product(tl.trans(own_d_scores), key) * softmax_scale
        own_inside = (rows[:, None] < length) & (columns[None, :] < HEAD_DIM)
        own_target = dq_sum_base + rows[:, None] * HEAD_DIM + columns[None, :]
        tl.atomic_add(own_target, own_dq, mask=own_inside, sem="relaxed")
        store_rows(dk_base, dks.row, rows, columns, dk * softmax_scale, length, HEAD_DIM, BLOCK_D)
        dv = minus_smoothed_h - 2.0 * own_negative_h.to(tl.float32)
        store_rows(dv_base, dvs.row, rows, columns, dv, length, HEAD_DIM, BLOCK_D)
        # The blocks that follow read this -H in other threads.
        tl.debug_barrier()
