"""Formulas of the fused operators for torch's FLOP counter: the least work, not what is done twice to save memory."""

from __future__ import annotations

from typing import Any

from torch.utils.flop_counter import register_flop_formula

from ..models.backend_flops import product_flops


def register_formulas(forward: Any, backward: Any) -> None:
    """Tell the counter of :func:`torch.utils.flop_counter.FlopCounterMode` about an operator and its gradient.

    Args:
        forward: ``torch.ops.hf_imgproc_attn.fused_filter``.
        backward: ``torch.ops.hf_imgproc_attn.fused_filter_backward``.
    """
    register_flop_formula(forward)(forward_flops)
    register_flop_formula(backward)(backward_flops)


def forward_flops(query_shape: Any, key_shape: Any, value_shape: Any, *args: Any, **kwargs: Any) -> int:
    """The logits and the applications of A, 6 N^2 d if boosted: what is computed twice to save memory is not counted.

    Position kernels need no product.
    """
    boosted = args[-2]
    return product_flops(query_shape, key_shape, query_shape[-1]) + product_flops(
        query_shape, key_shape, value_shape[-1], 1 + boosted
    )


def backward_flops(
    grad_shape: Any, query_shape: Any, key_shape: Any, value_shape: Any, *args: Any, **kwargs: Any
) -> int:
    """The logits once more, two gradients of them and, if boosted, four products with values, 14 N^2 d; else two."""
    boosted = args[-4]
    return product_flops(query_shape, key_shape, query_shape[-1], 3) + product_flops(
        query_shape, key_shape, value_shape[-1], 4 if boosted else 2
    )
