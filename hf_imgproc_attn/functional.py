"""Attention as an image filter, in the form of ``torch.nn.functional.scaled_dot_product_attention``."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch

from . import gpu as _gpu  # noqa: F401  # its back-ends register themselves
from .models.backend_call import Booster, Content, FilterCall, check_bias, check_options, check_tensors
from .models.backend_table import run_filter
from .models.boost_weights import Robust
from .models.kernel_content import working_dtype
from .models.kernel_given import BiasPositions, FeaturePositions
from .models.kernel_position import Positions
from .models.visibility import Visibility, attention_visibility


def filter_attention(  # noqa: PLR0913  # in the form of scaled_dot_product_attention
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    boosting: str = "none",
    boosting_steps: int = 2,
    query_features: torch.Tensor | None = None,
    key_features: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Filter the values: A = softmax(scale q.k + a.b + bias), then p(A) V with p the booster's polynomial.

    The first arguments are those of ``torch.nn.functional.scaled_dot_product_attention``, which this function equals
    where only they are given (rows that see no key give 0). The spatial kernel of a bilateral filter
    (arXiv 2506.10371) enters through features or a bias: ``logits_ij = scale q_i.k_j + a_i.b_j + bias_ij``.

    Args:
        query: ``[batch, heads, length, head_dim]``.
        key: ``[batch, heads, key_length, head_dim]``.
        value: ``[batch, heads, key_length, d]``.
        attn_mask: boolean (True = visible) or additive float, broadcastable to
            ``[batch, heads, length, key_length]``, or None. Values near the smallest of its dtype hide a key.
        dropout_p: probability on A, in [0, 1). A boosted filter uses one mask for all its passes.
        is_causal: whether query i sees keys j <= i only; square, and not together with ``attn_mask``. What is not a
            number in a later token can still reach earlier ones, which weigh it by 0, as in PyTorch's attention: hide
            such tokens by a mask, then they have no influence at all.
        scale: factor on q.k. None: 1/sqrt(head_dim), of the queries without their features.
        enable_gqa: whether key and value may have fewer heads than the query, a divisor of them.
        boosting: ``"none"``, ``"twicing"`` ((I - (I - A)^k) V, k = 2: (2A - A^2) V; arXiv 2503.00687, eq. 8) or any
            other key of ``boost_operators.BOOSTING``, for which A has to be square, but for ``"inversion"`` and
            ``"dynamic_inversion"``, whose factors are parameters of a layer (``"learned"`` has its first one, 1), or
            ``"robust"`` (Huber's robust mean of the values, with distances in their units; arXiv 2410.23182), or
            ``"delta"`` with beta = 1, where no query may see a later key: A (I + A')^-1 V, A' the weights over the
            keys before the query's own (arXiv 2505.19488).
        boosting_steps: k, from 1 to 16; without boosting it means nothing.
        query_features: a, ``[batch or 1, heads or 1, length, c]``, or None. They are not multiplied by ``scale``.
        key_features: b, ``[batch or 1, key heads or 1, key_length, c]``, or None.
        position_bias: added to the logits, broadcastable to ``[batch, heads, length, key_length]``, or None.
        backend: ``"auto"`` (by measured shape), ``"reference"`` (dense, at least float32), ``"sdpa"`` (one
            ``scaled_dot_product_attention`` a pass), ``"blocked"`` (each weight once where A is causal or short;
            linear memory), ``"triton"`` or ``"flex"``.

    Returns:
        ``[batch, heads, length, d]`` in the value's dtype.

    Raises:
        ValueError: naming the argument, for wrong shapes, dtypes or values, for a boosted filter whose A is not
            square, and for a back-end that is not there or cannot serve the call.
    """
    _check_kinds(
        tensors={"query": query, "key": key, "value": value},
        optional={
            "attn_mask": attn_mask,
            "query_features": query_features,
            "key_features": key_features,
            "position_bias": position_bias,
        },
        switches={"is_causal": is_causal, "enable_gqa": enable_gqa},
        numbers={"scale": 1.0 if scale is None else scale, "dropout_p": dropout_p},
        words={"boosting": boosting, "backend": backend},
    )
    check_tensors(query, key, value)
    dropout_p = float(dropout_p)  # PyTorch takes no comparison of NumPy's numbers for True
    check_options(boosting, boosting_steps, dropout_p)
    if query.shape[1] != key.shape[1] and not enable_gqa:
        raise ValueError(
            f"query and key must have the same number of heads unless enable_gqa, got {query.shape[1]}, {key.shape[1]}"
        )
    if is_causal and attn_mask is not None:
        raise ValueError("attn_mask must be None with is_causal=True: put causality into the mask")
    if query.shape[2] != key.shape[2]:
        lengths = f"got {query.shape[2]} queries and {key.shape[2]} keys"
        if is_causal:
            raise ValueError(f"is_causal needs as many queries as keys, {lengths}: use attn_mask")
        if boosting not in ("none", "robust"):
            raise ValueError(
                f"boosting={boosting!r} applies A to its own output and needs as many queries as keys, {lengths}"
            )
    shape = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    visibility = attention_visibility(
        attn_mask, shape=shape, causal=is_causal, working_dtype=working_dtype(query.dtype), name="attn_mask"
    )
    if boosting == "delta":
        _check_causal(visibility)
    call = FilterCall(
        query,
        key,
        value,
        content=Content("dot_product", query.shape[-1] ** -0.5 if scale is None else float(scale)),
        visibility=visibility,
        positions=_given_positions(query, key, visibility, query_features, key_features, position_bias),
        booster=Booster("none" if boosting == "robust" else boosting, boosting_steps),
        by_weights=Robust.of(boosting_steps) if boosting == "robust" else None,
        dropout=dropout_p,
    )
    return run_filter(call, backend).to(value.dtype)


