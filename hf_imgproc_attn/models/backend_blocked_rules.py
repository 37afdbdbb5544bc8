"""Boosters that look at single weights: what each makes of a block's weights, and the gradients, in closed form.

``local_linear``: A the weights, A' those after dropout, w_i the sums of A' (1 without dropout), G = dout, S = R K^T,
c_ij = m_i - s_ij, p_ij = G_i . v_j, e_ij = p_ij - u_i / w_i with u_i = sum_j a'_ij p_ij:

    out = (A' o (1 + c)) V,   dV = (A' o (1 + c))^T G,   dS = -A' o e,   dR = dS K,   dK += dS^T R
    dA' = (1 + c) o e + u_i / w_i

3 products forward and 8 backward, for 2 and 5 of plain attention.

``robust``, with f(d) = rho'(d)/d and Z_i = sum_j a'_ij f_ij, step by step back from g = dL/du:

    d_ij^2 = |v_j|^2 - 2 v_j . u_i + |u_i|^2,   u' = (A' o F) V / Z,   p_ij = g_i . (v_j - u'_i) / Z_i
    dA' += F o p,   dV += (A' o F)^T g/Z + Q^T u - V (Q^T 1),   g <- Q V - u (Q 1),   q_ij = a'_ij p_ij / d_ij^3

with q_ij = 0 where f does not change. 2 products a step forward, 5 backward. The output w_i u_i adds u_i . G_i to dA'.

Both outputs are of degree 1 in a row of A', so that what normalised the weights needs no sum over keys to be passed:
sum_k a'_ik dA'_ik = G_i . out_i. Nothing here asks whether w_i is 1: the weights may be those of any normalisation.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from .backend_blocked_weights import KeySums
from .boost_weights import LEAST_WITHIN, ByWeights, Robust


class Kept(NamedTuple):
    """What the forward pass keeps for the backward pass, in working precision.

    output: ``[pairs, length, d]``.
    row_sums: of each row of logits, ``[pairs, length, 2]``; see ``Weights.compute``.
    rows: what else the booster needs of each row, ``[pairs, length, width]``.
    """

    output: torch.Tensor
    row_sums: torch.Tensor
    rows: torch.Tensor


class Part(NamedTuple):
    """A block of a group, in working precision.

    matrix: A after dropout, ``[pairs, rows, keys]``; may be overwritten in the forward pass, where its rows are still
        to be multiplied by ``factor``.
    factor: ``[pairs, rows, 1]``, 0 in rows that see no key; None in the backward pass.
    key: ``[pairs, keys, head_dim]``.
    value: ``[pairs, keys, d]``.
    own: the booster's rows, ``[pairs, rows, width]``.
    kept: what the forward pass keeps of the rows for the backward pass, ``[pairs, rows, kept]``.
    output: of the rows, ``[pairs, rows, d]``; without numbers in the forward pass.
    room: memory by number, as many matrices below each other as the rule has said.
    multiply: a batched product, of two factors and what gives it memory.
    is_whole: whether the rows sum to 1 (after ``factor``), or to 0 where they see no key: weights of softmax, without
        sinks and dropout.
    """

    matrix: torch.Tensor
    factor: torch.Tensor | None
    key: torch.Tensor
    value: torch.Tensor
    own: torch.Tensor
    kept: torch.Tensor
    output: torch.Tensor
    room: Callable[[int], torch.Tensor]
    multiply: Callable[..., torch.Tensor]
    is_whole: bool

    def product(self, left: torch.Tensor, right: torch.Tensor, number: int) -> torch.Tensor:
        """A product of the matrix's size, in the room of that number or elsewhere."""
        return self.multiply(left, right, partial(self.room, number))

    def mass(self) -> torch.Tensor | float:
        """Sums of the matrix's rows, 1 where there is no weight at all."""
        if self.is_whole and self.factor is None:
            return 1.0
        mass = self.matrix.sum(-1, keepdim=True)
        return mass.masked_fill_(mass == 0.0, 1.0)


class WeightsGrad(NamedTuple):
    """The gradient of a block of A'.

    matrix: ``[pairs, rows, keys]``, up to a number a row; may be overwritten.
    shift: that number, ``[pairs, rows, 1]``.
    mean: sum_k a'_ik dA'_ik, likewise.
    """

    matrix: torch.Tensor
    shift: torch.Tensor
    mean: torch.Tensor


