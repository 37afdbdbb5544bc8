"""Any linear booster as a composition of ``filter_once``: what the specialised kernels of ``fused`` do not serve.

Feature columns, values of another width, fewer queries than keys, dropout, several steps, gains, and streams that are
given and returned. The steps are those of ``boost_operators``, as in every other back-end.
"""

from __future__ import annotations

import torch

from ..models.backend_call import Content, FilterCall
from ..models.backend_sdpa import augment
from ..models.kernel_position import (
    features_or_bias,
    is_by_place,
    keys_of_positions,
    position_columns,
    rows_of_positions,
)

MAX_WIDTH = 256
"""Of queries with their feature columns, and of values."""


def refuses(call: FilterCall) -> str | None:
    """Why the kernels cannot serve a call, whatever its device and dtype, or None."""
    if call.own_softmax is not None:
        return call.own_softmax
    if call.in_order is not None:
        return call.in_order
    _, rest = call.split_positions()
    for term in rest.positions:
        if is_by_place(term) or features_or_bias(term, call.query.dtype) != "features":
            return (
                "takes positions as feature columns, or one term by place (gaussian, alibi, relative_buckets), "
                f"got {type(term).__name__}"
            )
    seen = call.visibility
    if seen.mask is not None or seen.bias is not None or (seen.keys is not None and seen.keys.shape[1] > 1):
        return "takes masks of padded keys, the same for all heads, only"
    wide = call.query.shape[-1] + _columns(rest)
    if max(wide, call.value.shape[-1]) > MAX_WIDTH:
        return (
            f"needs widths <= {MAX_WIDTH}, columns included, got {wide} of queries, {call.value.shape[-1]} of values"
        )
    return None


def _columns(call: FilterCall) -> int:
    """How many feature columns queries and keys get: found on one query and one key."""
    first = [keys_of_positions(rows_of_positions(term, slice(0, 1)), 1) for term in call.positions]
    found = [left.shape[-1] for term in first for left, _ in position_columns(term, call.query.dtype)]
    return -(-(call.query.shape[-1] + sum(found)) // 8) * 8 - call.query.shape[-1] if found else 0


def key_bias(call: FilterCall) -> torch.Tensor | None:
    """What a content kernel adds to all logits of a key, float32 ``[batch, heads, key_length]``, or None.

    That of ``gaussian`` is -|q - k|^2 / h^2, but for what a whole row shares.
    """
    if call.content.kernel != "gaussian":
        return None
    scale = call.content.scale
    factor = scale.float().squeeze(-1) if isinstance(scale, torch.Tensor) else scale
    squares = call.visibility.clean_keys(call.key).float().square().sum(-1)
    return squares.repeat_interleave(call.groups, dim=1) * -0.5 * factor


def key_mask(call: FilterCall) -> torch.Tensor | None:
    """Which keys are visible, ``[batch, key_length]``, or None where all are."""
    keys = call.visibility.keys
    return None if keys is None else keys[:, 0, 0].expand(call.key.shape[0], -1)


def run(call: FilterCall) -> torch.Tensor:
    """Serve a call that is not refused: ``[batch, heads, length, d]``; stores the booster's streams."""
    from .once import Once, apply_once

    by_place, rest = call.split_positions()
    dtype = call.query.dtype
    # A number for each key keeps the digits that columns in half precision would lose.
    given = augment(rest._replace(content=Content("dot_product", call.content.scale)), dtype)
    once = Once(
        given.query,
        given.key,
        given.scale,
        key_mask=key_mask(call),
        is_causal=call.visibility.hides_later_keys,
        positions=by_place,
        key_bias=key_bias(call),
        dropout=call.dropout,
        seed=_seed(call) if call.dropout > 0.0 else None,
    )
    return call.boost(lambda rows: apply_once(once, rows.to(dtype)), call.new_value, call.value)


def _seed(call: FilterCall) -> torch.Tensor:
    """One mask for all steps and their gradients, by the device's generator: checkpointed layers draw it again."""
    return torch.randint(2**63 - 1, (1,), device=call.query.device)
