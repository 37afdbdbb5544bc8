"""What the filter of each head does, summed over its rows in blocks: no matrix of length x length is formed.

With A the filter of one head (rows sum to 1), l its logits, V(i) the keys that query i sees, and means over the rows
of real tokens of all samples:

    entropy            mean_i  -sum_j A_ij log A_ij                                    nats; A_ij uniform: log |V(i)|
    logit_std          sqrt( mean_i  Var_{j in V(i)} l_ij )                            what the softmax sees
    content_bandwidth  sqrt( 2 / (mean_i |s q_i| mean_j |k_j|) ), s = 2/h_y^2          on the unit sphere
    mean_distance_sq   mean_i  sum_j A_ij |p_i - p_j|^2 / sum_j A_ij                   i, j tokens that have a place
    position_bandwidth sqrt( 2 mean_distance_sq / axes )                               the Gaussian with this moment
    received_j         sum_i A_ij  (A^T 1)
    sink_weight        mean_i  sum_{j special} A_ij                                    i no special token
    sink_value_ratio   mean |v_j| over special j / mean |v_j| over the others

The second moment of exp(-d^2 / h^2) over an unbounded grid is h^2/2 an axis, which gives position_bandwidth. The same
holds of the content on the unit sphere: exp(|q| |k| s cos) = exp(-|q^ - k^|^2 / h^2) up to a constant a row, with
2/h^2 = |q| |k| s (arXiv 2506.10371: attention is a bilateral filter on normalised vectors).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..models.backend_call import FilterCall
from .rows import BLOCK_SCORES, Rows, filter_rows


class Tokens(NamedTuple):
    """What is known of the tokens beside their vectors.

    real: boolean ``[batch, length]``, False for padding; None: all are real.
    special: how many leading tokens are class or register tokens; for text 1, the first token, where sinks are.
    grid: rows and columns of patches; None: the tokens stand in a line, or their places are not known.
    has_places: whether distances between tokens mean anything.
    """

    real: torch.Tensor | None = None
    special: int = 1
    grid: tuple[int, int] | None = None
    has_places: bool = True

    @property
    def axes(self) -> int:
        """Dimensions of the places."""
        return 1 if self.grid is None else 2

    def first_real(self, batch: int, length: int) -> torch.Tensor:
        """The index of the first real token of each sample, ``[batch]``."""
        if self.real is None:
            return torch.zeros(batch, dtype=torch.long)
        return self.real.long().argmax(-1)

    def is_special(self, batch: int, length: int, device: torch.device) -> torch.Tensor:
        """Boolean ``[batch, length]``."""
        index = torch.arange(length, device=device)[None]
        first = self.first_real(batch, length).to(device)[:, None]
        return (index >= first) & (index < first + self.special)

    def places(self, length: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """``[length, axes]`` in index or patch units; leading tokens off the grid are at 0."""
        if self.grid is None:
            return torch.arange(length, device=device, dtype=dtype)[:, None]
        rows, columns = (torch.arange(side, device=device, dtype=dtype) for side in self.grid)
        grid = torch.cartesian_prod(rows, columns)
        return torch.nn.functional.pad(grid, (0, 0, length - grid.shape[0], 0))


class HeadSums(NamedTuple):
    """Measures of the heads of one layer, each ``[heads]`` in float64, and ``received`` ``[heads, length]``."""

    entropy: torch.Tensor
    entropy_share: torch.Tensor
    """Of that of uniform weights on the keys that are seen."""
    logit_std: torch.Tensor
    content_bandwidth: torch.Tensor
    mean_distance_sq: torch.Tensor
    position_bandwidth: torch.Tensor
    received: torch.Tensor
    """A^T 1, mean over samples."""
    sink_weight: torch.Tensor
    sink_value_ratio: torch.Tensor


def measure_heads(call: FilterCall, tokens: Tokens, scores: int = BLOCK_SCORES) -> HeadSums:
    """Measure the filter of each head of one call.

    Args:
        call: the call; queries and keys ``[batch, heads, length, head_dim]``.
        tokens: what is known of its tokens.
        scores: the most weights to hold at a time.
    """
    batch, heads, length, _ = call.query.shape
    device = call.query.device
    real = tokens.real if tokens.real is not None else torch.ones(batch, length, dtype=torch.bool)
    real = real.to(device)
    special = tokens.is_special(batch, length, device) & real
    sums = _Sums(heads, length, device)
    for rows in filter_rows(call, scores):
        sums.add(rows, real, special, tokens)
    count = real.sum().item()
    others = (real & ~special).sum().item()
    distance = sums.distance / sums.placed_rows.clamp(min=1) if tokens.has_places else sums.distance * torch.nan
    return HeadSums(
        sums.entropy / count,
        sums.share / sums.choices.clamp(min=1),
        (sums.variance / count).sqrt(),
        _content_bandwidth(call, real),
        distance,
        (2.0 * distance / tokens.axes).sqrt(),
        sums.received / batch,
        sums.sink / max(others, 1),
        _value_ratio(call, real, special),
    )


class _Sums:
    """Sums over rows; all ``[heads]`` in float64."""

    def __init__(self, heads: int, length: int, device: torch.device) -> None:
        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        self.entropy, self.share, self.variance = zeros(heads), zeros(heads), zeros(heads)
        self.distance, self.sink, self.received = zeros(heads), zeros(heads), zeros(heads, length)
        self.choices = zeros(heads)
        self.placed_rows = torch.zeros(heads, dtype=torch.int64, device=device)

    def add(self, rows: Rows, real: torch.Tensor, special: torch.Tensor, tokens: Tokens) -> None:
        weights, part = rows.weights, slice(rows.start, rows.stop)
        is_row = real[:, None, part]  # [batch, 1, rows]
        weights = weights.masked_fill(~is_row[..., None], 0.0)
        # Of a row divided by its sum, which is not 1 with sinks, sigmoid and softpick; 0 for a row without weight.
        sums = weights.sum(-1, dtype=torch.float64)  # [batch, heads, rows]
        entropy = -torch.special.xlogy(weights, weights).sum(-1, dtype=torch.float64)
        entropy = torch.where(sums > 0, entropy / sums.clamp(min=1e-300) + sums.clamp(min=1e-300).log(), 0.0)
        seen = self._seen(rows)
        has_choice = is_row & (seen > 1)
        self.entropy += entropy.sum((0, 2))
        largest = seen.double().log().expand_as(entropy)
        share = torch.where(has_choice, entropy / largest.clamp(min=1e-300), 0.0)
        self.share += share.sum((0, 2))
        self.choices += has_choice.expand_as(entropy).sum((0, 2))
        self.variance += (_row_variance(rows, seen) * is_row).sum((0, 2))
        self.received[:, : rows.keys] += weights.sum((0, 2), dtype=torch.float64)
        on_special = (weights * special[:, None, None, : rows.keys]).sum(-1, dtype=torch.float64)
        self.sink += (on_special * ~special[:, None, part]).sum((0, 2))
        if tokens.has_places:
            self._add_distances(rows, weights, is_row, tokens)

    def _seen(self, rows: Rows) -> torch.Tensor:
        """How many keys each query sees, ``[batch or 1, heads or 1, rows]``."""
        if rows.allowed is None:
            return torch.full((1, 1, rows.stop - rows.start), rows.keys, device=rows.logits.device)
        return rows.allowed.expand(-1, -1, rows.stop - rows.start, rows.keys).sum(-1)

    def _add_distances(self, rows: Rows, weights: torch.Tensor, is_row: torch.Tensor, tokens: Tokens) -> None:
        length = self.received.shape[-1]
        off_grid = 0 if tokens.grid is None else length - tokens.grid[0] * tokens.grid[1]
        places = tokens.places(length, weights.device, weights.dtype)
        own, keys = places[rows.start : rows.stop], places[: rows.keys]
        squares = torch.zeros(own.shape[0], keys.shape[0], dtype=weights.dtype, device=weights.device)
        for axis in range(own.shape[1]):
            squares += (own[:, None, axis] - keys[None, :, axis]).square()
        squares[:, :off_grid] = 0.0
        total = weights[..., off_grid:].sum(-1, dtype=torch.float64)
        moment = (weights * squares).sum(-1, dtype=torch.float64)
        is_placed = is_row & (torch.arange(rows.start, rows.stop, device=weights.device) >= off_grid)
        mean = torch.where(is_placed & (total > 0), moment / total.clamp(min=1e-300), 0.0)
        self.distance += mean.sum((0, 2))
        self.placed_rows += (is_placed & (total > 0)).sum((0, 2))


def _row_variance(rows: Rows, seen: torch.Tensor) -> torch.Tensor:
    """Variance of the logits over the keys that each query sees, ``[batch, heads, rows]`` in float64."""
    logits, count = rows.logits, seen.clamp(min=1)[..., None]
    if rows.allowed is not None:
        logits = logits.masked_fill(~rows.allowed, 0.0)
    centred = logits - logits.sum(-1, keepdim=True) / count
    if rows.allowed is not None:
        centred = centred.masked_fill(~rows.allowed, 0.0)
    return centred.square().sum(-1, dtype=torch.float64) / count[..., 0]


def _content_bandwidth(call: FilterCall, real: torch.Tensor) -> torch.Tensor:
    """h of the content on the unit sphere of directions, ``[heads]``."""
    mask = real[:, None, :].double()
    count = mask.sum()
    queries = (call.query.double() * call.content.scale).norm(dim=-1)
    keys = call.key.double().norm(dim=-1).repeat_interleave(call.groups, dim=1)
    mean_query, mean_key = (((norms * mask).sum((0, 2)) / count) for norms in (queries, keys))
    return (2.0 / (mean_query * mean_key)).sqrt()


def _value_ratio(call: FilterCall, real: torch.Tensor, special: torch.Tensor) -> torch.Tensor:
    """Mean norm of the special tokens' values over that of the others, ``[heads]``."""
    norms = call.value.double().norm(dim=-1).repeat_interleave(call.groups, dim=1)
    means = []
    for chosen in (special, real & ~special):
        mask = chosen[:, None, :].double()
        means.append((norms * mask).sum((0, 2)) / mask.sum())
    return means[0] / means[1]
