"""One attention layer of any backbone: from its tokens to what its output projection reads, and the block around it.

filter (with the boosters that are operators on V) -> gradient boosting -> feedback -> state for the next layer -> gate
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from .boost_depth import RESIDUAL, LayerState
from .cache_followed import FollowingStreams, follow_layer, follow_stock_layer
from .cache_streams import NO_STREAMS, CachedStreams, Streams
from .layer_filter import AttentionFilter
from .layer_inputs import LayerInputs
from .spec_axes import COMPARING_KERNELS

Projected = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Query, key, value of the new tokens, each ``[batch, heads, length, head_dim]``."""


def filter_tokens(
    layer: AttentionFilter,
    hidden_states: torch.Tensor,
    projected: Projected,
    inputs: LayerInputs,
    dropout: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor | None, LayerState]:
    """Filter the values of one layer and hand on what later layers need.

    Args:
        layer: the layer's filter.
        hidden_states: what was projected, ``[batch, length, hidden_size]``.
        projected: query, key and value.
        inputs: see there.
        dropout: probability on A.

    Returns:
        The heads side by side, ``[batch, length, heads * head_dim]``; the attentions
        ``[batch, heads, length, key_length]`` (of ``gradient_boosted`` those of its rounds,
        ``[batch, rounds, heads, length, key_length]``) or None; the new state.
    """
    cache = inputs.past_key_values
    streams: Streams = NO_STREAMS if cache is None else cache_streams(cache, layer, inputs)
    if layer.context is not None:
        streams, inputs = layer.context.streams(), inputs._replace(visibility=layer.context.visibility())
    value, state = projected[2], inputs.state
    inputs = inputs._replace(hidden_states=hidden_states)
    output, weights = layer(*projected, inputs, streams=streams, dropout=dropout)
    if layer.gradient_boosting is not None:
        output, weights = _boost_by_gradient(layer, hidden_states, (output, value, weights), inputs, streams, dropout)
    if layer.compares_layers:
        output, state = layer.hand_on(output, value, state)
    if layer.gate is not None:
        output = layer.gate(hidden_states, output)
    return output.transpose(1, 2).flatten(2), weights, state


def cache_streams(cache: Any, layer: AttentionFilter, inputs: LayerInputs) -> Streams:
    """A layer's part of a cache of any kind.

    Args:
        cache: a Transformers cache.
        layer: the layer's filter.
        inputs: whose visibility tells how many keys are attended to.

    Raises:
        ValueError: for tokens that were stored without the filter, or by another one, and for a sliding cache.
    """
    # A decoder with cross-attention keeps the cache of its self-attention inside another one.
    cache = getattr(cache, "self_attention_cache", cache)
    layers, layer_idx = cache.layers, layer.layer_idx
    kind = layers[layer_idx] if layer_idx < len(layers) else cache.layer_class_to_replicate
    # By attribute and not by class: the same file may be loaded twice, from the package and from a checkpoint.
    if hasattr(kind, "update_stream"):
        return CachedStreams(cache, layer_idx)
    if getattr(kind, "is_sliding", False):
        raise ValueError(
            f"past_key_values forgets tokens in layer {layer_idx} ({kind!r}), and this model has no window: use "
            "DynamicCache(config=model.config)"
        )
    keeps = layer.stream_names or layer.spec.position_kernel in COMPARING_KERNELS
    followed = follow_layer(cache, layer_idx, layer.kind if keeps else None)
    key_length = inputs.visibility.key_length if inputs.visibility is not None else 0
    return FollowingStreams(followed, key_length, cache, layer_idx)


def project_each(hidden_states: torch.Tensor, head_dim: int, projections: tuple[nn.Module, ...]) -> Projected:
    """Query, key and value of ``[batch, length, hidden_size]`` by three projections."""
    # Not by a shape with a -1, which torch cannot tell for a batch of no rows.
    heads = (projection(hidden_states).unflatten(-1, (-1, head_dim)) for projection in projections)
    query, key, value = (tokens.transpose(1, 2) for tokens in heads)
    return query, key, value


