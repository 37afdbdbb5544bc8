"""How a trained model stands up to disturbed inputs: noise and FGSM on images, word swap on text.

Images are in [0, 1] with channels first; noise levels and epsilons are in the same unit (8/255 is eight grey levels of
an 8-bit image). Images are disturbed before normalisation, as files would be, and clipped to [0, 1] afterwards.

A result is a dictionary: ``family`` and name of the ``disturbance``, its ``parameters`` and ``seed`` (None where it
draws no numbers), the ``metric`` and its ``value``, and on how many ``samples`` of which ``unit`` it was measured.
"""

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding

from hf_imgproc_attn.errors import require_extras
from hf_imgproc_attn.training_support.image_pixels import PixelDataset, channel_statistics
from hf_imgproc_attn.training_support.labelled_text import LabelledTexts, TokenizedTexts
from hf_imgproc_attn.training_support.metrics import Perplexity, token_losses
from hf_imgproc_attn.training_support.text_data import (
    IGNORED_LABEL,
    SWAPPED_WORD,
    TextSplit,
    TokenBlocks,
    encode,
    swap_words,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.image_processing_utils import BaseImageProcessor

DEFINITIONS = {
    "Gaussian noise": "white, added to the pixels, which are then clipped",
    "sigma": "standard deviation, in pixel values from 0 to 1",
    "FGSM": "fast gradient sign method (Goodfellow 2015), one step with the gradient of the evaluated model itself",
    "epsilon": "largest change of a pixel, in pixel values from 0 to 1",
    "word swap": f"randomly chosen words replaced by {SWAPPED_WORD}, which a language model has to predict like the "
    "others",
    "fraction": "part of the words that is replaced",
}
"""The disturbances and their parameters."""


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


def unit_images(dataset: PixelDataset) -> tuple[torch.Tensor, torch.Tensor]:
    """All images of a split, float32 ``[images, channels, height, width]`` in [0, 1], and their labels ``[images]``.

    Where the channels of every image are all the same, one of them is kept: grey images are disturbed as grey images.
    """
    pixels = torch.stack([dataset[index]["pixel_values"] for index in range(len(dataset))])
    is_grey = bool((pixels == pixels[:, :1]).all())
    return (pixels[:, :1] if is_grey else pixels).float() / 255, torch.from_numpy(np.asarray(dataset.labels))


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
    sigmas: Sequence[float],
    epsilons: Sequence[float],
    seed: int,
) -> list[dict[str, Any]]:
    """Accuracy on clean images, with Gaussian noise of every ``sigma``, and under FGSM with every ``epsilon``.

    Args:
        model: an image classifier.
        processor: its image processor.
        dataset: the split.
        sigmas: standard deviations, pixels in [0, 1].
        epsilons: largest changes of a pixel in [0, 1].
        seed: of the noise.

    Returns:
        Results, accuracies in [0, 1].
    """
    classifier = PixelClassifier(model, processor)
    images, labels = unit_images(dataset)
    measured = {"metric": "accuracy", "samples": len(labels), "unit": "images"}
    clean = accuracy(classifier, images, labels)
    results = [{**measured, "family": "clean", "disturbance": "clean", "parameters": {}, "seed": None, "value": clean}]
    for sigma in sigmas:
        noise = {"family": "noise", "disturbance": "Gaussian noise", "parameters": {"sigma": sigma}, "seed": seed}
        value = accuracy(classifier, gaussian_noise(images, sigma, seed), labels)
        results.append({**measured, **noise, "value": value})
    for epsilon in epsilons:
        attack = {"family": "attack", "disturbance": "FGSM", "parameters": {"epsilon": epsilon}, "seed": None}
        results.append({**measured, **attack, "value": fgsm_accuracy(classifier, images, labels, epsilon)})
    return results


@torch.no_grad()
def text_perplexity(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    text: TextSplit,
    block_size: int,
    batch_size: int = 16,
) -> list[dict[str, Any]]:
    """Perplexity a token and a word on a text, as defined in :mod:`.text_data`.

    Returns:
        Their ``metric``, ``value``, ``samples`` and ``unit``.
    """
    blocks = TokenBlocks(encode(text, tokenizer, "tokenising"), block_size, int(tokenizer.pad_token_id or 0))
    model.eval()
    losses = []
    for batch in DataLoader(blocks, batch_size=batch_size):
        labels = batch["labels"].to(model.device)
        found = token_losses(model(input_ids=batch["input_ids"].to(model.device), use_cache=False).logits, labels)
        losses.append(found[labels[:, 1:] != IGNORED_LABEL].cpu())
    scored = torch.cat(losses)
    values = Perplexity(keep_in_memory=True).compute(predictions=scored.numpy(), words=text.num_words) or {}
    return [
        {"metric": "perplexity", "value": values["perplexity"], "samples": len(scored), "unit": "tokens"},
        {"metric": "word_perplexity", "value": values["word_perplexity"], "samples": text.num_words, "unit": "words"},
    ]


@torch.no_grad()
def labelled_text_robustness(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    split: LabelledTexts,
    max_length: int,
    *,
    fraction: float,
    seed: int,
) -> list[dict[str, Any]]:
    """Accuracy of a text classifier on the texts as they are and after word swap (:func:`.text_data.swap_words`).

    Args:
        model: a classifier.
        tokenizer: its tokenizer.
        split: texts and classes.
        max_length: tokens of a text that are read.
        fraction: part of the words that is replaced.
        seed: of the choice of words.

    Returns:
        Results, accuracies in [0, 1].
    """
    collate = DataCollatorWithPadding(tokenizer)
    model.eval()
    results = []
    swap = {"family": "word swap", "disturbance": "word swap", "parameters": {"fraction": fraction}, "seed": seed}
    clean: dict[str, Any] = {"family": "clean", "disturbance": "clean", "parameters": {}, "seed": None}
    for kind, texts in ((clean, split.texts), (swap, swap_words(TextSplit(split.texts), fraction, seed).lines)):
        rows = TokenizedTexts(LabelledTexts(texts, split.labels), tokenizer, max_length)
        correct = 0
        for batch in DataLoader(rows, batch_size=64, collate_fn=collate):
            labels = batch.pop("labels")
            logits = model(**{name: tensor.to(model.device) for name, tensor in batch.items()}).logits
            correct += int((logits.argmax(-1).cpu() == labels).sum())
        measured = {"metric": "accuracy", "value": correct / len(rows), "samples": len(rows), "unit": "texts"}
        results.append({**kind, **measured})
    return results


def text_robustness(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    text: TextSplit,
    block_size: int,
    *,
    fraction: float,
    seed: int,
) -> list[dict[str, Any]]:
    """Perplexity on the text as it is and after word swap (:func:`.text_data.swap_words`).

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        text: lines of a split.
        block_size: tokens in a block.
        fraction: part of the words that is replaced.
        seed: of the choice of words.

    Returns:
        Results.
    """
    swap = {"family": "word swap", "disturbance": "word swap", "parameters": {"fraction": fraction}, "seed": seed}
    clean: dict[str, Any] = {"family": "clean", "disturbance": "clean", "parameters": {}, "seed": None}
    return [
        {**kind, **measured}
        for kind, lines in ((clean, text), (swap, swap_words(text, fraction, seed)))
        for measured in text_perplexity(model, tokenizer, lines, block_size)
    ]
