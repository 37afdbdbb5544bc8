"""What attention in the form of ``scaled_dot_product_attention`` accepts: one set of checks for every back-end."""

from __future__ import annotations

import torch

from .boost_operators import BOOSTING
from .visibility import check_mask_dtype


def check_tensors(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    """Check that queries, keys and values fit each other.

    Raises:
        ValueError: unless they are ``[batch, heads, length, head_dim]``, ``[batch, key_heads, key_length, head_dim]``
            and ``[batch, key_heads, key_length, d]`` of one floating dtype and device, with ``key_heads`` a divisor of
            ``heads``.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.ndim != 4:
            raise ValueError(f"{name} must be [batch, heads, length, head_dim], got shape {tuple(tensor.shape)}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be of a floating dtype, got {tensor.dtype}")
        if (tensor.dtype, tensor.device) != (query.dtype, query.device):
            raise ValueError(
                f"{name} must have the dtype and device of query, {query.dtype} on {query.device}, "
                f"got {tensor.dtype} on {tensor.device}"
            )
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if key.shape[0] != query.shape[0] or key.shape[:3] != value.shape[:3] or key.shape[3] != query.shape[3]:
        raise ValueError(
            "query, key and value must share the batch, key and value their heads and length, query and key their "
            f"width, got {shapes}"
        )
    if key.shape[2] == 0 or query.shape[1] % max(key.shape[1], 1) or key.shape[1] == 0:
        raise ValueError(f"heads of query must be a multiple of those of key, and key must not be empty, got {shapes}")


def check_logit_term(name: str, term: torch.Tensor, shape: tuple[int, int, int, int]) -> torch.Tensor:
    """Check a mask or a bias of the logits, and give it four axes.

    Args:
        name: of the argument.
        term: at most four axes, each 1 or as in ``shape``, aligned at the last one.
        shape: ``(batch, heads, length, key_length)``.

    Returns:
        ``[batch or 1, heads or 1, length or 1, key_length or 1]``, a view.

    Raises:
        ValueError: naming the argument and its shape.
    """
    full = (1,) * (4 - term.ndim) + tuple(term.shape)
    if len(full) != 4 or any(size not in (1, wanted) for size, wanted in zip(full, shape, strict=True)):
        raise ValueError(f"{name} must be broadcastable to {shape}, got shape {tuple(term.shape)}")
    return term.view(full)


def check_terms(
    query: torch.Tensor, key: torch.Tensor, attn_mask: torch.Tensor | None, bias: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Check mask and bias; see :func:`check_logit_term`.

    Raises:
        ValueError: for a mask of integers, a bias that is not of a floating dtype, or a wrong shape.
    """
    shape = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    if attn_mask is not None:
        check_mask_dtype(attn_mask)
        attn_mask = check_logit_term("attn_mask", attn_mask, shape)
    if bias is not None:
        if not bias.is_floating_point():
            raise ValueError(f"position bias must be of a floating dtype, got {bias.dtype}")
        bias = check_logit_term("position bias", bias, shape)
    return attn_mask, bias


def check_options(boosting: str, steps: int, dropout_p: float) -> None:
    """Check what is not a tensor.

    Raises:
        ValueError: naming the option, its rule and the value.
    """
    if boosting not in BOOSTING:
        raise ValueError(f"boosting must be one of {', '.join(BOOSTING)}, got {boosting!r}")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"boosting_steps must be an integer >= 1, got {steps!r}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p!r}")
