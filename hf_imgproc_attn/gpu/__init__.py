"""Fused kernels for NVIDIA GPUs, written in Triton: optional, and no part of what a checkpoint takes along.

A filter and its linear boosters without A in memory, forward and backward, in float16 and bfloat16: every content
kernel, positions by place (Gaussian, ALiBi, relative buckets) inside the kernels with exact gradients of their
parameters (:mod:`.triton_positions`), other positions as feature columns, causal or not, padded keys, grouped heads.

*Specialised*, for twicing with two steps and for no boosting, with as many queries as keys, queries, keys and values
of one width up to 128, no feature columns, dropout or streams. :mod:`.choice` chooses by shape:

    module                 for                                   N x N products, forward / backward (plain: 2 / 5)
    triton_short           not causal, N <= 256, width <= 64     3 / 8
    triton_single_pass     causal, heads enough for the device   3 / 7
    triton_wavefront       causal, few heads; if measured        3 / 7
    triton_general         everything else                       4 / 8, or 11 in a fixed order of additions

Not boosted, ``triton_general`` alone is used, with plain attention's 2 / 5.

*Composed* (:mod:`.composed`), for all other calls: any booster that applies A k times, as k applications of
:mod:`.triton_once`, 2k / 7k products in a fixed order of additions. Widths up to 256, those of queries and values
different, fewer queries than keys (a prompt in chunks), streams of a cache given and returned, learned gains, dropout
on A with one mask, which its seed gives again in every step and in the backward pass, ``sigmoid``, ``softpick`` and
sinks, and gates that forget, whose gradient takes sums of rows. ``sinkhorn`` is a softmax with a number for each key.

*Decoding* (:mod:`.decode_call`): at most 16 new tokens with cached streams that can be handed out, up to 4 steps, no
gradient wanted: keys, values and streams are read once, in chunks.

*Checked* without a GPU: outputs and gradients against float64 in Triton's interpreter; every kernel compiles for
compute capability 9.0 (H100), where its products are warp-group instructions (those of decoding have too few rows) and
its tiles fit into shared memory.

``imgproc-attn gpu-check`` measures errors and times on a machine with a CUDA device; what it found stands in
``docs/gpu.md``. The choice between the algorithms is by what was measured on the device (:mod:`.measured`), else by
the number of products; ``triton_wavefront``, whose programs wait for one another, is never chosen unmeasured.

Importing this package needs neither Triton nor a GPU; the back-ends register themselves in ``models.backend_table``.
``refuses`` says why a call cannot be served, ``supports`` why the specialised kernels do not serve it.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch

from ..errors import install_hint
from ..models.backend_call import FilterCall
from ..models.backend_sdpa import run as run_sdpa
from ..models.backend_table import Backend, register
from . import checks, composed, decode_call, flash, flex

_TRITON_IS_THERE = importlib.util.find_spec("triton") is not None

MAX_HEAD_DIM = 128
"""Of the specialised kernels."""


def _cannot_run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *others: Any) -> str | None:
    """Why no kernel can read the tensors, or None; of the others it has to know no more than how they are derived."""
    interpreted = os.environ.get("TRITON_INTERPRET", "0") == "1"
    if not _TRITON_IS_THERE:
        return f"needs the package triton: {install_hint('kernels')}"
    if not query.is_cuda and not interpreted:
        return f"needs tensors on a CUDA device, got {query.device}"
    if query.is_cuda and torch.cuda.get_device_properties(query.device).major < 8:
        return "needs a GPU of compute capability 8.0 or newer"
    dtypes = (torch.float16, torch.bfloat16, *((torch.float32,) if interpreted else ()))
    if not (query.dtype == key.dtype == value.dtype and query.dtype in dtypes):
        return f"needs float16 or bfloat16, got {query.dtype}, {key.dtype}, {value.dtype}"
    return checks.backward_only(query, key, value, *others)


def supports(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    is_causal: bool = False,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    boosting: str = "twicing",
    steps: int = 2,
) -> str | None:
    """Why the specialised kernels cannot serve a call, as the rest of a sentence about them, or None if they can.

    Args:
        query: ``[batch, heads, length, head_dim]``.
        key: ``[batch, key_heads, key_length, head_dim]``.
        value: ``[batch, key_heads, key_length, d]``.
        is_causal: whether query i sees keys j <= i only.
        attn_mask: None, or boolean ``[batch or 1, 1, 1, key_length]``, True = visible; other masks are refused.
        dropout_p: probability on A; refused unless 0.
        boosting: only ``"twicing"`` and ``"none"`` are served.
        steps: of twicing; only 2 are served.
    """
    reason = _cannot_run(query, key, value)
    if reason is not None:
        return reason
    if boosting != "none" and (boosting != "twicing" or steps != 2):
        return f"does twicing with 2 steps, or no boosting, got boosting={boosting!r} with {steps} steps"
    if key.shape != value.shape or (query.shape[0], *query.shape[2:]) != (key.shape[0], *key.shape[2:]):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (query, key, value))
        return f"needs query, key and value of one shape, but for heads that share a key, got {shapes}"
    if query.shape[-1] > MAX_HEAD_DIM:
        return f"needs head_dim <= {MAX_HEAD_DIM}, got {query.shape[-1]}"
    if dropout_p > 0.0:
        return f"drops nothing out, got dropout_p={dropout_p}"
    if attn_mask is not None:
        batch, key_length = key.shape[0], key.shape[-2]
        form = attn_mask.shape in ((batch, 1, 1, key_length), (1, 1, 1, key_length))
        if attn_mask.dtype != torch.bool or not form:
            return (
                "takes boolean masks of keys, [batch or 1, 1, 1, key_length], only, "
                f"got {attn_mask.dtype} {tuple(attn_mask.shape)}"
            )
    return None


def refuses(call: FilterCall) -> str | None:
    """Why the Triton kernels cannot serve a filter's call, as the rest of a sentence about them, or None."""
    return composed.refuses(call) or _cannot_run(*call)


def is_specialised(call: FilterCall) -> bool:
    """Whether kernels for the whole booster serve a call that is not refused; else it is composed of applications."""
    _, rest = composed.split_terms(call)
    gives_streams = call.streams.is_cached and call.is_boosted
    if composed.sums_rows(call):
        return False
    if rest.own_softmax is not None or rest.positions or gives_streams or call.booster.gain is not None:
        return False
    reason = supports(
        call.query,
        call.key,
        call.value,
        is_causal=call.visibility.hides_later_keys,
        attn_mask=call.visibility.keys,
        dropout_p=call.dropout,
        boosting=call.booster.name,
        steps=call.booster.steps,
    )
    return reason is None


def run(call: FilterCall) -> torch.Tensor:
    """Serve a call that is not refused: ``[batch, heads, length, d]``."""
    if flash.wins(call):
        return run_sdpa(call)
    if decode_call.applies(call):
        return decode_call.run(call)
    if not is_specialised(call):
        return composed.run(call)
    from .fused import fused_attention

    query, scale = call.query, call.content.scale
    by_place, _ = call.split_positions()
    if isinstance(scale, torch.Tensor):  # one per head, or a metric
        query, scale = (query * scale).to(query.dtype), 1.0
    return fused_attention(
        query,
        call.visibility.clean_keys(call.key),
        call.visibility.clean_keys(call.value),
        composed.key_mask(call),
        positions=by_place,
        key_bias=composed.key_bias(call),
        boosting=call.booster.name,
        scale=float(scale),
        is_causal=call.visibility.hides_later_keys,
    )


register("flex", Backend(flex.run, flex.refuses))
if _TRITON_IS_THERE:
    register("triton", Backend(run, refuses))
