"""What travels from layer to layer: residual schemes across depth and feedback on the head output.

State is explicit: a :class:`LayerState` of tensors goes into every block and comes out of it, so that gradient
checkpointing and model parallelism see it. A scheme is a small pure function in one of the two tables below.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class LayerState(NamedTuple):
    """Tensors that a block hands to the next one; None where no scheme of the model needs them.

    first_hidden: x_0, the embedded input, ``[batch, length, hidden_size]``.
    hidden_sum: a running sum over earlier blocks' inputs, ``[batch, length, hidden_size]``.
    first_value: V_0, the first layer's values, ``[batch, heads, length, head_dim]``.
    previous_value: V of the preceding layer, same shape.
    feedback_sum: a running sum over earlier layers' feedback, same shape.
    """

    first_hidden: torch.Tensor | None = None
    hidden_sum: torch.Tensor | None = None
    first_value: torch.Tensor | None = None
    previous_value: torch.Tensor | None = None
    feedback_sum: torch.Tensor | None = None


def standard_residual(hidden_states: torch.Tensor, state: LayerState) -> tuple[torch.Tensor, torch.Tensor, LayerState]:
    """x + f(x): the attention reads the stream itself."""
    return hidden_states, hidden_states, state


def no_feedback(head_output: torch.Tensor, value: torch.Tensor, state: LayerState) -> tuple[torch.Tensor, LayerState]:
    """The head output as it is."""
    return head_output, state


RESIDUAL = {"standard": standard_residual}
"""residual scheme -> function(hidden_states, state) -> (what the attention reads, what f is added to, new state).

All are ``[batch, length, hidden_size]``; the MLP keeps x + MLP(x).
"""

FEEDBACK = {"none": no_feedback}
"""feedback -> function(head_output, value, state) -> (new head output, new state).

Both tensors are ``[batch, heads, length, head_dim]``; the value is that of the new tokens.
"""
