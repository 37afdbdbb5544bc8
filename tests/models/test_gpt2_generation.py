"""Decoding with a cache is decoding without one: logits within rounding, token by token, in every way to choose."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from transformers import DynamicCache, EncoderDecoderCache, GPT2Config, GPT2LMHeadModel, StaticCache

from hf_imgproc_attn.models.boost_operators import extra_streams
from hf_imgproc_attn.models.cache_layer import FilterDynamicLayer
from hf_imgproc_attn.models.modeling_imgproc_gpt2 import ImgProcGPT2LMHeadModel
from hf_imgproc_attn.models.spec_axes import uses_position_table
from tests.models.helpers import GPT2, sharpen_
from tests.models.variants import BOOSTED, IMPLEMENTATIONS, VARIANTS, VOCABULARY, gpt2_config, pad, token_ids

pytestmark = pytest.mark.both_back_ends

NEW = 5


def build(variant: str, implementation: str = "sdpa", **overrides: Any) -> ImgProcGPT2LMHeadModel:
    """A sharpened language model in float64 that never meets its end token, with longer positions where they end."""
    config = gpt2_config(variant, attn_implementation=implementation, pad_token_id=0, **overrides)
    model = sharpen_(ImgProcGPT2LMHeadModel(config)).eval().double()
    model.generation_config.eos_token_id = None
    return model


def prompt(padded: bool = True) -> dict[str, torch.Tensor]:
    """Two rows of nine tokens, the second with three tokens of padding on its left."""
    inputs = pad(token_ids(), row=1, length=6, side="left") if padded else {"input_ids": token_ids()}
    inputs.pop("position_ids", None)
    return inputs


def generate(model: Any, *, use_cache: bool, seed: int = 0, **options: Any) -> Any:
    """`generate` with scores and logits, from the padded prompt unless another is given."""
    torch.manual_seed(seed)
    options = {**({} if "input_ids" in options or "inputs_embeds" in options else prompt()), **options}
    return model.generate(
        **{"max_new_tokens": NEW, "do_sample": False, **options},
        use_cache=use_cache,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )


def assert_same_generation(got: Any, wanted: Any) -> None:
    """The same tokens, from the same logits and scores."""
    assert got.sequences.tolist() == wanted.sequences.tolist()
    assert len(got.logits) == len(wanted.logits)
    for name in ("logits", "scores"):
        for left, right in zip(got[name], wanted[name], strict=True):
            torch.testing.assert_close(left.double(), right.double(), rtol=1e-6, atol=1e-6)
    if "sequences_scores" in wanted:
        torch.testing.assert_close(got.sequences_scores, wanted.sequences_scores, rtol=1e-6, atol=1e-6)


def in_pieces(
    model: Any, pieces: list[int], ids: torch.Tensor, cache: Any = None, **inputs: torch.Tensor
) -> torch.Tensor:
    """Logits of a text that is fed in pieces of given lengths, through a cache."""
    start = 0 if cache is None else cache.get_seq_length()
    logits = []
    for length in pieces:
        part = {"input_ids": ids[:, start : start + length]}
        for name, value in inputs.items():
            part[name] = value[:, : start + length] if name == "attention_mask" else value[:, start : start + length]
        output = model(**part, past_key_values=cache, use_cache=True)
        cache, start = output.past_key_values, start + length
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


# --------------------------------------------------------------------------------------------------------------------
# Logits
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.sampled("variant,implementation")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("pieces", [[1] * 9, [9], [4, *[1] * 5], [3, 2, 1, 3], [1, 8], [2, 2, 2, 3]])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_cached_logits_are_the_uncached_ones(variant: str, pieces: list[int], implementation: str) -> None:
    model, ids = build(variant, implementation), token_ids()
    wanted = model(ids, use_cache=False).logits
    torch.testing.assert_close(in_pieces(model, pieces, ids), wanted, rtol=0, atol=1e-11)
    single = model.float()
    torch.testing.assert_close(in_pieces(single, pieces, ids), wanted.float(), rtol=1e-3, atol=1e-3)


@pytest.mark.sampled("variant,implementation")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("pieces", [[5, *[1] * 5], [4, 3, 1, 2]])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_cached_logits_with_padding(variant: str, side: str, pieces: list[int], implementation: str) -> None:
    """Against the row alone, without padding and without a cache."""
    model, ids = build(variant, implementation), token_ids(length=10)
    length = 7 if side == "left" else 3
    inputs = pad(ids, row=1, length=length, side=side)
    if side == "right":
        # The text goes on after its padding, as it does when prompts of a batch are padded on the right.
        inputs["input_ids"][1, 5:], inputs["attention_mask"][1, 5:] = ids[1, 3:8], 1
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    real = inputs["attention_mask"].bool()
    got = in_pieces(
        model,
        pieces,
        inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        position_ids=inputs["position_ids"],
    )
    for row in range(2):
        alone = model(inputs["input_ids"][row, real[row]].unsqueeze(0), use_cache=False).logits[0]
        torch.testing.assert_close(got[row, real[row]], alone, rtol=0, atol=1e-10)


@pytest.mark.sampled
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_cached_logits_with_custom_positions(variant: str, implementation: str) -> None:
    """Keys remember the position that they were given, also where positions jump, repeat or go back."""
    model, ids = build(variant, implementation), token_ids(length=8)
    positions = torch.tensor([[3, 6, 9, 9, 2, 0, 23, 22], [0, 0, 1, 5, 7, 8, 9, 11]])
    mask = torch.ones(2, 8, dtype=torch.long)
    wanted = model(ids, position_ids=positions, attention_mask=mask, use_cache=False).logits
    for pieces in ([1] * 8, [4, 1, 3]):
        got = in_pieces(model, pieces, ids, position_ids=positions, attention_mask=mask)
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-11)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_half_precision_cache_keeps_positions(variant: str) -> None:
    """bfloat16 has no number 257: a cached key far into the text must still know where it is."""
    free = not uses_position_table(gpt2_config(variant))
    length = 270 if free else 24
    ids = token_ids(batch=1, length=length)
    for dtype, tolerance in ((torch.bfloat16, 0.06), (torch.float16, 0.01)):
        model = build(variant).to(dtype)
        wanted = model.double()(ids, use_cache=False).logits[:, -8:]
        got = in_pieces(model.to(dtype), [length - 8, *[1] * 8], ids)[:, -8:]
        assert (got.double() - wanted).norm() / wanted.norm() < tolerance


@pytest.mark.sampled
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_cached_logits_with_an_encoder(variant: str, implementation: str) -> None:
    model, ids = build(variant, implementation, add_cross_attention=True), token_ids(length=5)
    encoder = {
        "encoder_hidden_states": torch.randn(2, 4, model.config.n_embd, dtype=torch.float64),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
    }
    wanted = model(ids, **encoder, use_cache=False).logits
    for cache in (None, DynamicCache(config=model.config)):
        logits = []
        for position in range(5):
            output = model(ids[:, position : position + 1], **encoder, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits.append(output.logits)
        assert isinstance(cache, EncoderDecoderCache)
        torch.testing.assert_close(torch.cat(logits, dim=1), wanted, rtol=0, atol=1e-11)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_flow_through_a_cache(variant: str) -> None:
    """Two pieces with a graph through the cache: the gradients of one pass."""
    model, ids = build(variant), token_ids()
    results = []
    for pieces in ([9], [5, 4]):
        model.zero_grad()
        in_pieces(model, pieces, ids).sin().sum().backward()
        results.append({name: value.grad.clone() for name, value in model.named_parameters()})
    for name, gradient in results[0].items():
        torch.testing.assert_close(results[1][name], gradient, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("variant", BOOSTED)
def test_boosted_layers_keep_streams_and_others_none(variant: str) -> None:
    model = build(variant)
    cache = model(token_ids()).past_key_values
    for index, (spec, layer) in enumerate(zip(model.config.layer_specs, cache.layers, strict=True)):
        streams = list(getattr(layer, "streams", {}).values())
        metric = spec.content_kernel == "elliptical" and index > 0
        # The filter of each round of gradient boosting has a metric of its own.
        metrics = metric * (spec.boosting_steps if spec.boosting == "gradient_boosted" else 1)
        assert len(streams) == extra_streams(spec.boosting, spec.boosting_steps) + metrics
        assert all(stream.shape == (2, 4, 9, 5) for stream in streams)


# --------------------------------------------------------------------------------------------------------------------
# generate
# --------------------------------------------------------------------------------------------------------------------

GENERATION: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.3, "top_k": 20},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 4, "num_return_sequences": 3},
    "beams with penalties": {"num_beams": 3, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "sampled beams": {"num_beams": 3, "do_sample": True},
    "min_p": {"do_sample": True, "min_p": 0.05, "epsilon_cutoff": 0.01},
}


@pytest.mark.sampled("variant,implementation")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("how", GENERATION)
@pytest.mark.parametrize("variant", VARIANTS)
def test_generation_with_the_cache_is_generation_without(variant: str, how: str, implementation: str) -> None:
    model = build(variant, implementation)
    wanted = generate(model, use_cache=False, **GENERATION[how])
    assert_same_generation(generate(model, use_cache=True, **GENERATION[how]), wanted)
    assert wanted.sequences.shape[1] == 9 + NEW


@pytest.mark.parametrize("variant", VARIANTS)
def test_left_padding_does_not_change_what_is_generated(variant: str) -> None:
    model = build(variant)
    padded = generate(model, use_cache=True).sequences[1, 3:]
    alone = generate(model, use_cache=True, input_ids=token_ids()[1:, :6]).sequences[0]
    assert padded.tolist() == alone.tolist()


def test_softmax_generates_like_the_stock_model() -> None:
    for how, options in GENERATION.items():
        stock = sharpen_(GPT2LMHeadModel(GPT2Config(**GPT2, pad_token_id=0))).eval().double()
        stock.generation_config.eos_token_id = None
        wanted = generate(stock, use_cache=True, **options)
        got = generate(build("softmax"), use_cache=True, **options)
        assert got.sequences.tolist() == wanted.sequences.tolist(), how
        assert all(torch.equal(left, right) for left, right in zip(got.logits, wanted.logits, strict=True)), how


@pytest.mark.sampled
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("cache", [True, False])
def test_generation_from_embeddings(variant: str, cache: bool) -> None:
    model = build(variant)
    wanted = generate(model, use_cache=False)
    inputs = prompt()
    embedded = {
        "inputs_embeds": model.transformer.wte(inputs["input_ids"]),
        "attention_mask": inputs["attention_mask"],
    }
    got = generate(model, use_cache=cache, **embedded)
    assert got.sequences[:, -NEW:].tolist() == wanted.sequences[:, -NEW:].tolist()


@pytest.mark.parametrize("variant", VARIANTS)
def test_generation_with_custom_positions(variant: str) -> None:
    """The library counts on from the last position that was given."""
    model = build(variant)
    positions = torch.tensor([[2, 3, 4, 5, 6, 7, 8, 9, 13], [0, 0, 0, 0, 1, 2, 4, 5, 6]])
    got, wanted, other = (
        generate(model, use_cache=cache, **({} if ids is None else {"position_ids": ids}))
        for cache, ids in ((True, positions), (False, positions), (False, None))
    )
    assert_same_generation(got, wanted)
    sees_positions = any(spec.position_kernel != "none" for spec in model.config.layer_specs)
    assert ((wanted.logits[0] - other.logits[0]).abs().max() > 1e-3) == sees_positions


@pytest.mark.sampled
@pytest.mark.parametrize("chunk", [1, 4, 9, 50])
@pytest.mark.parametrize("variant", VARIANTS)
def test_prompts_may_be_read_in_chunks(variant: str, chunk: int) -> None:
    model = build(variant)
    assert_same_generation(generate(model, use_cache=True, prefill_chunk_size=chunk), generate(model, use_cache=False))


@pytest.mark.sampled
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_rejected_candidates_leave_the_cache(variant: str, implementation: str) -> None:
    """Prompt lookup and an assistant model propose tokens; what is not accepted is cropped, streams included."""
    model = build(variant, implementation)
    ids = token_ids(batch=1, length=5).repeat(1, 2)
    wanted = generate(model, use_cache=False, input_ids=ids, max_new_tokens=6).sequences
    lookup = generate(model, use_cache=True, input_ids=ids, max_new_tokens=6, prompt_lookup_num_tokens=3).sequences
    assert lookup.tolist() == wanted.tolist()
    assistant = sharpen_(build(variant, implementation, n_layer=3), seed=0)
    with torch.no_grad():
        assistant.transformer.h[2].mlp.c_proj.weight += 0.05
    for proposing in (assistant, build("softmax", implementation)):
        proposing.generation_config.num_assistant_tokens = 3
        got = generate(model, use_cache=True, input_ids=ids, max_new_tokens=6, assistant_model=proposing).sequences
        assert got.tolist() == wanted.tolist()


@pytest.mark.parametrize("variant", VARIANTS)
def test_generation_continues_from_a_returned_cache(variant: str) -> None:
    model = build(variant)
    whole = generate(model, use_cache=False).sequences
    inputs = prompt()
    first = generate(model, use_cache=True, max_new_tokens=3)
    mask = torch.cat((inputs["attention_mask"], inputs["attention_mask"].new_ones(2, 3)), dim=1)
    second = generate(
        model, use_cache=True, input_ids=first.sequences, attention_mask=mask, past_key_values=first.past_key_values,
        max_new_tokens=NEW - 3,
    )  # fmt: skip
    assert second.sequences.tolist() == whole.tolist()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_read_prompt_may_be_used_again_and_again(variant: str) -> None:
    """A copy of the prompt's cache for every continuation, as chat servers keep a system prompt."""
    model, ids = build(variant), token_ids(batch=1, length=12)
    with torch.no_grad():
        cache = model(ids[:, :6]).past_key_values
        for seed in (3, 4):
            text = torch.cat((ids[:, :6], token_ids(batch=1, length=5, seed=seed)), dim=1)
            got = in_pieces(model, [2, 1, 2], text, cache=copy.deepcopy(cache))
            torch.testing.assert_close(got, model(text, use_cache=False).logits[:, 6:], rtol=0, atol=1e-11)
    assert cache.get_seq_length() == 6


