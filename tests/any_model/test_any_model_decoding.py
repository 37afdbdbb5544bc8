"""Cached decoding of filtered foreign models equals full recomputation, in every kind of cache and generation."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from transformers import Cache, DynamicCache, EncoderDecoderCache, GenerationConfig, StaticCache

from hf_imgproc_attn import apply_filter, remove_filter
from tests.any_model.architectures import DECODERS, build, inputs, padding, text
from tests.models.test_gpt2_caches import ExactlyQuantisedLayer, FourBitLayer

FILTERS: dict[str, dict[str, Any]] = {
    "twicing": {"preset": "twicing"},
    "three steps": {"preset": "twicing", "boosting_steps": 3},
    "sos": {"preset": "sos"},
    "delta": {"preset": "delta"},
    "learned gain": {"preset": "learned_twicing"},
    "elliptical": {"preset": "elliptical", "boosting": "twicing"},
    "neutreno": {"preset": "neutreno", "neutreno_lambda": 0.3},
    "pid": {"preset": "pidformer", "pid_gains": [0.5, 0.1, 0.1], "boosting": "twicing"},
    "value residual": {"preset": "value_residual", "boosting": "twicing"},
    "alibi": {"preset": "alibi", "boosting": "twicing"},
    "buckets": {"preset": "t5_bias"},
    "gaussian": {
        "content_kernel": "gaussian",
        "position_kernel": "gaussian",
        "learn_bandwidths": True,
        "boosting": "twicing",
    },
}


def filtered(name: str, which: str, seed: int = 0, **changes: Any) -> nn.Module:
    """A filtered model whose learned scalars are not where they start."""
    model = apply_filter(build(name, seed, **changes), **FILTERS[which])
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "scalar_bias" in key:
                parameter.add_(torch.rand(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


CACHES: dict[str, Callable[[Any], Cache]] = {
    "dynamic": lambda config: DynamicCache(config=config),
    "plain": lambda config: DynamicCache(),
    "static": lambda config: StaticCache(config=config, max_cache_len=20),
    "quantised": lambda config: Cache(layer_class_to_replicate=partial(ExactlyQuantisedLayer, residual_length=4)),
}

CHUNKS = {"token by token": [7, 1, 1, 1, 1, 1, 1, 1], "in chunks": [3, 5, 1, 4, 1], "prompt of one": [1] * 14}


def possible(name: str, which: str) -> str:
    """The filter, or twicing where the model's values or logits do not suit it."""
    impossible = {"deepseek_v3": ("elliptical",), "gemma2": ("gaussian",), "gpt_oss": ("gaussian",)}
    return "twicing" if which in impossible.get(name, ()) else which


def decode(model: nn.Module, given: dict[str, torch.Tensor], cache: Cache, chunks: list[int]) -> torch.Tensor:
    """Logits of a text that comes in chunks."""
    logits, start = [], 0
    with torch.no_grad():
        for size in chunks:
            part = {
                name: x[:, : start + size] if name == "attention_mask" else x[:, start : start + size]
                for name, x in given.items()
            }
            logits.append(model(**part, past_key_values=cache, use_cache=True).logits)
            start += size
    return torch.cat(logits, dim=1)


def given_text(padded: bool, own_places: bool) -> dict[str, torch.Tensor]:
    """A text, perhaps with padding on the left, perhaps with places that leave it out."""
    ids = text()
    mask = padding(ids, left=True) if padded else torch.ones_like(ids)
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    return {
        "input_ids": ids,
        **({"attention_mask": mask} if padded or own_places else {}),
        **({"position_ids": places} if own_places else {}),
    }


@pytest.mark.grid(
    name=DECODERS, which=FILTERS, cache=CACHES, chunks=CHUNKS, padded=[True, False], own_places=[False, True]
)
def test_every_filter_in_every_decoder_and_cache_decodes_exactly(
    name: str, which: str, cache: str, chunks: str, padded: bool, own_places: bool
) -> None:
    model, given = filtered(name, possible(name, which)), given_text(padded, own_places)
    with torch.no_grad():
        full = model(**given, use_cache=False).logits
    found = decode(model, given, CACHES[cache](model.config), CHUNKS[chunks])
    visible = given["attention_mask"].bool() if "attention_mask" in given else ...
    assert (found - full)[visible].abs().max() < 1e-12 * full[visible].abs().max()


