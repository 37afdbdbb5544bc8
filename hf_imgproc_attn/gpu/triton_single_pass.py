"""Causal twicing with each tile of scores computed once: one program a head walks its blocks in order.

    forward     blocks of queries in ascending order: every W_j that block b needs, j <= b, is known by then, so that
                AV and AW share one online softmax                            3 products, 1.5x plain attention
    backward    blocks of keys in descending order: H_i is final for every i above the diagonal, and H_j is complete
                when the queries below its diagonal are done                  7 products, 1.4x

Only batch * heads programs exist: worth it where they fill the device. ``triton_wavefront`` runs the blocks of a head
side by side. What a program writes and later reads (W, -H) it reads behind a barrier.
"""

import triton
import triton.language as tl

from .triton_causal import backward_diagonal, backward_range, forward_diagonal, forward_range
from .triton_positions import no_gradient
from .triton_tiles import base_of, item_of, load_rows, seen_keys, tuned

MAX_HEAD_DIM = 64
"""Up to this width it is chosen by itself: wider tiles leave no registers for three sums."""

KEY = ["length_class", "HEAD_DIM", "HAS_MASK", "POSITION"]

FORWARD = [
    ({"BLOCK": 64, "BLOCK_N": 32}, 4, 3),
    ({"BLOCK": 64, "BLOCK_N": 64}, 4, 2),
    ({"BLOCK": 128, "BLOCK_N": 64}, 8, 3),
    ({"BLOCK": 128, "BLOCK_N": 128}, 8, 2),
]
BACKWARD = [
    ({"BLOCK": 64, "BLOCK_M": 32}, 4, 2),
    ({"BLOCK": 64, "BLOCK_M": 64}, 4, 2),
    ({"BLOCK": 64, "BLOCK_M": 64}, 8, 2),
    ({"BLOCK": 128, "BLOCK_M": 32}, 8, 2),
    ({"BLOCK": 128, "BLOCK_M": 64}, 8, 2),
]


@tuned(FORWARD, KEY)
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
    query_base = base_of(queries, batch, head)
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
        smooth, output, total, highest = forward_range(
            smooth, output, total, highest, query, keys, values, residual_base, mask, places, batch, head, rows,
            columns, 0, first, length, scale, HEAD_DIM, BLOCK_D, HAS_MASK, POSITION, BLOCK_N,
        )  # fmt: skip
        forward_diagonal(
            smooth, output, total, highest, query, keys, values, outputs, residual_base, lse_base, mask, places,
            batch, head, rows, columns, length, scale, lse_base, 0, HEAD_DIM, BLOCK_D, HAS_MASK, POSITION, False,
        )  # fmt: skip
        # The blocks that follow read this W in other threads.
        tl.debug_barrier()


@tuned(
    BACKWARD,
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
    key_base, value_base = base_of(keys, batch, head), base_of(values, batch, head)
    own = item.to(tl.int64) * length
    residual_base = residual_pointer + own * HEAD_DIM
    negative_h_base = negative_h_pointer + own * HEAD_DIM
    dq_sum_base = dq_sum_pointer + own * HEAD_DIM
    lse_base, delta_base = lse_pointer + own, delta_pointer + own
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
        h, dk, minus_smoothed_h, of_parameter, of_grid, of_class = backward_range(
            h, dk, minus_smoothed_h, of_parameter, of_grid, of_class, key, value, residual, seen, queries, grads,
            negative_h_base, lse_base, delta_base, dq_sum_base, places, batch, head, rows, columns,
            first + BLOCK, length, length, scale, softmax_scale,
            HEAD_DIM, BLOCK_D, HAS_MASK, POSITION, LEARNS, BLOCK_M,
        )  # fmt: skip
        slot = item * slots + blocks - 1 - step
        backward_diagonal(
            h, dk, minus_smoothed_h, of_parameter, of_grid, of_class, key, value, residual, seen, queries, outputs,
            grads, dks, dvs, negative_h_base, lse_base, delta_base, dq_sum_base, sums_pointer, slot, places, batch,
            head, rows, columns, length, scale, softmax_scale, lse_base, 0,
            HEAD_DIM, BLOCK_D, POSITION, LEARNS, False,
        )  # fmt: skip
        # The blocks that follow read this -H in other threads.
        tl.debug_barrier()
