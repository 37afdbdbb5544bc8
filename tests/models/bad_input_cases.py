"""Models that the tests of bad input share."""

from __future__ import annotations

from typing import Any

from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    ViTConfig,
    ViTForImageClassification,
)

from hf_imgproc_attn.models.modeling_imgproc_gpt2 import ImgProcGPT2LMHeadModel
from hf_imgproc_attn.models.modeling_imgproc_vit import ImgProcViTForImageClassification
from tests.models.helpers import GPT2, VIT
from tests.models.variants import (
    gpt2_config,
    vit_config,
)

CLASSES = {
    "gpt2": (ImgProcGPT2LMHeadModel, gpt2_config, GPT2LMHeadModel, lambda: GPT2Config(**GPT2)),
    "vit": (ImgProcViTForImageClassification, vit_config, ViTForImageClassification, lambda: ViTConfig(**VIT)),
}


def gpt2(variant: str = "softmax", implementation: str = "sdpa", **overrides: Any) -> ImgProcGPT2LMHeadModel:
    """A tiny language model in evaluation mode."""
    return ImgProcGPT2LMHeadModel(gpt2_config(variant, attn_implementation=implementation, **overrides)).eval()


def vit(variant: str = "softmax", implementation: str = "sdpa", **overrides: Any) -> ImgProcViTForImageClassification:
    """A tiny classifier in evaluation mode."""
    return ImgProcViTForImageClassification(
        vit_config(variant, attn_implementation=implementation, **overrides)
    ).eval()
