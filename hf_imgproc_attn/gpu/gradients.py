"""Room for the gradients that the Triton operators return, and for what heads that share a key add up."""

from __future__ import annotations

from typing import Any

import torch


def refuse_second(ctx: Any, *grads: torch.Tensor) -> None:
    """The gradient of a gradient, which no kernel computes.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError(
        "the Triton kernels have first derivatives alone: for derivatives of derivatives choose another back-end, "
        "such as 'blocked'"
    )


Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def empty_gradients(
    query: torch.Tensor,
    key: torch.Tensor,
    rows: torch.Tensor,
    key_bias: torch.Tensor | None,
    parameters: torch.Tensor | None,
    learns: bool,
) -> Gradients:
    """Each as its tensor lies in memory; float32, and empty where there is none, of the key bias and the parameters.

    Args:
        query: ``[batch, heads, length, width]``.
        key: ``[batch, key_heads, key_length, width]``.
        rows: what A is applied to, likewise.
        key_bias: a number for each key, or None.
        parameters: of a position kernel, or None.
        learns: whether the parameters want a gradient.
    """
    shapes = (
        (0,) if key_bias is None else key_bias.shape,
        parameters.shape if parameters is not None and learns else (0,),
    )
    d_key_bias, d_parameters = (torch.empty(shape, dtype=torch.float32, device=query.device) for shape in shapes)
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(rows), d_key_bias, d_parameters


def for_every_head(total: torch.Tensor, heads: int) -> torch.Tensor:
    """The gradient itself, or room for one of each query head, in float32, where heads share what it is of."""
    batch, own, length, width = total.shape
    if own == heads:
        return total
    return torch.empty(batch, heads, length, width, dtype=torch.float32, device=total.device)


def add_heads(total: torch.Tensor, of_heads: torch.Tensor) -> None:
    """Fill a gradient with the sums of what :func:`for_every_head` gave room for."""
    if total is not of_heads:
        total.copy_(of_heads.unflatten(1, (total.shape[1], -1)).sum(2))
