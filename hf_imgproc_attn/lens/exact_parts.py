"""Exact parts of the first layer's queries and keys: token, position and constant, given the norm's statistics."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..models.any_layers import AttentionLayer


def first_layer_parts(
    model: nn.Module, layer: AttentionLayer, entering: torch.Tensor, length: int
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]] | None:
    """Parts of the first layer's queries and keys, ``[batch, heads, length, head_dim]`` in float64.

    The norm is gamma (x - mean x) / sigma + beta with sigma of the sum x = token + position, so that token and
    position pass it separately; beta and the projections' biases are the constant part.

    Args:
        model: a model with GPT-2's or ViT's modules.
        layer: its first layer.
        entering: what its first block is given, token plus position, ``[batch, length, hidden_size]``.
        length: number of tokens.

    Returns:
        Parts of queries and of keys; None for models that do not add a table of positions before a layer norm.
    """
    found = _gpt2(model, layer, length) or _vit(model, layer, length)
    if found is None:
        return None
    position, norm, weights, biases = found
    x, position = entering.double(), position.double()
    sigma = (x.var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt()
    gamma, beta = norm.weight.double(), norm.bias.double()

    def normed(part: torch.Tensor) -> torch.Tensor:
        return gamma * (part - part.mean(-1, keepdim=True)) / sigma

    parts = {"constant": beta.expand_as(x), "position": normed(position), "content": normed(x - position)}
    result = []
    for weight, bias in zip(weights, biases, strict=True):
        projected = {name: part @ weight.double() for name, part in parts.items()}
        projected["constant"] = projected["constant"] + (0.0 if bias is None else bias.double())
        result.append(
            {name: part.unflatten(-1, (-1, layer.head_dim)).transpose(1, 2) for name, part in projected.items()}
        )
    return result[0], result[1]


_Found = tuple[torch.Tensor, nn.LayerNorm, tuple[torch.Tensor, ...], tuple[Any, ...]]


def _gpt2(model: nn.Module, layer: AttentionLayer, length: int) -> _Found | None:
    base = getattr(model, "transformer", model)
    table, projection = getattr(base, "wpe", None), getattr(layer.module, "c_attn", None)
    if not isinstance(table, nn.Embedding) or projection is None or length > table.num_embeddings:
        return None
    norm = model.get_submodule(layer.name.rpartition(".")[0]).ln_1
    if not isinstance(norm, nn.LayerNorm):
        return None
    width = projection.weight.shape[1] // 3
    weights = projection.weight.split(width, dim=1)[:2]
    return table.weight[None, :length], norm, weights, projection.bias.split(width)[:2]


def _vit(model: nn.Module, layer: AttentionLayer, length: int) -> _Found | None:
    base: Any = getattr(model, "base_model", model)
    table = getattr(getattr(base, "embeddings", None), "position_embeddings", None)
    layers = getattr(getattr(base, "encoder", base), "layers", None) or getattr(
        getattr(base, "encoder", base), "layer", None
    )
    names = ("q_proj", "k_proj")
    if not isinstance(table, nn.Parameter) or layers is None or not hasattr(layer.module, names[0]):
        return None
    norm = getattr(layers[0], "layernorm_before", None)
    if table.shape[-2] != length or not isinstance(norm, nn.LayerNorm):
        return None
    projections = [getattr(layer.module, name) for name in names]
    return table, norm, tuple(p.weight.mT for p in projections), tuple(p.bias for p in projections)
