"""The position kernel of one layer: s(p_i, p_j) as dense logits or as feature columns, and positions in cached keys.

Tokens come as ``[class tokens, grid tokens]``. Class or register tokens have no place on the grid. Each head learns
three scalars for them: grid to class, class to grid, class to class.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol, Self, TypeGuard

import torch

from .kernel_blocks import BlockKernel, DistanceKernel
from .kernel_content import (
    HALF_DTYPES,
    class_token_columns,
    class_token_logits,
    dot_product_logits,
    gaussian_position_columns,
    gaussian_position_logits,
    working_dtype,
)

MAX_FEATURE_SIDE = 4
"""Longest side of the grid, in units of the smallest bandwidth, up to which feature columns are used: their rounding
grows with the square of that ratio."""
MAX_SPLIT_SIDE = 256
"""The same in bfloat16, where columns are split into pieces of 24 bits together, and outputs have 8."""


class ClassTokens(NamedTuple):
    """Leading tokens without a place on the grid: how many, and their logits ``[heads, 3]`` (to, from, within).

    first_query: where the queries begin among the tokens, in a part of them.
    """

    num_tokens: int
    logits: torch.Tensor
    first_query: int = 0


def join_parameters(parameter: torch.Tensor, class_tokens: ClassTokens | None) -> tuple[torch.Tensor, ...]:
    """A kernel's own parameter, and the scalars of the class tokens where there are any."""
    return (parameter,) if class_tokens is None else (parameter, class_tokens.logits)


def replace_class_logits(class_tokens: ClassTokens | None, logits: tuple[torch.Tensor, ...]) -> ClassTokens | None:
    """The same class tokens with other scalars, of which there is one tensor or none."""
    return class_tokens if class_tokens is None or not logits else class_tokens._replace(logits=logits[0])


