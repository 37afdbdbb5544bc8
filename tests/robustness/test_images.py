"""Image classifiers on clean, noisy, corrupted and attacked images: what is measured, and how it is named."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_imgproc_attn.robustness import ImageSettings, evaluate_robustness, mean_corruption_error, unpack_bits
from hf_imgproc_attn.robustness.classifier import PixelClassifier, correctness, pack_bits, unit_images
from hf_imgproc_attn.robustness.images import corrupted, count_measurements, gaussian_noise
from hf_imgproc_attn.training_support.image_pixels import NormalizingCollator, PixelDataset
from tests.robustness.conftest import Classifier


def test_classifier_normalises_as_training_does(classifier: Classifier) -> None:
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


def test_results_say_what_was_measured_and_how(
    classifier: Classifier, images: torch.Tensor, labels: torch.Tensor
) -> None:
    settings = ImageSettings(
        corruptions=("fog", "shot_noise"), severities=(1, 5), sigmas=(0.3,), attacks=("fgsm", "pgd"),
        epsilons=(0.05,), attack_samples=10, steps=3, seed=3, batch_size=7,
    )  # fmt: skip
    seen: list = []
    report = evaluate_robustness(
        classifier.model, classifier.processor, images, labels, settings, on_result=seen.append
    )
    results = report["results"]
    assert seen == results
    assert len(results) == count_measurements(settings) == 10
    measured = {"metric": "accuracy", "samples": 24, "unit": "images"}

    def expected(about: dict, right: torch.Tensor, seed: int | None) -> dict:
        value = {"value": right.float().mean().item(), "correct": pack_bits(right)}
        return measured | about | value | {"seed": seed}

    noisy = gaussian_noise(images, 0.3, seed=3)
    foggy = corrupted(images, "fog", 5, "cifar10-c", settings)
    about = [
        ({"family": "clean", "disturbance": "clean", "parameters": {}}, images, None),
        ({"family": "noise", "disturbance": "Gaussian noise", "parameters": {"sigma": 0.3}}, noisy, 3),
    ]
    for result, (what, shown, seed) in zip(results, about, strict=False):
        assert result == expected(what, correctness(classifier, shown, labels, 24), seed)
    parameters = {"severity": 5, "table": "CIFAR-10-C"}
    what = {"family": "corruption", "disturbance": "fog", "parameters": parameters}
    assert results[3] == expected(what, correctness(classifier, foggy, labels, 24), 3)
    assert [(result["disturbance"], result["parameters"], result["samples"]) for result in results[6:]] == [
        ("FGSM", {"epsilon": 0.05}, 10),
        ("PGD", {"epsilon": 0.05}, 10),
        ("worst case", {"epsilon": 0.05}, 10),
        ("PGD", {"epsilon": 1.0}, 10),
    ]
    assert report["settings"]["table"] == "cifar10-c"
    assert set(report["definitions"]) == {
        "Gaussian noise", "sigma", "FGSM", "PGD", "worst case", "epsilon", "severity", "table"
    }  # fmt: skip
    fog = [1 - result["value"] for result in results[2:4]]
    assert report["errors"]["by_corruption"]["fog"] == pytest.approx(sum(fog) / 2)
    assert report["errors"]["counted"] == ["fog", "shot_noise"]


def test_what_is_done_is_not_measured_again(
    classifier: Classifier, images: torch.Tensor, labels: torch.Tensor
) -> None:
    settings = ImageSettings(corruptions=("contrast",), sigmas=(0.1,), attacks=("fgsm",), epsilons=(0.1, 0.2))
    given = (classifier.model, classifier.processor, images, labels, settings)
    whole = evaluate_robustness(*given)["results"]
    seen: list = []
    again = evaluate_robustness(*given, done=whole[:4], on_result=seen.append)["results"]
    assert again == whole
    assert seen == whole[4:]


def test_mean_corruption_error_by_hand() -> None:
    def results(clean: float, **errors: list[float]) -> list[dict]:
        rows = [{"family": "clean", "disturbance": "clean", "parameters": {}, "value": 1 - clean}]
        for name, values in errors.items():
            rows += [
                {"family": "corruption", "disturbance": name.replace("_", " "), "parameters": {"severity": s},
                 "value": 1 - value} for s, value in enumerate(values, start=1)
            ]  # fmt: skip
        return rows

    model = results(0.1, fog=[0.2, 0.3], shot_noise=[0.3, 0.5], gaussian_blur=[0.9, 0.9], snow=[0.1, 0.2])
    baseline = results(0.2, fog=[0.4, 0.6], shot_noise=[0.2, 0.6], gaussian_blur=[0.1, 0.1], frost=[0.1, 0.1])
    found = mean_corruption_error(model, baseline)
    assert found["counted"] == ["fog", "shot_noise"]  # what both have, and of the published 15
    assert found["by_corruption"] == pytest.approx({"fog": 50, "shot_noise": 100})
    assert found["mce"] == pytest.approx(75)
    assert found["relative_by_corruption"] == pytest.approx({"fog": 50, "shot_noise": 150})
    assert found["relative_mce"] == pytest.approx(100)
    without_error = mean_corruption_error(model, results(0, fog=[0, 0], shot_noise=[0.2, 0.6]))
    assert without_error["by_corruption"]["fog"] is None
    assert without_error["mce"] is None
    same = mean_corruption_error(model, model)
    assert same["mce"] == pytest.approx(100)


def test_pixels_are_packed_and_unpacked() -> None:
    correct = torch.rand(29, generator=torch.Generator().manual_seed(0)) < 0.5
    assert torch.equal(unpack_bits(pack_bits(correct), 29), correct)
    assert len(pack_bits(correct)) == 8


@pytest.mark.parametrize(
    "fields",
    [
        {"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True},
        {"do_rescale": True, "rescale_factor": 1 / 127.5, "rescale_offset": True, "do_normalize": False},
        {"do_rescale": False, "do_normalize": True, "rescale_factor": None},
        {"do_rescale": False, "do_normalize": False},
    ],
)
def test_pixels_are_normalised_as_any_processor_does(classifier: Classifier, fields: dict) -> None:
    """In pixel space an attack must not know what a processor does: scale, shift, normalise, or nothing."""
    from types import SimpleNamespace

    processor = SimpleNamespace(image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.6, 0.7], **fields)
    found = PixelClassifier(classifier.model, processor)  # type: ignore[arg-type]
    image = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    values = image * 255
    if fields["do_rescale"]:
        values = values * fields["rescale_factor"] - (1 if fields.get("rescale_offset") else 0)
    if fields["do_normalize"]:
        values = (values - torch.tensor(processor.image_mean)[:, None, None]) / torch.tensor(processor.image_std)[
            :, None, None
        ]
    torch.testing.assert_close((image - found.mean) / found.std, values)
    classifier.to(classifier.device)


def test_stock_and_filtered_classifiers_are_measured(images: torch.Tensor) -> None:
    from transformers import DeiTConfig, DeiTForImageClassification, ViTConfig, ViTForImageClassification

    from hf_imgproc_attn import apply_filter
    from hf_imgproc_attn.training_support.image_pixels import build_image_processor

    size = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
            "intermediate_size": 16, "num_labels": 5}  # fmt: skip
    torch.manual_seed(0)
    stock = [ViTForImageClassification(ViTConfig(**size)), DeiTForImageClassification(DeiTConfig(**size))]
    filtered = apply_filter(ViTForImageClassification(ViTConfig(**size)), "twicing", layers=[-1])
    settings = ImageSettings(
        corruptions=("pixelate",), severities=(5,), attacks=("fgsm", "pgd"), epsilons=(0.1,), steps=2
    )
    for model in (*stock, filtered):
        with torch.no_grad():
            model.classifier.weight.normal_(std=2)
        report = evaluate_robustness(model, build_image_processor((8, 8), 3), images, torch.arange(24) % 5, settings)
        assert report["gradients"]["zero_margin"] == 0
        assert len(report["results"]) == 6


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"corruptions": ("fogg",)}, "corruptions must be names of corruptions, got 'fogg'; did you mean fog\\?"),
        ({"corruptions": ("frost",)}, "frost needs frost_pictures"),
        ({"corruptions": ("fog",), "severities": (6,)}, "severities must be integers from 1 to 5, got 6"),
        ({"corruptions": ("fog",), "severities": ()}, "severities must name one at least"),
        ({"severities": (1, 1)}, "severities must name every value once, got 1 1"),
        ({"table": "cifar"}, "table must be one of cifar10-c, imagenet-c, got 'cifar'"),
        ({"attacks": ("pdg",)}, "attacks must be names among fgsm, .*, got 'pdg'; did you mean pgd\\?"),
        ({"epsilons": (0,)}, "epsilons must be > 0 and <= 1, got 0; pixels are in \\[0, 1\\]: .* 8/255"),
        ({"epsilons": (-8 / 255,)}, "epsilons must be > 0 and <= 1, got -0.03"),
        ({"epsilons": (8,)}, "epsilons must be > 0 and <= 1, got 8"),
        ({"epsilons": (float("nan"),)}, "epsilons must be > 0 and <= 1, got nan"),
        ({"attacks": ("fgsm",), "epsilons": ()}, "epsilons must name one at least"),
        ({"sigmas": (2,)}, "sigmas must be > 0 and <= 1, got 2"),
        ({"steps": 0}, "steps must be an integer >= 1, got 0"),
        ({"square_queries": 1.5}, "square_queries must be an integer >= 1, got 1.5"),
        ({"attack_samples": 0}, "attack_samples must be an integer >= 1, got 0"),
        ({"seed": -1}, "seed must be an integer >= 0, got -1"),
    ],
)
def test_wrong_settings_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageSettings(**fields)


def test_wrong_images_and_labels_are_refused(
    classifier: Classifier, images: torch.Tensor, labels: torch.Tensor
) -> None:
    bad = images.clone()
    bad[0, 0, 0, 0] = float("nan")
    for given, classes, message in (
        (images * 2 - 1, labels, r"images must have pixels in \[0, 1\], got -1 to 1: .* before the image processor"),
        (images * 1.01, labels, r"images must have pixels in \[0, 1\], got 0 to 1.01"),
        (bad, labels, r"images must have pixels in \[0, 1\], got nan to nan"),
        ((images * 255).long(), labels, "images must be uint8, or floating-point in"),
        (images[0], labels, r"images must be \[images, 1 or 3 channels, height, width\], got \[3, 8, 8\]"),
        (images[:0], labels[:0], r"images must be \[images, .*, got \[0, 3, 8, 8\]"),
        (images[:, :2], labels, "images must be"),
        (images[..., :6], labels, "the model refuses images of 8 x 6 pixels"),
        (images, labels[1:], r"labels must be one class index an image, \[24\], got torch.int64 \[23\]"),
        (images, labels.float(), "labels must be one class index an image"),
        (images, labels + 4, "labels must be classes of the model, 0 to 3, got [4-7]: the data set has other classes"),
        (images, labels - 9, "labels must be classes of the model, 0 to 3, got -"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate_robustness(classifier.model, classifier.processor, given, classes)
    eight_bits = evaluate_robustness(classifier.model, classifier.processor, (images * 255).round().byte(), labels)
    assert eight_bits["results"][0]["value"] == 1