def _boost_by_gradient(
    layer: AttentionFilter,
    hidden_states: torch.Tensor,
    first: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    inputs: LayerInputs,
    streams: Streams,
    dropout: float,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The rounds of gradient boosting after the first, see ``boost_gradient``.

    Args:
        first: output and values of the first round, ``[batch, heads, length, head_dim]``, and its map or None.

    Returns:
        The heads' output, and the maps of all rounds ``[batch, rounds, heads, length, key_length]`` or None.
    """
    output, value, weights = first
    estimate, maps = output.transpose(1, 2).flatten(2), [weights]
    for number, boost in enumerate(layer.later_rounds(), start=1):
        # Where the elliptical metric compares values, those of the round before come before those of this one.
        given = inputs._replace(state=inputs.state._replace(previous_value=value, first_value=None))
        attend = partial(layer, inputs=given, streams=streams.of_round(number), dropout=dropout)
        estimate, value, weights = boost(hidden_states, estimate, attend)
        maps.append(weights)
    output = estimate.unflatten(-1, (layer.num_heads, layer.head_dim)).transpose(1, 2)
    seen = [each for each in maps if each is not None]
    return output, torch.stack(seen, dim=1) if len(seen) == len(maps) else None


class FilteredAttentionMixin:
    """Put before a backbone's stock attention class, which it calls where the layer's attention is stock.

    The backbone says how tokens are projected (:meth:`project`), what follows the heads (:meth:`project_heads`), the
    probability of dropout on A (:meth:`dropout_on_weights`), and how its stock class is called (:meth:`attend_stock`).
    """

    filter: AttentionFilter

    def make_filter(
        self, config: Any, layer_idx: int, longest_side: int, layer_norm_eps: float, num_class_tokens: int = 0
    ) -> None:
        """Build the layer's filter, once the stock class has set ``head_dim`` and ``scaling``.

        The arguments are those of :class:`AttentionFilter`.
        """
        self.filter = AttentionFilter(
            config.layer_specs[layer_idx],
            config,
            layer_idx=layer_idx,
            head_dim=self.head_dim,  # type: ignore[attr-defined]
            scaling=self.scaling,  # type: ignore[attr-defined]
            longest_side=longest_side,
            layer_norm_eps=layer_norm_eps,
            num_class_tokens=num_class_tokens,
        )

    def project(self, hidden_states: torch.Tensor) -> Projected:
        """Query, key and value of ``[batch, length, hidden_size]``."""
        raise NotImplementedError

    def project_heads(self, heads: torch.Tensor) -> torch.Tensor:
        """``[batch, length, heads * head_dim]`` to ``[batch, length, hidden_size]``."""
        raise NotImplementedError

    def dropout_on_weights(self) -> float:
        """Probability of dropout on A, whether training or not."""
        raise NotImplementedError

    def attend_stock(
        self, hidden_states: torch.Tensor, inputs: LayerInputs, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The stock attention."""
        raise NotImplementedError

    def forward(
        self, hidden_states: torch.Tensor, inputs: LayerInputs, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None, LayerState]:
        """Filter ``hidden_states`` ``[batch, length, hidden_size]``.

        Returns:
            Output ``[batch, length, hidden_size]``, the attentions (see :func:`filter_tokens`) or None, the new state.
        """
        if self.filter.is_stock:
            follow_stock_layer(inputs.past_key_values, self.filter.layer_idx)
            attend = self.attend_stock if hidden_states.shape[0] else self._attend_to_nothing
            output, weights = attend(hidden_states, inputs, **kwargs)
            return output, weights, inputs.state
        dropout = self.dropout_on_weights() if self.training else 0.0  # type: ignore[attr-defined]
        projected = self.project(hidden_states)
        heads, weights, state = filter_tokens(self.filter, hidden_states, projected, inputs, dropout)
        return self.project_heads(heads), weights, state

    def _attend_to_nothing(
        self, hidden_states: torch.Tensor, inputs: LayerInputs, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The stock attention of an empty batch, which the stock code cannot reshape."""
        query, key, value = self.project(hidden_states)
        cache = getattr(inputs.past_key_values, "self_attention_cache", inputs.past_key_values)
        if cache is not None:
            key, value = cache.update(key, value, self.filter.layer_idx)
        weights = query @ key.transpose(-1, -2)
        return self.project_heads((weights @ value).transpose(1, 2).flatten(2)), weights


def filter_residual(
    attention: Any,
    norm: Callable[[torch.Tensor], torch.Tensor],
    hidden_states: torch.Tensor,
    inputs: LayerInputs,
    dropout: Callable[[torch.Tensor], torch.Tensor] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, LayerState]:
    """The first half of a block: norm, attention and the residual scheme around them.

    Args:
        attention: a :class:`FilteredAttentionMixin`.
        norm: before the attention.
        hidden_states: ``[batch, length, hidden_size]``.
        inputs: see there.
        dropout: on the attention's output, or None.
        **kwargs: for the stock attention.

    Returns:
        ``[batch, length, hidden_size]``, and the new state.
    """
    residual = RESIDUAL[attention.filter.spec.residual]
    attention_input, skip, state = residual(hidden_states, inputs.state)
    output, _, state = attention(norm(attention_input), inputs._replace(state=state), **kwargs)
    return skip + (output if dropout is None else dropout(output)), state
