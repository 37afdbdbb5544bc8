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

from .backend_call import without_autocast
from .cache_streams import Streams
from .kernel_content import working_dtype
from .visibility import Visibility


@torch.no_grad()
def elliptical_metric(
    value: torch.Tensor, previous_value: torch.Tensor, visibility: Visibility, streams: Streams
) -> torch.Tensor:
    """The diagonal of M_i, between 0 and 1 with a 1 in every row; w is a sum, since its count cancels in w / max w.

    Args:
        value: V_l of the new tokens, ``[batch, heads, length, head_dim]``.
        previous_value: V_{l-1} of the new tokens, same shape.
        visibility: who sees whom. Where it hides only padding and later tokens, running sums are enough.
        streams: keep |D| of every token. Rows rather than their prefix sums: arbitrary masks would otherwise need
            differences of large sums, which cancel.

    Returns:
        ``[batch, heads, length or 1, head_dim]`` in at least float32.
    """
    dtype, length = working_dtype(value.dtype), visibility.length
    moved = (value.to(dtype) - previous_value.to(dtype)).abs()
    all_moved = streams.append("metric", moved)
    if visibility.hides_only_padding and visibility.keys is not None:
        # Padding may hold inf, which would become NaN if it were multiplied by 0.
        all_moved = all_moved.masked_fill(~visibility.keys.transpose(-1, -2), 0.0)
    if not visibility.hides_only_padding:
        allowed = visibility.allowed(value.device)
        with without_autocast(value.device.type):
            weight = all_moved.sum(-2, keepdim=True) if allowed is None else _sum_of_visible(all_moved, allowed)
    elif visibility.hides_later_keys:
        past = all_moved.shape[-2] - length
        weight = all_moved[..., past:, :].cumsum(-2) + all_moved[..., :past, :].sum(-2, keepdim=True)
    else:
        weight = all_moved.sum(-2, keepdim=True)
    largest = weight.amax(-1, keepdim=True)
    return torch.where(largest > 0, weight / largest, torch.ones_like(weight))


def _sum_of_visible(rows: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """Sums over the keys that each query sees. Rows that no query of a sample sees may be infinite or NaN."""
    seen = allowed.any(-2).unsqueeze(-1)
    return torch.matmul(allowed.to(rows.dtype), rows.masked_fill(~seen, 0.0))
