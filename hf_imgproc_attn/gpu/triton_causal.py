"""What one block of a causal single pass does, forward and backward: shared by its two schedules.

``triton_single_pass`` walks the blocks of a head one after another, ``triton_wavefront`` runs them side by side. In
both a block has tiles that are not on the diagonal, whose W or -H other blocks left in memory, and then its own tile.
With PUBLISH a block tells others, behind a barrier and with a release, that the rows they wait for are written.
"""

import triton
import triton.language as tl

from .triton_logits import load_lse, softmax_end, softmax_step, tile_of_keys, weights_of_queries
from .triton_positions import add_gradient, store_gradient
from .triton_tiles import (
    add_product,
    base_of,
    load_rows,
    product,
    rounded,
    seen_keys,
    store_rows,
)


@triton.jit
def publish(done_pointer, done, PUBLISH: tl.constexpr):
    """Let other programs know that ``done`` blocks are finished, once all threads of this one have written theirs."""
    if PUBLISH:
        tl.debug_barrier()
        tl.atomic_xchg(done_pointer, done, sem="release", scope="gpu")


@triton.jit
def forward_range(
    smooth, output, total, highest, query, keys, values, residual_base, mask, places, batch, head, rows, columns,
    low, high, length, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HAS_MASK: tl.constexpr, POSITION: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """AV and AW over the keys from low to high, all before the queries' block, by one online softmax."""
    key_base, value_base = base_of(keys, batch, head), base_of(values, batch, head)
    for start in range(low, high, BLOCK_N):
        key_rows = start + tl.arange(0, BLOCK_N)
        _, value, scores = tile_of_keys(
            query, key_base, keys.row, value_base, values.row, mask, length, scale, places, batch, head, rows,
            key_rows, length, length, HEAD_DIM, BLOCK_D, HEAD_DIM, BLOCK_D, POSITION, HAS_MASK, False, HAS_MASK,
        )  # fmt: skip
        residual = load_rows(residual_base, HEAD_DIM, key_rows, columns, length, HEAD_DIM, BLOCK_D)
        exponentials, shrink, total, highest = softmax_step(scores, highest, total)
        weights = rounded(exponentials, value.dtype)
        smooth = add_product(weights, value, smooth * shrink[:, None])
        output = add_product(weights, residual, output * shrink[:, None])
    return smooth, output, total, highest


@triton.jit
def forward_diagonal(
    smooth, output, total, highest, query, keys, values, outputs, residual_base, lse_base, mask, places, batch, head,
    rows, columns, length, scale, done_pointer, done,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HAS_MASK: tl.constexpr, POSITION: tl.constexpr,
    PUBLISH: tl.constexpr,
):  # fmt: skip
    """The tile on the diagonal: W of these rows needs it, and their output needs that W. Writes both and the lse."""
    _, own_value, own_scores = tile_of_keys(
        query, base_of(keys, batch, head), keys.row, base_of(values, batch, head), values.row, mask, length, scale,
        places, batch, head, rows, rows, length, length,
        HEAD_DIM, BLOCK_D, HEAD_DIM, BLOCK_D, POSITION, HAS_MASK, True, True,
    )  # fmt: skip
    own_exponentials, last_shrink, total, highest = softmax_step(own_scores, highest, total)
    own_weights = rounded(own_exponentials, own_value.dtype)
    smooth = add_product(own_weights, own_value, smooth * last_shrink[:, None])
    total, lse = softmax_end(highest, total)
    own_residual = 2.0 * own_value.to(tl.float32) - smooth / total[:, None]
    if HAS_MASK:  # a padded query may hold anything
        own_residual = tl.where(seen_keys(mask, rows, length, HAS_MASK)[:, None], own_residual, 0.0)
    own_residual = rounded(own_residual, own_value.dtype)
    store_rows(residual_base, HEAD_DIM, rows, columns, own_residual, length, HEAD_DIM, BLOCK_D)
    publish(done_pointer, done, PUBLISH)  # others wait for W, not for the output
    tl.store(lse_base + rows, lse, mask=rows < length)
    output = add_product(own_weights, own_residual, output * last_shrink[:, None]) / total[:, None]
    out_base = base_of(outputs, batch, head)
    store_rows(out_base, outputs.row, rows, columns, output, length, HEAD_DIM, BLOCK_D)


@triton.jit
def backward_range(
    h, dk, minus_smoothed_h, of_parameter, of_grid, of_class, key, value, residual, seen, queries, grads,
    negative_h_base, lse_base, delta_base, dq_sum_base, places, batch, head, rows, columns,
    low, high, length, scale, softmax_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HAS_MASK: tl.constexpr, POSITION: tl.constexpr,
    LEARNS: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The sums of a block of keys over the queries from low to high, all behind it; adds to their dQ."""
    query_base, grad_base = base_of(queries, batch, head), base_of(grads, batch, head)
    for start in range(low, high, BLOCK_M):
        query_rows = start + tl.arange(0, BLOCK_M)
        query = load_rows(query_base, queries.row, query_rows, columns, length, HEAD_DIM, BLOCK_D)
        grad = load_rows(grad_base, grads.row, query_rows, columns, length, HEAD_DIM, BLOCK_D)
        negative_h = load_rows(negative_h_base, HEAD_DIM, query_rows, columns, length, HEAD_DIM, BLOCK_D)
        lse = load_lse(lse_base, query_rows, length)
        delta = tl.load(delta_base + query_rows, mask=query_rows < length, other=0.0)
        weights = weights_of_queries(
            key, query, lse, scale, places, batch, head, query_rows, rows, seen, length, length,
            POSITION, False, HAS_MASK,
        )  # fmt: skip
        low_weights = rounded(weights, key.dtype)
        h = add_product(low_weights, grad, h)
        minus_smoothed_h = add_product(low_weights, negative_h, minus_smoothed_h)
        d_weights = add_product(value, tl.trans(negative_h), product(residual, tl.trans(grad)))
        exact_d_scores = weights * (d_weights - delta[None, :])
        of_parameter, of_grid, of_class = add_gradient(
            of_parameter, of_grid, of_class, exact_d_scores, places, batch, query_rows, rows, length, POSITION, LEARNS
        )
        d_scores = rounded(exact_d_scores, key.dtype)
        dk = add_product(d_scores, query, dk)
        dq = product(tl.trans(d_scores), key) * softmax_scale
        _add_rows(dq_sum_base, query_rows, columns, dq, length, HEAD_DIM)
    return h, dk, minus_smoothed_h, of_parameter, of_grid, of_class


@triton.jit
def _add_rows(pointer, rows, columns, tile, length, HEAD_DIM: tl.constexpr):
    """Add ``[block, BLOCK_D]`` to rows without gaps, which other programs may add to as well."""
    inside = (rows[:, None] < length) & (columns[None, :] < HEAD_DIM)
    tl.atomic_add(pointer + rows[:, None] * HEAD_DIM + columns[None, :], tile, mask=inside, sem="relaxed")


@triton.jit
def backward_diagonal(
    h, dk, minus_smoothed_h, of_parameter, of_grid, of_class, key, value, residual, seen, queries, outputs, grads,
    dks, dvs, negative_h_base, lse_base, delta_base, dq_sum_base, sums_pointer, slot, places, batch, head, rows,
    columns, length, scale, softmax_scale, done_pointer, done,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, POSITION: tl.constexpr, LEARNS: tl.constexpr,
    PUBLISH: tl.constexpr,
):  # fmt: skip
    """The tile on the diagonal completes H of these rows, which its own gradient needs. Writes -H, D, dK and dV."""
    own_query = load_rows(base_of(queries, batch, head), queries.row, rows, columns, length, HEAD_DIM, BLOCK_D)
    own_grad = load_rows(base_of(grads, batch, head), grads.row, rows, columns, length, HEAD_DIM, BLOCK_D)
    own_weights = weights_of_queries(
        key, own_query, load_lse(lse_base, rows, length), scale, places, batch, head, rows, rows, seen, length, length,
        POSITION, True, True,
    )  # fmt: skip
    own_low_weights = rounded(own_weights, key.dtype)
    # Rounded as the other products see it, so that each row of dS sums to 0.
    own_negative_h = rounded(-add_product(own_low_weights, own_grad, h), key.dtype)
    own_out = load_rows(base_of(outputs, batch, head), outputs.row, rows, columns, length, HEAD_DIM, BLOCK_D)
    own_smoothed = 2.0 * value.to(tl.float32) - residual.to(tl.float32)
    own_delta = tl.sum(
        own_grad.to(tl.float32) * own_out.to(tl.float32) + own_negative_h.to(tl.float32) * own_smoothed, 1
    )
    tl.store(delta_base + rows, own_delta, mask=rows < length)
    store_rows(negative_h_base, HEAD_DIM, rows, columns, own_negative_h, length, HEAD_DIM, BLOCK_D)
    publish(done_pointer, done, PUBLISH)  # others wait for -H and D, not for the gradients
    minus_smoothed_h = add_product(own_low_weights, own_negative_h, minus_smoothed_h)
    own_d_weights = add_product(value, tl.trans(own_negative_h), product(residual, tl.trans(own_grad)))
    own_exact_d_scores = own_weights * (own_d_weights - own_delta[None, :])
    of_parameter, of_grid, of_class = add_gradient(
        of_parameter, of_grid, of_class, own_exact_d_scores, places, batch, rows, rows, length, POSITION, LEARNS
    )
    store_gradient(
        sums_pointer, slot, of_parameter, of_grid, of_class, places, batch, head, rows, length, POSITION, LEARNS
    )
    own_d_scores = rounded(own_exact_d_scores, key.dtype)
    dk = add_product(own_d_scores, own_query, dk)
    own_dq = product(tl.trans(own_d_scores), key) * softmax_scale
    _add_rows(dq_sum_base, rows, columns, own_dq, length, HEAD_DIM)
    store_rows(base_of(dks, batch, head), dks.row, rows, columns, dk * softmax_scale, length, HEAD_DIM, BLOCK_D)
    dv = minus_smoothed_h - 2.0 * own_negative_h.to(tl.float32)
    store_rows(base_of(dvs, batch, head), dvs.row, rows, columns, dv, length, HEAD_DIM, BLOCK_D)
