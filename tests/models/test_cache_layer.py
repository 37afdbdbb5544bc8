"""The cache of filtered layers: decoding by steps, chunks and beams equals one full pass, on sharp logits.

Weights are sharpened, the comparison is in float64 and tight: a cache that forgets, mixes up or keeps too much moves
the outputs by 0.1 and more, as tests below show by breaking each operation in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer, EncoderDecoderCache

from hf_imgproc_attn.models.cache_layer import FilterDynamicLayer, check_cache_implementation, check_cache_layer
from hf_imgproc_attn.models.layer_filter import AttentionFilter
from hf_imgproc_attn.models.modeling_imgproc_gpt2 import ImgProcGPT2LMHeadModel
from tests.models.helpers import make_filter, tiny_gpt2_config

BATCH, HEADS, LENGTH, WIDTH = 3, 3, 12, 6
TIGHT = {"rtol": 0, "atol": 1e-12}
CHUNKS = {"steps": [1] * LENGTH, "prefill": [5] + [1] * 7, "chunks": [4, 3, 1, 4], "one": [12]}
POSITIONS = ("none", "untied", "shared", "gaussian", "alibi", "relative_buckets", "rotary")
PLACES = ("gaussian", "alibi", "relative_buckets", "rotary")
PAIRS = (
    *((content, position) for content in ("dot_product", "gaussian") for position in POSITIONS),
    *(("elliptical", position) for position in ("none", "untied", "alibi")),
)
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


def rows_of(inputs: Inputs, rows: Sequence[int]) -> Inputs:
    """Some rows of the batch; what all rows share is kept."""
    index = torch.tensor(rows)
    return {name: tensor if len(tensor) == 1 else tensor[index] for name, tensor in inputs.items()}


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
# Operations on the cache, and what breaking them does
# --------------------------------------------------------------------------------------------------------------------

Operation = Callable[[AttentionFilter, Inputs, Cache], tuple[torch.Tensor, torch.Tensor]]


def reorder(layer: AttentionFilter, inputs: Inputs, cache: Cache) -> tuple[torch.Tensor, torch.Tensor]:
    """Beam search: rows change places and may be doubled."""
    decode(layer, inputs, [5, 1], cache)
    cache.reorder_cache(torch.tensor([2, 0, 2]))
    inputs = rows_of(inputs, [2, 0, 2])
    return decode(layer, inputs, [1, 2], cache), full_pass(layer, part(inputs, 0, 9))[:, :, 6:]


def crop(layer: AttentionFilter, inputs: Inputs, cache: Cache) -> tuple[torch.Tensor, torch.Tensor]:
    """Assisted decoding: rejected tokens are taken back and others follow."""
    other = tensors("gaussian", seed=20)
    prefix = {
        name: torch.cat((inputs[name][:, :, :4], other[name][:, :, 4:]), dim=2) for name in ("query", "key", "value")
    }
    other = {**inputs, **prefix}
    decode(layer, inputs, [5, 1, 1], cache)
    cache.crop(-3)
    assert cache.get_seq_length(layer.layer_idx) == 4
    return decode(layer, other, [1, 4], cache), full_pass(layer, part(other, 0, 9))[:, :, 4:]


def crop_everything(layer: AttentionFilter, inputs: Inputs, cache: Cache) -> tuple[torch.Tensor, torch.Tensor]:
    """Down to nothing and from the start again, with other tokens."""
    decode(layer, inputs, [3, 2], cache)
    cache.crop(-5)
    other = tensors("gaussian", seed=20)
    return decode(layer, other, [4, 1], cache), full_pass(layer, part(other, 0, 5))


def crop_nothing(layer: AttentionFilter, inputs: Inputs, cache: Cache) -> tuple[torch.Tensor, torch.Tensor]:
    decode(layer, inputs, [5], cache)
    cache.crop(0)
    return decode(layer, inputs, [1, 2], cache), full_pass(layer, part(inputs, 0, 8))[:, :, 5:]


def repeat(layer: AttentionFilter, inputs: Inputs, cache: Cache) -> tuple[torch.Tensor, torch.Tensor]:
    """Several continuations of one prompt."""
    decode(layer, inputs, [5, 1], cache)
    cache.batch_repeat_interleave(2)
    other = tensors("gaussian", seed=20)
    rows = rows_of(inputs, [0, 0, 1, 1, 2, 2])
    for name in ("query", "key", "value"):
        rows[name][1::2, :, 6:] = other[name][:, :, 6:]
    return decode(layer, rows, [1, 2], cache), full_pass(layer, part(rows, 0, 9))[:, :, 6:]


def select(layer: AttentionFilter, inputs: Inputs, cache: Cache) -> tuple[torch.Tensor, torch.Tensor]:
    """Finished rows are dropped."""
    decode(layer, inputs, [5, 1], cache)
    cache.batch_select_indices(torch.tensor([2, 1]))
    inputs = rows_of(inputs, [2, 1])
    return decode(layer, inputs, [1, 2], cache), full_pass(layer, part(inputs, 0, 9))[:, :, 6:]


def reset(layer: AttentionFilter, inputs: Inputs, cache: Cache) -> tuple[torch.Tensor, torch.Tensor]:
    """The same cache for another text, of another batch size."""
    decode(layer, inputs, [5, 1], cache)
    cache.reset()
    assert cache.get_seq_length(layer.layer_idx) == 0
    other = rows_of(tensors("gaussian", seed=20), [0, 1])
    return decode(layer, other, [3, 1], cache), full_pass(layer, part(other, 0, 4))


def offload(layer: AttentionFilter, inputs: Inputs, cache: Cache) -> tuple[torch.Tensor, torch.Tensor]:
    """To the CPU and back, between the steps."""
    for size in (4, 1, 1):
        decode(layer, inputs, [size], cache)
        cache.layers[layer.layer_idx].offload()
        cache.layers[layer.layer_idx].prefetch()
    return decode(layer, inputs, [1, 2], cache), full_pass(layer, part(inputs, 0, 9))[:, :, 6:]


def nothing_cached(layer: AttentionFilter, inputs: Inputs, cache: Cache) -> tuple[torch.Tensor, torch.Tensor]:
    """Every operation on an empty cache does nothing."""
    cache.layers[0].offload()
    cache.layers[0].prefetch()
    cache.reorder_cache(torch.tensor([0]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0]))
    cache.crop(-1)
    cache.reset()
    return decode(layer, inputs, [3, 1], cache), full_pass(layer, part(inputs, 0, 4))


def append(layer: AttentionFilter, inputs: Inputs, cache: Cache) -> tuple[torch.Tensor, torch.Tensor]:
    return decode(layer, inputs, [5, 1, 3], cache), full_pass(layer, part(inputs, 0, 9))


OPERATIONS: list[Operation] = [
    append,
    reorder,
    crop,
    crop_everything,
    crop_nothing,
    repeat,
    select,
    reset,
    offload,
    nothing_cached,
]


@torch.no_grad()
@pytest.mark.parametrize(
    ("content", "position", "boosting", "steps"),
    [
        *(("gaussian", "gaussian", *booster) for booster in BOOSTERS),
        *(("elliptical", "gaussian", *booster) for booster in (BOOSTERS[0], BOOSTERS[3])),
        *(("gaussian", position, "none", 2) for position in ("alibi", "relative_buckets", "rotary")),
    ],
)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_operations(operation: Operation, content: str, position: str, boosting: str, steps: int) -> None:
    """After each operation decoding goes on as if the rows had been like that from the start."""
    got, expected = operation(build(content, position, boosting, steps), tensors("gaussian"), new_cache())
    torch.testing.assert_close(got, expected, **TIGHT)


def test_positive_crop_is_refused_as_in_the_stock_layer() -> None:
    cache = new_cache()
    decode(build("gaussian", "gaussian", "twicing", 2), tensors("gaussian"), [5], cache)
    with pytest.raises(ValueError, match="crop"):
        cache.crop(3)
    assert cache.layers[0].streams["boost.1"].shape[-2] == 5


class Broken(FilterDynamicLayer):
    """Base of the layers below. Without a type it does not take our layer's place in Transformers' table."""

    _layer_type = None


class ForgetsHistory(Broken):
    def update_stream(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """What came before counts as zero."""
        whole = super().update_stream(name, rows).clone()
        whole[..., : -rows.shape[-2], :] = 0
        return whole


class NoReorder(Broken):
    reorder_cache = DynamicLayer.reorder_cache


class NoSelect(Broken):
    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the first rows."""
        DynamicLayer.batch_select_indices(self, indices)
        self._map_streams(lambda rows: rows[: len(indices)])


