"""One layer's position kernel as its configuration has it: what it needs, and what it compares in one call."""

from __future__ import annotations

from typing import Any

import torch

from .kernel_position import ClassTokens, GaussianPositions, Positions, UntiedPositions
from .kernel_relative import AlibiPositions, BucketPositions, alibi_slopes, bucket_boundaries
from .kernel_rotary import rotate
from .layer_parameters import Scalars, bandwidth_scale, gaussian_position_bandwidths, per_head
from .spec_axes import (
    COORDINATE_KERNELS,
    DEFAULT_MAX_DISTANCE,
    DEFAULT_NUM_BUCKETS,
    DEFAULT_ROTARY_BASE,
    KERNELS_WITH_BANDWIDTH,
    LayerSpec,
)


class LayerPositions:
    """The position kernel of one layer; its parameters are in ``FilterScalars``.

    Args:
        spec: the layer's axes.
        config: the model's configuration.
        head_dim: width of a head.
        stock_bandwidth: h of stock attention, the default of ``untied``.
        longest_side: of the grid of positions, in index or patch units.
        num_class_tokens: leading tokens that have no place on the grid.
    """

    def __init__(
        self,
        spec: LayerSpec,
        config: Any,
        *,
        head_dim: int,
        stock_bandwidth: float,
        longest_side: int,
        num_class_tokens: int,
    ) -> None:
        self.kernel, self.axes, self.num_class_tokens = spec.position_kernel, config.position_axes, num_class_tokens
        heads = config.num_attention_heads
        self.has_class_logits = num_class_tokens > 0 and spec.compares_positions
        self.bandwidths = per_head(config.position_bandwidth, heads) or [stock_bandwidth] * heads
        if self.kernel == "gaussian" and config.position_bandwidth is None:
            self.bandwidths = gaussian_position_bandwidths(heads, head_dim, longest_side)
        self.has_bandwidth = self.kernel in KERNELS_WITH_BANDWIDTH
        self._rotary_base = float(config.rotary_base or DEFAULT_ROTARY_BASE)
        self.slopes = alibi_slopes(heads)
        # Text has buckets for earlier tokens only. Later tokens, which a caller's mask may show, share the bucket of
        # distance 0.
        self._bidirectional = self.axes > 1
        self.bucket_table: tuple[int, int] | None = None
        self._boundaries: list[int] = []
        if self.kernel == "relative_buckets":
            count = config.relative_attention_num_buckets or DEFAULT_NUM_BUCKETS
            max_distance = config.relative_attention_max_distance or DEFAULT_MAX_DISTANCE
            self.bucket_table = (self.axes, count)
            self._boundaries = bucket_boundaries(count // (1 + self._bidirectional), max_distance)

    def require(self, position_states: torch.Tensor | None, coordinates: torch.Tensor | None) -> None:
        """Refuse a call without what the kernel compares.

        Raises:
            ValueError: naming what is missing.
        """
        if self.kernel == "untied" and position_states is None:
            raise ValueError(f"position_states must be given for position_kernel={self.kernel!r}, got None")
        if self.sees_places and coordinates is None:
            raise ValueError(f"coordinates must be given for position_kernel={self.kernel!r}, got None")

    @property
    def sees_places(self) -> bool:
        """Whether the kernel compares coordinates."""
        return self.kernel in COORDINATE_KERNELS

    def rotate(
        self, query: torch.Tensor, key: torch.Tensor, coordinates: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """``rotary``: query and key rotated by their place, and no coordinates: later code no longer needs them."""
        if self.kernel != "rotary" or coordinates is None:
            return query, key, coordinates
        return self.turn(coordinates, query), self.turn(coordinates, key), None

    def turn(self, coordinates: torch.Tensor | None, rows: torch.Tensor) -> torch.Tensor:
        """``rotary``: rows ``[batch, heads, length, head_dim]`` rotated by their place; else as they are."""
        if self.kernel != "rotary" or coordinates is None:
            return rows
        return rotate(rows, coordinates, base=self._rotary_base, num_class_tokens=self.num_class_tokens)

    def terms(
        self,
        scalars: Scalars,
        vectors: tuple[torch.Tensor | None, torch.Tensor | None],
        coordinates: tuple[torch.Tensor | None, torch.Tensor | None],
        *,
        contiguous: bool,
        causal: bool,
        like: torch.Tensor,
        packed: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
        known: Any = None,
    ) -> tuple[Positions, ...]:
        """What is added to the logits: nothing or one term.

        Args:
            scalars: the layer's parameters.
            vectors: U_Q p of the new tokens and U_K p of all, or None.
            coordinates: of the new tokens and of all, or None.
            contiguous: whether coordinates are known to be in order and to have no gaps.
            causal: whether no query sees a later token.
            like: a tensor of the query's dtype and device.
            packed: what the content keys and U_K p are parts of, see :class:`UntiedPositions`, or None.
            known: a ``KnownAhead``, which keeps scales of a decoding step, or None.
        """
        class_logits = scalars.class_token
        class_tokens = None if class_logits is None else ClassTokens(self.num_class_tokens, class_logits)
        query, key = vectors
        if query is not None and key is not None:
            scale = bandwidth_scale(scalars.position_log_bandwidth, self.bandwidths, like, known)
            return (UntiedPositions(query, key, scale, class_tokens, packed),)
        new, all_coordinates = coordinates
        if new is None or all_coordinates is None:
            return ()
        if self.kernel == "alibi":
            slopes = torch.tensor(self.slopes, dtype=new.dtype, device=new.device).view(-1, 1, 1)
            return (AlibiPositions(new, all_coordinates, slopes, class_tokens, max(self.slopes), causal, contiguous),)
        if scalars.relative_buckets is not None:
            table = scalars.relative_buckets
            return (BucketPositions(new, all_coordinates, table, class_tokens, self._boundaries, self._bidirectional),)
        log_bandwidth = scalars.position_log_bandwidth
        scale = bandwidth_scale(log_bandwidth, self.bandwidths, like, known)
        # A parameter counts as learned even if it is frozen: it may have been trained before, so that the numbers of
        # the configuration are no longer its values.
        learns = log_bandwidth is not None
        return (
            GaussianPositions(new, all_coordinates, scale, class_tokens, min(self.bandwidths), learns, contiguous),
        )
