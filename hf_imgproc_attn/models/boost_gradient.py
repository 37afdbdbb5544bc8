"""Gradient boosting in one layer: further attentions filter what those before left over (arXiv 2604.03190).

    F_0 = Attn_0(z)
    c_m = Attn_m(z - F_{m-1}),   g_m = sigmoid(W_m [F_{m-1} ; c_m]),   F_m = F_{m-1} + g_m * c_m,   m = 1 .. M - 1
    output = W_O F_{M-1}

z is the input of the attention after its norm, F and c are the heads side by side before the output projection, so the
head width times the number of heads must be the hidden size. M, the number of rounds, is ``boosting_steps``, by
default 2, with which the paper gets most of the benefit. Each round has projections and a gate of its own, and g is
one number a feature and token. This is not an operator on V: there are M attention maps, and decoding caches keys and
values of every round.

``gradient_boosting_source``: in the paper's first version its experiments are not its equation.
- ``residual``, the default: query, key and value of Attn_m all come from z - F_{m-1}. This is what the authors'
  language models are trained with (``kv_source='residual'`` in github.com/salehsargolzaee/boosted-attention), and a
  later version of the paper writes its equation and algorithm 1 so.
- ``input``: the query comes from z - F_{m-1}, key and value come from z. This is the equation of Attn_m and
  algorithm 1 of arXiv 2604.03190v1; ``kv_source='input'`` in the authors' code.

Where the norm comes after the attention, as in BERT, z is the residual stream itself; there the paper's second version
reports a perplexity 9.6 % above that of plain attention, and says that the method needs the norm before.

*Choices* that the paper leaves open or that this framework makes:
- All rounds apply the same filter: content and position kernels, bandwidths and position projections are shared; only
  the projections of the tokens differ.
- The value projections of rounds 1 to M - 1 start at zero. So a new model starts as the one without boosting, and a
  converted checkpoint computes what it did before, or a boosted one when it gets further rounds. Of a new round only
  this projection gets a gradient in the first step.
- Under ``elliptical`` the layer "before" Attn_m is Attn_{m-1} of the same layer. Layer 0 has no metric in any round.
- Each attention draws its own dropout mask.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers import initialization as init

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor | None]]
"""(query, key, value), each ``[batch, heads, length, head_dim]``, to the filtered value and the attention map."""


class ZeroLinear(nn.Linear):
    """A linear layer whose weights start at zero, so that it adds nothing before it is trained."""

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Called by the constructor and by the models' ``_init_weights``."""
        init.zeros_(self.weight)
        if self.bias is not None:
            init.zeros_(self.bias)


class GradientBoosting(nn.Module):
    """The projections and the gate of one round after the first.

    Args:
        hidden_size: width of the tokens.
        num_heads: number of heads.
        head_dim: width of a head.
        source: one of ``GRADIENT_BOOSTING_SOURCES``.

    Raises:
        ValueError: if the heads side by side are not as wide as the tokens.
    """

    def __init__(self, hidden_size: int, num_heads: int, head_dim: int, source: str = "residual") -> None:
        super().__init__()
        if num_heads * head_dim != hidden_size:
            raise ValueError(
                "boosting 'gradient_boosted' subtracts the heads' output from the input: num_attention_heads * "
                f"head_dim must be hidden_size = {hidden_size}, got {num_heads} * {head_dim}"
            )
        self.num_heads, self.head_dim, self.source = num_heads, head_dim, source
        self.query = nn.Linear(hidden_size, hidden_size)
        self.key = nn.Linear(hidden_size, hidden_size)
        self.value = ZeroLinear(hidden_size, hidden_size)
        self.gate = nn.Linear(2 * hidden_size, hidden_size)

    def forward(
        self, hidden_states: torch.Tensor, estimate: torch.Tensor, attend: Attention
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """F_m = F_{m-1} + g_m * c_m.

        Args:
            hidden_states: z, ``[batch, length, hidden_size]``.
            estimate: F_{m-1}, the heads side by side, ``[batch, length, hidden_size]``.
            attend: the attention of this round.

        Returns:
            F_m ``[batch, length, hidden_size]``, the values that were filtered ``[batch, heads, length, head_dim]``,
            and the attention map ``[batch, heads, length, key_length]`` or None.
        """
        residual = hidden_states - estimate
        source = residual if self.source == "residual" else hidden_states
        value = self._heads(self.value(source))
        filtered, weights = attend(self._heads(self.query(residual)), self._heads(self.key(source)), value)
        correction = filtered.transpose(1, 2).flatten(2)
        gate = torch.sigmoid(self.gate(torch.cat((estimate, correction), dim=-1)))
        return estimate + gate * correction, value, weights

    def _heads(self, tokens: torch.Tensor) -> torch.Tensor:
        """``[batch, length, hidden_size]`` to ``[batch, heads, length, head_dim]``."""
        return tokens.view(*tokens.shape[:-1], self.num_heads, self.head_dim).transpose(1, 2)
