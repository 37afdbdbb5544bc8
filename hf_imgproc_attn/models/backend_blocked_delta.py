"""``delta`` block by block: the entry to the blocks, and the same function written densely.

The mathematics: ``backend_blocked_delta_rows`` for weights of softmax, whose A and A' are one matrix but for the
diagonal and a factor a row; ``backend_blocked_delta_pair`` for other weights. Memory is O(length).
"""

from __future__ import annotations

from typing import Any

import torch

from .backend_blocked_delta_pair import PairGradients, pair_weights
from .backend_blocked_delta_rows import Gradients, Known, earlier_weights, forward
from .backend_blocked_dense import dense_dropout_factors, dense_logits
from .backend_blocked_passes import Call, Tensors
from .backend_call import FilterCall, is_transformed, without_autocast
from .backend_reference import filter_matrix
from .boost_delta import DenseDelta, hidden_rows, strictly_before
from .boost_derivatives import differentiable_gradients
from .cache_streams import boost_stream
from .kernel_content import working_dtype
from .kernel_normalisation import Normalisation

GRADIENTS: dict[str, type[Gradients]] = {"softmax": Gradients, "sigmoid": PairGradients, "softpick": PairGradients}
"""By normalisation: those that are computed block by block."""


def refuses(call: FilterCall) -> str | None:
    """Why blocks cannot serve a call of ``delta``, as the rest of a sentence about them, or None if they can."""
    if call.content.softcap is not None or call.normalisation.name not in GRADIENTS:
        return call.own_softmax
    length, key_length = call.query.shape[-2], call.key.shape[-2]
    if not call.visibility.causal and key_length > 1:
        return "solves for rows in order, and takes masks that are known to be causal"
    if length != key_length and (call.streams.keeps_places_apart or not call.streams.is_cached):
        return "needs the streams of earlier keys"
    return None


def run(call: Call, given: FilterCall) -> torch.Tensor:
    """``[batch, heads, length, d]`` in the value's dtype; stores u.

    Args:
        call: how it is cut.
        given: plain inner products, and the booster with its beta.
    """
    query, key, value, plan = given.query, given.key, given.value, call.plan
    past = given.streams.earlier(boost_stream(1), given.new_value) if plan.past else None
    if plan.past and (past is None or past.shape[-2] != plan.past):
        raise ValueError(
            f"delta lacks the rows of {plan.past} earlier keys, got {0 if past is None else past.shape[-2]}"
        )
    shape = (plan.batch, plan.heads, plan.length, 1)
    working = working_dtype(query.dtype)
    gain = given.booster.gain
    rate = query.new_ones((), dtype=working) if gain is None else gain.to(working)
    parameters = () if call.positions is None else call.positions.parameters()
    tensors = Tensors(query, key, value, given.visibility.bias, past, given.sinks, parameters)
    with without_autocast(query.device.type):
        rate = rate.expand(shape)
        if is_transformed((*tensors[:6], rate, *parameters)):
            output, rows = dense_delta(call, tensors, rate)
        else:
            output, rows = DeltaFilter.apply(*tensors[:6], rate, call, *parameters)
    if given.streams.is_cached:
        given.streams.append(boost_stream(1), rows.to(value.dtype))
    return output


class DeltaFilter(torch.autograd.Function):
    """``apply(query, key, value, bias, past, sinks, rate, call, *parameters)`` -> output, and u of the queries.

    ``rate`` is beta, ``[batch, heads, length, 1]``; the parameters are those of the position kernel.
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
        rate: torch.Tensor,
        call: Call,
        *parameters: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        make = earlier_weights if call.normalisation == "softmax" else pair_weights
        known = forward(call, Tensors(query, key, value, bias, past, sinks, parameters), rate, make)
        kept = known if GRADIENTS[call.normalisation].needs_output else known._replace(output=query.new_empty(0))
        ctx.call = call
        ctx.save_for_backward(query, key, value, bias, past, sinks, rate, *kept, *parameters)
        ctx.set_materialize_grads(False)
        return known.output.to(value.dtype).unflatten(0, (call.plan.batch, call.plan.heads)), known.rows

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None, rows_grad: torch.Tensor | None) -> tuple[Any, ...]:
        query, key, value, bias, past, sinks, rate, *rest = ctx.saved_tensors
        tensors, needs = Tensors(query, key, value, bias, past, sinks, tuple(rest[4:])), ctx.needs_input_grad
        with without_autocast(query.device.type):
            if torch.is_grad_enabled():  # create_graph=True: the gradients are to be differentiated themselves
                apart, rate = tensors.aliases(), rate.view_as(rate)
                inputs = (*apart[:6], rate, None, *apart.parameters)
                return differentiable_gradients(dense_delta(ctx.call, apart, rate), (grad, rows_grad), inputs, needs)
            gradients = GRADIENTS[ctx.call.normalisation](ctx.call, tensors, rate, Known(*rest[:4]), needs)
            gradients.run(grad, rows_grad)
        inputs = (*tensors[:6], rate, None, *tensors.parameters)
        return tuple(
            None if found is None or x is None else found.to(x.dtype)
            for found, x in zip(gradients.found(), inputs, strict=True)
        )


# --------------------------------------------------------------------------------------------------------------------
# Derivatives of derivatives
# --------------------------------------------------------------------------------------------------------------------


def dense_delta(call: Call, tensors: Tensors, rate: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and u written densely, in memory O(length * key_length), for whatever differentiates them."""
    plan, seen, dtype = call.plan, call.visibility, tensors.value.dtype
    query, key, value = (x.to(working_dtype(x.dtype)) for x in tensors[:3])
    repeats = plan.heads // plan.key_heads
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    logits = dense_logits(call, tensors._replace(query=query, key=key))
    places = slice(plan.past, plan.key_length)
    normalisation = Normalisation(call.normalisation)
    matrix = filter_matrix(logits, seen, tensors.sinks, normalisation)
    before = filter_matrix(logits, strictly_before(seen, places, logits.device), tensors.sinks, normalisation)
    if plan.dropout:
        factors = dense_dropout_factors(plan, query.new_empty(0))
        matrix, before = matrix * factors, before * factors
    solved = DenseDelta(before, rate, places, hidden_rows(seen, places)).solve(value[:, :, plan.past :], tensors.past)
    every = solved if tensors.past is None else torch.cat((tensors.past.to(solved.dtype), solved), dim=-2)
    return torch.matmul(matrix, seen.clean_keys(every)).to(dtype), solved
