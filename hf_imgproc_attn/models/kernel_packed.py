"""What a cache keeps for a key: its content, and beside it what the position kernel compares."""

from __future__ import annotations

import torch

from .kernel_content import decode_positions, encode_positions
from .spec_axes import COORDINATE_KERNELS


def pack_key(key: torch.Tensor, position_key: torch.Tensor | None, coordinates: torch.Tensor | None) -> torch.Tensor:
    """What a cache stores for a key: its content, and what the position kernel compares.

    Args:
        key: ``[batch, heads, length, head_dim]``.
        position_key: ``[batch or 1, heads, length, head_dim]`` of ``untied``, or None.
        coordinates: ``[batch or 1, length, dims]`` of ``gaussian``, ``alibi`` and ``relative_buckets``, integers, or
            None.

    Returns:
        ``[batch, heads, length, width]``; :func:`unpack_key` is the inverse.
    """
    parts = [key]
    if position_key is not None:
        is_shared = position_key.shape[0] != key.shape[0]
        parts.append(position_key.expand(key.shape[0], -1, -1, -1) if is_shared else position_key)
    if coordinates is not None:
        columns = encode_positions(coordinates, key.dtype).unsqueeze(1)
        parts.append(columns.expand(key.shape[0], key.shape[1], -1, -1))
    return torch.cat(parts, dim=-1)


def unpack_key(
    packed: torch.Tensor, kernel: str, head_dim: int
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Content, position vectors and coordinates of all cached keys."""
    key, rest = packed[..., :head_dim], packed[..., head_dim:]
    if kernel == "untied":
        return key, rest, None
    if kernel in COORDINATE_KERNELS and rest.shape[-1]:
        # Constants, although they lie beside what has a gradient.
        return key, None, decode_positions(rest[:, 0].detach())
    return key, None, None
