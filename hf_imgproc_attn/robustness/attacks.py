"""Attacks on a classifier of pixels, within the largest change ε of a pixel: FGSM, PGD and SPSA, and their gradients.

- FGSM (Goodfellow, Shlens, Szegedy 2015, arXiv 1412.6572): one step of size ε along the sign of the gradient.
- PGD (Madry et al. 2018, arXiv 1706.06083): steps of size 2.5 ε / steps from random starts in the ball.
- SPSA (Uesato et al. 2018, arXiv 1802.05666): no gradients at all; they are estimated from differences along random
  directions, so that it is not fooled where gradients are.

All ascend the cross-entropy, SPSA the margin of the logits; images stay in [0, 1]. Whether an image withstands an
attack is asked of the model exactly as it is used. An image that any iterate of any start fools counts as fooled, and
is not attacked further. The random numbers of an image depend on seed, start and the image's number only: neither the
size of a batch nor the other images change them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from ..errors import UsageError
from .classifier import PixelClassifier

_SPSA_SHIFT, _SPSA_RATE = 0.01, 0.01  # of the paper's experiments
_ADAM = (0.9, 0.999, 1e-8)


@contextlib.contextmanager
def frozen(model: torch.nn.Module) -> Iterator[None]:
    """No gradients for the parameters within: those of the images cost enough."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        model.requires_grad_(False)
        yield
    finally:
        for parameter, wanted in before.items():
            parameter.requires_grad_(wanted)


