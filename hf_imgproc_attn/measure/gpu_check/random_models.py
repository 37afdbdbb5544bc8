"""Random models, far from uniform attention, and what they give: what whole models on the device are compared by."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import nn

from ... import (
    ImgProcGPT2Config,
    ImgProcGPT2LMHeadModel,
    ImgProcViTConfig,
    ImgProcViTForImageClassification,
)
from ...backbones import BACKBONES as ROWS
from ...backbones import GPT2, VIT

MODES: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "float32": (torch.float32, None),
    "bfloat16": (torch.bfloat16, None),
    "float16": (torch.float16, None),
    "autocast bfloat16": (torch.float32, torch.bfloat16),
}
"""Mode -> dtype of the weights, and of autocast if it is on."""


class Sizes(NamedTuple):
    """Layers, heads, width; text: vocabulary, tokens, new tokens; images: side, patch. Lengths are odd."""

    layers: int
    heads: int
    width: int
    vocabulary: int
    length: int
    new_tokens: int
    image: int
    patch: int


FULL = Sizes(layers=4, heads=4, width=256, vocabulary=256, length=131, new_tokens=12, image=64, patch=8)
TINY = Sizes(layers=2, heads=2, width=32, vocabulary=32, length=17, new_tokens=3, image=16, patch=4)


def build(backbone: str, preset: str, sizes: Sizes) -> Any:
    """A model in float32 on the CPU whose attention is far from uniform; no dropout; the same on every call."""
    torch.manual_seed(0)
    if ROWS[backbone].input == "text":
        config = ImgProcGPT2Config.from_preset(
            preset,
            n_layer=sizes.layers,
            n_head=sizes.heads,
            n_embd=sizes.width,
            vocab_size=sizes.vocabulary,
            n_positions=sizes.length + sizes.new_tokens,
            bos_token_id=0,
            eos_token_id=0,
            **GPT2.no_dropout,
        )
        return sharpened(ImgProcGPT2LMHeadModel(config))
    vit = ImgProcViTConfig.from_preset(
        preset,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        hidden_size=sizes.width,
        intermediate_size=2 * sizes.width,
        image_size=sizes.image,
        patch_size=sizes.patch,
        num_labels=10,
        **VIT.no_dropout,
    )
    return sharpened(ImgProcViTForImageClassification(vit))


@torch.no_grad()
def sharpened(model: nn.Module) -> nn.Module:
    """Random weights that keep the variance of their input, in place: new ones would make every row of A uniform."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim < 2 or "scalar_bias" in name:
            parameter.add_(noise, alpha=0.1)
        elif "embed" in name or name.endswith(("wte.weight", "wpe.weight", "cls_token")):
            parameter.copy_(0.5 * noise)
        else:  # Conv1D of GPT-2 is [in, out]; Linear and convolutions have their inputs last
            fan_in = parameter.shape[0] if ".c_" in name else parameter[0].numel()
            parameter.copy_(noise / math.sqrt(fan_in))
    return model


def inputs_for(backbone: str, sizes: Sizes) -> dict[str, torch.Tensor]:
    """Two texts or two images."""
    generator = torch.Generator().manual_seed(2)
    if ROWS[backbone].input == "text":
        return {"input_ids": torch.randint(1, sizes.vocabulary, (2, sizes.length), generator=generator)}
    return {"pixel_values": torch.randn(2, 3, sizes.image, sizes.image, generator=generator)}


class Result(NamedTuple):
    """Logits, and gradients by parameter, in float64 on the CPU."""

    logits: torch.Tensor
    gradients: dict[str, torch.Tensor]


def run_model(
    model: Any, inputs: dict[str, torch.Tensor], dtype: torch.dtype, autocast: torch.dtype | None = None
) -> Result:
    """Forward and backward of a fixed linear function of the logits."""
    device = next(model.parameters()).device
    inputs = {
        name: tensor.to(device, dtype if tensor.is_floating_point() else None) for name, tensor in inputs.items()
    }
    model.zero_grad(set_to_none=True)
    with torch.autocast(device.type, dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        logits = model(**inputs).logits
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3)) / math.sqrt(logits.shape[-1])
    (logits.double() * weights.to(device)).sum().backward()
    gradients = {
        name: parameter.grad.detach().double().cpu()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return Result(logits.detach().double().cpu(), gradients)


def exact(backbone: str, preset: str, sizes: Sizes) -> Result:
    """The dense reference in float64 on the CPU."""
    model = build(backbone, preset, sizes).double()
    model.set_attn_implementation("eager")
    return run_model(model, inputs_for(backbone, sizes), torch.float64)
