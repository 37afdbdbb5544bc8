"""Position kernels of the offset between two tokens: ``alibi``, linear in the distance, and ``relative_buckets``.

Sources: Press, Smith, Lewis 2021 (arXiv 2108.12409); Raffel 2019 (T5, arXiv 1910.10683). Coordinates, class tokens and
the two forms (feature columns or an additive bias) are as in ``kernel_position``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from .kernel_blocks import BlockKernel, DistanceKernel, row_parts
from .kernel_content import HALF_DTYPES, left_columns, right_columns
from .kernel_position import MAX_FEATURE_SIDE, MAX_SPLIT_SIDE, ClassTokens, join_parameters, replace_class_logits

# --------------------------------------------------------------------------------------------------------------------
# ALiBi
# --------------------------------------------------------------------------------------------------------------------


def alibi_slopes(num_heads: int) -> list[float]:
    """m of every head: 2^(-8/n), 2^(-16/n), ... for n heads.

    Where n is no power of two: the slopes of the next lower power, then every other one of twice that number, as the
    authors' code does.
    """
    power = 2 ** int(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * (head + 1) / power) for head in range(power)]
    return slopes + [2.0 ** (-4.0 * (head + 1) / power) for head in range(0, 2 * (num_heads - power), 2)]


class AlibiPositions(NamedTuple):
    """-m |p_i - p_j|, Euclidean where there are two axes: a Laplacian spatial kernel of fixed width 1/m.

    coordinates: p of the new tokens, ``[batch or 1, length, axes]`` in index or patch units, in at least float32.
    key_coordinates: p of all tokens, ``[batch or 1, key_length, axes]``.
    slopes: m, ``[heads, 1, 1]``, in at least float32.
    class_tokens: or None where every token has a place.
    steepest: the largest slope, for the choice of form.
    is_causal: whether nothing shows a row any later token.
    contiguous: whether positions are known to be in order and to have no gaps.
    """

    coordinates: torch.Tensor
    key_coordinates: torch.Tensor
    slopes: torch.Tensor
    class_tokens: ClassTokens | None
    steepest: float
    is_causal: bool
    contiguous: bool

    def grid_logits(self, dtype: torch.dtype) -> torch.Tensor:
        """Dense, ``[batch or 1, heads, length, key_length]``; class tokens are not cared for."""
        difference = self.coordinates.unsqueeze(-2) - self.key_coordinates.unsqueeze(-3)
        axes = difference.shape[-1]
        distance = difference[..., 0].abs() if axes == 1 else difference.square().sum(-1).sqrt()
        return distance.unsqueeze(1) * -self.slopes

    def grid_columns(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """-m (p_i - p_j) = m p_j + const_i where p_j <= p_i: one product, split in half precision."""
        places = self.key_coordinates[..., 0]
        places = places - (places.amax(-1, keepdim=True) + places.amin(-1, keepdim=True)) / 2
        left = left_columns(self.slopes.squeeze(-1).expand(-1, self.coordinates.shape[-2]), dtype)
        right = right_columns(places, dtype)
        return left.unsqueeze(0), right.unsqueeze(1).expand(-1, left.shape[0], -1, -1), None

    def block_kernel(self) -> BlockKernel:
        """See ``kernel_position.BlockedPositions``."""
        return DistanceKernel(squared=False)

    def parameters(self) -> tuple[torch.Tensor, ...]:
        """The slopes, and the class tokens' scalars."""
        return join_parameters(self.slopes, self.class_tokens)

    def with_parameters(self, first: torch.Tensor, *class_logits: torch.Tensor) -> AlibiPositions:
        """The same with other parameters, in the order of :meth:`parameters`."""
        return self._replace(slopes=first, class_tokens=replace_class_logits(self.class_tokens, class_logits))

    def features_or_bias(self, dtype: torch.dtype) -> str:
        """Features where the distance is linear in p_j: causal, one axis, positions in order."""
        if not self.is_causal or self.class_tokens is not None or self.key_coordinates.shape[-1] > 1:
            return "bias"
        if torch.compiler.is_exporting():  # an exported graph must serve every length
            return "bias"
        places = self.key_coordinates[..., 0].detach()
        if self.contiguous:
            side: float = places.shape[-1]  # not float(): that would compile every length anew
        else:
            # They would have to be looked at, which one query and a traced graph are not worth.
            unseen = self.coordinates.shape[-2] == 1 or torch.compiler.is_compiling()
            if unseen or bool((places.diff(dim=-1) < 0).any()):
                return "bias"
            side = float((places[..., -1] - places[..., 0]).max())
        most = MAX_SPLIT_SIDE if dtype in HALF_DTYPES else MAX_FEATURE_SIDE
        return "features" if side * self.steepest <= most**2 else "bias"


# --------------------------------------------------------------------------------------------------------------------
# Buckets of offsets
# --------------------------------------------------------------------------------------------------------------------


