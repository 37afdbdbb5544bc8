"""A cache layer with further streams beside K and V, for exact decoding of boosted and elliptical attention.

Twicing at query i needs row j of A V at every key j <= i. Those rows never change once computed, so the residual
rows r_j = v_j - (A V)_j are cached as a third stream (a k-step booster caches k - 1 of them), and one decoding step
costs two products with the cache instead of a pass over all queries. The elliptical metric of query i sums over the
tokens up to i: what it sums is a stream too, one row per token, so that cropping and reordering stay exact. Keys are
cached with their position columns, so that custom ``position_ids`` and left padding stay exact.

Defining the classes registers them with Transformers under ``FILTER_LAYER_TYPE``; a configuration whose
``layer_types`` names it makes ``DynamicCache(config=...)`` and ``generate`` use them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import StaticLayer

from .cache_ahead import KnownAhead
from .cache_older import AnewLayer
from .cache_rows import GrowingRows
from .spec_axes import FILTER_LAYER_TYPE


class GrowingLayer(AnewLayer):
    """The stock growing cache, which does not copy all keys and values for every token."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.keys: torch.Tensor | None
        self.values: torch.Tensor | None
        self.is_initialized: bool
        self._growing: dict[str, GrowingRows] = {}

    def _append(self, name: str, stored: torch.Tensor | None, rows: torch.Tensor) -> torch.Tensor:
        return self._growing.setdefault(name, GrowingRows()).append(stored, rows)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values ``[batch, heads, new, width]`` and return all of them; nothing is copied."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys = self._append("keys", self.keys, key_states)
        values = self._append("values", self.values, value_states)
        self.keys, self.values = keys, values
        return keys, values

    def reset(self) -> None:
        super().reset()
        self._growing = {}


class FilterDynamicLayer(GrowingLayer):
    """A growing cache of keys, values and streams of other rows, each ``[batch, heads, length, width]``."""

    _layer_type = FILTER_LAYER_TYPE

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.streams: dict[str, torch.Tensor] = {}
        """Further rows by name; see ``cache_streams``."""
        self.ahead = KnownAhead()

    def update_stream(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Append the new tokens' rows ``[batch, heads, new, width]`` to a stream and return all of it."""
        stored = self.streams.get(name)
        if stored is not None:
            # The back-ends of a prompt and of a step may differ in precision; what was stored stays as it is.
            stored, rows = stored.to(rows.device, non_blocking=True), rows.to(stored.dtype)
        stream = self._append(f"stream {name}", stored, rows)
        self.streams[name] = stream
        keys: torch.Tensor | None = self.keys
        if keys is not None and keys.device != stream.device:
            # An offloading cache has already moved keys and values to another device; move the stream there too.
            self.streams[name] = stream.to(keys.device, non_blocking=True)
        return stream

    def _map_streams(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.streams = {name: function(stream) for name, stream in self.streams.items()}

    def prefetch(self) -> None:
        super().prefetch()
        if self.is_initialized:
            self._map_streams(lambda stream: stream.to(self.device, non_blocking=True))

    def reset(self) -> None:
        super().reset()
        self.streams = {}
        self.ahead = KnownAhead()

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        # The argument's meaning differs between versions of Transformers; the length that is left does not.
        length = self.get_seq_length()
        self._map_streams(lambda stream: stream[..., :length, :])

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._map_streams(lambda stream: stream.index_select(0, beam_idx.to(stream.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._map_streams(lambda stream: stream.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._map_streams(lambda stream: stream[indices, ...])


class FilterStaticLayer(StaticLayer):
    """A cache of fixed size for a filtered layer: the stock one, which ``cache_followed`` puts streams beside."""

    _layer_type = FILTER_LAYER_TYPE


def check_cache_implementation(name: str | None, device: str) -> None:
    """Refuse the cache implementations that cannot work on a device, where Transformers fails without saying why.

    Args:
        name: ``generation_config.cache_implementation``.
        device: type of the model's device; offloading needs an accelerator, with streams of its own.

    Raises:
        ValueError: naming the value and what is allowed.
    """
    if name is not None and name.startswith("offloaded") and device == "cpu":
        instead = name.removeprefix("offloaded").removeprefix("_") or "dynamic"
        raise ValueError(f"cache_implementation={name!r} needs an accelerator, got a model on 'cpu': use {instead!r}")
