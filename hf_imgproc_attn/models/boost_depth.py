"""What travels from layer to layer: residual schemes across depth and feedback on the head output.

State is explicit: a :class:`LayerState` of tensors goes into every block and comes out of it, so that gradient
checkpointing and model parallelism see it. A scheme is a small pure function in one of the two tables below.

With f(u) = Attn(LN(u)), x_m the input of block m and x_0 the embedded input, after its dropout, a block l > 0 computes

    standard  x + f(x)
    twicing   x + f(x_0 - x)
    sos       f(x_0 + x) - x
    osher     x + f(x_0 + sum_{1 <= m <= l} (x_0 - x_m))

and then x + MLP(LN(x)) as in the stock model. Block 0 is always ``standard`` (arXiv 2506.10371; *choice*: the paper
names the family only, "boosting residual scheme"; the leading x keeps the identity path, without which training
degrades).

Feedback adds to the head output, before the output projection, with e_l = V_0 - V_l and e_0 = 0

    neutreno  lambda e_l                                               (Nguyen 2023)
    pid       lambda_P e_l + lambda_I sum_{m <= l} e_m + lambda_D (e_l - e_{l-1})     (PIDformer, Nguyen 2024)

``value_residual`` mixes values instead, (1 - lambda) V_l + lambda V_0 *inside* A, with one lambda a layer
(arXiv 2410.17897).

Feedback is not dropped out, and gradient flows through V_0 too. The factors are numbers of the configuration or, with
``learn_feedback``, parameters of every head and layer. With ``gradient_boosted`` V is the value of the first filter
and the head output is F + g * c.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from .spec_axes import DEFAULT_PID_GAINS


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


Residual = tuple[torch.Tensor, torch.Tensor, LayerState]
Feedback = tuple[torch.Tensor, LayerState]


def initial_state(config: Any, hidden_states: torch.Tensor) -> LayerState:
    """The state that goes into block 0: x_0 where the residual scheme needs it.

    Args:
        config: of the model.
        hidden_states: the embedded input after its dropout, ``[batch, length, hidden_size]``.
    """
    return LayerState(first_hidden=None if config.residual == "standard" else hidden_states)


def _first_hidden(state: LayerState) -> torch.Tensor:
    if state.first_hidden is None:
        raise ValueError("a residual scheme other than 'standard' needs the embedded input: call the whole model")
    return state.first_hidden


def standard_residual(hidden_states: torch.Tensor, state: LayerState) -> Residual:
    """x + f(x): the attention reads the stream itself."""
    return hidden_states, hidden_states, state


def twicing_residual(hidden_states: torch.Tensor, state: LayerState) -> Residual:
    """x + f(x_0 - x): the attention filters the difference between the embedded input and the current x."""
    return _first_hidden(state) - hidden_states, hidden_states, state


def sos_residual(hidden_states: torch.Tensor, state: LayerState) -> Residual:
    """f(x_0 + x) - x: strengthen, operate, subtract."""
    return _first_hidden(state) + hidden_states, -hidden_states, state


def osher_residual(hidden_states: torch.Tensor, state: LayerState) -> Residual:
    """x + f(x_0 + sum_{1 <= m <= l} (x_0 - x_m)): the differences to x_0 are summed over blocks and added to x_0."""
    first = _first_hidden(state)
    lost = first - hidden_states
    total = lost if state.hidden_sum is None else state.hidden_sum + lost
    return first + total, hidden_states, state._replace(hidden_sum=total)


def no_feedback(head_output: torch.Tensor, value: torch.Tensor, state: LayerState) -> Feedback:
    """The head output as it is."""
    return head_output, state


def neutreno_feedback(
    head_output: torch.Tensor, value: torch.Tensor, state: LayerState, strength: float | torch.Tensor = 0.6
) -> Feedback:
    """A V_l + lambda (V_0 - V_l); layer 0 is plain and hands on V_0."""
    if state.first_value is None:
        return head_output, state._replace(first_value=value)
    # A learned factor is in float32, and so is the product: half precision would round the factor.
    return head_output + (strength * (state.first_value - value)).to(head_output.dtype), state


def pid_feedback(
    head_output: torch.Tensor,
    value: torch.Tensor,
    state: LayerState,
    gains: tuple[float | torch.Tensor, ...] = DEFAULT_PID_GAINS,
) -> Feedback:
    """A V_l + lambda_P e_l + lambda_I sum_{1 <= m <= l} e_m + lambda_D (e_l - e_{l-1}); layer 0 hands on V_0."""
    if state.first_value is None or state.previous_value is None:
        return head_output, state._replace(first_value=value, previous_value=value)
    error = state.first_value - value
    total = error if state.feedback_sum is None else state.feedback_sum + error
    change = state.previous_value - value  # e_l - e_{l-1}, in which V_0 cancels
    proportional, integral, derivative = gains
    correction = proportional * error + integral * total + derivative * change
    return head_output + correction.to(head_output.dtype), state._replace(previous_value=value, feedback_sum=total)


def value_residual(head_output: torch.Tensor, value: torch.Tensor, state: LayerState) -> Feedback:
    """The head output as it is: V_0 comes into the values, by :func:`mixed_value`; layer 0 hands it on."""
    return head_output, state if state.first_value is not None else state._replace(first_value=value)


def mixed_value(value: torch.Tensor, first_value: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    """(1 - lambda) V_l + lambda V_0 of ``value_residual``, ``[batch, key_heads, length, d]``."""
    return value + (strength * (first_value - value)).to(value.dtype)


RESIDUAL = {
    "standard": standard_residual,
    "twicing": twicing_residual,
    "sos": sos_residual,
    "osher": osher_residual,
}
"""residual scheme -> function(hidden_states, state) -> (what the attention reads, what f is added to, new state).

All are ``[batch, length, hidden_size]``; the MLP keeps x + MLP(x).
"""

FEEDBACK: dict[str, Any] = {
    "none": no_feedback,
    "neutreno": neutreno_feedback,
    "pid": pid_feedback,
    "value_residual": value_residual,
}
"""feedback -> function(head_output, value, state, **gains) -> (new head output, new state).

Both tensors are ``[batch, heads, length, head_dim]``; the value is that of the new tokens.
"""


def feedback_gains(config: Any) -> list[float]:
    """The factors of a model's feedback, with the defaults resolved: lambda, or P, I and D; none without feedback."""
    if config.feedback == "neutreno":
        strength = config.neutreno_lambda
        return [float(config.default_neutreno_lambda if strength is None else strength)]
    if config.feedback == "pid":
        return [float(gain) for gain in (DEFAULT_PID_GAINS if config.pid_gains is None else config.pid_gains)]
    return []


def gain_arguments(feedback: str, gains: Sequence[float | torch.Tensor]) -> dict[str, Any]:
    """The keyword arguments of a feedback function.

    Args:
        feedback: a key of :data:`FEEDBACK`.
        gains: as :func:`feedback_gains` lists them, numbers or tensors ``[heads, 1, 1]``.
    """
    if feedback == "neutreno":
        return {"strength": gains[0]}
    return {"gains": tuple(gains)} if feedback == "pid" else {}