STATIC = {"cache_implementation": "static", "disable_compile": True}
SAMPLED = {"do_sample": True, "num_return_sequences": 3}
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sampled": SAMPLED,
    "static": STATIC,
    "static beams": {**STATIC, "num_beams": 3},
    "static sampled": {**STATIC, **SAMPLED},
    "chunked prefill": {"prefill_chunk_size": 4},
    "static chunked prefill": {**STATIC, "prefill_chunk_size": 4},
    "quantised": {},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "filtered assistant": {},
    "stock assistant": {},
}
"""Ways to generate: fields of a ``GenerationConfig``, and what the test makes of the name."""

ASSISTANTS_FAIL = not hasattr(Cache, "is_recording_past")
"""Whether stock models with windows in some of their layers fail as assistants, as in Transformers 5.17."""

TEXT_MODELS = ("gpt2", "llama", "mistral", "gemma3", "qwen3", "gpt_neox", "deepseek_v3", "gemma2", "gpt_oss")


def generate(model: Any, given: dict[str, torch.Tensor], options: dict[str, Any], **calls: Any) -> Any:
    config = GenerationConfig(
        max_new_tokens=5,
        pad_token_id=0,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )
    torch.manual_seed(0)
    return model.generate(**given, generation_config=config, **calls)


def assert_same(found: Any, wanted: Any) -> None:
    """The same tokens, of the same logits."""
    assert torch.equal(found.sequences, wanted.sequences)
    for mine, theirs in zip(found.logits, wanted.logits, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)  # generation hands them out in single precision


@pytest.mark.grid(name=TEXT_MODELS, mode=MODES, which=["twicing", "three steps", "alibi", "pid", "delta"])
def test_generation_gives_the_tokens_of_full_recomputation(name: str, mode: str, which: str) -> None:
    model = filtered(name, which)
    alone = "assistant" in mode or mode == "prompt lookup"  # for one text at a time
    given = {key: x[:, :9] for key, x in given_text(not alone, alone).items() if key != "position_ids"}
    given = {key: x[:1] for key, x in given.items()} if alone else given
    calls: dict[str, Any] = {}
    if "assistant" in mode:
        calls["assistant_model"] = build(name, seed=1)
        if mode == "filtered assistant":
            apply_filter(calls["assistant_model"], "sos")
    if mode == "quantised":
        calls["past_key_values"] = CACHES["quantised"](model.config)
    if mode == "stock assistant" and ASSISTANTS_FAIL and name in ("gemma2", "gemma3"):
        with pytest.raises(RuntimeError):
            generate(build(name), given, {}, **calls)
        return
    same = {key: value for key, value in MODES[mode].items() if key in ("num_beams", *SAMPLED)}
    wanted = generate(model, given, {"use_cache": False, **same})
    assert_same(generate(model, given, MODES[mode], **calls), wanted)


@pytest.mark.grid(
    name=["bart", "t5"],
    mode=["greedy", "beams", "sampled", "static", "static beams", "filtered assistant"],
    which=["twicing", "three steps"],
)
def test_decoders_with_an_encoder_generate_what_they_do_without_a_cache(name: str, mode: str, which: str) -> None:
    model, alone = filtered(name, which), mode == "filtered assistant"
    given = {"input_ids": text(batch=1 if alone else 2, length=9)}
    same = {key: value for key, value in MODES[mode].items() if key in ("num_beams", *SAMPLED)}
    calls = {"assistant_model": filtered(name, "sos")} if alone else {}
    wanted = generate(model, given, {"use_cache": False, **same})
    assert_same(generate(model, given, MODES[mode], **calls), wanted)


@pytest.mark.parametrize("mode", ["greedy", "static"])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_generation_goes_on_with_the_returned_cache(name: str, mode: str) -> None:
    model, given = filtered(name, "three steps"), {"input_ids": text(batch=1, length=9)}
    first = generate(model, given, {**MODES[mode], **({"max_cache_len": 40} if mode == "static" else {})})
    turn = {"input_ids": torch.cat((first.sequences, text(batch=1, length=3)), dim=1)}
    second = generate(model, turn, {"disable_compile": True}, past_key_values=first.past_key_values)
    assert_same(second, generate(model, turn, {"use_cache": False}))


