"""One prediction for each pixel: heads of semantic segmentation on a grid of patches, their loss, and feature maps."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from .layer_grid import grid_size, sides

MOST_DOUBLINGS = 2
"""Logits have at most a quarter of the image's side for large patches, as those of BEiT and SegFormer."""
_LARGEST_GROUPS = 32


def feature_map(tokens: torch.Tensor, grid: tuple[int, int], class_tokens: int) -> torch.Tensor:
    """Tokens ``[batch, class_tokens + patches, channels]`` without the class tokens, ``[batch, channels, *grid]``."""
    return tokens[:, class_tokens:].mT.unflatten(2, grid)


class UpsamplingHead(nn.Sequential):
    """Convolutions between bilinear doublings of the resolution, then a class for each place.

    SETR-PUP (Zheng et al. 2021, section 3.2) differs: it doubles until every pixel has its logits, which takes 157 MB
    for one picture of 512 x 512 pixels and 150 classes; here two doublings are the most, and the loss and
    ``post_process_semantic_segmentation`` interpolate the rest. Groups are normalised in place of batches, so that a
    batch may be small.
    """

    def __init__(self, config: Any) -> None:
        channels, doublings = config.segmentation_channels, int(math.log2(min(sides(config.patch_size))))
        inputs, layers = config.hidden_size, list[nn.Module]()
        for _ in range(max(1, min(MOST_DOUBLINGS, doublings))):
            layers += [
                nn.Conv2d(inputs, channels, kernel_size=3, padding=1, bias=False),
                nn.GroupNorm(math.gcd(_LARGEST_GROUPS, channels), channels),
                nn.GELU(),
            ]
            if doublings:
                layers.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
            inputs = channels
        super().__init__(*layers, nn.Conv2d(inputs, config.num_labels, kernel_size=1))


def segmentation_head(config: Any) -> nn.Module:
    """The head that ``config.segmentation_head`` names: ``[batch, hidden_size, *grid]`` to logits of the classes.

    Raises:
        ValueError: for fewer than two classes, or an ignored label that is one of the classes.
    """
    if config.num_labels < 2:
        raise ValueError(f"num_labels must be at least 2 for semantic segmentation, got {config.num_labels}")
    if 0 <= config.semantic_loss_ignore_index < config.num_labels:
        raise ValueError(
            f"semantic_loss_ignore_index must be none of the classes 0 to {config.num_labels - 1}, which would not be "
            f"learned, got {config.semantic_loss_ignore_index}"
        )
    if config.segmentation_head == "linear":
        return nn.Conv2d(config.hidden_size, config.num_labels, kernel_size=1)
    return UpsamplingHead(config)


def check_whole_patches(config: Any, pixel_values: torch.Tensor) -> tuple[int, int]:
    """Rows and columns of patches; each pixel must lie in one, or it had no prediction.

    Raises:
        ValueError: for an image with pixels that no patch covers.
    """
    height, width = pixel_values.shape[-2:]
    patch_height, patch_width = sides(config.patch_size)
    if height % patch_height or width % patch_width:
        raise ValueError(
            f"height and width of images must be multiples of the patches' {patch_height} x {patch_width} pixels for "
            f"semantic segmentation, got {height} x {width}"
        )
    return grid_size(config, height, width)


def check_masks(config: Any, pixel_values: torch.Tensor, labels: torch.Tensor) -> None:
    """Refuse masks that do not belong to the images.

    Args:
        config: ``num_labels`` and ``semantic_loss_ignore_index``.
        pixel_values: ``[batch, channels, height, width]``.
        labels: to be classes of the pixels, integers ``[batch, height, width]``.

    Raises:
        ValueError: naming what is wrong.
    """
    wanted = (pixel_values.shape[0], *pixel_values.shape[-2:])
    if tuple(labels.shape) != wanted or labels.is_floating_point():
        raise ValueError(
            f"labels must be integers with the images' batch, height and width {wanted}, got {labels.dtype} of shape "
            f"{tuple(labels.shape)}"
        )
    if torch.compiler.is_compiling():
        return
    counted = labels[labels != config.semantic_loss_ignore_index]
    if counted.numel() and not (int(counted.min()) >= 0 and int(counted.max()) < config.num_labels):
        raise ValueError(
            f"labels must be classes 0 to {config.num_labels - 1} or semantic_loss_ignore_index "
            f"{config.semantic_loss_ignore_index}, got {int(counted.min())} to {int(counted.max())}"
        )


def segmentation_loss(logits: torch.Tensor, labels: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """Cross-entropy of the logits, brought to the masks' size, with the pixels' classes: their mean, 0 without any.

    Args:
        logits: ``[batch, classes, rows, columns]``.
        labels: ``[batch, height, width]``.
        ignore_index: the label of pixels that do not count.
    """
    labels = labels.to(logits.device).long()
    logits = nn.functional.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)
    loss = nn.functional.cross_entropy(logits.float(), labels, ignore_index=ignore_index, reduction="sum")
    return loss / (labels != ignore_index).sum().clamp(min=1)
