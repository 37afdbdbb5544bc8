"""The backward passes of blocked attention; the formulas are in ``backend_blocked_passes``."""

from __future__ import annotations

from functools import partial

import torch

from .backend_blocked_passes import Call, Computed, Inputs, Tensors, passes_over_blocks
from .backend_blocked_plan import Block, Group, multiply
from .backend_blocked_weights import Buffer, KeySums, flat
from .kernel_content import working_dtype


class Gradients:
    """The gradients of one call, summed group by group.

    Args:
        call: what was computed.
        tensors: with what.
        computed: in the forward passes.
        needs: whether bias, past streams, sinks and each of the position kernel's parameters have a gradient.
    """

    def __init__(self, call: Call, tensors: Tensors, computed: Computed, needs: tuple[bool, ...]) -> None:
        query, key, value, bias, past, sinks, _ = tensors
        needs_bias, _, needs_sinks, *needs_parameters = needs
        call = call._replace(plan=call.plan.backward)
        self.call, self.plan, self.booster, self.computed = call, call.plan, call.booster, computed
        self.width, self.num_streams = value.shape[-1], len(call.booster.streams)
        self.like = query.new_empty(0, dtype=working_dtype(query.dtype))
        known = computed.are_moderate
        self.inputs = Inputs(call, tensors, computed.streams, leaves_out=True, are_moderate=known)
        self.query = self.like.new_empty(query.shape)
        self.key, self.value = (self.inputs.key_heads.total(x, self.like.dtype) for x in (key, value))
        self.bias = self.like.new_zeros(bias.shape) if bias is not None and needs_bias else None
        self.past = None if past is None else self.like.new_empty(past.shape)
        self.sinks = self.like.new_zeros(sinks.shape) if sinks is not None and needs_sinks else None
        self.weights = call.weights(tensors, self.like, tuple(needs_parameters))
        self.buffer = Buffer(self.like, self.weights.size)
        widest = max(self.width, key.shape[-1]) if self.plan.block_rows < self.plan.length else 0
        self.scratch = Buffer(self.like, self.plan.group_pairs * self.plan.key_length * widest)

    def run(self, grad: torch.Tensor | None, stream_grad: torch.Tensor | None) -> None:
        """Compute all gradients.

        Args:
            grad: of the output, ``[batch, heads, length, d]``, or None.
            stream_grad: of the streams side by side, ``[batch, heads, length, (k - 1) * d]``, or None.
        """
        plan, dtype = self.plan, self.like.dtype
        if not plan.groups():  # nothing to attend, and what was allocated stays unwritten
            for gradient in (self.key, self.value, self.past):
                if gradient is not None:
                    gradient.zero_()
        if grad is None:
            grad = self.like.new_zeros(plan.batch, plan.heads, plan.length, self.width)
        output_grads = flat(grad, dtype)
        stream_grads = None if stream_grad is None else flat(stream_grad, dtype)
        for group in plan.groups():
            self._start(group, output_grads, stream_grads)
            for steps in passes_over_blocks(plan.is_causal or plan.block_rows >= plan.length, self.num_streams)[::-1]:
                for block in self.blocks:
                    self._block(block, steps)
            self._finish()

    def parameters(self) -> list[torch.Tensor | None]:
        """Of the position kernel's parameters, None where one has no gradient."""
        positions = self.weights.positions
        return [] if positions is None else positions.finish(self.plan)

    def _start(self, group: Group, output_grads: torch.Tensor, stream_grads: torch.Tensor | None) -> None:
        """Turn to a group: its inputs, its rows of G, and empty sums."""
        inputs, plan, width = self.inputs, self.plan, self.width
        inputs.start(group)
        self.blocks = inputs.blocks[::-1]
        pairs = inputs.query.shape[0]
        self.group, self.output_grad = group, output_grads[group.pairs]
        self.output, self.row_sums = self.computed.output[group.pairs], self.computed.row_sums[group.pairs]
        self.d_query = self.query.flatten(0, 1)[group.pairs]
        self.d_query[:, : self.blocks[-1].start if self.blocks else None] = 0.0
        self.side_by_side = torch.cat([inputs.value, inputs.all], dim=-1) if self.num_streams > 1 else inputs.value
        self.d_key = KeySums(plan, pairs, inputs.key.shape[-1], self.scratch)
        self.totals = [KeySums(plan, pairs, width, self.scratch) for _ in range(self.num_streams)]
        if stream_grads is not None:
            for m in range(1, self.num_streams):
                self.totals[m].begin(stream_grads[group.pairs, :, inputs.columns(m)])
        self.smoothed = self._smoothed_values()
        is_full = inputs.is_full and self.call.visibility.mask is None
        self.weights.start(group, inputs.query, inputs.key, is_full=is_full)

    def _block(self, block: Block, steps: range) -> None:
        """Add a block's share to T_m of the streams ``steps`` and, with x_0 among them, to all other gradients."""
        inputs, plan, rows, keys = self.inputs, self.plan, block.rows, block.columns
        matrix, correction = self.weights.recompute(block, self.row_sums)
        factors = plan.dropout_factors(self.group, block, self.like) if plan.dropout else None
        dropped = matrix if factors is None else matrix * factors
        # g_0, g_1, ... side by side.
        row_grads = self.like.new_empty(*matrix.shape[:2], self.num_streams * self.width)
        for m in reversed(range(steps.start, self.num_streams)):
            smooth_grad = self._smooth_grad(block, m, row_grads).mul_(correction)
            if m in steps:
                self.totals[m].add(dropped, smooth_grad, block.first)
        if steps.start:
            return
        room = partial(self.buffer.view, *matrix.shape)
        d_matrix = multiply(row_grads, self.side_by_side[:, keys].mT, room, by_onednn=plan.by_onednn)
        if factors is not None:
            d_matrix.mul_(factors)
        # D; the correction is in g_0, g_1, ... already.
        row_term = row_grads.mul_(self.smoothed[:, rows]).sum(-1, keepdim=True)
        d_logits = self.weights.logits_grad(d_matrix, matrix, row_term)
        d_query = multiply(d_logits, inputs.key[:, keys], by_onednn=plan.by_onednn)
        torch.mul(d_query, plan.scale, out=self.d_query[:, rows])
        self.d_key.add(d_logits, inputs.query[:, rows], block.first)
        if self.bias is not None:
            self.weights.add_to_bias(self.bias, d_logits, block)
        if self.sinks is not None:
            self.weights.add_to_sinks(self.sinks, row_term, self.row_sums[:, rows])
        self.weights.add_to_positions(d_logits, block)

    def _own(self, block: Block) -> slice:
        """Where the block's tokens stand among the keys."""
        return slice(self.plan.past + block.start, self.plan.past + block.stop)

    def _smooth_grad(self, block: Block, m: int, row_grads: torch.Tensor) -> torch.Tensor:
        """Write g_m = o_m G + sum_{m'>m} c_m'm T_m' of a block's rows into its columns of ``row_grads``."""
        smooth_grad = row_grads[..., m * self.width : (m + 1) * self.width]
        total, weight = self.output_grad[:, block.rows], self.booster.output[m + 1]
        if weight != 1.0:
            total = total * weight
        for later in range(m + 1, self.num_streams):
            weight = self.booster.streams[later][m + 1]
            if weight:
                total = torch.add(total, self.totals[later].rows(self._own(block)), alpha=weight, out=smooth_grad)
        return smooth_grad if total is smooth_grad else smooth_grad.copy_(total)

    def _smoothed_values(self) -> torch.Tensor:
        """s_0, s_1, ... of the group's rows side by side, ``[pairs, length, k * d]``, from the streams and the output.

        In rows whose own value is hidden and NaN all but the last are 0: nobody sees these rows, so that their g_m is
        o_m G, and only the sum of o_m s_m counts.
        """
        inputs, width = self.inputs, self.width
        smoothed = self.like.new_empty(*self.output.shape[:2], self.num_streams * width)
        parts = smoothed.split(width, dim=-1)
        results = [inputs.own[..., inputs.columns(m)] for m in range(1, self.num_streams)] + [self.output]
        for m, (result, coefficients) in enumerate(
            zip(results, (*self.booster.streams[1:], self.booster.output), strict=True)
        ):
            share, *earlier, weight = coefficients[: m + 2]
            part = torch.sub(result, inputs.own_value, alpha=share, out=parts[m]) if share else parts[m].copy_(result)
            for factor, other in zip(earlier, parts, strict=False):
                if factor:
                    part.sub_(other, alpha=factor)
            if weight != 1.0:
                part.div_(weight)
            if m < self.num_streams - 1:
                inputs.clear_lost_(part)
        return smoothed

    def _finish(self) -> None:
        """Hand the group's sums over keys to its key heads."""
        inputs, plan, group = self.inputs, self.plan, self.group
        all_keys, own = slice(0, plan.key_length), slice(plan.past, plan.key_length)
        inputs.key_heads.add(self.key, self.d_key.rows(all_keys).mul_(plan.scale), group)
        # Of earlier keys only x_0 is a function of V here; the rest came in as streams.
        d_value = self.totals[0].rows(all_keys)
        for m in range(1, self.num_streams):
            if self.booster.streams[m][0]:
                d_value[:, own].add_(self.totals[m].rows(own), alpha=self.booster.streams[m][0])
            if self.past is not None:
                earlier = self.totals[m].rows(slice(0, plan.past))
                self.past.flatten(0, 1)[group.pairs, :, inputs.columns(m)] = earlier
        inputs.key_heads.add(self.value, d_value, group)
