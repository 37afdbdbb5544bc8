"""Runs one layer's composed filter on a back-end: the one that was asked for, or the one that suits the call.

``backend_reference`` is the truth of all of them. What differs is cost: ``sdpa`` takes one fused call a booster pass,
``blocked`` computes every weight once, a dense row is cheapest for a single token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .backend_blocked import blocked_attention
from .backend_reference import reference_attention
from .backend_sdpa import augment, sdpa_attention
from .backend_table import BACKENDS, OPTIONAL_BACKENDS, Request, choose_backend
from .boost_operators import Extend
from .kernel_content import CONTENT_LOGITS, HALF_DTYPES, working_dtype
from .kernel_position import Positions, UntiedPositions, position_logits


def dense_logits(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    content_kernel: str,
    content_scale: torch.Tensor | float,
    positions: Positions | None,
) -> torch.Tensor:
    """log K, dense, ``[batch, heads, length, key_length]``, in the working precision; arguments as in ``augment``."""
    work = working_dtype(query.dtype)
    with torch.autocast(query.device.type, enabled=False):
        logits = CONTENT_LOGITS[content_kernel](query.to(work), key.to(work), content_scale)
        return logits if positions is None else logits + position_logits(positions, query.dtype)


def run_filter(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    full_value: torch.Tensor,
    *,
    backend: str,
    kernels: dict[str, Any],
    attention_mask: torch.Tensor | None,
    is_causal: bool,
    only_past: bool,
    boosting: str,
    boosting_steps: int,
    boosting_gain: torch.Tensor | None,
    dropout: float,
    extend: Extend,
    past_streams: Sequence[torch.Tensor] | None,
) -> torch.Tensor:
    """Filter the values without handing out the operator.

    Args:
        query: ``[batch, heads, length, head_dim]``.
        key: ``[batch, heads, key_length, head_dim]``.
        value: ``[batch, heads, length, d]``, rows of the new tokens.
        full_value: ``[batch, heads, key_length, d]``.
        backend: one of ``FILTER_BACKENDS``.
        kernels: ``content_kernel``, ``content_scale`` and ``positions``, as ``augment`` takes them.
        attention_mask: boolean or additive float, broadcastable to ``[batch, heads, length, key_length]``, or None.
        is_causal: causal without a cache and without a mask.
        only_past: whether no query sees a key after its own, whatever says so.
        boosting: key of ``BOOSTING``.
        boosting_steps: k >= 1.
        boosting_gain: gamma of ``learned``, ``[heads, 1, 1]``, or None.
        dropout: probability on A, one mask for all passes.
        extend: stores streams in a cache.
        past_streams: the cached keys' rows of each stream; None without a cache.

    Returns:
        ``[batch, heads, length, d]`` in the value's dtype.

    Raises:
        ValueError: for a back-end that is not there or cannot serve the call.
    """
    options: dict[str, Any] = {
        "attention_mask": attention_mask,
        "is_causal": is_causal,
        "boosting": boosting,
        "boosting_steps": boosting_steps,
        "boosting_gain": boosting_gain,
        "dropout": dropout,
        "extend": extend,
    }
    gets_wider = kernels["positions"] is not None or kernels["content_kernel"] == "gaussian"
    tensors = (query, key, full_value, attention_mask, None)
    request = Request(*tensors, is_causal, 1.0, dropout, boosting, boosting_steps, gets_wider)
    name = backend if backend != "auto" else _choose(request, kernels["positions"], boosting_gain, past_streams)
    if name not in BACKENDS:
        raise ValueError(f"filter_backend={name!r} is not available: {OPTIONAL_BACKENDS[name]}")
    reason = _refuses(name, request, boosting_gain, past_streams)
    if reason is not None:
        raise ValueError(f"filter_backend={name!r} cannot serve this call: it {reason}")
    if name == "reference":
        output, _ = reference_attention(dense_logits(query, key, **kernels), value, full_value, **options)
        return output
    if name == "sdpa":
        return sdpa_attention(query, key, value, full_value, **kernels, **options)
    if name == "blocked":
        return _blocked(query, key, value, full_value, kernels, only_past, past_streams or (), options)
    wide, wide_key, scale, bias = augment(query, key, **kernels)
    request = request._replace(query=wide, key=wide_key, scale=scale, position_bias=bias)
    return BACKENDS[name].run(request).to(value.dtype)


def _choose(
    request: Request,
    positions: Positions | None,
    gain: torch.Tensor | None,
    past_streams: Sequence[torch.Tensor] | None,
) -> str:
    """The cheapest back-end for a call; see the table in ``backend_table`` for whole sequences."""
    dtype, length = request.query.dtype, request.query.shape[-2]
    if length == 1 and dtype not in HALF_DTYPES and (request.is_boosted or request.gets_wider):
        # One row of weights serves all passes, and no columns have to be put beside every cached key.
        return "reference"
    if torch.compiler.is_compiling():  # a traced graph without breaks
        return "reference" if request.is_boosted and request.dropout_p else "sdpa"
    if not isinstance(positions, UntiedPositions | None) and not (request.is_boosted or request.dropout_p):
        # Columns of p^2 / h^2 are large numbers that cancel: the units of log 2 of the blocks would cost more digits.
        return "sdpa"
    name = choose_backend(request)
    if _refuses(name, request, gain, past_streams) is None:
        return name
    return next(other for other in ("sdpa", "reference") if _refuses(other, request, gain, past_streams) is None)


def _refuses(
    name: str, request: Request, gain: torch.Tensor | None, past_streams: Sequence[torch.Tensor] | None
) -> str | None:
    """Why a back-end cannot serve a layer's call, as the rest of a sentence; None if it can."""
    if name == "blocked":
        if gain is not None and request.query.dtype in HALF_DTYPES:
            return "hands out its streams in half precision, from which a learned gain is not exact"
        if past_streams is None and request.is_boosted and request.query.shape[-2] != request.key.shape[-2]:
            return "needs the streams of earlier keys"
    elif name not in ("reference", "sdpa"):
        if past_streams is not None and request.is_boosted:
            return "does not hand out the streams that a cache of boosted attention keeps"
        if gain is not None:
            return "knows no learned gain"
        if name == "triton" and request.gets_wider:
            return "takes plain inner products, without columns of a position or content kernel"
    return BACKENDS[name].refuses(request)


