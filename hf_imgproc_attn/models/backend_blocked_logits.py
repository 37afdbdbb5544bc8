"""The gradients of what the logits of one map are made of, block by block, for boosters that have no streams."""

from __future__ import annotations

import torch

from .backend_blocked_passes import Call, Inputs, Tensors
from .backend_blocked_plan import Block, Group, multiply
from .backend_blocked_weights import Buffer, KeySums, Weights


def no_streams(call: Call, like: torch.Tensor) -> torch.Tensor:
    """The streams of a booster that has none, for :class:`Inputs`."""
    return like.new_empty(call.plan.batch, call.plan.heads, call.plan.length, 0)


class LogitsGradients:
    """Gradients of queries, keys, bias, sinks and positions, from those of the logits.

    Args:
        call: what is computed, with the plan of its backward pass.
        tensors: with what.
        needs: whether bias, sinks and each of the position kernel's parameters have a gradient.
        scratch: for one product with keys.
        kind: see :meth:`Call.weights`.
    """

    def __init__(
        self,
        call: Call,
        tensors: Tensors,
        needs: tuple[bool, ...],
        scratch: Buffer,
        kind: type[Weights] | None = None,
    ) -> None:
        bias, sinks, like = tensors.bias, tensors.sinks, scratch.like
        needs_bias, needs_sinks, *needs_parameters = needs
        self.plan, self.scratch = call.plan, scratch
        self.inputs = Inputs(call, tensors, no_streams(call, like))
        self.weights = call.weights(tensors, like, tuple(needs_parameters), kind)
        self.query = like.new_empty(tensors.query.shape)
        self.key = self.inputs.key_heads.total(tensors.key, like.dtype)
        if not self.plan.groups():  # nothing to attend, and what was allocated stays unwritten
            self.key.zero_()
        self.bias = like.new_zeros(bias.shape) if bias is not None and needs_bias else None
        self.sinks = like.new_zeros(sinks.shape) if sinks is not None and needs_sinks else None

    def start(self, group: Group, factor: torch.Tensor | None = None) -> None:
        """Turn to a group.

        Args:
            group: see there.
            factor: what all its gradients are multiplied by, ``[pairs, 1, 1]``; None: 1.
        """
        inputs, plan = self.inputs, self.plan
        inputs.start(group)
        self.weights.start(group, inputs.query, inputs.key)
        self.group, self.factor = group, factor
        self.scale = plan.scale if factor is None else factor * plan.scale
        self._keys = KeySums(plan, inputs.query.shape[0], inputs.key.shape[-1], self.scratch)

    def add(self, block: Block, d_logits: torch.Tensor, row_term: torch.Tensor, row_sums: torch.Tensor) -> None:
        """Bring in a block.

        Args:
            block: of the group.
            d_logits: the gradient of its logits, ``[pairs, rows, keys]``; may be overwritten.
            row_term: sum_j a_ij dA_ij, with the factor of :meth:`Weights.recompute`, ``[pairs, rows, 1]``.
            row_sums: of the group, ``[pairs, length, 2]``.
        """
        if self.sinks is not None:
            share = row_term if self.factor is None else row_term * self.factor
            self.weights.add_to_sinks(self.sinks, share, row_sums[:, block.rows])
        self.add_without_sinks(block, d_logits)

    def add_without_sinks(self, block: Block, d_logits: torch.Tensor) -> None:
        """Bring in a block of a map that has none; arguments as of :meth:`add`."""
        inputs, weights, rows = self.inputs, self.weights, block.rows
        by_query = multiply(d_logits, inputs.key[:, : block.keys], by_onednn=self.plan.by_onednn)
        self._to_queries(self.query.flatten(0, 1)[self.group.pairs, rows], by_query)
        self._keys.add(d_logits, inputs.query[:, rows])
        if self.factor is not None and (self.bias is not None or weights.positions is not None):
            d_logits.mul_(self.factor)
        if self.bias is not None:
            weights.add_to_bias(self.bias, d_logits, block)
        weights.add_to_positions(d_logits, block)

    def _to_queries(self, room: torch.Tensor, product: torch.Tensor) -> None:
        """Write a block's product, ``[pairs, rows, head_dim]``, to its queries' gradient: each block comes once."""
        torch.mul(product, self.scale, out=room)

    def finish(self, other: torch.Tensor | None = None) -> None:
        """Hand the group's sums over keys to its key heads.

        Args:
            other: what else the keys' gradient has, ``[pairs, key_length, head_dim]``, or None.
        """
        by_key = self._keys.rows(slice(0, self.plan.key_length)).mul_(self.scale)
        self.inputs.key_heads.add(self.key, by_key if other is None else by_key.add_(other), self.group)

    def parameters(self) -> list[torch.Tensor | None]:
        """Of the position kernel's parameters, None where one has no gradient."""
        positions = self.weights.positions
        return [] if positions is None else positions.finish(self.plan)
