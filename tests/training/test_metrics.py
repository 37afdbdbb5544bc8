"""Metrics against independent computations."""

from __future__ import annotations

import math

import evaluate
import numpy as np
import pytest
import torch
from transformers import EvalPrediction

from hf_imgproc_attn.training_support.metrics import (
    Accuracy,
    Perplexity,
    classification_metrics,
    language_model_metrics,
    token_losses,
)


def test_metrics_are_direct_subclasses_of_the_library() -> None:
    assert Accuracy.__bases__ == Perplexity.__bases__ == (evaluate.Metric,)


def test_loss_and_accuracy_against_scikit_learn() -> None:
    from sklearn.metrics import accuracy_score, log_loss

    generator = np.random.default_rng(0)
    logits, labels = generator.normal(size=(50, 4)), generator.integers(0, 4, 50)
    found = classification_metrics(EvalPrediction(predictions=logits, label_ids=labels))
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    assert found == {
        "loss": pytest.approx(log_loss(labels, probabilities, labels=range(4))),
        "accuracy": pytest.approx(accuracy_score(labels, logits.argmax(-1))),
    }


def test_token_losses_and_perplexity_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 7, generator=generator)
    labels = torch.randint(7, (3, 5), generator=generator)
    labels[:, 0] = -100
    labels[2, 3:] = -100  # the filling of a last block
    losses = token_losses(logits, labels)
    assert losses.shape == (3, 4)
    total, count = 0.0, 0
    probabilities = logits.double().softmax(-1)
    for row in range(3):
        for position in range(1, 5):
            if labels[row, position] == -100:
                assert losses[row, position - 1] == 0
                continue
            expected = -math.log(probabilities[row, position - 1, labels[row, position]])
            assert losses[row, position - 1].item() == pytest.approx(expected, rel=1e-5)
            total, count = total + expected, count + 1
    assert count == 10
    compute = language_model_metrics(num_words=6)
    found = compute(EvalPrediction(predictions=losses.numpy(), label_ids=labels.numpy()))
    assert found["loss"] == pytest.approx(total / 10, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(total / 10), rel=1e-5)
    assert found["word_perplexity"] == pytest.approx(math.exp(total / 6), rel=1e-5)


def test_uniform_model_has_the_size_of_the_vocabulary_as_perplexity() -> None:
    losses = np.full(12, math.log(50), dtype=np.float32)
    found = Perplexity(keep_in_memory=True).compute(predictions=losses, words=12)
    assert found == {"perplexity": pytest.approx(50, rel=1e-5), "word_perplexity": pytest.approx(50, rel=1e-5)}
    assert Perplexity(keep_in_memory=True).compute(predictions=[800.0]) == {"perplexity": math.inf}
