"""``robust`` pair by pair, where all queries of a head are one block; see ``backend_blocked_whole``.

The formulas are those of ``backend_blocked_rules``, for weights of softmax that sum to 1 and penalties without a
cutoff: every row keeps some weight. Then sum_j a_ij dA_ij is 0 beside the constant of a row, and dS = A o dA.
"""

from __future__ import annotations

import torch

from .backend_blocked_passes import Call, Tensors
from .backend_blocked_plan import PLAINLY
from .backend_blocked_rules import Kept, at_least_
from .backend_blocked_weights import LOG2_E, flat
from .backend_blocked_whole import AFTER, Rooms, product_of
from .boost_weights import Robust


class _Distances:
    """d^2 of all values of a pair from some rows; ``least`` is what smaller ones count as."""

    def __init__(self, robust: Robust, like: torch.Tensor, length: int, key_length: int, width: int) -> None:
        self.least, self.linear = robust.inner**2, product_of()
        self.rows, self.values = (like.new_ones(count, width + 2) for count in (length, key_length))

    def start(self, value: torch.Tensor) -> None:
        """Turn to a pair's values, ``[keys, d]``: beside them their squares and 1."""
        self.values[:, :-2] = value
        torch.linalg.vecdot(value, value, out=self.values[:, -2])

    def squares(self, centre: torch.Tensor, *, turned: bool = False) -> torch.Tensor:
        """From rows ``[rows, d]``, ``[rows, keys]`` or turned: the product with -2 u, 1 and their squares."""
        torch.mul(centre, -2.0, out=self.rows[:, :-2])
        torch.linalg.vecdot(centre, centre, out=self.rows[:, -1])
        left, right = (self.values, self.rows) if turned else (self.rows, self.values)
        return self.linear(left, right, *PLAINLY)


def robust_by_pair(robust: Robust, call: Call, tensors: Tensors) -> Kept:
    """The forward pass. Kept are, a step, the rows that it starts from and what their weights sum to."""
    plan, linear, rooms = call.plan, product_of(), Rooms(call, tensors)
    like, length, width = rooms.like, plan.length, tensors.value.shape[-1]
    kept = like.new_empty(len(rooms.output), robust.steps, length * (width + 1))
    left = like.new_empty(length, tensors.query.shape[-1])
    distances = _Distances(robust, like, length, plan.key_length, width)
    given = (flat(x, like.dtype) for x in tensors[:3])
    everything = zip(*given, rooms.output, kept, rooms.largest, rooms.total, strict=True)
    for query, key, value, out, steps, most, mass in everything:
        matrix = linear(torch.mul(query, plan.scale * LOG2_E, out=left), key, *PLAINLY)
        rooms.softmax_(matrix, most, mass)
        centres = [*(step[: length * width].view(length, width) for step in steps), out]
        distances.start(value)
        torch.div(linear(matrix, value.mT, *PLAINLY), mass, out=centres[0])
        for step, after in enumerate(centres[1:]):
            # Several times faster than the reciprocal of a root.
            shares = distances.squares(centres[step]).clamp_(min=distances.least).pow_(-0.5).mul_(matrix)
            found = shares.sum(-1, keepdim=True)
            torch.div(linear(shares, value.mT, *PLAINLY), found, out=after)
            torch.div(found, mass, out=steps[step, length * width :].view(length, 1))
    return Kept(rooms.output, rooms.row_sums(), kept)


def robust_gradients(
    robust: Robust, call: Call, tensors: Tensors, kept: Kept, grad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of queries, keys and values, each ``[batch, heads, ..., width]``."""
    plan, linear, like = call.plan, product_of(), kept.output.new_empty(0)
    length, width = plan.length, tensors.value.shape[-1]
    results = [like.new_empty(x.shape) for x in tensors[:3]]
    left = like.new_empty(length, tensors.query.shape[-1])
    distances = _Distances(robust, like, length, plan.key_length, width)
    shares, d_logits = (like.new_empty(plan.key_length, length) for _ in range(2))
    columns, moved = like.new_empty(plan.key_length, 1), like.new_empty(length, width)
    given = (flat(x, like.dtype) for x in (*tensors[:3], grad))
    gradients = (x.flatten(0, 1) for x in results)
    everything = zip(*given, kept.output, kept.rows, *kept.row_sums.unbind(-1), *gradients, strict=True)
    for query, key, value, above, out, steps, log_sum, correction, d_query, d_key, d_value in everything:
        matrix = linear(key, torch.mul(query, plan.scale * LOG2_E, out=left), -log_sum, *AFTER)
        matrix.exp2_().mul_(correction)
        centres = [*(step[: length * width].view(length, width) for step in steps), out]
        distances.start(value)
        # Values, their squares and 1.
        turned_values, each = distances.values.mT.contiguous(), above
        for sums in (d_value, columns):
            sums.zero_()
        for step in reversed(range(robust.steps)):
            centre, after = centres[step : step + 2]
            each = each / steps[step, length * width :].unsqueeze(-1)
            squares = distances.squares(centre, turned=True)
            are_bounded = at_least_(squares, distances.least)
            near = torch.pow(squares, -0.5, out=shares)
            pulls = linear(value, each, -torch.linalg.vecdot(each, after), *AFTER)
            d_value.add_(linear(near.mul_(matrix), each.mT, *PLAINLY))
            # Faster than to gather dA by products that are added (``addcmul``), and to multiply by A in the end.
            if step == robust.steps - 1:
                torch.mul(pulls, shares, out=d_logits)
                change = torch.div(d_logits, squares, out=pulls)
            else:
                d_logits.add_(pulls.mul_(shares))
                change = pulls.div_(squares)
            if are_bounded:  # where f is constant its weight does not change
                torch.ops.aten.threshold_backward.grad_input(change, squares, distances.least, grad_input=change)
            d_value.add_(linear(change, centre.mT, *PLAINLY))
            columns.add_(change.sum(1, keepdim=True))
            turned = linear(turned_values, change.mT, *PLAINLY).mT
            each = torch.addcmul(turned[:, :width], centre, turned[:, -1:], value=-1.0, out=moved)
        d_logits.add_(linear(value, each, -torch.linalg.vecdot(each, centres[0]), *AFTER).mul_(matrix))
        d_value.add_(linear(matrix, each.mT, *PLAINLY)).sub_(value * columns)
        torch.mul(linear(d_logits, query.mT, *PLAINLY), plan.scale, out=d_key)
        torch.mul(linear(key.mT.contiguous(), d_logits.mT, *PLAINLY).mT, plan.scale, out=d_query)
    return results[0], results[1], results[2]
