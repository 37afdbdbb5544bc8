"""The fast back-end: one ``scaled_dot_product_attention`` a booster pass, on augmented queries and keys.

Content and position kernels that are inner products become columns beside q and k; where columns are not precise
enough, dense position logits go in as an additive mask. ``backend_reference`` is its truth.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from .backend_call import FilterCall, autocast_dtype
from .backend_flops import register_formulas
from .backend_sdpa_sinks import SinkAttention, has_fused_sinks
from .boost_weights import LocalLinear
from .kernel_content import CONTENT_COLUMNS, HALF_DTYPES, inside, row_constant_columns, working_dtype
from .kernel_given import FeaturePositions
from .kernel_position import Positions, features_or_bias, position_columns, position_logits
from .visibility import Visibility

register_formulas()  # FLOPs of the fused calls below


class Augmented(NamedTuple):
    """A filter as inner products: logits_ij = scale <query_i, key_j> + bias_ij.

    query: ``[batch, heads, length, width]``.
    key: ``[batch, key_heads, key_length, width]``; as many heads as the queries where there are columns.
    scale: a number.
    bias: ``[batch or 1, heads or 1, length or 1, key_length or 1]``, or None.
    """

    query: torch.Tensor
    key: torch.Tensor
    scale: float
    bias: torch.Tensor | None


def augment(call: FilterCall, dtype: torch.dtype, choice_dtype: torch.dtype | None = None) -> Augmented:
    """Write content and position kernel as columns beside queries and keys, or as a bias where columns lose digits.

    Where a number that is added to a whole row counts, beside a sink say, the logits are exact; else up to that.

    Args:
        call: the filter. Its booster is ignored; of its visibility only ``hidden`` keys and ``blind`` queries are
            used, which become 0.
        dtype: to compute in.
        choice_dtype: columns or bias are chosen as if inputs had this dtype. None: ``dtype``.
    """
    query = call.visibility.clean_queries(call.query).to(dtype)
    key = call.visibility.clean_keys(call.key).to(dtype)
    if call.has_columns and call.groups > 1:
        key = key.repeat_interleave(call.groups, dim=1)
    columns: list[tuple[torch.Tensor, torch.Tensor]] = []
    bias: torch.Tensor | None = None
    content_columns = CONTENT_COLUMNS[call.content.kernel]
    is_exact = not call.ignores_row_constants
    if content_columns is not None:
        columns.append(content_columns(query, key, call.content.scale))
        if is_exact:
            columns.append(row_constant_columns(query, key, call.content.scale))
    divided = _divided_features(call) if dtype in HALF_DTYPES and not columns else []
    for term in divided or call.positions:
        # Columns of places lack a number a row, which distances do not.
        has_columns = not (is_exact and hasattr(term, "coordinates"))  # tracing cannot ask for the protocol
        if has_columns and features_or_bias(term, choice_dtype or dtype) == "features":
            columns += position_columns(term, dtype)
        else:
            logits = position_logits(term, dtype)
            bias = logits if bias is None else bias + logits
    scale = 1.0
    if divided or (not columns and not isinstance(call.content.scale, torch.Tensor)):
        scale = float(call.content.scale)
    else:  # the columns carry their own factors, so the content's goes into the query
        scaled = query * call.content.scale
        query = (scaled if dtype != torch.float16 else inside(scaled, dtype)).to(dtype)
    left, right = [left for left, _ in columns], [right for _, right in columns]
    return Augmented(append_columns(query, left), append_columns(key, right), scale, bias)


def _divided_features(call: FilterCall) -> list[Positions]:
    """Features over the factor on products, if that is all there is: queries times it would be rounded. Else none."""
    scale = call.content.scale
    divided: list[Positions] = []  # torch.compile breaks its graph at list[Positions]()
    for term in call.positions:
        if not isinstance(term, FeaturePositions) or isinstance(scale, torch.Tensor) or scale <= 0.0:
            return []
        if term.key_features.dtype in HALF_DTYPES:
            return []
        divided.append(term._replace(key_features=term.key_features / scale))
    return divided


def append_columns(x: torch.Tensor, columns: Sequence[torch.Tensor]) -> torch.Tensor:
    """Append columns, and zeros up to a multiple of 8: fused kernels need such a width.

    Args:
        x: ``[batch, heads, length, width]``.
        columns: each ``[batch or 1, heads or 1, length, c]``; without any, x is returned as it is.
    """
    if not columns:
        return x
    parts = [x, *(column.to(x.dtype).expand(x.shape[0], x.shape[1], -1, -1) for column in columns)]
    missing = -sum(part.shape[-1] for part in parts) % 8
    if missing:
        parts.append(x.new_zeros(()).expand(*x.shape[:-1], missing))
    return torch.cat(parts, dim=-1)


NO_SOFTMAX = {
    "sigmoid": "its weights share no sum over a row, so that every key would need a call of its own",
    "softpick": "it gives keys below 0 no weight at all, and no softmax has a weight of 0",
    "sinkhorn": "it scales columns too, and a fused call sums over rows alone",
}
"""Why no fused calls make up the weights of a normalisation."""


def refuses(call: FilterCall) -> str | None:
    """Why SDPA cannot serve a call, as the rest of a sentence about it, or None if it can."""
    if isinstance(call.by_weights, LocalLinear):
        return f"{call.own_softmax}: products of keys and values would be head_dim times as wide as values"
    if call.by_weights is not None:
        return f"{call.own_softmax}: their distances to values are no inner products, of which its logits are made"
    if call.dropout and call.is_boosted:
        return "draws a new dropout mask at every pass, and a booster needs the same one"
    if call.content.softcap is not None:
        return f"{call.own_softmax}: a function of inner products is none itself"
    if call.normalisation.name != "softmax":
        return f"{call.own_softmax}: {NO_SOFTMAX[call.normalisation.name]}"
    return None


def run(call: FilterCall) -> torch.Tensor:
    """The back-end ``sdpa``: ``[batch, heads, length, d]`` in the value's dtype, or in autocast's where that is on."""
    # Autocast runs SDPA in its own dtype whatever comes in: columns must be made for that dtype.
    dtype = autocast_dtype(call.query)
    query, key, scale, bias = augment(call, dtype)
    value = call.value.to(dtype)
    if call.groups > 1:
        value = value.repeat_interleave(call.groups, dim=1)
        key = key if key.shape[1] == query.shape[1] else key.repeat_interleave(call.groups, dim=1)
    if call.sinks is not None and _hides_by_causality_alone(call, bias, scale):
        given = query, key, value, call.sinks
        if has_fused_sinks(given):
            options = call.sinks, call.visibility.hides_later_keys, scale
            new_value = call.new_value.to(dtype)
            return call.boost(lambda rows: SinkAttention.apply(query, key, rows.to(dtype), *options), new_value, value)
    has_sinks = call.sinks is not None
    # Where causality alone hides keys, a sink before them all needs no mask, if a query comes before them all too.
    sees_all_before = call.visibility.hides_later_keys and call.visibility.is_square and call.visibility.mask is None
    in_front = has_sinks and sees_all_before and bias is None and call.visibility.bias is None
    in_front = in_front and call.visibility.keys is None
    mask, sees, is_causal = _mask(call.visibility, bias, dtype, query.device, has_sinks and not in_front)
    if call.sinks is not None:
        query, key, scale = with_sinks(query, key, scale, call.sinks, in_front)
    if is_causal and scale <= 0.0:  # fused kernels multiply the -inf of later keys by it
        query, scale = query * scale, 1.0

    def attend(rows: torch.Tensor) -> torch.Tensor:
        rows = nn.functional.pad(rows, (0, 0, int(in_front), int(not in_front))) if has_sinks else rows
        out = fused_call(query, key, rows.to(dtype), mask, is_causal, scale, call.dropout)
        out = out[..., 1:, :] if in_front else out
        return out if sees is None else out.masked_fill(~sees, 0.0)

    new_value = call.new_value.to(dtype)
    return call.boost(attend, new_value, value)


def _hides_by_causality_alone(call: FilterCall, bias: torch.Tensor | None, scale: float) -> bool:
    """Whether a call with sinks has nothing that a mask would be needed for, and drops nothing out."""
    seen = call.visibility
    if bias is not None or seen.bias is not None or seen.mask is not None or seen.keys is not None or call.dropout:
        return False
    return not seen.hides_later_keys or (seen.is_square and scale > 0.0)


def with_sinks(
    query: torch.Tensor, key: torch.Tensor, scale: float, sinks: torch.Tensor, in_front: bool
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Queries and keys with one more key, whose logit is the sink's, and the factor on products.

    It comes after the others, or with ``in_front`` before them, and one more query too.
    """
    if scale <= 0.0:
        query, scale = query * scale, 1.0
    own = (sinks.to(working_dtype(key.dtype)) / scale).to(key.dtype).view(1, -1, 1, 1)
    before, after = (0, key.shape[-2]) if in_front else (key.shape[-2], 0)
    key = nn.functional.pad(key, (0, 0, int(in_front), int(not in_front)))
    query = nn.functional.pad(query, (0, 0, int(in_front), 0))
    column = nn.functional.pad(own.expand(key.shape[0], -1, -1, -1), (0, 0, before, after))
    ones = torch.ones_like(query[..., :1])
    return append_columns(query, [ones]), append_columns(key, [column]), scale


