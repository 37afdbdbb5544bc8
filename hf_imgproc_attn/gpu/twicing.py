"""``hf_imgproc_attn::twicing`` as a PyTorch operator: what launches the Triton kernels, and its gradient.

An operator of ``torch.library`` is one opaque node to ``torch.compile`` and ordinary autograd to everything else, so
that compiled models, sharding and activation checkpointing go on working. Importing this module needs Triton.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
import triton
from torch.utils.flop_counter import register_flop_formula

from ..models.backend_flops import product_flops
from . import triton_general, triton_short, triton_single_pass
from .triton_tiles import INTERPRETED

ALGORITHMS = ("auto", "general", "short", "single_pass")


def twicing_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_mask: torch.Tensor | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    algorithm: str = "auto",
) -> torch.Tensor:
    """(2A - A^2) V with A = softmax(scale QK^T), fused; A is never in memory (arXiv 2503.00687, equation 8).

    Args:
        query: ``[batch, heads, length, head_dim]``, float16 or bfloat16, or float32 in the interpreter.
        key: ``[batch, heads, length, head_dim]``.
        value: ``[batch, heads, length, head_dim]``.
        key_mask: boolean ``[batch, length]``, True = visible, or None. A query that sees no key gives 0.
        scale: on q.k; None: head_dim^-1/2.
        is_causal: whether query i sees keys j <= i only.
        algorithm: one of :data:`ALGORITHMS`; ``"auto"`` chooses by shape.

    Returns:
        ``[batch, heads, length, head_dim]`` in the query's dtype. It can be differentiated once.

    Raises:
        ValueError: for shapes, dtypes or an algorithm that the kernels do not do.
    """
    if not (query.shape == key.shape == value.shape and query.dim() == 4):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (query, key, value))
        raise ValueError(f"query, key and value must have one shape [batch, heads, length, head_dim], got {shapes}")
    if query.shape[-1] > 128:
        raise ValueError(f"head_dim must be <= 128, got {query.shape[-1]}")
    if not (query.dtype == key.dtype == value.dtype) or query.dtype not in _DTYPES:
        names = ", ".join(str(tensor.dtype) for tensor in (query, key, value))
        raise ValueError(f"query, key and value must be all float16, bfloat16 or float32, got {names}")
    if query.is_cuda and query.dtype == torch.float32:
        raise ValueError("on a GPU query, key and value must be float16 or bfloat16, got torch.float32")
    if key_mask is not None and (key_mask.dtype != torch.bool or key_mask.shape != (query.shape[0], query.shape[2])):
        raise ValueError(
            f"key_mask must be boolean [batch, length] = {(query.shape[0], query.shape[2])}, "
            f"got {key_mask.dtype} {tuple(key_mask.shape)}"
        )
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm must be one of {', '.join(ALGORITHMS)}, got {algorithm!r}")
    factor = query.shape[-1] ** -0.5 if scale is None else float(scale)
    out, _, _ = twicing_forward(query, key, value, key_mask, factor, is_causal, algorithm)
    return out


_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def _adjacent(tensor: torch.Tensor) -> torch.Tensor:
    """The kernels walk the last dimension with step 1."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _strides(*tensors: torch.Tensor) -> list[int]:
    return [step for tensor in tensors for step in tensor.stride()[:3]]


