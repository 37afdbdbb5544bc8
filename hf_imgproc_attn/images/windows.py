"""Pixels and their surroundings: the patch that is a pixel's content, and the window in which it looks for keys."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

Image = NDArray[np.floating[Any]]
"""Grey values ``[height, width]``, or colours ``[height, width, 3]``."""

MAX_PATCH_SIZE = 31


class Patches:
    """The content of every pixel: the patch around it, mirrored at the border.

    Args:
        image: ``[height, width]`` or ``[height, width, 3]``.
        patch_size: odd side of a patch.

    Raises:
        ValueError: for a size that does not go.
    """

    def __init__(self, image: Image, patch_size: int) -> None:
        height, width = image.shape[:2]
        if not is_int(patch_size) or patch_size < 1 or patch_size % 2 == 0:
            raise ValueError(f"patch_size must be an odd integer >= 1, got {patch_size!r}")
        if patch_size > min(MAX_PATCH_SIZE, height, width):
            raise ValueError(
                f"patch_size must be at most {MAX_PATCH_SIZE} and fit into the image of {height} x {width} pixels, "
                f"got {patch_size}"
            )
        self.size, radius = int(patch_size), int(patch_size) // 2
        channels = torch.from_numpy(image).view(height, width, -1).permute(2, 0, 1)
        self.mirrored = nn.functional.pad(channels[None], (radius,) * 4, mode="reflect")[0]
        offsets = torch.arange(-radius, radius + 1, dtype=torch.float64)
        profile = torch.exp(-offsets.square() / (2 * (max(radius, 1) / 2) ** 2))
        self._profile = (profile / profile.sum()).to(self.mirrored.dtype)

    def square_distances(self, query: tuple[slice, slice], key: tuple[slice, slice]) -> torch.Tensor:
        """Weighted mean square differences of the patches around two rectangles of pixels, ``[height, width]``."""
        margin = self.size - 1
        first, second = (
            self.mirrored[:, rows.start : rows.stop + margin, columns.start : columns.stop + margin]
            for rows, columns in (query, key)
        )
        squares = (first - second).square().mean(0)
        if self.size == 1:
            return squares
        # The Gaussian over a patch is one over its rows times one over its columns.
        columns_done = nn.functional.conv2d(squares[None, None], self._profile.view(1, 1, 1, -1))
        return nn.functional.conv2d(columns_done, self._profile.view(1, 1, -1, 1))[0, 0]


def overlap(offset: tuple[int, int], size: tuple[int, int]) -> tuple[slice, slice]:
    """Rows and columns of the pixels whose key at an offset lies inside the image."""
    rows, columns = (slice(max(-step, 0), end - max(step, 0)) for step, end in zip(offset, size, strict=True))
    return rows, columns


def in_windows(channels_last: torch.Tensor, side: int, start: int, stop: int) -> torch.Tensor:
    """What each pixel of the rows ``start`` to ``stop`` sees: ``[pixels, 1, side², channels]``, 0 outside."""
    height, width, channels = channels_last.shape
    radius = side // 2
    above, below = max(start - radius, 0), min(stop + radius, height)
    missing = (0, 0, radius, radius, radius - (start - above), radius - (below - stop))
    strip = torch.nn.functional.pad(channels_last[above:below], missing)
    seen = strip.unfold(0, side, 1).unfold(1, side, 1)
    return seen.permute(0, 1, 3, 4, 2).reshape((stop - start) * width, 1, side**2, channels)


def is_int(value: Any) -> bool:
    """Whether a value is an integer of Python or of NumPy, and no boolean."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)
