"""AutoAttack (Croce and Hein 2020, arXiv 2003.01690), mostly from parts of the Adversarial Robustness Toolbox (ART).

Four attacks within the largest change ε of a pixel, each on the images that withstood the ones before:

1. APGD-CE: PGD on the cross-entropy that halves its steps by itself, from one random start;
2. APGD-T: the same on the ratio of differences of logits (DLR), towards each of the likeliest other classes in turn.
   The ratio does not change with the scale of the logits, so that a saturated softmax does not hide the gradient;
3. FAB-T: the smallest change over the boundary to each of these classes (:mod:`.boundary`, which is ours);
4. Square (Andriushchenko et al. 2020, arXiv 1912.00049): random squares, with no gradients at all.

Differs from the authors' program:

- ART's class ``AutoAttack`` has DeepFool in the place of FAB, whose changes are small in the Euclidean norm and seldom
  within ε; it is not used.
- ART's targeted DLR divides by the difference of the first and the third logit instead of the authors' variant for
  targets, which needs four classes. With two classes there is no such ratio, and APGD-T is left out.
- ART's Square draws one square for all images of a batch, and has to start with one smaller than the picture.
- An image counts as fooled where the model, asked once more as it is used, misclassifies what an attack returns within
  ε and [0, 1].
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch

from ..errors import require_extras
from .boundary import fab_withstood
from .classifier import PixelClassifier, correctness
from .settings import ImageSettings

PARTS = ("APGD-CE", "APGD-T", "FAB-T", "Square")
_ROUNDING = 1e-4
_SQUARE_PART = 0.8  # of the picture, that the first square covers, in the authors' settings

Array = np.ndarray[Any, Any]
Attack = Callable[[Array, Array], Iterator[Array]]
Withstand = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Takes a batch and its labels; tells which images an attack leaves right."""


def auto_attack_withstood(
    classifier: PixelClassifier,
    images: torch.Tensor,
    labels: torch.Tensor,
    epsilon: float,
    settings: ImageSettings,
) -> tuple[torch.Tensor, dict[str, int]]:
    """Whether each image is classified correctly whatever the four attacks do.

    Args:
        classifier: the model.
        images: ``[images, channels, height, width]`` in [0, 1].
        labels: ``[images]``.
        epsilon: largest change of a pixel.
        settings: ``autoattack_steps``, ``autoattack_targets``, ``square_queries``, ``batch_size`` and ``seed``.

    Returns:
        Bool ``[images]``, and how many images that had withstood all before each attack fooled, by the names in
        :data:`PARTS`.

    Raises:
        UsageError: if ART is not installed.
    """
    require_extras("robustness")
    standing = correctness(classifier, images, labels, settings.batch_size)
    fooled: dict[str, int] = {}
    with _seeded(settings.seed):
        attacks = _attacks(classifier, images, epsilon, settings)
        for name, attack in attacks.items():
            before = int(standing.sum())
            for chosen in standing.nonzero()[:, 0].split(settings.batch_size):
                if not len(chosen):  # nothing is left to attack
                    continue
                standing[chosen] = attack(images[chosen], labels[chosen])
            fooled[name] = before - int(standing.sum())
    classifier.zero_grad(set_to_none=True)  # ART leaves gradients behind
    classifier.eval()
    return standing, fooled


