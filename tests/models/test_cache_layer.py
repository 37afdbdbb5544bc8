"""The cache of filtered layers: decoding by steps, chunks and beams equals one full pass, on sharp logits.

Weights are sharpened, the comparison is in float64 and tight: a cache that forgets, mixes up or keeps too much moves
the outputs by 0.1 and more, as tests below show by breaking each operation in turn.
"""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache

from hf_imgproc_attn.models.cache_layer import FilterDynamicLayer, check_cache_implementation
from hf_imgproc_attn.models.modeling_imgproc_gpt2 import ImgProcGPT2LMHeadModel
from tests.models.cache_cases import (
    BATCH,
    BOOSTERS,
    HEADS,
    LENGTH,
    TIGHT,
    WIDTH,
    build,
    decode,
    full_pass,
    new_cache,
    part,
    random,
    tensors,
)
from tests.models.helpers import make_filter, tiny_gpt2_config

CHUNKS = {"steps": [1] * LENGTH, "prefill": [5] + [1] * 7, "chunks": [4, 3, 1, 4], "one": [12]}
POSITIONS = ("none", "untied", "shared", "gaussian", "alibi", "relative_buckets", "rotary")
PAIRS = (
    *((content, position) for content in ("dot_product", "gaussian") for position in POSITIONS),
    *(("elliptical", position) for position in ("none", "untied", "alibi")),
)

# --------------------------------------------------------------------------------------------------------------------
# Cached = full pass
# --------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.grid(
    implementation=["eager", "sdpa"], sizes=CHUNKS, **{"boosting,steps": BOOSTERS, "content,position": PAIRS}
)
def test_decoding_is_the_full_pass(
    content: str, position: str, boosting: str, steps: int, sizes: str, implementation: str
) -> None:
    """Token by token, after a prefill, in chunks: every output, and a stream for each pass but the first.

    The rows that the elliptical metric sums are one stream more.
    """
    layer, inputs, cache = build(content, position, boosting, steps), tensors(position), new_cache()
    expected = full_pass(layer, inputs, "eager")
    got = decode(layer, inputs, CHUNKS[sizes], cache, implementation)
    torch.testing.assert_close(got, expected, **TIGHT)
    streams = cache.layers[layer.layer_idx].streams
    assert [rows.shape for rows in streams.values()] == [torch.Size((BATCH, HEADS, LENGTH, WIDTH))] * (
        {"none": 0, "learned": 1}.get(boosting, steps - 1) + (content == "elliptical")
    )


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("sizes", ["steps", "prefill", "chunks"])
@pytest.mark.parametrize(("content", "position"), [pair for pair in PAIRS if pair[0] != "dot_product"])
def test_padding_and_positions_of_each_row(
    content: str, position: str, sizes: str, side: str, implementation: str
) -> None:
    """Padding on either side and custom positions, different in every row, stay exact; padding has no influence."""
    layer, inputs = build(content, position, "twicing", 3), tensors(position, rows=BATCH)
    mask = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    if side == "left":
        mask[0, :3], mask[1, :5] = False, False
    else:
        mask[0, 9:], mask[2, 7:] = False, False
    expected = full_pass(layer, inputs, "eager", mask)
    got = decode(layer, inputs, CHUNKS[sizes], new_cache(), implementation, mask)
    seen = mask[:, None, :, None]
    torch.testing.assert_close(got * seen, expected * seen, **TIGHT)
    inputs["value"][~mask[:, None].expand(-1, HEADS, -1)] = 100.0
    for names_padding in (False, True):
        got = decode(layer, inputs, CHUNKS[sizes], new_cache(), implementation, mask, names_padding)
        torch.testing.assert_close(got * seen, expected * seen, **TIGHT)
    if side == "left":
        alone = {name: tensor if len(tensor) == 1 else tensor[1:2] for name, tensor in inputs.items()}
        short = full_pass(layer, part(alone, 5, LENGTH), "eager")
        torch.testing.assert_close(got[1:2, :, 5:], short, **TIGHT)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(("boosting", "steps"), BOOSTERS)
