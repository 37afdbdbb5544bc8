"""Blocked attention pair by pair, where all queries of a head are one block: short sequences on CPUs, as of ViT.

A head's matrices of 197 x 197 numbers stay in the cache of a core while they are worked on, and oneDNN's products are
used where they come out: no copies to a place in a group. That is worth it only if little else is done for a pair, so
that what makes a call general is left to ``backend_blocked_passes``: masks, dropout, positions, grouped heads.

The backward pass holds matrices turned, ``[keys, rows]``. There a number a row stands along the rows in memory, where
oneDNN adds it to a product at no cost (the logits minus their log-sum-exp), and sums over queries are products of the
fast kind. Both directions round logits alike: oneDNN adds up the same numbers in the same order.
"""

from __future__ import annotations

import math

import torch

from .backend_blocked_passes import Call, Tensors
from .backend_blocked_plan import PLAINLY, Linear, onednn_linear
from .backend_blocked_rules import Kept
from .backend_blocked_weights import LOG2_E, flat
from .kernel_content import working_dtype

LN_2 = math.log(2.0)
AFTER: tuple[object, ...] = ("none", [], "")
"""Arguments of oneDNN's product behind a bias: nothing after it."""


def is_bare(call: Call) -> bool:
    """Whether a call has nothing that only groups are made for; its bias is another question."""
    seen, plan = call.visibility, call.plan
    is_plain = call.positions is None and call.ignores_row_constants and plan.heads == plan.key_heads
    return is_plain and seen.hides_nothing and seen.hidden is None


def suits(call: Call, tensors: Tensors) -> bool:
    """Whether a call is served here."""
    return call.plan.by_pair and tensors.bias is None and is_bare(call)


def product_of() -> Linear:
    """oneDNN's product.

    Raises:
        RuntimeError: if it is not there, which no plan says that goes pair by pair.
    """
    linear = onednn_linear()
    if linear is None:
        raise RuntimeError("oneDNN's product is gone since the plan was made")
    return linear


class Rooms:
    """What the forward pass of every booster begins with: rooms for its results, and softmax a pair at a time.

    Args:
        call: what is computed.
        tensors: with what.

    Attributes:
        like: a tensor of the device and dtype to work in, at least float32.
        output: ``[pairs, length, d]``.
        largest: logit of each row, in units of log 2, ``[pairs, length, 1]``.
        total: of the weights relative to that, ``[pairs, length, 1]``.
    """

    def __init__(self, call: Call, tensors: Tensors) -> None:
        plan = call.plan
        self.like = tensors.query.new_empty(0, dtype=working_dtype(tensors.query.dtype))
        self.output = self.like.new_empty(plan.batch * plan.heads, plan.length, tensors.value.shape[-1])
        self.largest, self.total = (self.like.new_empty(len(self.output), plan.length, 1) for _ in range(2))

    @staticmethod
    def softmax_(logits: torch.Tensor, most: torch.Tensor, mass: torch.Tensor) -> None:
        """Make weights of a pair's logits, up to 1 / ``mass``.

        Args:
            logits: in units of log 2, ``[length, key_length]``.
            most: gets the largest of each row, ``[length, 1]``.
            mass: gets the sum of each row's weights, ``[length, 1]``.
        """
        torch.amax(logits, -1, keepdim=True, out=most)
        torch.sum(logits.sub_(most).exp2_(), -1, keepdim=True, out=mass)

    def row_sums(self) -> torch.Tensor:
        """What :meth:`Weights.compute` returns of all rows, ``[pairs, length, 2]``."""
        log_sum = self.total.log2().add_(self.largest)
        return torch.cat((log_sum, (log_sum - self.largest).exp2_().div_(self.total)), dim=-1)


def local_linear_by_pair(call: Call, tensors: Tensors, own: torch.Tensor) -> Kept:
    """The forward pass; see ``backend_blocked_rules`` for the formulas.

    Logits and -s come from one product, of queries and slopes below each other.
    """
    plan, linear, rooms = call.plan, product_of(), Rooms(call, tensors)
    like, length, width = rooms.like, plan.length, tensors.query.shape[-1]
    tilt = torch.empty_like(rooms.total)
    left, product, one = like.new_empty(2 * length, width), like.new_empty(length, plan.key_length), like.new_ones(())
    given = (flat(x, like.dtype) for x in (*tensors[:3], own))
    everything = zip(*given, rooms.output, rooms.largest, rooms.total, tilt, strict=True)
    for query, key, value, slope, out, most, mass, shift in everything:
        torch.mul(query, plan.scale * LOG2_E, out=left[:length])
        torch.neg(slope, out=left[length:])
        matrix, shares = linear(left, key, *PLAINLY).split(length)
        rooms.softmax_(matrix, most, mass)
        torch.mul(matrix, shares, out=product)
        factor = mass.reciprocal()
        torch.addcmul(one, product.sum(-1, keepdim=True), factor, value=-1.0, out=shift)
        shares.add_(shift).mul_(matrix)
        torch.mul(linear(shares, value.mT, *PLAINLY), factor, out=out)
    return Kept(rooms.output, rooms.row_sums(), tilt)


def local_linear_gradients(
    call: Call, tensors: Tensors, own: torch.Tensor, kept: Kept, grad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of queries, keys, values and slopes, each ``[batch, heads, ..., width]``.

    Those of the logits, in units of log 2, and of -s stand side by side, so that each of queries with slopes, and of
    keys, is one product.
    """
    plan, linear, like = call.plan, product_of(), kept.output.new_empty(0)
    length, width = plan.length, tensors.query.shape[-1]
    d_queries, d_keys, d_values = (like.new_empty(x.shape) for x in tensors[:3])
    d_slopes = like.new_empty(own.shape)
    log_sums, corrections = kept.row_sums.unbind(-1)
    beside = torch.cat((-log_sums, kept.rows.squeeze(-1)), dim=-1)
    left = like.new_empty(2 * length, width)
    product, tilted = (like.new_empty(plan.key_length, length) for _ in range(2))
    given = (flat(x, like.dtype) for x in (*tensors[:3], own, grad))
    gradients = (x.flatten(0, 1) for x in (d_queries, d_keys, d_values, d_slopes))
    everything = zip(*given, kept.output, beside, corrections, *gradients, strict=True)
    for query, key, value, slope, above, out, bias, correction, d_query, d_key, d_value, d_slope in everything:
        torch.mul(query, plan.scale * LOG2_E, out=left[:length])
        torch.neg(slope, out=left[length:])
        both = linear(key, left, bias, *AFTER)
        matrix, tilt = both.split(length, dim=-1)
        matrix.exp2_().mul_(correction)
        errors = linear(value, above, *PLAINLY)
        average = torch.mul(matrix, errors, out=product).sum(0)
        row_term = (above * out).sum(-1).sub_(average).mul_(LN_2)
        d_value.copy_(linear(torch.mul(tilt, matrix, out=tilted), above.mT, *PLAINLY))
        torch.addcmul(product, matrix, average, value=-1.0, out=tilt)
        tilted.mul_(torch.add(average.mul_(-LN_2), errors, alpha=LN_2, out=errors))
        torch.addcmul(tilted, matrix, row_term, value=-1.0, out=matrix)
        d_key.copy_(linear(both, left.mT, *PLAINLY))
        turned = linear(key.mT.contiguous(), both.mT, *PLAINLY)
        torch.mul(turned[:, :length].mT, plan.scale * LOG2_E, out=d_query)
        torch.neg(turned[:, length:].mT, out=d_slope)
    return d_queries, d_keys, d_values, d_slopes
