"""What a decoding step needs that does not depend on its token: positions projected ahead, and scales of kernels.

A decoding step reads the weights of these projections for a single position, in GPT-2 small 57 MB, a tenth of all
weights. The next positions are known before their tokens are: their projections are made together, and kept in the
layer's part of the cache. They do not depend on the tokens, so that a cache that is cropped or whose rows are put in
another order keeps them. So are the factors 2/h^2, which five small operations make of a bandwidth.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

POSITIONS_AHEAD = 16
"""Positions that are projected at once: on one thread these take as long as two of them one by one."""


Vectors = tuple[torch.Tensor, torch.Tensor]
"""U_Q p and U_K p of one position in each row, each ``[batch or 1, heads, 1, head_dim]``."""


class Upcoming(NamedTuple):
    """Positions of one new token in each row, and where those that follow can be looked up.

    positions: ``[batch or 1, 1]``.
    lowest: the smallest of them.
    highest: the largest of them.
    table: vectors of all positions, ``[positions, hidden_size]``.
    """

    positions: torch.Tensor
    lowest: int
    highest: int
    table: torch.Tensor


def upcoming_positions(positions: torch.Tensor, table: Any) -> Upcoming | None:
    """The positions of a decoding step; None where nothing is to be made ahead of it.

    That is so for several tokens, for gradients, in traced code, with autocast, on accelerators, whose values would
    have to be waited for, and for rows that are too far apart to have their next positions in common.

    Args:
        positions: of the new tokens, ``[batch or 1, length]``.
        table: the embedding of positions.
    """
    if positions.shape[-1] != 1 or not positions.shape[0] or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    is_plain = type(table) is nn.Embedding and positions.device.type == table.weight.device.type == "cpu"
    if not is_plain or torch.is_autocast_enabled("cpu"):
        return None
    lowest, highest = (int(bound) for bound in positions.aminmax())
    if highest - lowest >= POSITIONS_AHEAD:
        return None
    return Upcoming(positions, lowest, highest, table.weight)


def _version(weights: tuple[torch.Tensor, ...]) -> tuple[tuple[int, int, int], ...] | None:
    """What changes when a weight is another one, was moved, or was changed in place so that autograd knows of it.

    Numbers and not the tensors: a copy of a cache shall not copy the model. None where a change would not be noticed:
    for weights that were made in inference mode, and for what is no parameter, quantised or shared out.
    """
    if any(type(weight) is not nn.Parameter or weight.is_inference() for weight in weights):
        return None
    return tuple([(id(weight), weight.data_ptr(), weight._version) for weight in weights])


class KnownAhead:
    """What is made of a layer's parameters alone, in its part of a cache, for the steps that follow.

    Projections of some positions that follow each other, and 2/h^2 of bandwidths. They are made anew where a position
    is not among them, and where the parameters have changed.
    """

    def __init__(self) -> None:
        self._made: torch.Tensor | None = None
        self._apart: list[Vectors] = []
        self._first = 0
        self._weights: tuple[tuple[int, int, int], ...] = ()
        self._scales: dict[Any, tuple[Any, torch.Tensor]] = {}
        self._factors: tuple[Any, torch.Tensor, torch.Tensor] | None = None

    def scale(
        self,
        log_bandwidth: torch.Tensor | None,
        bandwidths: list[float],
        like: torch.Tensor,
        make: Callable[[], torch.Tensor],
    ) -> torch.Tensor:
        """What ``make`` returns, from a call before if it would be the same.

        Args:
            log_bandwidth: log h, ``[heads]``, or None.
            bandwidths: h where it is not learned.
            like: a tensor of the query's dtype and device.
            make: makes 2/h^2 of them, ``[heads, 1, 1]``.
        """
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return make()
        learned = None if log_bandwidth is None else _version((log_bandwidth,))
        if log_bandwidth is not None and learned is None:
            return make()
        name = (tuple(bandwidths) if log_bandwidth is None else id(log_bandwidth)), like.dtype, like.device
        known = self._scales.get(name)
        if (
            known is not None
            and known[0] == learned
            and (torch.is_inference_mode_enabled() or not known[1].is_inference())
        ):
            return known[1]
        scale = make()
        self._scales[name] = learned, scale
        return scale

    def side_by_side(self, content: torch.Tensor | float, place: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        """2/h^2 of content and of position as one factor of both side by side, ``[heads, 1, 2 * head_dim]``.

        Not for gradients.

        Args:
            content: a number or ``[heads, 1, 1]``.
            place: ``[heads, 1, 1]``.
            query: of the content, ``[batch, heads, 1, head_dim]``.
        """
        known = self._factors
        if known is not None and known[0] is content and known[1] is place:
            return known[2]
        shape = (*place.shape[:2], query.shape[-1])
        left = content.expand(shape) if isinstance(content, torch.Tensor) else place.new_full(shape, content)
        factors = torch.cat((left, place.expand(shape)), dim=-1)
        self._factors = content, place, factors
        return factors

    def rows(self, projection: Any, upcoming: Upcoming) -> Vectors | None:
        """What a ``PositionProjection`` makes of the positions.

        None where it would not be noticed that it changes, with adapters too.
        """
        norm, query, key = projection.norm, projection.query, projection.key
        if not type(query) is type(key) is nn.Linear:
            return None
        given = norm.weight, norm.bias, query.weight, key.weight, upcoming.table
        weights = _version(given)
        if weights is None:
            return None
        made, first = self._made, self._first
        is_there = made is not None and first <= upcoming.lowest and upcoming.highest < first + made.shape[2]
        if made is None or not is_there or weights != self._weights:
            first = upcoming.lowest
            made = projection(upcoming.table[None, first : upcoming.highest + POSITIONS_AHEAD])
            self._made, self._first, self._weights = made, first, weights
            self._apart = list(zip(*(half.split(1, dim=2) for half in made.chunk(2, dim=-1)), strict=True))
        if upcoming.lowest == upcoming.highest:
            return self._apart[upcoming.lowest - first]
        found = made[0].index_select(1, upcoming.positions[:, 0] - first).transpose(0, 1).unsqueeze(2)
        query, key = found.chunk(2, dim=-1)
        return query, key


def positions_made_ahead(projection: Any, upcoming: Upcoming | None, streams: Any) -> Vectors | None:
    """Projections of a decoding step's positions, of which no gradient is wanted.

    Args:
        projection: a ``PositionProjection``, or None.
        upcoming: the positions, or None.
        streams: the layer's part of a cache, which may have no room for them.
    """
    if projection is None or upcoming is None:
        return None
    ahead: KnownAhead | None = getattr(streams, "ahead", None)
    return None if ahead is None else ahead.rows(projection, upcoming)
