"""Causal twicing with each tile of scores computed once, and the blocks of a head side by side: few heads fill a GPU.

Block b needs W_j of the blocks before it, and only its last tile needs the newest one. So all blocks start at once,
and each waits, where it must, until the W of its next tile is written. Per head one number in memory says how many
blocks are finished: a block finishes after the one before it, whose W it has read, so the number tells of every block.
It is written with a release behind a barrier of the program's threads, and read with an acquire.

*No deadlock.* A program takes its number from a counter, and with it its block: all heads' first blocks, then all
second ones. It waits only for programs that took a smaller number, which therefore run already, in whatever order the
device starts programs and however few run at a time.

    forward     3 products, 1.5x plain attention; backward     7 products, 1.4x, blocks in reverse: key blocks wait for
    -H and D of the query blocks behind them. dQ is a sum of atomic additions in no fixed order.

On paper, N = 2,048, tiles of 64, a multiprocessor a program: 1.80, 1.62, 1.56 and 1.53 times plain attention for 24,
48, 96 and 192 heads in all, against 8.3, 4.1, 2.06 and 2.06 of one program a head; waiting is not in the model.
"""

import triton
import triton.language as tl

from .triton_causal import backward_diagonal, backward_range, forward_diagonal, forward_range
from .triton_positions import no_gradient
from .triton_single_pass import BACKWARD, FORWARD, KEY
from .triton_tiles import base_of, item_of, load_rows, seen_keys, tuned


@triton.jit
def take_number(flags_pointer):
    """This program's number: 0, 1, 2, ... in the order in which programs start."""
    return tl.atomic_add(flags_pointer, 1, sem="relaxed", scope="gpu")


@triton.jit
def wait_until(done_pointer, least):
    """How many blocks of a head are finished, at least ``least``; what they wrote can be read then."""
    done = tl.atomic_add(done_pointer, 0, sem="acquire", scope="gpu")
    while done < least:
        done = tl.atomic_add(done_pointer, 0, sem="acquire", scope="gpu")
    return done


