"""Differential attention: a second attention map, of queries and keys of its own, is taken away from the first.

    (A_1 - lambda A_2) V        lambda learned for each head, 0 at the start: plain attention

(Ye et al. 2024, differential transformer, arXiv 2410.05258). Both maps have the layer's kernels, positions and
normalisation, and filter the same values; dropout draws a mask for each. Differs from the paper: lambda is a plain
parameter, not made of products of exponentials, and the heads have no norm of their own. Rows sum to 1 - lambda. A
cache keeps the second keys as a stream.
"""

from __future__ import annotations

import torch
from torch import nn

SECOND_KEY = "second.key"
"""Name of the stream that keeps the second keys."""


class SecondMap(nn.Module):
    """The projections of the second map.

    Args:
        hidden_size: width of the tokens.
        num_heads: number of heads.
        head_dim: width of a head.
    """

    def __init__(self, hidden_size: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.query = nn.Linear(hidden_size, num_heads * head_dim)
        self.key = nn.Linear(hidden_size, num_heads * head_dim)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``[batch, length, hidden_size]`` to query and key, ``[batch, heads, length, head_dim]``."""
        pair = (projection(hidden_states) for projection in (self.query, self.key))
        query, key = (tokens.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for tokens in pair)
        return query, key
