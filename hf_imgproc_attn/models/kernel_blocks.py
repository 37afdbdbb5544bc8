"""Position kernels as a function of the coordinates of a block's rows and columns, for attention block by block.

Every position kernel here is linear in its few parameters. With t_h the parameters of head h and c_ij what rows and
columns have in common for all heads,

    s_hij = sum_p t_hp B_p(c_ij)            added to the logits of the block
    dL/dt_hp = sum_ij dL/ds_hij B_p(c_ij)   summed over the blocks, samples and rows of the backward pass

| kernel           | c_ij                              | t_h            | B                            |
|------------------|-----------------------------------|----------------|------------------------------|
| Gaussian         | |p_i - p_j|^2                     | 2/h_p^2        | -c / 2                       |
| ALiBi            | |p_i - p_j|                       | the slope m    | -c                           |
| relative buckets | the bucket of each axis of offset | a table        | 1 in its own bucket, else 0  |

c_ij is computed once a block and shared by its heads; nothing of size length x key_length is formed. From dL/dt the
gradient of log h_p follows by the chain rule, which autograd applies outside.

*Digits.* Distances are differences of coordinates, never expanded squares: near keys, which have the weight, have
small logits and lose nothing, at any bandwidth and length. The gradient inherits this: where a weight underflows,
dL/ds is 0, and a row that sees only itself has B = 0, so that a narrow head's gradient goes to 0 without noise. Rows
that do not see themselves (of padding, or by a mask) are compared with their nearest visible key: c_ij minus that of
the nearest changes neither the softmax nor, since dL/ds sums to 0 over a row, the gradient.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

PART_SCORES = 2**15
"""Scores that are worked on at a time where that needs room of its own."""


def row_parts(rows: int, columns: int) -> list[slice]:
    """Some rows of a block at a time, of ``PART_SCORES`` scores or so."""
    step = max(PART_SCORES // max(columns, 1), 1)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


class BlockKernel(Protocol):
    """One position kernel's part in a block; parameters have a leading axis of heads."""

    @property
    def grows_with_distance(self) -> bool:
        """Whether the logits of far keys are so large that :meth:`from_nearest` is needed."""

    @property
    def is_costly(self) -> bool:
        """Whether computing a logit from c_ij costs much more than adding it."""

    def compare(self, rows: torch.Tensor, columns: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """c_ij from coordinates ``[samples or 1, rows, axes]`` and ``[samples or 1, columns, axes]``.

        Returns:
            ``[..., samples or 1, rows, columns]``; of ``dtype``, or integer.
        """

    def clear_(self, pair_values: torch.Tensor) -> None:
        """Set c_ij, any part of what :meth:`compare` returned, to what adds nothing and gets no gradient."""

    def from_nearest(self, pair_values: torch.Tensor, allowed: torch.Tensor | None) -> torch.Tensor:
        """c_ij minus a number per row that keeps the logits of visible keys small; the softmax does not notice.

        May overwrite ``pair_values``.

        Args:
            pair_values: what :meth:`compare` returned.
            allowed: boolean ``[samples or 1, rows or 1, columns or 1]``, or None where everything is visible.
        """

    def add_(self, logits: torch.Tensor, pair_values: torch.Tensor, parameter: torch.Tensor, factor: float) -> None:
        """Add ``factor`` s to the logits ``[samples, heads, rows, columns]``, for the heads of ``parameter``."""

    def gradient(self, d_logits: torch.Tensor, pair_values: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
        """The block's share of the gradient, shaped like ``parameter``; may overwrite ``d_logits``."""


class DistanceKernel(NamedTuple):
    """t_h times the distance, or half its square, negative: ALiBi or Gaussian. The parameter is ``[heads, 1, 1]``.

    squared: whether the square counts.
    """

    squared: bool

    @property
    def grows_with_distance(self) -> bool:
        """Without bound."""
        return True

    @property
    def is_costly(self) -> bool:
        """No: one multiplication."""
        return False

    @property
    def _weight(self) -> float:
        return -0.5 if self.squared else -1.0

    def compare(self, rows: torch.Tensor, columns: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """|p_i - p_j| or its square; see :class:`BlockKernel`."""
        axes = rows.shape[-1]
        total: torch.Tensor | None = None
        for axis in range(axes):
            # In the dtype of the coordinates: a difference of large numbers is small and keeps its digits.
            offset = (rows[..., axis].unsqueeze(-1) - columns[..., axis].unsqueeze(-2)).to(dtype)
            if axes == 1 and not self.squared:
                return offset.abs_()
            total = offset.square_() if total is None else total.addcmul_(offset, offset)
        if total is None:
            raise ValueError("coordinates must have at least one axis, got 0")
        return total if self.squared else total.sqrt_()

    def clear_(self, pair_values: torch.Tensor) -> None:
        """No distance."""
        pair_values.zero_()

    def from_nearest(self, pair_values: torch.Tensor, allowed: torch.Tensor | None) -> torch.Tensor:
        """The nearest visible key at distance 0."""
        samples = pair_values.shape[0] if allowed is None else max(pair_values.shape[0], allowed.shape[0])
        result = pair_values if samples == pair_values.shape[0] else pair_values.repeat(samples, 1, 1)
        for part in row_parts(*pair_values.shape[-2:]):
            shown = result[:, part]
            if allowed is not None:
                shown = shown.masked_fill(~(allowed if allowed.shape[1] == 1 else allowed[:, part]), float("inf"))
            nearest = shown.amin(-1, keepdim=True)
            result[:, part] -= nearest.masked_fill_(nearest == float("inf"), 0.0)
        return result

    def add_(self, logits: torch.Tensor, pair_values: torch.Tensor, parameter: torch.Tensor, factor: float) -> None:
        """One pass over the logits; see :class:`BlockKernel`."""
        logits.addcmul_(pair_values.unsqueeze(1), parameter, value=self._weight * factor)

    def gradient(self, d_logits: torch.Tensor, pair_values: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
        """The sum of products, in the memory of ``d_logits``; see :class:`BlockKernel`."""
        # torch.sum adds by pieces; a product with a matrix would be as fast and lose a digit of a long sum.
        by_head = d_logits.mul_(pair_values.unsqueeze(1)).sum((0, 2, 3))
        return by_head.mul_(self._weight).view(parameter.shape)
