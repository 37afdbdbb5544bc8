"""Formulas for torch's FLOP counter, for the fused attention of CPUs and oneDNN's products, for which torch has none.

``torch.utils.flop_counter.FlopCounterMode`` sees every matrix product of the back-ends ``reference`` and ``blocked``.
The back-end ``sdpa`` calls a fused function, which on a CPU would count as nothing: boosting would look free. So would
the large products of ``blocked`` that ``backend_blocked_plan`` hands to oneDNN.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula

from .backend_blocked_plan import onednn_linear

_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def product_flops(query: Sequence[int], key: Sequence[int], width: int, products: int = 1) -> int:
    """Operations of products of ``[length, key_length]`` and ``width`` columns, for every batch and head.

    As torch counts them: a multiplication and an addition for each pair, also where a causal mask leaves some out.

    Args:
        query: shape ``[batch, heads, length, head_dim]``.
        key: shape ``[batch, key_heads, key_length, head_dim]``.
        width: columns of the other factor.
        products: number of products.
    """
    return 2 * products * query[0] * query[1] * query[2] * key[2] * width


def fused_forward_flops(
    query_shape: Sequence[int], key_shape: Sequence[int], value_shape: Sequence[int], *args: Any, **kwargs: Any
) -> int:
    """The logits, and the weights times the values: 4 N^2 d."""
    return product_flops(query_shape, key_shape, query_shape[-1]) + product_flops(
        query_shape, key_shape, value_shape[-1]
    )


def fused_backward_flops(
    grad_shape: Sequence[int],
    query_shape: Sequence[int],
    key_shape: Sequence[int],
    value_shape: Sequence[int],
    *args: Any,
    **kwargs: Any,
) -> int:
    """The logits once more and the gradients of query and key, those of weights and values: 10 N^2 d."""
    return product_flops(query_shape, key_shape, query_shape[-1], 3) + product_flops(
        query_shape, key_shape, value_shape[-1], 2
    )


def linear_flops(left: Sequence[int], right: Sequence[int], *args: Any, **kwargs: Any) -> int:
    """A linear layer without bias, ``[rows, inner]`` and ``[columns, inner]``."""
    return 2 * left[0] * left[1] * right[0]


def register_formulas() -> None:
    """Give torch the formulas that it lacks; a version that has them keeps its own."""
    formulas: dict[Any, Any] = {_FORWARD: fused_forward_flops, _BACKWARD: fused_backward_flops}
    if onednn_linear() is not None:
        formulas[torch.ops.mkldnn._linear_pointwise] = linear_flops
    for operator, formula in formulas.items():
        if operator not in flop_registry:
            register_flop_formula(operator)(formula)