def _outputs(query: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """out as the query lies in memory (so that joining heads copies nothing), W and the log-sum-exp contiguous."""
    residual = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    return torch.empty_like(_adjacent(query)), residual, lse


def _on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    if tensor.is_cuda:
        return torch.cuda.device(tensor.device)
    if INTERPRETED:
        return contextlib.nullcontext()
    raise ValueError(f"the Triton kernels need tensors on a GPU, got {tensor.device}")


def _common(query: torch.Tensor, key_mask: torch.Tensor | None, is_causal: bool) -> dict[str, Any]:
    """The arguments that all kernels share."""
    return {
        "heads": query.shape[1],
        "length": query.shape[2],
        # Timings are remembered for this, not for each length.
        "length_class": triton.next_power_of_2(query.shape[2]),
        "HEAD_DIM": query.shape[3],
        "BLOCK_D": max(16, triton.next_power_of_2(query.shape[3])),
        "CAUSAL": is_causal,
        "HAS_MASK": key_mask is not None,
    }


def _for_short(common: dict[str, Any]) -> dict[str, Any]:
    return {name: common[name] for name in common if name not in ("length_class", "CAUSAL")}


def _for_single_pass(common: dict[str, Any]) -> dict[str, Any]:
    return {name: common[name] for name in common if name != "CAUSAL"}


def _short_block(query: torch.Tensor) -> int:
    """All rows of a head, in one block or two halves of it."""
    return max(32, triton.next_power_of_2(query.shape[2]))


def _heads(query: torch.Tensor) -> tuple[int]:
    return (query.shape[0] * query.shape[1],)


def choose(query: torch.Tensor, is_causal: bool, algorithm: str = "auto", products: tuple[int, int] = (3, 4)) -> str:
    """The algorithm for a call: what is asked for, or the one with the lowest floor that the shape allows.

    All leave the same W and log-sum-exp, so forward and backward may differ.

    Args:
        query: ``[batch, heads, length, head_dim]``.
        is_causal: whether the filter is causal.
        algorithm: one of :data:`ALGORITHMS`.
        products: N x N products of ``single_pass`` and of ``general``. With one program a head, each round of heads
            costs a device as much as a full one: ``single_pass`` is chosen where that is still less (*choice*, by
            floors; not measured).

    Raises:
        ValueError: if the shape does not allow what is asked for.
    """
    batch, heads, length, head_dim = query.shape
    short = not is_causal and length <= triton_short.MAX_LENGTH and head_dim <= triton_short.MAX_HEAD_DIM
    if algorithm == "auto":
        device = torch.cuda.get_device_properties(query.device) if query.is_cuda else None
        # Compiled for other generations, the kernels of 256 rows need more registers or shared memory than there are.
        roomy = device is None or device.major in (9, 10)
        if short and (roomy or length <= triton_short.MAX_LENGTH // 2):
            return "short"
        if not is_causal or device is None or head_dim > triton_single_pass.MAX_HEAD_DIM:
            return "general"
        rounds = -(-batch * heads // device.multi_processor_count)
        single_pass, general = products
        filled = single_pass * rounds * device.multi_processor_count < general * batch * heads
        return "single_pass" if filled else "general"
    if algorithm == "short" and not short:
        raise ValueError(
            f"algorithm='short' needs is_causal=False, length <= {triton_short.MAX_LENGTH} and head_dim <= "
            f"{triton_short.MAX_HEAD_DIM}, got is_causal={is_causal}, length={length}, head_dim={head_dim}"
        )
    if algorithm == "single_pass" and not is_causal:
        raise ValueError("algorithm='single_pass' needs is_causal=True, got is_causal=False")
    return algorithm


def _programs(query: torch.Tensor, block: str) -> Any:
    """One program a block of rows and head; one dimension, because the others end at 65535."""
    batch, heads, length, _ = query.shape
    return lambda meta: (triton.cdiv(length, meta[block]) * batch * heads,)


@torch.library.custom_op("hf_imgproc_attn::twicing", mutates_args=())
def twicing_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_mask: torch.Tensor | None,
    scale: float,
    is_causal: bool,
    algorithm: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """out, W = 2V - AV in the value's dtype, and log2-sum-exp2 of the rows, ``[batch, heads, length]``, float32."""
    query, key, value = _adjacent(query), _adjacent(key), _adjacent(value)
    out, residual, lse = _outputs(query, value)
    if out.numel() == 0:
        return out, residual, lse
    mask = lse if key_mask is None else key_mask.contiguous().view(torch.uint8)
    common = _common(query, key_mask, is_causal)
    common["scale"] = scale / math.log(2.0)
    with _on_device(query):
        chosen = choose(query, is_causal, algorithm, products=(3, 4))
        if chosen == "short":
            triton_short.short_forward_kernel[_heads(query)](
                query, key, value, mask, residual, lse, out, *_strides(query, key, value, out),
                **_for_short(common), HALF=_short_block(query) // 2,
            )  # fmt: skip
            return out, residual, lse
        if chosen == "single_pass":
            triton_single_pass.single_pass_forward_kernel[_heads(query)](
                query, key, value, mask, residual, lse, out, *_strides(query, key, value, out),
                **_for_single_pass(common),
            )  # fmt: skip
            return out, residual, lse
        triton_general.smooth_kernel[_programs(query, "BLOCK_M")](
            query, key, value, mask, residual, lse, *_strides(query, key, value), **common
        )
        triton_general.apply_kernel[_programs(query, "BLOCK_M")](
            query, key, mask, residual, lse, out, *_strides(query, key, out), **common
        )
    return out, residual, lse


@twicing_forward.register_fake
def _(query: Any, key: Any, value: Any, key_mask: Any, scale: float, is_causal: bool, algorithm: str) -> Any:
    return _outputs(query, value)


@torch.library.custom_op("hf_imgproc_attn::twicing_backward", mutates_args=())
def twicing_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_mask: torch.Tensor | None,
    out: torch.Tensor,
    residual: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    is_causal: bool,
    algorithm: str,
    deterministic: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dQ, dK, dV, each as its tensor lies in memory; A is computed again from the log-sum-exp."""
    grad, query, key, value, out = (_adjacent(tensor) for tensor in (grad, query, key, value, out))
    dq, dk, dv = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    if dq.numel() == 0:
        return dq, dk, dv
    mask = lse if key_mask is None else key_mask.contiguous().view(torch.uint8)
    common = _common(query, key_mask, is_causal)
    common["scale"], common["softmax_scale"] = scale / math.log(2.0), scale
    negative_h, delta = torch.empty_like(residual), torch.empty_like(lse)
    chosen = choose(query, is_causal, algorithm, products=(7, 11 if deterministic else 8))
    if chosen == "short":
        with _on_device(query):
            triton_short.short_backward_kernel[_heads(query)](
                query, key, value, mask, residual, lse, out, grad, negative_h, delta, dq, dk, dv,
                *_strides(query, key, value, out, grad, dq, dk, dv), **_for_short(common),
                BLOCK_N=_short_block(query),
            )  # fmt: skip
        return dq, dk, dv
    summed = chosen == "single_pass" or not deterministic
    # A place for each sum, or, where nothing is summed, a stand-in that timing runs may set to 0.
    dq_sum = torch.zeros(query.shape if summed else (1,), dtype=torch.float32, device=query.device)
    if chosen == "single_pass":
        with _on_device(query):
            triton_single_pass.single_pass_backward_kernel[_heads(query)](
                query, key, value, mask, residual, lse, out, grad, negative_h, delta, dq_sum, dk, dv,
                *_strides(query, key, value, out, grad, dk, dv), **_for_single_pass(common),
            )  # fmt: skip
        return dq.copy_(dq_sum), dk, dv
    with _on_device(query):
        triton_general.residual_gradient_kernel[_programs(query, "BLOCK_N")](
            query, key, value, mask, residual, lse, out, grad, negative_h, delta, dq,
            *_strides(query, key, value, out, grad, dq), **common, WITH_DQ=deterministic,
        )  # fmt: skip
        triton_general.key_value_gradient_kernel[_programs(query, "BLOCK_N")](
            query, key, value, mask, residual, lse, grad, negative_h, delta, dq_sum, dk, dv,
            *_strides(query, key, value, grad, dk, dv), **common, ADD_DQ=not deterministic,
        )  # fmt: skip
    return (dq.copy_(dq_sum) if summed else dq), dk, dv


@twicing_backward.register_fake
def _(grad: Any, query: Any, key: Any, value: Any, *rest: Any) -> Any:
    return tuple(torch.empty_like(_adjacent(tensor)) for tensor in (query, key, value))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    query, key, value, key_mask, scale, is_causal, algorithm = inputs
    out, residual, lse = output
    ctx.save_for_backward(query, key, value, key_mask, out, residual, lse)
    ctx.options = (scale, is_causal, algorithm)
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, grad: torch.Tensor | None, *unused: Any) -> tuple[torch.Tensor | None, ...]:
    """Of the first output alone: W and the log-sum-exp are there for this function only."""
    if grad is None:
        return (None,) * 7
    deterministic = torch.are_deterministic_algorithms_enabled()
    gradients = twicing_backward(grad, *ctx.saved_tensors, *ctx.options, deterministic)
    return (*gradients, None, None, None, None)


twicing_forward.register_autograd(_gradient, setup_context=_save)


@register_flop_formula(torch.ops.hf_imgproc_attn.twicing)
def forward_flops(query_shape: Any, key_shape: Any, value_shape: Any, *args: Any, **kwargs: Any) -> int:
    """The logits and two applications of A, 6 N^2 d: what is computed twice to save memory does not count."""
    return product_flops(query_shape, key_shape, query_shape[-1]) + product_flops(
        query_shape, key_shape, value_shape[-1], 2
    )


@register_flop_formula(torch.ops.hf_imgproc_attn.twicing_backward)
def backward_flops(
    grad_shape: Any, query_shape: Any, key_shape: Any, value_shape: Any, *args: Any, **kwargs: Any
) -> int:
    """The logits once more, two gradients of them and four products with values, 14 N^2 d."""
    return product_flops(query_shape, key_shape, query_shape[-1], 3) + product_flops(
        query_shape, key_shape, value_shape[-1], 4
    )
