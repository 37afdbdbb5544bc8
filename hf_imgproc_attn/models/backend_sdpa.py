"""The fast back-end: one ``scaled_dot_product_attention`` a booster pass, on augmented queries and keys.

Content and position kernels that are inner products become columns beside q and k; where columns are not precise
enough, dense position logits go in as an additive mask. ``backend_reference`` is its truth.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from .boost_operators import BOOSTING, Extend, keep_rows
from .kernel_content import CONTENT_COLUMNS, inside, working_dtype
from .kernel_position import Positions, position_columns, position_form, position_logits
from .visibility import additive_mask, visible


class Augmented(NamedTuple):
    """A filter as inner products: logits_ij = scale <query_i, key_j> + bias_ij.

    query: ``[batch, heads, length, width]``.
    key: ``[batch, heads, key_length, width]``.
    scale: a number.
    bias: ``[batch or 1, heads or 1, length, key_length]``, or None.
    """

    query: torch.Tensor
    key: torch.Tensor
    scale: float
    bias: torch.Tensor | None


def augment(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    content_kernel: str,
    content_scale: torch.Tensor | float,
    positions: Positions | None,
    form_dtype: torch.dtype | None = None,
) -> Augmented:
    """Write content and position kernel as columns beside queries and keys, or as a bias where columns lose digits.

    Args:
        query: ``[batch, heads, length, head_dim]``.
        key: ``[batch, heads, key_length, head_dim]``.
        content_kernel: key of ``CONTENT_COLUMNS``.
        content_scale: 2/h_y^2, a number or ``[heads, 1, 1]``.
        positions: what the position kernel compares, or None.
        form_dtype: the precision whose choice between columns and bias is taken. None: the query's.
    """
    dtype = query.dtype
    columns, bias = [], None
    content_columns = CONTENT_COLUMNS[content_kernel]
    if content_columns is not None:
        columns.append(content_columns(query, key, content_scale))
    if positions is not None:
        if position_form(positions, form_dtype or dtype) == "features":
            columns += position_columns(positions, dtype)
        else:
            bias = position_logits(positions, dtype)
    scale = 1.0
    if not columns and not isinstance(content_scale, torch.Tensor):
        scale = content_scale
    else:  # the columns carry their own factors, so the content's goes into the query
        scaled = query * content_scale
        query = (scaled if dtype != torch.float16 else inside(scaled, dtype)).to(dtype)
    left, right = [left for left, _ in columns], [right for _, right in columns]
    return Augmented(beside(query, left), beside(key, right), scale, bias)


def sdpa_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    full_value: torch.Tensor,
    *,
    content_kernel: str,
    content_scale: torch.Tensor | float,
    positions: Positions | None,
    attention_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    boosting: str = "none",
    boosting_steps: int = 2,
    boosting_gain: torch.Tensor | None = None,
    dropout: float = 0.0,
    extend: Extend = keep_rows,
) -> torch.Tensor:
    """Apply the filter without forming A.

    Args:
        query: ``[batch, heads, length, head_dim]``.
        key: ``[batch, heads, key_length, head_dim]``.
        value: ``[batch, heads, length, d]``, rows of the new tokens.
        full_value: ``[batch, heads, key_length, d]``.
        content_kernel: key of ``CONTENT_COLUMNS``.
        content_scale: 2/h_y^2, a number or ``[heads, 1, 1]``.
        positions: what the position kernel compares, or None.
        attention_mask: boolean or additive float, broadcastable to ``[batch, heads, length, key_length]``, or None.
        is_causal: causal without a cache and without a mask.
        boosting: key of ``BOOSTING``.
        boosting_steps: k >= 1.
        boosting_gain: gamma of ``learned``, ``[heads, 1, 1]`` in at least float32, or None.
        dropout: probability on A; only without boosting, whose passes would each draw their own mask.
        extend: stores residual streams in a cache.

    Returns:
        ``[batch, heads, length, d]`` in the value's dtype.
    """
    device_type = query.device.type
    if torch.is_autocast_enabled(device_type) and query.dtype != torch.float64:
        # Autocast runs SDPA in its own dtype whatever comes in: columns must be made for that dtype.
        dtype = torch.get_autocast_dtype(device_type)
        query, key, value, full_value = (tensor.to(dtype) for tensor in (query, key, value, full_value))
    dtype = query.dtype
    query, key, scale, bias = augment(
        query, key, content_kernel=content_kernel, content_scale=content_scale, positions=positions
    )
    allowed, additive = visible(attention_mask, False, query.shape[-2], key.shape[-2], query.device)
    if additive is not None:
        bias = additive if bias is None else bias + additive
    mask, sees = allowed, None
    if bias is not None:
        allowed, _ = visible(allowed, is_causal, query.shape[-2], key.shape[-2], query.device)
        (mask, sees), is_causal = additive_mask(bias.to(working_dtype(dtype)), allowed, dtype), False

    def attend(stream: torch.Tensor) -> torch.Tensor:
        out = _sdpa(query, key, stream.to(dtype), mask, is_causal, scale, dropout)
        return out if sees is None else out * sees

    return BOOSTING[boosting](attend, extend, value, full_value, boosting_steps, boosting_gain)


def beside(x: torch.Tensor, columns: Sequence[torch.Tensor]) -> torch.Tensor:
    """Append columns, and zeros up to a multiple of 8, the width that fused kernels want.

    Args:
        x: ``[batch, heads, length, width]``.
        columns: each ``[batch or 1, heads or 1, length, c]``; without any, x is returned as it is.
    """
    if not columns:
        return x
    parts = [x, *(column.to(x.dtype).expand(x.shape[0], x.shape[1], -1, -1) for column in columns)]
    missing = -sum(part.shape[-1] for part in parts) % 8
    if missing:
        parts.append(x.new_zeros(()).expand(*x.shape[:-1], missing))
    return torch.cat(parts, dim=-1)


def _sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    is_causal: bool,
    scale: float,
    dropout: float,
) -> torch.Tensor:
    """SDPA with V padded to the width of Q: fused kernels want equal widths; padding costs less."""
    width = value.shape[-1]
    missing = query.shape[-1] - width
    out = nn.functional.scaled_dot_product_attention(
        query,
        key,
        nn.functional.pad(value, (0, missing)) if missing else value,  # padding by nothing would copy
        attn_mask=attention_mask,
        dropout_p=dropout,
        is_causal=is_causal,
        scale=scale,
    )
    return out[..., :width]