def _mask(
    visibility: Visibility, bias: torch.Tensor | None, dtype: torch.dtype, device: torch.device, has_sinks: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None, bool]:
    """``attn_mask`` of SDPA, which rows see any key (``[..., length, 1]``, None = all), and ``is_causal``.

    Where there are sinks the mask has a last column, which every row sees.
    """
    if visibility.bias is not None:
        bias = visibility.bias if bias is None else bias + visibility.bias
    allowed = None
    if bias is not None or has_sinks:
        allowed = visibility.allowed(device)
    if has_sinks:
        if bias is not None:
            bias = nn.functional.pad(bias.expand(*bias.shape[:-1], visibility.key_length), (0, 1))
        if allowed is not None:
            allowed = allowed.expand(*allowed.shape[:-1], visibility.key_length)
            allowed = nn.functional.pad(allowed, (0, 1), value=True)
        if bias is None:
            return allowed, None if visibility.blind is None else ~visibility.blind, False
    if bias is not None:
        mask, sees = additive_mask(bias.to(working_dtype(dtype)), allowed, dtype)
        return mask, sees, False
    if visibility.hides_nothing:
        return None, None, False
    if visibility.hides_only_padding and visibility.keys is None and visibility.is_square:
        return None, None, True
    allowed = visibility.allowed(device)
    return allowed, None if visibility.blind is None else ~visibility.blind, False


