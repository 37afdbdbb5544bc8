"""Tokens that several processes share (context parallelism): each has some rows of the queries, and sees all keys.

Process r of R has the tokens from r N / R to (r + 1) N / R of every text. What A is applied to is gathered from all
processes: keys and values, and between the steps of a booster the rows that the step before made. So every row of A
is whole in one process, and what is computed is exact for any filter that is a function of keys, values and places.
A causal row needs no key after its own: of what is gathered, a process keeps the tokens up to its last one. (The
all-gather form, as Llama 3 was trained, arXiv 2407.21783, section 3.3.2; a ring would send as much.)

A process holds N / R rows of queries and activations, and N keys and values of one layer at a time.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from .models.visibility import Visibility, padding_visibility


class _Gathered(torch.autograd.Function):
    """The parts of all processes, ``[parts, ...]``; the gradient of a part is summed over the processes."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        parts = rows.new_empty(dist.get_world_size(group), *rows.shape)
        dist.all_gather(list(parts.unbind(0)), rows.contiguous(), group=group)
        return parts

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        grad = grad.contiguous()  # a group of processes looks at memory, in which transposed rows have another order
        own = torch.empty_like(grad[0])
        dist.reduce_scatter(own, list(grad.unbind(0)), group=ctx.group)
        return own, None


class SharedContext:
    """The tokens of this process among those of a group.

    Args:
        group: the processes that share the tokens; None: all.
        causal: whether no token sees a later one.
    """

    def __init__(self, group: Any, causal: bool) -> None:
        self.group, self.causal = group, causal
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.length = 0
        """Of the tokens that each process has; set before each forward pass."""
        self.keys: torch.Tensor | None = None
        """Which tokens are no padding, ``[batch, 1, 1, N]`` of all processes; None: all of them."""

    @property
    def start(self) -> int:
        """Place of the first token of this process."""
        return self.rank * self.length

    @property
    def end(self) -> int:
        """How many tokens are seen from here."""
        return self.start + self.length if self.causal else self.size * self.length

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """From rows ``[batch, heads, length, width]`` those that are seen here, ``[batch, heads, tokens, width]``."""
        parts: torch.Tensor = _Gathered.apply(rows, self.group)
        return parts.movedim(0, -3).flatten(-3, -2)[..., : self.end, :]

    def visibility(self) -> Visibility:
        """Who is seen from the tokens of this process."""
        if self.keys is None:
            return Visibility(self.length, self.end, self.causal)
        return padding_visibility(self.keys[..., : self.end], self.length, self.causal)

    def streams(self) -> GatheredStreams:
        """What a filter sees of the other processes."""
        return GatheredStreams(self)


class GatheredStreams:
    """Rows of all tokens, of which each process makes its own; see ``cache_streams.Streams``.

    Args:
        context: which tokens are here.
    """

    is_cached = True
    keeps_places_apart = True
    applies_apart = True
    """Whether A has to be applied by one call a step, since what a step makes is needed elsewhere."""

    def __init__(self, context: SharedContext) -> None:
        self._context = context

    def update(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all tokens that are seen from here."""
        both = self._context.gather(torch.cat((key, value), dim=-1))
        return both[..., : key.shape[-1]], both[..., key.shape[-1] :]

    def append(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """The same of other rows, ``[batch, heads, length, width]``."""
        return self._context.gather(rows)

    def own_value(self, value: torch.Tensor, length: int) -> torch.Tensor | None:
        """Values of the tokens that are here."""
        return value[..., self._context.start : self._context.start + length, :]

    def past(self, name: str) -> torch.Tensor | None:
        """None: earlier rows are not kept."""
        return None

    def of_round(self, number: int) -> GatheredStreams:
        """The same: nothing is kept."""
        return self
