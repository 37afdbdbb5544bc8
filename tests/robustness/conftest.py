"""A tiny classifier whose own answers are the labels, so that it makes no error on clean images."""

from __future__ import annotations

import pytest
import torch

from hf_imgproc_attn.robustness.classifier import PixelClassifier
from hf_imgproc_attn.training_support.arguments import ModelArguments
from hf_imgproc_attn.training_support.model_setup import build_image_classifier
from tests.training.conftest import TINY_VIT

Classifier = PixelClassifier


def random_pictures() -> torch.Tensor:
    return torch.randint(0, 256, (24, 3, 8, 8), generator=torch.Generator().manual_seed(1)).float() / 255


def tiny_classifier(preset: str = "bilateral_twicing", classes: int = 4, seed: int = 0) -> PixelClassifier:
    torch.manual_seed(seed)
    args = ModelArguments(preset=preset, config_overrides=TINY_VIT)
    model, processor = build_image_classifier(args, [f"class {number}" for number in range(classes)], (8, 8))
    classifier = PixelClassifier(model, processor)
    with torch.no_grad():
        model.classifier.weight.normal_(std=3)
        # Otherwise one class would be far ahead for every image.
        model.classifier.bias -= classifier(random_pictures()).mean(0)
    classifier.processor = processor
    return classifier


@pytest.fixture(scope="module")
def classifier() -> PixelClassifier:
    return tiny_classifier()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return random_pictures()


@pytest.fixture(scope="module")
def labels(classifier: PixelClassifier, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return classifier(images).argmax(-1)
