"""A classifier of pixels in [0, 1], with the normalisation inside it, and the checks of what it is given."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from ..errors import UsageError, plain_message

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.image_processing_utils import BaseImageProcessor

    from ..training_support.image_pixels import PixelDataset


class PixelClassifier(nn.Module):
    """A classifier of images in [0, 1]: the normalisation is part of it, so that attacks work on pixels.

    The model is used exactly as it is, with its filters and boosters, in evaluation mode. Greyscale images
    ``[batch, 1, height, width]`` are repeated for a model with three channels, so that an attack on them changes grey
    values and not colours.

    Args:
        model: any image classifier of Transformers.
        processor: its image processor.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, model: PreTrainedModel, processor: BaseImageProcessor) -> None:
        super().__init__()
        self.model = model
        mean, std = pixel_statistics(processor, int(getattr(model.config, "num_channels", 3) or 3))
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        self.to(model.device)
        self.eval()

    @property
    def classes(self) -> int:
        """How many classes the model tells apart."""
        return int(self.model.config.num_labels)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        device: torch.device = self.model.device
        return device

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images ``[batch, channels, height, width]`` in [0, 1] -> logits ``[batch, classes]`` in float32."""
        images = images.expand(-1, len(self.mean), -1, -1)
        pixels = ((images - self.mean) / self.std).to(self.model.dtype)
        logits: torch.Tensor = self.model(pixel_values=pixels).logits.float()
        return logits


def pixel_statistics(processor: BaseImageProcessor, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation that pixels in [0, 1] are normalised with, each ``[channels, 1, 1]``.

    What a processor does to 8-bit pixels, by its ``do_rescale``, ``rescale_factor``, ``rescale_offset``,
    ``do_normalize``, ``image_mean`` and ``image_std``, in one formula for pixels in [0, 1].
    """
    scale = 255.0 * (float(processor.rescale_factor) if getattr(processor, "do_rescale", False) else 1.0)
    offset = 1.0 if getattr(processor, "rescale_offset", False) else 0.0
    normalises = bool(getattr(processor, "do_normalize", False))
    mean, std = (processor.image_mean, processor.image_std) if normalises else (0.0, 1.0)
    values = [torch.as_tensor(value, dtype=torch.float32).flatten() for value in (mean, std)]
    values = [value.repeat(channels) if len(value) == 1 else value for value in values]
    return ((values[0] + offset) / scale)[:, None, None], (values[1] / scale)[:, None, None]


def unit_images(dataset: PixelDataset) -> tuple[torch.Tensor, torch.Tensor]:
    """All images of a split, float32 ``[images, channels, height, width]`` in [0, 1], and their labels ``[images]``.

    Where the channels of every image are all the same, one of them is kept: grey images are disturbed as grey images.
    """
    pixels = torch.stack([dataset[index]["pixel_values"] for index in range(len(dataset))])
    is_grey = bool((pixels == pixels[:, :1]).all())
    return (pixels[:, :1] if is_grey else pixels).float() / 255, torch.from_numpy(np.asarray(dataset.labels))


def check_images(images: Any, labels: Any, classifier: PixelClassifier) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and labels as float32 and int64 on the CPU.

    Args:
        images: ``[images, channels, height, width]``, uint8 or floats in [0, 1], of the size that the model takes,
            before any normalisation.
        labels: class indices ``[images]``.
        classifier: what is going to see them.

    Raises:
        UsageError: for another shape, pixels that are outside [0, 1] or no numbers, no image at all, labels that are
            no classes of the model, or images that the model refuses.
    """
    images, labels = torch.as_tensor(images), torch.as_tensor(labels)
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not len(images):
        raise UsageError(f"images must be [images, 1 or 3 channels, height, width], got {list(images.shape)}")
    if images.shape[1] not in (1, len(classifier.mean)):
        raise UsageError(f"images must have 1 or {len(classifier.mean)} channels, got {images.shape[1]}")
    if images.dtype == torch.uint8:
        images = images.float() / 255
    if not images.dtype.is_floating_point:
        raise UsageError(f"images must be uint8, or floating-point in [0, 1], got {images.dtype}")
    low, high = images.min().item(), images.max().item()
    if not (low >= 0 and high <= 1):  # not a number is refused too
        raise UsageError(
            f"images must have pixels in [0, 1], got {low:g} to {high:g}: they are disturbed before the image "
            "processor normalises them"
        )
    if labels.shape != images.shape[:1] or labels.dtype.is_floating_point or labels.dtype == torch.bool:
        raise UsageError(
            f"labels must be one class index an image, [{len(images)}], got {labels.dtype} {list(labels.shape)}"
        )
    wrong = labels[(labels < 0) | (labels >= classifier.classes)]
    if len(wrong):
        raise UsageError(
            f"labels must be classes of the model, 0 to {classifier.classes - 1}, got {int(wrong[0])}: the data set "
            "has other classes than the model"
        )
    images, labels = images.float().cpu(), labels.long().cpu()
    try:
        with torch.no_grad():
            classifier(images[:1].to(classifier.device))
    except (ValueError, RuntimeError) as error:
        size = " x ".join(str(side) for side in images.shape[2:])
        raise UsageError(f"the model refuses images of {size} pixels: {plain_message(error)}") from error
    return images, labels


@torch.no_grad()
def correctness(
    classifier: PixelClassifier, images: torch.Tensor, labels: torch.Tensor, batch_size: int
) -> torch.Tensor:
    """Whether each image is classified correctly, bool ``[images]``.

    Raises:
        UsageError: if a logit is not finite: the largest of such logits says nothing.
    """
    found = []
    for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True):
        logits = classifier(x.to(classifier.device))
        broken = int((~logits.isfinite()).any(-1).sum())
        if broken:
            raise UsageError(f"the model must have finite logits, got others for {broken} of {len(x)} images")
        found.append(logits.argmax(-1).cpu() == y)
    return torch.cat(found)


def pack_bits(correct: torch.Tensor) -> str:
    """A bool ``[images]`` as hexadecimal digits, eight images a pair, for a record."""
    return np.packbits(correct.numpy().astype(bool)).tobytes().hex()


def unpack_bits(text: str, images: int) -> torch.Tensor:
    """What :func:`pack_bits` packed, bool ``[images]``."""
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(text), dtype=np.uint8), count=images)
    return torch.from_numpy(bits.astype(bool))
