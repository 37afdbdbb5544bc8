"""Boosting: operators on V that filter the residual too, written once for training, dense operators and decoding.

A is low-pass; stacking layers smooths detail away. Boosting applies A again to what A removed:

    none      A V
    twicing   (I - (I - A)^k) V,   k = 2: 2A - A^2      (Tukey 1977; Buehlmann, Yu 2003; arXiv 2503.00687, equation 8)
    diffusion A^k V
    sos       sum over m < k of (-1)^m (I - A)^m A V    (Romano, Elad 2015)

Every booster is a function of *how to apply A* and of the value, never of A itself, so that A^2 is not formed and the
same lines serve two ``scaled_dot_product_attention`` calls, a dense A, the operator itself (value = identity) and a
cache.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

Attend = Callable[[torch.Tensor], torch.Tensor]
"""Applies A: a stream ``[batch, heads, key_length, d]`` to ``[batch, heads, length, d]``."""

Extend = Callable[[int, torch.Tensor], torch.Tensor]
"""``extend(m, rows)`` appends the new tokens' rows ``[batch, heads, length, d]`` to stream m and returns all of it."""


def keep_rows(index: int, rows: torch.Tensor) -> torch.Tensor:
    """The :data:`Extend` of a call without a cache: the new rows are all rows."""
    return rows


def plain(attend: Attend, extend: Extend, value: torch.Tensor, full_value: torch.Tensor, steps: int) -> torch.Tensor:
    """A V; ``steps`` has no meaning here."""
    return attend(full_value)


def twicing(attend: Attend, extend: Extend, value: torch.Tensor, full_value: torch.Tensor, steps: int) -> torch.Tensor:
    """(I - (I - A)^k) V by the recurrence r = V, out = 0; k times: s = A r, out += s, r -= s.

    Row j of a residual never changes once computed (A is causal where there is a cache), so decoding caches the k - 1
    residual streams and stays exact.

    Args:
        attend: applies A.
        extend: stores the residual rows of the new tokens.
        value: ``[batch, heads, length, d]``, the new tokens' rows of V.
        full_value: ``[batch, heads, key_length, d]``, all of V.
        steps: k >= 1.

    Returns:
        ``[batch, heads, length, d]``.
    """
    smooth = attend(full_value)
    out, residual = smooth, value
    for index in range(steps - 1):
        residual = residual - smooth
        smooth = attend(extend(index, residual))
        out = out + smooth
    return out


def diffusion(
    attend: Attend, extend: Extend, value: torch.Tensor, full_value: torch.Tensor, steps: int
) -> torch.Tensor:
    """A^k V; arguments as of :func:`twicing`."""
    out = attend(full_value)
    for index in range(steps - 1):
        out = attend(extend(index, out))
    return out


def sos(attend: Attend, extend: Extend, value: torch.Tensor, full_value: torch.Tensor, steps: int) -> torch.Tensor:
    """Strengthen, operate, subtract: u_m = A (V + u_(m-1)) - u_(m-1), u_0 = 0; arguments as of :func:`twicing`.

    Two steps are A^2. The limit, (2I - A)^-1 A V, is reached where the spectral radius of A - I is below 1.
    """
    out = attend(full_value)
    for index in range(steps - 1):
        out = attend(extend(index, value + out)) - out
    return out


BOOSTING = {"none": plain, "twicing": twicing, "diffusion": diffusion, "sos": sos}


def extra_streams(boosting: str, steps: int) -> int:
    """How many streams a cache has to keep beside K and V."""
    return steps - 1 if boosting in ("twicing", "diffusion", "sos") else 0