class Sums(NamedTuple):
    """Where a block's gradients go.

    key: sum over blocks of matrix^T rows.
    value: the same; where there are columns, the last one is that many times V is taken from V's gradient.
    own: of the booster's rows of the block, written.
    """

    key: KeySums
    value: KeySums
    own: torch.Tensor


class LocalLinearRule:
    """See the file's formulas. Kept is 1 + m."""

    rooms = (1, 1, 1)
    """Memory that is needed, each so many times that of a matrix."""
    has_columns = False
    """Whether a row of what is summed for the values has one number more, which V is taken that many times for."""

    def kept(self, width: int) -> int:
        """How many numbers a row keeps."""
        return 1

    def forward(self, part: Part) -> torch.Tensor:
        """The block's rows of the output, ``[pairs, rows, d]``."""
        matrix, shares = part.matrix, part.product(part.own, part.key.mT, 0)
        mean = torch.mul(matrix, shares, out=part.room(1)).sum(-1, keepdim=True)
        mean = mean.mul_(part.factor) if part.is_whole and part.factor is not None else mean.div_(part.mass())
        tilt = torch.add(mean, 1.0, out=part.kept)
        weights = torch.sub(tilt, shares, out=shares).mul_(matrix)
        out = part.multiply(weights, part.value)
        if part.factor is not None:
            out.mul_(part.factor)
        return out

    def backward(self, part: Part, grad: torch.Tensor, sums: Sums) -> WeightsGrad:
        """The gradient of the weights, from that of the block's output, ``[pairs, rows, d]``."""
        matrix, product = part.matrix, part.room(2)
        errors = part.product(grad, part.value.mT, 1)
        average = torch.mul(matrix, errors, out=product).sum(-1, keepdim=True)
        if not part.is_whole:
            average.div_(part.mass())
        errors.sub_(average)
        shares = part.product(part.own, part.key.mT, 0)
        tilt = torch.sub(part.kept, shares, out=shares)
        sums.value.add(torch.mul(tilt, matrix, out=product), grad)
        d_shares = torch.mul(matrix, errors, out=product)
        torch.neg(part.multiply(d_shares, part.key), out=sums.own)
        sums.key.add(d_shares, -part.own)
        return WeightsGrad(tilt.mul_(errors), average, (grad * part.output).sum(-1, keepdim=True))


