"""Boosted attention that forms no N x N matrix: the entry to the blocked passes of ``backend_blocked_passes``.

Plain PyTorch, for any device; made for CPUs. Its truth is ``backend_reference``.
"""

from __future__ import annotations

from typing import Any

import torch

from .backend_blocked_backward import Gradients
from .backend_blocked_delta import refuses as delta_refuses
from .backend_blocked_delta import run as run_delta
from .backend_blocked_dense import dense_passes
from .backend_blocked_difference import DifferenceFilter, Maps, arguments, dense_difference
from .backend_blocked_hidden import key_runs
from .backend_blocked_normalised import WEIGHTS
from .backend_blocked_pairs import GradientsByPair, as_shared_bias, forward_by_pair
from .backend_blocked_pairs import suits as suits_pairs
from .backend_blocked_passes import Call, Computed, Tensors, forward_passes, recurrence
from .backend_blocked_plan import Plan, make_plan
from .backend_blocked_rows import RowsCall, RowsFilter, dense_rows
from .backend_blocked_sinkhorn import log_scales
from .backend_call import Booster, Content, Difference, FilterCall, is_transformed, without_autocast
from .backend_sdpa import augment
from .boost_derivatives import differentiable_gradients
from .boost_operators import ONE_PASS
from .boost_weights import ByWeights, LocalLinear
from .cache_streams import NO_STREAMS, boost_stream
from .kernel_content import HALF_DTYPES, working_dtype
from .kernel_position import BlockedPositions


def refuses(call: FilterCall) -> str | None:
    """Why the blocked passes cannot serve a call, as the rest of a sentence about them, or None if they can."""
    length, key_length = call.query.shape[-2], call.key.shape[-2]
    if call.is_sequential:
        return delta_refuses(call)
    by_weights, call = call.by_weights, call._replace(by_weights=None)
    if call.content.softcap is not None or call.normalisation.name not in WEIGHTS:
        return call.own_softmax
    if by_weights is not None:
        return None if key_length >= length else f"takes the queries for the last tokens, got {key_length} keys"
    if call.booster.gain is not None and call.query.dtype in HALF_DTYPES:
        return "hands out its streams in half precision, from which a learned gain is not exact"
    apart = call.streams.keeps_places_apart  # a cache of any kind, which does not hand out earlier rows
    if call.is_boosted and length != key_length and (apart or not call.streams.is_cached):
        return "needs the streams of earlier keys"
    if key_length < length and (call.is_boosted or call.visibility.causal):
        return f"takes the queries for the last tokens, each with a key, got {key_length} keys for {length} queries"
    return None


def run(call: FilterCall, *, block_rows: int | None = None, group_pairs: int | None = None) -> torch.Tensor:
    """The back-end ``blocked``: every weight once, positions inside the blocks, in memory O(length).

    Half precision is computed in float32. A gradient of a gradient (``create_graph=True``), a forward-mode derivative
    and the transforms of ``torch.func`` are computed densely, in memory O(length * key_length). A bias that needs a
    gradient takes as much memory as it has numbers.

    Args:
        call: what to compute. The streams that it stores have gradients too.
        block_rows: query rows of a block. None: chosen by :func:`make_plan`.
        group_pairs: (batch, head) pairs that are computed together. None: chosen likewise.

    Returns:
        ``[batch, heads, length, d]`` in the value's dtype.

    Raises:
        ValueError: for a boosted filter with more keys than queries but not the earlier keys' streams.
    """
    if call.difference is not None:
        return _difference(call, call.difference, block_rows, group_pairs)
    if call.booster.name in ONE_PASS:
        return call.finish(run(call.plain(), block_rows=block_rows, group_pairs=group_pairs))
    positions, products = _as_products(as_shared_bias(call) if call.positions else call)
    if call.is_sequential:
        return _delta(products, positions, block_rows, group_pairs)
    if call.by_weights is not None:
        return _by_weights(products, positions, call.by_weights, block_rows, group_pairs)
    gain = call.booster.gain
    if gain is not None:  # its residual is read at all rows, those of padding too
        products = products.changed(value=products.visibility.clean_keys(products.value))
    output, streams = _blocked(products, positions, block_rows, group_pairs)
    if call.streams.is_cached:
        for index, rows in enumerate(streams):
            call.streams.append(boost_stream(index + 1), rows.to(call.value.dtype))
    if gain is not None:
        smooth = products.new_value.to(working_dtype(call.query.dtype)) - streams[0]
        output = smooth + gain * (output - smooth)
    return output.to(call.value.dtype)


