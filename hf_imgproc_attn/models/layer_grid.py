"""The grid of patches that an image is cut into: its size, position tables on it, masks of patches.

Height and width are kept apart everywhere. The stock ViT assumes that images, patches and its table's grid are square.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


def sides(size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width of an ``image_size`` or ``patch_size``, which is one number where they are equal."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def grid_size(config: Any, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of patches in an image of ``height`` x ``width`` pixels.

    Raises:
        ValueError: for an image that is smaller than one patch.
    """
    patch_height, patch_width = sides(config.patch_size)
    if height < patch_height or width < patch_width:
        raise ValueError(
            f"images must have at least one patch of {patch_height} x {patch_width} pixels, got {height} x {width}"
        )
    return height // patch_height, width // patch_width


def trained_grid(config: Any) -> tuple[int, int]:
    """Rows and columns of patches in an image of the configured size."""
    return grid_size(config, *sides(config.image_size))


def resize_table(table: torch.Tensor, trained: tuple[int, int], wanted: tuple[int, int]) -> torch.Tensor:
    """Position vectors ``[1, patches, hidden_size]``, row by row, brought to another grid by bicubic interpolation."""
    grid = table.unflatten(1, trained).permute(0, 3, 1, 2)
    grid = nn.functional.interpolate(grid, size=wanted, mode="bicubic", align_corners=False)
    return grid.permute(0, 2, 3, 1).flatten(1, 2)


def check_images(pixel_values: torch.Tensor | None) -> torch.Tensor:
    """The images of a call, ``[batch, channels, height, width]``.

    Raises:
        ValueError: where there are none, or with another number of axes.
    """
    if pixel_values is None or pixel_values.ndim != 4:
        got = None if pixel_values is None else tuple(pixel_values.shape)
        raise ValueError(f"pixel_values must be images [batch, channels, height, width], got {got}")
    return pixel_values


def check_patch_mask(config: Any, pixel_values: torch.Tensor, bool_masked_pos: torch.Tensor) -> None:
    """Refuse a mask of patches for which masked image modelling has no loss.

    Args:
        config: of the model.
        pixel_values: ``[batch, channels, height, width]``.
        bool_masked_pos: to be ``[batch, patches]``.

    Raises:
        ValueError: naming the field or the argument, what it must be and what it is.
    """
    stride = config.encoder_stride
    if sides(config.patch_size) != (stride, stride):
        raise ValueError(
            "patch_size must be encoder_stride in height and width for a reconstruction as large as the image, which "
            f"bool_masked_pos needs, got patch_size={config.patch_size!r} and encoder_stride={stride}"
        )
    rows, columns = grid_size(config, *pixel_values.shape[-2:])
    expected = (pixel_values.shape[0], rows * columns)
    if tuple(bool_masked_pos.shape) != expected:
        raise ValueError(
            f"bool_masked_pos must have one value for each of {rows} x {columns} patches, shape {expected}, got "
            f"{tuple(bool_masked_pos.shape)}"
        )


def masked_patch_loss(
    pixel_values: torch.Tensor, reconstruction: torch.Tensor, bool_masked_pos: torch.Tensor, grid: tuple[int, int]
) -> torch.Tensor:
    """Sum over the channels of the mean absolute error in the masked patches.

    Args:
        pixel_values: ``[batch, channels, height, width]``; last rows and columns that no patch covers do not count.
        reconstruction: ``[batch, channels, rows * stride, columns * stride]``.
        bool_masked_pos: ``[batch, rows * columns]``, True where a patch was hidden.
        grid: rows and columns of patches.
    """
    height, width = reconstruction.shape[-2:]
    mask = bool_masked_pos.reshape(-1, 1, *grid)
    mask = mask.repeat_interleave(height // grid[0], 2).repeat_interleave(width // grid[1], 3)
    error = nn.functional.l1_loss(pixel_values[..., :height, :width], reconstruction, reduction="none")
    return (error * mask).sum() / (mask.sum() + 1e-5)
