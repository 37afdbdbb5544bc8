"""``exclusive`` on large tensors on a CPU: the formula of ``boost_operators``, some rows at a time, few temporaries.

With s = A V, a = s.v / |v|^2 and b = G.v / |v|^2 of each row, G = dout:

    out = s - a v,    ds = G - b v,    dv = -(a ds + b out)

Nothing of the size of the values is made but what is returned: fresh memory costs as much as what is done with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from .boost_derivatives import differentiable_gradients
from .boost_operators import exclusive

LEAST_NUMBERS = 2**16
"""With fewer, the formula as it stands costs as little."""
ROWS_NUMBERS = 2**17
"""Numbers that are worked on at a time: 512 KiB in float32, which stay in cache."""
SAFE_SQUARES = 1e-12, 1e12
"""Squared lengths of values that leave products with them digits in single precision."""


def is_for_parts(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether a formula of two tensors ``[batch, heads, length, d]`` is worth a few rows at a time."""
    is_large = first.device.type == "cpu" and first.numel() >= LEAST_NUMBERS
    alike = (first.shape, first.dtype) == (second.shape, second.dtype)
    return is_large and alike and not torch.compiler.is_compiling()


def exclusive_by_parts(smooth: torch.Tensor, value: torch.Tensor) -> torch.Tensor | None:
    """What ``exclusive`` makes of A V, or None where the formula as it stands has to do it.

    Args:
        smooth: A V, ``[batch, heads, length, d]``, in at least float32.
        value: V of the same tokens, of the same shape and dtype.
    """
    if not is_for_parts(smooth, value):
        return None
    with torch.no_grad():
        squares = smooth.new_empty(*smooth.shape[:-1], 1)
        for part in parts_of(smooth):
            own = value[part]
            torch.sum((own * own), -1, keepdim=True, out=squares[part])
        least, most = SAFE_SQUARES
        empty = squares == 0.0
        if not bool(((squares >= least) & (squares <= most) | empty).all()):
            return None
        if bool(empty.any()) and bool(value[empty.squeeze(-1)].any()):  # squares that underflow
            return None
        inverse = squares.reciprocal().masked_fill_(empty, 0.0)
    output: torch.Tensor = ExclusiveRows.apply(smooth, value, inverse)
    return output


def parts_of(rows: torch.Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """Slices of samples, heads and tokens that cover ``[batch, heads, length, d]``, a few rows at a time."""
    batch, heads, length, width = rows.shape
    samples = max(ROWS_NUMBERS // max(heads * length * width, 1), 1)
    tokens = max(ROWS_NUMBERS // max(heads * width, 1), 1)
    for b in range(0, batch, samples):
        for i in range(0, length, tokens):
            yield slice(b, b + samples), slice(None), slice(i, i + tokens)


class ExclusiveRows(torch.autograd.Function):
    """``apply(smooth, value, inverse)`` -> ``[batch, heads, length, d]``; ``inverse`` is 1/|v|^2, 0 where v is 0."""

    @staticmethod
    def forward(ctx: Any, smooth: torch.Tensor, value: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        output, shares = torch.empty_like(smooth), torch.empty_like(inverse)
        for part in parts_of(smooth):
            own, rows, share = value[part], smooth[part], shares[part]
            product = rows * own
            torch.sum(product, -1, keepdim=True, out=share)
            share.mul_(inverse[part])
            torch.sub(rows, torch.mul(own, share, out=product), out=output[part])
        ctx.save_for_backward(smooth, value, inverse, shares, output)
        return output

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        smooth, value, inverse, shares, output = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: the gradients are to be differentiated themselves
            apart, own_value = smooth.view_as(smooth), value.view_as(value)  # smooth may be made of the value
            formula = exclusive(lambda rows: apart, lambda index, rows: rows, own_value, own_value, 1)
            return differentiable_gradients([formula], [grad], (apart, own_value, None), ctx.needs_input_grad)
        d_smooth, d_value = torch.empty_like(smooth), torch.empty_like(value)
        for part in parts_of(smooth):
            own, above = value[part], grad[part]
            product = above * own
            along = product.sum(-1, keepdim=True).mul_(inverse[part])
            ours = torch.sub(above, torch.mul(own, along, out=product), out=d_smooth[part])
            torch.mul(ours, -shares[part], out=d_value[part]).sub_(torch.mul(output[part], along, out=product))
        return d_smooth, d_value, None