def _withstand(
    classifier: PixelClassifier, epsilon: float, attack: Attack, images: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Which images of a batch are classified correctly after every try of an attack; fooled ones are left alone."""
    standing = torch.ones(len(images), dtype=torch.bool)
    for changed in attack(images.numpy(), labels.numpy()):
        moved = torch.from_numpy(changed)
        within = ((moved - images).abs().flatten(1).amax(1) <= epsilon * (1 + _ROUNDING)) & (
            (moved >= 0) & (moved <= 1)
        ).flatten(1).all(1)
        standing &= correctness(classifier, moved, labels, len(images)) | ~within
        if not standing.any():
            break
    return standing


def _attacks(
    classifier: PixelClassifier, images: torch.Tensor, epsilon: float, settings: ImageSettings
) -> dict[str, Withstand]:
    """Name -> attack."""
    parts: dict[str, Withstand] = {
        name: partial(_withstand, classifier, epsilon, attack)
        for name, attack in _art_attacks(classifier, images, epsilon, settings).items()
    }
    parts["FAB-T"] = partial(_fab, classifier, epsilon, settings)
    return {name: parts[name] for name in PARTS if name in parts}


def _fab(
    classifier: PixelClassifier, epsilon: float, settings: ImageSettings, images: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """FAB towards one class after the other, on the images that withstood it so far."""
    standing = torch.ones(len(images), dtype=torch.bool)
    for target in _targets(classifier, images.numpy(), labels.numpy(), settings.autoattack_targets):
        left = standing.nonzero()[:, 0]
        if not len(left):
            break
        targets = torch.from_numpy(target)[left]
        steps = settings.autoattack_steps
        standing[left] = fab_withstood(classifier, images[left], labels[left], targets, epsilon, steps)
    return standing


def _art_attacks(
    classifier: PixelClassifier, images: torch.Tensor, epsilon: float, settings: ImageSettings
) -> dict[str, Attack]:
    """Name -> attack of ART, which yields changed images once or, for each target, once more."""
    from art.attacks.evasion import AutoProjectedGradientDescent, SquareAttack
    from art.estimators.classification import PyTorchClassifier

    shape = tuple(images.shape[1:])
    estimator = PyTorchClassifier(
        classifier,
        loss=torch.nn.CrossEntropyLoss(),
        input_shape=shape,
        nb_classes=classifier.classes,
        clip_values=(0.0, 1.0),
        device_type="gpu" if classifier.device.type == "cuda" else "cpu",
    )
    descent = {
        "eps": epsilon, "eps_step": 2 * epsilon, "max_iter": settings.autoattack_steps, "nb_random_init": 1,
        "batch_size": settings.batch_size, "verbose": False,
    }  # fmt: skip
    first = AutoProjectedGradientDescent(estimator, loss_type="cross_entropy", **descent)
    height, width = shape[1:]
    largest = (min(height, width) - 1) ** 2 / (height * width)  # ART has no place for a square as wide as the picture
    square = SquareAttack(
        estimator,
        eps=epsilon,
        max_iter=settings.square_queries,
        p_init=min(_SQUARE_PART, largest),
        batch_size=settings.batch_size,
        verbose=False,
    )

    def once(attack: Any) -> Attack:
        def run(x: Any, y: Any) -> Iterator[Any]:
            yield attack.generate(x.copy(), y)

        return run

    attacks = {"APGD-CE": once(first)}
    if classifier.classes > 2:
        ratio = AutoProjectedGradientDescent(estimator, loss_type="difference_logits_ratio", targeted=True, **descent)

        def targeted(x: Any, y: Any) -> Iterator[Any]:
            for target in _targets(classifier, x, y, settings.autoattack_targets):
                yield ratio.generate(x.copy(), target)

        attacks["APGD-T"] = targeted
    return {**attacks, "Square": once(square)}


@torch.no_grad()
def _targets(classifier: PixelClassifier, images: Any, labels: Any, count: int) -> Iterator[Any]:
    """The likeliest other class of every image, then the second, and so on."""
    logits = classifier(torch.from_numpy(images).to(classifier.device)).cpu()
    order = logits.scatter(1, torch.from_numpy(labels)[:, None], -torch.inf).argsort(1, descending=True)
    for place in range(min(count, classifier.classes - 1)):
        yield order[:, place].numpy()


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """ART draws from NumPy's global generator, which is put back afterwards."""
    before = np.random.get_state()
    try:
        np.random.seed(seed)
        yield
    finally:
        np.random.set_state(before)