def _blocked(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    full_value: torch.Tensor,
    kernels: dict[str, Any],
    only_past: bool,
    past_streams: Sequence[torch.Tensor],
    options: dict[str, Any],
) -> torch.Tensor:
    """Every weight once. Half precision is computed in float32, so the columns are made in it."""
    work, form, device_type = working_dtype(query.dtype), query.dtype, query.device.type
    if torch.is_autocast_enabled(device_type) and form != torch.float64:
        form = torch.get_autocast_dtype(device_type)
    with torch.autocast(device_type, enabled=False):
        # Where half precision wants the gradient of h_p exact, float32 columns would lose it too.
        augmented = augment(query.to(work), key.to(work), form_dtype=form, **kernels)
    gain = options["boosting_gain"]
    output, streams = blocked_attention(
        augmented.query,
        augmented.key,
        full_value.to(work),
        attn_mask=options["attention_mask"],
        bias=augmented.bias,
        is_causal=only_past,
        scale=augmented.scale,
        dropout_p=options["dropout"],
        # With the residual r = V - A V both of its parts can be told from the output: A V = V - r.
        boosting="twicing" if gain is not None else options["boosting"],
        steps=2 if gain is not None else options["boosting_steps"],
        past_streams=[stream.to(work) for stream in past_streams],
    )
    for index, rows in enumerate(streams):
        options["extend"](index, rows.to(value.dtype))
    if gain is not None:
        smooth = value.to(work) - streams[0]
        output = smooth + gain * (output - smooth)
    return output.to(value.dtype)