@pytest.mark.parametrize("which", ["three steps", "delta"])
@pytest.mark.parametrize("change", ["crop", "reorder", "repeat", "select", "reset", "copy"])
def test_streams_follow_what_happens_to_the_cache(change: str, which: str) -> None:
    model, ids = filtered("llama", which), text()
    cache = DynamicCache(config=model.config)
    decode(model, {"input_ids": ids}, cache, [9])
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
    elif change == "copy":  # one prompt for several texts
        cache, used = copy.deepcopy(cache), cache
        decode(model, {"input_ids": rest.flip(1)}, used, [5])
    else:
        cache.reset()
        kept, rest = ids[:, :0], ids
    whole = torch.cat((kept, rest), dim=1)
    with torch.no_grad():
        full = model(whole, use_cache=False).logits[:, kept.shape[1] :]
        found = model(rest, past_key_values=cache, use_cache=True).logits
    assert (found - full).abs().max() < 1e-12 * full.abs().max()


@pytest.mark.parametrize("which", ["three steps", "delta"])
@pytest.mark.parametrize("used_before", [None, "sos", "twicing"])
def test_a_window_that_is_rolled_back_keeps_its_rows(used_before: str | None, which: str) -> None:
    """As when an assistant guesses wrong, in a cache that was there before it began, perhaps with fewer streams."""
    model, given = filtered("mistral", which), given_text(False, False)
    cache = DynamicCache(config=model.config)
    if used_before:
        decode(filtered("mistral", used_before), given, cache, [4])
        cache.reset()
    else:
        decode(model, given, cache, [4])
    cache.activate_past_recording()
    start = cache.get_seq_length()
    parts = []
    with torch.no_grad():
        full = model(**given, use_cache=False).logits
        for stop, guessed in ((9, 0), (12, 2), (14, 0)):
            parts.append(model(given["input_ids"][:, start:stop], past_key_values=cache, use_cache=True).logits)
            cache.crop(-guessed)
            start = stop - guessed
            assert (parts[-1] - full[:, stop - parts[-1].shape[1] : stop]).abs().max() < 1e-12 * full.abs().max()


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", ["bart", "t5", "whisper"])
def test_decoders_with_an_encoder_decode_exactly(name: str, cache: str) -> None:
    model, given = filtered(name, "twicing"), inputs(name)
    ids = given.pop("decoder_input_ids")
    with torch.no_grad():
        full = model(**given, decoder_input_ids=ids, use_cache=False).logits
        encoded = model.get_encoder()(**given)  # type: ignore[operator]
        both = EncoderDecoderCache(CACHES[cache](model.config), DynamicCache(config=model.config))
        steps = [
            model(encoder_outputs=encoded, decoder_input_ids=piece, past_key_values=both, use_cache=True).logits
            for piece in ids.split([6] + [1] * 8, dim=1)
        ]
    assert (torch.cat(steps, dim=1) - full).abs().max() < 1e-12 * full.abs().max()


@pytest.mark.parametrize("cache", CACHES)
def test_a_cache_of_an_unfiltered_run_is_refused(cache: str) -> None:
    model, given = build("llama"), given_text(False, False)
    filled = CACHES[cache](model.config)
    decode(model, given, filled, [9])
    apply_filter(model, "twicing", layers=[1])
    with pytest.raises(ValueError, match=r"layer 1 that were stored without the filter"):
        decode(model, given, filled, [5])


def test_a_cache_of_another_filter_or_of_other_layers_is_refused() -> None:
    given = given_text(False, False)
    cache = DynamicCache()
    decode(apply_filter(build("llama"), "twicing", layers=[0]), given, cache, [9])
    with pytest.raises(ValueError, match=r"layer 0 that were stored with another filter \(.*twicing \(2\).*sos \(3\)"):
        decode(apply_filter(build("llama"), "sos"), given, cache, [5])
    with pytest.raises(ValueError, match=r"layer 1 that were stored without the filter"):
        decode(apply_filter(build("llama"), "twicing"), given, cache, [5])