@tuned(FORWARD, [*KEY, "items_class"], reset_to_zero=["flags_pointer"])
@triton.jit
def wavefront_forward_kernel(
    queries, keys, values, outputs, mask_pointer, lse_pointer, residual_pointer, flags_pointer, places,
    heads, items, length, scale, length_class, items_class,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HAS_MASK: tl.constexpr, POSITION: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out = A W, W = 2V - AV and the log-sum-exp of one block of queries. BLOCK_N divides BLOCK."""
    number = take_number(flags_pointer)
    item, block = number % items, number // items
    done_pointer = flags_pointer + 1 + item
    batch, head = item_of(item, heads)
    columns = tl.arange(0, BLOCK_D)
    residual_base = residual_pointer + item.to(tl.int64) * length * HEAD_DIM
    lse_base = lse_pointer + item.to(tl.int64) * length
    mask = mask_pointer + batch * length
    rows = block * BLOCK + tl.arange(0, BLOCK)
    query = load_rows(base_of(queries, batch, head), queries.row, rows, columns, length, HEAD_DIM, BLOCK_D)
    smooth = tl.zeros([BLOCK, BLOCK_D], dtype=tl.float32)
    output = tl.zeros([BLOCK, BLOCK_D], dtype=tl.float32)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    highest = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    done = block * 0
    while done < block:
        # Most are there already: the inner loop runs over all of them without waiting, and loads ahead.
        ready = tl.minimum(wait_until(done_pointer, done + 1), block)
        smooth, output, total, highest = forward_range(
            smooth, output, total, highest, query, keys, values, residual_base, mask, places, batch, head, rows,
            columns, done * BLOCK, ready * BLOCK, length, scale, HEAD_DIM, BLOCK_D, HAS_MASK, POSITION, BLOCK_N,
        )  # fmt: skip
        done = ready
    forward_diagonal(
        smooth, output, total, highest, query, keys, values, outputs, residual_base, lse_base, mask, places,
        batch, head, rows, columns, length, scale, done_pointer, block + 1,
        HEAD_DIM, BLOCK_D, HAS_MASK, POSITION, True,
    )  # fmt: skip


@tuned(
    BACKWARD,
    [*KEY, "LEARNS", "items_class"],
    # Timing runs add to it too, or write more sums than the blocks that are chosen.
    reset_to_zero=["dq_sum_pointer", "sums_pointer", "flags_pointer"],
)
@triton.jit
def wavefront_backward_kernel(
    queries, keys, values, outputs, grads, dks, dvs, mask_pointer, lse_pointer, residual_pointer,
    negative_h_pointer, delta_pointer, dq_sum_pointer, sums_pointer, flags_pointer, places,
    heads, items, length, slots, scale, softmax_scale, length_class, items_class,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HAS_MASK: tl.constexpr, POSITION: tl.constexpr,
    LEARNS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """dK and dV of one block of keys, the last block of a head first; adds to a float32 sum of dQ."""
    number = take_number(flags_pointer)
    item, step = number % items, number // items
    blocks = tl.cdiv(length, BLOCK)
    block = blocks - 1 - step
    done_pointer = flags_pointer + 1 + item
    batch, head = item_of(item, heads)
    columns = tl.arange(0, BLOCK_D)
    own = item.to(tl.int64) * length
    negative_h_base = negative_h_pointer + own * HEAD_DIM
    dq_sum_base = dq_sum_pointer + own * HEAD_DIM
    lse_base, delta_base = lse_pointer + own, delta_pointer + own
    rows = block * BLOCK + tl.arange(0, BLOCK)
    seen = seen_keys(mask_pointer + batch * length, rows, length, HAS_MASK)
    key = load_rows(base_of(keys, batch, head), keys.row, rows, columns, length, HEAD_DIM, BLOCK_D)
    value = load_rows(base_of(values, batch, head), values.row, rows, columns, length, HEAD_DIM, BLOCK_D)
    residual = load_rows(residual_pointer + own * HEAD_DIM, HEAD_DIM, rows, columns, length, HEAD_DIM, BLOCK_D)
    h = tl.zeros([BLOCK, BLOCK_D], dtype=tl.float32)
    dk = tl.zeros([BLOCK, BLOCK_D], dtype=tl.float32)
    minus_smoothed_h = tl.zeros([BLOCK, BLOCK_D], dtype=tl.float32)
    of_parameter, of_grid, of_class = no_gradient(places, POSITION, BLOCK)
    done = step * 0
    while done < step:
        ready = tl.minimum(wait_until(done_pointer, done + 1), step)
        # The last block finishes first: of all blocks the last ``ready`` are there, ``done`` of them used.
        h, dk, minus_smoothed_h, of_parameter, of_grid, of_class = backward_range(
            h, dk, minus_smoothed_h, of_parameter, of_grid, of_class, key, value, residual, seen, queries, grads,
            negative_h_base, lse_base, delta_base, dq_sum_base, places, batch, head, rows, columns,
            (blocks - ready) * BLOCK, tl.minimum((blocks - done) * BLOCK, length), length, scale, softmax_scale,
            HEAD_DIM, BLOCK_D, HAS_MASK, POSITION, LEARNS, BLOCK_M,
        )  # fmt: skip
        done = ready
    backward_diagonal(
        h, dk, minus_smoothed_h, of_parameter, of_grid, of_class, key, value, residual, seen, queries, outputs,
        grads, dks, dvs, negative_h_base, lse_base, delta_base, dq_sum_base, sums_pointer, item * slots + block,
        places, batch, head, rows, columns, length, scale, softmax_scale, done_pointer, step + 1,
        HEAD_DIM, BLOCK_D, POSITION, LEARNS, True,
    )  # fmt: skip
