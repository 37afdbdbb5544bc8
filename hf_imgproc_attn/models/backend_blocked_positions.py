"""A position kernel's part in blocked attention: which rows and columns a block compares, and the sums of gradients.

The formulas are in ``kernel_blocks``. Class tokens have no place on the grid: what the kernel compares is cleared for
them, and each head's three scalars (grid to class, class to grid, class to class) are added instead.
"""

from __future__ import annotations

import torch

from .backend_blocked_plan import Block, Group, Plan, cut
from .kernel_blocks import BlockKernel
from .kernel_position import BlockedPositions

MAX_STORED_SCORES = 2**20
"""What rows and columns have in common, or a costly kernel's logits, is kept for all groups of heads and samples up to
this many numbers (4 MB); beyond, it is computed again, and memory stays linear in the length."""


def _within(x: torch.Tensor, block: Block, whole: Block) -> torch.Tensor:
    """The part of ``[..., rows, keys]`` of a whole block that belongs to one without some of its rows and keys."""
    start, stop = block.start - whole.start, block.stop - whole.start
    return x[..., start:stop, block.first - whole.first : block.keys - whole.first]


class PositionTerm:
    """What a position kernel adds to the logits of each block, and the gradients of its parameters.

    Args:
        positions: what is compared.
        parameters: those of ``positions.parameters()``, whose gradients are summed.
        plan: what is computed.
        mask: who sees whom besides causality, boolean with four axes, or None.
        like: a tensor of the device and dtype to work in.
        needs_grad: which parameters' gradients are wanted; none in the forward pass.
        exact: whether a number that is added to a whole row counts.
    """

    def __init__(
        self,
        positions: BlockedPositions,
        parameters: tuple[torch.Tensor, ...],
        plan: Plan,
        mask: torch.Tensor | None,
        like: torch.Tensor,
        needs_grad: tuple[bool, ...] = (),
        *,
        exact: bool = False,
    ) -> None:
        self.kernel: BlockKernel = positions.block_kernel()
        self.coordinates, self.key_coordinates = positions.coordinates, positions.key_coordinates
        self.num_class_tokens = 0 if positions.class_tokens is None else positions.class_tokens.num_tokens
        self.parameters = tuple(parameter.detach().to(like.dtype) for parameter in parameters)
        self.gradients = [
            torch.zeros_like(parameter) if needed else None
            for parameter, needed in zip(self.parameters, needs_grad, strict=False)
        ]
        self.dtype = like.dtype
        self._mask, self._is_causal, self._plan, self._blocks = mask, plan.is_causal, plan, plan.blocks()
        see_themselves = mask is None and self._are_own_keys(plan.past)
        self._from_nearest = self.kernel.grows_with_distance and not (see_themselves or exact)
        masks = mask.shape[0] if mask is not None and self._from_nearest else 1
        self._per_sample = max(self.coordinates.shape[0], self.key_coordinates.shape[0], masks) > 1
        samples, scores = plan.batch if self._per_sample else 1, plan.length * plan.key_length
        self._stored: dict[tuple[int, int], torch.Tensor] | None = (
            {} if samples * scores <= MAX_STORED_SCORES else None
        )
        # Look-ups that serve all samples, and one sum of their gradients, by the number of the block.
        self._logits: dict[int, torch.Tensor] | None = None
        self._logit_grads: dict[int, torch.Tensor] = {}
        if self.kernel.is_costly and not self._per_sample and plan.batch > 1:
            self._logits = {} if plan.heads * scores <= MAX_STORED_SCORES else None

    def _are_own_keys(self, past: int) -> bool:
        """Whether every query is known to stand at the place of a key that it may see."""
        queries, keys = self.coordinates, self.key_coordinates[:, max(past, 0) :]
        if past < 0 or queries.shape != keys.shape:
            return False
        # An accelerator would be waited for.
        return queries.data_ptr() == keys.data_ptr() or (queries.device.type == "cpu" and torch.equal(queries, keys))

    def _allowed(self, group: Group, block: Block) -> torch.Tensor | None:
        """What any head of a block sees, ``[samples or 1, rows or 1, keys or 1]``; None for everything."""
        allowed = None
        if self._mask is not None:
            allowed = cut(self._mask, group, block).any(1)
        if self._is_causal:
            causal = torch.ones(block.shape, dtype=torch.bool, device=self.coordinates.device)
            causal = causal.tril(block.own)
            allowed = causal[None] if allowed is None else allowed & causal
        return allowed

    def _pair_values(self, group: Group, block: Block) -> torch.Tensor:
        """What the block's rows and columns have in common for all heads, ``[..., samples or 1, rows, keys]``."""
        if self._stored is None:
            return self._compared(group, block)
        place, whole = (block.number, group.batch.start if self._per_sample else 0), self._blocks[block.number]
        if place not in self._stored:
            self._stored[place] = self._compared(group, whole)
        return _within(self._stored[place], block, whole)

    def _compared(self, group: Group, block: Block) -> torch.Tensor:
        rows, columns = (x if x.shape[0] == 1 else x[group.batch] for x in (self.coordinates, self.key_coordinates))
        pair_values = self.kernel.compare(rows[:, block.rows], columns[:, block.columns], self.dtype)
        count = self.num_class_tokens
        if count:
            self.kernel.clear_(pair_values[..., : max(count - block.first, 0)])
            self.kernel.clear_(pair_values[..., : max(count - block.start, 0), :])
        if self._from_nearest:
            pair_values = self.kernel.from_nearest(pair_values, self._allowed(group, block))
        return pair_values

    def _class_parts(self, logits: torch.Tensor, block: Block) -> list[torch.Tensor]:
        """The views of a block ``[samples, heads, rows, keys]`` in which class tokens take part, as the scalars stand.

        In order: grid rows and class columns, class rows and grid columns, class rows and class columns.
        """
        rows, count = (max(self.num_class_tokens - begin, 0) for begin in (block.start, block.first))
        return [logits[:, :, rows:, :count], logits[:, :, :rows, count:], logits[:, :, :rows, :count]]

    def add_(self, logits: torch.Tensor, group: Group, block: Block, factor: float) -> None:
        """Add ``factor`` s to the logits of a block, ``[samples, heads, rows, keys]``."""
        if self._logits is None:
            self.kernel.add_(logits, self._pair_values(group, block), self.parameters[0][group.heads], factor)
        else:
            whole = self._blocks[block.number]
            if block.number not in self._logits:
                all_heads = logits.new_zeros(1, len(self.parameters[0]), *whole.shape)
                self.kernel.add_(all_heads, self._pair_values(group, whole), self.parameters[0], factor)
                self._logits[block.number] = all_heads
            logits += _within(self._logits[block.number][:, group.heads], block, whole)
        if self.num_class_tokens:
            scalars = self.parameters[1][group.heads].unsqueeze(-1)
            for index, part in enumerate(self._class_parts(logits, block)):
                part.add_(scalars[:, index : index + 1], alpha=factor)

    def accumulate(self, d_logits: torch.Tensor, group: Group, block: Block) -> None:
        """Add a block's share to the gradients, from that of its logits, which may be overwritten.

        Args:
            d_logits: ``[samples, heads, rows, keys]``, contiguous.
            group: of the block.
            block: its place.
        """
        if self.num_class_tokens and self.gradients[1] is not None:
            for index, part in enumerate(self._class_parts(d_logits, block)):
                self.gradients[1][group.heads, index] += part.sum((0, 2, 3))
        total = self.gradients[0]
        if total is None:
            return
        if self._logits is None:
            parameter = self.parameters[0][group.heads]
            total[group.heads] += self.kernel.gradient(d_logits, self._pair_values(group, block), parameter)
            return
        whole = self._blocks[block.number]
        if block.number not in self._logit_grads:
            self._logit_grads[block.number] = d_logits.new_zeros(1, len(total), *whole.shape)
        room = _within(self._logit_grads[block.number][:, group.heads], block, whole)
        room += d_logits.sum(0, keepdim=True)

    def finish(self, plan: Plan) -> list[torch.Tensor | None]:
        """All gradients, once every block has been accumulated; None for parameters that need none."""
        total = self.gradients[0] if self.gradients else None
        for block in plan.blocks():
            d_logits = self._logit_grads.pop(block.number, None)
            if total is not None and d_logits is not None:
                pair_values = self._pair_values(plan.groups()[0], block)
                total += self.kernel.gradient(d_logits, pair_values, self.parameters[0])
        return self.gradients