def test_tokens_that_came_without_the_filter_are_noticed() -> None:
    model, given, cache = apply_filter(build("llama"), "twicing"), given_text(False, False), DynamicCache()
    decode(model, given, cache, [4])
    decode(remove_filter(model), given, cache, [4])
    apply_filter(model, "twicing")
    with pytest.raises(ValueError, match=r"layer 0 that were stored without the filter"):
        decode(model, given, cache, [4])
    cache.reset()
    decode(model, given, cache, [4])


@pytest.mark.parametrize("kind", CACHES)
def test_a_cache_of_another_model_with_the_same_filter_is_refused(kind: str) -> None:
    model, other, given = filtered("llama", "twicing"), filtered("llama", "twicing", seed=1), given_text(False, False)
    cache = CACHES[kind](model.config)
    decode(model, given, cache, [5])
    for filled in (cache, copy.deepcopy(cache)):
        with pytest.raises(ValueError, match="in layer 0 that were stored by another model"):
            decode(other, given, filled, [2])
    cache.reset()
    decode(other, given, cache, [5])


def test_a_cache_of_the_same_model_with_the_filter_in_other_layers_is_refused() -> None:
    model, given, cache = apply_filter(build("llama"), "twicing"), given_text(False, False), DynamicCache()
    decode(model, given, cache, [5])
    apply_filter(remove_filter(model), "twicing", layers=[1])
    with pytest.raises(ValueError, match=r"with the filter in layers 0, 1, 2 \(here 1\)"):
        decode(model, given, cache, [2])


@pytest.mark.parametrize("kind", CACHES)
def test_copies_of_a_model_go_on_with_each_others_cache(kind: str) -> None:
    """As where one copy reads the prompt and another goes on, in this process or in the next."""
    model, ids = filtered("llama", "three steps"), text()
    copied, cache = copy.deepcopy(model), CACHES[kind](model.config)
    with torch.no_grad():
        full = model(ids, use_cache=False).logits[:, 9:]
    decode(model, {"input_ids": ids}, cache, [9])
    caches = [copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))]
    del model
    for filled in (*caches, cache):
        found = decode(copied, {"input_ids": ids[:, 9:]}, filled, [2, 3])
        assert (found - full).abs().max() < 1e-12 * full.abs().max()


def test_a_model_keeps_no_cache_alive() -> None:
    """It would hold the memory of a text that nobody goes on with."""
    model, cache = filtered("llama", "twicing"), DynamicCache()
    decode(model, given_text(False, False), cache, [4])
    layers = [weakref.ref(layer) for layer in cache.layers]
    del cache
    gc.collect()
    assert [layer() for layer in layers] == [None] * 3


def test_layers_without_rows_take_any_cache() -> None:
    """A filter that keeps nothing beside keys and values goes on where the stock model was."""
    model, given = build("llama"), given_text(False, False)
    cache = DynamicCache()
    decode(model, given, cache, [9])
    apply_filter(model, content_kernel="gaussian", layers=[-1])
    with torch.no_grad():
        full = model(**given, use_cache=False).logits[:, 9:]
        found = model(given["input_ids"][:, 9:], past_key_values=cache).logits
    assert (found - full).abs().max() < 1e-12 * full.abs().max()


def test_a_compiled_prompt_fills_a_cache() -> None:
    """Nothing has come into it before: what keeps the rows is made while the code is compiled, in one graph."""
    model, ids = filtered("llama", "twicing", num_hidden_layers=1), text()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        full = model(ids, use_cache=False).logits[:, 9:]
        cache = CACHES["static"](model.config)
        compiled(ids[:, :9], past_key_values=cache, use_cache=True)
        found = model(ids[:, 9:], past_key_values=cache, use_cache=True).logits
    assert (found - full).abs().max() < 1e-12 * full.abs().max()


