"""One attention layer as a filter: composes content kernel, position kernel, boosting and cache. Knows no backbone.

A backbone's attention projects its tokens to query, key and value and hands them to :class:`AttentionFilter`, together
with what the position kernel compares. :class:`AttentionFilter` makes one call of them, which a back-end computes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from .backend_call import Booster, Content, Difference, FilterCall
from .backend_reference import filter_logits, reference_attention
from .backend_table import run_filter
from .boost_delta import token_rates
from .boost_depth import FEEDBACK, LayerState, feedback_gains, gain_arguments, mixed_value
from .boost_differential import SECOND_KEY, SecondMap
from .boost_gate import OutputGate, TokenGains
from .boost_gradient import GradientBoosting
from .boost_operators import extra_streams, operator_on_value
from .boost_weights import weight_booster
from .cache_ahead import positions_made_ahead
from .cache_streams import NO_STREAMS, Streams, boost_stream, keep_apart, round_stream
from .kernel_content import unit_vectors, working_dtype
from .kernel_elliptical import elliptical_metric
from .kernel_forget import FORGET_STREAM, ForgetGates
from .kernel_normalisation import Normalisation
from .kernel_packed import pack_key, unpack_key
from .kernel_position import Positions
from .layer_gains import booster_gain
from .layer_inputs import LayerInputs
from .layer_parameters import FilterScalars, PositionProjection, Scalars, bandwidth_scale, per_head
from .layer_positions import LayerPositions
from .spec_axes import DEFAULT_SINKHORN_ITERATIONS, LayerSpec, is_stock_layer, needs_previous_value
from .visibility import Visibility


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

    heads: Any = None  # a HeadShare, where processes share the heads
    context: Any = None  # a SharedContext, where they share the tokens

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
        self._has_gain = spec.boosting in ("learned", "inversion", "dynamic_inversion", "delta")
        self.stream_names = self._stream_names()
        self._feedback_gains = feedback_gains(config)
        self.passes_value = needs_previous_value(config)
        self.compares_layers = self.passes_value or spec.feedback != "none"
        stock_bandwidth = math.sqrt(2.0 / scaling)
        # Products of unit vectors have a variance of 1/d: with this factor they start as those of stock attention.
        content_scale = math.sqrt(head_dim) if spec.content_kernel == "cosine" else scaling
        self._content_bandwidths = (
            per_head(config.content_bandwidth, self.num_heads) or [math.sqrt(2.0 / content_scale)] * self.num_heads
        )
        # The stock factor is kept as it is, not rounded through h.
        self._stock_scale = content_scale if config.content_bandwidth is None else None
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
            boosting=spec.boosting,
            sink=spec.normalisation == "sink",
            value_residual=spec.feedback == "value_residual" and layer_idx > 0,
            # Layer 0 hands its values on and has no feedback of its own.
            feedback=self._feedback_gains if config.learn_feedback and layer_idx > 0 else None,
        )
        # A sink is softmax with one more key.
        name = "softmax" if spec.normalisation == "sink" else spec.normalisation
        self._normalisation = Normalisation(name, config.sinkhorn_iterations or DEFAULT_SINKHORN_ITERATIONS)
        self._has_scalars = any(True for _ in self.scalar_bias.parameters())
        self._sees_positions = spec.position_kernel not in ("additive", "forget", "none")
        forgets = spec.position_kernel == "forget"
        self.forget_gates = ForgetGates(config.hidden_size, self.num_heads) if forgets else None
        self.position_projection = None
        if spec.position_kernel == "untied" and not config.share_position_projections:
            self.position_projection = PositionProjection(config.hidden_size, self.num_heads, head_dim, layer_norm_eps)
        hidden, heads = config.hidden_size, self.num_heads
        self.token_gains = TokenGains(hidden, heads) if spec.boosting == "dynamic_inversion" else None
        self.token_rates = token_rates(spec, config)
        self.weight_booster = weight_booster(spec, config, head_dim)
        self.second_map = SecondMap(hidden, heads, head_dim) if spec.boosting == "differential" else None
        self.gate = None if spec.gate == "none" else OutputGate(spec.gate, hidden, heads, head_dim)
        self.gradient_boosting = None
        if spec.boosting == "gradient_boosted":
            given = (hidden, heads, head_dim, spec.gradient_boosting_source)
            # The second round has the names of checkpoints from the time when it was the last one.
            self.gradient_boosting = GradientBoosting(*given)
            if spec.boosting_steps > 2:
                further = (GradientBoosting(*given) for _ in range(2, spec.boosting_steps))
                self.gradient_boosting_further = nn.ModuleList(further)

    @property
    def kind(self) -> str:
        """What the filter is, in one line."""
        spec = self.spec
        steps = "" if spec.boosting in ("none", "learned") else f" ({spec.boosting_steps})"
        return f"{spec.content_kernel}, {spec.position_kernel}, {spec.boosting}{steps}, {spec.feedback}"

    def later_rounds(self) -> list[GradientBoosting]:
        """The rounds of gradient boosting after the first, in order; none with another booster."""
        further = getattr(self, "gradient_boosting_further", ())
        return [] if self.gradient_boosting is None else [self.gradient_boosting, *further]

    def _stream_names(self) -> tuple[str, ...]:
        """What a cache has to keep beside keys and values; see ``cache_streams``."""
        metric = ["metric"] if self.has_metric else []
        metric += [SECOND_KEY] if self.spec.boosting == "differential" else []
        metric += [FORGET_STREAM] if self.spec.position_kernel == "forget" else []
        if self.spec.boosting == "gradient_boosted":
            rounds, names = range(1, self.spec.boosting_steps), ("key", "value", *metric)
            return (*metric, *(round_stream(number, name) for number in rounds for name in names))
        applications = extra_streams(self.spec.boosting, self.spec.boosting_steps)
        return (*metric, *(boost_stream(number + 1) for number in range(applications)))

    def feedback_arguments(self) -> dict[str, Any]:
        """What the layer's feedback function takes: numbers, or learned factors ``[heads, 1, 1]``."""
        gains: Sequence[float | torch.Tensor] = self._feedback_gains
        if self.scalar_bias.feedback_gains is not None:
            learned = self.scalar_bias().feedback_gains
            gains = [] if learned is None else [gain.view(-1, 1, 1) for gain in learned.unbind(-1)]
        return gain_arguments(self.spec.feedback, gains)

    def hand_on(self, output: torch.Tensor, value: torch.Tensor, state: LayerState) -> tuple[torch.Tensor, LayerState]:
        """Add the feedback of earlier layers, and put into the state what later ones compare.

        Args:
            output: of the filter, ``[batch, heads, length, d]``.
            value: of the new tokens, ``[batch, key_heads, length, d]``.
            state: what the layers before have handed on.
        """
        if self.spec.feedback != "none":
            groups = 1 if self.spec.feedback == "value_residual" else output.shape[1] // value.shape[1]
            wide = value if groups == 1 else value.repeat_interleave(groups, dim=1)
            output, state = FEEDBACK[self.spec.feedback](output, wide, state, **self.feedback_arguments())
        if self.passes_value:
            state = state._replace(previous_value=value)
        return output, state

    def _content_scale(self, scalars: Scalars, like: torch.Tensor, streams: Streams = NO_STREAMS) -> torch.Tensor:
        """2/h_y^2, ``[heads, 1, 1]`` in the working precision."""
        known = getattr(streams, "ahead", None)
        return bandwidth_scale(scalars.content_log_bandwidth, self._content_bandwidths, like, known)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        inputs: LayerInputs,
        *,
        streams: Streams | None = None,
        dropout: float = 0.0,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Filter the values.

        Args:
            query: ``[batch, heads, length, head_dim]``.
            key: ``[batch, key_heads, length, head_dim]``.
            value: ``[batch, key_heads, length, head_dim]``.
            inputs: visibility, positions and the values of the preceding layer; see there.
            streams: the layer's part of a cache, updated in place; None without a cache.
            dropout: probability on A.

        Returns:
            ``[batch, heads, length, head_dim]``, and the attentions ``[batch, heads, length, key_length]`` that were
            asked for, or None.

        Raises:
            ValueError: without what the kernels compare, or for a back-end that cannot serve the call.
        """
        call = self.compose(query, key, value, inputs, streams or NO_STREAMS, dropout)
        if inputs.attentions is not None:
            return reference_attention(filter_logits(call), call, inputs.attentions)
        return run_filter(call, inputs.backend, "filter_backend"), None

    def compose(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        inputs: LayerInputs,
        streams: Streams,
        dropout: float = 0.0,
    ) -> FilterCall:
        """The call that a back-end receives; arguments as of :meth:`forward`. Keys and values go into the cache."""
        if inputs.visibility is None:
            raise ValueError("inputs.visibility must be given for a layer whose attention is not stock, got None")
        scalars = self.scalar_bias() if self._has_scalars else Scalars()
        new_value = value
        if scalars.value_residual is not None and inputs.state.first_value is not None:
            value = mixed_value(value, inputs.state.first_value, scalars.value_residual)
        positions: tuple[Positions, ...] = ()
        if self._sees_positions:
            query, key, value, positions = self._with_positions(query, key, value, inputs, scalars, streams)
        elif streams.is_cached:
            key, value = streams.update(key, value)
        if self.forget_gates is not None:
            if inputs.hidden_states is None:
                raise ValueError("inputs.hidden_states must be given for position_kernel='forget', got None")
            positions = (self.forget_gates.positions(inputs.hidden_states, inputs.visibility, streams),)
        call = self.call(
            (query, key, value),
            scalars,
            visibility=inputs.visibility,
            positions=positions,
            moved=(new_value, inputs.state.previous_value),
            streams=streams,
            dropout=dropout,
            hidden_states=inputs.hidden_states,
            coordinates=inputs.coordinates,
        )
        if self.second_map is None or scalars.differential is None:
            return call
        return call.changed(difference=self._difference(scalars.differential, inputs, inputs.visibility, streams))

    def _difference(
        self, share: torch.Tensor, inputs: LayerInputs, visibility: Visibility, streams: Streams
    ) -> Difference:
        """The second map of ``differential``, whose keys go into the cache."""
        if self.second_map is None or inputs.hidden_states is None:
            raise ValueError("inputs.hidden_states must be given for boosting='differential', got None")
        query, key = self.second_map(inputs.hidden_states)
        coordinates = inputs.coordinates
        if coordinates is not None:
            coordinates = coordinates.to(working_dtype(query.dtype))
        query, key, _ = self.positions.rotate(query, key, coordinates)
        key = streams.append(SECOND_KEY, key)
        if self.spec.content_kernel == "cosine":
            query, key = unit_vectors(visibility.clean_queries(query)), unit_vectors(visibility.clean_keys(key))
        return Difference(query, key, share.to(working_dtype(query.dtype)).view(-1, 1, 1))

    def call(
        self,
        projected: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        scalars: Scalars,
        *,
        visibility: Visibility,
        positions: tuple[Positions, ...],
        moved: tuple[torch.Tensor, torch.Tensor | None],
        streams: Streams,
        dropout: float,
        hidden_states: torch.Tensor | None = None,
        coordinates: torch.Tensor | None = None,
    ) -> FilterCall:
        """The call that a back-end receives, of what is ready for it.

        Args:
            projected: query of the new tokens, keys and values of all tokens.
            scalars: the layer's parameters.
            visibility: who sees whom.
            positions: the position kernel's terms.
            moved: values of the new tokens in this layer and in the one before it, or None, for the elliptical metric.
            streams: the layer's part of a cache.
            dropout: probability on A.
            hidden_states: what was projected, where the booster projects it too.
            coordinates: of the new tokens, where the position kernel turns by them what is projected.
        """
        query, key, value = projected
        content_kernel = self.spec.content_kernel
        if content_kernel == "cosine":
            # Whatever stands at what nobody sees must not come into the gradient.
            query, key = unit_vectors(visibility.clean_queries(query)), unit_vectors(visibility.clean_keys(key))
            content_kernel = "dot_product"
        scale: torch.Tensor | float | None = self._stock_scale
        if scale is None or scalars.content_log_bandwidth is not None:
            scale = self._content_scale(scalars, query, streams)
        if self.has_metric:
            if moved[1] is None:
                raise ValueError(
                    f"previous_value must be given for content_kernel='elliptical' in layer {self.layer_idx}, got None"
                )
            metric = elliptical_metric(moved[0], moved[1], visibility, streams)
            if metric.shape[1] != query.shape[1]:
                metric = metric.repeat_interleave(query.shape[1] // metric.shape[1], dim=1)
            scale = metric * scale
        gain = booster_gain(self, scalars, hidden_states, query.dtype) if self._has_gain else None
        by_weights = None
        if self.weight_booster is not None:
            by_weights = self.weight_booster(hidden_states, visibility, partial(self.positions.turn, coordinates))
        return FilterCall(
            query,
            key,
            value,
            content=Content(content_kernel, scale),
            visibility=visibility,
            positions=positions,
            booster=Booster(self.operator, self.spec.boosting_steps, gain),
            dropout=dropout,
            streams=streams,
            own_value=streams.own_value(value, query.shape[-2]) if streams.is_cached else None,
            sinks=scalars.sink,
            normalisation=self._normalisation,
            by_weights=by_weights,
        )

    def _with_positions(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        inputs: LayerInputs,
        scalars: Scalars,
        streams: Streams,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple[Positions, ...]]:
        """Query of the new tokens, keys and values of all tokens, and the position kernel's terms."""
        coordinates = inputs.coordinates if self.positions.sees_places else None
        self.positions.require(inputs.position_states, coordinates)
        if coordinates is not None:
            coordinates = coordinates.to(working_dtype(query.dtype))
        position_query, position_key = self._position_vectors(inputs, streams, query)
        query, key, coordinates = self.positions.rotate(query, key, coordinates)
        if position_key is not None and key.shape[1] != position_key.shape[1]:
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        all_coordinates, packed = coordinates, None
        if streams.keeps_places_apart:
            key, value = streams.update(key, value)
            position_key, all_coordinates = keep_apart(streams, position_key, coordinates, query.shape[0])
        elif streams.is_cached:
            packed, value = streams.update(pack_key(key, position_key, coordinates), value)
            key, position_key, all_coordinates = unpack_key(packed, self.spec.position_kernel, self.head_dim)
        terms = self.positions.terms(
            scalars,
            (position_query, position_key),
            (coordinates, all_coordinates),
            contiguous=inputs.contiguous,
            causal=inputs.visibility is not None and inputs.visibility.causal,
            like=query,
            packed=None if packed is None or position_key is None else (key, position_key, packed),
            known=getattr(streams, "ahead", None),
        )
        return query, key, value, terms

    def _position_vectors(
        self, inputs: LayerInputs, streams: Streams, query: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """U_Q p and U_K p of the new tokens, ``[batch or 1, heads, length, head_dim]``; 0 for class tokens."""
        pair = inputs.position_states
        if self.spec.position_kernel != "untied" or pair is None:
            return None, None
        made = positions_made_ahead(self.position_projection, inputs.upcoming, streams)
        if made is not None:
            parts = made if self.heads is None else tuple(self.heads.mine(part, dim=1) for part in made)
            return parts[0].to(query.dtype), parts[1].to(query.dtype)
        pair = pair if self.position_projection is None else self.position_projection(pair)
        pair = pair if self.heads is None else self.heads.mine(pair, dim=1)
        if self.positions.num_class_tokens:
            pair = nn.functional.pad(pair, (0, 0, self.positions.num_class_tokens, 0))
        position_query, position_key = pair.to(query.dtype).chunk(2, dim=-1)
        return position_query, position_key
