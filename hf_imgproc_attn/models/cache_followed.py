"""Streams of a filter in the cache of any model, whatever kind of cache it is.

The rows of a stream have to stand where the cache keeps the keys of the same tokens: at the end, inside a sliding
window, at fixed places, quantised. So each stream is kept by a cache layer of the same kind, made from the empty layer
before its first token, which stores the rows as keys and does whatever the layer itself does: cutting, reordering,
repeating, starting anew.

In a quantised cache streams are quantised as values are. Kept whole they would take more memory than all else in it,
and would help little: what they are multiplied by, and added to, is quantised (measured: ``docs/any-model.md``).
Places are kept whole everywhere.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from .cache_layer import FilterDynamicLayer, GrowingLayer
from .cache_older import (
    RESETS_HALFWAY,
    AnewLayer,
    attribute_names,
    mended,
    seen_rows,
)
from .cache_owner import CacheOwner
from .cache_streams import RoundStreams

KEPT_WHOLE = ("places", "position_key")
"""Streams that no cache quantises: numbers of places, which 4 bits cannot tell apart, and vectors of positions."""

_FOLLOWED = (
    "crop",
    "reorder_cache",
    "batch_repeat_interleave",
    "batch_select_indices",
    "reset",
    "prefetch",
    "activate_past_recording",
)
"""What a cache does to its layers, which the layers of the streams do too."""


_CLASSES: dict[Any, Any] = {}


@torch.compiler.assume_constant_result
def _followed_class(layer_class: Any) -> Any:
    """A sub-class of a cache layer's class that keeps streams, also where compiled code asks for it."""
    if layer_class not in _CLASSES:
        _CLASSES[layer_class] = _make_followed_class(layer_class)
    return _CLASSES[layer_class]


