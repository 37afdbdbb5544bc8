"""Which back-end is fastest on a GPU for which kind of shape, as measured; the safe order where nothing was measured.

``imgproc-attn gpu-check --render`` writes the rows between the two marks from ``docs/gpu.json``. No torch here.
"""

from __future__ import annotations

import math

Row = tuple[str, bool, bool, int, int, tuple[str, ...]]
"""Kind, whether causal, whether gradients are wanted, tokens, width of a head, back-ends with the fastest first."""

KINDS = ("twicing", "several steps", "columns")
"""Two steps of twicing; more steps, or another booster; position or content columns beside the queries."""

# measured: begin
MEASURED: tuple[Row, ...] = ()
# measured: end

SAFE = ("sdpa", "blocked", "reference")
"""Where nothing was measured: what PyTorch itself tests on every GPU comes first."""

_FARTHEST_LENGTH, _FARTHEST_WIDTH = 4.0, 2.0


def cuda_order(kind: str, *, is_causal: bool, backward: bool, length: int, head_dim: int) -> tuple[str, ...]:
    """The back-ends to try on a CUDA device, in order: those of the nearest measured shape, then :data:`SAFE`.

    Args:
        kind: one of :data:`KINDS`.
        is_causal: whether query i sees keys j <= i only.
        backward: whether gradients are wanted.
        length: tokens, >= 1. A row counts up to four times as many, or as few.
        head_dim: width of a head, without columns, >= 1. A row counts up to twice as much, or as little.
    """
    near = []
    for row in MEASURED:
        if row[:3] != (kind, is_causal, backward):
            continue
        by_length, by_width = abs(math.log(row[3] / length)), abs(math.log(row[4] / head_dim))
        if by_length <= math.log(_FARTHEST_LENGTH) and by_width <= math.log(_FARTHEST_WIDTH):
            near.append((by_length + by_width, row[5]))
    order = min(near)[1] if near else ()
    return (*order, *(name for name in SAFE if name not in order))
