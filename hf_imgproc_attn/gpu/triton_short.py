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

MAX_LENGTH = 256
MAX_HEAD_DIM = 64


@triton.jit
def _softmax_of_halves(query, key_0, key_1, rows, rows_0, rows_1, seen_0, seen_1, scale):
    """Both halves of the rows of A for a block of queries, in the key's dtype, and their log-sum-exp."""
    scores_0 = hide(product(query, tl.trans(key_0)) * scale, rows, rows_0, seen_0, False)
    scores_1 = hide(product(query, tl.trans(key_1)) * scale, rows, rows_1, seen_1, False)
    highest = tl.maximum(tl.max(scores_0, 1), tl.max(scores_1, 1))
    base = tl.where(highest == float("-inf"), 0.0, highest)
    weights_0, weights_1 = tl.exp2(scores_0 - base[:, None]), tl.exp2(scores_1 - base[:, None])
    total = tl.sum(weights_0, 1) + tl.sum(weights_1, 1)
    sees = total > 0.0
    total = tl.where(sees, total, 1.0)
    lse = tl.where(sees, base + tl.log2(total), float("inf"))
    weights_0 = rounded(weights_0 / total[:, None], key_0.dtype)
    weights_1 = rounded(weights_1 / total[:, None], key_1.dtype)
    return weights_0, weights_1, lse


def _with_room(configs: list[Any], arguments: dict[str, Any], **constants: Any) -> list[Any]:
    """Tiles of 128 x 128 in the registers of 4 warps would spill."""
    return [config for config in configs if config.num_warps == 8 or constants["HALF"] < 128]


