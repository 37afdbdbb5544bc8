"""Cached decoding of filtered foreign models equals full recomputation, in every kind of cache and generation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from transformers import Cache, DynamicCache, EncoderDecoderCache, GenerationConfig, StaticCache

from hf_imgproc_attn import apply_filter
from tests.any_model.architectures import DECODERS, build, inputs, padding, text

FILTERS: dict[str, dict[str, Any]] = {
    "twicing": {"preset": "twicing"},
    "three steps": {"preset": "twicing", "boosting_steps": 3},
    "sos": {"preset": "sos"},
    "learned gain": {"preset": "learned_twicing"},
    "elliptical": {"preset": "elliptical", "boosting": "twicing"},
    "neutreno": {"preset": "neutreno", "neutreno_lambda": 0.3},
    "pid": {"preset": "pidformer", "pid_gains": [0.5, 0.1, 0.1], "boosting": "twicing"},
    "alibi": {"preset": "alibi", "boosting": "twicing"},
    "buckets": {"preset": "t5_bias"},
    "gaussian": {
        "content_kernel": "gaussian",
        "position_kernel": "gaussian",
        "learn_bandwidths": True,
        "boosting": "twicing",
    },
}


def filtered(name: str, which: str, **changes: Any) -> nn.Module:
    """A filtered model whose learned scalars are not where they start."""
    model = apply_filter(build(name, **changes), **FILTERS[which])
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "scalar_bias" in key:
                parameter.add_(torch.rand(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


def static(config: Any) -> Cache:
    return StaticCache(config=config, max_cache_len=20)


def dynamic(config: Any) -> Cache:
    return DynamicCache(config=config)


CHUNKS = {"token by token": [7, 1, 1, 1, 1, 1, 1, 1], "in chunks": [3, 5, 1, 4, 1], "prompt of one": [1] * 14}


def decode(
    model: nn.Module, ids: torch.Tensor, mask: torch.Tensor | None, cache: Cache, chunks: list[int]
) -> torch.Tensor:
    logits, start = [], 0
    with torch.no_grad():
        for size in chunks:
            seen = slice(0, start + size)
            options = {} if mask is None else {"attention_mask": mask[:, seen]}
            given = ids[:, start : start + size]
            logits.append(model(given, past_key_values=cache, use_cache=True, **options).logits)
            start += size
    return torch.cat(logits, dim=1)


def check(model: nn.Module, make_cache: Any, mask: torch.Tensor | None, chunks: list[int]) -> None:
    ids = text()
    with torch.no_grad():
        full = model(ids, attention_mask=mask, use_cache=False).logits
    found = decode(model, ids, mask, make_cache(model.config), chunks)
    visible = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    assert (found - full)[visible].abs().max() < 1e-12 * full.abs().max()


@pytest.mark.parametrize("which", FILTERS)
@pytest.mark.parametrize("make_cache", [dynamic, static])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_every_filter_decodes_exactly(name: str, make_cache: Any, which: str) -> None:
    check(filtered(name, which), make_cache, padding(text(), left=True), CHUNKS["token by token"])


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("make_cache", [dynamic, static])
@pytest.mark.parametrize("name", DECODERS)
def test_every_decoder_decodes_exactly(name: str, make_cache: Any, chunks: str) -> None:
    check(filtered(name, "twicing"), make_cache, None, CHUNKS[chunks])


MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "several": {"do_sample": True, "num_return_sequences": 3},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "gemma3", "qwen3", "gpt_neox", "deepseek_v3"])
def test_generation_gives_the_tokens_of_full_recomputation(name: str, mode: str) -> None:
    model = filtered(name, "twicing")
    batch = 1 if mode == "prompt lookup" else 2
    ids = text(batch=batch, length=9)
    mask = torch.ones_like(ids) if batch == 1 else padding(ids, left=True)
    ids = ids.masked_fill(mask == 0, 0)
    tokens = []
    for cached in (True, False):
        options = (
            MODES[mode]
            if cached
            else {k: v for k, v in MODES[mode].items() if k in ("num_beams", "do_sample", "num_return_sequences")}
        )
        config = GenerationConfig(max_new_tokens=8, pad_token_id=0, eos_token_id=None, use_cache=cached, **options)
        torch.manual_seed(0)
        tokens.append(model.generate(ids, attention_mask=mask, generation_config=config))  # type: ignore[operator]
    assert torch.equal(*tokens)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_an_assistant_changes_no_token(name: str) -> None:
    model, assistant = filtered(name, "twicing"), filtered(name, "twicing", num_hidden_layers=1)
    ids = text(batch=1, length=9)
    config = GenerationConfig(max_new_tokens=8, pad_token_id=0, eos_token_id=None)
    wanted = model.generate(ids, generation_config=config)  # type: ignore[operator]
    assert torch.equal(model.generate(ids, generation_config=config, assistant_model=assistant), wanted)  # type: ignore[operator]


def test_generation_goes_on_with_the_returned_cache() -> None:
    model, ids = filtered("llama", "twicing"), text(length=9)
    config = GenerationConfig(max_new_tokens=4, pad_token_id=0, eos_token_id=None, return_dict_in_generate=True)
    first = model.generate(ids, generation_config=config)  # type: ignore[operator]
    turn = torch.cat((first.sequences, text(length=3)), dim=1)
    second = model.generate(turn, past_key_values=first.past_key_values, generation_config=config)  # type: ignore[operator]
    anew = model.generate(turn, generation_config=config)  # type: ignore[operator]
    assert torch.equal(second.sequences, anew.sequences)


@pytest.mark.parametrize("change", ["crop", "reorder", "repeat", "select", "reset"])
def test_streams_follow_what_happens_to_the_cache(change: str) -> None:
    model, ids = filtered("llama", "three steps"), text()
    cache = DynamicCache(config=model.config)
    decode(model, ids, None, cache, [9])
    kept, rest = ids[:, :9], ids[:, 9:]
    if change == "crop":
        cache.crop(-3)
        kept, rest = ids[:, :6], ids[:, 6:]
    elif change == "reorder":
        cache.reorder_cache(torch.tensor([1, 0]))
        kept = kept.flip(0)
    elif change == "repeat":
        cache.batch_repeat_interleave(2)
        kept, rest = (x.repeat_interleave(2, dim=0) for x in (kept, rest))
    elif change == "select":
        cache.batch_select_indices(torch.tensor([1]))
        kept, rest = kept[1:], rest[1:]
    else:
        cache.reset()
        kept, rest = ids[:, :0], ids
    whole = torch.cat((kept, rest), dim=1)
    with torch.no_grad():
        full = model(whole, use_cache=False).logits[:, kept.shape[1] :]
        found = model(rest, past_key_values=cache, use_cache=True).logits
    assert (found - full).abs().max() < 1e-12 * full.abs().max()


@pytest.mark.parametrize("make_cache", [dynamic, static])
@pytest.mark.parametrize("name", ["bart", "t5", "whisper"])
def test_decoders_with_an_encoder_decode_exactly(name: str, make_cache: Any) -> None:
    model, given = filtered(name, "twicing"), inputs(name)
    ids = given.pop("decoder_input_ids")
    with torch.no_grad():
        full = model(**given, decoder_input_ids=ids, use_cache=False).logits
        encoded = model.get_encoder()(**given)  # type: ignore[operator]
        cache = EncoderDecoderCache(make_cache(model.config), DynamicCache(config=model.config))
        steps = [
            model(
                encoder_outputs=encoded, decoder_input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True
            ).logits
            for i in range(ids.shape[1])
        ]
    assert (torch.cat(steps, dim=1) - full).abs().max() < 1e-12 * full.abs().max()


def test_a_cache_of_an_unfiltered_run_is_refused() -> None:
    model, ids = build("llama"), text()
    cache = DynamicCache(config=model.config)
    decode(model, ids, None, cache, [9])
    apply_filter(model, "twicing")
    with pytest.raises(
        ValueError, match=r"past_key_values holds tokens in layer 0 that were stored without the filter"
    ):
        decode(model, ids, None, cache, [5])


def test_compiled_steps_with_a_static_cache_are_one_graph() -> None:
    model, ids = filtered("llama", "twicing"), text()
    counter = CompileCounter()
    with torch.no_grad():
        full = model(ids, use_cache=False).logits
        cache = static(model.config)
        model(ids[:, :7], past_key_values=cache, use_cache=True)
        step = torch.compile(model, backend=counter, fullgraph=True)
        for i in range(7, 12):
            logits = step(ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits[:, 0]
            assert (logits - full[:, i]).abs().max() < 1e-12
    assert counter.frame_count == 1
