"""Rows that a filter keeps beside keys and values, by name: what one layer sees of a cache, or of none.

A booster applies A first to V, then to ``"boost.1"``, ``"boost.2"`` and so on. ``"metric"`` holds the rows that the
elliptical metric sums. The second filter of gradient boosting has streams of its own in the same cache layer:
``"second.key"``, ``"second.value"`` and ``"second.metric"``.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

SECOND = "second."
"""Prefix of the names of the second filter's streams."""


def boost_stream(number: int) -> str:
    """Name of the stream that a booster applies A to after it has applied A ``number`` times."""
    return f"boost.{number}"


class Streams(Protocol):
    """Keys, values and further rows of one filter's past tokens."""

    is_cached: bool

    def update(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values of the new tokens and return all of them."""

    def append(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Append the new tokens' rows ``[batch, heads, length, width]`` to a stream and return all of it."""

    def past(self, name: str) -> torch.Tensor | None:
        """The cached rows of a stream, or None where there are none yet."""

    def second(self) -> Streams:
        """What the second filter of gradient boosting sees."""


class NoStreams:
    """Without a cache the new rows are all rows."""

    is_cached = False

    def update(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As given."""
        return key, value

    def append(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """As given."""
        return rows

    def past(self, name: str) -> torch.Tensor | None:
        """There is none."""
        return None

    def second(self) -> NoStreams:
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

    def __init__(self, cache: Any, layer_idx: int) -> None:
        self._cache, self._layer_idx = cache, layer_idx

    def update(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append to the cache's own keys and values."""
        full_key, full_value = self._cache.update(key, value, self._layer_idx)
        return full_key, full_value

    def append(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Append to a stream of the cache's layer."""
        stream: torch.Tensor = self._cache.layers[self._layer_idx].update_stream(name, rows)
        return stream

    def past(self, name: str) -> torch.Tensor | None:
        """The cached rows of a stream."""
        # A plain layer serves filters that keep keys and values only.
        streams: dict[str, torch.Tensor] = getattr(self._cache.layers[self._layer_idx], "streams", {})
        return streams.get(name)

    def second(self) -> SecondStreams:
        """Streams of the same cache layer."""
        return SecondStreams(self)


class SecondStreams:
    """What the second filter of gradient boosting sees: its keys and values are streams too."""

    is_cached = True

    def __init__(self, first: CachedStreams) -> None:
        self._first = first

    def update(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values as streams."""
        return self.append("key", key), self.append("value", value)

    def append(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Append under a name of its own."""
        return self._first.append(SECOND + name, rows)

    def past(self, name: str) -> torch.Tensor | None:
        """The cached rows of a stream."""
        return self._first.past(SECOND + name)

    def second(self) -> SecondStreams:
        """There is no third filter."""
        raise ValueError("gradient boosting has two filters")
