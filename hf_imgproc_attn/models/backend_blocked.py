"""Boosted attention that forms no N x N matrix: the entry to the blocked passes of ``backend_blocked_passes``.

Plain PyTorch, for any device; made for CPUs. Its truth is ``backend_reference``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from .backend_blocked_backward import Gradients
from .backend_blocked_dense import dense_passes
from .backend_blocked_passes import Call, Computed, Tensors, forward_passes, recurrence
from .backend_blocked_plan import Plan, make_plan
from .backend_blocked_positions import check_positions
from .backend_call import FilterCall, check_options, check_tensors, check_terms
from .backend_sdpa import augment
from .cache_streams import boost_stream
from .kernel_content import HALF_DTYPES, without_autocast
from .kernel_position import BlockedPositions
from .visibility import split_mask


def blocked_attention(  # noqa: PLR0913  # in the form of scaled_dot_product_attention
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    attn_mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    positions: BlockedPositions | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    boosting: str = "twicing",
    steps: int = 2,
    past_streams: Sequence[torch.Tensor] = (),
    seed: int | None = None,
    block_rows: int | None = None,
    group_pairs: int | None = None,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Apply a boosted filter in memory O(length), with its own backward, likewise O(length).

    A gradient of a gradient (``create_graph=True``), a forward-mode derivative and the transforms of ``torch.func``
    are computed densely instead, in memory O(length * key_length).

    Half precision is computed in float32. Rows that see no key give 0. A key that no query sees may hold anything, NaN
    included. Queries may be fewer than keys: they are then the last ones.

    Args:
        query: ``[batch, heads, length, head_dim]``.
        key: ``[batch, key_heads, key_length, head_dim]``; ``key_heads`` divides ``heads`` (grouped-query attention).
        value: ``[batch, key_heads, key_length, d]``.
        attn_mask: boolean (True = visible) or additive float, broadcastable to ``[batch, heads, length, key_length]``,
            or None. Together with ``is_causal`` both apply.
        bias: added to the logits, broadcastable likewise, or None. If it needs a gradient, so much memory is taken.
        positions: ``GaussianPositions``, ``AlibiPositions`` or ``BucketPositions``, whose kernel is added to the
            logits inside each block, or None. Its parameters have gradients, its coordinates do not.
        is_causal: whether query i sees no key after its own, ``key_length - length + i``. A mask that happens to be
            causal does the same, but takes one pass more a step where the queries do not fit in one block.
        scale: factor on q.k. None: 1/sqrt(head_dim).
        dropout_p: probability on A, in [0, 1). All products use the same dropped A.
        boosting: key of ``BOOSTING``.
        steps: k >= 1.
        past_streams: rows ``[batch, heads, key_length - length, d]`` of x_1, x_2, ..., those of earlier keys, as this
            function returned them; needed where A is boosted and not square.
        seed: of the dropout mask, >= 0. None: drawn from torch's default generator.
        block_rows: query rows of a block. None: chosen.
        group_pairs: (batch, head) pairs that are computed together. None: chosen.

    Returns:
        ``[batch, heads, length, d]`` in the value's dtype, and the queries' rows of x_1, x_2, ..., each
        ``[batch, heads, length, d]``, for a cache. They have gradients too.

    Raises:
        ValueError: for shapes, dtypes or options that do not fit, and for a boosted filter with more keys than queries
            but not the earlier keys' streams.
    """
    check_tensors(query, key, value)
    check_options(boosting, steps, dropout_p)
    attn_mask, bias = check_terms(query, key, attn_mask, bias)
    if positions is not None:
        check_positions(positions, query, key)
    return _blocked(
        _Arguments(
            query,
            key,
            value,
            attn_mask,
            _hidden_keys(attn_mask),
            bias,
            positions,
            is_causal,
            query.shape[-1] ** -0.5 if scale is None else float(scale),
            dropout_p,
            boosting,
            steps,
            past_streams,
            seed,
            block_rows,
            group_pairs,
        )
    )


