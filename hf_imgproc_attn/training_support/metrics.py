"""Metrics of the training scripts, as ``evaluate.Metric`` classes that need no download.

Perplexity is the exponential of a mean negative log-likelihood (natural logarithm): a token, exp(total / tokens
scored); a word, exp(total / words), which can be compared between tokenizers. What counts as a word, and which tokens
are scored, is defined in :mod:`.text_data`.
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


def classification_metrics(prediction: "EvalPrediction") -> dict[str, float]:
    """``compute_metrics`` of the image classifier: logits ``[images, classes]`` -> accuracy."""
    chosen = np.argmax(prediction.predictions, axis=-1)
    result = Accuracy(keep_in_memory=True).compute(predictions=chosen, references=prediction.label_ids)
    return {} if result is None else result


def likeliest_tokens(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """``preprocess_logits_for_metrics`` of recall: the most likely token at every place but the first.

    Args:
        logits: ``[batch, length, vocabulary]``; those of a place predict the next one.
        labels: not used.

    Returns:
        Token ids ``[batch, length - 1]``.
    """
    return logits[:, :-1].argmax(-1)


def answer_metrics(prediction: "EvalPrediction") -> dict[str, float]:
    """``compute_metrics`` of recall, after :func:`likeliest_tokens`: accuracy over all answers that are asked."""
    wanted = prediction.label_ids[:, 1:]
    asked = wanted != IGNORED_LABEL
    metric = Accuracy(keep_in_memory=True)
    return metric.compute(predictions=prediction.predictions[asked], references=wanted[asked]) or {}


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
    """``compute_metrics`` of the language model on a text of ``num_words`` words, after :func:`token_losses`."""

    def compute(prediction: "EvalPrediction") -> dict[str, float]:
        scored = prediction.label_ids[:, 1:] != IGNORED_LABEL
        losses = prediction.predictions[scored]
        result = Perplexity(keep_in_memory=True).compute(predictions=losses, words=num_words)
        return {} if result is None else result

    return compute


def _exp(value: float) -> float:
    """exp, infinite instead of an overflow error."""
    return math.exp(value) if value < 700 else math.inf