def test_chunk_without_a_mask_is_causal(boosting: str, steps: int, implementation: str) -> None:
    """``is_causal=True`` and no mask mean the same with cached keys: query i of a chunk sees all keys up to itself."""
    layer, inputs, cache = build("gaussian", "gaussian", boosting, steps), tensors("gaussian"), new_cache()
    options = {"implementation": implementation, "is_causal": True, "past_key_values": cache}
    outputs = [layer(**part(inputs, start, start + 4), **options)[0] for start in (0, 4, 8)]
    torch.testing.assert_close(torch.cat(outputs, dim=-2), full_pass(layer, inputs, "eager"), **TIGHT)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("content", ["gaussian", "elliptical"])
def test_fewer_key_heads(content: str, steps: int, implementation: str) -> None:
    """Grouped queries: the streams have the heads of the queries."""
    layer = make_filter(content, "gaussian", "twicing", steps, heads=6, head_dim=WIDTH)
    inputs = {**tensors("gaussian"), "query": 2 * random(BATCH, 6, LENGTH, WIDTH, seed=9)}
    got = decode(layer, inputs, CHUNKS["chunks"], new_cache(), implementation)
    torch.testing.assert_close(got, full_pass(layer, inputs, "eager"), **TIGHT)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(
    ("content", "position"), [*(("gaussian", name) for name in POSITIONS), ("elliptical", "none")]
)
def test_half_precision(content: str, position: str, implementation: str, dtype: torch.dtype) -> None:
    """Cached keys carry their positions without loss: decoding is as far from float64 as the full pass is."""
    layer, inputs = build(content, position, "twicing", 3).to(dtype).double(), tensors(position)
    if "coordinates" in inputs:
        inputs["coordinates"] += 5000 - 8192
    inputs = {n: t if n == "coordinates" else t.to(dtype).double() for n, t in inputs.items()}
    exact = full_pass(layer, inputs, "eager")
    given = {n: t.float() if n == "coordinates" else t.to(dtype) for n, t in inputs.items()}
    layer = layer.to(dtype)
    errors = [
        (output.double() - exact).square().mean().sqrt()
        for output in (
            full_pass(layer, given, implementation),
            decode(layer, given, CHUNKS["chunks"], new_cache(), implementation),
        )
    ]
    assert errors[1] <= 1.1 * errors[0]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("first", ["eager", "sdpa"])
def test_the_implementation_may_change_between_steps(first: str, dtype: torch.dtype) -> None:
    """What one back-end has cached the other can read."""
    layer, inputs, cache = build("gaussian", "gaussian", "twicing", 3).to(dtype), tensors("gaussian"), new_cache()
    inputs = {
        n: t.to(torch.promote_types(dtype, torch.float32) if n == "coordinates" else dtype) for n, t in inputs.items()
    }
    second = {"eager": "sdpa", "sdpa": "eager"}[first]
    outputs = [decode(layer, inputs, [5], cache, first), decode(layer, inputs, [3, 1], cache, second)]
    outputs.append(decode(layer, inputs, [3], cache, first))
    tolerance = TIGHT if dtype == torch.float64 else {"rtol": 0, "atol": 0.05}
    torch.testing.assert_close(torch.cat(outputs, dim=-2), full_pass(layer, inputs, "eager"), **tolerance)


# --------------------------------------------------------------------------------------------------------------------
# Which caches are taken
# --------------------------------------------------------------------------------------------------------------------


def test_a_configuration_makes_the_right_layers() -> None:
    """Filtered layers get ours, stock layers the stock one."""

    def names(cache: DynamicCache) -> list[str]:
        # By name: a checkpoint whose code was loaded in this process has brought the same class once more.
        return [type(layer).__name__ for layer in cache.layers]

    boosted = DynamicCache(config=tiny_gpt2_config("twicing", boosted_layers=[-1]))
    assert names(boosted) == ["DynamicLayer", "DynamicLayer", "FilterDynamicLayer"]
    assert names(DynamicCache(config=tiny_gpt2_config("bilateral"))) == ["FilterDynamicLayer"] * 3