def _as_products(call: FilterCall) -> tuple[BlockedPositions | None, FilterCall]:
    """The positions that are a function of places, and a call of plain inner products and at most a bias beside them.

    A learned booster becomes twicing: with the residual r = V - A V, a stream, both of its parts can be told from the
    output, A V = V - r.
    """
    by_place, rest = call.split_positions() if call.positions else (None, call)
    query, key, value, content, visibility = call[:5]
    if rest.has_columns or isinstance(content.scale, torch.Tensor):
        with without_autocast(query.device.type):
            query, key, scale, bias = augment(rest, working_dtype(query.dtype))
        content = Content("dot_product", scale)
        if bias is not None:
            visibility = visibility._replace(bias=bias if visibility.bias is None else bias + visibility.bias)
        if key.shape[1] != value.shape[1]:
            value = value.repeat_interleave(call.groups, dim=1)
    elif visibility.blind is not None:
        query = visibility.clean_queries(query)
    is_learned = call.booster.gain is not None and not call.is_sequential
    booster = Booster("twicing", 2) if is_learned else call.booster
    return by_place, FilterCall(
        query,
        key,
        value,
        content,
        visibility,
        booster=booster,
        dropout=call.dropout,
        streams=call.streams,
        sinks=call.sinks,
        normalisation=call.normalisation,
    )


@torch.compiler.disable  # as the other blocks
def column_scales(call: FilterCall, *, block_rows: int | None = None, group_pairs: int | None = None) -> torch.Tensor:
    """What a call of ``sinkhorn`` adds to the logits of each key; see ``backend_blocked_sinkhorn``.

    Args:
        call: what to compute.
        block_rows: see :func:`run`.
        group_pairs: see :func:`run`.

    Returns:
        ``[batch, heads, key_length]`` in at least float32.
    """
    bare = call.plain()._replace(by_weights=None, dropout=0.0, streams=NO_STREAMS)
    positions, products = _as_products(bare)
    cut = _blocked_call(products, positions, None, block_rows, group_pairs)
    return log_scales(cut, products, call.normalisation.iterations)


@torch.compiler.disable
def _delta(
    given: FilterCall, positions: BlockedPositions | None, block_rows: int | None, group_pairs: int | None
) -> torch.Tensor:
    """Rows corrected in order: ``[batch, heads, length, d]`` in the value's dtype."""
    return run_delta(_blocked_call(given.plain(), positions, None, block_rows, group_pairs), given)


@torch.compiler.disable
def _difference(call: FilterCall, other: Difference, block_rows: int | None, group_pairs: int | None) -> torch.Tensor:
    """The first map minus lambda times the second: ``[batch, heads, length, d]`` in the value's dtype."""
    alone = call._replace(difference=None)
    # The second map filters the same values: none have to be repeated for it.
    second = alone._replace(query=other.query, key=other.key, value=other.key[..., :0])
    (positions, mine), (again, its) = _as_products(alone), _as_products(second)
    first, last = (_blocked_call(*part, 0, block_rows, group_pairs) for part in ((mine, positions), (its, again)))
    # Cut alike, with a dropout mask each.
    plan = first.plan._replace(key_heads=last.plan.key_heads, seed=last.plan.seed)
    maps = Maps(first, last._replace(plan=plan))
    tensors = _tensors(mine, positions), _tensors(its, again)
    given = arguments(*tensors)
    with without_autocast(call.query.device.type):
        if is_transformed((mine.value, other.share, *given)):
            return dense_difference(maps, tensors, other.share)
        output: torch.Tensor = DifferenceFilter.apply(mine.value, other.share, maps, *given)
    return output


