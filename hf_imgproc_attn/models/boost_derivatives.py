"""Derivatives of derivatives, by autograd through a plain form of what a function of its own computes faster."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def differentiable_gradients(
    results: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor | None],
    inputs: Sequence[torch.Tensor | None],
    needs: Sequence[bool],
) -> tuple[torch.Tensor | None, ...]:
    """Gradients that have gradients of their own, for the backward of a function while a graph is made of it.

    Args:
        results: what the plain form computed of the inputs.
        grads: of the results, None where nothing comes back.
        inputs: aliases of a function's inputs (``x.view_as(x)``): where the key was made of the query, say, what
            flows through the key must not be counted for the query as well. None where an input is no tensor.
        needs: which inputs need a gradient.
    """
    used = [(result, grad) for result, grad in zip(results, grads, strict=True) if grad is not None]
    wanted = [x for x, needed in zip(inputs, needs, strict=True) if needed and x is not None]
    found = iter(
        torch.autograd.grad(
            [result for result, _ in used],
            wanted,
            [grad for _, grad in used],
            create_graph=True,
            allow_unused=True,
        )
    )
    return tuple(next(found) if needed else None for needed in needs)
