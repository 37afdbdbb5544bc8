"""The slow dense truth: one softmax matrix, boosted as written. Serves attentions and exact dropout.

Everything is computed in at least float32 and stays in float64 for float64 inputs. Memory is O(length * key_length).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from .backend_call import FilterCall, without_autocast
from .backend_row import heads_product, joint_logits
from .boost_delta import DenseDelta, OwnPlaces, hidden_rows, strictly_before
from .boost_operators import BOOSTING, NOT_LINEAR, ONE_PASS, keep_rows
from .cache_streams import boost_stream
from .kernel_content import CONTENT_LOGITS, row_constants, working_dtype
from .kernel_normalisation import NORMALISATIONS, Normalisation
from .kernel_position import UntiedPositions, is_by_place, position_logits
from .visibility import Visibility

SOFTMAX = Normalisation()


def filter_logits(call: FilterCall) -> torch.Tensor:
    """log K + const_i, dense, ``[batch, heads, length, key_length]``, in the working precision.

    What a mask adds is in it; what it hides is not, see :func:`filter_matrix`.
    """
    compute_dtype = working_dtype(call.query.dtype)
    joint = joint_logits(call, compute_dtype) if call.query.shape[-2] == 1 else None
    if joint is not None:
        return joint
    query, (key, _) = call.visibility.clean_queries(call.query), call.repeated()
    terms = [] if call.visibility.bias is None else [call.visibility.bias]
    with without_autocast(call.query.device.type):
        logits = CONTENT_LOGITS[call.content.kernel](
            query.to(compute_dtype), key.to(compute_dtype), call.content.scale
        )
        if call.content.kernel == "gaussian" and not call.ignores_row_constants:
            logits = logits - row_constants(query.to(compute_dtype), call.content.scale)
        if call.content.softcap is not None:
            logits = call.content.softcap * torch.tanh(logits / call.content.softcap)
        terms += [position_logits(term, compute_dtype) for term in call.positions]
        return add_terms(logits, terms, call.visibility if call.ignores_row_constants else None)


def add_terms(logits: torch.Tensor, terms: Sequence[torch.Tensor], visibility: Visibility | None) -> torch.Tensor:
    """Add position logits and biases to the content's logits, minus the largest of their sum that a query sees.

    A number a row changes no softmax. Without it large terms, -1e300 for a whole row say, would leave the content no
    digits.

    Args:
        logits: ``[batch, heads, length, key_length]``.
        terms: each broadcastable to ``logits``.
        visibility: who sees whom; None: subtract nothing, since the weights depend on it.
    """
    if not terms:
        return logits
    total = terms[0].to(logits.dtype)
    for term in terms[1:]:
        total = total + term.to(logits.dtype)
    return logits + (total if visibility is None else total - visibility.largest_seen(total))


def filter_matrix(
    logits: torch.Tensor,
    visibility: Visibility,
    sinks: torch.Tensor | None = None,
    normalisation: Normalisation = SOFTMAX,
    may_be_empty: bool = True,
) -> torch.Tensor:
    """A = D^-1 K from log K: the row-stochastic filter, a Nadaraya-Watson estimate (arXiv 2506.10371).

    Args:
        logits: ``[batch, heads, length, key_length]``, at least float32.
        visibility: who sees whom; its bias is part of the logits.
        sinks: ``[heads]``, the logit of one more key, or None.
        normalisation: see there.
        may_be_empty: whether a row of logits may be -inf throughout although nothing is hidden.

    Returns:
        A of the logits' shape and dtype; its rows sum to 1, except those that see no key, which are 0. With sinks they
        sum to what the sink leaves; with some normalisations to something else.

    Raises:
        ValueError: for ``sinkhorn`` with a causal mask, or fewer queries than keys.
    """
    # Rows that see nothing are 0 before the softmax too: whatever stands there, NaN included, has no gradient.
    allowed = visibility.allowed(logits.device)
    if allowed is not None:
        logits = logits.masked_fill(~allowed, float("-inf"))
    elif not may_be_empty and sinks is None and normalisation.name == "softmax":
        return logits.softmax(-1)
    empty = logits.detach().amax(-1, keepdim=True) == float("-inf")
    logits = logits.masked_fill(empty, 0.0)
    if sinks is not None:
        column = sinks.to(logits.dtype).view(-1, 1, 1).expand(*logits.shape[:-1], 1)
        return torch.cat((logits, column), dim=-1).softmax(-1)[..., :-1].masked_fill(empty, 0.0)
    if normalisation.name == "softmax":
        return logits.softmax(-1).masked_fill(empty, 0.0)
    if normalisation.name == "sinkhorn" and visibility.hides_later_keys:
        raise ValueError("normalisation 'sinkhorn' needs attention without a causal mask")
    weigh = NORMALISATIONS[normalisation.name]
    return weigh(logits, allowed, visibility.hidden, normalisation.iterations).masked_fill(empty, 0.0)


def _may_be_empty(call: FilterCall) -> bool:
    """Whether a caller's own terms may hide all keys of a query; what the filter computes is finite."""
    return any(not (is_by_place(term) or isinstance(term, UntiedPositions)) for term in call.positions)