class UntiedPositions(NamedTuple):
    """<U_Q p_i, U_K p_j> * 2/h_p^2.

    query: U_Q p of the new tokens, ``[batch or 1, heads, length, head_dim]``, 0 for class tokens.
    key: U_K p of all tokens, ``[batch or 1, heads, key_length, head_dim]``, likewise.
    scale: 2/h_p^2, ``[heads, 1, 1]``, in at least float32.
    class_tokens: or None where every token has a place.
    packed: content keys, ``key``, and the tensor ``[batch, heads, key_length, 2 * head_dim]`` that both are parts of;
        None where they are not.
    """

    query: torch.Tensor
    key: torch.Tensor
    scale: torch.Tensor
    class_tokens: ClassTokens | None
    packed: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def grid_logits(self, dtype: torch.dtype) -> torch.Tensor:
        """Dense, ``[batch or 1, heads, length, key_length]`` in ``dtype``; class tokens are not cared for."""
        return dot_product_logits(self.query.to(dtype), self.key.to(dtype), self.scale)

    def grid_columns(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Query and key columns, and the row constant that they lack (none); 0 for class tokens."""
        return (self.query * self.scale).to(dtype), self.key, None

    def beside(self, key: torch.Tensor) -> torch.Tensor | None:
        """Keys of content and position as one tensor, if these content keys are part of one and nothing else is."""
        if self.packed is None or self.class_tokens is not None:
            return None
        content, place, both = self.packed
        return both if content is key and place is self.key else None

    def features_or_bias(self, dtype: torch.dtype) -> str:
        """See :func:`features_or_bias`."""
        return "features"


class GaussianPositions(NamedTuple):
    """-|p_i - p_j|^2 / h_p^2.

    coordinates: p of the new tokens, ``[batch or 1, length, dims]`` in index or patch units, in at least float32.
    key_coordinates: p of all tokens, ``[batch or 1, key_length, dims]``.
    scale: 2/h_p^2, ``[heads, 1, 1]``, in at least float32.
    class_tokens: or None where every token has a place.
    narrowest: the smallest h_p where it is no parameter, for the choice of form.
    learns_bandwidth: whether h_p is a parameter.
    contiguous: whether positions are known to be in order and to have no gaps, so that their number tells how far
        they reach.
    """

    coordinates: torch.Tensor
    key_coordinates: torch.Tensor
    scale: torch.Tensor
    class_tokens: ClassTokens | None
    narrowest: float
    learns_bandwidth: bool
    contiguous: bool

    def centred(self) -> GaussianPositions:
        """The same with positions around 0: columns lose digits with |p|^2, and only differences matter."""
        on_grid = self._on_grid()
        centre = (on_grid.amax(-2, keepdim=True) + on_grid.amin(-2, keepdim=True)) / 2
        return self._replace(coordinates=self.coordinates - centre, key_coordinates=self.key_coordinates - centre)

    def _on_grid(self) -> torch.Tensor:
        return self.key_coordinates[..., self.class_tokens.num_tokens if self.class_tokens else 0 :, :]

    def _side(self) -> float:
        """Longest side of the grid in index or patch units."""
        places, dims = self.key_coordinates.shape[-2:]
        if self.contiguous:
            return places if dims == 1 else 2 * places ** (1 / dims)
        on_grid = self._on_grid().detach()
        return float((on_grid.amax(-2) - on_grid.amin(-2)).max()) + 1

    def grid_logits(self, dtype: torch.dtype) -> torch.Tensor:
        """Dense, ``[batch or 1, heads, length, key_length]``; class tokens are not cared for."""
        return gaussian_position_logits(self.coordinates, self.key_coordinates, self.scale)

    def grid_columns(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Query and key columns, 0 for class tokens, and the row constant |p_i|^2 / h_p^2 that they dropped."""
        centred = self.centred()
        left, right = gaussian_position_columns(centred.coordinates, centred.key_coordinates, self.scale, dtype)
        if self.class_tokens is None:
            return left, right, None
        on_grid = (torch.arange(left.shape[-2], device=left.device) >= self.class_tokens.num_tokens).view(-1, 1)
        row_constant = centred.coordinates.square().sum(-1).unsqueeze(1) * (self.scale.squeeze(-1) / 2)
        return left * on_grid, right * on_grid, row_constant

    def block_kernel(self) -> BlockKernel:
        """See :class:`BlockedPositions`."""
        return DistanceKernel(squared=True)

    def parameters(self) -> tuple[torch.Tensor, ...]:
        """2/h_p^2, and the class tokens' scalars."""
        return join_parameters(self.scale, self.class_tokens)

    def with_parameters(self, first: torch.Tensor, *class_logits: torch.Tensor) -> GaussianPositions:
        """The same with other parameters, in the order of :meth:`parameters`."""
        return self._replace(scale=first, class_tokens=replace_class_logits(self.class_tokens, class_logits))

    def _narrowest_in_use(self) -> float | None:
        """The smallest h_p, or None where that is not known without waiting for an accelerator or breaking a graph."""
        if self.scale.device.type == "cpu" and not torch.compiler.is_compiling():
            return float(self.scale.detach().amax() / 2.0) ** -0.5
        return None if self.learns_bandwidth else self.narrowest

    def features_or_bias(self, dtype: torch.dtype) -> str:
        """See :func:`features_or_bias`."""
        # Large gradients of columns cancel in that of h_p.
        needs_gradient = self.learns_bandwidth and torch.is_grad_enabled()
        if needs_gradient or dtype == torch.float16 or (dtype == torch.bfloat16 and self.class_tokens):
            return "bias"
        if torch.compiler.is_exporting():  # an exported graph must serve every length
            return "bias"
        # Positions with gaps would have to be looked at, which one query and a traced graph are not worth.
        if not self.contiguous and (self.coordinates.shape[-2] == 1 or torch.compiler.is_compiling()):
            return "bias"
        narrowest = self._narrowest_in_use()
        most = MAX_SPLIT_SIDE if dtype in HALF_DTYPES else MAX_FEATURE_SIDE
        return "bias" if narrowest is None or not self._side() <= most * narrowest else "features"


class Positions(Protocol):
    """What a position kernel compares; the classes above and those of ``kernel_relative``."""

    @property
    def class_tokens(self) -> ClassTokens | None:
        """None where every token has a place."""

    def grid_logits(self, dtype: torch.dtype) -> torch.Tensor:
        """Dense, ``[batch or 1, heads, length, key_length]`` in ``dtype``; class tokens are not cared for."""

    def grid_columns(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Query and key columns, 0 for class tokens, and the row constant that they lack or None."""

    def features_or_bias(self, dtype: torch.dtype) -> str:
        """See :func:`features_or_bias`."""


class BlockedPositions(Positions, Protocol):
    """Positions whose kernel is a function of coordinates: it can be computed inside a block of attention.

    The coordinates of the queries and of all keys are given separately; their leading axis is 1 where the rows of a
    batch share their positions.
    """

    @property
    def coordinates(self) -> torch.Tensor:
        """p of the queries, ``[batch or 1, length, axes]``."""

    @property
    def key_coordinates(self) -> torch.Tensor:
        """p of all keys, ``[batch or 1, key_length, axes]``."""

    def block_kernel(self) -> BlockKernel:
        """The formula; see ``kernel_blocks``."""

    def parameters(self) -> tuple[torch.Tensor, ...]:
        """What may have a gradient, each with a leading axis of heads: the kernel's own, then the class tokens'."""

    def with_parameters(self, *parameters: torch.Tensor) -> Self:
        """The same with other parameters."""


def is_by_place(positions: Positions) -> TypeGuard[BlockedPositions]:
    """Whether a term is of that kind, told by one attribute: a traced graph cannot ask for the protocol."""
    return hasattr(positions, "block_kernel")


def check_coordinates(
    coordinates: torch.Tensor, batch: int, length: int, axes: int, *, num_class_tokens: int = 0, contiguous: bool
) -> None:
    """Refuse coordinates that are no grid of the tokens.

    Values are looked at on the CPU only: an accelerator would be waited for at every decoding step.

    Args:
        coordinates: what a caller gave.
        batch: rows of the input.
        length: its tokens, class tokens included.
        axes: of the grid: 1 for text, 2 for patches.
        num_class_tokens: leading tokens without a place, whose coordinates mean nothing.
        contiguous: whether the grid is said to be in order and without gaps.

    Raises:
        ValueError: for another shape, numbers that are not finite, or a grid with gaps that is said to have none.
    """
    # No set: hashing a shape would compile anew for every length.
    allowed = ((batch, length, axes), (1, length, axes))
    if tuple(coordinates.shape) not in allowed or coordinates.dtype in HALF_DTYPES:
        raise ValueError(
            f"coordinates must have shape {(batch, length, axes)} or {(1, length, axes)} (one row per token, one "
            "column per axis of the grid) and not be of half precision, got "
            f"{tuple(coordinates.shape)}, {coordinates.dtype}"
        )
    if coordinates.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if coordinates.is_floating_point() and not bool(coordinates.isfinite().all()):
        raise ValueError("coordinates must be finite, got inf or nan among them")
    places = coordinates[:, num_class_tokens:]
    if not contiguous or not places.shape[1]:
        return
    sides = (places.amax(1) - places.amin(1) + 1).tolist()
    if any(math.prod(side) != places.shape[1] for side in sides):
        raise ValueError(
            f"coordinates of a grid without gaps (contiguous=True) must fill it, got {places.shape[1]} places on a "
            f"grid of {' x '.join(f'{side:g}' for side in sides[0])}"
        )
    steps = places.diff(dim=1)[..., 0]
    if bool((steps < 0).any()):
        raise ValueError("coordinates of a grid without gaps (contiguous=True) must be in order, got them unsorted")


def features_or_bias(positions: Positions, dtype: torch.dtype) -> str:
    """How SDPA gets s(p_i, p_j): ``"features"``, or ``"bias"``, dense logits as an additive mask.

    Features only where output and gradients keep to three times plain attention's own error; else the bias, whose
    distances are differences of coordinates. A learned h_p never gets its gradient through columns, and the bandwidth
    that counts is the one in use. float16 has no room for p^2 / h^2, and the row constant that class tokens need does
    not survive in bfloat16. Attention in blocks (``backend_blocked``) needs neither form. The bounds are in
    tests/models/test_precision.py.
    """
    return positions.features_or_bias(dtype)


def position_logits(positions: Positions, dtype: torch.dtype) -> torch.Tensor:
    """s(p_i, p_j), dense, ``[batch or 1, heads, length, key_length]``, in the working precision of ``dtype``."""
    working = working_dtype(dtype)
    logits = positions.grid_logits(working)
    if positions.class_tokens is None:
        return logits
    count, class_logits, first_query = positions.class_tokens
    length, key_length = logits.shape[-2:]
    is_class_query = torch.arange(length, device=logits.device).view(-1, 1) + first_query < count
    is_class_key = torch.arange(key_length, device=logits.device).view(1, -1) < count
    bias = class_token_logits(class_logits.to(working), length, key_length, count, first_query)
    return logits.masked_fill(is_class_query | is_class_key, 0.0) + bias


def rows_of_positions(positions: Positions, rows: slice) -> Positions:
    """A position kernel of some of the queries, for dense logits."""
    changes: dict[str, Any] = {}
    for name in ("query", "query_features", "coordinates", "bias"):
        found = getattr(positions, name, None)
        if found is not None and not (name == "bias" and found.shape[-2] == 1):
            changes[name] = found[..., rows, :]
    if positions.class_tokens is not None:
        changes["class_tokens"] = positions.class_tokens._replace(first_query=rows.start)
    cut: Positions = positions._replace(**changes)  # type: ignore[attr-defined]
    return cut


def keys_of_positions(positions: Positions, count: int) -> Positions:
    """A position kernel of the first ``count`` keys, for dense logits."""
    changes: dict[str, Any] = {}
    for name in ("key", "key_features", "key_coordinates"):
        found = getattr(positions, name, None)
        if found is not None:
            changes[name] = found[..., :count, :]
    bias = getattr(positions, "bias", None)
    if bias is not None and bias.shape[-1] > 1:
        changes["bias"] = bias[..., :count]
    cut: Positions = positions._replace(**changes)  # type: ignore[attr-defined]
    return cut


def position_columns(positions: Positions, dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Pairs of query and key columns with <left_i, right_j> = s(p_i, p_j) + const_i, in ``dtype``."""
    left, right, row_constant = positions.grid_columns(dtype)
    columns = [(left, right)]
    if positions.class_tokens is not None:
        count, class_logits, _ = positions.class_tokens
        lengths = left.shape[-2], right.shape[-2]
        class_logits = class_logits.to(working_dtype(dtype))
        columns.append(class_token_columns(class_logits, row_constant, *lengths, count, dtype))
    return columns
