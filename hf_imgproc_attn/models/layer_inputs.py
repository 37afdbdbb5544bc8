"""What a model hands to each of its layers beside the tokens: built and checked once a forward pass."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .boost_depth import LayerState
from .cache_ahead import Upcoming
from .visibility import Visibility


class LayerInputs(NamedTuple):
    """Everything that a layer needs to know besides its tokens.

    visibility: who sees whom; None in a model whose attention is stock in every layer.
    coordinates: places of the new tokens, ``[batch or 1, length, axes]`` in index or patch units, class tokens first;
        None where no kernel uses them. Models give integers: mixed precision of sharded models would round floats.
    contiguous: whether the coordinates are known to be in order and to have no gaps.
    position_states: ``untied``: position vectors of the new tokens ``[batch or 1, length, hidden_size]``, or, with
        shared projections, their projections ``[batch or 1, heads, length, 2 * head_dim]``; class tokens have none
        and are left out.
    state: what the layers before have handed on.
    past_key_values: cache, updated in place.
    stock_mask: what Transformers' own attention code takes in layers that are stock.
    backend: what computes the filters, ``"auto"`` or a key of ``BACKENDS``.
    attentions: which attentions are to be returned, one of ``ATTENTION_OUTPUTS``, or None.
    hidden_states: the layer's tokens after the norm, ``[batch, length, hidden_size]``, which some boosters project;
        :func:`filter_tokens` puts them in.
    upcoming: ``untied``, a decoding step: the new tokens' positions, and those that follow; None: of no use.
    """

    visibility: Visibility | None = None
    coordinates: torch.Tensor | None = None
    contiguous: bool = False
    position_states: torch.Tensor | None = None
    state: LayerState = LayerState()
    past_key_values: Any = None
    stock_mask: torch.Tensor | None = None
    backend: str = "auto"
    attentions: str | None = None
    hidden_states: torch.Tensor | None = None
    upcoming: Upcoming | None = None
