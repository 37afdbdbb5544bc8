"""Masks: what a query may see, and what is added to its logits, for every back-end alike."""

from __future__ import annotations

import torch


def check_mask_dtype(mask: torch.Tensor) -> None:
    """Refuse a mask of integers: its ones and zeros would be added to the logits.

    Raises:
        ValueError: naming the dtype.
    """
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(f"attention_mask with four axes must be bool or float, got {mask.dtype}")


def new_token_mask(
    attention_mask: torch.Tensor | None,
    length: int,
    device: torch.device,
    position_ids: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Which of the new tokens are no padding, from the mask that a model was called with.

    Args:
        attention_mask: ``[batch, key_length]`` (0 or False = padding), one with four axes, or None.
        length: number of new tokens, the last ones.
        device: where to build the answer if there is no mask.
        position_ids: what the model was called with, ``[batch or 1, length]``. Without a mask Transformers takes
            positions that jump for several texts in one row, and hides them from each other.

    Returns:
        Boolean ``[batch or 1, length]``, or None for a mask with four axes and for several texts in one row, where
        only the mask itself says what is seen.
    """
    if attention_mask is None:
        # Transformers looks at them in the same way, so that an accelerator is waited for anyway.
        if position_ids is not None and (
            torch.compiler.is_compiling() or bool((position_ids.diff(dim=-1) != 1).any())
        ):
            return None
        return torch.ones(1, length, dtype=torch.bool, device=device)
    return attention_mask[:, -length:] != 0 if attention_mask.ndim == 2 else None


def visible(
    attention_mask: torch.Tensor | None, is_causal: bool, length: int, key_length: int, device: torch.device
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Split a mask into what may be seen and what is added to the logits.

    Args:
        attention_mask: boolean (True = visible) or additive float, broadcastable to
            ``[batch, heads, length, key_length]``, or None. Additive values near the smallest number of their dtype
            mean "not visible": adding them to a large negative logit would not hide it in every precision.
        is_causal: whether query i sees keys j <= i only (square, no cache).
        length: number of queries.
        key_length: number of keys.
        device: where to build a causal mask.

    Returns:
        The boolean mask or None, the additive part or None.

    Raises:
        ValueError: for a mask of integers.
    """
    allowed, additive = None, None
    if attention_mask is not None:
        check_mask_dtype(attention_mask)
        if attention_mask.dtype == torch.bool:
            allowed = attention_mask
        else:
            allowed = attention_mask > torch.finfo(attention_mask.dtype).min / 2
            additive = attention_mask.masked_fill(~allowed, 0.0)
    if is_causal:
        causal = torch.ones(length, key_length, dtype=torch.bool, device=device).tril()
        allowed = causal if allowed is None else allowed & causal
    return allowed, additive


def additive_mask(
    bias: torch.Tensor, allowed: torch.Tensor | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One additive mask from logits and what may be seen.

    Each row is shifted so that its largest visible value is 0 (the softmax does not notice), which keeps the digits
    where the weights are and far keys inside the range of float16.

    Args:
        bias: ``[batch or 1, heads or 1, length, key_length]`` in at least float32.
        allowed: boolean, broadcastable with it, or None.
        dtype: of the mask.

    Returns:
        The mask, and which rows see anything (``[..., length, 1]``) or None for all: the mask of the others is 0, so
        that no kernel makes NaN of them, and their output has to be set to 0.
    """
    smallest = torch.finfo(dtype).min
    if allowed is None:
        return (bias - bias.amax(-1, keepdim=True).detach()).clamp(min=smallest).to(dtype), None
    sees = allowed.any(-1, keepdim=True)
    hidden = ~allowed & sees
    bias = torch.where(hidden, float("-inf"), bias)
    bias = bias - bias.amax(-1, keepdim=True).detach()
    return torch.where(hidden, float("-inf"), bias.clamp(min=smallest)).to(dtype), sees