def count_graphs(model: nn.Module) -> int:
    """How many graphs some decoding steps with a static cache are compiled to, which are exact."""
    ids, counter = text(), CompileCounter()
    torch._dynamo.reset()
    with torch.no_grad():
        full = model(ids, use_cache=False).logits
        cache = CACHES["static"](model.config)
        model(ids[:, :7], past_key_values=cache, use_cache=True)
        step = torch.compile(model, backend=counter, fullgraph=True)
        for i in range(7, 12):
            logits = step(ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits[:, 0]
            assert (logits - full[:, i]).abs().max() < 1e-12
    return counter.frame_count


@pytest.mark.parametrize("sliding", [False, True])
def test_compiled_steps_with_a_static_cache_are_the_graphs_of_the_stock_model(
    sliding: bool, request: pytest.FixtureRequest
) -> None:
    """One graph, compiled once; of a sliding cache as many as Transformers needs itself when its window fills."""
    if not sliding:
        assert count_graphs(build("llama")) == count_graphs(filtered("llama", "three steps")) == 1
        return
    # Gemma 3 has layers of both kinds, and takes as long as the other two together.
    for name in ("mistral", "gemma3") if request.config.getoption("--full") else ("mistral",):
        assert count_graphs(filtered(name, "three steps")) == count_graphs(build(name))


def test_rows_in_a_quantised_cache_are_quantised_along_the_axis_of_values() -> None:
    """A cache may quantise keys along another axis, as is best for keys."""
    cache = Cache(layers=[ExactlyQuantisedLayer(residual_length=2, axis_key=1, axis_value=0) for _ in range(3)])
    decode(filtered("llama", "twicing"), given_text(False, False), cache, CHUNKS["token by token"])
    for layer in cache.layers:
        assert layer._quantized_keys[1] == 1
        assert {stream._quantized_keys[1] for stream in layer.filter_streams.values()} == {0}


def test_quantised_streams_cost_what_quantised_values_do() -> None:
    """4 bits a number: whole streams beside quantised values would hardly be better."""
    given = given_text(False, False)
    errors = {}
    for name, preset in (("stock", None), ("filtered", "twicing")):
        model = build("llama")
        if preset:
            apply_filter(model, preset, layers=[-1])
        with torch.no_grad():
            full = model(**given, use_cache=False).logits
        cache = Cache(layers=[FourBitLayer(residual_length=2) for _ in range(3)])
        error = decode(model, given, cache, CHUNKS["token by token"]) - full
        errors[name] = float(error.norm() / full.norm())
    assert 0 < errors["filtered"] < 2 * errors["stock"] < 1, errors


@pytest.mark.parametrize("name", ["offloaded", "offloaded_static"])
def test_offloading_without_an_accelerator_is_refused(name: str) -> None:
    """Where Transformers says that torch was not compiled with CUDA."""
    model = filtered("llama", "twicing")
    with pytest.raises(ValueError, match=f"cache_implementation={name!r} needs an accelerator, got a model on 'cpu'"):
        model.generate(text(), max_new_tokens=2, cache_implementation=name)  # type: ignore[operator]


def test_continuous_batching_is_refused_before_it_begins() -> None:
    model: Any = filtered("llama", "twicing")
    for call in (
        lambda: model.generate_batch([[3, 4, 5]]),
        lambda: model.init_continuous_batching(),
        lambda: model.generate(text(), cache_implementation="paged", max_new_tokens=1),
    ):
        with pytest.raises(ValueError, match=r"continuous batching keeps .* model.layers.0.self_attn: use generate"):
            call()
    whole: Any = build("llama")
    apply_filter(whole.model, "twicing")
    with pytest.raises(ValueError, match="continuous batching keeps its cache in pages"):
        whole.generate_batch([[3, 4, 5]])


@pytest.mark.grid(dtype=[torch.bfloat16, torch.float16], which=FILTERS, kind=["dynamic", "plain", "static"])
def test_half_precision_keeps_rows_in_one_precision(dtype: torch.dtype, which: str, kind: str) -> None:
    """The back-end of a prompt and that of a step may compute rows in different precision; a cache has one."""
    model = filtered("llama", which).to(dtype)
    cache, given = CACHES[kind](model.config), {"input_ids": text()}
    found = decode(model, given, cache, CHUNKS["token by token"])
    rows = [
        stream.keys.dtype
        for layer in cache.layers
        for name, stream in layer.filter_streams.items()
        if name.startswith("boost")
    ]
    assert (not rows) == (which in ("neutreno", "buckets"))
    assert len(set(rows)) <= 1, "one precision, that of the first rows"
    with torch.no_grad():
        wanted = filtered("llama", which)(**given, use_cache=False).logits
        whole = model(**given, use_cache=False).logits
    # Rounding alone moves the logits of the whole text; steps may not move them much further.
    assert (found - wanted).norm() <= 2 * (whole - wanted).norm()