@torch.no_grad()
@pytest.mark.parametrize("position", POSITIONS)
def test_a_bare_cache_serves_filters_without_streams(position: str) -> None:
    """A caller's ``DynamicCache()`` is enough where nothing is boosted."""
    layer, inputs = build("gaussian", position, "none", 2), tensors(position)
    got = decode(layer, inputs, CHUNKS["prefill"], DynamicCache())
    torch.testing.assert_close(got, full_pass(layer, inputs), **TIGHT)


@torch.no_grad()
@pytest.mark.parametrize("boosting", ["none", "twicing"])
def test_a_lazy_cache_of_our_layers_is_taken(boosting: str) -> None:
    """The layer need not exist before the first update."""
    layer, inputs = build("gaussian", "gaussian", boosting, 2), tensors("gaussian")
    cache = Cache(layer_class_to_replicate=FilterDynamicLayer)
    got = decode(layer, inputs, CHUNKS["prefill"], cache)
    torch.testing.assert_close(got, full_pass(layer, inputs), **TIGHT)


@pytest.mark.parametrize("name", [None, "dynamic", "static", "quantized", "offloaded", "offloaded_static"])
def test_allowed_cache_implementations(name: str | None) -> None:
    check_cache_implementation(name, "cuda")
    if name not in ("offloaded", "offloaded_static"):
        check_cache_implementation(name, "cpu")


@pytest.mark.parametrize(("name", "instead"), [("offloaded", "dynamic"), ("offloaded_static", "static")])
def test_offloading_without_an_accelerator_is_refused_by_name(name: str, instead: str) -> None:
    model = ImgProcGPT2LMHeadModel(tiny_gpt2_config("twicing")).eval()
    with pytest.raises(ValueError, match=f"'{name}' needs an accelerator, got a model on 'cpu': use '{instead}'"):
        model.generate(torch.tensor([[3, 4]]), max_new_tokens=2, cache_implementation=name, pad_token_id=0)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(
    ("content", "position"),
    [("dot_product", "none"), ("gaussian", "gaussian"), ("dot_product", "rotary"), ("elliptical", "alibi")],
)
@pytest.mark.parametrize(("boosting", "steps"), [("none", 2), ("twicing", 3), ("learned", 2)])
def test_grouped_keys_are_cached_before_they_are_repeated(
    content: str, position: str, boosting: str, steps: int, implementation: str
) -> None:
    """One key head serves three query heads: it is cached once; what a booster keeps has the queries' heads."""
    layer, inputs, cache = build(content, position, boosting, steps), tensors(position), new_cache()
    inputs |= {name: inputs[name][:, :1] for name in ("key", "value", "previous_value")}
    expected = full_pass(layer, inputs, "eager")
    got = decode(layer, inputs, CHUNKS["chunks"], cache, implementation)
    torch.testing.assert_close(got, expected, **TIGHT)
    kept = cache.layers[layer.layer_idx]
    assert kept.keys.shape[1] == kept.values.shape[1] == 1
    assert {name: rows.shape[1] for name, rows in kept.streams.items()} == {
        name: 1 if name == "metric" else HEADS for name in layer.stream_names
    }


def test_a_stream_keeps_the_precision_of_its_first_rows() -> None:
    """The back-ends of a prompt and of a step may differ in precision; else every step would copy all rows."""
    layer = FilterDynamicLayer()
    layer.update_stream("boost.1", torch.zeros(1, 2, 3, 4, dtype=torch.bfloat16))
    stream = layer.update_stream("boost.1", torch.full((1, 2, 1, 4), 0.1))
    assert stream.dtype == torch.bfloat16
    assert torch.equal(stream[0, 0, 3], torch.full((4,), 0.1, dtype=torch.bfloat16))
