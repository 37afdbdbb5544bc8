"""Position kernels that a caller of ``filter_attention`` gives ready-made: feature columns, or a bias."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .kernel_content import HALF_DTYPES, left_columns, right_columns
from .kernel_position import ClassTokens


class FeaturePositions(NamedTuple):
    """<a_i, b_j>: feature columns of the caller.

    query_features: a, ``[batch or 1, heads or 1, length, c]``.
    key_features: b, ``[batch or 1, heads or 1, key_length, c]``.
    """

    query_features: torch.Tensor
    key_features: torch.Tensor

    @property
    def class_tokens(self) -> ClassTokens | None:
        """The features say everything."""
        return None

    def grid_logits(self, dtype: torch.dtype) -> torch.Tensor:
        """Dense, ``[batch or 1, heads or 1, length, key_length]`` in ``dtype``."""
        return torch.matmul(self.query_features.to(dtype), self.key_features.to(dtype).mT)

    def grid_columns(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The features themselves; split into exact pieces where ``dtype`` would round them."""
        features = (self.query_features, self.key_features)
        if dtype not in HALF_DTYPES or all(x.dtype == dtype for x in features):
            return self.query_features.to(dtype), self.key_features.to(dtype), None
        left, right = (x.float().transpose(-1, -2) for x in features)
        pieces = left_columns(left, dtype), right_columns(right, dtype)  # [..., c, length, 6]
        query, key = (x.transpose(-2, -3).flatten(-2) for x in pieces)
        return query, key, None

    def features_or_bias(self, dtype: torch.dtype) -> str:
        """Always columns."""
        return "features"


class KeyNumbers(FeaturePositions):
    """A number for each key: beside columns of ones, ``key_features`` are numbers, ``[..., key_length, 1]``."""

    __slots__ = ()


class BiasPositions(NamedTuple):
    """What the caller adds to the logits.

    bias: ``[batch or 1, heads or 1, length or 1, key_length or 1]``.
    """

    bias: torch.Tensor

    @property
    def class_tokens(self) -> ClassTokens | None:
        """The bias says everything."""
        return None

    def grid_logits(self, dtype: torch.dtype) -> torch.Tensor:
        """The bias in ``dtype``."""
        return self.bias.to(dtype)

    def grid_columns(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """There are none."""
        raise NotImplementedError

    def features_or_bias(self, dtype: torch.dtype) -> str:
        """Always a bias."""
        return "bias"
