"""ViT models and batches that the tests of whole ViT models share."""

from __future__ import annotations

import torch
from transformers import ViTForImageClassification, ViTForMaskedImageModeling, ViTModel

from hf_imgproc_attn.models.modeling_imgproc_vit import (
    ImgProcViTForImageClassification,
    ImgProcViTForMaskedImageModeling,
    ImgProcViTModel,
)

HEADS = {
    "model": (ViTModel, ImgProcViTModel, {}),
    "classifier": (ViTForImageClassification, ImgProcViTForImageClassification, {"num_labels": 5}),
    "masked": (ViTForMaskedImageModeling, ImgProcViTForMaskedImageModeling, {}),
}
# The stock masked image model reads and writes square images only.
SQUARE = {"image_size": 12}


def some_patches(batch: int = 2, patches: int = 9) -> torch.Tensor:
    """A boolean mask of patches, different in every row."""
    return torch.rand(batch, patches, generator=torch.Generator().manual_seed(4)) < 0.4