class RepeatsInAnotherOrder(Broken):
    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats the batch, not its rows."""
        DynamicLayer.batch_repeat_interleave(self, repeats)
        self._map_streams(lambda rows: rows.repeat(repeats, 1, 1, 1))


class CropsTheWrongEnd(Broken):
    def crop(self, tokens_to_remove: int) -> None:
        """Drops the oldest rows."""
        DynamicLayer.crop(self, tokens_to_remove)
        self._map_streams(lambda rows: rows[..., -tokens_to_remove:, :])


class MixesStreams(Broken):
    def update_stream(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """The second stream is read from the first."""
        whole = super().update_stream(name, rows)
        return self.streams["boost.1"] if name == "boost.2" else whole


class NoCrop(Broken):
    crop = DynamicLayer.crop


class NoReset(Broken):
    reset = DynamicLayer.reset


class NoRepeat(Broken):
    batch_repeat_interleave = DynamicLayer.batch_repeat_interleave


@torch.no_grad()
@pytest.mark.parametrize(
    ("operation", "broken"),
    [
        (append, ForgetsHistory),
        (append, MixesStreams),
        (reorder, NoReorder),
        (select, NoSelect),
        (repeat, RepeatsInAnotherOrder),
        (crop, CropsTheWrongEnd),
    ],
)
def test_a_wrong_value_in_a_stream_would_be_noticed(operation: Operation, broken: type[FilterDynamicLayer]) -> None:
    """Each broken layer moves the outputs by far more than the tolerance of the tests above."""
    got, expected = operation(build("gaussian", "gaussian", "twicing", 3), tensors("gaussian"), new_cache(broken))
    assert got.shape == expected.shape
    assert (got - expected).abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize(("operation", "broken"), [(crop, NoCrop), (reset, NoReset), (repeat, NoRepeat)])
def test_a_stream_of_the_wrong_size_would_be_noticed(operation: Operation, broken: type[FilterDynamicLayer]) -> None:
    """Such a layer cannot even be used."""
    with pytest.raises(RuntimeError):
        operation(build("gaussian", "gaussian", "twicing", 3), tensors("gaussian"), new_cache(broken))


def test_an_offloaded_stream_comes_back_to_the_device_of_the_new_rows() -> None:
    """An offloading cache moves a layer to the CPU inside ``update``, before the booster extends its streams."""
    layer, rows = FilterDynamicLayer(), torch.zeros(1, 2, 3, 4)
    new = torch.zeros(1, 2, 1, 4, device="meta")  # stands for an accelerator
    layer.update(rows.to("meta"), rows.to("meta"))
    layer.update_stream("boost.1", rows)  # on the CPU
    whole = layer.update_stream("boost.1", new)
    assert whole.device == new.device
    assert whole.shape[-2] == 4


# --------------------------------------------------------------------------------------------------------------------
# Which caches are taken
# --------------------------------------------------------------------------------------------------------------------


class QuantisedStandIn(DynamicLayer):
    """A layer whose ``update`` does not return exactly what was stored, as quantised ones do."""


def test_a_configuration_makes_the_right_layers() -> None:
    """Filtered layers get ours, stock layers the stock one."""
    cache = DynamicCache(config=tiny_gpt2_config("twicing", boosted_layers=[-1]))
    assert [type(layer) for layer in cache.layers] == [DynamicLayer, DynamicLayer, FilterDynamicLayer]
    cache = DynamicCache(config=tiny_gpt2_config("bilateral"))
    assert [type(layer) for layer in cache.layers] == [FilterDynamicLayer] * 3


@torch.no_grad()
@pytest.mark.parametrize("position", POSITIONS)
def test_a_bare_cache_serves_filters_without_streams(position: str) -> None:
    """A caller's ``DynamicCache()`` is enough where nothing is boosted."""
    layer, inputs = build("gaussian", position, "none", 2), tensors(position)
    got = decode(layer, inputs, CHUNKS["prefill"], DynamicCache())
    torch.testing.assert_close(got, full_pass(layer, inputs), **TIGHT)


