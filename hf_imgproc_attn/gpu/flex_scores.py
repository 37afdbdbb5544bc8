"""What FlexAttention adds to a score, and what it hides: functions of sample, head, and the places of two tokens.

They are compiled into the kernel, so that nothing of length x key_length is formed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..models.kernel_blocks import DistanceKernel
from ..models.kernel_position import BlockedPositions
from .token_numbers import TokenNumbers

Place = Callable[[Any, Any, Any, Any], torch.Tensor]
"""(sample, head, query, key) to a number or a boolean."""


def look_up(x: torch.Tensor, *index: Any) -> torch.Tensor:
    """An entry of a tensor with four axes, some of which may be 1."""
    return x[tuple(at * (size > 1) for at, size in zip(index, x.shape, strict=True))]


def place_score(positions: BlockedPositions) -> Place:
    """A position kernel as FlexAttention computes it: from the places of one query and one key, inside the kernel.

    Args:
        positions: Gaussian, ALiBi or relative buckets; see ``models.kernel_blocks`` for the formulas.
    """
    kernel, (parameter, *class_logits) = positions.block_kernel(), positions.parameters()
    new, everywhere = positions.coordinates, positions.key_coordinates
    slopes = parameter.flatten()
    axes, several, several_keys = new.shape[-1], int(new.shape[0] > 1), int(everywhere.shape[0] > 1)
    count = 0 if positions.class_tokens is None else positions.class_tokens.num_tokens

    def offset(b: Any, i: Any, j: Any, axis: int) -> torch.Tensor:
        return everywhere[b * several_keys, j, axis] - new[b * several, i, axis]

    def distance(b: Any, h: Any, i: Any, j: Any) -> torch.Tensor:
        is_squared = isinstance(kernel, DistanceKernel) and kernel.squared
        if axes == 1 and not is_squared:
            return slopes[h] * -offset(b, i, j, 0).abs()
        total = offset(b, i, j, 0) ** 2
        for axis in range(1, axes):
            total = total + offset(b, i, j, axis) ** 2
        return slopes[h] * (total * -0.5 if is_squared else -total.sqrt())

    def buckets(b: Any, h: Any, i: Any, j: Any) -> torch.Tensor:
        total = parameter[h, 0, bucket_of(offset(b, i, j, 0), kernel)]
        for axis in range(1, axes):
            total = total + parameter[h, axis, bucket_of(offset(b, i, j, axis), kernel)]
        return total

    on_grid = distance if isinstance(kernel, DistanceKernel) else buckets
    if not count:
        return on_grid
    (scalars,) = class_logits

    def with_class_tokens(b: Any, h: Any, i: Any, j: Any) -> torch.Tensor:
        from_class = torch.where(j < count, scalars[h, 2], scalars[h, 1])
        from_grid = torch.where(j < count, scalars[h, 0], on_grid(b, h, i, j))
        return torch.where(i < count, from_class, from_grid)

    return with_class_tokens


def bucket_of(offset: torch.Tensor, kernel: Any) -> torch.Tensor:
    """``kernel_relative.relative_buckets`` of one offset, in comparisons that a kernel can be compiled of."""
    distance = offset.abs() if kernel.bidirectional else (-offset).clamp(min=0)
    behind = len(kernel.boundaries) + 1 if kernel.bidirectional else 0
    bucket = (offset > 0).long() * behind
    for boundary in kernel.boundaries:
        bucket = bucket + (distance >= boundary).long()
    return bucket


def number_score(numbers: TokenNumbers) -> Place:
    """The sum of a query's and a key's number: their difference, if both are large, keeps its digits."""
    queries, keys = numbers.queries, numbers.keys
    if queries is None:
        return lambda b, h, i, j: look_up(keys, b, h, j, 0)
    return lambda b, h, i, j: look_up(queries, b, h, i, 0) + look_up(keys, b, h, j, 0)


def score_of(seen: Place | None, terms: list[Place]) -> Callable[..., torch.Tensor] | None:
    """What FlexAttention does with each score: adds the terms, hides what may not be seen."""
    if seen is None and not terms:
        return None

    def modify(score: torch.Tensor, b: Any, h: Any, i: Any, j: Any) -> torch.Tensor:
        for term in terms:
            score = score + term(b, h, i, j)
        return score if seen is None else torch.where(seen(b, h, i, j), score, float("-inf"))

    return modify
