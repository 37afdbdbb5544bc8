"""Metrics of the training scripts, as ``evaluate.Metric`` classes that need no download.

Perplexity is the exponential of a mean negative log-likelihood (natural logarithm): a token, exp(total / tokens
scored); a word, exp(total / words), which can be compared between tokenizers. What counts as a word, and which tokens
are scored, is defined in :mod:`.text_data`.

The loss is here too: the mean over samples, tokens or pixels. Trainer averages the means of batches; with several
processes the last one is filled with samples that are there already, so that it would depend on their number.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import datasets
import evaluate
import numpy as np
import torch

from hf_imgproc_attn.training_support.text_data import IGNORED_LABEL

if TYPE_CHECKING:
    from transformers import EvalPrediction


class Accuracy(evaluate.Metric):
    """Part of the predictions that equal their reference, in [0, 1]."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Part of the predictions that equal their reference.",
            citation="",
            inputs_description="predictions and references: class indices",
            features=datasets.Features(predictions=datasets.Value("int64"), references=datasets.Value("int64")),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}


class Perplexity(evaluate.Metric):
    """Perplexity a token and, given the number of words, a word."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="exp of the mean negative log-likelihood a token and a word.",
            citation="",
            inputs_description="predictions: negative log-likelihoods of the tokens, in nats; words: their words",
            features=datasets.Features(predictions=datasets.Value("float32")),
        )

    def _compute(self, predictions: Any, words: int | None = None) -> dict[str, float]:
        values = np.asarray(predictions, dtype=np.float64)
        result = {"perplexity": _exp(values.mean())}
        if words is not None:
            result["word_perplexity"] = _exp(values.sum() / words)
        return result


class SegmentationScores(evaluate.Metric):
    """Mean intersection over union, and the part of the pixels that have their class, both in [0, 1].

    The union of a class is every pixel that has it or was given it, the intersection those of which both are true; the
    mean is over the classes that have a union. Images are counted together, as the benchmarks of ADE20K do it.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Mean intersection over union of the classes, and accuracy of the pixels.",
            citation="",
            inputs_description="predictions: pixels of each pair (class, prediction), class by class, for each image",
            features=datasets.Features(predictions=datasets.Sequence(datasets.Value("int64"))),
        )

    def _compute(self, predictions: Any) -> dict[str, float]:
        total = np.sum(np.asarray(predictions, dtype=np.int64), axis=0)
        return segmentation_scores(total.reshape(math.isqrt(len(total)), -1))


def segmentation_scores(confusion: np.ndarray) -> dict[str, float]:
    """``mean_iou`` and ``pixel_accuracy`` of pixels counted by class (rows) and prediction (columns); NaN of none."""
    right = np.diag(confusion)
    union = confusion.sum(0) + confusion.sum(1) - right
    if not confusion.any():
        return {"mean_iou": math.nan, "pixel_accuracy": math.nan}
    each = right[union > 0] / union[union > 0]
    return {"mean_iou": float(each.mean()), "pixel_accuracy": float(right.sum() / confusion.sum())}


