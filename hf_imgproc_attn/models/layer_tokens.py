"""One attention layer from its projected tokens to what its output projection reads; both backbones call this.

filter (with the boosters that are operators on V) -> gradient boosting -> feedback -> state for the next layer
"""

from __future__ import annotations

from typing import Any

import torch

from .boost_depth import FEEDBACK, LayerState
from .boost_gradient import SecondCache
from .layer_filter import AttentionFilter


def filter_tokens(
    layer: AttentionFilter,
    hidden_states: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    state: LayerState,
    *,
    past_key_values: Any = None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor | None, LayerState]:
    """Filter the values of one layer and hand on what later layers need.

    Args:
        layer: the layer's filter.
        hidden_states: what was projected, ``[batch, length, hidden_size]``.
        query: ``[batch, heads, length, head_dim]``.
        key: same shape.
        value: same shape.
        state: of the layers before.
        past_key_values: cache, updated in place.
        **options: further arguments of :class:`AttentionFilter`.

    Returns:
        The heads side by side, ``[batch, length, heads * head_dim]``; the operator that multiplies V
        ``[batch, heads, length, key_length]`` (of ``gradient_boosted`` its two filters
        ``[batch, 2, heads, length, key_length]``) or None; the new state.
    """
    output, weights = layer(
        query, key, value, past_key_values=past_key_values, previous_value=state.previous_value, **options
    )
    if layer.gradient_boosting is not None:
        second_cache = None
        if past_key_values is not None:
            second_cache = SecondCache(past_key_values, layer.layer_idx, first_stream=int(layer.has_metric))

        def attend(*projected: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
            return layer(*projected, past_key_values=second_cache, previous_value=value, **options)

        output, weights = layer.gradient_boosting(hidden_states, output, weights, attend)
    output, state = FEEDBACK[layer.spec.feedback](output, value, state, **layer.feedback_arguments())
    if layer.passes_value:
        state = state._replace(previous_value=value)
    return output.transpose(1, 2).flatten(2), weights, state
