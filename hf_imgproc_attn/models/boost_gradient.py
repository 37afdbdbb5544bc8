"""Gradient boosting in one layer: a second attention filters what the first one left over (arXiv 2604.03190).

    F = Attn_0(z),   c = Attn_1(z - F),   g = sigmoid(W_g [F ; c]),   output = W_O (F + g * c)

z is the input of the attention after its norm, F and c are the heads side by side before the output projection, so the
head width times the number of heads must be the hidden size. Attn_1 has projections of its own, and g is one number a
feature and token. This is not an operator on V: there are two attention maps, and decoding caches a second K and V.

*Choices* that the paper leaves open or that this framework makes:
- Attn_1 applies the same filter as Attn_0: content and position kernels, bandwidths and position projections are
  shared; only the projections of the tokens differ.
- The value projection of Attn_1 starts at zero. So a new model starts as the one without boosting, and a converted
  checkpoint computes what it did before. Of the second attention only this projection gets a gradient in the first
  step.
- Under ``elliptical`` the layer "before" Attn_1 is Attn_0 of the same layer. Layer 0 has no metric in either.
- Each of the two attentions draws its own dropout mask.

Differs from the paper's equation, as its experiment does: query, key and value of Attn_1 all come from z - F, not the
query alone.
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
    """The projections of the second attention and the gate.

    Args:
        hidden_size: width of the tokens.
        num_heads: number of heads.
        head_dim: width of a head.

    Raises:
        ValueError: if the heads side by side are not as wide as the tokens.
    """

    def __init__(self, hidden_size: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        if num_heads * head_dim != hidden_size:
            raise ValueError(
                "boosting 'gradient_boosted' subtracts the heads' output from the input: num_attention_heads * "
                f"head_dim must be hidden_size = {hidden_size}, got {num_heads} * {head_dim}"
            )
        self.num_heads, self.head_dim = num_heads, head_dim
        self.query = nn.Linear(hidden_size, hidden_size)
        self.key = nn.Linear(hidden_size, hidden_size)
        self.value = ZeroLinear(hidden_size, hidden_size)
        self.gate = nn.Linear(2 * hidden_size, hidden_size)

    def forward(
        self, hidden_states: torch.Tensor, output: torch.Tensor, weights: torch.Tensor | None, attend: Attention
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """F + g * c.

        Args:
            hidden_states: z, ``[batch, length, hidden_size]``.
            output: F, ``[batch, heads, length, head_dim]``.
            weights: the first map ``[batch, heads, length, key_length]`` or None.
            attend: the second attention.

        Returns:
            ``[batch, heads, length, head_dim]``, and both maps ``[batch, 2, heads, length, key_length]`` or None.
        """
        first = output.transpose(1, 2).flatten(2)
        shape = (*first.shape[:-1], self.num_heads, self.head_dim)
        residual = hidden_states - first
        query, key, value = (
            layer(residual).view(shape).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        correction, second_weights = attend(query, key, value)
        correction = correction.transpose(1, 2).flatten(2)
        gate = torch.sigmoid(self.gate(torch.cat((first, correction), dim=-1)))
        output = (first + gate * correction).view(shape).transpose(1, 2)
        if weights is None or second_weights is None:
            return output, None
        return output, torch.stack((weights, second_weights), dim=1)
