"""Terms of the logits that are a number for each query and one for each key: kernels look them up, and form no bias.

The position kernel ``forget`` is c_i - c_j, and ``sinkhorn`` is a softmax with a number for each key. As columns
beside half-precision queries and keys they would lose the differences of large sums; in float32 they keep them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..models.backend_call import FilterCall
from ..models.kernel_forget import ForgetPositions
from ..models.kernel_given import KeyNumbers
from ..models.kernel_position import Positions


class TokenNumbers(NamedTuple):
    """r_i + c_j, in at least float32.

    queries: r, ``[batch or 1, heads or 1, length, 1]``, or None where it is 0.
    keys: c, ``[batch or 1, heads or 1, key_length, 1]``.
    """

    queries: torch.Tensor | None
    keys: torch.Tensor


def numbers_of(term: Positions) -> TokenNumbers | None:
    """A term as numbers of tokens, or None for one that is something else."""
    if isinstance(term, ForgetPositions):
        return TokenNumbers(term.query, -term.key)
    return TokenNumbers(None, term.key_features) if isinstance(term, KeyNumbers) else None


def split_numbers(call: FilterCall) -> tuple[list[TokenNumbers], FilterCall]:
    """The terms that are numbers of tokens, and the call without them."""
    found = [(term, numbers_of(term)) for term in call.positions]
    rest = tuple(term for term, numbers in found if numbers is None)
    return [numbers for _, numbers in found if numbers is not None], call._replace(positions=rest)
