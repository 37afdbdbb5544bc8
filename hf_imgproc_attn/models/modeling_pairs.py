"""Classes of pairs of texts: one encoder reads both, each by itself, and the head compares the two vectors.

The retrieval task of the Long Range Arena (Tay et al. 2020, arXiv 2011.04006, section 2.2.2), with the head of its
public code and of Nyströmformer's (arXiv 2102.03902).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class PairHead(nn.Module):
    """``[2 * pairs, hidden_size]``, the texts of a pair one after the other -> logits ``[pairs, num_labels]``.

    Linear, ReLU, linear on ``[a, b, a * b, a - b]``; the inner width is ``intermediate_size``.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.dense = nn.Linear(4 * config.hidden_size, config.intermediate_size)
        self.out = nn.Linear(config.intermediate_size, config.num_labels)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        """See the class."""
        first, second = vectors[0::2], vectors[1::2]
        compared = torch.cat([first, second, first * second, first - second], dim=-1)
        return self.out(torch.relu(self.dense(compared)))


class PlainPooler(nn.Module):
    """In the place of BERT's pooler: the vector itself, without a layer and a tanh."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """``[texts, length, hidden_size]`` -> the first of each, ``[texts, hidden_size]``."""
        return tokens[:, 0]


def texts_of_pairs(inputs: dict[str, torch.Tensor | None]) -> tuple[torch.Tensor | None, ...]:
    """``[pairs, 2, length]`` -> ``[2 * pairs, length]``, of every input that is given.

    Args:
        inputs: name -> ids, mask, types, positions or embeddings; None where there are none.

    Raises:
        ValueError: for another shape.
    """
    for name, value in inputs.items():
        if value is not None and (value.ndim < 3 or value.shape[1] != 2):
            raise ValueError(
                f"{name} must have shape [pairs, 2, length, ...] with classifier_pairs, got {list(value.shape)}"
            )
    return tuple(None if value is None else value.flatten(0, 1) for value in inputs.values())