class RobustRule:
    """See the file's formulas. Kept are u of all steps, [u, Z] side by side, Z of the mean being the row's sum.

    Sums over a matrix's rows and columns are columns of ones in its products, which cost less than a pass over it.

    Args:
        robust: the booster.
    """

    has_columns = True

    def __init__(self, robust: Robust) -> None:
        self.robust, self.least = robust, robust.inner**2
        # Of f, of a step's two matrices below each other, of dA, and of 1/d where that is not f.
        self.rooms = (1, 2, 1) if robust.cutoff is None else (1, 2, 1, 1)

    def kept(self, width: int) -> int:
        """How many numbers a row keeps."""
        return (self.robust.steps + 1) * (width + 1)

    def _squares(self, centre: torch.Tensor, part: Part, places: torch.Tensor) -> torch.Tensor:
        """d^2 of all values, in the room with the number 0."""
        own = torch.cat((-2.0 * centre, _squares(centre), torch.ones_like(centre[..., :1])), -1)
        return part.product(own, places.mT, 0)

    def _within(self, near: torch.Tensor, part: Part, mass: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """f of ``mcp``, in the memory of ``out``: max(1/d - 1/D, 0); 1/d in rows with next to no value within D."""
        cutoff = float(self.robust.cutoff or 1.0)
        within = torch.sub(near, 1.0 / cutoff, out=out).relu_()
        found = torch.linalg.vecdot(within, part.matrix).unsqueeze(-1)
        far = found * cutoff < LEAST_WITHIN * mass
        return torch.where(far, near, within, out=out) if bool(far.any()) else within

    def forward(self, part: Part) -> torch.Tensor:
        """The block's rows of the output, ``[pairs, rows, d]``."""
        matrix, places, width = part.matrix, _places(part.value), part.value.shape[-1]
        first = part.multiply(matrix, places)
        mass = total = first[..., width : width + 1]
        centre = first[..., :width] / mass.masked_fill(mass == 0.0, 1.0)
        kept = part.kept.unflatten(-1, (-1, width + 1))
        factor = 1.0 if part.factor is None else part.factor
        for step in range(self.robust.steps + 1):
            kept[..., step, :width], kept[..., step, width:] = centre, total * factor
            if step == self.robust.steps:
                break
            factors = self._squares(centre, part, places).clamp_(min=self.least).pow_(-0.5)
            if self.robust.cutoff is not None:
                factors = self._within(factors, part, mass, part.room(2))
            found = part.multiply(factors.mul_(matrix), places)
            total = found[..., width : width + 1]
            lost = total == 0.0
            centre = torch.where(lost, centre, found[..., :width] / total.masked_fill(lost, 1.0))
        return centre if part.is_whole else centre * kept[..., 0, width:]

    def backward(self, part: Part, grad: torch.Tensor, sums: Sums) -> WeightsGrad:
        """The gradient of the weights, from that of the block's output, ``[pairs, rows, d]``."""
        matrix, places, width = part.matrix, _places(part.value), part.value.shape[-1]
        kept, shown = part.kept.unflatten(-1, (-1, width + 1)), places[..., : width + 1].mT.contiguous()
        mass, share = kept[..., 0, width:], (grad * kept[..., -1, :width]).sum(-1, keepdim=True)
        if not part.is_whole:
            grad = grad * mass
        one, none = torch.ones_like(mass), torch.zeros_like(mass)
        d_weights, both = part.room(2), part.room(1)
        shares, pulls = both.chunk(2, dim=1)
        for step in range(self.robust.steps, 0, -1):
            centre, after, total = kept[..., step - 1, :width], kept[..., step, :width], kept[..., step, width:]
            lost = total == 0.0
            each = (grad / total).masked_fill(lost, 0.0)
            squares = self._squares(centre, part, places)
            are_bounded = at_least_(squares, self.least)
            near = torch.pow(squares, -0.5, out=shares if self.robust.cutoff is None else part.room(3))
            if self.robust.cutoff is not None:
                self._within(near, part, mass, shares)
            _pulls(each, after, part, shown, pulls)
            if step == self.robust.steps:
                torch.mul(shares, pulls, out=d_weights)
            else:
                d_weights.addcmul_(shares, pulls)
            # q_ij take the place of p_ij; they are 0 where f is constant: at a value beyond D, or below ``inner``.
            if self.robust.cutoff is not None:
                pulls.masked_fill_(shares == 0.0, 0.0).mul_(near).mul_(matrix)
            shares.mul_(matrix)
            if self.robust.cutoff is None:
                pulls.mul_(shares)
            if are_bounded:
                torch.ops.aten.threshold_backward.grad_input(pulls, squares, self.least, grad_input=pulls)
            pulls.div_(squares)
            # The last column of the sum is Q^T 1.
            sums.value.add(both, torch.cat((torch.cat((each, none), -1), torch.cat((centre, one), -1)), 1))
            turned = part.multiply(pulls, places)
            grad = torch.where(lost, grad, 0.0) + turned[..., :width] - centre * turned[..., width : width + 1]
        each = (grad / mass).masked_fill(mass == 0.0, 0.0)
        d_weights.add_(_pulls(each, kept[..., 0, :width], part, shown, pulls))
        sums.value.add(matrix, torch.cat((each, none), -1))
        return WeightsGrad(d_weights, share, share if part.is_whole else share * mass)


def at_least_(squares: torch.Tensor, least: float) -> bool:
    """Make ``least`` of smaller numbers, in place; whether there may have been any, which few calls have."""
    if squares.numel() and squares.amin().item() > least:
        return False
    squares.clamp_(min=least)
    return True


def _squares(rows: torch.Tensor) -> torch.Tensor:
    return rows.square().sum(-1, keepdim=True)


def _places(value: torch.Tensor) -> torch.Tensor:
    """Values with ones and their squares: the product with [-2 u, |u|^2, 1] is |v - u|^2, ``[pairs, keys, d + 2]``."""
    return torch.cat((value, torch.ones_like(value[..., :1]), _squares(value)), dim=-1)


def _pulls(
    each: torch.Tensor, centre: torch.Tensor, part: Part, shown: torch.Tensor, out: torch.Tensor
) -> torch.Tensor:
    """g_i . (v_j - u_i), in the memory of ``out``."""
    rows = torch.cat((each, -(each * centre).sum(-1, keepdim=True)), dim=-1)
    return part.multiply(rows, shown, lambda: out)


Rule = LocalLinearRule | RobustRule
"""How a booster is computed on a block."""


def rule_of(by_weights: ByWeights) -> Rule:
    """The rule of a booster."""
    return RobustRule(by_weights) if isinstance(by_weights, Robust) else LocalLinearRule()
