"""A tile of the matrix A, made the same way in every kernel: logits, positions added, keys hidden, softmax.

Forward, a block of queries walks tiles of keys, and tiles are ``[queries, keys]`` (:func:`tile_of_keys`). Backward, a
block of keys walks tiles of queries, whose log-sum-exp is known, and tiles are ``[keys, queries]``
(:func:`weights_of_queries`). Queries are the last ``length`` of ``key_length`` tokens.
"""

import triton
import triton.language as tl

from .triton_positions import add_position
from .triton_tiles import hide, hide_transposed, load_rows, product, seen_keys


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
def weights_of_queries(
    key, query, lse, scale, places, batch, head, query_rows, key_rows, seen, length, key_length,
    POSITION: tl.constexpr, CAUSAL: tl.constexpr, HIDES: tl.constexpr,
):  # fmt: skip
    """Weights ``[keys, queries]``; with HIDES 0 of keys that are not ``seen``, or later than a query (CAUSAL)."""
    scores = product(key, tl.trans(query)) * scale
    scores = add_position(scores, places, batch, head, query_rows, key_rows, length, POSITION, True)
    if HIDES:
        scores = hide_transposed(scores, query_rows + (key_length - length), key_rows, seen, CAUSAL)
    return tl.exp2(scores - lse[None, :])


@triton.jit
def load_lse(lse_base, query_rows, length):
    """log2-sum-exp2 of each row of logits; +inf, so that all weights are 0, beyond the length."""
    return tl.load(lse_base + query_rows, mask=query_rows < length, other=float("inf"))


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
    """What to divide by, and the log-sum-exp; 1 and +inf for a row that sees no key."""
    sees = total > 0.0
    total = tl.where(sees, total, 1.0)
    return total, tl.where(sees, highest + tl.log2(total), float("inf"))