def count_pixels(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """How many pixels have a class and were given another.

    Args:
        logits: ``[images, classes, rows, columns]``, brought to the masks' size as in the loss.
        labels: ``[images, height, width]``; what is no class does not count.

    Returns:
        ``[images, classes * classes]``, int64, class by class.
    """
    return _counts(_full_size(logits, labels), labels)


def pixel_results(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``preprocess_logits_for_metrics`` of segmentation: numbers of each image instead of all logits.

    Args:
        logits: as of :func:`count_pixels`.
        labels: likewise.

    Returns:
        What :func:`count_pixels` returns, and the sum of the cross-entropies of each image's pixels in nats,
        ``[images]``, float32.
    """
    full = _full_size(logits, labels)
    scored = labels.masked_fill((labels < 0) | (labels >= full.shape[1]), IGNORED_LABEL)
    losses = torch.nn.functional.cross_entropy(full, scored, ignore_index=IGNORED_LABEL, reduction="none")
    return _counts(full, labels), losses.sum((1, 2))


def _full_size(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    size = labels.shape[-2:]
    return torch.nn.functional.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False)


def _counts(full: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    classes = full.shape[1]
    pairs = labels * classes + full.argmax(1)
    counted = (labels >= 0) & (labels < classes)
    return torch.stack(
        [torch.bincount(pair[use], minlength=classes**2) for pair, use in zip(pairs, counted, strict=True)]
    )


class SegmentationMetrics:
    """``compute_metrics`` of segmentation after :func:`pixel_results`, batch by batch (``batch_eval_metrics``)."""

    def __init__(self) -> None:
        self.metric = SegmentationScores(keep_in_memory=True)
        self._loss, self._pixels = 0.0, 0

    def __call__(self, prediction: "EvalPrediction", compute_result: bool = True) -> dict[str, float]:
        counts, losses = (torch.as_tensor(part).cpu() for part in prediction.predictions)
        self.metric.add_batch(predictions=np.asarray(counts))
        self._loss, self._pixels = self._loss + float(losses.double().sum()), self._pixels + int(counts.sum())
        if not compute_result:
            return {}
        loss = self._loss / max(self._pixels, 1)
        self._loss, self._pixels = 0.0, 0
        return {"loss": loss, **(self.metric.compute() or {})}


def classification_metrics(prediction: "EvalPrediction") -> dict[str, float]:
    """``compute_metrics`` of classifiers: logits ``[samples, classes]`` -> loss (cross-entropy in nats), accuracy."""
    logits = torch.from_numpy(np.asarray(prediction.predictions, dtype=np.float64))
    loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(np.asarray(prediction.label_ids)).long())
    chosen = np.argmax(prediction.predictions, axis=-1)
    result = Accuracy(keep_in_memory=True).compute(predictions=chosen, references=prediction.label_ids)
    return {"loss": float(loss), **(result or {})}


def answers(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``preprocess_logits_for_metrics`` of recall: the most likely token at every place but the first, and its loss.

    Args:
        logits: ``[batch, length, vocabulary]``; those of a place predict the next one.
        labels: ``[batch, length]``, -100 where nothing is asked.

    Returns:
        Token ids ``[batch, length - 1]``, and what :func:`token_losses` returns.
    """
    return logits[:, :-1].argmax(-1), token_losses(logits, labels)


def answer_metrics(prediction: "EvalPrediction") -> dict[str, float]:
    """``compute_metrics`` of recall, after :func:`answers`: loss and accuracy over all answers that are asked."""
    (tokens, losses), wanted = prediction.predictions, prediction.label_ids[:, 1:]
    asked = wanted != IGNORED_LABEL
    result = Accuracy(keep_in_memory=True).compute(predictions=tokens[asked], references=wanted[asked]) or {}
    return {"loss": float(losses[asked].mean(dtype=np.float64)), **result}


def token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """``preprocess_logits_for_metrics`` of the language model: keeps one number per token instead of all logits.

    Args:
        logits: ``[batch, length, vocabulary]``.
        labels: ``[batch, length]``, -100 where nothing is scored.

    Returns:
        Negative log-likelihood of labels[:, 1:] in nats, float32 ``[batch, length - 1]``; 0 where nothing is scored.
    """
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED_LABEL, reduction="none"
    ).view(labels.shape[0], -1)


def language_model_metrics(num_words: int) -> Callable[["EvalPrediction"], dict[str, float]]:
    """``compute_metrics`` of the language model on a text of ``num_words`` words, after :func:`token_losses`.

    Its loss is the mean over the tokens that are scored.
    """

    def compute(prediction: "EvalPrediction") -> dict[str, float]:
        scored = prediction.label_ids[:, 1:] != IGNORED_LABEL
        losses = prediction.predictions[scored]
        result = Perplexity(keep_in_memory=True).compute(predictions=losses, words=num_words) or {}
        return {"loss": float(losses.mean(dtype=np.float64)), **result}

    return compute


def _exp(value: float) -> float:
    """exp, infinite instead of an overflow error."""
    return math.exp(value) if value < 700 else math.inf
