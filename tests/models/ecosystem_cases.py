"""Sharpened models of both backbones, and their inputs, that the tests with other tools share."""

from __future__ import annotations

from typing import Any

import torch

from hf_imgproc_attn.models.modeling_imgproc_gpt2 import ImgProcGPT2LMHeadModel
from hf_imgproc_attn.models.modeling_imgproc_vit import (
    ImgProcViTForImageClassification,
)
from tests.models.helpers import sharpen_
from tests.models.variants import (
    gpt2_config,
    images,
    pad,
    token_ids,
    vit_config,
)

BACKBONES = ("gpt2", "vit")
CLASSES = {"gpt2": ImgProcGPT2LMHeadModel, "vit": ImgProcViTForImageClassification}
CONFIGS = {"gpt2": gpt2_config, "vit": vit_config}


def build(backbone: str, variant: str, implementation: str = "sdpa", **overrides: Any) -> Any:
    """A sharpened model of a backbone, language model or classifier."""
    config = CONFIGS[backbone](variant, attn_implementation=implementation, **overrides)
    return sharpen_(CLASSES[backbone](config))


def inputs_of(backbone: str, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """A batch with labels; the text has padding on the left."""
    if backbone == "vit":
        return {"pixel_values": images().to(dtype), "labels": torch.tensor([2, 0])}
    inputs = pad(token_ids(), row=1, length=6, side="left")
    # What the padding predicts, up to the first real token, is nobody's output.
    visible = inputs["attention_mask"].bool() & inputs["attention_mask"].roll(1, dims=1).bool()
    return {**inputs, "labels": inputs["input_ids"].masked_fill(~visible, -100)}


def real_logits(backbone: str, logits: torch.Tensor) -> torch.Tensor:
    """The logits of :func:`inputs_of` that stand for something."""
    return logits if backbone == "vit" else logits[inputs_of("gpt2")["attention_mask"].bool()]
