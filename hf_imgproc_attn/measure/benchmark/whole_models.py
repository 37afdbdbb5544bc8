"""Whole models against the stock ones: a training step of GPT-2 small and ViT-B, and generation."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    ViTConfig,
    ViTForImageClassification,
)

from ...models.configuration_imgproc_gpt2 import ImgProcGPT2Config
from ...models.configuration_imgproc_vit import ImgProcViTConfig
from ...models.modeling_imgproc_gpt2 import ImgProcGPT2LMHeadModel
from ...models.modeling_imgproc_vit import ImgProcViTForImageClassification
from .timing import Row, interleave

STOCK = "stock"
VARIANTS: dict[str, dict[str, Any]] = {
    "twicing in all layers": {"boosting": "twicing"},
    "twicing in the last 3 layers": {"boosting": "twicing", "boosted_layers": [-3, -2, -1]},
    "bilateral": {"position_kernel": "untied", "learn_bandwidths": True},
    "bilateral_gaussian": {"content_kernel": "gaussian", "position_kernel": "gaussian", "learn_bandwidths": True},
    "bilateral_twicing": {"position_kernel": "untied", "learn_bandwidths": True, "boosting": "twicing"},
}

GPT2_SMALL: dict[str, Any] = {
    "n_layer": 12, "n_head": 12, "n_embd": 768, "vocab_size": 50257, "n_positions": 1024,
    "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0,
}  # fmt: skip
VIT_BASE: dict[str, Any] = {
    "num_hidden_layers": 12, "num_attention_heads": 12, "hidden_size": 768, "intermediate_size": 3072,
    "image_size": 224, "patch_size": 16, "num_labels": 1000,
}  # fmt: skip
GPT2_TINY = {**GPT2_SMALL, "n_layer": 4, "n_head": 2, "n_embd": 32, "vocab_size": 64, "n_positions": 64}
VIT_TINY = {**VIT_BASE, "num_hidden_layers": 4, "num_attention_heads": 2, "hidden_size": 32, "image_size": 64}


def run_models(
    *,
    gpt2: dict[str, Any],
    vit: dict[str, Any],
    batch: int,
    new_tokens: int,
    device: str,
    dtype: torch.dtype,
    budget: float,
    say: Callable[[str], None] = print,
) -> Iterator[Row]:
    """Time training steps and generation of every variant against the stock model.

    A step is forward, backward and AdamW. All models of a table are in memory at once: they take turns.

    Args:
        gpt2: sizes of the language model; its text has ``n_positions`` tokens.
        vit: sizes of the image model.
        batch: images in a step; the language model has one text.
        new_tokens: tokens to generate at the end of the longest text.
        device: where.
        dtype: of the activations: float32, or the dtype of autocast.
        budget: seconds for all rounds of a table.
        say: told what is being timed.
    """
    length = gpt2["n_positions"]
    patches = (vit["image_size"] // vit["patch_size"]) ** 2 + 1
    tables: tuple[tuple[str, int, str, Callable[[dict[str, Any] | None], Callable[[], object]]], ...] = (
        (f"GPT-2, one text of {length} tokens", length, "step", lambda v: text_step(gpt2, v, device, dtype)),
        (f"ViT, {batch} images of {patches} tokens", patches, "step",
         lambda v: image_step(vit, v, batch, device, dtype)),
        (f"GPT-2, {new_tokens} tokens after {length - new_tokens}", length, "generate",
         lambda v: generation(gpt2, v, new_tokens, device)),
    )  # fmt: skip
    for case, tokens, direction, make in tables:
        say(f"{case}, {direction}")
        calls = {name: make(variant) for name, variant in {STOCK: None, **VARIANTS}.items()}
        spreads = interleave(calls, STOCK, budget=budget, device=device)
        del calls
        gc.collect()
        for name, spread in spreads.items():
            yield Row("models", case, tokens, name, direction, **spread.fields())


def text_step(
    sizes: dict[str, Any], variant: dict[str, Any] | None, device: str, dtype: torch.dtype
) -> Callable[[], object]:
    """A training step on one text of full length."""
    ids = torch.randint(sizes["vocab_size"], (1, sizes["n_positions"]), generator=torch.Generator().manual_seed(0))
    return _step(_gpt2(sizes, variant), {"input_ids": ids, "labels": ids}, device, dtype)


def image_step(
    sizes: dict[str, Any], variant: dict[str, Any] | None, batch: int, device: str, dtype: torch.dtype
) -> Callable[[], object]:
    """A training step on a batch of images."""
    torch.manual_seed(0)
    model = (
        ViTForImageClassification(ViTConfig(**sizes))
        if variant is None
        else ImgProcViTForImageClassification(ImgProcViTConfig(**sizes, **variant))
    )
    side = sizes["image_size"]
    pixels = torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0))
    return _step(model, {"pixel_values": pixels, "labels": torch.arange(batch)}, device, dtype)


def generation(
    sizes: dict[str, Any], variant: dict[str, Any] | None, new_tokens: int, device: str
) -> Callable[[], object]:
    """Greedy generation of the last tokens that the position table allows, the reading of the prompt included."""
    model = _gpt2(sizes, variant).eval().to(device)
    prompt = torch.randint(
        1, sizes["vocab_size"], (1, sizes["n_positions"] - new_tokens), generator=torch.Generator().manual_seed(0)
    ).to(device)
    options = {"do_sample": False, "min_new_tokens": new_tokens, "max_new_tokens": new_tokens, "pad_token_id": 0}
    return lambda: model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)


def _gpt2(sizes: dict[str, Any], variant: dict[str, Any] | None) -> Any:
    torch.manual_seed(0)
    sizes = {**sizes, "bos_token_id": 0, "eos_token_id": 0}
    if variant is None:
        return GPT2LMHeadModel(GPT2Config(**sizes))
    return ImgProcGPT2LMHeadModel(ImgProcGPT2Config(**sizes, **variant))


def _step(model: nn.Module, inputs: dict[str, torch.Tensor], device: str, dtype: torch.dtype) -> Callable[[], object]:
    model = model.train().to(device)
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(torch.device(device).type, dtype=dtype, enabled=dtype != torch.float32):
            loss = model(**inputs).loss
        loss.backward()
        optimizer.step()

    return step
