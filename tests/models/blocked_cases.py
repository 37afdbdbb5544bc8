"""Random inputs and the dense truth that the tests of blocked attention share."""

from __future__ import annotations

import torch

from hf_imgproc_attn.models.boost_operators import BOOSTING
from tests.models.helpers import (
    dense_matrix,
)

BATCH, HEADS, WIDTH, VALUE_WIDTH, SCALE = 2, 3, 5, 4, 0.6
SMALL = {"block_rows": 8, "group_pairs": 2}
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(
    length: int, key_length: int | None = None, heads: int = HEADS, key_heads: int | None = None, batch: int = BATCH
) -> list[torch.Tensor]:
    """Query, key and value with logits of std 2 to 3."""
    key_length, key_heads = key_length or length, key_heads or heads
    return [
        2 * random(batch, heads, length, WIDTH, seed=0),
        random(batch, key_heads, key_length, WIDTH, seed=1),
        random(batch, key_heads, key_length, VALUE_WIDTH, seed=2),
    ]


def dense(
    tensors: list[torch.Tensor],
    *,
    attention_mask: torch.Tensor | None = None,
    is_causal: bool = False,
    boosting: str = "twicing",
    steps: int = 2,
    factors: torch.Tensor | None = None,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The same with a dense A, multiplied by ``factors`` (dropout), and the booster's streams."""
    query, key, value, *bias = tensors
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    logits = query @ key.mT * SCALE
    matrix = dense_matrix(logits + bias[0] if bias else logits, attention_mask, is_causal)
    matrix = matrix if factors is None else matrix * factors
    streams = []

    def extend(index: int, rows: torch.Tensor) -> torch.Tensor:
        streams.append(rows)
        return rows

    return BOOSTING[boosting](lambda stream: matrix @ stream, extend, value, value, steps), streams
