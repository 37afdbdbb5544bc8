"""The difference of two maps of the same values, (A_1 - lambda A_2) V, block by block, each weight as often as of one.

With G = dout, P = G V^T and M = A_1 - lambda A_2, of a block at a time:

    out = M V,   dV = M^T G,   dA_1 = P,   dA_2 = -lambda P,   dlambda = -sum_i D_i2,   D_im = sum_j a_ijm p_ij

3 products forward and 8 backward (the logits of each map, P, dV, and dq and dk of each map), where two attentions take
4 and 10. Each map has a dropout mask of its own. Memory is O(length).
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch

from .backend_blocked_dense import dense_map
from .backend_blocked_logits import LogitsGradients, no_streams
from .backend_blocked_passes import Call, Inputs, Tensors
from .backend_blocked_plan import Block, Group, multiply
from .backend_blocked_weights import Buffer, KeySums, flat
from .boost_derivatives import differentiable_gradients
from .kernel_content import working_dtype


class Maps(NamedTuple):
    """What the autograd function needs besides the tensors that have gradients: the two maps, cut alike."""

    first: Call
    second: Call

    @property
    def backward(self) -> Maps:
        """The same with the plans of the backward pass."""
        return Maps(*(call._replace(plan=call.plan.backward) for call in self))

    def given(self, value: torch.Tensor, tensors: tuple[torch.Tensor | None, ...]) -> tuple[Tensors, Tensors]:
        """What each map computes with, from V and the other arguments of the function; only the first has values."""
        query, key, bias, sinks, other_query, other_key, other_bias, other_sinks, *parameters = tensors
        half = len(parameters) // 2
        first = Tensors(query, key, value, bias, None, sinks, tuple(parameters[:half]))  # type: ignore[arg-type]
        nothing = other_key[..., :0]  # type: ignore[index]
        second = Tensors(other_query, other_key, nothing, other_bias, None, other_sinks, tuple(parameters[half:]))  # type: ignore[arg-type]
        return first, second


def arguments(first: Tensors, second: Tensors) -> tuple[torch.Tensor | None, ...]:
    """The function's arguments after V, lambda and the maps."""
    own = ((given.query, given.key, given.bias, given.sinks) for given in (first, second))
    return (*(x for tensors in own for x in tensors), *first.parameters, *second.parameters)


class DifferenceFilter(torch.autograd.Function):
    """``apply(value, share, maps, *arguments(first, second))`` -> ``[batch, heads, length, d]``.

    ``share`` is lambda, ``[heads, 1, 1]``.
    """

    @staticmethod
    def forward(
        ctx: Any, value: torch.Tensor, share: torch.Tensor, maps: Maps, *tensors: torch.Tensor | None
    ) -> torch.Tensor:
        output, row_sums = _forward(maps, maps.given(value, tensors), share)
        ctx.maps = maps
        ctx.save_for_backward(value, share, row_sums, *tensors)
        return output.to(value.dtype).unflatten(0, (maps.first.plan.batch, maps.first.plan.heads))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        value, share, row_sums, *tensors = ctx.saved_tensors
        maps, needs = ctx.maps, ctx.needs_input_grad
        if torch.is_grad_enabled():  # create_graph=True: the gradients are to be differentiated themselves
            value, share = value.view_as(value), share.view_as(share)
            tensors = [None if x is None else x.view_as(x) for x in tensors]
            dense = dense_difference(maps, maps.given(value, tuple(tensors)), share)
            return differentiable_gradients([dense], [grad], (value, share, None, *tensors), needs)
        found = DifferenceGradients(maps, (value, share, *tensors), row_sums, needs).run(grad)
        return tuple(
            None if gradient is None or given is None else gradient.to(given.dtype)
            for gradient, given in zip(found, (value, share, None, *tensors), strict=True)
        )


def _of_pairs(share: torch.Tensor, group: Group, like: torch.Tensor) -> torch.Tensor:
    """-lambda of a group's pairs, ``[pairs, 1, 1]``."""
    samples, heads = group.shape
    return -share[group.heads].to(like.dtype).expand(samples, heads, 1, 1).reshape(-1, 1, 1)