def reference_attention(
    logits: torch.Tensor, call: FilterCall, attentions: str | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Apply the boosted filter densely.

    Dropout is applied once to A; every pass of the booster uses the same dropped matrix, as the authors' vision code
    does (their language code drops out 2A - A^2).

    Args:
        logits: as :func:`filter_logits` returns them, ``[batch, heads, length, key_length]`` in at least float32.
        call: its values, visibility, sinks, booster, dropout and streams; ``logits`` replace its queries, keys and
            kernels.
        attentions: None, ``"filter"`` (A, whose rows a cache does not need) or ``"operator"`` (what multiplies V; it
            needs all rows of A, so no cached keys; of a booster that is not linear in V it is A).

    Returns:
        The output ``[batch, heads, length, d]`` in the value's dtype, and A or the operator
        ``[batch, heads, length, key_length]`` in the value's dtype or None. The output is computed from what is
        returned, so that both are parts of one graph.

    Raises:
        ValueError: if the operator of a boosted filter is asked for with cached keys.
    """
    dtype = call.value.dtype
    compute_dtype = working_dtype(dtype)
    key, value = call.repeated()
    # Autocast would run the products in half precision; the reference must be more exact than what it checks.
    with without_autocast(logits.device.type):
        logits = logits.to(compute_dtype)
        matrix = filter_matrix(logits, call.visibility, call.sinks, call.normalisation, _may_be_empty(call))
        if call.is_sequential:
            return _delta(logits, matrix, call, attentions)
        if call.dropout:
            matrix = nn.functional.dropout(matrix, p=call.dropout)
        second = None if call.difference is None else call.maps()[1]
        if second is not None and call.difference is not None:
            other = filter_matrix(filter_logits(second), call.visibility, call.sinks, call.normalisation)
            other = nn.functional.dropout(other, p=call.dropout, training=call.dropout > 0.0)
            matrix = matrix - call.difference.share * other

        def attend(rows: torch.Tensor) -> torch.Tensor:
            rows = rows.to(compute_dtype)
            if call.by_weights is not None:
                return call.by_weights.apply(matrix, rows, key.to(compute_dtype))
            return heads_product(matrix, rows)

        is_operator = call.booster.name not in NOT_LINEAR and (call.by_weights is None or call.by_weights.is_linear)
        if attentions != "operator" or not (call.is_boosted and is_operator):
            returned = None
            if attentions is not None:
                returned = matrix.to(dtype)
                matrix = _exact_through(returned, matrix)
            if call.booster.name == "none" or call.booster.name in ONE_PASS:
                smooth = attend(call.visibility.clean_keys(value))
                return (smooth if call.booster.name == "none" else call.finish(smooth)).to(dtype), returned
            return call.boost(attend, call.new_value.to(compute_dtype), value).to(dtype), returned
        _check_square(call.visibility)
        identity = torch.eye(matrix.shape[-1], dtype=compute_dtype, device=matrix.device).expand_as(matrix)
        name, steps, gain = call.booster
        exact = BOOSTING[name](attend, keep_rows, identity, identity, steps, gain)
        if call.visibility.blind is not None:
            exact = exact.masked_fill(call.visibility.blind, 0.0)
        operator = exact.to(dtype)
        if call.streams.is_cached:  # the first tokens of a cache: their streams have to be stored
            call.boost(attend, call.new_value.to(compute_dtype), value)
        output = torch.matmul(_exact_through(operator, exact), call.visibility.clean_keys(value).to(compute_dtype))
        return output.to(dtype), operator


def _check_square(visibility: Visibility) -> None:
    if not visibility.is_square:
        raise ValueError(
            "the attention operator of a boosted layer needs every row of A, which a cache does not keep: use "
            'output_attentions=True with use_cache=False, or config.attention_output = "filter" for the rows of A'
        )


def delta_system(
    logits: torch.Tensor, call: FilterCall, kept: torch.Tensor | None = None, places: OwnPlaces | None = None
) -> DenseDelta:
    """The system of ``delta``, from log K.

    Args:
        logits: as :func:`filter_logits` returns them, in at least float32.
        call: its visibility, sinks, normalisation and booster.
        kept: what dropout multiplies A with, ``[batch, heads, length, key_length]``, or None.
        places: of the queries' own tokens; None: as the call says.
    """
    places = call.own_places if places is None else places
    seen = strictly_before(call.visibility, places, logits.device)
    before = filter_matrix(logits, seen, call.sinks, call.normalisation)
    before = before if kept is None else before * kept
    return DenseDelta(before, call.booster.gain, places, hidden_rows(call.visibility, places))


def _delta(
    logits: torch.Tensor, matrix: torch.Tensor, call: FilterCall, attentions: str | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """:func:`reference_attention` of ``delta``, with ``matrix`` A before dropout."""
    dtype, seen, name = call.value.dtype, call.visibility, boost_stream(1)
    kept = nn.functional.dropout(torch.ones_like(matrix), p=call.dropout) if call.dropout else None
    matrix = matrix if kept is None else matrix * kept
    system = delta_system(logits, call, kept)
    value = call.new_value
    rows = system.solve(value, call.streams.earlier(name, value))
    if attentions != "operator":
        returned = None if attentions is None else matrix.to(dtype)
        matrix = matrix if returned is None else _exact_through(returned, matrix)
        rows = call.streams.append(name, rows) if call.streams.is_cached else rows
        return torch.matmul(matrix, seen.clean_keys(rows.to(matrix.dtype))).to(dtype), returned
    _check_square(seen)
    if call.streams.is_cached:
        call.streams.append(name, rows)
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device).expand_as(matrix)
    exact = torch.matmul(matrix, seen.clean_keys(system.solve(identity)))
    operator = exact.to(dtype)
    shown = seen.clean_keys(call.repeated()[1]).to(matrix.dtype)
    return torch.matmul(_exact_through(operator, exact), shown).to(dtype), operator


def _exact_through(rounded: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """The exact values, whose gradient passes through the rounded tensor that a caller gets to see."""
    if rounded.dtype == exact.dtype:
        return rounded
    seen = rounded.to(exact.dtype)
    return seen + (exact - seen).detach()


def run(call: FilterCall) -> torch.Tensor:
    """The back-end ``reference``: ``[batch, heads, length, d]`` in the value's dtype."""
    return reference_attention(filter_logits(call), call)[0]