def bucket_boundaries(num_buckets: int, max_distance: int) -> list[int]:
    """The smallest distance of every bucket but the first, of ``num_buckets`` in one direction.

    Half of the buckets hold one distance each; the others grow geometrically and the last one starts at or before
    ``max_distance``. Integers, found without rounding: T5's float32 logarithm, whose result at a boundary hangs on its
    last digit, gives the same buckets wherever it is not exactly on one.

    Args:
        num_buckets: of one direction, even.
        max_distance: > num_buckets / 2.
    """
    exact = num_buckets // 2
    steps = num_buckets - exact
    boundaries = list(range(1, exact + 1))
    for step in range(1, steps):
        # The smallest r with (r / exact) ** steps >= (max_distance / exact) ** step.
        wanted = max_distance**step * exact ** (steps - step)
        distance = max(int(exact * (max_distance / exact) ** (step / steps)) - 1, exact)
        while distance**steps < wanted:
            distance += 1
        boundaries.append(distance)
    return boundaries


_COMPARED = 64


def relative_buckets(offset: torch.Tensor, boundaries: list[int], bidirectional: bool) -> torch.Tensor:
    """Bucket of each offset p_j - p_i (T5): int32 of the same shape, from 0.

    Args:
        offset: of any shape.
        boundaries: of one direction, see :func:`bucket_boundaries`.
        bidirectional: whether keys behind the query (larger p) have buckets of their own, after the others; if not,
            they share bucket 0 with the query itself.
    """
    distance = offset.abs() if bidirectional else (-offset).clamp_(min=0)
    # bucketize is none of the core operators that exported graphs are made of; very many comparisons are worse.
    if torch.compiler.is_exporting() and len(boundaries) <= _COMPARED:
        buckets = torch.zeros_like(distance, dtype=torch.int32)
        for edge in boundaries:
            buckets = buckets + (distance >= edge)
    else:
        edges = torch.tensor(boundaries, dtype=offset.dtype, device=offset.device)
        buckets = torch.bucketize(distance, edges, right=True, out_int32=True)
    return buckets.add_(offset > 0, alpha=len(boundaries) + 1) if bidirectional else buckets


JOINT_BUCKETS = 2**14
"""Up to so many combinations of the axes' buckets, a block looks up all axes at once."""
MAX_LANES = 64
"""Copies of a table: neighbouring columns add to different ones, so that no sum waits for the one before, and long
sums lose fewer digits."""