@pytest.mark.parametrize("variant", VARIANTS)
def test_stopped_rows_do_not_disturb_the_others(variant: str) -> None:
    """The end token in one row is followed by padding while the other goes on."""
    model = build(variant)
    free = generate(model, use_cache=False).sequences
    model.generation_config.eos_token_id = int(free[0, 11])
    got, wanted = (generate(model, use_cache=cache).sequences for cache in (True, False))
    assert got.tolist() == wanted.tolist()


# --------------------------------------------------------------------------------------------------------------------
# What is done to caches
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.sampled
@pytest.mark.parametrize("operation", ["crop", "crop to nothing", "reorder", "repeat", "select", "reset", "copy"])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_cache_operations_reach_everything_that_is_cached(variant: str, operation: str) -> None:
    model, ids = build(variant), token_ids(batch=3, length=10)
    cache = model(ids[:, :7]).past_key_values
    if operation == "crop":
        cache.crop(-3)
        ids = torch.cat((ids[:, :4], ids[:, 7:]), dim=1)
    elif operation == "crop to nothing":
        cache.crop(-7)
        ids = ids[:, 7:]
    elif operation == "reorder":
        order = torch.tensor([2, 0, 0])
        cache.reorder_cache(order)
        ids = ids[order]
    elif operation == "repeat":
        cache.batch_repeat_interleave(2)
        ids = ids.repeat_interleave(2, dim=0)
    elif operation == "select":
        cache.batch_select_indices(torch.tensor([2, 1]))
        ids = ids[[2, 1]]
    elif operation == "reset":
        cache.reset()
        ids = ids[:, 7:]
    else:
        cache = copy.deepcopy(cache)
    start = cache.get_seq_length()
    if operation == "reset" and any(layer.get_seq_length() for layer in cache.layers):
        return  # Transformers 5.17 writes zeros over what plain layers hold and keeps its length
    got = in_pieces(model, [1, ids.shape[1] - start - 1], ids, cache=cache)
    torch.testing.assert_close(got, model(ids, use_cache=False).logits[:, start:], rtol=0, atol=1e-11)


