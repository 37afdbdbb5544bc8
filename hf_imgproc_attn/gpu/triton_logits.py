"""A tile of the matrix A, made the same way in every kernel: logits, positions added, keys hidden, weights of them.

Forward, a block of queries walks tiles of keys, and tiles are ``[queries, keys]`` (:func:`tile_of_keys`). Backward, a
block of keys walks tiles of queries, whose log-sum-exp is known, and tiles are ``[keys, queries]``
(:func:`weights_of_queries`). Queries are the last ``length`` of ``key_length`` tokens.

What makes weights of logits l, m the largest (at least 0 for SOFTPICK), with one number L_i for each row i that the
backward pass needs, all in units of log 2; b_i is a number that the row is given:

    SOFTMAX    2^(l_ij - L_i),                L_i = m + log2 sum_j 2^(l_ij - m)
    SINK       the same,                      with one more term, 2^(b_i - m), in the sum
    SIGMOID    1 / (1 + 2^(L_i - l_ij)),      L_i = b_i, log2 of the number of keys that the row sees
    SOFTPICK   max(2^(l_ij - L_i) - 2^-L_i, 0),  L_i = m + log2(eps + sum_j |2^(l_ij - m) - 2^-m|)
"""

import triton
import triton.language as tl

from ..models.kernel_normalisation import SOFTPICK_EPSILON
from .triton_positions import add_position
from .triton_tiles import hide, hide_transposed, load_rows, product, seen_keys

SOFTMAX: tl.constexpr = tl.constexpr(0)
SINK: tl.constexpr = tl.constexpr(1)
SIGMOID: tl.constexpr = tl.constexpr(2)
SOFTPICK: tl.constexpr = tl.constexpr(3)
_EPSILON: tl.constexpr = tl.constexpr(SOFTPICK_EPSILON)


@triton.jit
def logits_of(query, key, scale, places, batch, head, query_rows, key_rows, length, POSITION: tl.constexpr):
    """Logits ``[queries, keys]``, nothing hidden."""
    scores = product(query, tl.trans(key)) * scale
    return add_position(scores, places, batch, head, query_rows, key_rows, length, POSITION, False)


@triton.jit
def tile_of_keys(
    query, key_base, key_step, rows_base, rows_step, mask, end, scale, places, batch, head, query_rows, key_rows,
    length, key_length,
    WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr, ROWS_WIDTH: tl.constexpr, BLOCK_ROWS_WIDTH: tl.constexpr,
    POSITION: tl.constexpr, HAS_MASK: tl.constexpr, CAUSAL: tl.constexpr, HIDES: tl.constexpr,
):  # fmt: skip
    """Keys, the rows that A is applied to, and logits ``[queries, keys]``.

    Keys start at ``key_base`` and are ``key_step`` apart, rows likewise. With HIDES the logits are -inf of keys from
    ``end`` on, of those that ``mask`` hides (HAS_MASK), and of those later than a query (CAUSAL).
    """
    columns, rows_columns = tl.arange(0, BLOCK_WIDTH), tl.arange(0, BLOCK_ROWS_WIDTH)
    key = load_rows(key_base, key_step, key_rows, columns, key_length, WIDTH, BLOCK_WIDTH)
    rows = load_rows(rows_base, rows_step, key_rows, rows_columns, key_length, ROWS_WIDTH, BLOCK_ROWS_WIDTH)
    scores = logits_of(query, key, scale, places, batch, head, query_rows, key_rows, length, POSITION)
    if HIDES:
        tokens = query_rows + (key_length - length)
        scores = hide(scores, tokens, key_rows, seen_keys(mask, key_rows, end, HAS_MASK), CAUSAL)
    return key, rows, scores


@triton.jit
def logits_of_queries(
    key, query, scale, places, batch, head, query_rows, key_rows, seen, length, key_length,
    POSITION: tl.constexpr, CAUSAL: tl.constexpr, HIDES: tl.constexpr,
):  # fmt: skip
    """Logits ``[keys, queries]``; with HIDES -inf of keys that are not ``seen``, or later than a query (CAUSAL)."""
    scores = product(key, tl.trans(query)) * scale
    scores = add_position(scores, places, batch, head, query_rows, key_rows, length, POSITION, True)
    if HIDES:
        scores = hide_transposed(scores, query_rows + (key_length - length), key_rows, seen, CAUSAL)
    return scores