@tuned(
    [({}, 4, 1), ({}, 8, 1)],
    ["HALF", "HEAD_DIM", "HAS_MASK"],
    prune_configs_by={"early_config_prune": _with_room},
)
@triton.jit
def short_forward_kernel(
    query_pointer, key_pointer, value_pointer, mask_pointer, residual_pointer, lse_pointer, out_pointer,
    query_b, query_h, query_n, key_b, key_h, key_n, value_b, value_h, value_n, out_b, out_h, out_n,
    heads, length, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HAS_MASK: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """out = A W, W = 2V - AV and the log-sum-exp of one head; its rows are two blocks of HALF."""
    item = tl.program_id(0)
    batch, head = (item // heads).to(tl.int64), (item % heads).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    rows_0 = tl.arange(0, HALF)
    rows_1 = HALF + tl.arange(0, HALF)
    query_base = query_pointer + batch * query_b + head * query_h
    key_base = key_pointer + batch * key_b + head * key_h
    value_base = value_pointer + batch * value_b + head * value_h
    out_base = out_pointer + batch * out_b + head * out_h
    residual_base = residual_pointer + item.to(tl.int64) * length * HEAD_DIM
    lse_base = lse_pointer + item.to(tl.int64) * length
    mask = mask_pointer + batch * length
    seen_0, seen_1 = seen_keys(mask, rows_0, length, HAS_MASK), seen_keys(mask, rows_1, length, HAS_MASK)
    key_0 = load_rows(key_base, key_n, rows_0, columns, length, HEAD_DIM, BLOCK_D)
    key_1 = load_rows(key_base, key_n, rows_1, columns, length, HEAD_DIM, BLOCK_D)
    value_0 = load_rows(value_base, value_n, rows_0, columns, length, HEAD_DIM, BLOCK_D)
    value_1 = load_rows(value_base, value_n, rows_1, columns, length, HEAD_DIM, BLOCK_D)

    query = load_rows(query_base, query_n, rows_0, columns, length, HEAD_DIM, BLOCK_D)
    a_00, a_01, lse = _softmax_of_halves(query, key_0, key_1, rows_0, rows_0, rows_1, seen_0, seen_1, scale)
    tl.store(lse_base + rows_0, lse, mask=rows_0 < length)
    smooth = add_product(a_01, value_1, product(a_00, value_0))
    residual_0 = rounded(2.0 * value_0.to(tl.float32) - smooth, value_0.dtype)
    store_rows(residual_base, HEAD_DIM, rows_0, columns, residual_0, length, HEAD_DIM, BLOCK_D)

    query = load_rows(query_base, query_n, rows_1, columns, length, HEAD_DIM, BLOCK_D)
    a_10, a_11, lse = _softmax_of_halves(query, key_0, key_1, rows_1, rows_0, rows_1, seen_0, seen_1, scale)
    tl.store(lse_base + rows_1, lse, mask=rows_1 < length)
    smooth = add_product(a_11, value_1, product(a_10, value_0))
    residual_1 = rounded(2.0 * value_1.to(tl.float32) - smooth, value_1.dtype)
    store_rows(residual_base, HEAD_DIM, rows_1, columns, residual_1, length, HEAD_DIM, BLOCK_D)

    output = add_product(a_01, residual_1, product(a_00, residual_0))
    store_rows(out_base, out_n, rows_0, columns, output, length, HEAD_DIM, BLOCK_D)
    output = add_product(a_11, residual_1, product(a_10, residual_0))
    store_rows(out_base, out_n, rows_1, columns, output, length, HEAD_DIM, BLOCK_D)


@tuned(
    [({"BLOCK_M": 32}, 8, 1), ({"BLOCK_M": 32}, 8, 2), ({"BLOCK_M": 32}, 16, 1)],
    ["BLOCK_N", "HEAD_DIM", "HAS_MASK"],
)
@triton.jit
def short_backward_kernel(
    query_pointer, key_pointer, value_pointer, mask_pointer, residual_pointer, lse_pointer, out_pointer, grad_pointer,
    negative_h_pointer, delta_pointer, dq_pointer, dk_pointer, dv_pointer,
    query_b, query_h, query_n, key_b, key_h, key_n, value_b, value_h, value_n, out_b, out_h, out_n,
    grad_b, grad_h, grad_n, dq_b, dq_h, dq_n, dk_b, dk_h, dk_n, dv_b, dv_h, dv_n,
    heads, length, scale, softmax_scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, HAS_MASK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dQ, dK and dV of one head: all its keys in one block of BLOCK_N, its queries in blocks of BLOCK_M."""
    item = tl.program_id(0)
    batch, head = (item // heads).to(tl.int64), (item % heads).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    rows = tl.arange(0, BLOCK_N)
    query_base = query_pointer + batch * query_b + head * query_h
    value_base = value_pointer + batch * value_b + head * value_h
    grad_base = grad_pointer + batch * grad_b + head * grad_h
    own = item.to(tl.int64) * length
    residual_base = residual_pointer + own * HEAD_DIM
    negative_h_base = negative_h_pointer + own * HEAD_DIM
    seen = seen_keys(mask_pointer + batch * length, rows, length, HAS_MASK)
    key_base = key_pointer + batch * key_b + head * key_h
    key = load_rows(key_base, key_n, rows, columns, length, HEAD_DIM, BLOCK_D)
    h = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    for start in range(0, length, BLOCK_M):
        query_rows = start + tl.arange(0, BLOCK_M)
        query = load_rows(query_base, query_n, query_rows, columns, length, HEAD_DIM, BLOCK_D)
        grad = load_rows(grad_base, grad_n, query_rows, columns, length, HEAD_DIM, BLOCK_D)
        lse = tl.load(lse_pointer + own + query_rows, mask=query_rows < length, other=float("inf"))
        scores = hide_transposed(product(key, tl.trans(query)) * scale, query_rows, rows, seen, False)
        h = add_product(rounded(tl.exp2(scores - lse[None, :]), grad.dtype), grad, h)
    value = load_rows(value_base, value_n, rows, columns, length, HEAD_DIM, BLOCK_D)
    residual = load_rows(residual_base, HEAD_DIM, rows, columns, length, HEAD_DIM, BLOCK_D)
    own_grad = load_rows(grad_base, grad_n, rows, columns, length, HEAD_DIM, BLOCK_D)
    own_out = load_rows(out_pointer + batch * out_b + head * out_h, out_n, rows, columns, length, HEAD_DIM, BLOCK_D)
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
    dq_base = dq_pointer + batch * dq_b + head * dq_h
    for start in range(0, length, BLOCK_M):
        query_rows = start + tl.arange(0, BLOCK_M)
        query = load_rows(query_base, query_n, query_rows, columns, length, HEAD_DIM, BLOCK_D)
        grad = load_rows(grad_base, grad_n, query_rows, columns, length, HEAD_DIM, BLOCK_D)
        negative_h = load_rows(negative_h_base, HEAD_DIM, query_rows, columns, length, HEAD_DIM, BLOCK_D)
        lse = tl.load(lse_pointer + own + query_rows, mask=query_rows < length, other=float("inf"))
        delta = tl.load(delta_pointer + own + query_rows, mask=query_rows < length, other=0.0)
        scores = hide_transposed(product(key, tl.trans(query)) * scale, query_rows, rows, seen, False)
        weights = tl.exp2(scores - lse[None, :])
        d_weights = add_product(value, tl.trans(negative_h), product(residual, tl.trans(grad)))
        d_scores = rounded(weights * (d_weights - delta[None, :]), key.dtype)
        minus_smoothed_h = add_product(rounded(weights, key.dtype), negative_h, minus_smoothed_h)
        dk = add_product(d_scores, query, dk)
        dq = product(tl.trans(d_scores), key) * softmax_scale
        store_rows(dq_base, dq_n, query_rows, columns, dq, length, HEAD_DIM, BLOCK_D)
    # Read again rather than held in registers through the loop.
    final_negative_h = load_rows(negative_h_base, HEAD_DIM, rows, columns, length, HEAD_DIM, BLOCK_D)
    dv = minus_smoothed_h - 2.0 * final_negative_h.to(tl.float32)
    dk_base = dk_pointer + batch * dk_b + head * dk_h
    store_rows(dk_base, dk_n, rows, columns, dk * softmax_scale, length, HEAD_DIM, BLOCK_D)
    dv_base = dv_pointer + batch * dv_b + head * dv_h
    store_rows(dv_base, dv_n, rows, columns, dv, length, HEAD_DIM, BLOCK_D)
