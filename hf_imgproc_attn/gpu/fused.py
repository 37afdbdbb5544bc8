"""``hf_imgproc_attn::fused_filter`` as a PyTorch operator: what launches the Triton kernels, and its gradient.

An operator of ``torch.library`` is one opaque node to ``torch.compile`` and ordinary autograd to everything else, so
that compiled models, sharding and activation checkpointing go on working. Importing this module needs Triton.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch.utils.flop_counter import register_flop_formula

from ..models.backend_flops import product_flops
from ..models.kernel_position import BlockedPositions
from . import triton_general, triton_short, triton_single_pass
from .launching import adjacent, launch, on_device, rows_of
from .places import PositionTensors, make_places, position_tensors, with_nearest
from .triton_positions import ONLY_KEYS

ALGORITHMS = ("auto", "general", "short", "single_pass")


def fused_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_mask: torch.Tensor | None = None,
    *,
    positions: BlockedPositions | None = None,
    key_bias: torch.Tensor | None = None,
    boosting: str = "twicing",
    scale: float | None = None,
    is_causal: bool = False,
    algorithm: str = "auto",
) -> torch.Tensor:
    """(2A - A^2) V or A V with A = softmax(scale QK^T + s), fused; A and s are never in memory.

    Twicing is equation 8 of arXiv 2503.00687.

    Args:
        query: ``[batch, heads, length, head_dim]``, float16 or bfloat16, or float32 in the interpreter.
        key: ``[batch, key_heads, length, head_dim]``; ``key_heads`` divides ``heads`` (grouped-query attention).
        value: ``[batch, key_heads, length, head_dim]``.
        key_mask: boolean ``[batch, length]``, True = visible, or None. A query that sees no key gives 0.
        positions: ``GaussianPositions``, ``AlibiPositions`` or ``BucketPositions``, whose kernel s is computed inside
            the kernels, or None. Its parameters have gradients, its coordinates do not.
        key_bias: added to all logits of a key, float32 ``[batch, heads, length]``, or None.
        boosting: ``"twicing"`` or ``"none"``.
        scale: on q.k; None: head_dim^-1/2.
        is_causal: whether query i sees keys j <= i only.
        algorithm: one of :data:`ALGORITHMS`; ``"auto"`` chooses by shape.

    Returns:
        ``[batch, heads, length, head_dim]`` in the query's dtype. It can be differentiated once.

    Raises:
        ValueError: for shapes, dtypes or an algorithm that the kernels do not do.
    """
    _check(query, key, value, key_mask)
    if boosting not in ("twicing", "none"):
        raise ValueError(f"boosting must be 'twicing' or 'none', got {boosting!r}")
    if key_bias is not None and (key_bias.dtype, key_bias.shape) != (torch.float32, query.shape[:3]):
        raise ValueError(
            f"key_bias must be float32 [batch, heads, length] = {tuple(query.shape[:3])}, "
            f"got {key_bias.dtype} {tuple(key_bias.shape)}"
        )
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm must be one of {', '.join(ALGORITHMS)}, got {algorithm!r}")
    kind, class_tokens, *tensors = position_tensors(positions, query)
    factor = query.shape[-1] ** -0.5 if scale is None else float(scale)
    options = (kind, class_tokens, factor, is_causal, boosting == "twicing", algorithm)
    out, _, _ = fused_forward(query, key, value, key_mask, key_bias, *tensors, *options)
    return out


_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def _check(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, key_mask: torch.Tensor | None) -> None:
    """Refuse tensors that the kernels would misread."""
    fit = key.shape == value.shape and query.dim() == key.dim() == 4
    if not fit or (query.shape[0], *query.shape[2:]) != (key.shape[0], *key.shape[2:]):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (query, key, value))
        raise ValueError(
            "query, key and value must have one shape [batch, heads, length, head_dim], but for fewer heads of key "
            f"and value, got {shapes}"
        )
    if query.shape[1] % max(key.shape[1], 1):
        raise ValueError(f"heads of query must be a multiple of those of key, got {query.shape[1]}, {key.shape[1]}")
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


def _outputs(query: torch.Tensor, boosted: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """out as the query lies in memory (so that joining heads copies nothing), W and the log-sum-exp contiguous."""
    residual = torch.empty(query.shape if boosted else (0,), dtype=query.dtype, device=query.device)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    return torch.empty_like(adjacent(query)), residual, lse


def _arguments(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_mask: torch.Tensor | None,
    key_bias: torch.Tensor | None,
    key_bias_grad: torch.Tensor | None,
    lse: torch.Tensor,
    position: PositionTensors,
    scale: float,
    is_causal: bool,
    boosted: bool,
) -> dict[str, Any]:
    """What kernels take, forward and backward."""
    group = query.shape[1] // key.shape[1]
    mask = None if key_mask is None else key_mask.contiguous().view(torch.uint8)
    places = make_places(position, key_bias, key_bias_grad, query.shape[1])
    return {
        "queries": rows_of(query),
        "keys": rows_of(key, group),
        "values": rows_of(value, group),
        "mask_pointer": lse if mask is None else mask,
        "lse_pointer": lse,
        "places": None if places is None else with_nearest(places, position, mask, query.shape[0], is_causal),
        "heads": query.shape[1],
        "length": query.shape[2],
        "scale": scale / math.log(2.0),
        "softmax_scale": scale,
        # Timings are remembered for this, not for each length.
        "length_class": triton.next_power_of_2(query.shape[2]),
        "HEAD_DIM": query.shape[3],
        "BLOCK_D": max(16, triton.next_power_of_2(query.shape[3])),
        "CAUSAL": is_causal,
        "HAS_MASK": key_mask is not None,
        "POSITION": position.kind or (0 if key_bias is None else ONLY_KEYS.value),
        "BOOSTED": boosted,
    }


def _short_block(query: torch.Tensor) -> int:
    """All rows of a head, in one block or two halves of it."""
    return max(32, triton.next_power_of_2(query.shape[2]))


def _heads(query: torch.Tensor) -> tuple[int]:
    return (query.shape[0] * query.shape[1],)


def choose(
    query: torch.Tensor,
    is_causal: bool,
    algorithm: str = "auto",
    products: tuple[int, int] = (3, 4),
    boosted: bool = True,
) -> str:
    """The algorithm for a call: what is asked for, or the one with the lowest floor that the shape allows.

    All leave the same W and log-sum-exp, so forward and backward may differ.

    Args:
        query: ``[batch, heads, length, head_dim]``.
        is_causal: whether the filter is causal.
        algorithm: one of :data:`ALGORITHMS`.
        products: N x N products of ``single_pass`` and of ``general``. With one program a head, each round of heads
            costs a device as much as a full one: ``single_pass`` is chosen where that is still less (*choice*, by
            floors; not measured).
        boosted: whether A is applied twice; once, ``general`` has no product too many.

    Raises:
        ValueError: if the shape does not allow what is asked for.
    """
    batch, heads, length, head_dim = query.shape
    if not boosted:
        if algorithm not in ("auto", "general"):
            raise ValueError(f"algorithm={algorithm!r} needs boosting='twicing', got boosting='none'")
        return "general"
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


@torch.library.custom_op("hf_imgproc_attn::fused_filter", mutates_args=())
def fused_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_mask: torch.Tensor | None,
    key_bias: torch.Tensor | None,
    coordinates: torch.Tensor | None,
    key_coordinates: torch.Tensor | None,
    parameters: torch.Tensor | None,
    lookup: torch.Tensor | None,
    kind: int,
    class_tokens: int,
    scale: float,
    is_causal: bool,
    boosted: bool,
    algorithm: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """out, W = 2V - AV (empty if not boosted), and log2-sum-exp2 of the rows, ``[batch, heads, length]``, float32."""
    query, key, value = adjacent(query), adjacent(key), adjacent(value)
    out, residual, lse = _outputs(query, boosted)
    if out.numel() == 0:
        return out, residual, lse
    position = PositionTensors(kind, class_tokens, coordinates, key_coordinates, parameters, lookup)
    with on_device(query):
        arguments = _arguments(query, key, value, key_mask, key_bias, None, lse, position, scale, is_causal, boosted)
        arguments |= {"outputs": rows_of(out), "results": rows_of(out), "residual_pointer": residual}
        chosen = choose(query, is_causal, algorithm, products=(3, 4), boosted=boosted)
        if chosen == "short":
            launch(triton_short.short_forward_kernel, _heads(query), arguments, HALF=_short_block(query) // 2)
        elif chosen == "single_pass":
            launch(triton_single_pass.single_pass_forward_kernel, _heads(query), arguments)
        else:
            launch(triton_general.smooth_kernel, _programs(query, "BLOCK_M"), arguments)
            if boosted:
                launch(triton_general.apply_kernel, _programs(query, "BLOCK_M"), arguments)
    return out, residual, lse


@fused_forward.register_fake
def _(
    query: Any,
    key: Any,
    value: Any,
    key_mask: Any,
    key_bias: Any,
    coordinates: Any,
    key_coordinates: Any,
    parameters: Any,
    lookup: Any,
    kind: int,
    class_tokens: int,
    scale: float,
    is_causal: bool,
    boosted: bool,
    algorithm: str,
) -> Any:
    return _outputs(query, boosted)


@torch.library.custom_op("hf_imgproc_attn::fused_filter_backward", mutates_args=())
def fused_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_mask: torch.Tensor | None,
    key_bias: torch.Tensor | None,
    coordinates: torch.Tensor | None,
    key_coordinates: torch.Tensor | None,
    parameters: torch.Tensor | None,
    lookup: torch.Tensor | None,
    out: torch.Tensor,
    residual: torch.Tensor,
    lse: torch.Tensor,
    kind: int,
    class_tokens: int,
    scale: float,
    is_causal: bool,
    boosted: bool,
    algorithm: str,
    learns: bool,
    deterministic: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """dQ, dK, dV, each as its tensor lies in memory, and those of the key bias and, if it ``learns``, the parameters.

    The last two are empty where there is none. A is computed again from the log-sum-exp.
    """
    grad, query, key, value, out = (adjacent(tensor) for tensor in (grad, query, key, value, out))
    dq, dk, dv, d_key_bias, d_parameters = _gradients(query, key, value, key_bias, parameters, learns)
    if dq.numel() == 0:
        return dq, dk, dv, d_key_bias, d_parameters.zero_()
    chosen = choose(query, is_causal, algorithm, products=(7, 11 if deterministic else 8), boosted=boosted)
    summed = chosen == "single_pass" or (chosen == "general" and not deterministic)
    # A place for each sum, or, where nothing is summed, a stand-in that timing runs may set to 0.
    dq_sum = torch.zeros(query.shape if summed else (1,), dtype=torch.float32, device=query.device)
    grouped = key.shape[1] != query.shape[1]
    dk_heads, dv_heads = (
        torch.empty(query.shape, dtype=torch.float32, device=query.device) if grouped else tensor
        for tensor in (dk, dv)
    )
    slots = _slots(chosen, query)
    sums = torch.zeros(_heads(query)[0], slots, d_parameters.shape[-1], dtype=torch.float32, device=query.device)
    position = PositionTensors(kind, class_tokens, coordinates, key_coordinates, parameters, lookup)
    with on_device(query):
        arguments = _arguments(
            query, key, value, key_mask, key_bias, d_key_bias, lse, position, scale, is_causal, boosted
        )
        tensors = {"outputs": out, "grads": grad, "dqs": dq, "dks": dk_heads, "dvs": dv_heads}
        arguments |= {name: rows_of(tensor) for name, tensor in tensors.items()}
        arguments |= {
            "residual_pointer": residual,
            "negative_h_pointer": torch.empty_like(residual),
            "delta_pointer": torch.empty_like(lse),
            "dq_sum_pointer": dq_sum,
            "sums_pointer": sums,
            "slots": slots,
            "LEARNS": learns,
            "WITH_DQ": deterministic,
            "ADD_DQ": not deterministic,
        }
        if chosen == "short":
            launch(triton_short.short_backward_kernel, _heads(query), arguments, BLOCK_N=_short_block(query))
        elif chosen == "single_pass":
            launch(triton_single_pass.single_pass_backward_kernel, _heads(query), arguments)
        else:
            launch(triton_general.residual_gradient_kernel, _programs(query, "BLOCK_N"), arguments)
            launch(triton_general.key_value_gradient_kernel, _programs(query, "BLOCK_N"), arguments)
    if summed:
        dq.copy_(dq_sum)
    if grouped:
        for total, heads in ((dk, dk_heads), (dv, dv_heads)):
            total.copy_(heads.unflatten(1, (key.shape[1], -1)).sum(2))
    if learns:
        d_parameters.copy_(sums.unflatten(0, query.shape[:2]).sum((0, 2)))
    return dq, dk, dv, d_key_bias, d_parameters


def _slots(chosen: str, query: torch.Tensor) -> int:
    """Most blocks of keys that a head is cut into, each with sums of its own."""
    if chosen == "short":
        return 1
    if chosen == "single_pass":
        configs, block = triton_single_pass.single_pass_backward_kernel.configs, "BLOCK"
    else:
        configs, block = triton_general.key_value_gradient_kernel.configs, "BLOCK_N"
    smallest: int = min(config.kwargs[block] for config in configs)
    return -(-query.shape[2] // smallest)


def _gradients(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_bias: torch.Tensor | None,
    parameters: torch.Tensor | None,
    learns: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Room for the gradients."""
    shape = parameters.shape if parameters is not None and learns else (0,)
    d_parameters = torch.empty(shape, dtype=torch.float32, device=query.device)
    bias_shape = (0,) if key_bias is None else key_bias.shape
    d_key_bias = torch.empty(bias_shape, dtype=torch.float32, device=query.device)
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), d_key_bias, d_parameters