def test_crop_of_nothing_changes_nothing() -> None:
    model, ids = build("twicing"), token_ids()
    cache = model(ids[:, :5]).past_key_values
    cache.crop(0)
    torch.testing.assert_close(in_pieces(model, [4], ids, cache=cache), model(ids).logits[:, 5:], rtol=0, atol=1e-11)


@torch.no_grad()
def test_crop_to_a_length_crops_everything_or_is_refused() -> None:
    """A positive number was the length to keep in Transformers 5.17, with a warning; newer versions refuse it."""
    model, ids = build("twicing"), token_ids()
    cache = model(ids[:, :7]).past_key_values
    with contextlib.suppress(ValueError):
        cache.crop(4)
    start = cache.get_seq_length()
    got = in_pieces(model, [9 - start], ids, cache=cache)
    torch.testing.assert_close(got, model(ids).logits[:, start:], rtol=0, atol=1e-11)


def test_offloaded_layers_bring_their_streams_back() -> None:
    """An offloading cache moves a layer to the CPU as soon as K and V are updated, before the streams are."""
    layer = FilterDynamicLayer()
    with FakeTensorMode(allow_non_fake_inputs=True):
        for length in range(1, 4):
            rows = torch.empty(2, 4, 1, 5, device="meta")  # stands for an accelerator
            layer.prefetch()
            # Early, so that the rows come while the layer before computes.
            assert all(stream.device.type == "meta" for stream in layer.streams.values())
            keys, _ = layer.update(rows, rows)
            layer.offload()
            stream = layer.update_stream("boost.1", rows)
            assert stream.device == keys.device == rows.device
            assert stream.shape == keys.shape == (2, 4, length, 5)
            assert {layer.keys.device.type, layer.values.device.type, layer.streams["boost.1"].device.type} == {"cpu"}