class _Arguments(NamedTuple):
    """Those of :func:`blocked_attention`, checked; ``hidden``: keys that no query sees, or None."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    hidden: torch.Tensor | None
    bias: torch.Tensor | None
    positions: BlockedPositions | None
    is_causal: bool
    scale: float
    dropout: float
    boosting: str
    steps: int
    past_streams: Sequence[torch.Tensor] = ()
    seed: int | None = None
    block_rows: int | None = None
    group_pairs: int | None = None


@torch.compiler.disable  # a generator a block, and a backward of its own: a graph break costs less than tracing it
def _blocked(given: _Arguments) -> tuple[torch.Tensor, list[torch.Tensor]]:
    query, key, value, mask, bias, seed = given.query, given.key, given.value, given.mask, given.bias, given.seed
    booster = recurrence(given.boosting, given.steps)
    extra, width = len(booster.streams) - 1, value.shape[-1]
    if mask is not None and mask.requires_grad:
        mask, additive = split_mask(mask)
        if additive is not None:
            bias = additive if bias is None else bias + additive
    if given.dropout and seed is None:
        seed = int(torch.randint(2**62, ()))
    plan = make_plan(
        query,
        key,
        is_causal=given.is_causal,
        scale=given.scale,
        dropout=given.dropout,
        seed=seed or 0,
        one_pass=given.is_causal or not extra,
        block_rows=given.block_rows,
        group_pairs=given.group_pairs,
    )
    past = _past(given.past_streams, plan, extra, width)
    call = Call(plan, booster, mask, given.positions, given.hidden)
    tensors = Tensors(query, key, value, bias, past, () if given.positions is None else given.positions.parameters())
    # Autocast would run the products in half precision.
    with without_autocast(query.device.type):
        if _is_transformed((mask, *tensors[:5], *tensors.parameters)):
            output, streams = dense_passes(call, tensors)
        else:
            output, streams = BlockedFilter.apply(*tensors[:5], call, *tensors.parameters)
    return output, [stream.to(value.dtype) for stream in streams.split(width, dim=-1)] if extra else []


def _is_transformed(tensors: tuple[torch.Tensor | None, ...]) -> bool:
    """Whether ``torch.func`` or forward-mode differentiation looks at a call."""
    if torch._C._are_functorch_transforms_active():
        return True
    unpack = torch.autograd.forward_ad.unpack_dual
    return any(tensor is not None and unpack(tensor).tangent is not None for tensor in tensors)


class BlockedFilter(torch.autograd.Function):
    """``apply(query, key, value, bias, past, call, *parameters)`` -> output, and x_1, x_2, ... of the queries.

    The streams stand side by side; the parameters are those of the position kernel.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor | None,
        past: torch.Tensor | None,
        call: Call,
        *parameters: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        computed = forward_passes(call, Tensors(query, key, value, bias, past, parameters))
        ctx.call = call
        ctx.save_for_backward(query, key, value, bias, past, *computed, *parameters)
        ctx.set_materialize_grads(False)
        output = computed.output.to(value.dtype).unflatten(0, (call.plan.batch, call.plan.heads))
        return output, computed.streams

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None, stream_grad: torch.Tensor | None) -> tuple[Any, ...]:
        query, key, value, bias, past, *rest = ctx.saved_tensors
        tensors, computed = Tensors(query, key, value, bias, past, tuple(rest[3:])), Computed(*rest[:3])
        needs = ctx.needs_input_grad
        with without_autocast(query.device.type):
            if torch.is_grad_enabled():  # create_graph=True: the gradients are to be differentiated themselves
                return _differentiable_gradients(ctx.call, tensors, (grad, stream_grad), needs)
            gradients = Gradients(ctx.call, tensors, computed, needs[3], needs[6:])
            gradients.run(grad, stream_grad)
        own = (gradients.query, gradients.key, gradients.value, gradients.bias, gradients.past)
        return (
            *map(_like, own, tensors[:5]),
            None,
            *map(_like, gradients.parameters(), tensors.parameters),
        )


def _like(gradient: torch.Tensor | None, given: torch.Tensor | None) -> torch.Tensor | None:
    """A gradient in the dtype of what it belongs to."""
    return None if gradient is None or given is None else gradient.to(given.dtype)


