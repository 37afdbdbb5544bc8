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
from . import triton_logits, triton_once
from .checks import check_backward_only
from .gradients import add_heads, empty_gradients, for_every_head, refuse_second
from .launching import adjacent, launch, on_device, rows_of
from .once_inputs import Once, check, log_counts, visible_keys
from .places import PositionTensors, make_places, position_tensors, with_nearest
from .triton_positions import ONLY_KEYS
from .triton_tiles import Rows

DROPPED_OF = 2**24
"""Dropout compares 24 bits of a random number."""


def apply_once(once: Once, x: torch.Tensor) -> torch.Tensor:
    """A x, with A the normalised scale QK^T + s, thinned out by dropout; A and s are never in memory.

    Args:
        once: the filter.
        x: ``[batch, heads of its own, key_length, d]`` in the query's dtype; they divide ``heads``.

    Returns:
        ``[batch, heads, length, d]``. It can be differentiated once: in query, key, x, ``key_bias``, ``query_bias``,
        ``sinks`` and the position kernel's parameters.

    Raises:
        ValueError: for shapes, dtypes or options that the kernels would misread.
    """
    check(once, x)
    check_backward_only(once, x)
    query, key_length = once.query, once.key.shape[2]
    kind, class_tokens, *places = position_tensors(once.positions, query, key_length)
    mask, spans = visible_keys(once.key_mask, key_length)
    normalisation = "sink" if once.sinks is not None else once.normalisation
    options = (kind, class_tokens, float(once.scale), once.is_causal, float(once.dropout), normalisation)
    tensors = (mask, spans, once.key_bias, *places, once.seed, once.query_bias, once.sinks)
    out, _ = once_forward(query, once.key, x, *tensors, *options)
    return out


_NORMALISATIONS = {
    "softmax": triton_logits.SOFTMAX,
    "sink": triton_logits.SINK,
    "sigmoid": triton_logits.SIGMOID,
    "softpick": triton_logits.SOFTPICK,
}


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
    query_bias: torch.Tensor | None
    sinks: torch.Tensor | None

    def sinks_in_log2(self) -> torch.Tensor | None:
        """The sinks in units of log 2, ``[1, heads, 1]``, or None."""
        if self.sinks is None:
            return None
        # The largest numbers would become inf, and inf - inf is not a number.
        return (self.sinks.view(1, -1, 1) / math.log(2.0)).clamp(max=torch.finfo(torch.float32).max)

    def given(self, query: torch.Tensor, key_length: int, is_causal: bool, normalisation: str) -> torch.Tensor | None:
        """The number b of each row that ``triton_logits`` speaks of, float32 ``[batch, heads, length]``, or None."""
        numbers = self.sinks_in_log2()
        if normalisation == "sigmoid":
            numbers = log_counts(self.mask, self.spans, query, key_length, is_causal).unsqueeze(1)
        return None if numbers is None else numbers.expand(query.shape[:3]).contiguous()


