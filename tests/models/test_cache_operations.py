"""Operations on a cache of filters (reorder, crop, repeat ...), and what breaking them does."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from transformers.cache_utils import Cache, DynamicLayer

from hf_imgproc_attn.models.cache_layer import FilterDynamicLayer, GrowingLayer
from hf_imgproc_attn.models.layer_filter import AttentionFilter
from tests.models.cache_cases import BOOSTERS, TIGHT, Inputs, build, decode, full_pass, new_cache, part, tensors


def rows_of(inputs: Inputs, rows: Sequence[int]) -> Inputs:
    """Some rows of the batch; what all rows share is kept."""
    index = torch.tensor(rows)
    return {name: tensor if len(tensor) == 1 else tensor[index] for name, tensor in inputs.items()}


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
    """Transformers 5.17 takes it as the length that is left, newer versions refuse it."""
    stock = DynamicLayer()
    stock.update(torch.zeros(1, 1, 5, 2), torch.zeros(1, 1, 5, 2))
    try:
        stock.crop(3)
        refuses: Any = contextlib.nullcontext()
    except ValueError:
        refuses = pytest.raises(ValueError, match="crop")
    cache = new_cache()
    decode(build("gaussian", "gaussian", "twicing", 2), tensors("gaussian"), [5], cache)
    with refuses:
        cache.layers[0].crop(3)
    assert cache.layers[0].streams["boost.1"].shape[-2] == stock.get_seq_length()
    assert cache.layers[0].get_seq_length() == stock.get_seq_length()


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
        GrowingLayer.crop(self, tokens_to_remove)
        self._map_streams(lambda rows: rows[..., -tokens_to_remove:, :])


class MixesStreams(Broken):
    def update_stream(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """The second stream is read from the first."""
        whole = super().update_stream(name, rows)
        return self.streams["boost.1"] if name == "boost.2" else whole


class NoCrop(Broken):
    crop = GrowingLayer.crop


class NoReset(Broken):
    reset = GrowingLayer.reset


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