def _make_followed_class(layer_class: Any) -> Any:
    """A sub-class of a cache layer's class that remembers the values that came last, and keeps streams in step.

    filter_streams: the cache layer of each stream, by name.
    filter_empty: a layer of the same kind before its first token, which new streams start from.
    filter_new_value: values of the tokens that came last, ``[batch, key_heads, length, d]``.
    filter_kind: what the filter is whose rows are kept.
    filter_owner: the layer whose rows they are, or None where that is not known.
    filter_expected: whether a filter is about to store the rows of the tokens that come next.
    filter_missed: whether tokens have come without a filter.
    """
    layer_class = GrowingLayer if layer_class is DynamicLayer else layer_class
    methods: dict[str, Any] = {name: _followed(layer_class, name) for name in _FOLLOWED if hasattr(layer_class, name)}
    store = layer_class.update

    @functools.wraps(store)
    def update(self: Any, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.filter_new_value = value_states
        if not self.filter_expected:
            self.filter_missed = True
        self.filter_expected = False
        keys, values = store(self, key_states, value_states, *args, **kwargs)
        new = key_states.shape[-2]
        return seen_rows(self, keys, new), seen_rows(self, values, new)

    methods |= {"update": update, "__reduce_ex__": _made_anew(_followed_class, layer_class)}
    # Transformers registers classes that have a layer type.
    return type(f"Filtered{layer_class.__name__}", (layer_class,), {**methods, "_layer_type": None})


def _made_anew(make: Callable[[Any], Any], layer_class: Any) -> Callable[[Any, Any], Any]:
    """``__reduce_ex__`` of a class that no name leads to: pickled, and copied, by what it is made of."""

    def reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
        return _object_of, (make, layer_class), self.__dict__

    return reduce


def _object_of(make: Callable[[Any], Any], layer_class: Any) -> Any:
    made = make(layer_class)
    return made.__new__(made)


def _followed(layer_class: type, name: str) -> Callable[..., Any]:
    """A method of a cache layer that does the same to the layers of the streams."""
    method = mended(layer_class, name)

    @functools.wraps(method)
    def follow(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = method(self, *args, **kwargs)
        for stream in self.filter_streams.values():
            if name != "crop" or stream.is_initialized:  # not that of a filter from before a reset
                mended(type(stream), name)(stream, *args, **kwargs)
        if name == "activate_past_recording":  # holds for streams to come as well
            getattr(self.filter_empty, name)(*args, **kwargs)
        if name == "reset":
            self.filter_missed, self.filter_owner = False, None
        return result

    return follow


@functools.cache
def _quantised_class(layer_class: Any) -> Any:
    """A sub-class of a quantised cache layer's class that stores rows as keys, beside values that have no numbers."""
    quantise, dequantise = layer_class._quantize, layer_class._dequantize

    def _quantize(self: Any, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if tensor.numel():
            return quantise(self, tensor, *args, **kwargs)
        if hasattr(self, "axis_value"):  # groups of numbers, of which there are none
            return tensor
        # One scale for all, which cannot be told from nothing.
        return quantise(self, tensor, tensor.new_ones(()).float())

    def _dequantize(self: Any, stored: Any) -> torch.Tensor:
        return stored if isinstance(stored, torch.Tensor) and not stored.numel() else dequantise(self, stored)

    methods: dict[str, Any] = {"_quantize": _quantize, "_dequantize": _dequantize, "_layer_type": None}
    methods["__reduce_ex__"] = _made_anew(_quantised_class, layer_class)
    return type(f"Stream{layer_class.__name__}", (layer_class,), methods)


def _empty_layer(layer: Any) -> Any:
    """A layer of the same kind before its first token, for streams."""
    if type(layer) is DynamicLayer:
        return FilterDynamicLayer()  # the same, and grows in place
    empty = _copy_of(layer, keys=None, values=None, is_initialized=False)
    if hasattr(empty, "_quantize"):
        empty.__class__ = _quantised_class(type(empty))  # type: ignore[arg-type]
        if hasattr(empty, "axis_value"):
            empty.axis_key = empty.axis_value
    return empty


def _turned(cache: Any, layer_idx: int) -> Any:
    """The layer of a cache, made one that keeps streams."""
    layer = cache.layers[layer_idx]
    followed = _followed_class(type(layer))
    if torch.compiler.is_compiling():  # which cannot turn it in place
        layer = cache.layers[layer_idx] = _copy_of(layer, followed)
    else:
        layer.__class__ = followed
    if isinstance(layer, GrowingLayer):
        layer._growing = {}
    return layer


def _copy_of(layer: Any, layer_class: Any = None, **changes: Any) -> Any:
    """A cache layer before its first token, with tensors of its own: static layers count their tokens in place.

    By hand, since compiled code, which may begin with an empty cache, knows no ``copy.deepcopy`` of tensors.
    """
    made = object.__new__(layer_class or type(layer))
    known = attribute_names(type(layer)) if torch.compiler.is_compiling() else layer.__dict__
    for name in known:
        if not hasattr(layer, name):
            continue
        value = getattr(layer, name)
        if isinstance(value, torch.Tensor):
            value = value.clone()
        elif isinstance(value, (dict, list)):
            value = type(value)(value)
        setattr(made, name, value)
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def _trial(layer: Any) -> Any:
    """A cache layer that stores what comes next without a trace in the layer given."""
    if layer.is_compileable:  # which writes into its tensors
        return _copy_of(layer)
    made = object.__new__(type(layer))
    made.__dict__.update(layer.__dict__)
    return made


def _layer_of(cache: Any, layer_idx: int) -> Any:
    """A layer of a cache, which is made where the cache makes its layers as they are used.

    None where it keeps nothing: Transformers 5.17 leaves such layers out, newer versions put a dummy there.
    """
    while len(cache.layers) <= layer_idx and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    return cache.layers[layer_idx] if layer_idx < len(cache.layers) else None


def follow_layer(cache: Any, layer_idx: int, kind: str | None, owner: CacheOwner | None = None) -> Any:
    """Make a layer of a cache keep streams, before the layer's keys are stored.

    Args:
        cache: a Transformers cache; of an encoder-decoder the one of its self-attention.
        layer_idx: index of the layer.
        kind: what the filter is; None if it keeps nothing beside keys and values. Then a layer that holds tokens
            already is as good as an empty one.
        owner: whose rows they are; None: not checked.

    Returns:
        The layer.

    Raises:
        ValueError: if the layer holds tokens whose streams are missing, or those of another filter or model, or none
            ever, since the model shares those of an earlier layer.
    """
    layer = _layer_of(cache, layer_idx)
    if not hasattr(layer, "get_seq_length"):
        raise ValueError(
            f"past_key_values keeps nothing in layer {layer_idx}, which attends to the keys and values of an earlier "
            "one: it has no place for the rows of a filter; choose other layers, or use_cache=False"
        )
    if not hasattr(layer, "filter_streams"):
        if kind is not None and layer.is_initialized and layer.get_seq_length() > 0:
            _refuse_tokens(layer_idx, "without the filter")
        empty = _empty_layer(layer)
        layer = _turned(cache, layer_idx)
        layer.filter_streams, layer.filter_empty, layer.filter_new_value = {}, empty, None
        layer.filter_kind, layer.filter_owner, layer.filter_missed = kind, owner, False
    if kind is not None:
        if layer.filter_missed:
            _refuse_tokens(layer_idx, "without the filter")
        if kind != layer.filter_kind and layer.get_seq_length() > 0:
            other = f"with another filter ({layer.filter_kind}; here {kind})"
            _refuse_tokens(layer_idx, other if layer.filter_kind is not None else "without the filter")
        if layer.filter_owner is not owner:
            _check_owner(layer, layer_idx, owner)
            layer.filter_owner = owner
    layer.filter_kind, layer.filter_expected = kind, True
    return layer


def follow_stock_layer(cache: Any, layer_idx: int) -> None:
    """Before stock attention beside filtered layers uses a cache whose own layers have faults: mend this one."""
    cache = getattr(cache, "self_attention_cache", cache)
    if cache is None or not RESETS_HALFWAY:
        return
    layer = _layer_of(cache, layer_idx)
    if type(layer) is DynamicLayer and not torch.compiler.is_compiling():
        layer.__class__ = AnewLayer
    elif hasattr(layer, "_quantize"):
        follow_layer(cache, layer_idx, None)


def _check_owner(layer: Any, layer_idx: int, owner: CacheOwner | None) -> None:
    """Refuse rows that another layer has stored; that of a copy of the model is the same."""
    known: CacheOwner | None = layer.filter_owner
    if known is None or owner is None or not layer.get_seq_length() > 0:
        return
    difference = known.differs_from(owner)
    if difference is not None:
        _refuse_tokens(layer_idx, difference)


def _refuse_tokens(layer_idx: int, how: str) -> None:
    raise ValueError(
        f"past_key_values holds tokens in layer {layer_idx} that were stored {how}: the rows that this filter "
        "needs of them are not there. Start with an empty cache, and fill it with the filtered model; keys and values "
        "that are learned, as in PEFT's prefix tuning, have no such rows"
    )


class FollowingStreams:
    """What a filter sees of a followed cache layer; see ``cache_streams.Streams``.

    Args:
        layer: a followed cache layer.
        key_length: of the keys that are attended to: the first ones, where the layer has empty places after them.
        cache: stores keys and values; None if the model has stored them already.
        layer_idx: index of the layer in ``cache``.
    """

    is_cached = True
    keeps_places_apart = True

    def __init__(self, layer: Any, key_length: int, cache: Any = None, layer_idx: int = 0) -> None:
        self._layer, self._key_length = layer, key_length
        self._cache, self._layer_idx = cache, layer_idx

    def update(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store keys and values of the new tokens and return those of all."""
        key, value = self._cache.update(key, value, self._layer_idx)
        return key[..., : self._key_length, :], value[..., : self._key_length, :]

    def append(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Store the new tokens' rows ``[batch, heads, length, width]`` and return those of all keys."""
        layer, streams = self._layer, self._layer.filter_streams
        if name not in streams:
            whole = name.rpartition(".")[2] in KEPT_WHOLE and hasattr(layer, "_quantize")
            streams[name] = FilterDynamicLayer() if whole else _copy_of(layer.filter_empty)
        stream = streams[name]
        # The back-ends of a prompt and of a step may differ in precision; a cache of fixed size has but one.
        new = rows.to(stream.keys.dtype) if isinstance(stream.keys, torch.Tensor) else rows
        stored, _ = stream.update(new, new[..., :0])
        stored = seen_rows(stream, stored, new.shape[-2])
        stored = stored[..., : self._key_length, :].to(rows.dtype)
        if layer.keys is not None and layer.keys.device != rows.device:
            stream.offload()  # an offloading cache has moved keys and values already
        return stored

    def own_value(self, value: torch.Tensor, length: int) -> torch.Tensor | None:
        """Values of the new tokens ``[batch, key_heads, length, d]``; None where they are the last rows of ``value``.

        In a cache of fixed size they are not. Some models store something else than values, and make values of it:
        then they are found by their place.
        """
        layer, stored = self._layer, self._layer.filter_new_value
        if not layer.is_compileable or value.shape[-2] == length:
            return None
        if stored.shape == (value.shape[0], value.shape[1], length, value.shape[-1]):
            rows: torch.Tensor = stored
            return rows
        places = torch.arange(length, device=value.device) + (layer.get_seq_length() - length)
        return value.index_select(-2, places)

    def earlier(self, name: str, rows: torch.Tensor) -> torch.Tensor | None:
        """As of the protocol. Most kinds of cache hand out rows only as new ones come in: a copy takes these."""
        stream = self._layer.filter_streams.get(name)
        if stream is None or not stream.is_initialized:
            return None
        stored: torch.Tensor
        if isinstance(stream, GrowingLayer):
            stored = stream.keys  # type: ignore[assignment]  # initialised
        elif stream.is_compileable and not stream.is_sliding:
            stored = stream.keys.clone() if torch.is_grad_enabled() else stream.keys
        else:
            stored, _ = _trial(stream).update(rows.to(stream.keys.dtype), rows[..., :0])
            stored = seen_rows(stream, stored, rows.shape[-2])
        return stored[..., : self._key_length, :].to(rows.device, rows.dtype)

    def own_places(self, length: int, key_length: int) -> slice | torch.Tensor:
        """As of the protocol."""
        if key_length == length or not self._layer.is_compileable:
            return slice(key_length - length, key_length)
        keys: torch.Tensor = self._layer.keys
        stop = torch.as_tensor(self._layer.get_seq_length(), device=keys.device).clamp(max=key_length)
        return torch.arange(length, device=keys.device) + (stop - length)

    def past(self, name: str) -> torch.Tensor | None:
        """None: back-ends which need the earlier rows by themselves are not used with them."""
        return None

    def of_round(self, number: int) -> RoundStreams:
        """Streams of the same cache layer."""
        return RoundStreams(self, number)
