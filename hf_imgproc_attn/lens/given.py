"""What the lens is given, checked before any work: the model's layers, and its inputs by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..errors import plain_message
from ..models.any_layers import AttentionLayer, attention_layers, described
from .options import LensOptions


def chosen_layers(model: nn.Module, options: LensOptions) -> list[AttentionLayer]:
    """The layers that are looked at.

    Raises:
        ValueError: for no model, one without such layers, one with several stacks of which none is chosen, or numbers
            of layers that there are not.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a model, which is loaded already, got {described(model)}")
    found = attention_layers(model)
    stacks = list(dict.fromkeys(layer.stack for layer in found))
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no self-attention layer that goes through Transformers' attention interface: "
            "the lens sees nothing in it"
        )
    if options.stack is None and len(stacks) > 1:
        raise ValueError(f"{type(model).__name__} has several stacks: choose stack among {', '.join(stacks)}")
    stack = stacks[0] if options.stack is None else options.stack
    if stack not in stacks:
        raise ValueError(f"stack must be among {', '.join(stacks)}, got {stack!r}")
    members = [layer for layer in found if layer.stack == stack]
    if options.layers is None:
        return members
    for index in options.layers:
        if isinstance(index, bool) or not isinstance(index, int) or not -len(members) <= index < len(members):
            raise ValueError(f"layers must be integers from {-len(members)} to {len(members) - 1}, got {index!r}")
    return [members[place] for place in sorted({index % len(members) for index in options.layers})]


def is_decoder(layers: list[AttentionLayer]) -> bool:
    """Whether layers are those of a decoder beside an encoder."""
    return layers[0].stack.startswith(("decoder", "model.decoder"))


def named_inputs(
    model: nn.Module, inputs: Mapping[str, Any] | torch.Tensor, layers: list[AttentionLayer]
) -> dict[str, Any]:
    """Inputs by name, as the model is called with.

    A model with encoder and decoder that is given nothing for its decoder is shown the same tokens there; where it has
    no tokens, and its encoder is looked at, a start token.

    Raises:
        ValueError: for what is no input, empty ones, and token numbers that the model does not have.
    """
    if isinstance(inputs, torch.Tensor):
        kind = getattr(model, "main_input_name", "input_ids")
        axes = 4 if kind == "pixel_values" else 2
        if inputs.ndim != axes:
            raise ValueError(f"inputs must have {axes} axes as {kind}, got shape {tuple(inputs.shape)}")
        inputs = {kind: inputs}
    if not isinstance(inputs, Mapping):
        raise ValueError(
            "inputs must be a tensor or what the model is called with by name (of texts and images: what the model's "
            f"tokenizer or image processor returns), got {inputs!r}"
        )
    named = {name: value for name, value in inputs.items() if name != "labels"}
    tensors = {name: value for name, value in named.items() if isinstance(value, torch.Tensor) and value.ndim > 0}
    if not tensors:
        raise ValueError(f"inputs must hold a tensor, got {', '.join(map(str, named)) or 'nothing'}")
    for name, value in tensors.items():
        if not value.numel():
            raise ValueError(
                f"{name} must hold at least one sample, and nothing empty, got shape {tuple(value.shape)}"
            )
    for name in ("input_ids", "decoder_input_ids"):
        if name in tensors:
            _check_ids(model, name, tensors[name])
    _check_mask(named, decoder=is_decoder(layers))
    return _with_decoder(model, named, layers)


def _check_ids(model: nn.Module, name: str, ids: torch.Tensor) -> None:
    if ids.ndim != 2:
        raise ValueError(f"{name} must have 2 axes, samples and tokens, got shape {tuple(ids.shape)}")
    if ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name} must be token numbers, of dtype torch.int64 or torch.int32, got {ids.dtype}")
    size = _vocabulary(model)
    outside = ids[(ids < 0) | (ids >= size)] if size else ids[ids < 0]
    if len(outside):
        allowed = f"from 0 to {size - 1}, the tokens of {type(model).__name__}," if size else ">= 0,"
        raise ValueError(f"{name} must be token numbers {allowed} got {int(outside[0])}")


def _vocabulary(model: nn.Module) -> int:
    """Tokens that a model has vectors for; 0 where that is not known."""
    try:
        table = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        table = None
    if isinstance(table, nn.Embedding):
        return table.num_embeddings
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    size = getattr(text, "vocab_size", None)
    return size if isinstance(size, int) else 0


def _check_mask(named: Mapping[str, Any], *, decoder: bool) -> None:
    side = "decoder_" if decoder else ""
    name, ids = f"{side}attention_mask", named.get(f"{side}input_ids")
    mask = named.get(name)
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
        return
    if isinstance(ids, torch.Tensor) and mask.shape != ids.shape:
        raise ValueError(f"{name} must have the shape of {side}input_ids, {list(ids.shape)}, got {list(mask.shape)}")
    counts = mask.bool().sum(-1)
    if not bool(counts.all()):
        empty = int((counts == 0).nonzero()[0, 0])
        raise ValueError(f"{name} must leave each sample a real token, and sample {empty} is all padding")
    if int(counts.max()) < 2:
        raise ValueError(
            f"{name} must leave a sample at least 2 real tokens, and each has 1: a filter of one token returns it"
        )


def _with_decoder(model: nn.Module, named: dict[str, Any], layers: list[AttentionLayer]) -> dict[str, Any]:
    """The same, with tokens for a decoder that was given none."""
    config: Any = getattr(model, "config", None)
    given = any(named.get(name) is not None for name in ("decoder_input_ids", "decoder_inputs_embeds"))
    if given or not getattr(config, "is_encoder_decoder", False):
        return named
    ids = named.get("input_ids")
    if isinstance(ids, torch.Tensor):
        mask = named.get("attention_mask")
        masked = {} if mask is None else {"decoder_attention_mask": mask}
        return {**masked, **named, "decoder_input_ids": ids}
    if is_decoder(layers):
        raise ValueError(f"inputs must hold decoder_input_ids: the decoder of {type(model).__name__} is looked at")
    first = next(value for value in named.values() if isinstance(value, torch.Tensor) and value.ndim > 0)
    start = getattr(config, "decoder_start_token_id", None) or 0
    return {**named, "decoder_input_ids": torch.full((first.shape[0], 1), start, device=first.device)}


def cannot_be_called(model: nn.Module, inputs: Mapping[str, Any], error: Exception) -> ValueError:
    """What is wrong with inputs that a model has failed on, in one line.

    Args:
        model: the model.
        inputs: what it was called with.
        error: what it raised.
    """
    from ..conversion_probe import longest_text  # imports every backbone

    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    ids = inputs.get("input_ids")
    longest = longest_text(text) if getattr(text, "max_position_embeddings", None) is not None else None
    if isinstance(ids, torch.Tensor) and longest is not None and ids.shape[-1] > longest:
        return ValueError(
            f"inputs must have at most {longest} tokens, the places of {type(model).__name__}, got {ids.shape[-1]}"
        )
    held = ", ".join(
        f"{name} {list(value.shape)}" if isinstance(value, torch.Tensor) else str(name)
        for name, value in inputs.items()
    )
    return ValueError(f"inputs must fit {type(model).__name__}, which fails on {held}: {plain_message(error)}")
