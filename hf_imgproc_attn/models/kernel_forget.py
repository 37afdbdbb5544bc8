"""The position kernel ``forget``: every token multiplies the weight of what lies before it by a factor of its own.

    logits_ij + c_i - c_j,   c_i = sum_{m <= i} log f_m,   f_m = sigmoid(w . z_m + b), one per head

(Lin et al. 2025, forgetting transformer, arXiv 2503.02130). What token i sees of token j has passed the gates of all
tokens after j. z is the layer's input after its norm. The term is an inner product of two columns. It needs a causal
mask. Padding has f = 1, so that a text is filtered as it is alone. A cache keeps log f of every token: sums are made
anew at each step, which cropping and reordering leave exact.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from .cache_streams import Streams
from .kernel_content import HALF_DTYPES, working_dtype
from .kernel_position import ClassTokens
from .visibility import Visibility

FORGET_STREAM = "forget"
"""Name of the stream that keeps log f."""


class ForgetPositions(NamedTuple):
    """c_i - c_j.

    query: c of the new tokens, ``[batch, heads, length, 1]``, in at least float32.
    key: c of all tokens, ``[batch, heads, key_length, 1]``.
    """

    query: torch.Tensor
    key: torch.Tensor

    @property
    def class_tokens(self) -> ClassTokens | None:
        """Every token has a gate."""
        return None

    def grid_logits(self, dtype: torch.dtype) -> torch.Tensor:
        """Dense, ``[batch, heads, length, key_length]`` in ``dtype``."""
        return (self.query - self.key.mT).to(dtype)

    def grid_columns(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """[c_i, 1] and [1, -c_j], which lack nothing."""
        left = torch.cat((self.query, torch.ones_like(self.query)), dim=-1)
        right = torch.cat((torch.ones_like(self.key), -self.key), dim=-1)
        return left.to(dtype), right.to(dtype), None

    def features_or_bias(self, dtype: torch.dtype) -> str:
        """Columns but in half precision, where sums over many tokens would lose their differences."""
        return "bias" if dtype in HALF_DTYPES else "features"


class ForgetGates(nn.Linear):
    """w and b of the gates.

    Args:
        hidden_size: width of the tokens.
        num_heads: number of heads.
    """

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__(hidden_size, num_heads)

    def positions(self, hidden_states: torch.Tensor, visibility: Visibility, streams: Streams) -> ForgetPositions:
        """The term of the logits.

        Args:
            hidden_states: z of the new tokens, ``[batch, length, hidden_size]``.
            visibility: who sees whom.
            streams: the layer's part of a cache.
        """
        logits = self(hidden_states)
        kept = nn.functional.logsigmoid(logits.to(working_dtype(logits.dtype))).transpose(1, 2).unsqueeze(-1)
        total = visibility.clean_keys(streams.append(FORGET_STREAM, kept)).cumsum(-2)
        # Of the queries' own tokens: in a cache of fixed size they are not the last ones. A softmax would not notice.
        places = streams.own_places(visibility.length, visibility.key_length)
        own = total[..., places, :] if isinstance(places, slice) else total.index_select(-2, places)
        return ForgetPositions(own, total)
