"""Bidirectional twicing of short sequences (images: N <= 256, heads up to 64 wide): one program does a whole head.

    forward     A of the head stays on chip, in four tiles, between AV and AW: 3 products, 1.5x plain attention, and
                no traffic but Q, K, V in and out, W and the log-sum-exp out
    backward    K, V and W of the head stay on chip; -H goes through memory once; 8 products against 5, 1.6x, no
                atomic additions: dQ does not depend on the order of anything

At these lengths plain attention is bound by memory, not by its products. Saving A would cost more than its five
products save.
"""

from typing import Any

import triton
import triton.language as tl

from .triton_logits import load_lse, logits_of, softmax_end, weights_of_queries
from .triton_positions import add_gradient, no_gradient, store_gradient
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

MAX_LENGTH = 256
MAX_HEAD_DIM = 64


@triton.jit
def _softmax_of_halves(
    query, key_0, key_1, rows, rows_0, rows_1, seen_0, seen_1, scale, places, batch, head, length,
    POSITION: tl.constexpr,
):  # fmt: skip
    """Both halves of the rows of A for a block of queries, in the key's dtype, and their log-sum-exp."""
    scores_0 = logits_of(query, key_0, scale, places, batch, head, rows, rows_0, length, POSITION)
    scores_1 = logits_of(query, key_1, scale, places, batch, head, rows, rows_1, length, POSITION)
    scores_0, scores_1 = hide(scores_0, rows, rows_0, seen_0, False), hide(scores_1, rows, rows_1, seen_1, False)
    highest = tl.maximum(tl.max(scores_0, 1), tl.max(scores_1, 1))
    base = tl.where(highest == float("-inf"), 0.0, highest)
    weights_0, weights_1 = tl.exp2(scores_0 - base[:, None]), tl.exp2(scores_1 - base[:, None])
    total = tl.sum(weights_0, 1) + tl.sum(weights_1, 1)
    total, lse = softmax_end(base, total)
    weights_0 = rounded(weights_0 / total[:, None], key_0.dtype)
    weights_1 = rounded(weights_1 / total[:, None], key_1.dtype)
    return weights_0, weights_1, lse


def _with_room(configs: list[Any], arguments: dict[str, Any], **constants: Any) -> list[Any]:
    """Tiles of 128 x 128 in the registers of 4 warps would spill."""
    return [config for config in configs if config.num_warps == 8 or constants["HALF"] < 128]