def _forward(maps: Maps, given: tuple[Tensors, Tensors], share: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The output ``[pairs, length, d]``, and what each row of logits sums to, ``[pairs, length, 2]`` of each map."""
    plan, value = maps.first.plan, given[0].value
    like = value.new_empty(0, dtype=working_dtype(value.dtype))
    output = like.new_empty(plan.batch * plan.heads, plan.length, value.shape[-1])
    row_sums = like.new_empty(2, plan.batch * plan.heads, plan.length, 2)
    inputs = [Inputs(call, own, no_streams(call, like)) for call, own in zip(maps, given, strict=True)]
    weights = [call.weights(own, like) for call, own in zip(maps, given, strict=True)]
    for group in plan.groups():
        for of, read in zip(weights, inputs, strict=True):
            read.start(group)
            of.start(group, read.query, read.key)
        minus = _of_pairs(share, group, like)
        for block in plan.blocks():
            rows = block.rows
            (matrix, factor, row_sums[0, group.pairs, rows]), (other, scale, row_sums[1, group.pairs, rows]) = (
                of.compute(block) for of in weights
            )
            if plan.dropout:
                for call, x in zip(maps, (matrix, other), strict=True):
                    x.mul_(call.plan.dropout_factors(group, block, like))
            # The factor of the first map is left to the product. Rows that see no key have 0 in both.
            matrix.addcmul_(other, minus * (scale / factor).masked_fill_(factor == 0.0, 0.0))
            product = multiply(matrix, inputs[0].value[:, : block.keys], by_onednn=plan.by_onednn)
            torch.mul(product, factor, out=output[group.pairs, rows])
    return output, row_sums


class DifferenceGradients:
    """The gradients of one call, summed group by group.

    Args:
        maps: what was computed.
        given: the function's arguments without the maps.
        row_sums: what each row of logits sums to, ``[2, pairs, length, 2]``.
        needs: whether each argument of the function, the maps among them, has a gradient.
    """

    def __init__(self, maps: Maps, given: tuple[Any, ...], row_sums: torch.Tensor, needs: tuple[bool, ...]) -> None:
        value, self.share, *tensors = given
        self.maps, self.plan, self.row_sums = maps.backward, maps.backward.first.plan, row_sums
        both, half = maps.given(value, tuple(tensors)), (len(tensors) - 8) // 2
        self.like = value.new_empty(0, dtype=working_dtype(value.dtype))
        widest = max(x.shape[-1] for x in (value, both[0].key, both[1].key))
        self.scratch = Buffer(self.like, self.plan.group_pairs * self.plan.key_length * widest)
        wanted = (*needs[5:7], *needs[11 : 11 + half]), (*needs[9:11], *needs[11 + half :])
        self.sides = [
            LogitsGradients(call, own, needed, self.scratch)
            for call, own, needed in zip(self.maps, both, wanted, strict=True)
        ]
        self.inputs = self.sides[0].inputs
        self.rooms = [Buffer(self.like, self.sides[0].weights.size) for _ in range(2)]
        self.value = self.inputs.key_heads.total(value, self.like.dtype)
        if not self.plan.groups():
            self.value.zero_()
        self.minus_share = self.like.new_zeros(self.share.shape)

    def run(self, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients in the order of the function's arguments, from that of the output."""
        rows = flat(grad, self.like.dtype)
        first, second = self.sides
        for group in self.plan.groups():
            minus = _of_pairs(self.share, group, self.like)
            first.start(group)
            second.start(group, minus)
            by_value = KeySums(self.plan, self.inputs.query.shape[0], self.value.shape[-1], self.scratch)
            for block in self.plan.blocks()[::-1]:
                above = rows[group.pairs, block.start : block.stop]
                self.minus_share[group.heads] += self._block(group, block, above, minus, by_value)
            first.finish()
            second.finish()
            self.inputs.key_heads.add(self.value, by_value.rows(slice(0, self.plan.key_length)), group)
        own = ((side.query, side.key, side.bias, side.sinks) for side in self.sides)
        parameters = (parameter for side in self.sides for parameter in side.parameters())
        return self.value, -self.minus_share, None, *(x for part in own for x in part), *parameters

    def _block(
        self, group: Group, block: Block, above: torch.Tensor, minus: torch.Tensor, by_value: KeySums
    ) -> torch.Tensor:
        """Bring in a block: G, -lambda of its pairs, and where V's gradient goes. Returns sum_i D_i2 of each head."""
        plan, maps = self.plan, zip(self.maps, self.sides, self.row_sums, strict=True)
        weighed = [_recompute(call, side, group, block, sums) for call, side, sums in maps]
        (_, kept), (_, other) = weighed
        rooms = [partial(room.view, *kept.shape) for room in self.rooms]
        by_value.add(torch.addcmul(kept, other, minus, out=rooms[0]()), above)
        pulls = multiply(above, self.inputs.value[:, : block.keys].mT, rooms[0], by_onednn=plan.by_onednn)
        row_term = above[..., :1]
        # The second map is the last one that reads P.
        for side, (matrix, own), sums, room in zip(
            self.sides, weighed, self.row_sums, (rooms[1](), pulls), strict=True
        ):
            d_logits = torch.mul(own, pulls, out=room)
            row_term = d_logits.sum(-1, keepdim=True)
            side.add(block, d_logits.addcmul_(matrix, row_term, value=-1.0), row_term, sums[group.pairs])
        return row_term.view(*group.shape, -1).sum((0, 2)).view(-1, 1, 1)


def _recompute(
    call: Call, side: LogitsGradients, group: Group, block: Block, row_sums: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A block of one map's weights, before and after dropout."""
    matrix, correction = side.weights.recompute(block, row_sums[group.pairs])
    matrix.mul_(correction)
    if not call.plan.dropout:
        return matrix, matrix
    return matrix, matrix * call.plan.dropout_factors(group, block, row_sums)


def dense_difference(maps: Maps, given: tuple[Tensors, Tensors], share: torch.Tensor) -> torch.Tensor:
    """The same function written densely, in memory O(length * key_length), for whatever differentiates it."""
    (matrix, _, value), (other, _, _) = (dense_map(call, own) for call, own in zip(maps, given, strict=True))
    return torch.matmul(matrix - share.to(matrix.dtype) * other, value).to(given[0].value.dtype)
