"""Boosters that look at single weights: what each makes of a block's weights, and the gradients, in closed form.

``local_linear``: A the weights, A' those after dropout, w_i the sums of A' (1 without dropout), G = dout, S = R K^T,
c_ij = m_i - s_ij, p_ij = G_i . v_j, e_ij = p_ij - u_i / w_i with u_i = sum_j a'_ij p_ij:

    out = (A' o (1 + c)) V,   dV = (A' o (1 + c))^T G,   dS = -A' o e,   dR = dS K,   dK += dS^T R
    dl  = A' o (1 + c) o e + A' u_i / w_i - A (G_i . out_i)

3 products forward and 8 backward, for 2 and 5 of plain attention.

``robust``, with f(d) = rho'(d)/d and Z_i = sum_j a'_ij f_ij, step by step back from g = dL/du:

    d_ij^2 = |v_j|^2 - 2 v_j . u_i + |u_i|^2,   u' = (A' o F) V / Z,   p_ij = g_i . (v_j - u'_i) / Z_i
    dA' += F o p,   dV += (A' o F)^T g/Z + Q^T u - V (Q^T 1),   g <- Q V - u (Q 1),   q_ij = a'_ij p_ij / d_ij^3

with q_ij = 0 where f does not change. 2 products a step forward, 5 backward. The output w_i u_i is of degree 1 in a
row of A', so that the softmax's own part needs no sum over keys: sum_k a_ik dL/da_ik = G_i . out_i.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from .backend_blocked_weights import KeySums
from .boost_weights import LEAST_WITHIN, ByWeights, Robust


class Part(NamedTuple):
    """A block of a group, in working precision.

    matrix: A after dropout, ``[pairs, rows, keys]``; may be overwritten in the forward pass, where its rows are still
        to be multiplied by ``factor``.
    factor: ``[pairs, rows, 1]``, 0 in rows that see no key; None in the backward pass.
    key: ``[pairs, keys, head_dim]``.
    value: ``[pairs, keys, d]``.
    own: the booster's rows, ``[pairs, rows, width]``.
    kept: what the forward pass keeps of the rows for the backward pass, ``[pairs, rows, kept]``.
    room: memory of the size of ``matrix``, by number.
    is_whole: whether the rows sum to 1 (after ``factor``), or to 0 where they see no key: there was no dropout.
    """

    matrix: torch.Tensor
    factor: torch.Tensor | None
    key: torch.Tensor
    value: torch.Tensor
    own: torch.Tensor
    kept: torch.Tensor
    room: Callable[[int], torch.Tensor]
    is_whole: bool

    def mass(self) -> torch.Tensor | float:
        """Sums of the matrix's rows, 1 where there is no weight at all."""
        if self.is_whole and self.factor is None:
            return 1.0
        mass = self.matrix.sum(-1, keepdim=True)
        return mass.masked_fill_(mass == 0.0, 1.0)


class Given(NamedTuple):
    """What the backward pass of a block starts from.

    grad: of the block's output, ``[pairs, rows, d]``.
    undropped: A before dropout, ``[pairs, rows, keys]``.
    """

    grad: torch.Tensor
    undropped: torch.Tensor


class Sums(NamedTuple):
    """Where a block's gradients go.

    key: sum over blocks of matrix^T rows.
    value: the same.
    columns: sums of a matrix's columns, ``[pairs, key_length]``, that many times V is taken from V's gradient.
    own: of the booster's rows of the block, written.
    """

    key: KeySums
    value: KeySums
    columns: torch.Tensor
    own: torch.Tensor


class LocalLinearRule:
    """See the file's formulas. Kept are m and the output."""

    rooms = 3

    def kept(self, width: int) -> int:
        """How many numbers a row keeps."""
        return width + 1

    def forward(self, part: Part) -> torch.Tensor:
        """The block's rows of the output, ``[pairs, rows, d]``."""
        matrix, shares, product = part.matrix, part.room(0), part.room(1)
        torch.bmm(part.own, part.key.mT, out=shares)
        mean = torch.mul(matrix, shares, out=product).sum(-1, keepdim=True)
        mean = mean.mul_(part.factor) if part.is_whole and part.factor is not None else mean.div_(part.mass())
        weights = torch.sub(mean + 1.0, shares, out=shares).mul_(matrix)
        out = torch.bmm(weights, part.value)
        if part.factor is not None:
            out.mul_(part.factor)
        part.kept[..., :1], part.kept[..., 1:] = mean, out
        return out

    def backward(self, part: Part, given: Given, sums: Sums) -> torch.Tensor:
        """The gradient of the logits, ``[pairs, rows, keys]``; the matrices stay as they are."""
        matrix, grad = part.matrix, given.grad
        shares, errors, product = part.room(0), part.room(1), part.room(2)
        mean, out = part.kept[..., :1], part.kept[..., 1:]
        torch.bmm(grad, part.value.mT, out=errors)
        average = torch.mul(matrix, errors, out=product).sum(-1, keepdim=True)
        if not part.is_whole:
            average.div_(part.mass())
        errors.sub_(average)
        torch.bmm(part.own, part.key.mT, out=shares)
        weights = torch.sub(mean + 1.0, shares, out=shares).mul_(matrix)
        sums.value.add(weights, grad)
        d_shares = torch.mul(matrix, errors, out=product)
        sums.own.baddbmm_(d_shares, part.key, beta=0.0, alpha=-1.0)
        sums.key.add(d_shares, -part.own)
        whole = (grad * out).sum(-1, keepdim=True)
        d_logits = weights.mul_(errors)
        if part.is_whole:
            return d_logits.addcmul_(matrix, average - whole)
        return d_logits.addcmul_(matrix, average).addcmul_(given.undropped, whole, value=-1.0)