def input_gradient(
    classifier: PixelClassifier, images: torch.Tensor, labels: torch.Tensor, *, of_margin: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient with respect to the pixels, of the shape of the images, and the logits ``[images, classes]``.

    Args:
        classifier: the model.
        images: ``[images, channels, height, width]`` in [0, 1].
        labels: ``[images]``.
        of_margin: of the margin of the logits instead of the cross-entropy.
    """
    images = images.detach().requires_grad_(True)
    with torch.enable_grad():
        logits = classifier(images)
        loss = margin(logits, labels).sum() if of_margin else cross_entropy(logits, labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, images)
    return gradient, logits.detach()


def target_gradient(
    classifier: PixelClassifier, images: torch.Tensor, labels: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of the target's logit minus the label's, in the shape of the images, and that difference itself.

    Args:
        classifier: the model.
        images: ``[images, channels, height, width]`` in [0, 1].
        labels: ``[images]``.
        targets: ``[images]``.
    """
    images = images.detach().requires_grad_(True)
    with torch.enable_grad():
        logits = classifier(images)
        lead = (logits.gather(1, targets[:, None]) - logits.gather(1, labels[:, None]))[:, 0]
        (gradient,) = torch.autograd.grad(lead.sum(), images)
    return gradient, lead.detach()


def margin(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The largest logit of another class minus that of the label, ``[images]``: above 0 the image is misclassified."""
    own = logits.gather(1, labels[:, None])[:, 0]
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return others.amax(1) - own


def fgsm(classifier: PixelClassifier, images: torch.Tensor, labels: torch.Tensor, epsilon: float) -> torch.Tensor:
    """The images after one signed gradient step, in [0, 1].

    Args:
        classifier: the model.
        images: ``[images, channels, height, width]`` in [0, 1].
        labels: ``[images]``.
        epsilon: largest change of a pixel.
    """
    gradient, _ = input_gradient(classifier, images, labels)
    return (images + epsilon * gradient.sign()).clamp(0, 1)


def fgsm_withstood(
    classifier: PixelClassifier, images: torch.Tensor, labels: torch.Tensor, epsilon: float, batch_size: int
) -> torch.Tensor:
    """Whether each image is classified correctly after FGSM, bool ``[images]``."""
    found = []
    for x, y in _batches(classifier, images, labels, batch_size):
        with torch.no_grad():
            found.append((classifier(fgsm(classifier, x, y, epsilon)).argmax(-1) == y).cpu())
    return torch.cat(found)


def pgd_withstood(
    classifier: PixelClassifier,
    images: torch.Tensor,
    labels: torch.Tensor,
    epsilon: float,
    batch_size: int,
    *,
    steps: int = 20,
    restarts: int = 1,
    seed: int = 0,
) -> torch.Tensor:
    """Whether each image is classified correctly whatever PGD does, bool ``[images]``.

    Args:
        classifier: the model.
        images: ``[images, channels, height, width]`` in [0, 1].
        labels: ``[images]``.
        epsilon: largest change of a pixel.
        batch_size: images at once.
        steps: from each start.
        restarts: random starts.
        seed: of the starts.
    """
    standing = torch.ones(len(images), dtype=torch.bool)
    for restart in range(restarts):
        if not standing.any():
            break
        for chosen in standing.nonzero()[:, 0].split(batch_size):
            start = torch.stack([_random_start(images[i].shape, (seed, restart, int(i))) for i in chosen])
            x, y = images[chosen].to(classifier.device), labels[chosen].to(classifier.device)
            moved = (x + epsilon * start.to(x.device)).clamp(0, 1)
            standing[chosen] = _ascend(classifier, x, moved, y, epsilon, steps).cpu()
    return standing


def _ascend(
    classifier: PixelClassifier, x: torch.Tensor, moved: torch.Tensor, y: torch.Tensor, epsilon: float, steps: int
) -> torch.Tensor:
    """Whether each image is classified correctly at the start and after every step; fooled ones are left alone."""
    active = torch.arange(len(x), device=x.device)
    for _ in range(steps):
        gradient, logits = input_gradient(classifier, moved, y[active])
        stands = logits.argmax(-1) == y[active]
        active, moved, gradient = active[stands], moved[stands], gradient[stands]
        if not len(active):
            break
        change = moved + 2.5 * epsilon / steps * gradient.sign() - x[active]
        moved = (x[active] + change.clamp(-epsilon, epsilon)).clamp(0, 1)
    standing = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    if len(active):
        with torch.no_grad():
            standing[active] = classifier(moved).argmax(-1) == y[active]
    return standing


@torch.no_grad()
def spsa_withstood(
    classifier: PixelClassifier,
    images: torch.Tensor,
    labels: torch.Tensor,
    epsilon: float,
    batch_size: int,
    *,
    steps: int = 20,
    samples: int = 64,
    seed: int = 0,
) -> torch.Tensor:
    """Whether each image is classified correctly whatever SPSA does, bool ``[images]``.

    Args:
        classifier: the model; its gradients are not used.
        images: ``[images, channels, height, width]`` in [0, 1].
        labels: ``[images]``.
        epsilon: largest change of a pixel.
        batch_size: images at once.
        steps: of Adam.
        samples: random directions of each estimate, two evaluations each.
        seed: of the directions.
    """
    standing = torch.zeros(len(images), dtype=torch.bool)
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        rng = np.random.default_rng((seed, index))
        x, moved = image.to(classifier.device), image.to(classifier.device)
        first, second = torch.zeros_like(x), torch.zeros_like(x)
        for step in range(1, steps + 1):
            signs = torch.from_numpy(rng.integers(0, 2, (samples, *x.shape), dtype=np.int8) * 2 - 1).to(x)
            around = torch.cat([moved + _SPSA_SHIFT * signs, moved - _SPSA_SHIFT * signs]).clamp(0, 1)
            margins = torch.cat([_margins(classifier, part, label) for part in around.split(batch_size)])
            slope = (margins[:samples] - margins[samples:]) / (2 * _SPSA_SHIFT)
            gradient = (slope[:, None, None, None] * signs).mean(0)
            first = _ADAM[0] * first + (1 - _ADAM[0]) * gradient
            second = _ADAM[1] * second + (1 - _ADAM[1]) * gradient**2
            scale = (second / (1 - _ADAM[1] ** step)).sqrt() + _ADAM[2]
            change = moved + _SPSA_RATE * first / (1 - _ADAM[0] ** step) / scale - x
            moved = (x + change.clamp(-epsilon, epsilon)).clamp(0, 1)
            if not _is_correct(classifier, moved, label):
                break
        else:
            standing[index] = True
    return standing


def check_gradients(
    classifier: PixelClassifier, images: torch.Tensor, labels: torch.Tensor, batch_size: int
) -> dict[str, int]:
    """Whether the model has gradients that an attack can follow.

    Args:
        classifier: the model.
        images: ``[images, channels, height, width]`` in [0, 1].
        labels: ``[images]``.
        batch_size: images at once.

    Returns:
        ``images`` looked at, ``zero_cross_entropy`` and ``zero_margin``: for how many the gradient of the loss, or of
        the margin of the logits, is zero in every pixel. The first alone means that the softmax is saturated, which
        stops FGSM and PGD but not AutoAttack; the second that gradients are masked.

    Raises:
        UsageError: if logits or gradients are not finite: every attack that follows them would be meaningless.
    """
    counts = {"images": len(images), "zero_cross_entropy": 0, "zero_margin": 0}
    broken = 0
    for x, y in _batches(classifier, images, labels, batch_size):
        finite = torch.ones(len(x), dtype=torch.bool, device=x.device)
        for name in ("cross_entropy", "margin"):
            gradient, logits = input_gradient(classifier, x, y, of_margin=name == "margin")
            gradient = gradient.flatten(1)
            finite &= gradient.isfinite().all(1) & logits.isfinite().all(1)
            counts[f"zero_{name}"] += int((gradient == 0).all(1).sum())
        broken += int((~finite).sum())
    if broken:
        raise UsageError(
            f"the model must have finite logits and gradients with respect to its images, got others for {broken} of "
            f"{len(images)}: attacks that follow them would mean nothing"
        )
    return counts


def _batches(
    classifier: PixelClassifier, images: torch.Tensor, labels: torch.Tensor, batch_size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True):
        yield x.to(classifier.device), y.to(classifier.device)


def _random_start(shape: Any, seed: tuple[int, ...]) -> torch.Tensor:
    """Uniform in [-1, 1]."""
    return torch.from_numpy(np.random.default_rng(seed).uniform(-1, 1, tuple(shape)).astype(np.float32))


def _margins(classifier: PixelClassifier, images: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    return margin(classifier(images), label.to(images.device).expand(len(images)))


def _is_correct(classifier: PixelClassifier, image: torch.Tensor, label: torch.Tensor) -> bool:
    return int(classifier(image[None]).argmax()) == int(label)
