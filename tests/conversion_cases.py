"""Tiny stock models that the tests of the conversion share."""

from __future__ import annotations

import torch
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    GPT2Model,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
    ViTForMaskedImageModeling,
    ViTModel,
)

GPT2 = {"n_layer": 3, "n_head": 4, "n_embd": 32, "n_positions": 48, "vocab_size": 61, "pad_token_id": 0}
VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 16,
    "patch_size": 4,
    "encoder_stride": 4,
    "num_labels": 5,
}
STOCK = [
    (GPT2Model, GPT2Config, GPT2),
    (GPT2LMHeadModel, GPT2Config, GPT2),
    (GPT2ForSequenceClassification, GPT2Config, GPT2),
    (GPT2ForTokenClassification, GPT2Config, GPT2),
    (ViTModel, ViTConfig, VIT),
    (ViTForImageClassification, ViTConfig, VIT),
    (ViTForMaskedImageModeling, ViTConfig, VIT),
]


def make_stock(model_class: type[PreTrainedModel], config_class: type, fields: dict) -> PreTrainedModel:
    """A stock model with weights large enough that a wrongly placed tensor shows in the outputs."""
    torch.manual_seed(0)
    model = model_class(config_class(**fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@torch.no_grad()
def disturbed(model: PreTrainedModel) -> PreTrainedModel:
    """The model as after a training: every parameter of its filter has moved."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if ".filter." in name or "position_projection" in name:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


def outputs(model: PreTrainedModel) -> torch.Tensor:
    """What a model makes of two inputs, always the same."""
    torch.manual_seed(1)
    if model.main_input_name == "input_ids":
        return model(torch.randint(1, 61, (2, 9)))[0]
    return model(torch.randn(2, 3, 16, 16))[0]
