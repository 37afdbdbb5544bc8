"""Filters, inputs and decoding that the tests of caches share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers.cache_utils import Cache

from hf_imgproc_attn.models.cache_layer import FilterDynamicLayer
from hf_imgproc_attn.models.layer_filter import AttentionFilter
from tests.models.helpers import make_filter

BATCH, HEADS, LENGTH, WIDTH = 3, 3, 12, 6
TIGHT = {"rtol": 0, "atol": 1e-12}
PLACES = ("gaussian", "alibi", "relative_buckets", "rotary")
BOOSTERS = (
    ("none", 2),
    ("twicing", 1),
    ("twicing", 2),
    ("twicing", 3),
    ("learned", 2),
    ("diffusion", 3),
    ("sos", 3),
)
Inputs = dict[str, torch.Tensor]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def build(content: str, position: str, boosting: str, steps: int) -> AttentionFilter:
    """A filter; ``shared`` is ``untied`` with the model's projections. Its cache layer is that of its index."""
    share = {"share_position_projections": True} if position == "shared" else {}
    return make_filter(content, {"shared": "untied"}.get(position, position), boosting, steps, head_dim=WIDTH, **share)


def tensors(position: str, seed: int = 0, rows: int = 1) -> Inputs:
    """All tokens' inputs with logits of std about 2; custom positions with gaps where they are per row."""
    inputs = {
        "query": 2 * random(BATCH, HEADS, LENGTH, WIDTH, seed=seed) + 0.3,
        "key": 1.5 * random(BATCH, HEADS, LENGTH, WIDTH, seed=seed + 1) - 0.2,
        "value": random(BATCH, HEADS, LENGTH, WIDTH, seed=seed + 2),
        "previous_value": 0.5 * random(BATCH, HEADS, LENGTH, WIDTH, seed=seed + 5) + 0.2,
    }
    if position == "untied":
        inputs["position_states"] = random(rows, LENGTH, HEADS * WIDTH, seed=seed + 3)
    if position == "shared":
        inputs["position_states"] = random(rows, HEADS, LENGTH, 2 * WIDTH, seed=seed + 3)
    if position in PLACES:
        places = (
            torch.arange(LENGTH) - 5 if rows == 1 else random(rows, LENGTH, seed=seed + 4).mul(6).round().cumsum(-1)
        )
        inputs["coordinates"] = places.double().view(rows, LENGTH, 1)
    return inputs


def part(inputs: Inputs, start: int, stop: int) -> Inputs:
    """The inputs of some tokens."""
    axis = {"coordinates": 1}
    return {
        name: tensor.narrow(axis.get(name, tensor.ndim - 2), start, stop - start) for name, tensor in inputs.items()
    }


def new_cache(layer_class: type[FilterDynamicLayer] = FilterDynamicLayer) -> Cache:
    return Cache(layers=[layer_class(), layer_class()])


def decode(
    layer: AttentionFilter,
    inputs: Inputs,
    sizes: Sequence[int],
    cache: Cache,
    implementation: str = "sdpa",
    mask: torch.Tensor | None = None,
    names_padding: bool = False,
) -> torch.Tensor:
    """Outputs of the tokens from the cache's end on, ``sizes`` at a time, with the masks that a model would pass.

    A model called with a mask of two axes also says which new tokens are padding.
    """
    outputs, keys = [], None if mask is None else mask[:, None, None]
    for size in sizes:
        start = cache.get_seq_length(layer.layer_idx)
        stop = start + size
        visible = torch.ones(stop, stop, dtype=torch.bool).tril()[start:]
        visible = visible if keys is None else visible & keys[..., :stop]
        single = size == 1 and keys is None  # a model passes no mask for one token
        output, _ = layer(
            **part(inputs, start, stop),
            implementation=implementation,
            attention_mask=None if single else visible,
            is_causal=True,
            token_mask=mask[:, start:stop] if names_padding and mask is not None else None,
            past_key_values=cache,
        )
        outputs.append(output)
    return torch.cat(outputs, dim=-2)


def full_pass(
    layer: AttentionFilter, inputs: Inputs, implementation: str = "sdpa", mask: torch.Tensor | None = None
) -> torch.Tensor:
    if mask is not None:
        length = inputs["query"].shape[-2]
        mask = torch.ones(length, length, dtype=torch.bool).tril() & mask[:, None, None, :length]
    return layer(**inputs, implementation=implementation, attention_mask=mask, is_causal=True)[0]
