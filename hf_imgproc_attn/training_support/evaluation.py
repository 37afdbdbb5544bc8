"""How a trained model stands up to disturbed inputs: noise and FGSM on images, word swap on text.

Images are in [0, 1] with channels first; noise levels and epsilons are in the same unit (8/255 is eight grey levels of
an 8-bit image). Images are disturbed before normalisation, as files would be, and clipped to [0, 1] afterwards.
"""

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from hf_imgproc_attn.training_support.errors import require_extras
from hf_imgproc_attn.training_support.image_pixels import PixelDataset, channel_statistics
from hf_imgproc_attn.training_support.metrics import Perplexity, token_losses
from hf_imgproc_attn.training_support.text_data import IGNORED_LABEL, TextSplit, TokenBlocks, encode, swap_words

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.image_processing_utils import BaseImageProcessor


class PixelClassifier(nn.Module):
    """A classifier of images in [0, 1]: the normalisation is part of it, so that attacks work on pixels.

    Greyscale images ``[batch, 1, height, width]`` are repeated for a model with three channels, so that an attack on
    them changes grey values and not colours.

    Args:
        model: an image classifier.
        processor: its image processor.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, model: "PreTrainedModel", processor: "BaseImageProcessor") -> None:
        super().__init__()
        self.model = model
        mean, std = channel_statistics(processor)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)
        self.to(model.device)
        self.eval()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images ``[batch, channels, height, width]`` in [0, 1] -> logits ``[batch, classes]``."""
        images = images.expand(-1, len(self.mean), -1, -1)
        logits: torch.Tensor = self.model(pixel_values=(images - self.mean) / self.std).logits
        return logits


def unit_images(dataset: PixelDataset, *, greyscale: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """All images of a split, float32 ``[images, channels, height, width]`` in [0, 1], and their labels ``[images]``.

    Args:
        dataset: the split.
        greyscale: keep one channel only; for images whose channels are all the same.
    """
    pixels = torch.stack([dataset[index]["pixel_values"] for index in range(len(dataset))])
    return (pixels[:, :1] if greyscale else pixels).float() / 255, torch.from_numpy(np.asarray(dataset.labels))


def gaussian_noise(images: torch.Tensor, sigma: float, seed: int = 0) -> torch.Tensor:
    """Add white Gaussian noise of standard deviation ``sigma``, the same for the same seed, and clip to [0, 1]."""
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    return (images + sigma * noise).clamp(0, 1)


@torch.no_grad()
def accuracy(classifier: PixelClassifier, images: torch.Tensor, labels: torch.Tensor, batch_size: int = 256) -> float:
    """Part of the images that are classified correctly, in [0, 1]."""
    device = classifier.model.device
    batches = zip(images.split(batch_size), labels.split(batch_size), strict=True)
    correct = sum(int((classifier(x.to(device)).argmax(-1).cpu() == y).sum()) for x, y in batches)
    return correct / len(labels)


def fgsm_accuracy(
    classifier: PixelClassifier, images: torch.Tensor, labels: torch.Tensor, epsilon: float, batch_size: int = 256
) -> float:
    """Accuracy under the fast gradient sign method (Goodfellow 2015), by the ``foolbox`` library.

    Args:
        classifier: takes images in [0, 1].
        images: ``[images, channels, height, width]`` in [0, 1].
        labels: ``[images]``.
        epsilon: largest change of a pixel.
        batch_size: images attacked at once.

    Raises:
        UsageError: if ``foolbox`` is not installed.
    """
    require_extras("robustness")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # foolbox 3.3 imports SciPy by a path that is going away
        from foolbox.attacks import FGSM
        from foolbox.models.pytorch import PyTorchModel

    device = classifier.model.device
    target = PyTorchModel(classifier, bounds=(0, 1), device=device)
    attack = FGSM()
    fooled = 0
    for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True):
        _, _, success = attack(target, x.to(device), y.to(device), epsilons=epsilon)
        fooled += int(success.sum())
    return 1 - fooled / len(labels)


def image_robustness(
    model: "PreTrainedModel",
    processor: "BaseImageProcessor",
    dataset: PixelDataset,
    *,
    sigmas: tuple[float, ...],
    epsilons: tuple[float, ...],
    greyscale: bool = False,
    seed: int = 0,
) -> dict[str, float]:
    """Accuracy on clean images, with Gaussian noise of every ``sigma``, and under FGSM with every ``epsilon``.

    Returns:
        ``{"clean": ..., "noise 0.1": ..., "FGSM 0.03": ...}``, accuracies in [0, 1].
    """
    classifier = PixelClassifier(model, processor)
    images, labels = unit_images(dataset, greyscale=greyscale)
    result = {"clean": accuracy(classifier, images, labels)}
    for sigma in sigmas:
        result[f"noise {sigma:g}"] = accuracy(classifier, gaussian_noise(images, sigma, seed), labels)
    for epsilon in epsilons:
        result[f"FGSM {epsilon:.3g}"] = fgsm_accuracy(classifier, images, labels, epsilon)
    return result


@torch.no_grad()
def text_perplexity(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    text: TextSplit,
    block_size: int,
    batch_size: int = 16,
) -> dict[str, float]:
    """Perplexity a token and a word on a text, as defined in :mod:`.text_data`."""
    blocks = TokenBlocks(encode(text, tokenizer, "tokenising"), block_size, int(tokenizer.pad_token_id or 0))
    model.eval()
    losses = []
    for batch in DataLoader(blocks, batch_size=batch_size):
        labels = batch["labels"].to(model.device)
        found = token_losses(model(input_ids=batch["input_ids"].to(model.device), use_cache=False).logits, labels)
        losses.append(found[labels[:, 1:] != IGNORED_LABEL].cpu())
    values = Perplexity(keep_in_memory=True).compute(predictions=torch.cat(losses).numpy(), words=text.num_words)
    return dict(values or {})


def text_robustness(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", text: TextSplit, block_size: int, **swap: Any
) -> dict[str, dict[str, float]]:
    """Perplexity on the text as it is and after word swap.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        text: lines of a test split.
        block_size: tokens in a block.
        **swap: ``fraction`` and ``seed`` of :func:`.text_data.swap_words`.
    """
    return {
        "clean": text_perplexity(model, tokenizer, text, block_size),
        "word swap": text_perplexity(model, tokenizer, swap_words(text, **swap), block_size),
    }