def _tensors(given: FilterCall, positions: BlockedPositions | None) -> Tensors:
    """What a call of plain products computes with, where no streams come in."""
    parameters = () if positions is None else positions.parameters()
    return Tensors(given.query, given.key, given.value, given.visibility.bias, None, given.sinks, parameters)


@torch.compiler.disable
def _by_weights(
    given: FilterCall,
    positions: BlockedPositions | None,
    by_weights: ByWeights,
    block_rows: int | None,
    group_pairs: int | None,
) -> torch.Tensor:
    """A booster that looks at single weights: ``[batch, heads, length, d]`` in the value's dtype."""
    call = _blocked_call(given, positions, None, block_rows, group_pairs)
    parameters = () if positions is None else positions.parameters()
    query, key, value, bias, sinks = given.query, given.key, given.value, given.visibility.bias, given.sinks
    own = query[..., :0]
    if isinstance(by_weights, LocalLinear):  # columns of the kernels may stand beside the keys
        missing = key.shape[-1] - by_weights.slope.shape[-1]
        own = torch.nn.functional.pad(by_weights.slope, (0, missing)) if missing else by_weights.slope
    rows_call = RowsCall(call, by_weights)
    with without_autocast(query.device.type):
        if is_transformed((query, key, value, bias, own, sinks, *parameters)):
            return dense_rows(rows_call, Tensors(query, key, value, bias, None, sinks, parameters), own)
        output: torch.Tensor = RowsFilter.apply(query, key, value, bias, own, sinks, rows_call, *parameters)
    return output


def _blocked_call(
    given: FilterCall,
    positions: BlockedPositions | None,
    extra: int | None,
    block_rows: int | None,
    group_pairs: int | None,
) -> Call:
    """What the autograd functions need besides the tensors that have gradients.

    Args:
        given: plain inner products, and at most a bias beside them.
        positions: those that are a function of places.
        extra: streams x_1, x_2, ... of a booster that is linear in V, 0 without; None for other boosters, which visit
            each block once and do more than products there.
        block_rows: see :func:`run`.
        group_pairs: see :func:`run`.
    """
    visibility = given.visibility
    plan = make_plan(
        given.query,
        given.key,
        is_causal=visibility.causal,
        scale=float(given.content.scale),
        dropout=given.dropout,
        seed=int(torch.randint(2**62, ())) if given.dropout else 0,
        one_pass=visibility.causal or not extra,
        may_be_tall=extra is not None,
        block_rows=block_rows,
        group_pairs=group_pairs,
    )
    booster = recurrence(given.booster.name, given.booster.steps)
    name = given.normalisation.name
    is_softmax = given.sinks is None and name == "softmax"
    largest_bias = None if visibility.bias is None else visibility.largest_seen(visibility.bias)
    if largest_bias is not None and not is_softmax:
        largest_bias = torch.zeros_like(largest_bias)
    runs = None if visibility.hidden is None else key_runs(visibility.hidden, plan.key_length)
    if group_pairs is None and extra is not None and runs is not None and len(runs.runs) > 1:
        plan = plan.by_sample()
    return Call(plan, booster, visibility._replace(bias=None), largest_bias, positions, name, is_softmax, runs)