@triton.jit
def weights_of_queries(
    key, query, lse, scale, places, batch, head, query_rows, key_rows, seen, length, key_length,
    POSITION: tl.constexpr, CAUSAL: tl.constexpr, HIDES: tl.constexpr,
):  # fmt: skip
    """Weights of softmax ``[keys, queries]``; with HIDES 0 where :func:`logits_of_queries` are -inf."""
    scores = logits_of_queries(
        key, query, scale, places, batch, head, query_rows, key_rows, seen, length, key_length,
        POSITION, CAUSAL, HIDES,
    )  # fmt: skip
    return tl.exp2(scores - lse[None, :])


@triton.jit
def weights_of(scores, lse, NORMALISATION: tl.constexpr):
    """Weights from logits and the rows' L, which is broadcastable to them."""
    if NORMALISATION == SIGMOID:
        return 1.0 / (1.0 + tl.exp2(lse - scores))
    elif NORMALISATION == SOFTPICK:
        return tl.maximum(tl.exp2(scores - lse) - tl.exp2(-lse), 0.0)
    else:
        return tl.exp2(scores - lse)


@triton.jit
def gradient_of_logits(scores, weights, d_weights, lse, delta, NORMALISATION: tl.constexpr):
    """dL/dl from dL/da, where ``delta`` is the row's sum of a dL/da; the largest logit counts as a constant."""
    if NORMALISATION == SIGMOID:
        return weights * (1.0 - weights) * d_weights
    elif NORMALISATION == SOFTPICK:
        through = tl.where(scores > 0.0, d_weights - delta, tl.where(scores < 0.0, delta, 0.0))
        return tl.exp2(scores - lse) * through
    else:
        return weights * (d_weights - delta)


@triton.jit
def load_lse(lse_base, query_rows, length):
    """log2-sum-exp2 of each row of logits; +inf, so that all weights are 0, beyond the length."""
    return tl.load(lse_base + query_rows, mask=query_rows < length, other=float("inf"))


@triton.jit
def start_of_rows(given, NORMALISATION: tl.constexpr):
    """Before any key: the largest logit and the sum, of rows whose number is ``given``."""
    if NORMALISATION == SINK:
        return given, tl.full([given.shape[0]], 1.0, dtype=tl.float32)
    elif NORMALISATION == SIGMOID:
        return given, tl.full([given.shape[0]], 0.0, dtype=tl.float32)
    elif NORMALISATION == SOFTPICK:
        return tl.full([given.shape[0]], 0.0, dtype=tl.float32), tl.full([given.shape[0]], 0.0, dtype=tl.float32)
    else:
        nothing = tl.full([given.shape[0]], float("-inf"), dtype=tl.float32)
        return nothing, tl.full([given.shape[0]], 0.0, dtype=tl.float32)


@triton.jit
def step_of_rows(scores, highest, total, NORMALISATION: tl.constexpr):
    """One tile ``[queries, keys]`` further, as :func:`softmax_step`."""
    if NORMALISATION == SIGMOID:
        return weights_of(scores, highest[:, None], SIGMOID), total * 0.0 + 1.0, total, highest
    elif NORMALISATION == SOFTPICK:
        new_highest = tl.maximum(highest, tl.max(scores, 1))
        above = tl.exp2(scores - new_highest[:, None]) - tl.exp2(-new_highest)[:, None]
        above = tl.where(scores == float("-inf"), 0.0, above)
        shrink = tl.exp2(highest - new_highest)
        return tl.maximum(above, 0.0), shrink, total * shrink + tl.sum(tl.abs(above), 1), new_highest
    else:
        return softmax_step(scores, highest, total)


@triton.jit
def end_of_rows(highest, total, NORMALISATION: tl.constexpr):
    """What to divide by, and L."""
    if NORMALISATION == SIGMOID:
        return total * 0.0 + 1.0, highest
    elif NORMALISATION == SOFTPICK:
        total = total + _EPSILON
        return total, highest + tl.log2(total)
    else:
        return softmax_end(highest, total)


@triton.jit
def softmax_step(scores, highest, total):
    """Online softmax, one tile further.

    Exponentials of the tile ``[queries, keys]``; the factor of earlier ones, the sum of all, the largest logit.
    """
    new_highest = tl.maximum(highest, tl.max(scores, 1))
    # A row that has seen no key yet: -inf - -inf is not a number.
    base = tl.where(new_highest == float("-inf"), 0.0, new_highest)
    exponentials = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(highest - base)
    return exponentials, shrink, total * shrink + tl.sum(exponentials, 1), new_highest


@triton.jit
def softmax_end(highest, total):
    """What to divide by, and the log-sum-exp; 1 and +inf for a row that sees no key, nor a sink above -inf."""
    sees = (total > 0.0) & (highest > float("-inf"))
    total = tl.where(sees, total, 1.0)
    return total, tl.where(sees, highest + tl.log2(total), float("inf"))
