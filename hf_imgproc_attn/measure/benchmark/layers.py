"""What a variant costs in a layer: the attention module of each preset against the stock attention module.

A layer is the whole attention module (projections, filter, output projection), the second one of a model with two
(feedback and the elliptical metric do nothing in the first), called with what the model really hands to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...backbones import BACKBONES, GPT2, VIT
from ...models.spec_fields import PRESETS
from .timing import DIRECTIONS, Row, interleave

STOCK = "stock"


@dataclass(frozen=True)
class LayerShape:
    """The shape of one comparison: ``[batch, heads, length, head_dim]``."""

    backbone: str
    batch: int
    heads: int
    length: int
    head_dim: int = 64


FULL = (LayerShape(GPT2.name, batch=2, heads=12, length=1024), LayerShape(VIT.name, batch=16, heads=12, length=197))
QUICK = (LayerShape(GPT2.name, batch=1, heads=2, length=48), LayerShape(VIT.name, batch=2, heads=2, length=17))


def run_layers(shape: LayerShape, *, budget: float, say: Callable[[str], None] = print) -> Iterator[Row]:
    """Time stock attention and all presets on one shape.

    Args:
        shape: of the comparison.
        budget: seconds for all rounds of a direction.
        say: told what is being timed.
    """
    refused = BACKBONES[shape.backbone].refused_presets
    names = [name for name in PRESETS if name not in refused]
    calls = {STOCK: layer_call(shape, None), **{name: layer_call(shape, name) for name in names}}
    case = f"{shape.backbone} layer ({shape.batch}, {shape.heads}, {shape.length}, {shape.head_dim}) float32"
    for direction in DIRECTIONS:
        say(f"{case}, {direction}")
        timed = {name: (lambda call=call, direction=direction: call(direction)) for name, call in calls.items()}
        for name, spread in interleave(timed, STOCK, budget=budget).items():
            yield Row("layers", case, shape.length, name, direction, **spread.fields())


def layer_call(shape: LayerShape, preset: str | None) -> Callable[[str], None]:
    """A function that runs one attention layer in a direction; ``preset`` None is the stock layer."""
    torch.manual_seed(0)
    model, inputs = build_model(shape, preset)
    # What the library itself takes for the attention of a model: a class, or a description of one.
    recorded = model._can_record_outputs["attentions"]
    kind = getattr(recorded, "target_class", recorded)
    layer = [module for module in model.modules() if isinstance(module, kind)][-1]
    arguments, keywords = capture_call(model, layer, inputs)
    hidden_states, *rest = arguments
    hidden_states = hidden_states.detach().requires_grad_()
    gradient = torch.randn_like(hidden_states)
    trained = [hidden_states, *layer.parameters()]

    def call(direction: str) -> None:
        if direction == "forward":
            with torch.no_grad():
                layer(hidden_states, *rest, **keywords)
            return
        output = layer(hidden_states, *rest, **keywords)[0]
        torch.autograd.grad(output, trained, gradient, allow_unused=True)

    return call


def build_model(shape: LayerShape, preset: str | None) -> tuple[Any, dict[str, torch.Tensor]]:
    """A model with two layers, without dropout, and an input of the shape; ``preset`` None is the stock model."""
    row, width = BACKBONES[shape.backbone], shape.heads * shape.head_dim
    fields: dict[str, Any] = {
        "num_hidden_layers": 2, "num_attention_heads": shape.heads, "hidden_size": width, **row.no_dropout,
    }  # fmt: skip
    if row.input == "text":
        fields |= {"max_position_embeddings": shape.length, "vocab_size": 64, "use_cache": False}
        fields |= {"bos_token_id": 0, "eos_token_id": 0}
        inputs = {"input_ids": torch.randint(64, (shape.batch, shape.length))}
    else:
        side = round((shape.length - 1) ** 0.5)
        fields |= {"intermediate_size": width, "image_size": 4 * side, "patch_size": 4}
        inputs = {"pixel_values": torch.randn(shape.batch, 3, 4 * side, 4 * side)}
    head = row.head("AutoModel")
    if preset is None:
        return row.stock_class(str(head.stock))(row.stock_class(row.stock_config)(**fields)), inputs
    return row.our_class(head.variant)(row.our_class(row.config).from_preset(preset, **fields)), inputs


def capture_call(
    model: nn.Module, layer: nn.Module, inputs: dict[str, torch.Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with which a model calls one of its modules."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def note(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        calls.append((arguments, keywords))

    handle = layer.register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    return calls[0]
