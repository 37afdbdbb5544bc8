"""``hf_imgproc_attn::fused_filter`` as a PyTorch operator: what launches the Triton kernels, and its gradient.

An operator of ``torch.library`` is one opaque node to ``torch.compile`` and ordinary autograd to everything else, so
that compiled models, sharding and activation checkpointing go on working. Importing this module needs Triton.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton

from ..models.kernel_position import BlockedPositions
from . import triton_general, triton_short, triton_single_pass, triton_wavefront
from .checks import ALGORITHMS, check_backward_only, check_tensors
from .choice import choose, heads_grid, programs_grid, short_block, slots_of
from .flops import register_formulas
from .gradients import add_heads, empty_gradients, for_every_head, refuse_second
from .launching import adjacent, launch, on_device, rows_of
from .places import PositionTensors, make_places, position_tensors, with_nearest
from .triton_positions import ONLY_KEYS


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
    check_tensors(query, key, value, key_mask)
    check_backward_only(query, key, value, positions, key_bias)
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


def _outputs(query: torch.Tensor, boosted: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """out as the query lies in memory (so that joining heads copies nothing), W and the log-sum-exp contiguous."""
    residual = torch.empty(query.shape if boosted else (0,), dtype=query.dtype, device=query.device)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    return torch.empty_like(adjacent(query)), residual, lse


def _flags(query: torch.Tensor) -> torch.Tensor:
    """What ``triton_wavefront`` counts with: the programs that have started, and each head's finished blocks."""
    return torch.zeros(1 + heads_grid(query)[0], dtype=torch.int32, device=query.device)


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
        "items": query.shape[0] * query.shape[1],
        "length": query.shape[2],
        "scale": scale / math.log(2.0),
        "softmax_scale": scale,
        # Timings are remembered for this, not for each length.
        "length_class": triton.next_power_of_2(query.shape[2]),
        "items_class": triton.next_power_of_2(query.shape[0] * query.shape[1]),
        "HEAD_DIM": query.shape[3],
        "BLOCK_D": max(16, triton.next_power_of_2(query.shape[3])),
        "CAUSAL": is_causal,
        "HAS_MASK": key_mask is not None,
        "POSITION": position.kind or (0 if key_bias is None else ONLY_KEYS.value),
        "BOOSTED": boosted,
    }


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
        chosen = choose(query, is_causal, algorithm, boosted=boosted)
        if chosen == "short":
            launch(triton_short.short_forward_kernel, heads_grid(query), arguments, HALF=short_block(query) // 2)
        elif chosen == "single_pass":
            launch(triton_single_pass.single_pass_forward_kernel, heads_grid(query), arguments)
        elif chosen == "wavefront":
            arguments["flags_pointer"] = _flags(query)
            launch(triton_wavefront.wavefront_forward_kernel, programs_grid(query, "BLOCK"), arguments)
        else:
            launch(triton_general.smooth_kernel, programs_grid(query, "BLOCK_M"), arguments)
            if boosted:
                launch(triton_general.apply_kernel, programs_grid(query, "BLOCK_M"), arguments)
    return out, residual, lse


@fused_forward.register_fake
def _(query: Any, *others: Any) -> Any:
    boosted = others[-2]
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
    dq, dk, dv, d_key_bias, d_parameters = empty_gradients(query, key, value, key_bias, parameters, learns)
    if dq.numel() == 0:
        return dq, dk, dv, d_key_bias, d_parameters.zero_()
    chosen = choose(query, is_causal, algorithm, boosted=boosted, backward=True, deterministic=deterministic)
    summed = chosen in ("single_pass", "wavefront") or (chosen == "general" and not deterministic)
    # A place for each sum, or, where nothing is summed, a stand-in that timing runs may set to 0.
    dq_sum = torch.zeros(query.shape if summed else (1,), dtype=torch.float32, device=query.device)
    dk_heads, dv_heads = (for_every_head(total, query.shape[1]) for total in (dk, dv))
    slots = slots_of(chosen, query)
    sums = torch.zeros(heads_grid(query)[0], slots, d_parameters.shape[-1], dtype=torch.float32, device=query.device)
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
            launch(triton_short.short_backward_kernel, heads_grid(query), arguments, BLOCK_N=short_block(query))
        elif chosen == "single_pass":
            launch(triton_single_pass.single_pass_backward_kernel, heads_grid(query), arguments)
        elif chosen == "wavefront":
            arguments["flags_pointer"] = _flags(query)
            launch(triton_wavefront.wavefront_backward_kernel, programs_grid(query, "BLOCK"), arguments)
        else:
            launch(triton_general.residual_gradient_kernel, programs_grid(query, "BLOCK_N"), arguments)
            launch(triton_general.key_value_gradient_kernel, programs_grid(query, "BLOCK_N"), arguments)
    if summed:
        dq.copy_(dq_sum)
    add_heads(dk, dk_heads)
    add_heads(dv, dv_heads)
    if learns:
        d_parameters.copy_(sums.unflatten(0, query.shape[:2]).sum((0, 2)))
    return dq, dk, dv, d_key_bias, d_parameters


@fused_backward.register_fake
def _(grad: Any, query: Any, key: Any, value: Any, key_mask: Any, key_bias: Any, *others: Any) -> Any:
    parameters, learns = others[2], others[-2]
    return empty_gradients(adjacent(query), adjacent(key), adjacent(value), key_bias, parameters, learns)


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
fused_backward.register_autograd(refuse_second)

register_formulas(torch.ops.hf_imgproc_attn.fused_filter, torch.ops.hf_imgproc_attn.fused_filter_backward)
