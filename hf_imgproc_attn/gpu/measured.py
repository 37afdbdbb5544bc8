"""Which algorithm of the fused kernels is fastest for twicing, as measured, device by device.

``imgproc-attn gpu-check --render`` writes the rows between the two marks from ``docs/gpu.json``. A device that is not
in the table gets no algorithm that was only shown to be right. No torch here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Row = tuple[str, bool, bool, int, int, int, tuple[str, ...]]
"""The device's name, whether causal, whether it is for gradients, batch times heads, tokens, width of a head, and the
algorithms, the fastest first: those of ``checks.ALGORITHMS``, or ``two_calls`` and the name of a flash
implementation; see ``flash``."""

# measured: begin
MEASURED: tuple[Row, ...] = ()
# measured: end

_FARTHEST = (2.0, 4.0, 2.0)
"""How many times more or less batch times heads, tokens and width may be than in the row that is used for them."""


def measured_order(
    device: str, shape: Sequence[int], *, is_causal: bool, backward: bool, rows: Sequence[Row] | None = None
) -> tuple[str, ...]:
    """The algorithms of the nearest measured shape, fastest first; empty where nothing near was measured.

    Args:
        device: its name, as PyTorch gives it.
        shape: ``[batch, heads, length, head_dim]``.
        is_causal: whether query i sees keys j <= i only.
        backward: whether it is for the gradients.
        rows: the table; None: :data:`MEASURED`.
    """
    batch, heads, length, head_dim = shape
    sizes, near = (batch * heads, length, head_dim), []
    for row in MEASURED if rows is None else rows:
        if row[:3] != (device, is_causal, backward):
            continue
        far = [abs(math.log(there / max(here, 1))) for there, here in zip(row[3:6], sizes, strict=True)]
        if all(distance <= math.log(farthest) for distance, farthest in zip(far, _FARTHEST, strict=True)):
            near.append((sum(far), row[6]))
    return min(near)[1] if near else ()
