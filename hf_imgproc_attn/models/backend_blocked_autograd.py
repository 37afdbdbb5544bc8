"""Blocked attention as a function that autograd differentiates."""

from __future__ import annotations

from typing import Any

import torch

from .backend_blocked_backward import Gradients
from .backend_blocked_passes import Call, Computed, forward_passes


class BlockedFilter(torch.autograd.Function):
    """``apply(query, key, value, bias, past, call, *parameters)`` -> output, and x_1, x_2, ... of the queries.

    The streams stand side by side; the parameters are those of the position kernel.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor | None,
        past: torch.Tensor | None,
        call: Call,
        *parameters: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        computed = forward_passes(call, query, key, value, bias, past, parameters)
        ctx.call = call
        ctx.save_for_backward(query, key, value, bias, past, *computed, *parameters)
        ctx.set_materialize_grads(False)
        output = computed.output.to(value.dtype).unflatten(0, (call.plan.batch, call.plan.heads))
        return output, computed.streams

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor | None, stream_grad: torch.Tensor | None) -> tuple[Any, ...]:
        query, key, value, bias, past, *rest = ctx.saved_tensors
        computed, parameters = Computed(*rest[:3]), tuple(rest[3:])
        needs = ctx.needs_input_grad
        with torch.autocast(query.device.type, enabled=False):
            gradients = Gradients(ctx.call, query, key, value, bias, past, parameters, computed, needs[3], needs[6:])
            gradients.run(grad, stream_grad)
        own = (gradients.query, gradients.key, gradients.value, gradients.bias, gradients.past)
        positions = gradients.positions
        return (
            *map(_like, own, (query, key, value, bias, past)),
            None,
            *map(_like, [] if positions is None else positions.gradients, parameters),
        )


def _like(gradient: torch.Tensor | None, given: torch.Tensor | None) -> torch.Tensor | None:
    """A gradient in the dtype of what it belongs to."""
    return None if gradient is None or given is None else gradient.to(given.dtype)
