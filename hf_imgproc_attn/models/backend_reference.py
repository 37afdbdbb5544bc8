"""The slow dense truth: one softmax matrix, boosted as written. Serves ``output_attentions`` and exact dropout.

Everything is computed in at least float32 and stays in float64 for float64 inputs. Memory is O(length * key_length).
"""

from __future__ import annotations

import torch
from torch import nn

from .boost_operators import BOOSTING, Extend, keep_rows
from .kernel_content import working_dtype
from .visibility import visible


def filter_matrix(logits: torch.Tensor, attention_mask: torch.Tensor | None, is_causal: bool = False) -> torch.Tensor:
    """A = D^-1 K from log K: the row-stochastic filter, a Nadaraya-Watson estimate (arXiv 2506.10371).

    Args:
        logits: ``[batch, heads, length, key_length]``, at least float32.
        attention_mask: boolean or additive float, broadcastable to the logits, or None.
        is_causal: whether query i sees keys j <= i only (square, no cache).

    Returns:
        A of the logits' shape and dtype; its rows sum to 1, except those that see no key, which are 0.
    """
    allowed, additive = visible(attention_mask, is_causal, logits.shape[-2], logits.shape[-1], logits.device)
    if additive is not None:
        logits = logits + additive.to(logits.dtype)
    if allowed is None:
        return logits.softmax(-1)
    sees_something = allowed.any(-1, keepdim=True)
    logits = logits.masked_fill(~allowed & sees_something, float("-inf"))
    return logits.softmax(-1) * sees_something


def reference_attention(
    logits: torch.Tensor,
    value: torch.Tensor,
    full_value: torch.Tensor,
    *,
    attention_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    boosting: str = "none",
    boosting_steps: int = 2,
    boosting_gain: torch.Tensor | None = None,
    dropout: float = 0.0,
    extend: Extend = keep_rows,
    need_weights: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Apply the boosted filter densely.

    Args:
        logits: log K, ``[batch, heads, length, key_length]`` in at least float32.
        value: ``[batch, heads, length, d]``, rows of the new tokens.
        full_value: ``[batch, heads, key_length, d]``.
        attention_mask: boolean or additive float, broadcastable to the logits, or None.
        is_causal: causal without a cache.
        boosting: key of ``BOOSTING``.
        boosting_steps: k >= 1.
        boosting_gain: gamma of ``learned``, ``[heads, 1, 1]`` in at least float32, or None.
        dropout: probability, applied once to A; every pass of the booster uses the same dropped matrix, as the
            authors' vision code does (their language code drops out 2A - A^2).
        extend: stores residual streams in a cache.
        need_weights: also return the operator that multiplies V; needs all rows of A, so no cached keys.

    Returns:
        The output ``[batch, heads, length, d]`` in the value's dtype, and the operator
        ``[batch, heads, length, key_length]`` in the value's dtype or None.

    Raises:
        ValueError: if the operator of a boosted filter is asked for with cached keys.
    """
    work = working_dtype(value.dtype)
    boost = BOOSTING[boosting]
    # Autocast would run the products in half precision and make the reference no better than what it checks.
    with torch.autocast(logits.device.type, enabled=False):
        matrix = filter_matrix(logits.to(work), attention_mask, is_causal)
        matrix = nn.functional.dropout(matrix, p=dropout, training=dropout > 0.0)

        def attend(stream: torch.Tensor) -> torch.Tensor:
            return torch.matmul(matrix, stream.to(work))

        out = boost(attend, extend, value.to(work), full_value, boosting_steps, boosting_gain).to(value.dtype)
        if not need_weights:
            return out, None
        if boosting == "none":
            return out, matrix.to(value.dtype)
        if matrix.shape[-2] != matrix.shape[-1]:
            raise ValueError(
                "the attention operator of a boosted layer needs every row of A, which a cache does not keep: "
                "use output_attentions=True with use_cache=False"
            )
        identity = torch.eye(matrix.shape[-1], dtype=work, device=matrix.device).expand_as(matrix)
        operator = boost(attend, keep_rows, identity, identity, boosting_steps, boosting_gain)
        return out, operator.to(value.dtype)
