"""Boosting: operators on V that filter the residual too, written once for training, dense operators and decoding.

A is low-pass; stacking layers smooths detail away. Boosting applies A again to what A removed:

    none       A V
    twicing    (I - (I - A)^k) V,   k = 2: 2A - A^2   (Tukey 1977; Buehlmann, Yu 2003; arXiv 2503.00687, equation 8)
    learned    (A + gamma A(I - A)) V, one gamma per head, 1 at the start: equal to twicing
    diffusion  A^k V
    sos        u_k = A(V + u_{k-1}) - u_{k-1}, u_0 = 0  (Romano, Elad 2015);   k = 2: A^2

Others apply A once and finish row by row, at the cost of plain attention:

    inversion  alpha A V + beta (I - A) V, 1 and 0 at the start: plain  (FDAM, arXiv 2507.12006)
    exclusive  A V without its projection on v_i  (arXiv 2603.09078)

``inversion`` has one alpha and beta per head, ``dynamic_inversion`` one per head and token, linear in the layer's
input (*choice*: 1 and 0 are added to a projection that starts at zero).

Osher's iterative regularisation (2005) is k-step twicing, since A is fixed and linear: an alias. ``gradient_boosted``
is no operator on V, ``delta`` and what looks at single weights of A no functions of how to apply A: they have files of
their own. ``sos`` smooths *more* than A does: in its limit (2I - A)^-1 A an eigenvalue l of A in [0, 1] becomes
l / (2 - l), which is at most l. It reaches the limit only if the spectral radius of A - I is below 1, as for symmetric
positive kernels, not for attention in general.

Every booster is a function of *how to apply A* and of the value, never of A itself, so that A^2 is not formed and the
same lines serve two ``scaled_dot_product_attention`` calls, a dense A, the operator itself (value = identity) and a
cache. With a cache A is causal, so row j of what A is applied to never changes once it is computed. Decoding caches
these rows too, as :func:`extra_streams` streams beside V, and stays exact.

Arguments of every booster:
    attend: applies A.
    extend: stores the rows of the new tokens in a stream.
    value: ``[batch, heads, length, d]``, the new tokens' rows of V.
    full_value: ``[batch, heads, key_length, d]``, all of V.
    steps: k >= 1; ``plain`` and ``learned`` ignore it.
    gain: gamma of ``learned``, ``[heads, 1, 1]`` in at least float32, or alpha and beta of ``inversion``,
        ``[2, heads, 1, 1]`` or ``[2, batch, heads, length, 1]``; the others ignore it.
Each returns ``[batch, heads, length, d]``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .kernel_content import working_dtype

Attend = Callable[[torch.Tensor], torch.Tensor]
"""Applies A: a stream ``[batch, heads, key_length, d]`` to ``[batch, heads, length, d]``."""

Extend = Callable[[int, torch.Tensor], torch.Tensor]
"""``extend(m, rows)`` appends the new tokens' rows ``[batch, heads, length, d]`` to stream m and returns all of it."""


def keep_rows(index: int, rows: torch.Tensor) -> torch.Tensor:
    """The :data:`Extend` of a call without a cache: the new rows are all rows."""
    return rows


def plain(
    attend: Attend,
    extend: Extend,
    value: torch.Tensor,
    full_value: torch.Tensor,
    steps: int,
    gain: torch.Tensor | None = None,
) -> torch.Tensor:
    """A V."""
    return attend(full_value)


def twicing(
    attend: Attend,
    extend: Extend,
    value: torch.Tensor,
    full_value: torch.Tensor,
    steps: int,
    gain: torch.Tensor | None = None,
) -> torch.Tensor:
    """(I - (I - A)^k) V by the recurrence r = V, out = 0; k times: s = A r, out += s, r -= s."""
    smooth = attend(full_value)
    out, residual = smooth, value
    for index in range(steps - 1):
        residual = residual - smooth
        smooth = attend(extend(index, residual))
        out = out + smooth
    return out


def learned(
    attend: Attend,
    extend: Extend,
    value: torch.Tensor,
    full_value: torch.Tensor,
    steps: int,
    gain: torch.Tensor | None = None,
) -> torch.Tensor:
    """(A + gamma A(I - A)) V as A V + gamma A r with the residual r = V - A V; without a gain gamma is 1."""
    smooth = attend(full_value)
    correction = attend(extend(0, value - smooth))
    # The product is in the gain's precision: near 1 half precision would round gamma away.
    return smooth + (correction if gain is None else (gain * correction).to(smooth.dtype))