def _check_causal(visibility: Visibility) -> None:
    """Refuse masks that show a later key; what a traced graph cannot tell is not looked at."""
    if visibility.causal:
        return
    allowed = None if visibility.mask is None else visibility.allowed(visibility.mask.device)
    if allowed is None or (not torch.compiler.is_compiling() and bool(allowed.triu(1).any())):
        raise ValueError(
            "boosting='delta' corrects each value by those before it: it needs is_causal=True, or an attn_mask that "
            "hides later keys"
        )


def _check_kinds(
    tensors: dict[str, Any],
    optional: dict[str, Any],
    switches: dict[str, Any],
    numbers: dict[str, Any],
    words: dict[str, Any],
) -> None:
    """Refuse arguments of another kind than is meant, each group name -> value; what they may be is checked later.

    A tensor is no number here: as ``scale`` it would lose its gradient without a word.

    Raises:
        ValueError: naming the argument, its kind and what was got.
    """
    device = getattr(tensors["query"], "device", None)
    for name, value in {**tensors, **optional}.items():
        if value is None and name in optional:
            continue
        if not isinstance(value, torch.Tensor):
            kind = "a tensor or None" if name in optional else "a tensor"
            raise ValueError(f"{name} must be {kind}, got {_shown(value)}")
        if value.is_floating_point() and value.element_size() < 2:  # which PyTorch stores, and cannot compare
            raise ValueError(f"{name} must be of at least 16 bits a number, got {value.dtype}")
        if value.device != device:
            raise ValueError(f"{name} must be on the device of query, {device}, got {value.device}")
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, got {_shown(value)}")
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, Real) or not _is_finite(value):
            raise ValueError(f"{name} must be a finite number, at most 1e30 in size, got {_shown(value)}")
    for name, value in words.items():
        if not isinstance(value, str):
            raise ValueError(f"{name} must be a string, got {_shown(value)}")


def _is_finite(number: Real) -> bool:
    """Also after it has been multiplied by a constant in float32."""
    try:
        return math.isfinite(float(number)) and abs(float(number)) <= 1e30
    except OverflowError:  # an integer that no float can hold
        return False


def _shown(value: Any) -> str:
    """A value on one line, cut where it is long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def _given_positions(
    query: torch.Tensor,
    key: torch.Tensor,
    visibility: Visibility,
    query_features: torch.Tensor | None,
    key_features: torch.Tensor | None,
    position_bias: torch.Tensor | None,
) -> tuple[Positions, ...]:
    """Feature columns and bias as terms of the logits, checked."""
    terms: list[Positions] = []
    if position_bias is not None:
        shape = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
        terms.append(BiasPositions(check_bias(position_bias, shape)))
    if query_features is None and key_features is None:
        return tuple(terms)
    if query_features is None or key_features is None:
        raise ValueError("query_features and key_features must be given together, got only one of them")
    _check_features("query_features", query_features, query)
    _check_features("key_features", key_features, key)
    if query_features.shape[-1] != key_features.shape[-1]:
        raise ValueError(
            f"query_features and key_features must have the same width, got {query_features.shape[-1]} and "
            f"{key_features.shape[-1]}"
        )
    if key_features.shape[1] not in (1, query.shape[1]):
        key_features = key_features.repeat_interleave(query.shape[1] // key_features.shape[1], dim=1)
    if visibility.hidden is not None:  # features, too, may hold anything at keys that no query sees
        key_features = key_features.masked_fill(visibility.hidden.mT, 0.0)
    return (FeaturePositions(visibility.clean_queries(query_features), key_features), *terms)


def _check_features(name: str, features: torch.Tensor, columns_of: torch.Tensor) -> None:
    batch, heads, length, _ = columns_of.shape
    shape = tuple(features.shape)
    fits = features.ndim == 4 and shape[0] in (1, batch) and shape[1] in (1, heads) and shape[2] == length
    if not fits or not features.is_floating_point():
        raise ValueError(
            f"{name} must be floating, [{batch} or 1, {heads} or 1, {length}, c], got {shape} of {features.dtype}"
        )
