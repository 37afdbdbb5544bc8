"""Accuracy under noise and FGSM, perplexity under word swap."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hf_imgproc_attn.training_support.arguments import ModelArguments
from hf_imgproc_attn.training_support.evaluation import (
    PixelClassifier,
    accuracy,
    fgsm_accuracy,
    gaussian_noise,
    image_robustness,
    text_perplexity,
    text_robustness,
    unit_images,
)
from hf_imgproc_attn.training_support.image_pixels import NormalizingCollator, PixelDataset
from hf_imgproc_attn.training_support.model_setup import build_causal_lm, build_image_classifier
from hf_imgproc_attn.training_support.text_data import TextSplit, encode
from hf_imgproc_attn.training_support.tokenizer import train_tokenizer
from tests.training.conftest import TINY_GPT2, TINY_VIT


@pytest.fixture
def classifier() -> PixelClassifier:
    torch.manual_seed(0)
    args = ModelArguments(preset="bilateral_twicing", config_overrides=TINY_VIT)
    model, processor = build_image_classifier(args, list("abcd"), (8, 8))
    with torch.no_grad():
        model.classifier.weight.normal_(std=3)
    return PixelClassifier(model, processor)


def test_classifier_normalises_as_training_does(classifier: PixelClassifier) -> None:
    import datasets

    from hf_imgproc_attn.training_support.image_pixels import build_image_processor
    from tests.training.conftest import random_images

    rows = datasets.Dataset.from_dict({"img": random_images(5)}, features=datasets.Features(img=datasets.Image()))
    processor = build_image_processor((8, 8), 3)
    dataset = PixelDataset(rows, torch.arange(5).numpy(), "img", processor, description="")
    images, labels = unit_images(dataset)
    batch = NormalizingCollator(processor)([dataset[i] for i in range(5)])
    torch.testing.assert_close(classifier(images), classifier.model(pixel_values=batch["pixel_values"]).logits)
    assert labels.tolist() == [0, 1, 2, 3, 4]
    assert images.shape[1] == 3
    grey = images[:, :1]
    torch.testing.assert_close(classifier(grey), classifier(grey.expand(-1, 3, -1, -1)))


def test_grey_images_keep_one_channel() -> None:
    import datasets
    from PIL import Image

    from hf_imgproc_attn.training_support.image_pixels import build_image_processor

    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8), dtype=np.uint8)
    features = datasets.Features(img=datasets.Image())
    rows = datasets.Dataset.from_dict({"img": [Image.fromarray(image) for image in pixels]}, features=features)
    dataset = PixelDataset(rows, np.arange(3), "img", build_image_processor((8, 8), 3), description="")
    images, _ = unit_images(dataset)
    torch.testing.assert_close(images, torch.from_numpy(pixels)[:, None].float() / 255)


def test_noise_has_the_given_deviation_is_clipped_and_repeats() -> None:
    images = torch.full((50, 1, 8, 8), 0.5)
    noisy = gaussian_noise(images, 0.1, seed=3)
    assert (noisy - images).std().item() == pytest.approx(0.1, rel=0.05)
    assert torch.equal(noisy, gaussian_noise(images, 0.1, seed=3))
    assert not torch.equal(noisy, gaussian_noise(images, 0.1, seed=4))
    strong = gaussian_noise(images, 5.0)
    assert (strong.min().item(), strong.max().item()) == (0.0, 1.0)


def test_fgsm_equals_the_signed_gradient_step(classifier: PixelClassifier) -> None:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(24, 3, 8, 8, generator=generator)
    with torch.no_grad():
        labels = classifier(images).argmax(-1)  # all correct without the attack
    epsilon = 0.05
    moved = images.clone().requires_grad_(True)
    torch.nn.functional.cross_entropy(classifier(moved), labels, reduction="sum").backward()
    assert moved.grad is not None
    attacked = (images + epsilon * moved.grad.sign()).clamp(0, 1)
    expected = accuracy(classifier, attacked, labels)
    assert accuracy(classifier, images, labels) == 1
    assert expected < 1
    assert fgsm_accuracy(classifier, images, labels, epsilon, batch_size=10) == pytest.approx(expected)


def test_text_perplexity_equals_one_pass_over_a_single_block() -> None:
    torch.manual_seed(0)
    text = TextSplit(["one two three\n", "four five\n"])
    tokenizer = train_tokenizer(text.lines, 270)
    model, _ = build_causal_lm(ModelArguments(preset="twicing", config_overrides=TINY_GPT2), tokenizer, 64)
    with torch.no_grad():
        model.get_input_embeddings().weight.normal_(std=1)
    ids = torch.from_numpy(encode(text, tokenizer, "")).long()[None]
    assert ids.shape[1] <= 64
    mean = model(input_ids=ids, labels=ids).loss.item()
    found = text_perplexity(model, tokenizer, text, block_size=64)
    token, word = found
    assert token["value"] == pytest.approx(math.exp(mean), rel=1e-4)
    assert word["value"] == pytest.approx(math.exp(mean * (ids.shape[1] - 1) / 7), rel=1e-4)
    assert [entry["metric"] for entry in found] == ["perplexity", "word_perplexity"]
    assert [(entry["samples"], entry["unit"]) for entry in found] == [(ids.shape[1] - 1, "tokens"), (7, "words")]
    both = text_robustness(model, tokenizer, text, 64, fraction=1.0, seed=5)
    swapped = text_perplexity(model, tokenizer, TextSplit(["AAA AAA AAA\n", "AAA AAA\n"]), 64)
    for entry, expected, family, seed in zip(
        both, [*found, *swapped], ["clean", "clean", "word swap", "word swap"], [None, None, 5, 5], strict=True
    ):
        assert expected.items() <= entry.items()
        assert (entry["family"], entry["seed"]) == (family, seed)
    short = text_perplexity(model, tokenizer, text, block_size=4)
    assert short[0]["value"] != pytest.approx(token["value"], rel=1e-3)  # less context


def test_image_results_say_what_was_measured_and_how(classifier: PixelClassifier) -> None:
    import datasets

    from hf_imgproc_attn.training_support.image_pixels import build_image_processor
    from tests.training.conftest import random_images

    rows = datasets.Dataset.from_dict({"img": random_images(40)}, features=datasets.Features(img=datasets.Image()))
    processor = build_image_processor((8, 8), 3)
    dataset = PixelDataset(rows, np.arange(40) % 4, "img", processor, description="")
    images, labels = unit_images(dataset)
    clean, noisy, attacked = image_robustness(
        classifier.model, processor, dataset, sigmas=[0.3], epsilons=[0.05], seed=3
    )
    measured = {"metric": "accuracy", "samples": 40, "unit": "images"}
    value = accuracy(classifier, images, labels)
    assert clean == measured | {
        "family": "clean", "disturbance": "clean", "parameters": {}, "seed": None, "value": value,
    }  # fmt: skip
    value = accuracy(classifier, gaussian_noise(images, 0.3, seed=3), labels)
    assert noisy == measured | {
        "family": "noise", "disturbance": "Gaussian noise", "parameters": {"sigma": 0.3}, "seed": 3, "value": value,
    }  # fmt: skip
    value = fgsm_accuracy(classifier, images, labels, 0.05)
    assert attacked == measured | {
        "family": "attack", "disturbance": "FGSM", "parameters": {"epsilon": 0.05}, "seed": None, "value": value,
    }  # fmt: skip
