"""The elliptical metric: how much each feature of a head moved from the last layer to this one, as a diagonal M.

Elliptical attention (Nielsen 2024) weighs the features of the content kernel, as anisotropic non-local means does:
q_i^T M_i k_j with D = V_l - V_{l-1} (the projected values of a head in this and in the immediately preceding layer),
w_i = mean of |D_j| over the tokens j that query i sees, M_i = diag(w_i / max w_i). No gradient flows through M.
Layer 0 has M = I, and so has a row whose w is 0 throughout (V_l = V_{l-1} would be 0/0).

Which tokens: all but padding for images, the class token included, as in the authors' vision code; for text those up
to i, a running mean. Differs from the paper: its language code averages over future tokens too, so that changing the
last token changes earlier outputs, and drops 1/sqrt(d) where M is used. Neither is reproduced here.
"""

from __future__ import annotations

import torch

from .boost_operators import Extend
from .kernel_content import working_dtype
from .visibility import visible


@torch.no_grad()
def elliptical_metric(
    value: torch.Tensor,
    previous_value: torch.Tensor,
    *,
    attention_mask: torch.Tensor | None = None,
    token_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    extend: Extend,
) -> torch.Tensor:
    """The diagonal of M_i, between 0 and 1 with a 1 in every row; w is a sum, since its count cancels in w / max w.

    Args:
        value: V_l of the new tokens, ``[batch, heads, length, head_dim]``.
        previous_value: V_{l-1} of the new tokens, same shape.
        attention_mask: what each row sees, as in ``AttentionFilter``. Looked at only without ``token_mask``.
        token_mask: ``[batch or 1, length]``, which new tokens are no padding, where that is all that a mask hides
            (beside later tokens, if causal); running sums are enough then.
        is_causal: whether a row sees no later token; without ``token_mask`` used where there is no mask.
        extend: stores |D| of the new tokens as stream 0 of a cache and returns that of all tokens. Rows rather than
            their prefix sums: no mask, whatever it shows, needs a difference of large sums then.

    Returns:
        ``[batch, heads, length or 1, head_dim]`` in at least float32.
    """
    work = working_dtype(value.dtype)
    moved = (value.to(work) - previous_value.to(work)).abs()
    if token_mask is not None:
        # A product would make NaN of what overflowed in padding.
        moved = moved.masked_fill(~token_mask[:, None, :, None], 0.0)
    every = extend(0, moved)
    if token_mask is None and attention_mask is not None:
        allowed, _ = visible(attention_mask, False, moved.shape[-2], every.shape[-2], value.device)
        with torch.autocast(value.device.type, enabled=False):
            weight = every.sum(-2, keepdim=True) if allowed is None else _sum_of_visible(every, allowed)
    elif is_causal:
        weight = moved.cumsum(-2) + every[..., : -moved.shape[-2], :].sum(-2, keepdim=True)
    else:
        weight = every.sum(-2, keepdim=True)
    largest = weight.amax(-1, keepdim=True)
    return torch.where(largest > 0, weight / largest, torch.ones_like(weight))


def _sum_of_visible(rows: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """Sums over the keys that each query sees; what no query of a sample sees may be infinite or NaN."""
    seen = allowed.any(-2).unsqueeze(-1)
    return torch.matmul(allowed.to(rows.dtype), rows.masked_fill(~seen, 0.0))
