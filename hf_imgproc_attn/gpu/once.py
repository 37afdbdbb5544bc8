"""``hf_imgproc_attn::filter_once`` as a PyTorch operator: out = A x by ``triton_once``, and its gradient.

One opaque node to ``torch.compile``, as ``fused_filter``. Importing this module needs Triton.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch.utils.flop_counter import register_flop_formula

from ..models.backend_flops import product_flops
from ..models.kernel_position import BlockedPositions
from . import triton_once
from .gradients import add_heads, empty_gradients, for_every_head
from .launching import adjacent, launch, on_device, rows_of
from .places import PositionTensors, make_places, position_tensors, with_nearest
from .triton_positions import ONLY_KEYS
from .triton_tiles import Rows

MAX_WIDTH = 256
"""Of queries, keys and x."""
DROPPED_OF = 2**24
"""Dropout compares 24 bits of a random number."""

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class Once(NamedTuple):
    """A filter that can be applied: what :func:`apply_once` takes beside x.

    query: ``[batch, heads, length, width]``, the last tokens; float16, bfloat16, or float32 in the interpreter.
    key: ``[batch, key_heads, key_length, width]``; ``key_heads`` divides ``heads``.
    scale: on q.k.
    key_mask: which keys are visible, boolean ``[batch, key_length]``; or how many of a sample's first keys are, int32
        ``[batch]``, which costs no look at a mask; None: all. A query that sees none gives 0.
    is_causal: whether no query sees a key after its own, query i standing at ``key_length - length + i``.
    positions: Gaussian, ALiBi or relative buckets by place, or None; parameters have gradients, coordinates do not.
    key_bias: added to all logits of a key, float32 ``[batch, heads, key_length]``, or None.
    dropout: probability in [0, 1) with which a weight of A becomes 0; the others are divided by 1 - p.
    seed: int64 ``[1]`` on the query's device, from which the dropped weights follow; None where nothing is dropped.
    """

    query: torch.Tensor
    key: torch.Tensor
    scale: float
    key_mask: torch.Tensor | None = None
    is_causal: bool = False
    positions: BlockedPositions | None = None
    key_bias: torch.Tensor | None = None
    dropout: float = 0.0
    seed: torch.Tensor | None = None


def apply_once(once: Once, x: torch.Tensor) -> torch.Tensor:
    """A x, with A = softmax(scale QK^T + s), thinned out by dropout; A and s are never in memory.

    Args:
        once: the filter.
        x: ``[batch, heads of its own, key_length, d]`` in the query's dtype; they divide ``heads``.

    Returns:
        ``[batch, heads, length, d]``. It can be differentiated once: in query, key, x, ``key_bias`` and the position
        kernel's parameters.

    Raises:
        ValueError: for shapes, dtypes or options that the kernels would misread.
    """
    _check(once, x)
    query, key_length = once.query, once.key.shape[2]
    kind, class_tokens, *places = position_tensors(once.positions, query, key_length)
    mask, spans = _visible(once.key_mask, key_length)
    options = (kind, class_tokens, float(once.scale), once.is_causal, float(once.dropout))
    out, _ = once_forward(query, once.key, x, mask, spans, once.key_bias, *places, once.seed, *options)
    return out


def _visible(key_mask: torch.Tensor | None, key_length: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The mask, and the first visible key of each sample and the one behind the last, which bound the loops."""
    if key_mask is None:
        return None, None
    if key_mask.dtype != torch.bool:
        ends = key_mask.clamp(min=0, max=key_length)
        return None, torch.stack((torch.zeros_like(ends), ends), 1).int()
    numbers = torch.arange(key_length, dtype=torch.int32, device=key_mask.device)
    first = torch.where(key_mask, numbers, key_length).amin(1)
    end = torch.where(key_mask, numbers + 1, 0).amax(1)
    return key_mask, torch.stack((torch.minimum(first, end), end), 1).int()


