"""One token with a cache: the attention of a layer alone, and the whole of GPT-2 small."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

from ...models.any_filter import apply_filter
from ...models.cache_ahead import POSITIONS_AHEAD, KnownAhead, upcoming_positions
from ...models.cache_streams import CachedStreams
from ...models.configuration_imgproc_gpt2 import ImgProcGPT2Config
from ...models.layer_filter import AttentionFilter
from ...models.layer_inputs import LayerInputs
from ...models.modeling_imgproc_gpt2 import ImgProcGPT2LMHeadModel
from ...models.visibility import Visibility
from .timing import Row, interleave

STOCK = "stock"
VARIANTS: dict[str, dict[str, Any]] = {
    "twicing": {"boosting": "twicing"},
    "twicing, 3 steps": {"boosting": "twicing", "boosting_steps": 3},
    "bilateral": {"position_kernel": "untied", "learn_bandwidths": True},
    "bilateral_gaussian": {"content_kernel": "gaussian", "position_kernel": "gaussian", "learn_bandwidths": True},
}
FILTERED = "twicing, apply_filter"
"""The stock GPT-2 with filters in its layers, which is to cost what a GPT-2 of the package does."""

STEPS = POSITIONS_AHEAD
"""Tokens, one after another, of a timed call: what is made ahead of so many positions is made once in it."""


def run_decoding(
    length: int, *, fields: dict[str, Any], device: str, budget: float, say: Callable[[str], None] = print
) -> Iterator[Row]:
    """Time one decoding step after ``length`` cached tokens.

    Args:
        length: cached tokens.
        fields: sizes of the GPT-2 (``n_layer``, ``n_head``, ``n_embd``, ``vocab_size``, ``n_positions``).
        device: where.
        budget: seconds for all rounds of a table.
        say: told what is being timed.

    Yields:
        A row for each variant: attention alone, then the whole model; milliseconds of one step.
    """
    whole = partial(model_step, steps=STEPS)
    for case, make in (("attention alone", attention_step), ("whole model", whole)):
        say(f"decoding step at {length} tokens, {case}")
        calls = {name: make(length, fields, variant, device) for name, variant in {STOCK: None, **VARIANTS}.items()}
        if make is whole:
            calls[FILTERED] = whole(length, fields, None, device, preset="twicing")
        for name, spread in interleave(calls, STOCK, budget=budget, device=device).items():
            one = replace(spread, milliseconds=spread.milliseconds / STEPS)
            yield Row("decode", f"{case}, {length} cached tokens", length, name, "step", **one.fields())


def attention_step(length: int, fields: dict[str, Any], variant: dict[str, Any] | None, device: str) -> Any:
    """A call that filters ``STEPS`` tokens after ``length`` cached ones, and forgets them; None is stock attention."""
    heads, width = fields["n_head"], fields["n_embd"] // fields["n_head"]
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randn(3, 1, heads, length, width, generator=generator).to(device)
    query, key, value = torch.randn(3, 1, heads, 1, width, generator=generator).to(device)
    if variant is None:
        cache = DynamicCache()
        cache.update(prompt[1], prompt[2], 0)

        def stock() -> None:
            for _ in range(STEPS):
                keys, values = cache.update(key, value, 0)
                scaled_dot_product_attention(query, keys, values)
            cache.crop(-STEPS)

        return stock
    config = ImgProcGPT2Config(**{**fields, "n_layer": 1, **variant, "attn_implementation": "sdpa"})
    layer = AttentionFilter(
        config.layer_specs[0],
        config,
        layer_idx=0,
        head_dim=width,
        scaling=width**-0.5,
        longest_side=fields["n_positions"],
        layer_norm_eps=1e-5,
    ).to(device)
    cache = DynamicCache(config=config)
    table = build_on(device, partial(torch.nn.Embedding, fields["n_positions"], fields["n_embd"]))

    def inputs(start: int, count: int) -> LayerInputs:
        places = torch.arange(start, start + count, device=device).unsqueeze(0)
        return LayerInputs(
            Visibility(count, start + count, causal=True),
            places.unsqueeze(-1),
            start == 0,
            position_states=table(places),
            upcoming=upcoming_positions(places, table),
        )

    streams = CachedStreams(cache, 0)
    with torch.no_grad():
        layer(*prompt, inputs(0, length), streams=streams)
        upcoming = [inputs(place, 1) for place in range(length, length + STEPS)]

    @torch.no_grad()
    def step() -> None:
        _forget_ahead(cache)
        for step_inputs in upcoming:
            layer(query, key, value, step_inputs, streams=streams)
        cache.crop(-STEPS)

    return step


def _forget_ahead(cache: DynamicCache) -> None:
    """Make a cache project the next positions again, as it does in a text that goes on and is not cropped."""
    for layer in cache.layers:
        if hasattr(layer, "ahead"):
            layer.ahead = KnownAhead()


def build_on(device: str, make: Callable[[], Any]) -> Any:
    """A model with random weights that are drawn on the device: drawing 124 million on the CPU takes seconds."""
    torch.manual_seed(0)
    with torch.device(device):
        return make()


def model_step(
    length: int,
    fields: dict[str, Any],
    variant: dict[str, Any] | None,
    device: str,
    dtype: torch.dtype = torch.float32,
    compiler: str | None = None,
    preset: str | None = None,
    steps: int = 1,
) -> Any:
    """A call that gives the logits of one token, or some one by one, after ``length`` cached ones, and forgets them.

    Args:
        length: cached tokens.
        fields: sizes of the GPT-2.
        variant: its filter fields; None is the stock model.
        device: where.
        dtype: of the weights.
        compiler: the back-end of ``torch.compile`` for the step; None runs it as it is.
        preset: of filters in the layers of the stock model (``variant=None``).
        steps: tokens, one after another; ``n_positions`` has to have room for them.
    """
    fields = {**fields, "bos_token_id": 0, "eos_token_id": 0}
    if variant is None:
        model = build_on(device, partial(GPT2LMHeadModel, GPT2Config(**fields)))
    else:
        model = build_on(device, partial(ImgProcGPT2LMHeadModel, ImgProcGPT2Config(**fields, **variant)))
    model = model.eval().to(dtype)
    if preset is not None:
        apply_filter(model, preset)
    ids = torch.randint(fields["vocab_size"], (1, length + steps), generator=torch.Generator().manual_seed(0)).to(
        device
    )
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :length], past_key_values=cache, logits_to_keep=1)
    decode = model if compiler is None else torch.compile(model, backend=compiler, dynamic=False)

    @torch.no_grad()
    def step() -> None:
        if steps > 1:  # where what is made ahead is made once for several
            _forget_ahead(cache)
        for place in range(length, length + steps):
            decode(ids[:, place : place + 1], past_key_values=cache)
        cache.crop(-steps)

    return step