@torch.no_grad()
@pytest.mark.parametrize("filled", [False, True])
def test_a_bare_cache_is_refused_where_streams_must_be_kept(filled: bool) -> None:
    layer, inputs, cache = build("gaussian", "none", "twicing", 2), tensors("none"), DynamicCache()
    if filled:
        cache.update(inputs["key"], inputs["value"], 0)
    with pytest.raises(ValueError, match=r"layer at index 0.*residual stream.*DynamicCache\(config=model.config\)"):
        layer(**inputs, implementation="sdpa", is_causal=True, past_key_values=cache)


@torch.no_grad()
@pytest.mark.parametrize("boosting", ["none", "twicing"])
def test_a_lazy_cache_of_our_layers_is_taken(boosting: str) -> None:
    """The layer need not exist before the first update."""
    layer, inputs = build("gaussian", "gaussian", boosting, 2), tensors("gaussian")
    cache = Cache(layer_class_to_replicate=FilterDynamicLayer)
    got = decode(layer, inputs, CHUNKS["prefill"], cache)
    torch.testing.assert_close(got, full_pass(layer, inputs), **TIGHT)


@torch.no_grad()
@pytest.mark.parametrize("boosting", ["none", "twicing"])
@pytest.mark.parametrize(
    ("cache", "name"),
    [
        (lambda: Cache(layers=[QuantisedStandIn()]), "QuantisedStandIn"),
        (lambda: Cache(layer_class_to_replicate=QuantisedStandIn), "QuantisedStandIn"),
        (lambda: Cache(layers=[DynamicSlidingWindowLayer(sliding_window=4)]), "DynamicSlidingWindowLayer"),
    ],
    ids=["quantised", "lazily quantised", "sliding"],
)
def test_layers_that_change_what_they_store_are_refused(cache: Callable[[], Cache], name: str, boosting: str) -> None:
    """Their type and the layer's index are in the message, nothing has been written to them."""
    layer, inputs, given = build("gaussian", "none", boosting, 2), tensors("none"), cache()
    with pytest.raises(ValueError, match=rf"{name} is not supported .*layer 0.*DynamicCache\(config=model.config\)"):
        layer(**inputs, implementation="sdpa", is_causal=True, past_key_values=given)
    assert given.get_seq_length() == 0


