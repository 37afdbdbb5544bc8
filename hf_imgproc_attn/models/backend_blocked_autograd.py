"""Blocked attention as a function that autograd differentiates."""

from __future__ import annotations

from typing import Any

import torch

from .backend_blocked_backward import Gradients
from .backend_blocked_dense import dense_passes
from .backend_blocked_passes import Call, Computed, Tensors, forward_passes


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
        computed = forward_passes(call, Tensors(query, key, value, bias, past, parameters))
        ctx.call = call
        ctx.save_for_backward(query, key, value, bias, past, *computed, *parameters)
        ctx.set_materialize_grads(False)
        output = computed.output.to(value.dtype).unflatten(0, (call.plan.batch, call.plan.heads))
        return output, computed.streams

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None, stream_grad: torch.Tensor | None) -> tuple[Any, ...]:
        query, key, value, bias, past, *rest = ctx.saved_tensors
        tensors, computed = Tensors(query, key, value, bias, past, tuple(rest[3:])), Computed(*rest[:3])
        needs = ctx.needs_input_grad
        with torch.autocast(query.device.type, enabled=False):
            if torch.is_grad_enabled():  # create_graph=True: the gradients are to be differentiated themselves
                return _differentiable_gradients(ctx.call, tensors, (grad, stream_grad), needs)
            gradients = Gradients(ctx.call, tensors, computed, needs[3], needs[6:])
            gradients.run(grad, stream_grad)
        own = (gradients.query, gradients.key, gradients.value, gradients.bias, gradients.past)
        return (
            *map(_like, own, tensors[:5]),
            None,
            *map(_like, gradients.parameters(), tensors.parameters),
        )


def _like(gradient: torch.Tensor | None, given: torch.Tensor | None) -> torch.Tensor | None:
    """A gradient in the dtype of what it belongs to."""
    return None if gradient is None or given is None else gradient.to(given.dtype)


def _differentiable_gradients(
    call: Call, tensors: Tensors, grads: tuple[torch.Tensor | None, ...], needs: tuple[bool, ...]
) -> tuple[torch.Tensor | None, ...]:
    """Gradients that have gradients of their own, by autograd through the dense form."""
    # Where the key was made of the query, say, what flows through the key must not be counted for the query as well.
    own = tensors.aliases()
    results = dense_passes(call, own)
    used = [(result, grad) for result, grad in zip(results, grads, strict=True) if grad is not None]
    wanted = [
        x for x, needed in zip((*own[:5], None, *own.parameters), needs, strict=True) if needed and x is not None
    ]
    computed = iter(
        torch.autograd.grad(
            [result for result, _ in used],
            wanted,
            [grad for _, grad in used],
            create_graph=True,
            allow_unused=True,
        )
    )
    return tuple(next(computed) if needed else None for needed in needs)