def _check(once: Once, x: torch.Tensor) -> None:
    """Refuse tensors that the kernels would misread."""
    query, key = once.query, once.key
    shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (query, key, x))
    if not query.dim() == key.dim() == x.dim() == 4:
        raise ValueError(f"query, key and x must have 4 axes [batch, heads, length, width], got {shapes}")
    (batch, heads, _, width), (_, key_heads, key_length, _) = query.shape, key.shape
    fits = key.shape[0] == x.shape[0] == batch and key.shape[3] == width and x.shape[2] == key_length > 0
    fits = fits and all(own > 0 and heads % own == 0 for own in (key_heads, x.shape[1]))
    if not fits:
        raise ValueError(
            "key must have the query's batch and width, x the key's batch and length, and both a divisor of the "
            f"query's heads, got {shapes}"
        )
    if max(width, x.shape[3]) > MAX_WIDTH:
        raise ValueError(f"widths must be <= {MAX_WIDTH}, got {shapes}")
    if not query.dtype == key.dtype == x.dtype or query.dtype not in _DTYPES:
        names = ", ".join(str(tensor.dtype) for tensor in (query, key, x))
        raise ValueError(f"query, key and x must be all float16, bfloat16 or float32, got {names}")
    if query.is_cuda and query.dtype == torch.float32:
        raise ValueError("on a GPU query, key and x must be float16 or bfloat16, got torch.float32")
    _check_options(once, key_length)


def _check_options(once: Once, key_length: int) -> None:
    """Refuse a mask, a bias or a dropout that is none."""
    mask, bias, batch = once.key_mask, once.key_bias, once.query.shape[0]
    forms = {torch.bool: (batch, key_length), torch.int32: (batch,)}
    if mask is not None and forms.get(mask.dtype) != tuple(mask.shape):
        raise ValueError(
            f"key_mask must be boolean [batch, key_length] = {forms[torch.bool]} or int32 [batch] = {(batch,)}, "
            f"got {mask.dtype} {tuple(mask.shape)}"
        )
    shape = (*once.query.shape[:2], key_length)
    if bias is not None and (bias.dtype, tuple(bias.shape)) != (torch.float32, shape):
        raise ValueError(
            f"key_bias must be float32 [batch, heads, key_length] = {shape}, got {bias.dtype} {tuple(bias.shape)}"
        )
    if not 0.0 <= once.dropout < 1.0:
        raise ValueError(f"dropout must be in [0, 1), got {once.dropout!r}")
    seed = once.seed
    if once.dropout > 0.0 and (seed is None or (seed.dtype, tuple(seed.shape)) != (torch.int64, (1,))):
        got = seed if seed is None else (seed.dtype, tuple(seed.shape))
        raise ValueError(f"seed must be int64 of shape (1,) where dropout > 0, got {got}")


def _outputs(query: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """out, in memory ``[batch, length, heads, d]`` so that joining heads copies nothing, and the log-sum-exp."""
    batch, heads, length, _ = query.shape
    out = torch.empty(batch, length, heads, x.shape[3], dtype=query.dtype, device=query.device)
    return out.transpose(1, 2), torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)


class _Seen(NamedTuple):
    """Inputs of the operators that tell who sees whom, and what is added to the logits."""

    mask: torch.Tensor | None
    spans: torch.Tensor | None
    key_bias: torch.Tensor | None
    key_bias_grad: torch.Tensor | None
    position: PositionTensors
    seed: torch.Tensor | None


