"""What a layer makes of its own input beside query, key and value: the gate on its head output, a booster's factors.

    gate  headwise     out_i = 2 sigmoid(w . z_i) (A V)_i       one number per head and token
          elementwise  out_i = 2 sigmoid(W z_i) o (A V)_i       one number per feature and token

z is the input of the attention after its norm, out what the output projection reads (Qiu et al. 2025,
arXiv 2505.06708, gate G1). Differs from the paper by the factor 2, which the output projection absorbs: at W = 0 the
gate is exactly 1, so that a converted checkpoint starts as the function it was, with a gradient; a bias that makes
sigmoid(b) 1 to rounding has none. The gate multiplies after booster and feedback.
"""

from __future__ import annotations

import torch
from torch import nn

from .backend_call import is_transformed
from .boost_by_parts import GatedRows
from .boost_exclusive import is_for_parts
from .boost_gradient import ZeroLinear
from .kernel_content import working_dtype


def gated(output: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """2 sigmoid(logits) o output.

    Args:
        output: of the heads, ``[batch, heads, length, head_dim]``.
        logits: of the gate, ``[batch, heads, length, head_dim or 1]``.
    """
    if is_for_parts(output, logits) and not is_transformed((output, logits)):
        rows: torch.Tensor = GatedRows.apply(output, logits)
        return rows
    return output * (2.0 * torch.sigmoid(logits)).to(output.dtype)


class OutputGate(nn.Module):
    """A learned factor between 0 and 2 on the head output.

    Args:
        kind: ``"headwise"`` or ``"elementwise"``.
        hidden_size: width of the tokens.
        num_heads: number of heads.
        head_dim: width of a head.
    """

    def __init__(self, kind: str, hidden_size: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.width = 1 if kind == "headwise" else head_dim
        self.projection = nn.Linear(hidden_size, num_heads * self.width, bias=False)

    def forward(self, hidden_states: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """The gated output.

        Args:
            hidden_states: z, ``[batch, length, hidden_size]``.
            output: of the heads, ``[batch, heads, length, head_dim]``.
        """
        logits = self.projection(hidden_states).unflatten(-1, (-1, self.width)).transpose(1, 2)
        return gated(output, logits)


class TokenGains(ZeroLinear):
    """alpha and beta of ``dynamic_inversion``: 1 and 0 plus a projection of each token that starts at zero.

    Args:
        hidden_size: width of the tokens.
        num_heads: number of heads.
    """

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__(hidden_size, 2 * num_heads)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """``[batch, length, hidden_size]`` to ``[2, batch, heads, length, 1]`` in at least float32."""
        change = super().forward(hidden_states).unflatten(-1, (2, -1))
        gains = change.to(working_dtype(change.dtype)).permute(2, 0, 3, 1).unsqueeze(-1)
        return gains + torch.tensor([1.0, 0.0], dtype=gains.dtype, device=gains.device).view(2, 1, 1, 1, 1)
