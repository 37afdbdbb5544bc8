"""One attention layer as a filter: composes content kernel, position kernel, boosting and cache. Knows no backbone.

A backbone's attention projects its tokens to query, key and value and hands them to :class:`AttentionFilter`, together
with what the position kernel compares. Attention implementation ``eager`` is the dense reference; ``sdpa`` leaves the
choice of a fast path to ``backend_run``, or to the configuration's ``filter_backend``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from .backend_reference import reference_attention
from .backend_run import dense_logits, run_filter
from .boost_depth import feedback_gains, gain_arguments
from .boost_gradient import GradientBoosting
from .boost_operators import Extend, extra_streams, keep_rows, operator_on_value
from .cache_layer import after_first, check_cache_layer
from .kernel_content import working_dtype
from .kernel_elliptical import elliptical_metric
from .kernel_position import pack_key, unpack_key
from .layer_parameters import FilterScalars, PositionProjection, Scalars, bandwidth_scale, per_head
from .layer_positions import LayerPositions
from .spec_axes import LayerSpec, is_stock_layer, needs_previous_value

logger = logging.get_logger(__name__)

SUPPORTED_IMPLEMENTATIONS = ("eager", "sdpa")


def check_attn_implementation(name: str | None) -> None:
    """Refuse attention back-ends that are not built, by name.

    Raises:
        ValueError: naming the value and what is allowed.
    """
    if name is not None and name not in SUPPORTED_IMPLEMENTATIONS:
        raise ValueError(f"attn_implementation must be one of {', '.join(SUPPORTED_IMPLEMENTATIONS)}, got {name!r}")


class AttentionFilter(nn.Module):
    """The filter of one layer.

    Args:
        spec: the layer's axes.
        config: the model's configuration (filter fields, number of heads).
        layer_idx: index of the layer, for the cache.
        head_dim: width of a head.
        scaling: the stock model's factor on q.k; the default h_y has 2/h_y^2 = scaling.
        longest_side: of the grid of positions, in index or patch units.
        layer_norm_eps: of the norm before the position projections.
        num_class_tokens: leading tokens that have no place on the grid.

    Shapes (``length`` new tokens, ``key_length`` with the cached ones): query, key, value
    ``[batch, heads, length, head_dim]``; key and value may have fewer heads (grouped queries).
    """

    def __init__(
        self,
        spec: LayerSpec,
        config: Any,
        *,
        layer_idx: int,
        head_dim: int,
        scaling: float,
        longest_side: int,
        layer_norm_eps: float,
        num_class_tokens: int = 0,
    ) -> None:
        super().__init__()
        self.spec, self.layer_idx, self._config = spec, layer_idx, config
        self.is_stock = is_stock_layer(config, spec)
        self.head_dim, self.num_heads = head_dim, config.num_attention_heads
        # Layer 0 has no layer before it to compare its values with.
        self.has_metric = spec.content_kernel == "elliptical" and layer_idx > 0
        self.operator = operator_on_value(spec.boosting)
        # The second filter of gradient boosting has sums of its own.
        num_metrics = self.has_metric * (2 if spec.boosting == "gradient_boosted" else 1)
        self.num_streams = extra_streams(spec.boosting, spec.boosting_steps) + num_metrics
        self._feedback_gains = feedback_gains(config)
        self.passes_value = needs_previous_value(config)
        stock_bandwidth = math.sqrt(2.0 / scaling)
        self._content_bandwidths = (
            per_head(config.content_bandwidth, self.num_heads) or [stock_bandwidth] * self.num_heads
        )
        # The stock factor is kept as it is, not rounded through h.
        self._stock_scale = scaling if config.content_bandwidth is None else None
        self.positions = positions = LayerPositions(
            spec,
            config,
            head_dim=head_dim,
            stock_bandwidth=stock_bandwidth,
            longest_side=longest_side,
            num_class_tokens=num_class_tokens,
        )
        learned = config.learn_bandwidths
        self.scalar_bias = FilterScalars(
            self.num_heads,
            self._content_bandwidths if learned else None,
            positions.bandwidths if learned and positions.has_bandwidth else None,
            class_token=positions.has_class_logits,
            buckets=positions.bucket_table,
            gain=spec.boosting == "learned",
            # Layer 0 hands its values on and has no feedback of its own.
            feedback=self._feedback_gains if config.learn_feedback and layer_idx > 0 else None,
        )
        self.position_projection = None
        if spec.position_kernel == "untied" and not config.share_position_projections:
            self.position_projection = PositionProjection(config.hidden_size, self.num_heads, head_dim, layer_norm_eps)
        self.gradient_boosting = None
        if spec.boosting == "gradient_boosted":
            self.gradient_boosting = GradientBoosting(config.hidden_size, self.num_heads, head_dim)

    def feedback_arguments(self) -> dict[str, Any]:
        """What the layer's feedback function takes: numbers, or learned factors ``[heads, 1, 1]``."""
        gains: Sequence[float | torch.Tensor] = self._feedback_gains
        if self.scalar_bias.feedback_gains is not None:
            learned = self.scalar_bias().feedback_gains
            gains = [] if learned is None else [gain.view(-1, 1, 1) for gain in learned.unbind(-1)]
        return gain_arguments(self.spec.feedback, gains)

    def _content_scale(self, scalars: Scalars, like: torch.Tensor) -> torch.Tensor | float:
        """2/h_y^2: the stock factor as a number, or ``[heads, 1, 1]`` in the working precision."""
        if scalars.content_log_bandwidth is None and self._stock_scale is not None:
            return self._stock_scale
        return bandwidth_scale(scalars.content_log_bandwidth, self._content_bandwidths, like)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        implementation: str,
        attention_mask: torch.Tensor | None = None,
        is_causal: bool = False,
        dropout: float = 0.0,
        position_states: torch.Tensor | None = None,
        coordinates: torch.Tensor | None = None,
        contiguous: bool = False,
        token_mask: torch.Tensor | None = None,
        previous_value: torch.Tensor | None = None,
        past_key_values: Any = None,
        need_weights: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Filter the values.

        Args:
            query: ``[batch, heads, length, head_dim]``.
            key: ``[batch, key_heads, length, head_dim]``.
            value: ``[batch, key_heads, length, head_dim]``.
            implementation: ``"eager"`` or ``"sdpa"``.
            attention_mask: boolean (True = visible) or additive float, broadcastable to
                ``[batch, heads, length, key_length]``, or None.
            is_causal: whether the layer is causal; used where there is no mask.
            dropout: probability on A.
            position_states: ``untied``: position vectors of the new tokens ``[batch or 1, length, hidden_size]``, or,
                with shared projections, their projections ``[batch or 1, heads, length, 2 * head_dim]``; class tokens
                have none and are left out.
            coordinates: ``gaussian``, ``alibi``, ``relative_buckets``, ``rotary``: ``[batch or 1, length, axes]`` in
                index or patch units, class tokens first. Integers, where something on the way may cast floats (mixed
                precision of sharded models does).
            contiguous: whether the coordinates are known to be in order and to have no gaps.
            token_mask: boolean ``[batch or 1, length]``: which new tokens are no padding. Given only where
                ``attention_mask`` hides nothing but padding and, if ``is_causal``, later tokens.
            previous_value: ``elliptical`` beyond layer 0: the value of the preceding layer, shaped like ``value``.
            past_key_values: cache, updated in place.
            need_weights: return the operator that multiplies V (eager only).

        Returns:
            ``[batch, heads, length, head_dim]``, and the operator ``[batch, heads, length, key_length]`` or None.

        Raises:
            ValueError: for an implementation or a cache that is not supported, a mask of integers, coordinates of no
                grid, or without what the kernels compare.
        """
        check_attn_implementation(implementation)
        coordinates = self.positions.check(query, position_states, coordinates, contiguous)
        if self.has_metric and previous_value is None:
            raise ValueError(
                f"previous_value must be given for content_kernel='elliptical' in layer {self.layer_idx}, got None"
            )
        scalars = self.scalar_bias()
        if key.shape[1] != query.shape[1]:
            groups = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
            previous_value = None if previous_value is None else previous_value.repeat_interleave(groups, dim=1)
        position_query, position_key = self._position_vectors(position_states, query)
        query, key, coordinates = self.positions.turn(query, key, coordinates)
        key_coordinates, full_value = coordinates, value
        extend: Extend = keep_rows
        past_streams: list[torch.Tensor] | None = None
        if past_key_values is not None:
            check_cache_layer(past_key_values, self.layer_idx, self.num_streams)
            packed = pack_key(key, position_key, coordinates)
            packed, full_value = past_key_values.update(packed, value, self.layer_idx)
            key, position_key, key_coordinates = unpack_key(packed, self.spec.position_kernel, self.head_dim)
            past_streams = []
            if self.num_streams:
                layer = past_key_values.layers[self.layer_idx]
                extend = layer.update_stream
                if self.operator != "none":
                    past_streams = layer.streams[int(self.has_metric) :]
        if need_weights and implementation != "eager":
            logger.warning_once(
                f"attn_implementation={implementation!r} does not return attentions: set it to 'eager' for that"
            )
            need_weights = False
        # Only a mask known to hide no more than padding and the future leaves a causal layer causal for sure.
        only_past = is_causal and (attention_mask is None or token_mask is not None)
        positions = self.positions.compared(
            scalars,
            (position_query, position_key),
            (coordinates, key_coordinates),
            contiguous=contiguous,
            only_past=only_past,
            like=query,
        )
        content_scale = self._content_scale(scalars, query)
        if self.has_metric and previous_value is not None:
            metric = elliptical_metric(
                value,
                previous_value,
                attention_mask=attention_mask,
                token_mask=token_mask,
                is_causal=is_causal,
                extend=extend,
            )
            content_scale, extend = metric * content_scale, after_first(extend)
        length, key_length = query.shape[-2], key.shape[-2]
        is_causal = is_causal and attention_mask is None and length > 1
        if is_causal and key_length > length:  # the new tokens are the last ones
            attention_mask = torch.ones(length, key_length, dtype=torch.bool, device=query.device)
            attention_mask, is_causal = attention_mask.tril(key_length - length), False
        gain = scalars.boosting_gain
        options: dict[str, Any] = {
            "attention_mask": attention_mask,
            "is_causal": is_causal,
            "boosting": self.operator,
            "boosting_steps": self.spec.boosting_steps,
            "boosting_gain": None if gain is None else gain.to(working_dtype(query.dtype)).view(-1, 1, 1),
            "dropout": dropout,
            "extend": extend,
        }
        kernels: dict[str, Any] = {
            "content_kernel": self.spec.content_kernel,
            "content_scale": content_scale,
            "positions": positions,
        }
        if implementation == "eager":
            logits = dense_logits(query, key, **kernels)
            return reference_attention(logits, value, full_value, need_weights=need_weights, **options)
        output = run_filter(
            query,
            key,
            value,
            full_value,
            backend=self._config.filter_backend,
            kernels=kernels,
            only_past=only_past,
            past_streams=past_streams,
            **options,
        )
        return output, None

    def _position_vectors(
        self, position_states: torch.Tensor | None, query: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """U_Q p and U_K p of the new tokens, ``[batch or 1, heads, length, head_dim]``; 0 for class tokens."""
        if self.spec.position_kernel != "untied" or position_states is None:
            return None, None
        pair = position_states if self.position_projection is None else self.position_projection(position_states)
        pair = nn.functional.pad(pair, (0, 0, self.positions.num_class_tokens, 0))
        position_query, position_key = pair.to(query.dtype).chunk(2, dim=-1)
        return position_query, position_key