class BucketKernel(NamedTuple):
    """b[axis, bucket of the offset], summed over the axes, inside a block; see ``kernel_blocks``.

    The parameter is b, ``[heads, axes, buckets]``. What the heads share are places in *tables*: one table of the sums
    for all combinations of the axes' buckets, or a table an axis where those are too many. Each table has one more
    entry, 0, for class tokens, and each entry stands in it several times, once for each *lane*: column j takes lane
    j % lanes.

    boundaries: see :class:`BucketPositions`.
    bidirectional: see there.
    axes: of the grid.
    buckets: of one axis.
    """

    boundaries: list[int]
    bidirectional: bool
    axes: int
    buckets: int

    @property
    def grows_with_distance(self) -> bool:
        """Entries of a table are as small for far keys as for near ones."""
        return False

    @property
    def is_costly(self) -> bool:
        """A look-up."""
        return True

    @property
    def _joint_axes(self) -> int:
        """How many axes share a table: all or one."""
        return self.axes if self.buckets**self.axes <= JOINT_BUCKETS else 1

    @property
    def _size(self) -> int:
        """Entries of a table, without that of class tokens."""
        return self.buckets**self._joint_axes

    @property
    def _lanes(self) -> int:
        return max(min(MAX_LANES, JOINT_BUCKETS // self._size), 1)

    def compare(self, rows: torch.Tensor, columns: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Places in each table, int32 ``[tables, samples or 1, rows, columns]``; see ``kernel_blocks.BlockKernel``."""
        samples, (length, key_length) = max(rows.shape[0], columns.shape[0]), (rows.shape[1], columns.shape[1])
        tables = self.axes // self._joint_axes
        places = torch.empty(tables, samples, length, key_length, dtype=torch.int32, device=rows.device)
        lanes = torch.arange(key_length, dtype=torch.int32, device=rows.device) % self._lanes
        for part in row_parts(length, key_length):
            for axis in range(self.axes):
                offset = columns[..., axis].unsqueeze(-2) - rows[:, part, axis].unsqueeze(-1)
                buckets = relative_buckets(offset, self.boundaries, self.bidirectional)
                table = places[axis // self._joint_axes, :, part]
                if axis % self._joint_axes:
                    table.mul_(self.buckets).add_(buckets)
                else:
                    table.copy_(buckets)
            places[:, :, part].mul_(self._lanes).add_(lanes)
        return places

    def clear_(self, pair_values: torch.Tensor) -> None:
        """The last entry of each table."""
        pair_values.fill_(self._size * self._lanes)

    def from_nearest(self, pair_values: torch.Tensor, allowed: torch.Tensor | None) -> torch.Tensor:
        """Nothing to do."""
        return pair_values

    def _tables(self, parameter: torch.Tensor) -> list[torch.Tensor]:
        """``[heads, (size + 1) * lanes]`` each."""
        tables: list[torch.Tensor] = []
        for axis in range(self.axes):
            if axis % self._joint_axes:
                tables[-1] = (tables[-1].unsqueeze(-1) + parameter[:, axis].unsqueeze(-2)).flatten(1)
            else:
                tables.append(parameter[:, axis])
        return [torch.nn.functional.pad(table, (0, 1)).repeat_interleave(self._lanes, dim=1) for table in tables]

    def add_(self, logits: torch.Tensor, pair_values: torch.Tensor, parameter: torch.Tensor, factor: float) -> None:
        """A look-up per head; see ``kernel_blocks.BlockKernel``."""
        tables = self._tables(parameter * factor)
        for part in row_parts(*pair_values.shape[-2:]):
            for table, places in zip(tables, pair_values[:, :, part], strict=True):
                flat = places.flatten().long()
                found = logits.new_empty(flat.shape)
                for head, values in enumerate(table):
                    logits[:, head, part] += torch.index_select(values, 0, flat, out=found).view(places.shape)

    def gradient(self, d_logits: torch.Tensor, pair_values: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
        """The sum at each entry, and of those over the other axes; see ``kernel_blocks.BlockKernel``."""
        heads, joint_axes = parameter.shape[0], self._joint_axes
        if pair_values.shape[1] == 1 and d_logits.shape[0] > 1:
            d_logits = d_logits.sum(0, keepdim=True)
        totals = d_logits.new_zeros(pair_values.shape[0], heads, self._size + 1)
        for part in row_parts(*pair_values.shape[-2:]):
            for total, places in zip(totals, pair_values[:, :, part], strict=True):
                flat = places.flatten().long()
                sums = d_logits.new_zeros(heads, (self._size + 1) * self._lanes)
                for head, lanes in enumerate(sums):
                    lanes.scatter_add_(0, flat, d_logits[:, head, part].flatten())
                total += sums.unflatten(-1, (-1, self._lanes)).sum(-1)
        gradients = []
        for axis in range(self.axes):
            table = totals[axis // joint_axes, :, :-1].unflatten(-1, [self.buckets] * joint_axes)
            others = [other + 1 for other in range(joint_axes) if other != axis % joint_axes]
            gradients.append(table.sum(others) if others else table)
        return torch.stack(gradients, dim=1)


class BucketPositions(NamedTuple):
    """sum over axes of b[axis, bucket(p_j - p_i)]: a learned spatial kernel, constant where offsets share a bucket.

    T5 has one axis and one table for all layers, drawn at random; here every layer has its own, initially 0, and
    patches have one table for rows and one for columns, which add up (*choice*: few parameters, and every offset of a
    larger grid has been trained).

    coordinates: p of the new tokens, ``[batch or 1, length, axes]`` in index or patch units, in at least float32.
    key_coordinates: p of all tokens, ``[batch or 1, key_length, axes]``.
    table: b, ``[heads, axes, buckets]``.
    class_tokens: or None where every token has a place.
    boundaries: the smallest distance of every bucket but the first, in one direction.
    bidirectional: whether both directions have buckets.
    """

    coordinates: torch.Tensor
    key_coordinates: torch.Tensor
    table: torch.Tensor
    class_tokens: ClassTokens | None
    boundaries: list[int]
    bidirectional: bool

    def grid_logits(self, dtype: torch.dtype) -> torch.Tensor:
        """Dense, ``[batch or 1, heads, length, key_length]`` in ``dtype``; class tokens are not cared for."""
        offset = self.key_coordinates.unsqueeze(-3) - self.coordinates.unsqueeze(-2)
        buckets = relative_buckets(offset, self.boundaries, self.bidirectional)
        # One look-up in all axes' tables: the bucket of a later axis is moved behind those of the earlier ones.
        count = self.table.shape[-1]
        buckets = buckets + torch.arange(buckets.shape[-1], device=buckets.device) * count
        logits = torch.nn.functional.embedding(buckets, self.table.to(dtype).flatten(1).T).sum(-2)
        return logits.permute(0, 3, 1, 2)

    def grid_columns(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """There are none: a table of buckets is no inner product of few columns."""
        raise NotImplementedError

    def block_kernel(self) -> BlockKernel:
        """See ``kernel_position.BlockedPositions``."""
        return BucketKernel(self.boundaries, self.bidirectional, *self.table.shape[1:])

    def parameters(self) -> tuple[torch.Tensor, ...]:
        """The table, and the class tokens' scalars."""
        return join_parameters(self.table, self.class_tokens)

    def with_parameters(self, first: torch.Tensor, *class_logits: torch.Tensor) -> BucketPositions:
        """The same with other parameters, in the order of :meth:`parameters`."""
        return self._replace(table=first, class_tokens=replace_class_logits(self.class_tokens, class_logits))

    def features_or_bias(self, dtype: torch.dtype) -> str:
        """Always a bias, through which the table gets its gradient."""
        return "bias"
