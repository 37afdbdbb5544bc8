"""``inversion`` and the elementwise gate on large tensors on a CPU, some rows at a time, as ``boost_exclusive``.

With s = A V and G = dout, a factor c = alpha - beta and beta of each row:

    out = c s + beta v,          ds = c G,   dv = beta G,   dc = G.s,   dbeta = G.v
    out = 2 sigmoid(l) o s,      ds = 2 sigmoid(l) o G,   dl = ds o s o (1 - sigmoid(l))

Nothing of the size of the values is made but what is returned: fresh memory costs as much as what is done with it.
"""

from __future__ import annotations

from typing import Any

import torch

from .boost_derivatives import differentiable_gradients
from .boost_exclusive import is_for_parts, parts_of


def _cut(gain: torch.Tensor, part: tuple[slice, slice, slice]) -> torch.Tensor:
    """Of factors that are broadcastable to ``[batch, heads, length, 1]``, those of a part."""
    return gain[tuple(slice(None) if size == 1 else where for size, where in zip(gain.shape, part, strict=False))]


def inversion_by_parts(smooth: torch.Tensor, value: torch.Tensor, gain: torch.Tensor) -> torch.Tensor | None:
    """alpha A V + beta (V - A V), or None where the formula as it stands has to do it.

    Args:
        smooth: A V, ``[batch, heads, length, d]``, in at least float32.
        value: V of the same tokens, of the same shape.
        gain: alpha and beta, ``[2, heads, 1, 1]`` or ``[2, batch, heads, length, 1]``.
    """
    if not is_for_parts(smooth, value) or gain.dtype != smooth.dtype:
        return None
    alpha, beta = (x if x.ndim == 4 else x.unsqueeze(0) for x in gain.unbind(0))
    output: torch.Tensor = InversionRows.apply(smooth, value, alpha - beta, beta)
    return output


class InversionRows(torch.autograd.Function):
    """``apply(smooth, value, c, beta)`` -> ``[batch, heads, length, d]``; factors with four axes."""

    @staticmethod
    def forward(
        ctx: Any, smooth: torch.Tensor, value: torch.Tensor, factor: torch.Tensor, beta: torch.Tensor
    ) -> torch.Tensor:
        output = torch.empty_like(smooth)
        for part in parts_of(smooth):
            rows = torch.mul(smooth[part], _cut(factor, part), out=output[part])
            rows.addcmul_(value[part], _cut(beta, part))
        ctx.save_for_backward(smooth, value, factor, beta)
        return output

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        smooth, value, factor, beta = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: the gradients are to be differentiated themselves
            apart = [x.view_as(x) for x in ctx.saved_tensors]
            formula = torch.addcmul(apart[2] * apart[0], apart[3], apart[1])
            return differentiable_gradients([formula], [grad], apart, ctx.needs_input_grad)
        d_smooth, d_value = torch.empty_like(smooth), torch.empty_like(value)
        d_factor, d_beta = torch.zeros_like(factor), torch.zeros_like(beta)
        for part in parts_of(smooth):
            above = grad[part]
            for rows, given, gain, d_gain in (
                (d_smooth, smooth, factor, d_factor),
                (d_value, value, beta, d_beta),
            ):
                total = _cut(d_gain, part)
                total += torch.mul(above, given[part], out=rows[part]).sum_to_size(total.shape)
                torch.mul(above, _cut(gain, part), out=rows[part])
        return d_smooth, d_value, d_factor, d_beta


class GatedRows(torch.autograd.Function):
    """``apply(output, logits)`` -> 2 sigmoid(logits) o output, all ``[batch, heads, length, d]``."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        gated = torch.empty_like(output)
        for part in parts_of(output):
            torch.mul(output[part], torch.sigmoid(logits[part]).mul_(2.0), out=gated[part])
        ctx.save_for_backward(output, logits)
        return gated

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        output, logits = ctx.saved_tensors
        if torch.is_grad_enabled():  # as above
            apart = [x.view_as(x) for x in ctx.saved_tensors]
            formula = apart[0] * (2.0 * torch.sigmoid(apart[1]))
            return differentiable_gradients([formula], [grad], apart, ctx.needs_input_grad)
        d_output, d_logits = torch.empty_like(output), torch.empty_like(logits)
        for part in parts_of(output):
            gate = torch.sigmoid(logits[part])
            rows = torch.mul(grad[part], gate, out=d_output[part]).mul_(2.0)
            slope = torch.mul(rows, output[part], out=d_logits[part])
            slope.addcmul_(slope, gate, value=-1.0)
        return d_output, d_logits
