"""Boosters that look at the weights of A one by one, and so are no function of how to apply A.

    local_linear  sum_j a_ij (1 + m_i - s_ij) v_j,   s_ij = r_i . k_j,   m_i = sum_j a_ij s_ij,   r = W_R z
    robust        u <- sum_j w_ij v_j / sum_j w_ij,  w_ij = a_ij rho'(d) / d,  d = |v_j - u_i|,  t times from u = A V

*Local linear attention.* A V is the local constant (Nadaraya-Watson) estimate. The weighted least-squares fit of a
plane v_i + B_i (k - q_i) to the values, at the query, is A V minus the weighted covariance of keys and values times
r_i = C_i^-1 (mean_i k - q_i), C_i the weighted covariance of the keys (Takeda, Farsiu, Milanfar 2007). Here r_i is
learned in place of the solve (Parallax, arXiv 2605.29157): one pass, nothing that could be singular (a single visible
key, keys on a line), and a start at plain attention, W_R = 0. Keys are what the content kernel compares, turned and of
length 1 where that turns or normalises them. *Choice*: where the rows of A do not sum to 1 (dropout, normalisations
other than softmax) m_i is the weighted mean, so that a shift of all keys changes nothing; 0 in rows without weight.

*Robust attention* (ProTransformer, arXiv 2410.23182). A V is the weighted mean of the values; the point with the
smallest sum of a_ij rho(|v_j - u_i|) is less led astray by few values that are far from the others. Each step is one
of iteratively reweighted least squares, and a bilateral filter in the space of values. Nothing is learned.

    huber  rho'(d)/d = min(1, D/d)               D the threshold, 1 by default
    l1     rho'(d)/d = 1/d
    mcp    rho'(d)/d = max(1/d - 1/D, 0)         values farther than D, 4 by default, have no weight at all

*Choices*: distances below 0.01 count as 0.01 (single precision tells no smaller ones apart). Rows that have next to no
value within D take a step of ``l1``, which brings them there: from a mean that a far value has moved, all may be far.
Where the rows of A do not sum to 1, A is divided by their sums first, and the output multiplied by them. A far value
moves a row by a/(1 - a) of what it did, with every step, where a < 1/2 is its weight.

All of them finish row by row from a row's weights. The functions here are dense, on all rows or on some;
``backend_blocked_rows`` is their fast form.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from .boost_gradient import ZeroLinear
from .kernel_content import working_dtype
from .spec_axes import ROBUST_PENALTIES, ROBUST_THRESHOLDS, LayerSpec
from .visibility import Visibility

Turn = Callable[[torch.Tensor], torch.Tensor]
"""Queries ``[batch, heads, length, head_dim]`` to queries that are turned by their places, or as they are."""


class LocalLinear(NamedTuple):
    """Local linear attention.

    slope: r, ``[batch, heads, length, head_dim]``, finite in rows that see no key.
    """

    slope: torch.Tensor

    @property
    def name(self) -> str:
        """Its value of ``boosting``."""
        return "local_linear"

    @property
    def is_linear(self) -> bool:
        """Whether this is an operator on V."""
        return True

    def apply(self, matrix: torch.Tensor, rows: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """The output ``[batch, heads, length, d]``.

        Args:
            matrix: A after dropout, ``[batch, heads, length, key_length]`` in at least float32.
            rows: V, ``[batch, heads, key_length, d]``.
            key: ``[batch, heads, key_length, head_dim]``; of both no row that no query sees may be NaN.
        """
        return torch.matmul(tilted(matrix, self.slope, key), rows)

    def of_rows(self, block: slice) -> LocalLinear:
        """The same for some queries."""
        return LocalLinear(self.slope[..., block, :])

    def of_heads(self, samples: slice, heads: slice) -> LocalLinear:
        """The same for some samples and heads."""
        return LocalLinear(self.slope[samples, heads])


class Robust(NamedTuple):
    """Robust attention.

    steps: t >= 1.
    inner: distances below count as this.
    cutoff: values farther than this have no weight; None: all have some.
    """

    steps: int
    inner: float
    cutoff: float | None

    @classmethod
    def of(cls, steps: int, penalty: str | None = None, threshold: float | None = None) -> Robust:
        """By the names of a configuration; None: the defaults."""
        name = penalty or ROBUST_PENALTIES[0]
        distance = threshold or ROBUST_THRESHOLDS.get(name)
        if name == "huber":
            return cls(steps, float(distance or 1.0), None)
        return cls(steps, SMALLEST_DISTANCE, distance if name == "mcp" else None)

    @property
    def name(self) -> str:
        """Its value of ``boosting``."""
        return "robust"

    @property
    def is_linear(self) -> bool:
        """Whether this is an operator on V."""
        return False

    def apply(self, matrix: torch.Tensor, rows: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """The output; arguments as of :meth:`LocalLinear.apply`."""
        mass = matrix.sum(-1, keepdim=True)
        divisor, empty = _divisor(mass)
        weights = (matrix / divisor).masked_fill(empty, 0.0)
        centre, lengths = torch.matmul(weights, rows), rows.square().sum(-1).unsqueeze(-2)
        for _ in range(self.steps):
            squares = lengths + centre.square().sum(-1, keepdim=True) - 2.0 * torch.matmul(centre, rows.mT)
            shares = weights * self.factors(squares, weights)
            total = shares.sum(-1, keepdim=True)
            # Rows without any weight stay where they are.
            lost = total == 0.0
            step = torch.matmul(shares, rows) / total.masked_fill(lost, 1.0)
            centre = torch.where(lost, centre, step)
        return mass * centre

    def factors(self, squares: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """rho'(d)/d, up to a number a row, of squared distances and the weights that it is multiplied by."""
        near = squares.clamp(min=self.inner**2).rsqrt()
        if self.cutoff is None:
            return near
        within = (near - 1.0 / self.cutoff).relu()
        far = (weights * within).sum(-1, keepdim=True) * self.cutoff < LEAST_WITHIN
        return torch.where(far, near, within)

    def of_rows(self, block: slice) -> Robust:
        """The same for some queries."""
        return self

    def of_heads(self, samples: slice, heads: slice) -> Robust:
        """The same for some samples and heads."""
        return self