def _arguments(
    query: torch.Tensor,
    key: torch.Tensor,
    x: torch.Tensor,
    lse: torch.Tensor,
    seen: _Seen,
    scale: float,
    is_causal: bool,
    dropout: float,
    normalisation: str,
    given: torch.Tensor | None = None,
) -> dict[str, Any]:
    """What all kernels take; only the forward one looks at what rows are ``given``."""
    heads, length, key_length = query.shape[1], query.shape[2], key.shape[2]
    mask = None if seen.mask is None else seen.mask.contiguous().view(torch.uint8)
    places = make_places(seen.position, seen.key_bias, seen.key_bias_grad, heads, seen.query_bias)
    if places is not None and normalisation == "softmax":  # the others notice what is taken from a whole row
        shown = mask
        if shown is None and seen.spans is not None and seen.position.kind:
            shown = (torch.arange(key_length, device=query.device) < seen.spans[:, 1:]).view(torch.uint8)
        places = with_nearest(places, seen.position, shown, query.shape[0], is_causal)
    position = seen.position.kind or (0 if seen.key_bias is None else ONLY_KEYS.value)
    has = {"has_mask": mask is not None, "has_spans": seen.spans is not None, "causal": is_causal}
    widths = {"width": query.shape[3], "block_width": _power(query.shape[3])}
    constants = {**widths, **has, "position": position, "drops": dropout > 0.0}
    constants["normalisation"] = _NORMALISATIONS[normalisation].value
    matrix = triton_once.Matrix(
        queries=rows_of(query),
        keys=rows_of(key, heads // key.shape[1]),
        mask=lse if mask is None else mask,
        spans=lse if seen.spans is None else seen.spans,
        lse=lse,
        given=lse if given is None else given,
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
        "SUMS": seen.query_bias is not None,
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
    query_bias: torch.Tensor | None,
    sinks: torch.Tensor | None,
    kind: int,
    class_tokens: int,
    scale: float,
    is_causal: bool,
    dropout: float,
    normalisation: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out, and L of the rows, see ``triton_logits``: float32 ``[batch, heads, length]``."""
    query, key, x = adjacent(query), adjacent(key), adjacent(x)
    out, lse = _outputs(query, x)
    if out.numel() == 0:
        return out, lse
    position = PositionTensors(kind, class_tokens, coordinates, key_coordinates, parameters, lookup)
    seen = _Seen(mask, spans, key_bias, None, position, seed, query_bias, sinks)
    with on_device(query):
        given = seen.given(query, key.shape[2], is_causal, normalisation)
        arguments = _arguments(query, key, x, lse, seen, scale, is_causal, dropout, normalisation, given)
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
    query_bias: torch.Tensor | None,
    sinks: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    kind: int,
    class_tokens: int,
    scale: float,
    is_causal: bool,
    dropout: float,
    normalisation: str,
    learns: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """dQ, dK, dx, and those of the key bias, if it ``learns`` the parameters, the query bias and the sinks.

    Empty where there is none.
    """
    grad, query, key, x, out = (adjacent(tensor) for tensor in (grad, query, key, x, out))
    dq, dk, dx, d_key_bias, d_parameters = empty_gradients(query, key, x, key_bias, parameters, learns)
    d_query_bias, d_sinks = _number_gradients(query, query_bias, sinks)
    found = (dq, dk, dx, d_key_bias, d_parameters, d_query_bias, d_sinks)
    if out.numel() == 0 or dq.numel() == 0:
        return tuple(gradient.zero_() for gradient in found)  # type: ignore[return-value]
    heads, (batch, _, key_length, _) = query.shape[1], key.shape
    totals = [(total, for_every_head(total, heads)) for total in (dk, dx)]
    configs = triton_once.key_gradient_kernel.configs
    slots = -(-key_length // min(config.kwargs["BLOCK_N"] for config in configs))
    sums = torch.zeros(batch * heads, slots, d_parameters.shape[-1], dtype=torch.float32, device=query.device)
    position = PositionTensors(kind, class_tokens, coordinates, key_coordinates, parameters, lookup)
    seen, delta = _Seen(mask, spans, key_bias, d_key_bias, position, seed, query_bias, sinks), torch.empty_like(lse)
    with on_device(query):
        arguments = _arguments(query, key, x, lse, seen, scale, is_causal, dropout, normalisation)
        own: dict[str, Rows] = {
            name: rows_of(tensor)
            for name, tensor in (
                ("outputs", out),
                ("grads", grad),
                ("dqs", dq),
                *zip(("dks", "dxs"), (gradient for _, gradient in totals), strict=True),
            )
        }
        arguments |= {"delta_pointer": delta, "sums_pointer": sums, "slots": slots, "LEARNS": learns}
        arguments["row_sums_pointer"] = delta if query_bias is None else d_query_bias
        launch(triton_once.query_gradient_kernel, _programs(query, heads, "BLOCK_M"), arguments, **own)
        launch(triton_once.key_gradient_kernel, _programs(key, heads, "BLOCK_N"), arguments, **own)
    for total, gradient in totals:
        add_heads(total, gradient)
    if learns:
        d_parameters.copy_(sums.unflatten(0, (batch, heads)).sum((0, 2)))
    of_sinks = seen.sinks_in_log2()
    if of_sinks is not None:  # its weight in each row, whose x is 0
        d_sinks.copy_(-(torch.exp2(of_sinks - lse) * delta).sum((0, 2)))
    return found


def _number_gradients(
    query: torch.Tensor, query_bias: torch.Tensor | None, sinks: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for the gradients of the query bias and the sinks, float32; empty where there is none."""
    shapes = ((0,) if given is None else given.shape for given in (query_bias, sinks))
    d_query_bias, d_sinks = (torch.empty(shape, dtype=torch.float32, device=query.device) for shape in shapes)
    return d_query_bias, d_sinks


@once_backward.register_fake
def _(grad: Any, query: Any, key: Any, x: Any, mask: Any, spans: Any, key_bias: Any, *others: Any) -> Any:
    parameters, (query_bias, sinks), learns = others[2], others[5:7], others[-1]
    found = empty_gradients(adjacent(query), adjacent(key), adjacent(x), key_bias, parameters, learns)
    return *found, *_number_gradients(query, query_bias, sinks)


_TENSORS, _INPUTS = 13, 19
"""Inputs of the operator that are tensors, and all."""
_KEY_BIAS, _PARAMETERS, _QUERY_BIAS, _SINKS = 5, 8, 11, 12


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:_TENSORS], *output)
    ctx.options = inputs[_TENSORS:]
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, grad: torch.Tensor | None, *unused: Any) -> tuple[torch.Tensor | None, ...]:
    """Of the first output alone: the log-sum-exp is there for this function only."""
    if grad is None:
        return (None,) * _INPUTS
    learns = ctx.needs_input_grad[_PARAMETERS]
    inputs = ctx.saved_tensors
    dq, dk, dx, d_key_bias, d_parameters, *of_numbers = once_backward(grad, *inputs, *ctx.options, learns)
    found: list[torch.Tensor | None] = [dq, dk, dx, *(None,) * (_INPUTS - 3)]
    found[_PARAMETERS] = d_parameters if learns else None
    for place, gradient in zip((_KEY_BIAS, _QUERY_BIAS, _SINKS), (d_key_bias, *of_numbers), strict=True):
        found[place] = None if inputs[place] is None else gradient
    return tuple(found)


once_forward.register_autograd(_gradient, setup_context=_save)
once_backward.register_autograd(refuse_second)


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
