"""FAB, the fast adaptive boundary attack (Croce and Hein 2020, arXiv 1907.02044), targeted, in the maximum norm.

It looks for the smallest change that moves an image over the boundary to another class, and so does not depend on a
step size or on the scale of the logits. The boundary between label and target is taken as flat: the point is projected
onto the plane where the two logits would be equal, the result is drawn towards the image's own projection, and once a
point is over the boundary, the way back to the image is shortened.

No library that can be installed without torchvision has it, so it stands here. Differs from the authors' program: it
starts at the image itself, once, and stops for an image as soon as a change within ε is found, since more is not asked
in AutoAttack; their last search along the line to the image is then not needed.
"""

from __future__ import annotations

import torch

from .attacks import target_gradient
from .classifier import PixelClassifier

_BEYOND = 1.05  # η: steps go a little over the plane
_MOST_BACK = 0.1  # α_max: how far a point is drawn towards the image
_SHORTER = 0.9  # β: the way from the image, once a point is over the boundary


def smallest_change(points: torch.Tensor, slope: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """The change of least maximum norm that brings points in [0, 1] onto planes, as far as the bounds allow.

    The plane of a point is ``{z: <slope, z> + offset = 0}``. All values move by the same amount λ towards it, those
    that meet a bound by less. What they contribute grows with λ along straight pieces that end where a value meets its
    bound, so the right λ is found among the sorted rooms.

    Args:
        points: ``[points, values]`` in [0, 1].
        slope: ``[points, values]``.
        offset: ``[points]``.

    Returns:
        ``[points, values]``; where no point in [0, 1] lies on the plane, the change that comes nearest to it.
    """
    height = (slope * points).sum(1) + offset
    towards = -height.sign()[:, None] * slope.sign()
    room = torch.where(towards > 0, 1 - points, points)
    weight = slope.abs()
    rooms, order = room.sort(1)
    weights = weight.gather(1, order)
    met = (weights * rooms).cumsum(1)  # by the values that have met their bounds
    left = weights.sum(1, keepdim=True) - weights.cumsum(1)  # weight of the others
    reached = met + rooms * left.clamp_min(0)
    piece = (reached < height.abs()[:, None]).sum(1, keepdim=True)  # the first piece that reaches the plane
    last = rooms.shape[1] - 1
    before = (piece - 1).clamp_min(0)
    met_before = torch.where(piece > 0, met.gather(1, before), 0)
    left_before = torch.where(piece > 0, left.gather(1, before), weights.sum(1, keepdim=True))
    amount = (height.abs()[:, None] - met_before) / left_before.clamp_min(torch.finfo(points.dtype).tiny)
    amount = torch.where(piece > last, rooms[:, -1:], amount)
    return towards * torch.minimum(amount.clamp_min(0), room)


def fab_withstood(
    classifier: PixelClassifier,
    images: torch.Tensor,
    labels: torch.Tensor,
    targets: torch.Tensor,
    epsilon: float,
    steps: int,
) -> torch.Tensor:
    """Whether FAB towards one class finds no change of at most ε that misleads the model, bool ``[images]``.

    Args:
        classifier: the model.
        images: a batch, ``[images, channels, height, width]`` in [0, 1].
        labels: ``[images]``.
        targets: another class of each image, ``[images]``.
        epsilon: largest change of a pixel.
        steps: projections, of one gradient each.
    """
    device = classifier.device
    start, label, target = (part.to(device) for part in (images, labels, targets))
    active, point = torch.arange(len(images), device=device), start.clone()
    for _ in range(steps):
        own, at = start[active].flatten(1), point.flatten(1)
        gradient, lead = target_gradient(classifier, point, label[active], target[active])
        slope = gradient.flatten(1)
        offset = lead - (slope * at).sum(1)
        step, own_step = smallest_change(at, slope, offset), smallest_change(own, slope, offset)
        far, own_far = (change.abs().amax(1, keepdim=True) for change in (step, own_step))
        back = (far / (far + own_far).clamp_min(1e-12)).clamp(0, _MOST_BACK)
        moved = ((at + _BEYOND * step) * (1 - back) + (own + _BEYOND * own_step) * back).clamp(0, 1)
        with torch.no_grad():
            is_over = classifier(moved.view_as(point)).argmax(-1) != label[active]
        stands = ~(is_over & ((moved - own).abs().amax(1) <= epsilon))
        nearer = torch.where(is_over[:, None], own + _SHORTER * (moved - own), moved)
        point, active = nearer.view_as(point)[stands], active[stands]
        if not len(active):
            break
    standing = torch.zeros(len(images), dtype=torch.bool)
    standing[active.cpu()] = True
    return standing