def _differentiable_gradients(
    call: Call, tensors: Tensors, grads: tuple[torch.Tensor | None, ...], needs: tuple[bool, ...]
) -> tuple[torch.Tensor | None, ...]:
    """Gradients that have gradients of their own, by autograd through the dense form."""
    # Where the key was made of the query, say, what flows through the key must not be counted for the query as well.
    own = tensors.aliases()
    results = dense_passes(call, own)
    used = [(result, grad) for result, grad in zip(results, grads, strict=True) if grad is not None]
    wanted = [
        x for x, needed in zip((*own[:5], None, *own.parameters), needs, strict=True) if needed and x is not None
    ]
    computed = iter(
        torch.autograd.grad(
            [result for result, _ in used],
            wanted,
            [grad for _, grad in used],
            create_graph=True,
            allow_unused=True,
        )
    )
    return tuple(next(computed) if needed else None for needed in needs)


def _past(past_streams: Sequence[torch.Tensor], plan: Plan, extra: int, width: int) -> torch.Tensor | None:
    """The earlier keys' streams side by side, or None where there is nothing to be known of them."""
    if plan.past < 0 and (extra or plan.is_causal):
        raise ValueError(f"key must not be shorter than query here, got {plan.key_length} < {plan.length}")
    shape = (plan.batch, plan.heads, plan.past, width)
    needed = extra if plan.past else len(past_streams) and extra
    if len(past_streams) != needed or any(tuple(stream.shape) != shape for stream in past_streams):
        raise ValueError(
            f"A of {plan.length} queries and {plan.key_length} keys lacks the earlier keys' rows: past_streams must "
            f"hold {extra} of shape {shape}, got {[tuple(stream.shape) for stream in past_streams]}"
        )
    if not plan.past or not extra:
        return None
    return torch.cat(list(past_streams), dim=-1)


def _hidden_keys(mask: torch.Tensor | None) -> torch.Tensor | None:
    """The keys that no query sees, ``[batch or 1, heads or 1, 1, key_length or 1]``, or None if there is none."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        seen = mask.any(-2, keepdim=True)
    else:
        seen = mask.amax(-2, keepdim=True) > torch.finfo(mask.dtype).min / 2
    return None if bool(seen.all()) else ~seen


def refuses(call: FilterCall) -> str | None:
    """Why the blocked passes cannot serve a call, as the rest of a sentence about them, or None if they can."""
    if call.booster.gain is not None and call.query.dtype in HALF_DTYPES:
        return "hands out its streams in half precision, from which a learned gain is not exact"
    if call.is_boosted and call.query.shape[-2] != call.key.shape[-2] and not call.streams.is_cached:
        return "needs the streams of earlier keys"
    return None


def run(call: FilterCall) -> torch.Tensor:
    """The back-end ``blocked``: every weight once, positions inside the blocks. Half precision becomes float32."""
    dtype, visibility = torch.promote_types(call.query.dtype, torch.float32), call.visibility
    by_place, rest = call.split_positions() if call.positions else (None, call)
    query, key, value = visibility.clean_queries(call.query), call.key, call.value
    scale, bias = call.content.scale, visibility.bias
    if rest.has_columns or isinstance(scale, torch.Tensor):
        with without_autocast(query.device.type):
            query, key, scale, extra = augment(rest, dtype)
        if extra is not None:
            bias = extra if bias is None else bias + extra
        if key.shape[1] != value.shape[1]:
            value = value.repeat_interleave(call.groups, dim=1)
    name, steps, gain = call.booster
    given = _Arguments(
        query,
        key,
        value,
        visibility.keys if visibility.mask is None else visibility.mask,
        visibility.hidden,
        bias,
        by_place,
        visibility.causal,
        float(scale),
        call.dropout,
        # With the residual r = V - A V both parts of the learned booster can be told from the output: A V = V - r.
        "twicing" if gain is not None else name,
        2 if gain is not None else steps,
        call.past_streams() if call.streams.is_cached else (),
    )
    output, streams = _blocked(given)
    if call.streams.is_cached:
        for index, rows in enumerate(streams):
            call.streams.append(boost_stream(index + 1), rows.to(call.value.dtype))
    if gain is not None:
        smooth = call.new_value.to(dtype) - streams[0]
        output = smooth + gain * (output - smooth)
    return output.to(call.value.dtype)
