"""Rows that a filter keeps beside keys and values, by name: what one layer sees of a cache, or of none.

A booster applies A first to V, then to ``"boost.1"``, ``"boost.2"`` and so on. ``"metric"`` holds the rows that the
elliptical metric sums. The rounds of gradient boosting after the first have streams of their own in the same cache
layer: ``"round.1.key"``, ``"round.1.value"`` and ``"round.1.metric"``, and so on.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch


def round_stream(number: int, name: str) -> str:
    """Name of a stream of gradient boosting's round ``number``, counted from 0: the first one has the plain names."""
    return f"round.{number}.{name}"


def boost_stream(number: int) -> str:
    """Name of the stream that a booster applies A to after it has applied A ``number`` times."""
    return f"boost.{number}"


class Streams(Protocol):
    """Keys, values and further rows of one filter's past tokens.

    is_cached: whether there is a cache.
    keeps_places_apart: whether what the position kernel compares is a stream, and not a part of the cached keys.
    """

    is_cached: bool
    keeps_places_apart: bool

    def update(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values of the new tokens and return all of them."""

    def append(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Append the new tokens' rows ``[batch, heads, length, width]`` to a stream and return all of it."""

    def own_value(self, value: torch.Tensor, length: int) -> torch.Tensor | None:
        """Values of the new tokens, ``[batch, key_heads, length, d]``; None: the last rows of ``value``."""

    def past(self, name: str) -> torch.Tensor | None:
        """The cached rows of a stream, or None where there are none yet."""

    def earlier(self, name: str, rows: torch.Tensor) -> torch.Tensor | None:
        """The earlier keys' rows of a stream, in front of whatever else; None where there are none.

        Args:
            name: of the stream.
            rows: of the new tokens, whatever they are, ``[batch, heads, length, width]``; nothing is stored.
        """

    def own_places(self, length: int, key_length: int) -> slice | torch.Tensor:
        """Where the new tokens stand among the keys, after these have been stored."""

    def of_round(self, number: int) -> Streams:
        """What the filter of gradient boosting's round ``number`` >= 1 sees."""


class NoStreams:
    """Without a cache the new rows are all rows."""

    is_cached = False
    keeps_places_apart = False

    def update(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As given."""
        return key, value

    def append(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """As given."""
        return rows

    def own_value(self, value: torch.Tensor, length: int) -> torch.Tensor | None:
        """The last rows."""
        return None

    def past(self, name: str) -> torch.Tensor | None:
        """There is none."""
        return None

    def earlier(self, name: str, rows: torch.Tensor) -> torch.Tensor | None:
        """The cached rows, of which there are none."""
        return self.past(name)

    def own_places(self, length: int, key_length: int) -> slice | torch.Tensor:
        """The last ones."""
        return slice(key_length - length, key_length)

    def of_round(self, number: int) -> NoStreams:
        """The same."""
        return self


NO_STREAMS = NoStreams()


class CachedStreams:
    """What a layer's first filter sees of a Transformers cache.

    Args:
        cache: has been checked to hold what the layer keeps.
        layer_idx: index of the layer.
    """

    is_cached = True
    keeps_places_apart = False

    def __init__(self, cache: Any, layer_idx: int) -> None:
        self._cache, self._layer_idx = cache, layer_idx

    @property
    def ahead(self) -> Any:
        """Room for projections of the next positions; None where the layer of the cache has none."""
        layers = self._cache.layers
        return getattr(layers[self._layer_idx], "ahead", None) if self._layer_idx < len(layers) else None

    def update(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append to the cache's own keys and values.

        Raises:
            ValueError: if the cached keys are of another width: they were not made by this layer.
        """
        layers = self._cache.layers
        cached = getattr(layers[self._layer_idx], "keys", None) if self._layer_idx < len(layers) else None
        if cached is not None and cached.numel() and cached.shape[-1] != key.shape[-1]:
            raise ValueError(
                f"past_key_values has keys of width {cached.shape[-1]} in layer {self._layer_idx}, whose filter keeps "
                f"keys of width {key.shape[-1]}, with their position: keys and values that are learned, as in PEFT's "
                "prefix tuning, have no position"
            )
        full_key, full_value = self._cache.update(key, value, self._layer_idx)
        return full_key, full_value

    def append(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Append to a stream of the cache's layer."""
        stream: torch.Tensor = self._cache.layers[self._layer_idx].update_stream(name, rows)
        return stream.to(rows.dtype)

    def own_value(self, value: torch.Tensor, length: int) -> torch.Tensor | None:
        """The last rows."""
        return None

    def past(self, name: str) -> torch.Tensor | None:
        """The cached rows of a stream."""
        # A plain layer serves filters that keep keys and values only.
        streams: dict[str, torch.Tensor] = getattr(self._cache.layers[self._layer_idx], "streams", {})
        return streams.get(name)

    def earlier(self, name: str, rows: torch.Tensor) -> torch.Tensor | None:
        """The cached rows."""
        past = self.past(name)
        return None if past is None else past.to(rows.device, rows.dtype)

    def own_places(self, length: int, key_length: int) -> slice | torch.Tensor:
        """The last ones."""
        return slice(key_length - length, key_length)

    def of_round(self, number: int) -> RoundStreams:
        """Streams of the same cache layer."""
        return RoundStreams(self, number)


class RoundStreams:
    """What a round of gradient boosting after the first sees: its keys and values are streams too.

    Args:
        first: what the layer's first filter sees, of any kind that is cached.
        number: of the round, from 1.
    """

    is_cached = True

    def __init__(self, first: Any, number: int) -> None:
        self._first, self._number = first, number
        self.keeps_places_apart: bool = first.keeps_places_apart

    def update(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values as streams."""
        return self.append("key", key), self.append("value", value)

    def append(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Append under a name of its own."""
        stored: torch.Tensor = self._first.append(round_stream(self._number, name), rows)
        return stored

    def own_value(self, value: torch.Tensor, length: int) -> torch.Tensor | None:
        """Not asked for: a round applies A once, to the values of all tokens."""
        return None

    def past(self, name: str) -> torch.Tensor | None:
        """The cached rows of a stream."""
        past: torch.Tensor | None = self._first.past(round_stream(self._number, name))
        return past

    def earlier(self, name: str, rows: torch.Tensor) -> torch.Tensor | None:
        """As of the first filter, under a name of its own."""
        rows_of_all: torch.Tensor | None = self._first.earlier(round_stream(self._number, name), rows)
        return rows_of_all

    def own_places(self, length: int, key_length: int) -> slice | torch.Tensor:
        """As of the first filter."""
        places: slice | torch.Tensor = self._first.own_places(length, key_length)
        return places

    def of_round(self, number: int) -> RoundStreams:
        """Streams of another round."""
        return RoundStreams(self._first, number)


def keep_apart(
    streams: Streams, position_key: torch.Tensor | None, coordinates: torch.Tensor | None, batch: int
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Store what a position kernel compares in streams, and return it for all tokens."""
    if position_key is not None:
        position_key = streams.append("position_key", position_key.expand(batch, -1, -1, -1))
    if coordinates is not None:
        coordinates = streams.append("places", coordinates.expand(batch, -1, -1).unsqueeze(1)).squeeze(1)
    return position_key, coordinates