@torch.compiler.disable  # a generator a block, and a backward of its own: a graph break costs less than tracing it
def _blocked(
    given: FilterCall, positions: BlockedPositions | None, block_rows: int | None, group_pairs: int | None
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The output, and the queries' rows of x_1, x_2, ..., each ``[batch, heads, length, d]`` in the value's dtype."""
    query, key, value, visibility = given.query, given.key, given.value, given.visibility
    extra = len(recurrence(given.booster.name, given.booster.steps).streams) - 1
    width = value.shape[-1]
    call = _blocked_call(given, positions, extra, block_rows, group_pairs)
    plan = call.plan
    parameters = () if positions is None else positions.parameters()
    past = _past(given, plan, extra) if given.streams.is_cached else None
    tensors = Tensors(query, key, value, visibility.bias, past, given.sinks, parameters)
    # Autocast would run the products in half precision.
    with without_autocast(query.device.type):
        if is_transformed((*tensors[:6], *parameters)):
            output, streams = dense_passes(call, tensors)
        else:
            output, streams = BlockedFilter.apply(*tensors[:6], call, *parameters)
    return output, [stream.to(value.dtype) for stream in streams.split(width, dim=-1)] if extra else []


class BlockedFilter(torch.autograd.Function):
    """``apply(query, key, value, bias, past, sinks, call, *parameters)`` -> output, and x_1, x_2, ... of the queries.

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
        sinks: torch.Tensor | None,
        call: Call,
        *parameters: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        tensors = Tensors(query, key, value, bias, past, sinks, parameters)
        computed = (forward_by_pair if call.plan.by_pair and suits_pairs(call, tensors) else forward_passes)(
            call, tensors
        )
        ctx.call, ctx.are_moderate = call, computed.are_moderate
        ctx.save_for_backward(query, key, value, bias, past, sinks, *computed[:3], *parameters)
        ctx.set_materialize_grads(False)
        output = computed.output.to(value.dtype).unflatten(0, (call.plan.batch, call.plan.heads))
        return output, computed.streams

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None, stream_grad: torch.Tensor | None) -> tuple[Any, ...]:
        query, key, value, bias, past, sinks, output, streams, row_sums, *parameters = ctx.saved_tensors
        tensors = Tensors(query, key, value, bias, past, sinks, tuple(parameters))
        computed = Computed(output, streams, row_sums, ctx.are_moderate)
        needs = ctx.needs_input_grad
        with without_autocast(query.device.type):
            if torch.is_grad_enabled():  # create_graph=True: the gradients are to be differentiated themselves
                apart = tensors.aliases()
                inputs = (*apart[:6], None, *apart.parameters)
                return differentiable_gradients(dense_passes(ctx.call, apart), (grad, stream_grad), inputs, needs)
            gradients: Gradients | GradientsByPair
            if ctx.call.plan.by_pair and suits_pairs(ctx.call, tensors):
                gradients = GradientsByPair(ctx.call, tensors, computed, needs_bias=needs[3])
            else:
                gradients = Gradients(ctx.call, tensors, computed, (*needs[3:6], *needs[7:]))
            gradients.run(grad, stream_grad)
        own = (gradients.query, gradients.key, gradients.value, gradients.bias, gradients.past, gradients.sinks)
        return (
            *map(_like, own, tensors[:6]),
            None,
            *map(_like, gradients.parameters(), tensors.parameters),
        )


def _like(gradient: torch.Tensor | None, given: torch.Tensor | None) -> torch.Tensor | None:
    """A gradient in the dtype of what it belongs to."""
    return None if gradient is None or given is None else gradient.to(given.dtype)


def _past(given: FilterCall, plan: Plan, extra: int) -> torch.Tensor | None:
    """The earlier keys' streams side by side, or None where there is nothing to be known of them."""
    past_streams = given.past_streams()
    shape = (plan.batch, plan.heads, plan.past, given.value.shape[-1])
    needed = extra if plan.past else len(past_streams) and extra
    if len(past_streams) != needed or any(tuple(stream.shape) != shape for stream in past_streams):
        raise ValueError(
            f"A of {plan.length} queries and {plan.key_length} keys lacks the earlier keys' rows: the cached streams "
            f"must be {extra} of shape {shape}, got {[tuple(stream.shape) for stream in past_streams]}"
        )
    if not plan.past or not extra:
        return None
    return torch.cat(past_streams, dim=-1)
