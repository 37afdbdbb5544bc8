"""The ``rotary`` position kernel: queries and keys are turned by their position (Su 2021, arXiv 2104.09864).

The product of two turned vectors depends on positions through their difference alone, and the norms stay, so that the
dot-product and the Gaussian content kernel both see relative positions. It multiplies the content logits instead of
adding to them: it is no kernel of its own and is kept for comparison.
"""

from __future__ import annotations

import torch

from .kernel_content import working_dtype


def rotate(states: torch.Tensor, coordinates: torch.Tensor, base: float, num_class_tokens: int = 0) -> torch.Tensor:
    """Turn pairs of features by position times frequency, ``base`` to the power -2k / width for pair k.

    With two axes the first half of the features turns by row, the second by column (axial), with the frequencies of
    that half's width each. Within an axis feature k is paired with feature k + width / 2, as in Transformers; the
    paper pairs neighbours, which is the same up to the order of the features. *Choice*: class tokens are not turned,
    which is position 0 of every axis.

    Args:
        states: queries or keys, ``[batch, heads, length, head_dim]``; head_dim is a multiple of 2 * axes.
        coordinates: ``[batch or 1, length, axes]`` in index or patch units.
        base: > 1.
        num_class_tokens: leading tokens that have no place, whatever their coordinates.

    Returns:
        ``[batch, heads, length, head_dim]`` in the dtype of ``states``.
    """
    work, axes = working_dtype(states.dtype), coordinates.shape[-1]
    width = states.shape[-1] // axes
    # Angles of far positions lose their digits in float32; they are few numbers.
    precise = work if states.device.type == "mps" else torch.float64
    exponents = torch.arange(0, width, 2, dtype=precise, device=states.device) / -width
    angles = coordinates.to(precise).unsqueeze(-1) * base**exponents
    if num_class_tokens:
        is_class = torch.arange(angles.shape[1], device=angles.device) < num_class_tokens
        angles = angles.masked_fill(is_class.view(1, -1, 1, 1), 0.0)
    cosine, sine = angles.cos().to(work).unsqueeze(1), angles.sin().to(work).unsqueeze(1)
    first, second = states.to(work).unflatten(-1, (axes, 2, width // 2)).unbind(-2)
    turned = torch.stack((first * cosine - second * sine, second * cosine + first * sine), dim=-2)
    return turned.flatten(-3).to(states.dtype)