def test_a_static_cache_is_refused_when_it_is_built() -> None:
    """For filtered layers only; a stock model keeps it."""
    with pytest.raises(ValueError, match="'static' is not supported"):
        StaticCache(config=tiny_gpt2_config("twicing"), max_cache_len=8)
    assert StaticCache(config=tiny_gpt2_config("softmax"), max_cache_len=8).get_max_length() == 8


def test_a_static_cache_of_a_stock_model_is_refused() -> None:
    """It has the wrong layers for a filter."""
    cache = StaticCache(config=tiny_gpt2_config("softmax"), max_cache_len=8)
    with pytest.raises(ValueError, match=r"StaticLayer is not supported .*layer 1"):
        check_cache_layer(cache, 1, keeps_streams=False)


@pytest.mark.parametrize("name", [None, "dynamic", "offloaded"])
def test_allowed_cache_implementations(name: str | None) -> None:
    check_cache_implementation(name, "cuda")
    if name != "offloaded":
        check_cache_implementation(name, "cpu")


@pytest.mark.parametrize("name", ["static", "offloaded_static", "quantized", "sliding_window", "hybrid", "dynamc"])
def test_refused_cache_implementations(name: str) -> None:
    """What is recommended works on the device."""
    refused = f"cache_implementation='{name}' is not supported .*"
    with pytest.raises(ValueError, match=refused + "use 'dynamic' or 'offloaded'$"):
        check_cache_implementation(name, "cuda")
    with pytest.raises(ValueError, match=refused + "use 'dynamic'$"):
        check_cache_implementation(name, "cpu")


def test_offloading_without_an_accelerator_is_refused_by_name() -> None:
    model = ImgProcGPT2LMHeadModel(tiny_gpt2_config("twicing")).eval()
    with pytest.raises(ValueError, match=r"'offloaded' needs an accelerator, got a model on 'cpu': use 'dynamic'"):
        model.generate(torch.tensor([[3, 4]]), max_new_tokens=2, cache_implementation="offloaded", pad_token_id=0)


@pytest.mark.parametrize("streams", [False, True])
def test_our_layers_are_taken(streams: bool) -> None:
    """Also inside the pair of caches that cross-attention needs."""
    cache = DynamicCache(config=tiny_gpt2_config("twicing", boosting_steps=3))
    check_cache_layer(cache, 2, streams)
    check_cache_layer(EncoderDecoderCache(cache, DynamicCache()).self_attention_cache, 0, streams)


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