def additive_mask(
    bias: torch.Tensor, allowed: torch.Tensor | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """One additive mask from logits and what may be seen.

    Each row is shifted so that its largest visible value is 0, which does not change the softmax. So the logits of the
    keys with weight keep their digits, and those of far keys stay inside the range of float16.

    Args:
        bias: ``[batch or 1, heads or 1, length, key_length]`` in at least float32.
        allowed: boolean, broadcastable with it, or None.
        dtype: of the mask.

    Returns:
        The mask, and which rows see any key (``[..., length, 1]``). Rows that see no key have a mask of 0, which
        avoids NaN; the caller sets their output to 0.
    """
    if allowed is not None:
        bias = torch.where(allowed, bias, float("-inf"))
    largest = bias.detach().amax(-1, keepdim=True)
    empty = largest == float("-inf")
    hidden = bias == float("-inf")
    bias = (bias - largest.masked_fill(empty, 0.0)).clamp(min=torch.finfo(dtype).min)
    return bias.masked_fill(hidden, float("-inf")).masked_fill(empty, 0.0).to(dtype), ~empty


def fused_call(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    is_causal: bool,
    scale: float,
    dropout: float,
) -> torch.Tensor:
    """SDPA with V, or Q and K, padded by zeros to one width, which fused kernels need; padding is the cheaper way."""
    width, missing = value.shape[-1], query.shape[-1] - value.shape[-1]
    if missing < 0:
        query, key = (nn.functional.pad(x, (0, -missing)) for x in (query, key))
    out = nn.functional.scaled_dot_product_attention(
        query,
        key,
        nn.functional.pad(value, (0, missing)) if missing > 0 else value,  # padding by nothing would copy
        attn_mask=attention_mask,
        dropout_p=dropout,
        is_causal=is_causal,
        scale=scale,
    )
    return out[..., :width]
