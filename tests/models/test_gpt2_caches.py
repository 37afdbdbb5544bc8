"""Every kind of cache that Transformers has serves every filter: the logits and tokens are those without a cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._subclasses import FakeTensorMode
from transformers import Cache, DynamicCache, EncoderDecoderCache, StaticCache, cache_utils
from transformers.cache_utils import DynamicSlidingWindowLayer, QuantizedLayer

from hf_imgproc_attn.models.cache_followed import FollowingStreams, follow_layer
from tests.models.test_gpt2_generation import assert_same_generation, build, generate, in_pieces, prompt
from tests.models.variants import IMPLEMENTATIONS, VARIANTS, pad, token_ids

pytestmark = pytest.mark.usefixtures("_no_gradient")


@pytest.fixture
def _no_gradient() -> Any:
    with torch.no_grad():
        yield


class ExactlyQuantisedLayer(QuantizedLayer):
    """A quantised cache that loses nothing, and needs no library."""

    def _quantize(self, tensor: torch.Tensor, axis: int) -> Any:
        if not tensor.numel():
            raise RuntimeError("no quantiser takes an empty tensor")
        return (tensor.clone(), axis)

    def _dequantize(self, q_tensor: Any) -> torch.Tensor:
        return q_tensor[0]


class FourBitLayer(QuantizedLayer):
    """A quantised cache of 4 bits a number, with a scale and a zero for each row."""

    def _quantize(self, tensor: torch.Tensor, axis: int) -> Any:
        low, high = tensor.amin(-1, keepdim=True), tensor.amax(-1, keepdim=True)
        scale = (high - low).clamp(min=1e-12) / 15
        return ((tensor - low) / scale).round().to(torch.uint8), scale, low

    def _dequantize(self, q_tensor: Any) -> torch.Tensor:
        codes, scale, low = q_tensor
        return codes * scale + low


def quantised(layer_class: type, layers: int = 3) -> Cache:
    return Cache(layers=[layer_class(residual_length=4) for _ in range(layers)])


KINDS: dict[str, Callable[[Any], Cache]] = {
    "plain": lambda config: DynamicCache(),
    "static": lambda config: StaticCache(config=config, max_cache_len=17),
    "quantised": lambda config: quantised(ExactlyQuantisedLayer, config.n_layer),
    "lazy": lambda config: Cache(layer_class_to_replicate=ExactlyQuantisedLayer),
}


CACHED = (*VARIANTS, "delta")
"""``delta`` reads the stream before it stores new rows in it."""


@pytest.mark.grid(
    variant=CACHED,
    kind=KINDS,
    pieces=[[9], [4, *[1] * 5], [3, 2, 1, 3], [1] * 9],
    padded=[True, False],
    implementation=IMPLEMENTATIONS,
)
def test_every_cache_gives_the_logits_of_none(
    variant: str, kind: str, pieces: list[int], padded: bool, implementation: str
) -> None:
    model, ids = build(variant, implementation), token_ids()
    inputs = pad(ids, row=1, length=6, side="left") if padded else {"input_ids": ids}
    visible = inputs["attention_mask"].bool() if padded else ...
    wanted = model(**inputs, use_cache=False).logits
    found = in_pieces(model, pieces, cache=KINDS[kind](model.config), ids=inputs.pop("input_ids"), **inputs)
    torch.testing.assert_close(found[visible], wanted[visible], rtol=0, atol=1e-10)


MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
}


@pytest.mark.sampled("kind,mode")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["static", "quantised", "plain"])
@pytest.mark.parametrize("variant", CACHED)
def test_every_cache_generates_what_none_does(variant: str, kind: str, mode: str) -> None:
    model = build(variant)
    if kind == "static":
        options: dict[str, Any] = {"cache_implementation": "static", "disable_compile": True}
    else:
        options = {"past_key_values": KINDS[kind](model.config)}
    wanted = generate(model, use_cache=False, **MODES[mode])
    assert_same_generation(generate(model, use_cache=True, **MODES[mode], **options), wanted)


FP8: dict[str, Any] = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}


def test_quantised_generation_by_name_is_close() -> None:
    """FP8 is the quantiser that torch brings: what it costs a filter is of the size of what it costs stock layers."""
    errors = {}
    if not hasattr(cache_utils, "Fp8QuantizedLayer"):  # Transformers 5.17 refuses the name
        with pytest.raises(ValueError, match="quantization backend `fp8`"):
            generate(build("twicing"), use_cache=True, **FP8)
        return
    for variant in ("softmax", "twicing", "bilateral_twicing", "elliptical"):
        model = build(variant).float()
        logits = [generate(model, use_cache=True, **options).logits[1] for options in ({}, FP8)]
        errors[variant] = float((logits[1] - logits[0]).norm() / logits[0].norm())
    assert all(0 < error < 0.1 for error in errors.values()), errors


@pytest.mark.parametrize("variant", ["bilateral_gaussian", "alibi", "t5_bias"])
def test_places_are_not_quantised(variant: str) -> None:
    """4 bits cannot tell 13 positions apart: every logit would be another one."""
    model, ids = build(variant), token_ids(length=13)
    cache = quantised(FourBitLayer)
    in_pieces(model, [9, 1, 1, 1, 1], ids, cache=cache)
    for layer in cache.layers:
        places = layer.filter_streams["places"].keys[0, 0, :, 0]
        assert torch.equal(places.diff(), torch.ones(12, dtype=places.dtype))


def test_streams_are_quantised_along_the_axis_of_values() -> None:
    layers = [ExactlyQuantisedLayer(residual_length=4, axis_key=0, axis_value=-1) for _ in range(3)]
    build("twicing")(token_ids(), past_key_values=Cache(layers=layers))
    for layer in layers:
        stream = layer.filter_streams["boost.1"]  # type: ignore[attr-defined]
        assert (layer._quantized_keys[1], layer._quantized_values[1], stream._quantized_keys[1]) == (0, -1, -1)


@pytest.mark.parametrize("variant", ["bilateral_twicing", "delta"])
def test_compiled_steps_with_a_static_cache_are_one_graph(variant: str) -> None:
    model, ids, counter = build(variant), token_ids(length=13), CompileCounter()
    wanted = model(ids, use_cache=False).logits
    cache = StaticCache(config=model.config, max_cache_len=17)
    model(ids[:, :7], past_key_values=cache)
    step = torch.compile(model, backend=counter, fullgraph=True)
    for i in range(7, 13):
        place = torch.full((2, 1), i)
        logits = step(ids[:, i : i + 1], position_ids=place, past_key_values=cache).logits[:, 0]
        assert (logits - wanted[:, i]).abs().max() < 1e-11
    assert counter.frame_count == 1


def test_a_static_cache_beside_cross_attention() -> None:
    model, ids = build("twicing", add_cross_attention=True), token_ids(length=13)
    other = torch.randn(2, 5, model.config.n_embd, dtype=torch.float64)
    wanted = model(ids, encoder_hidden_states=other, use_cache=False).logits
    cache = EncoderDecoderCache(StaticCache(config=model.config, max_cache_len=17), DynamicCache())
    parts = [
        model(part, encoder_hidden_states=other, past_key_values=cache).logits for part in ids.split([6, 1, 6], dim=1)
    ]
    torch.testing.assert_close(torch.cat(parts, dim=1), wanted, rtol=0, atol=1e-11)


@pytest.mark.parametrize("kind", ["plain", "quantised", "static"])
def test_offloaded_layers_bring_their_streams_back(kind: str) -> None:
    """An offloading cache moves a layer to the CPU as soon as keys and values are stored, before the streams are."""
    cache = KINDS[kind](build("twicing").config)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for length in range(1, 4):
            rows = torch.empty(2, 4, 1, 5, device="meta")  # stands for an accelerator
            layer = follow_layer(cache, 0, "twicing")
            layer.prefetch()
            # Early, so that the rows come while the layer before computes.
            assert all(stored.keys.device.type == "meta" for stored in layer.filter_streams.values())
            keys, _ = layer.update(rows, rows)
            layer.offload()
            streams = FollowingStreams(layer, keys.shape[-2])
            earlier = streams.earlier("boost.1", rows)
            assert (earlier is None) == (length == 1)
            assert earlier is None or (earlier.device, earlier.shape[-2] >= length - 1) == (rows.device, True)
            stream = streams.append("boost.1", rows)
            assert stream.device == keys.device == rows.device
            assert stream.shape == keys.shape == (2, 4, 17 if kind == "static" else length, 5)
            stored = layer.filter_streams["boost.1"]
            assert {part.keys.device.type for part in (layer, stored)} == {"cpu"}


def test_a_cache_that_forgets_tokens_is_refused() -> None:
    cache = Cache(layers=[DynamicSlidingWindowLayer(sliding_window=4) for _ in range(3)])
    with pytest.raises(ValueError, match=r"past_key_values forgets tokens in layer 0 \(DynamicSliding.*has no window"):
        build("twicing")(token_ids(), past_key_values=cache)
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("first", ["softmax", "sos", "three_steps"])
def test_a_cache_of_another_filter_is_refused(first: str) -> None:
    """Its rows are of other sums: a model that went on with them would be a third one."""
    cache = DynamicCache()
    build(first)(token_ids(), past_key_values=cache)
    how = "without the filter" if first == "softmax" else "with another filter"
    with pytest.raises(ValueError, match=f"past_key_values holds tokens in layer 0 that were stored {how}"):
        build("twicing")(token_ids(length=1), past_key_values=cache)
    cache.reset()
    model = build("twicing")
    torch.testing.assert_close(
        in_pieces(model, [5, 4], token_ids(), cache=cache), model(token_ids()).logits, rtol=0, atol=1e-11
    )


def test_tokens_that_came_without_the_filter_are_noticed() -> None:
    """A stock model may be given the cache of a filtered one, and then the filtered one again."""
    cache, twicing, stock = DynamicCache(), build("twicing"), build("softmax")
    for model in (twicing, stock):
        model(token_ids(length=2), past_key_values=cache)
    with pytest.raises(ValueError, match=r"layer 0 that were stored without the filter"):
        twicing(token_ids(length=1), past_key_values=cache)


def test_the_prompt_of_these_tests_is_padded() -> None:
    assert not prompt()["attention_mask"].all()


@pytest.mark.sampled("kind,dtype")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [None, "plain", "static"])
@pytest.mark.parametrize("variant", CACHED)
def test_half_precision_works_in_every_cache(variant: str, kind: str | None, dtype: torch.dtype) -> None:
    """The back-end of a prompt and that of a step may compute rows in different precision; a cache has one."""
    model, ids = build(variant), token_ids(length=13)
    wanted = model(ids, use_cache=False).logits
    model.to(dtype)
    whole = model(ids, use_cache=False).logits
    cache = None if kind is None else KINDS[kind](model.config)
    found = in_pieces(model, [5, *[1] * 8], ids, cache=cache)
    # Rounding alone moves the logits of the whole text; steps may not move them much further.
    assert (found - wanted).norm() <= 2 * (whole - wanted).norm()