@fused_backward.register_fake
def _(
    grad: Any,
    query: Any,
    key: Any,
    value: Any,
    key_mask: Any,
    key_bias: Any,
    coordinates: Any,
    key_coordinates: Any,
    parameters: Any,
    lookup: Any,
    out: Any,
    residual: Any,
    lse: Any,
    kind: int,
    class_tokens: int,
    scale: float,
    is_causal: bool,
    boosted: bool,
    algorithm: str,
    learns: bool,
    deterministic: bool,
) -> Any:
    return _gradients(adjacent(query), adjacent(key), adjacent(value), key_bias, parameters, learns)


_TENSORS, _INPUTS = 9, 15
"""Inputs of the operator that are tensors, and all."""


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:_TENSORS], *output)
    ctx.options, ctx.biased = inputs[_TENSORS:], inputs[4] is not None
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, grad: torch.Tensor | None, *unused: Any) -> tuple[torch.Tensor | None, ...]:
    """Of the first output alone: W and the log-sum-exp are there for this function only."""
    if grad is None:
        return (None,) * _INPUTS
    learns, deterministic = ctx.needs_input_grad[7], torch.are_deterministic_algorithms_enabled()
    dq, dk, dv, *others = fused_backward(grad, *ctx.saved_tensors, *ctx.options, learns, deterministic)
    d_key_bias, d_parameters = (x if needed else None for x, needed in zip(others, (ctx.biased, learns), strict=True))
    return (dq, dk, dv, None, d_key_bias, None, None, d_parameters, *(None,) * (_INPUTS - 8))


fused_forward.register_autograd(_gradient, setup_context=_save)


@register_flop_formula(torch.ops.hf_imgproc_attn.fused_filter)
def forward_flops(query_shape: Any, key_shape: Any, value_shape: Any, *args: Any, **kwargs: Any) -> int:
    """The logits and the applications of A, 6 N^2 d if boosted: what is computed twice to save memory is not counted.

    Position kernels need no product.
    """
    boosted = args[-2]
    return product_flops(query_shape, key_shape, query_shape[-1]) + product_flops(
        query_shape, key_shape, value_shape[-1], 1 + boosted
    )


@register_flop_formula(torch.ops.hf_imgproc_attn.fused_filter_backward)
def backward_flops(
    grad_shape: Any, query_shape: Any, key_shape: Any, value_shape: Any, *args: Any, **kwargs: Any
) -> int:
    """The logits once more, two gradients of them and, if boosted, four products with values, 14 N^2 d; else two."""
    boosted = args[-4]
    return product_flops(query_shape, key_shape, query_shape[-1], 3) + product_flops(
        query_shape, key_shape, value_shape[-1], 4 if boosted else 2
    )