@pytest.mark.parametrize("variant", ["bilateral", "bilateral_gaussian"])
def test_a_plain_cache_serves_layers_without_streams(variant: str) -> None:
    model, ids = build(variant), token_ids()
    got = in_pieces(model, [3, 1, 5], ids, cache=DynamicCache())
    torch.testing.assert_close(got, model(ids, use_cache=False).logits, rtol=0, atol=1e-11)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_static_caches_work_where_attention_is_the_stock_one(implementation: str, given: bool) -> None:
    model = build("softmax", implementation)
    wanted = generate(model, use_cache=False)
    options = (
        {"past_key_values": StaticCache(model.config, max_cache_len=20)}
        if given
        else {"cache_implementation": "static"}
    )
    assert_same_generation(generate(model, use_cache=True, **options), wanted)


def test_attentions_are_returned_while_generating_without_a_cache() -> None:
    model = build("bilateral_twicing", "eager")
    output = model.generate(
        **prompt(), max_new_tokens=2, use_cache=False, output_attentions=True, return_dict_in_generate=True
    )
    assert [step[0].shape for step in output.attentions] == [(2, 4, 9, 9), (2, 4, 10, 10)]


@pytest.mark.parametrize("kernel", ["gaussian", "none"])
def test_generation_goes_past_n_positions_where_nothing_ends(kernel: str) -> None:
    model = build("softmax", position_kernel=kernel)
    assert generate(model, use_cache=True, max_new_tokens=20).sequences.shape == (2, 29)
    assert_same_generation(
        generate(model, use_cache=True, max_new_tokens=20), generate(model, use_cache=False, max_new_tokens=20)
    )


def test_the_sharpened_model_has_sharp_attention() -> None:
    """What the tests above rely on: attention far from uniform, logits far from equal."""
    model = build("softmax", "eager")
    attention = model(token_ids(length=20), output_attentions=True).attentions
    largest = torch.stack([weights[..., -1, :].amax(-1).mean() for weights in attention]).mean()
    assert largest > 0.25
    assert model(token_ids()).logits.std() > 1
    assert VOCABULARY > 50
