"""The ``rotary`` position kernel: queries and keys are rotated by their position (Su 2021, arXiv 2104.09864).

The product of two rotated vectors depends on positions only through their difference, and norms do not change. So the
dot-product and the Gaussian content kernel both compare relative positions. Rotation changes the content logits and
adds nothing to them: it is no position kernel in the sense of a bilateral filter, and is kept for comparison.
"""

from __future__ import annotations

import torch

from .kernel_content import working_dtype


def rotate(states: torch.Tensor, coordinates: torch.Tensor, base: float, num_class_tokens: int = 0) -> torch.Tensor:
    """Rotate pairs of features by position times frequency, ``base`` to the power -2k / width for pair k.

    With two axes the first half of the features rotates by row, the second by column (axial), with the frequencies of
    that half's width each. Within an axis feature k is paired with feature k + width / 2, as in Transformers; the
    paper pairs neighbours, which is the same up to the order of the features. *Choice*: class tokens are not rotated,
    which is position 0 of every axis.

    Args:
        states: queries or keys, ``[batch, heads, length, head_dim]``; head_dim is a multiple of 2 * axes.
        coordinates: ``[batch or 1, length, axes]`` in index or patch units.
        base: > 1.
        num_class_tokens: leading tokens that have no place, whatever their coordinates.

    Returns:
        ``[batch, heads, length, head_dim]`` in the dtype of ``states``.
    """
    dtype, axes = working_dtype(states.dtype), coordinates.shape[-1]
    width = states.shape[-1] // axes
    # In float32 the angles of far positions would lose digits. There are few of them, so float64 costs little.
    angle_dtype = dtype if states.device.type == "mps" else torch.float64
    exponents = torch.arange(0, width, 2, dtype=angle_dtype, device=states.device) / -width
    angles = coordinates.to(angle_dtype).unsqueeze(-1) * base**exponents
    if num_class_tokens:
        is_class = torch.arange(angles.shape[1], device=angles.device) < num_class_tokens
        angles = angles.masked_fill(is_class.view(1, -1, 1, 1), 0.0)
    cosine, sine = angles.cos().to(dtype).unsqueeze(1), angles.sin().to(dtype).unsqueeze(1)
    first, second = states.to(dtype).unflatten(-1, (axes, 2, width // 2)).unbind(-2)
    rotated = torch.stack((first * cosine - second * sine, second * cosine + first * sine), dim=-2)
    return rotated.flatten(-3).to(states.dtype)
