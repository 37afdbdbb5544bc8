"""A layer's factors of its booster, from its parameters and, where they differ from token to token, its input."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .boost_delta import rates
from .kernel_content import working_dtype
from .layer_parameters import Scalars


def booster_gain(
    layer: Any, scalars: Scalars, hidden_states: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor | None:
    """The factors beside queries of ``dtype``, as ``boost_operators`` and ``boost_delta`` take them.

    Args:
        layer: an ``AttentionFilter``.
        scalars: its parameters.
        hidden_states: what queries are projected from, ``[batch, length, hidden_size]``, or None.
        dtype: of the queries.

    Raises:
        ValueError: without the input where the factors are made of it.
    """
    working = working_dtype(dtype)
    if scalars.boosting_gain is not None:
        return scalars.boosting_gain.to(working).view(-1, 1, 1)
    if scalars.inversion_gains is not None:
        return scalars.inversion_gains.to(working).mT[..., None, None]
    if scalars.delta is not None:
        return rates(scalars.delta, _by_token(layer, layer.token_rates, hidden_states, 1), working)
    return _by_token(layer, layer.token_gains, hidden_states, 2)


def _by_token(
    layer: Any, module: nn.Module | None, hidden_states: torch.Tensor | None, dim: int
) -> torch.Tensor | None:
    """What a module makes of each token, of the heads that are in this process, which ``dim`` counts."""
    if module is None:
        return None
    if hidden_states is None:
        raise ValueError(f"inputs.hidden_states must be given for boosting={layer.spec.boosting!r}, got None")
    made: torch.Tensor = module(hidden_states)
    return made if layer.heads is None else layer.heads.mine(made, dim=dim)
