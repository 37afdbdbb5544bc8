"""How a segmentation model stands up to disturbed images: Gaussian noise and FGSM; what is measured is the mean IoU.

As in :mod:`hf_imgproc_attn.robustness.images`: images are in [0, 1], disturbed before they are normalised, and clipped
afterwards.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader

from hf_imgproc_attn.models.modeling_dense import segmentation_loss
from hf_imgproc_attn.robustness.classifier import PixelClassifier
from hf_imgproc_attn.robustness.images import gaussian_noise
from hf_imgproc_attn.training_support.mask_pixels import MaskedPixels
from hf_imgproc_attn.training_support.metrics import SegmentationScores, count_pixels

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.image_processing_utils import BaseImageProcessor

BATCH_SIZE = 32
Disturb = Callable[[PixelClassifier, torch.Tensor, torch.Tensor, int], torch.Tensor]
"""Takes the model, images in [0, 1], masks and the number of the batch; gives other images in [0, 1]."""


def fgsm(
    segmenter: PixelClassifier, images: torch.Tensor, masks: torch.Tensor, epsilon: float, ignore_index: int
) -> torch.Tensor:
    """One step of the fast gradient sign method (Goodfellow 2015) against the mean loss of all pixels.

    Args:
        segmenter: takes images in [0, 1].
        images: ``[batch, channels, height, width]`` in [0, 1].
        masks: ``[batch, height, width]``.
        epsilon: largest change of a pixel.
        ignore_index: label of pixels that do not count.
    """
    images = images.detach().requires_grad_()
    loss = segmentation_loss(segmenter(images), masks, ignore_index)
    (gradient,) = torch.autograd.grad(loss, images)
    return (images + epsilon * gradient.sign()).clamp(0, 1).detach()


def scores(segmenter: PixelClassifier, dataset: MaskedPixels, disturb: Disturb | None = None) -> dict[str, float]:
    """``mean_iou`` and ``pixel_accuracy`` on a split, clean or disturbed.

    Args:
        segmenter: takes images in [0, 1].
        dataset: the split, not augmented.
        disturb: what is done to the images; None: nothing.
    """
    metric, device = SegmentationScores(keep_in_memory=True), segmenter.model.device
    for number, batch in enumerate(DataLoader(dataset, batch_size=BATCH_SIZE)):
        images, masks = batch["pixel_values"].float().to(device) / 255, batch["labels"].to(device)
        if disturb is not None:
            images = disturb(segmenter, images, masks, number)
        with torch.no_grad():
            metric.add_batch(predictions=count_pixels(segmenter(images), masks).cpu().numpy())
    return metric.compute() or {}


def mask_robustness(
    model: "PreTrainedModel",
    processor: "BaseImageProcessor",
    dataset: MaskedPixels,
    *,
    sigmas: Sequence[float],
    epsilons: Sequence[float],
    seed: int,
) -> list[dict[str, Any]]:
    """Mean IoU and accuracy of the pixels on clean images, with Gaussian noise, and under FGSM.

    Args:
        model: of semantic segmentation.
        processor: its image processor.
        dataset: the split.
        sigmas: standard deviations of the noise, pixels in [0, 1].
        epsilons: largest changes of a pixel in [0, 1].
        seed: of the noise.

    Returns:
        Results as :mod:`hf_imgproc_attn.robustness.images` describes them.
    """
    segmenter, ignored = PixelClassifier(model, processor), dataset.args.ignore_index
    kinds: list[tuple[dict[str, Any], Disturb | None]] = [
        ({"family": "clean", "disturbance": "clean", "parameters": {}, "seed": None}, None)
    ]
    for sigma in sigmas:
        kind = {"family": "noise", "disturbance": "Gaussian noise", "parameters": {"sigma": sigma}, "seed": seed}

        def noise(_: Any, images: torch.Tensor, __: torch.Tensor, number: int, sigma: float = sigma) -> torch.Tensor:
            return gaussian_noise(images.cpu(), sigma, seed + number).to(images.device)

        kinds.append((kind, noise))
    for epsilon in epsilons:
        kind = {"family": "attack", "disturbance": "FGSM", "parameters": {"epsilon": epsilon}, "seed": None}

        def attack(
            target: PixelClassifier, images: torch.Tensor, masks: torch.Tensor, _: int, epsilon: float = epsilon
        ) -> torch.Tensor:
            return fgsm(target, images, masks, epsilon, ignored)

        kinds.append((kind, attack))
    return [
        {**kind, "metric": name, "value": value, "samples": len(dataset), "unit": "images"}
        for kind, disturb in kinds
        for name, value in scores(segmenter, dataset, disturb).items()
    ]