def _arguments(
    query: torch.Tensor,
    key: torch.Tensor,
    x: torch.Tensor,
    lse: torch.Tensor,
    seen: _Seen,
    scale: float,
    is_causal: bool,
    dropout: float,
) -> dict[str, Any]:
    """What all kernels take."""
    heads, length, key_length = query.shape[1], query.shape[2], key.shape[2]
    mask = None if seen.mask is None else seen.mask.contiguous().view(torch.uint8)
    places = make_places(seen.position, seen.key_bias, seen.key_bias_grad, heads)
    if places is not None:
        shown = mask
        if shown is None and seen.spans is not None and seen.position.kind:
            shown = (torch.arange(key_length, device=query.device) < seen.spans[:, 1:]).view(torch.uint8)
        places = with_nearest(places, seen.position, shown, query.shape[0], is_causal)
    position = seen.position.kind or (0 if seen.key_bias is None else ONLY_KEYS.value)
    has = {"has_mask": mask is not None, "has_spans": seen.spans is not None, "causal": is_causal}
    widths = {"width": query.shape[3], "block_width": _power(query.shape[3])}
    constants = {**widths, **has, "position": position, "drops": dropout > 0.0}
    matrix = triton_once.Matrix(
        queries=rows_of(query),
        keys=rows_of(key, heads // key.shape[1]),
        mask=lse if mask is None else mask,
        spans=lse if seen.spans is None else seen.spans,
        lse=lse,
        seed=lse if seen.seed is None else seen.seed,
        places=places,
        heads=heads,
        length=length,
        key_length=key_length,
        scale=scale / math.log(2.0),
        dropped=round(dropout * DROPPED_OF),
        kept_factor=1.0 / (1.0 - dropout),
        **{name: tl.constexpr(value) for name, value in constants.items()},
    )
    return {
        "matrix": matrix,
        "rows": rows_of(x, heads // x.shape[1]),
        "softmax_scale": scale,
        # Timings are remembered for these, not for each length.
        "length_class": triton.next_power_of_2(length),
        "key_length_class": triton.next_power_of_2(key_length),
        "kind": " ".join(f"{name}={value}" for name, value in constants.items()) + f" x={x.shape[3]}",
        "WIDTH": x.shape[3],
        "BLOCK_W": _power(x.shape[3]),
    }


def _power(width: int) -> int:
    return max(16, int(triton.next_power_of_2(width)))


def _programs(tensor: torch.Tensor, heads: int, block: str) -> Any:
    """One program a block of rows and head."""
    batch, _, length, _ = tensor.shape
    return lambda meta: (triton.cdiv(length, meta[block]) * batch * heads,)


@torch.library.custom_op("hf_imgproc_attn::filter_once", mutates_args=())
def once_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    x: torch.Tensor,
    mask: torch.Tensor | None,
    spans: torch.Tensor | None,
    key_bias: torch.Tensor | None,
    coordinates: torch.Tensor | None,
    key_coordinates: torch.Tensor | None,
    parameters: torch.Tensor | None,
    lookup: torch.Tensor | None,
    seed: torch.Tensor | None,
    kind: int,
    class_tokens: int,
    scale: float,
    is_causal: bool,
    dropout: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out, and log2-sum-exp2 of the rows of logits, ``[batch, heads, length]``, float32."""
    query, key, x = adjacent(query), adjacent(key), adjacent(x)
    out, lse = _outputs(query, x)
    if out.numel() == 0:
        return out, lse
    position = PositionTensors(kind, class_tokens, coordinates, key_coordinates, parameters, lookup)
    seen = _Seen(mask, spans, key_bias, None, position, seed)
    with on_device(query):
        arguments = _arguments(query, key, x, lse, seen, scale, is_causal, dropout)
        grid = _programs(query, query.shape[1], "BLOCK_M")
        launch(triton_once.forward_kernel, grid, arguments, outputs=rows_of(out))
    return out, lse


@once_forward.register_fake
def _(query: Any, key: Any, x: Any, *others: Any) -> Any:
    return _outputs(query, x)


@torch.library.custom_op("hf_imgproc_attn::filter_once_backward", mutates_args=())
def once_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    x: torch.Tensor,
    mask: torch.Tensor | None,
    spans: torch.Tensor | None,
    key_bias: torch.Tensor | None,
    coordinates: torch.Tensor | None,
    key_coordinates: torch.Tensor | None,
    parameters: torch.Tensor | None,
    lookup: torch.Tensor | None,
    seed: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    kind: int,
    class_tokens: int,
    scale: float,
    is_causal: bool,
    dropout: float,
    learns: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """dQ, dK, dx, and those of the key bias and, if it ``learns``, the parameters; empty where there is none."""
    grad, query, key, x, out = (adjacent(tensor) for tensor in (grad, query, key, x, out))
    dq, dk, dx, d_key_bias, d_parameters = empty_gradients(query, key, x, key_bias, parameters, learns)
    if out.numel() == 0 or dq.numel() == 0:
        return tuple(gradient.zero_() for gradient in (dq, dk, dx, d_key_bias, d_parameters))  # type: ignore[return-value]
    heads, (batch, _, key_length, _) = query.shape[1], key.shape
    totals = [(total, for_every_head(total, heads)) for total in (dk, dx)]
    configs = triton_once.key_gradient_kernel.configs
    slots = -(-key_length // min(config.kwargs["BLOCK_N"] for config in configs))
    sums = torch.zeros(batch * heads, slots, d_parameters.shape[-1], dtype=torch.float32, device=query.device)
    position = PositionTensors(kind, class_tokens, coordinates, key_coordinates, parameters, lookup)
    seen = _Seen(mask, spans, key_bias, d_key_bias, position, seed)
    with on_device(query):
        arguments = _arguments(query, key, x, lse, seen, scale, is_causal, dropout)
        own: dict[str, Rows] = {
            name: rows_of(tensor)
            for name, tensor in (
                ("outputs", out),
                ("grads", grad),
                ("dqs", dq),
                *zip(("dks", "dxs"), (gradient for _, gradient in totals), strict=True),
            )
        }
        arguments |= {"delta_pointer": torch.empty_like(lse), "sums_pointer": sums, "slots": slots, "LEARNS": learns}
        launch(triton_once.query_gradient_kernel, _programs(query, heads, "BLOCK_M"), arguments, **own)
        launch(triton_once.key_gradient_kernel, _programs(key, heads, "BLOCK_N"), arguments, **own)
    for total, gradient in totals:
        add_heads(total, gradient)
    if learns:
        d_parameters.copy_(sums.unflatten(0, (batch, heads)).sum((0, 2)))
    return dq, dk, dx, d_key_bias, d_parameters


@once_backward.register_fake
def _(grad: Any, query: Any, key: Any, x: Any, mask: Any, spans: Any, key_bias: Any, *others: Any) -> Any:
    parameters, learns = others[2], others[-1]
    return empty_gradients(adjacent(query), adjacent(key), adjacent(x), key_bias, parameters, learns)


_TENSORS, _INPUTS = 11, 16
"""Inputs of the operator that are tensors, and all."""
_KEY_BIAS, _PARAMETERS = 5, 8


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:_TENSORS], *output)
    ctx.options, ctx.biased = inputs[_TENSORS:], inputs[_KEY_BIAS] is not None
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, grad: torch.Tensor | None, *unused: Any) -> tuple[torch.Tensor | None, ...]:
    """Of the first output alone: the log-sum-exp is there for this function only."""
    if grad is None:
        return (None,) * _INPUTS
    learns = ctx.needs_input_grad[_PARAMETERS]
    dq, dk, dx, d_key_bias, d_parameters = once_backward(grad, *ctx.saved_tensors, *ctx.options, learns)
    found: list[torch.Tensor | None] = [dq, dk, dx, *(None,) * (_INPUTS - 3)]
    found[_KEY_BIAS] = d_key_bias if ctx.biased else None
    found[_PARAMETERS] = d_parameters if learns else None
    return tuple(found)


once_forward.register_autograd(_gradient, setup_context=_save)


@register_flop_formula(torch.ops.hf_imgproc_attn.filter_once)
def forward_flops(query_shape: Any, key_shape: Any, x_shape: Any, *args: Any, **kwargs: Any) -> int:
    """The logits and A x; position kernels need no product."""
    return product_flops(query_shape, key_shape, query_shape[-1]) + product_flops(query_shape, key_shape, x_shape[-1])


@register_flop_formula(torch.ops.hf_imgproc_attn.filter_once_backward)
def backward_flops(grad_shape: Any, query_shape: Any, key_shape: Any, x_shape: Any, *args: Any, **kwargs: Any) -> int:
    """The logits once more and two gradients of them, dA and A^T G: what is computed twice is not counted."""
    return product_flops(query_shape, key_shape, query_shape[-1], 3) + product_flops(
        query_shape, key_shape, x_shape[-1], 2
    )