SMALLEST_DISTANCE = 1e-2
LEAST_WITHIN = 1e-6
"""Of a row's weight, in units of D/d - 1."""

ByWeights = LocalLinear | Robust
"""What a booster of this kind needs beside the filter."""


class RobustBooster(nn.Module):
    """``robust``, which has no parameter.

    Args:
        booster: see there.
    """

    def __init__(self, booster: Robust) -> None:
        super().__init__()
        self.booster = booster

    def forward(self, hidden_states: torch.Tensor | None, visibility: Visibility, turn: Turn) -> Robust:
        """What the booster needs of a call, whatever that is; arguments as of :class:`LocalSlopes`."""
        return self.booster


class LocalSlopes(nn.Module):
    """r of ``local_linear``: a projection of each token that starts at zero.

    Args:
        hidden_size: width of the tokens.
        num_heads: number of heads.
        head_dim: width of a head.
    """

    def __init__(self, hidden_size: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.slope = ZeroLinear(hidden_size, num_heads * head_dim, bias=False)

    def forward(self, hidden_states: torch.Tensor | None, visibility: Visibility, turn: Turn) -> LocalLinear:
        """What the booster needs of a call.

        Args:
            hidden_states: what query and key are projected from, ``[batch, length, hidden_size]``.
            visibility: who sees whom.
            turn: what the position kernel does to queries.
        """
        if hidden_states is None:
            raise ValueError("inputs.hidden_states must be given for boosting='local_linear', got None")
        slope = self.slope(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        return LocalLinear(visibility.clean_queries(turn(slope)))


def weight_booster(spec: LayerSpec, config: Any, head_dim: int) -> LocalSlopes | RobustBooster | None:
    """The module of a layer's booster, or None where it looks at no single weights.

    Args:
        spec: the layer's axes.
        config: the model's configuration.
        head_dim: width of a head.
    """
    if spec.boosting == "local_linear":
        return LocalSlopes(config.hidden_size, config.num_attention_heads, head_dim)
    if spec.boosting == "robust":
        return RobustBooster(Robust.of(spec.boosting_steps, config.robust_penalty, config.robust_threshold))
    return None


def tilted(matrix: torch.Tensor, slope: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """The operator of ``local_linear``: a_ij (1 + m_i - s_ij); its rows sum to what those of A sum to.

    Args:
        matrix: A, ``[batch, heads, length, key_length]``, in at least float32.
        slope: r, ``[batch, heads, length, head_dim]``.
        key: ``[batch, heads, key_length, head_dim]``, 0 where no query sees it.
    """
    dtype = working_dtype(matrix.dtype)
    shares = torch.matmul(slope.to(dtype), key.to(dtype).mT)
    mean = (matrix * shares).sum(-1, keepdim=True) / _divisor(matrix.sum(-1, keepdim=True))[0]
    return matrix * (1.0 + mean - shares)


def _divisor(mass: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of rows to divide by, and which rows count as empty, whose sums are 1 there: 1 / mass may be infinite."""
    limits = torch.finfo(mass.dtype)
    empty = mass < limits.tiny / limits.eps
    return mass.masked_fill(empty, 1.0), empty