@tuned(
    [({}, 4, 1), ({}, 8, 1)],
    ["HALF", "HEAD_DIM", "HAS_MASK", "POSITION"],
    prune_configs_by={"early_config_prune": _with_room},
)
@triton.jit
def short_forward_kernel(
    queries, keys, values, outputs, mask_pointer, lse_pointer, residual_pointer, places,
    heads, length, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HAS_MASK: tl.constexpr, POSITION: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """out = A W, W = 2V - AV and the log-sum-exp of one head; its rows are two blocks of HALF."""
    item = tl.program_id(0)
    batch, head = item_of(item, heads)
    columns = tl.arange(0, BLOCK_D)
    rows_0 = tl.arange(0, HALF)
    rows_1 = HALF + tl.arange(0, HALF)
    query_base, key_base = base_of(queries, batch, head), base_of(keys, batch, head)
    value_base, out_base = base_of(values, batch, head), base_of(outputs, batch, head)
    residual_base = residual_pointer + item.to(tl.int64) * length * HEAD_DIM
    lse_base = lse_pointer + item.to(tl.int64) * length
    mask = mask_pointer + batch * length
    seen_0, seen_1 = seen_keys(mask, rows_0, length, HAS_MASK), seen_keys(mask, rows_1, length, HAS_MASK)
    key_0 = load_rows(key_base, keys.row, rows_0, columns, length, HEAD_DIM, BLOCK_D)
    key_1 = load_rows(key_base, keys.row, rows_1, columns, length, HEAD_DIM, BLOCK_D)
    value_0 = load_rows(value_base, values.row, rows_0, columns, length, HEAD_DIM, BLOCK_D)
    value_1 = load_rows(value_base, values.row, rows_1, columns, length, HEAD_DIM, BLOCK_D)

    query = load_rows(query_base, queries.row, rows_0, columns, length, HEAD_DIM, BLOCK_D)
    a_00, a_01, lse = _softmax_of_halves(
        query, key_0, key_1, rows_0, rows_0, rows_1, seen_0, seen_1, scale,
        places, batch, head, length, POSITION,
    )  # fmt: skip
    tl.store(lse_base + rows_0, lse, mask=rows_0 < length)
    smooth = add_product(a_01, value_1, product(a_00, value_0))
    # Not seen as a key: padding, which may hold anything.
    smooth = tl.where(seen_0[:, None], 2.0 * value_0.to(tl.float32) - smooth, 0.0)
    residual_0 = rounded(smooth, value_0.dtype)
    store_rows(residual_base, HEAD_DIM, rows_0, columns, residual_0, length, HEAD_DIM, BLOCK_D)

    query = load_rows(query_base, queries.row, rows_1, columns, length, HEAD_DIM, BLOCK_D)
    a_10, a_11, lse = _softmax_of_halves(
        query, key_0, key_1, rows_1, rows_0, rows_1, seen_0, seen_1, scale,
        places, batch, head, length, POSITION,
    )  # fmt: skip
    tl.store(lse_base + rows_1, lse, mask=rows_1 < length)
    smooth = add_product(a_11, value_1, product(a_10, value_0))
    smooth = tl.where(seen_1[:, None], 2.0 * value_1.to(tl.float32) - smooth, 0.0)
    residual_1 = rounded(smooth, value_1.dtype)
    store_rows(residual_base, HEAD_DIM, rows_1, columns, residual_1, length, HEAD_DIM, BLOCK_D)

    output = add_product(a_01, residual_1, product(a_00, residual_0))
    store_rows(out_base, outputs.row, rows_0, columns, output, length, HEAD_DIM, BLOCK_D)
    output = add_product(a_11, residual_1, product(a_10, residual_0))
    store_rows(out_base, outputs.row, rows_1, columns, output, length, HEAD_DIM, BLOCK_D)


@tuned(
    [({"BLOCK_M": 32}, 8, 1), ({"BLOCK_M": 32}, 8, 2), ({"BLOCK_M": 32}, 16, 1)],
    ["BLOCK_N", "HEAD_DIM", "HAS_MASK", "POSITION", "LEARNS"],
)
@triton.jit
def short_backward_kernel(
    queries, keys, values, outputs, grads, dqs, dks, dvs, mask_pointer, lse_pointer, residual_pointer,
    negative_h_pointer, delta_pointer, sums_pointer, places,
    heads, length, scale, softmax_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HAS_MASK: tl.constexpr, POSITION: tl.constexpr,
    LEARNS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dQ, dK and dV of one head: all its keys in one block of BLOCK_N, its queries in blocks of BLOCK_M."""
    item = tl.program_id(0)
    batch, head = item_of(item, heads)
    columns = tl.arange(0, BLOCK_D)
    rows = tl.arange(0, BLOCK_N)
    query_base, key_base = base_of(queries, batch, head), base_of(keys, batch, head)
    value_base, grad_base = base_of(values, batch, head), base_of(grads, batch, head)
    own = item.to(tl.int64) * length
    residual_base = residual_pointer + own * HEAD_DIM
    negative_h_base = negative_h_pointer + own * HEAD_DIM
    seen = seen_keys(mask_pointer + batch * length, rows, length, HAS_MASK)
    key = load_rows(key_base, keys.row, rows, columns, length, HEAD_DIM, BLOCK_D)
    h = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    for start in range(0, length, BLOCK_M):
        query_rows = start + tl.arange(0, BLOCK_M)
        query = load_rows(query_base, queries.row, query_rows, columns, length, HEAD_DIM, BLOCK_D)
        grad = load_rows(grad_base, grads.row, query_rows, columns, length, HEAD_DIM, BLOCK_D)
        lse = load_lse(lse_pointer + own, query_rows, length)
        weights = weights_of_queries(
            key, query, lse, scale, places, batch, head, query_rows, rows, seen, length, length, POSITION, False, True
        )
        h = add_product(rounded(weights, grad.dtype), grad, h)
    value = load_rows(value_base, values.row, rows, columns, length, HEAD_DIM, BLOCK_D)
    residual = load_rows(residual_base, HEAD_DIM, rows, columns, length, HEAD_DIM, BLOCK_D)
    own_grad = load_rows(grad_base, grads.row, rows, columns, length, HEAD_DIM, BLOCK_D)
    own_out = load_rows(base_of(outputs, batch, head), outputs.row, rows, columns, length, HEAD_DIM, BLOCK_D)
    # Rounded as the other products see it, so that each row of dS sums to 0.
    own_negative_h = rounded(-h, key.dtype)
    smoothed = 2.0 * value.to(tl.float32) - residual.to(tl.float32)
    own_delta = tl.sum(own_grad.to(tl.float32) * own_out.to(tl.float32) + own_negative_h.to(tl.float32) * smoothed, 1)
    tl.store(delta_pointer + own + rows, own_delta, mask=rows < length)
    store_rows(negative_h_base, HEAD_DIM, rows, columns, own_negative_h, length, HEAD_DIM, BLOCK_D)
    # Other threads of this program read these rows below.
    tl.debug_barrier()

    dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    minus_smoothed_h = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    of_parameter, of_grid, of_class = no_gradient(places, POSITION, BLOCK_N)
    dq_base = base_of(dqs, batch, head)
    for start in range(0, length, BLOCK_M):
        query_rows = start + tl.arange(0, BLOCK_M)
        query = load_rows(query_base, queries.row, query_rows, columns, length, HEAD_DIM, BLOCK_D)
        grad = load_rows(grad_base, grads.row, query_rows, columns, length, HEAD_DIM, BLOCK_D)
        negative_h = load_rows(negative_h_base, HEAD_DIM, query_rows, columns, length, HEAD_DIM, BLOCK_D)
        lse = load_lse(lse_pointer + own, query_rows, length)
        delta = tl.load(delta_pointer + own + query_rows, mask=query_rows < length, other=0.0)
        weights = weights_of_queries(
            key, query, lse, scale, places, batch, head, query_rows, rows, seen, length, length, POSITION, False, True
        )
        d_weights = add_product(value, tl.trans(negative_h), product(residual, tl.trans(grad)))
        exact_d_scores = weights * (d_weights - delta[None, :])
        of_parameter, of_grid, of_class = add_gradient(
            of_parameter, of_grid, of_class, exact_d_scores, places, batch, query_rows, rows, length, POSITION, LEARNS
        )
        d_scores = rounded(exact_d_scores, key.dtype)
        minus_smoothed_h = add_product(rounded(weights, key.dtype), negative_h, minus_smoothed_h)
        dk = add_product(d_scores, query, dk)
        dq = product(tl.trans(d_scores), key) * softmax_scale
        store_rows(dq_base, dqs.row, query_rows, columns, dq, length, HEAD_DIM, BLOCK_D)
    # Read again rather than held in registers through the loop.
    final_negative_h = load_rows(negative_h_base, HEAD_DIM, rows, columns, length, HEAD_DIM, BLOCK_D)
    dv = minus_smoothed_h - 2.0 * final_negative_h.to(tl.float32)
    store_gradient(
        sums_pointer, item, of_parameter, of_grid, of_class, places, batch, head, rows, length, POSITION, LEARNS
    )
    store_rows(base_of(dks, batch, head), dks.row, rows, columns, dk * softmax_scale, length, HEAD_DIM, BLOCK_D)
    store_rows(base_of(dvs, batch, head), dvs.row, rows, columns, dv, length, HEAD_DIM, BLOCK_D)