class RobustRule:
    """See the file's formulas. Kept are u of all steps, [u, Z] side by side, Z of the mean being the row's sum.

    Args:
        robust: the booster.
    """

    rooms = 4

    def __init__(self, robust: Robust) -> None:
        self.robust = robust

    def kept(self, width: int) -> int:
        """How many numbers a row keeps."""
        return (self.robust.steps + 1) * (width + 1)

    def _near(self, centre: torch.Tensor, part: Part, lengths: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """1/d of all values, with distances below ``inner`` counted as that."""
        torch.baddbmm(lengths.expand_as(out), centre, part.value.mT, alpha=-2.0, out=out)
        return out.add_(_squares(centre)).clamp_(min=self.robust.inner**2).pow_(-0.5)

    def _within(self, near: torch.Tensor, part: Part, mass: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """f of ``mcp``: max(1/d - 1/D, 0); 1/d in rows that have next to no value within D."""
        cutoff = float(self.robust.cutoff or 1.0)
        within = torch.sub(near, 1.0 / cutoff, out=out).relu_()
        found = torch.linalg.vecdot(within, part.matrix).unsqueeze(-1)
        far = found * cutoff < LEAST_WITHIN * mass
        return torch.where(far, near, within) if bool(far.any()) else within

    def forward(self, part: Part) -> torch.Tensor:
        """The block's rows of the output, ``[pairs, rows, d]``."""
        matrix, lengths, width = part.matrix, _squares(part.value).mT, part.value.shape[-1]
        mass = total = matrix.sum(-1, keepdim=True)
        centre = torch.bmm(matrix, part.value) / mass.masked_fill(mass == 0.0, 1.0)
        kept = part.kept.unflatten(-1, (-1, width + 1))
        factor = 1.0 if part.factor is None else part.factor
        for step in range(self.robust.steps + 1):
            kept[..., step, :width], kept[..., step, width:] = centre, total * factor
            if step == self.robust.steps:
                break
            factors = near = self._near(centre, part, lengths, part.room(0))
            if self.robust.cutoff is not None:
                factors = self._within(near, part, mass, part.room(1))
            shares = torch.mul(factors, matrix, out=part.room(1))
            total = shares.sum(-1, keepdim=True)
            lost = total == 0.0
            centre = torch.where(lost, centre, torch.bmm(shares, part.value) / total.masked_fill(lost, 1.0))
        return centre if part.is_whole else centre * kept[..., 0, width:]

    def backward(self, part: Part, given: Given, sums: Sums) -> torch.Tensor:
        """The gradient of the logits, ``[pairs, rows, keys]``; the matrices stay as they are."""
        matrix, lengths, width = part.matrix, _squares(part.value).mT, part.value.shape[-1]
        kept = part.kept.unflatten(-1, (-1, width + 1))
        mass = kept[..., 0, width:]
        grad = given.grad if part.is_whole else given.grad * mass
        d_weights = part.room(3)
        for step in range(self.robust.steps, 0, -1):
            centre, after, total = kept[..., step - 1, :width], kept[..., step, :width], kept[..., step, width:]
            lost = total == 0.0
            each = (grad / total).masked_fill(lost, 0.0)
            near = self._near(centre, part, lengths, part.room(0))
            factors = near
            if self.robust.cutoff is not None:
                factors = self._within(near, part, mass, part.room(1))
            pulls = _pulls(each, after, part)
            if step == self.robust.steps:
                torch.mul(factors, pulls, out=d_weights)
            else:
                d_weights.addcmul_(factors, pulls)
            # Where f is constant its weight does not change: a distance below ``inner``, a value beyond D.
            constant = near >= near.new_full((), self.robust.inner**2).pow(-0.5)
            if self.robust.cutoff is not None:
                constant = constant.logical_or_(factors == 0.0)
            sums.value.add(torch.mul(factors, matrix, out=part.room(1)), each)
            change = pulls.mul_(matrix).mul_(near).mul_(near.square_()).masked_fill_(constant, 0.0)
            sums.value.add(change, centre)
            sums.columns[:, : change.shape[-1]].add_(change.sum(-2))
            turned = torch.bmm(change, part.value) - centre * change.sum(-1, keepdim=True)
            grad = torch.where(lost, grad, 0.0) + turned
        each = (grad / mass).masked_fill(mass == 0.0, 0.0)
        d_weights.add_(_pulls(each, kept[..., 0, :width], part))
        sums.value.add(matrix, each)
        if part.is_whole:
            return d_weights.mul_(matrix)
        output_share = (given.grad * kept[..., -1, :width]).sum(-1, keepdim=True)
        d_weights.add_(output_share).mul_(matrix)
        return d_weights.addcmul_(given.undropped, output_share * mass, value=-1.0)


def _squares(rows: torch.Tensor) -> torch.Tensor:
    return rows.square().sum(-1, keepdim=True)


def _pulls(each: torch.Tensor, centre: torch.Tensor, part: Part) -> torch.Tensor:
    """g_i . (v_j - u_i), in the room with the number 2."""
    pulls = torch.bmm(each, part.value.mT, out=part.room(2))
    return pulls.sub_((each * centre).sum(-1, keepdim=True))


Rule = LocalLinearRule | RobustRule
"""How a booster is computed on a block."""


def rule_of(by_weights: ByWeights) -> Rule:
    """The rule of a booster."""
    return RobustRule(by_weights) if isinstance(by_weights, Robust) else LocalLinearRule()
