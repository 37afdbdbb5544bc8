"""Any linear booster as a composition of ``filter_once``: what the specialised kernels of ``fused`` do not serve.

Feature columns, values of another width, fewer queries than keys, dropout, several steps, gains, other normalisations
than softmax, sinks, gates that forget, and streams that are given and returned. The steps are those of
``boost_operators``, as in every other back-end.
"""

from __future__ import annotations

import torch

from ..models.backend_call import Content, FilterCall
from ..models.backend_sdpa import augment
from ..models.kernel_normalisation import Normalisation
from ..models.kernel_position import (
    BlockedPositions,
    features_or_bias,
    is_by_place,
    keys_of_positions,
    position_columns,
    rows_of_positions,
)
from ..models.visibility import Visibility
from .once_inputs import MAX_WIDTH, NORMALISATIONS, Once
from .token_numbers import split_numbers


def refuses(call: FilterCall) -> str | None:
    """Why the kernels cannot serve a call, whatever its device and dtype, or None."""
    plain = call._replace(sinks=None)
    if call.normalisation.name in NORMALISATIONS:
        plain = plain._replace(normalisation=Normalisation())
    if plain.own_softmax is not None:
        return plain.own_softmax
    if call.in_order is not None:
        return call.in_order
    _, rest = split_terms(call)
    for term in rest.positions:
        if is_by_place(term) or features_or_bias(term, call.query.dtype) != "features":
            return (
                "takes positions as feature columns, or one term by place (gaussian, alibi, relative_buckets), "
                f"got {type(term).__name__}"
            )
    reason = _refuses_mask(call.visibility)
    if reason is not None:
        return reason
    wide = call.query.shape[-1] + _columns(rest)
    if max(wide, call.value.shape[-1]) > MAX_WIDTH:
        return (
            f"needs widths <= {MAX_WIDTH}, columns included, got {wide} of queries, {call.value.shape[-1]} of values"
        )
    return None


def _refuses_mask(seen: Visibility) -> str | None:
    got = None
    if seen.bias is not None:
        got = "numbers to be added to the logits"
    elif seen.mask is not None:
        got = "one of pairs of tokens, as a cache of fixed size makes it"
    elif seen.keys is not None and seen.keys.shape[1] > 1:
        got = f"one of {seen.keys.shape[1]} heads"
    return None if got is None else f"takes masks of padded keys, the same for all heads, only, got {got}"


def _columns(call: FilterCall) -> int:
    """How many feature columns queries and keys get: found on one query and one key."""
    first = [keys_of_positions(rows_of_positions(term, slice(0, 1)), 1) for term in call.positions]
    found = [left.shape[-1] for term in first for left, _ in position_columns(term, call.query.dtype)]
    return -(-(call.query.shape[-1] + sum(found)) // 8) * 8 - call.query.shape[-1] if found else 0


def split_terms(call: FilterCall) -> tuple[BlockedPositions | None, FilterCall]:
    """The term by place, and the call with those terms alone that become feature columns."""
    by_place, rest = call.split_positions()
    return by_place, split_numbers(rest)[1]


def key_bias(call: FilterCall) -> torch.Tensor | None:
    """What kernels add to all logits of a key, float32 ``[batch, heads, key_length]``, or None.

    Numbers of tokens, and of content ``gaussian`` -|q - k|^2 / h^2 but for what a whole row shares.
    """
    numbers, _ = split_numbers(call)
    terms = [term.keys.squeeze(-1) for term in numbers]
    if call.content.kernel == "gaussian":
        squares = call.visibility.clean_keys(call.key).float().square().sum(-1)
        terms.append(squares.repeat_interleave(call.groups, dim=1) * -0.5 * _factor(call))
    return _total(terms, (*call.query.shape[:2], call.key.shape[2]))


def query_bias(call: FilterCall) -> torch.Tensor | None:
    """What kernels add to all logits of a query, float32 ``[batch, heads, length]``, or None.

    Numbers of tokens: no softmax sees them, but the gradient of ``forget`` is sums of rows minus sums of columns, and
    rounding leaves a row's sum off 0. Of content ``gaussian`` what a row shares, where weights depend on it.
    """
    numbers, _ = split_numbers(call)
    terms = [term.queries.squeeze(-1) for term in numbers if term.queries is not None]
    if call.content.kernel == "gaussian" and not call.ignores_row_constants:
        squares = call.visibility.clean_queries(call.query).float().square().sum(-1)
        terms.append(squares * -0.5 * _factor(call))
    return _total(terms, tuple(call.query.shape[:3]))


def sums_rows(call: FilterCall) -> bool:
    """Whether a gradient of numbers of queries is wanted."""
    numbers, _ = split_numbers(call)
    wanted = [term.queries for term in numbers if term.queries is not None and term.queries.requires_grad]
    return torch.is_grad_enabled() and len(wanted) > 0


def _factor(call: FilterCall) -> torch.Tensor | float:
    scale = call.content.scale
    return scale.float().squeeze(-1) if isinstance(scale, torch.Tensor) else scale


def _total(terms: list[torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor | None:
    """The sum in float32, of the shape, or None without terms."""
    if not terms:
        return None
    total = terms[0].float()
    for term in terms[1:]:
        total = total + term.float()
    return total.expand(shape)


def key_mask(call: FilterCall) -> torch.Tensor | None:
    """Which keys are visible, ``[batch, key_length]``, or None where all are."""
    keys = call.visibility.keys
    return None if keys is None else keys[:, 0, 0].expand(call.key.shape[0], -1)


def run(call: FilterCall) -> torch.Tensor:
    """Serve a call that is not refused: ``[batch, heads, length, d]``; stores the booster's streams."""
    from .once import apply_once

    by_place, rest = split_terms(call)
    dtype = call.query.dtype
    # A number for each key keeps the digits that columns in half precision would lose.
    given = augment(rest._replace(content=Content("dot_product", call.content.scale)), dtype)
    once = Once(
        given.query,
        given.key,
        given.scale,
        key_mask=key_mask(call),
        is_causal=call.visibility.hides_later_keys,
        positions=by_place,
        key_bias=key_bias(call),
        query_bias=query_bias(call),
        dropout=call.dropout,
        seed=_seed(call) if call.dropout > 0.0 else None,
        normalisation=call.normalisation.name,
        sinks=None if call.sinks is None else call.sinks.float(),
    )
    return call.boost(lambda rows: apply_once(once, rows.to(dtype)), call.new_value, call.value)


def _seed(call: FilterCall) -> torch.Tensor:
    """One mask for all steps and their gradients, by the device's generator: checkpointed layers draw it again."""
    return torch.randint(2**63 - 1, (1,), device=call.query.device)
