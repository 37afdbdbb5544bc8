"""GPT-2 models and batches that the tests of whole GPT-2 models share."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    GPT2Model,
)

from hf_imgproc_attn.models.modeling_imgproc_gpt2 import (
    ImgProcGPT2ForSequenceClassification,
    ImgProcGPT2ForTokenClassification,
    ImgProcGPT2LMHeadModel,
    ImgProcGPT2Model,
)
from tests.models.helpers import GPT2, sharpen_
from tests.models.variants import (
    gpt2_config,
    pad,
    token_ids,
)

STOCK_OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "unscaled": {"scale_attn_weights": False},
    "inverse_layer": {"scale_attn_by_inverse_layer_idx": True},
    "upcast": {"reorder_and_upcast_attn": True},
    "cross_attention": {"add_cross_attention": True},
    "all": {
        "scale_attn_weights": False,
        "scale_attn_by_inverse_layer_idx": True,
        "reorder_and_upcast_attn": True,
        "add_cross_attention": True,
    },
}
HEADS = {
    "model": (GPT2Model, ImgProcGPT2Model, {}),
    "lm": (GPT2LMHeadModel, ImgProcGPT2LMHeadModel, {}),
    "sequence": (GPT2ForSequenceClassification, ImgProcGPT2ForSequenceClassification, {"num_labels": 5}),
    "token": (GPT2ForTokenClassification, ImgProcGPT2ForTokenClassification, {"num_labels": 5}),
}


def build(variant: str = "softmax", implementation: str = "eager", **overrides: Any) -> ImgProcGPT2LMHeadModel:
    """A sharpened language model in evaluation mode."""
    config = gpt2_config(variant, attn_implementation=implementation, **overrides)
    return sharpen_(ImgProcGPT2LMHeadModel(config)).eval()


def build_double(variant: str, implementation: str = "sdpa", **overrides: Any) -> ImgProcGPT2LMHeadModel:
    """The same in float64."""
    return build(variant, implementation, **overrides).double()


def padded_batch(kind: str) -> dict[str, torch.Tensor]:
    """Two rows of nine tokens; the second has six where it is padded."""
    return {"input_ids": token_ids()} if kind == "none" else pad(token_ids(), row=1, length=6, side=kind)


def encoder_inputs(config: GPT2Config) -> dict[str, torch.Tensor]:
    """Four encoder states a row, one of them masked, where the model attends to an encoder."""
    if not config.add_cross_attention:
        return {}
    states = torch.randn(2, 4, config.n_embd, generator=torch.Generator().manual_seed(8))
    return {"encoder_hidden_states": states, "encoder_attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])}


def stock_and_ours(head: str = "lm", implementation: str = "eager", **overrides: Any) -> tuple[Any, Any]:
    """The stock model and ours with the same weights; loading fails if a name or shape differs."""
    stock_class, our_class, options = HEADS[head]
    ours_only = {name: overrides.pop(name) for name in list(overrides) if not hasattr(GPT2Config(), name)}
    config = GPT2Config(**{**GPT2, "pad_token_id": 0, **options, **overrides}, attn_implementation=implementation)
    stock = sharpen_(stock_class(config))
    our_config = gpt2_config(attn_implementation=implementation, pad_token_id=0, **options, **overrides, **ours_only)
    ours = our_class(our_config)
    ours.load_state_dict(stock.state_dict(), strict=not ours_only)
    return stock.eval(), ours.eval()
