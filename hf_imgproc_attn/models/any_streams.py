"""Streams of a filter in the cache of any model, whatever kind of cache it is.

The rows of a stream have to stand where the cache keeps the keys of the same tokens: at the end, inside a sliding
window, at fixed places, quantised. So each stream is kept by a cache layer of the same kind, made from the empty layer
before its first token, which stores the rows as keys and does whatever the layer itself does: cutting, reordering,
repeating, starting anew.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch

_FOLLOWED = (
    "crop",
    "reorder_cache",
    "batch_repeat_interleave",
    "batch_select_indices",
    "reset",
    "offload",
    "prefetch",
    "activate_past_recording",
)
"""What a cache does to its layers, which the layers of the streams do too."""


@functools.cache
def _followed_class(layer_class: Any) -> Any:
    """A sub-class of a cache layer's class that remembers the values that came last, and keeps streams in step.

    filter_streams: the cache layer of each stream, by name.
    filter_empty: a layer of the same kind before its first token, which new streams start from.
    filter_new_value: values of the tokens that came last, ``[batch, key_heads, length, d]``.
    """
    methods: dict[str, Any] = {name: _followed(layer_class, name) for name in _FOLLOWED if hasattr(layer_class, name)}
    store = layer_class.update

    @functools.wraps(store)
    def update(self: Any, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.filter_new_value = value_states
        return store(self, key_states, value_states, *args, **kwargs)

    # Transformers registers classes that have a layer type.
    return type(f"Filtered{layer_class.__name__}", (layer_class,), {**methods, "update": update, "_layer_type": None})


def _followed(layer_class: type, name: str) -> Callable[..., Any]:
    """A method of a cache layer that does the same to the layers of the streams."""
    method = getattr(layer_class, name)

    @functools.wraps(method)
    def follow(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = method(self, *args, **kwargs)
        for stream in self.filter_streams.values():
            getattr(stream, name)(*args, **kwargs)
        if name == "activate_past_recording":  # holds for streams to come as well
            getattr(self.filter_empty, name)(*args, **kwargs)
        return result

    return follow


def follow_layer(cache: Any, layer_idx: int, keeps_streams: bool) -> Any:
    """Make a layer of a cache keep streams, before the layer's keys are stored.

    Args:
        cache: a Transformers cache; of an encoder-decoder the one of its self-attention.
        layer_idx: index of the layer.
        keeps_streams: whether there are any; without, a layer that holds tokens already is as good as an empty one.

    Returns:
        The layer.

    Raises:
        ValueError: if the layer holds tokens whose streams are missing.
    """
    while len(cache.layers) <= layer_idx:
        cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[layer_idx]
    if hasattr(layer, "filter_streams"):
        return layer
    if keeps_streams and layer.is_initialized and layer.get_seq_length() > 0:
        raise ValueError(
            f"past_key_values holds tokens in layer {layer_idx} that were stored without the filter: the rows that it "
            "needs of them are missing. Start with an empty cache, and fill it with the filtered model"
        )
    empty = copy.copy(layer)
    empty.keys = empty.values = None
    empty.is_initialized = False
    empty = copy.deepcopy(empty)  # static layers count their tokens in place
    layer.__class__ = _followed_class(type(layer))  # type: ignore[arg-type]
    layer.filter_streams, layer.filter_empty, layer.filter_new_value = {}, empty, None
    return layer


class FollowingStreams:
    """What a filter sees of a followed cache layer; see ``cache_streams.Streams``.

    Args:
        layer: has stored the new tokens' keys already.
        key_length: of the keys that are attended to: the first ones, where the layer has empty places after them.
    """

    is_cached = True

    def __init__(self, layer: Any, key_length: int) -> None:
        self._layer, self._key_length = layer, key_length

    def update(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As given: the model has stored them."""
        return key, value

    def append(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Store the new tokens' rows ``[batch, heads, length, width]`` and return those of all keys."""
        streams = self._layer.filter_streams
        if name not in streams:
            streams[name] = copy.deepcopy(self._layer.filter_empty)
        stored, _ = streams[name].update(rows, rows[..., :0])
        return stored[..., : self._key_length, :].to(rows.dtype)

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

    def past(self, name: str) -> torch.Tensor | None:
        """None: back-ends which need the earlier rows by themselves are not used with them."""
        return None

    def of_round(self, number: int) -> FollowingStreams:
        """There is only one round."""
        raise ValueError("gradient boosting is not defined for layers of other models")