def diffusion(
    attend: Attend,
    extend: Extend,
    value: torch.Tensor,
    full_value: torch.Tensor,
    steps: int,
    gain: torch.Tensor | None = None,
) -> torch.Tensor:
    """A^k V: the filter applied k times."""
    out = attend(full_value)
    for index in range(steps - 1):
        out = attend(extend(index, out))
    return out


def sos(
    attend: Attend,
    extend: Extend,
    value: torch.Tensor,
    full_value: torch.Tensor,
    steps: int,
    gain: torch.Tensor | None = None,
) -> torch.Tensor:
    """u_k = A(V + u_{k-1}) - u_{k-1} with u_0 = 0, which is sum_{m<k} (-1)^m (I - A)^m A V."""
    out = attend(full_value)
    for index in range(steps - 1):
        out = attend(extend(index, value + out)) - out
    return out


def inversion(
    attend: Attend,
    extend: Extend,
    value: torch.Tensor,
    full_value: torch.Tensor,
    steps: int,
    gain: torch.Tensor | None = None,
) -> torch.Tensor:
    """alpha A V + beta (V - A V): what the filter passes, and what it removes; without a gain A V."""
    smooth = attend(full_value)
    if gain is None:
        return smooth
    alpha, beta = gain.unbind(0)
    # As (alpha - beta) A V + beta V it makes half the temporaries, and gradients, of the size of the values.
    return torch.addcmul((alpha - beta) * smooth, beta, value.to(smooth.dtype)).to(smooth.dtype)


def exclusive(
    attend: Attend,
    extend: Extend,
    value: torch.Tensor,
    full_value: torch.Tensor,
    steps: int,
    gain: torch.Tensor | None = None,
) -> torch.Tensor:
    """s_i - v_i (s_i . v_i) / |v_i|^2 with s = A V: orthogonal to the token's own value; s_i where that is 0."""
    smooth = attend(full_value)
    working = working_dtype(smooth.dtype)
    rows, own = smooth.to(working), value.to(working)
    # A number a row changes no direction, and squares of small values would underflow.
    largest = own.detach().abs().amax(-1, keepdim=True)
    direction = own / largest.masked_fill(largest == 0.0, 1.0)
    length = direction.square().sum(-1, keepdim=True).clamp(min=0.5)  # at least 1 but where the value is 0
    share = (rows * direction).sum(-1, keepdim=True) / length
    return torch.addcmul(rows, direction, share, value=-1.0).to(smooth.dtype)


BOOSTING = {
    "none": plain,
    "twicing": twicing,
    "learned": learned,
    "diffusion": diffusion,
    "sos": sos,
    "inversion": inversion,
    "dynamic_inversion": inversion,
    "exclusive": exclusive,
}
"""The boosters that are functions of how to apply A; each but ``exclusive`` is linear in V."""

SEQUENTIAL = ("delta",)
"""Boosters that are linear in V and correct row after row, which is no function of how to apply A; one stream each."""

ONE_PASS = ("inversion", "dynamic_inversion", "exclusive")
"""Boosters that apply A once and finish row by row: any back-end computes A V for them."""

WITH_FACTORS = ("inversion", "dynamic_inversion")
"""Boosters that mean nothing without the factors that a layer has: without a gain they are A V."""

NOT_LINEAR = ("exclusive",)
"""Boosters that are no operator on V."""


def operator_on_value(boosting: str) -> str:
    """What a call names a layer's booster; ``none`` where it has several maps, or changes A itself."""
    return boosting if boosting in (*BOOSTING, *SEQUENTIAL) else "none"


def extra_streams(boosting: str, steps: int) -> int:
    """How many streams a cache has to keep beside K and V.

    One for each application of A after the first, and keys and values of each round of ``gradient_boosted`` after its
    first.
    """
    if boosting in ("twicing", "diffusion", "sos"):
        return steps - 1
    return {"learned": 1, "delta": 1, "gradient_boosted": 2 * (steps - 1)}.get(boosting, 0)
