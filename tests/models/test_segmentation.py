"""Semantic segmentation with the ViT variants: heads, loss, sizes of images, what is refused, and the pipeline."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForSemanticSegmentation, pipeline

from hf_imgproc_attn import ImgProcViTForImageClassification, ImgProcViTForSemanticSegmentation, convert
from hf_imgproc_attn.models.image_processing_imgproc_segmentation import ImgProcSegmentationImageProcessor
from hf_imgproc_attn.models.modeling_dense import UpsamplingHead
from tests.models.helpers import sharpen_
from tests.models.variants import VARIANTS, images, vit_config

CLASSES = 4


def build(variant: str = "bilateral", **overrides: Any) -> ImgProcViTForSemanticSegmentation:
    """A sharpened model in evaluation mode, in float64."""
    fields = {"num_labels": CLASSES, "segmentation_channels": 6, **overrides}
    return sharpen_(ImgProcViTForSemanticSegmentation(vit_config(variant, **fields))).eval().double()


def masks(height: int = 20, width: int = 12) -> torch.Tensor:
    """Classes of pixels for two images, the first rows of the second one ignored."""
    labels = torch.randint(0, CLASSES, (2, height, width), generator=torch.Generator().manual_seed(7))
    labels[1, :6] = 255
    return labels


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_sees_another_size_saves_and_loads(variant: str, tmp_path: Path) -> None:
    """On images larger than trained with, eager is sdpa, and a checkpoint loads through its Auto class."""
    model = build(variant, attn_implementation="sdpa").float()
    pixels = images(height=24, width=16)
    logits = model(pixels).logits
    assert logits.shape == (2, CLASSES, 6, 4)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSemanticSegmentation.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert type(loaded) is ImgProcViTForSemanticSegmentation
    torch.testing.assert_close(loaded(pixels).logits, logits, rtol=1e-3, atol=1e-3)


def test_the_linear_head_reads_the_patches_and_not_the_class_token() -> None:
    model = build()
    states = model.vit(images().double()).last_hidden_state
    weight, bias = model.decode_head.weight[:, :, 0, 0], model.decode_head.bias
    by_hand = torch.stack(
        [
            torch.stack([states[:, 1 + row * 3 + column] @ weight.T + bias for column in range(3)], -1)
            for row in range(5)
        ],
        -2,
    )
    torch.testing.assert_close(model(images().double()).logits, by_hand)


@pytest.mark.parametrize(("patch", "rows"), [(16, 4), (8, 4), (4, 4), (2, 2), (1, 1), ([4, 2], 2)])
def test_the_upsampling_head_doubles_until_a_quarter_or_every_pixel(patch: Any, rows: int) -> None:
    config = vit_config(patch_size=patch, num_labels=CLASSES, segmentation_channels=6, segmentation_head="upsampling")
    head = UpsamplingHead(config)
    assert head(torch.randn(1, config.hidden_size, 3, 2)).shape == (1, CLASSES, 3 * rows, 2 * rows)


@pytest.mark.parametrize("head", ["linear", "upsampling"])
def test_the_loss_is_the_mean_over_the_pixels_that_count(head: str) -> None:
    model, labels = build(segmentation_head=head), masks()
    output = model(images().double(), labels=labels)
    full = torch.nn.functional.interpolate(output.logits, size=(20, 12), mode="bilinear", align_corners=False)
    log_probabilities = full.log_softmax(1)
    chosen = [
        -log_probabilities[image, labels[image, row, column], row, column]
        for image in range(2)
        for row in range(20)
        for column in range(12)
        if labels[image, row, column] != 255
    ]
    torch.testing.assert_close(output.loss, torch.stack(chosen).mean().float(), rtol=1e-5, atol=1e-5)
    output.loss.backward()
    assert all(value.grad is not None and value.grad.isfinite().all() for value in model.decode_head.parameters())
    changed = labels.clone()
    changed[1, :6] = 9
    model.config.semantic_loss_ignore_index = 9
    torch.testing.assert_close(model(images().double(), labels=changed).loss, output.loss)
    nothing = model(images().double(), labels=torch.full_like(labels, 9)).loss
    assert nothing.item() == 0


def test_hidden_states_attentions_and_tuples() -> None:
    model = build("twicing", attn_implementation="eager")
    output = model(images().double(), output_hidden_states=True, output_attentions=True)
    assert [len(output.hidden_states), len(output.attentions)] == [4, 3]
    torch.testing.assert_close(model(images().double(), return_dict=False)[0], output.logits)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (masks(20, 13), r"labels must be integers with the images' batch, height and width (2, 20, 12)"),
        (masks()[:1], "got torch.int64 of shape (1, 20, 12)"),
        (masks().double(), "got torch.float64"),
        (masks().unsqueeze(1).expand(-1, 3, -1, -1), "got torch.int64 of shape (2, 3, 20, 12)"),
        (masks() + 1, "labels must be classes 0 to 3 or semantic_loss_ignore_index 255, got 1 to 256"),
        (masks() - 1, "got -1 to 254"),
    ],
    ids=["size", "batch", "float", "colour", "beyond", "negative"],
)
def test_masks_that_do_not_belong_to_the_images_are_refused(labels: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        build()(images().double(), labels=labels)


def test_images_with_pixels_outside_of_patches_are_refused() -> None:
    with pytest.raises(
        ValueError, match="multiples of the patches' 4 x 4 pixels for semantic segmentation, got 22 x 12"
    ):
        build()(images(height=22).double())
    with pytest.raises(ValueError, match="pass interpolate_pos_encoding=True"):
        build()(images(height=24).double(), interpolate_pos_encoding=False)
    with pytest.raises(ValueError, match="pixel_values must be images"):
        build()()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"segmentation_head": "conv"}, "segmentation_head must be one of linear, upsampling, got 'conv'"),
        ({"segmentation_channels": 0}, "segmentation_channels must be an integer >= 1, got 0"),
        ({"semantic_loss_ignore_index": 2}, "semantic_loss_ignore_index must be none of the classes 0 to 3"),
        ({"num_labels": 300}, "none of the classes 0 to 299, which would not be learned, got 255"),
        ({"num_labels": 1}, "num_labels must be at least 2 for semantic segmentation, got 1"),
    ],
)
def test_configurations_that_make_no_sense_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=re.escape(message)):
        build(**fields)


def test_a_classifier_grows_a_segmentation_head_and_a_segmenter_is_converted(tmp_path: Path) -> None:
    classifier = sharpen_(ImgProcViTForImageClassification(vit_config("bilateral"))).eval()
    classifier.save_pretrained(tmp_path)
    grown = ImgProcViTForSemanticSegmentation.from_pretrained(tmp_path, num_labels=CLASSES).eval()
    states = grown.vit(images()).last_hidden_state
    torch.testing.assert_close(states, classifier.vit(images()).last_hidden_state, rtol=1e-4, atol=1e-5)
    converted, report = convert(grown, "bilateral_twicing", return_report=True)
    assert type(converted) is ImgProcViTForSemanticSegmentation
    assert torch.equal(converted.decode_head.weight, grown.decode_head.weight)
    assert report.unused == report.new == []
    assert report.change is not None
    assert report.change.predictions == 16 * 15, "a class for each of 5 x 3 patches of 16 images"


def processor(**fields: Any) -> ImgProcSegmentationImageProcessor:
    return ImgProcSegmentationImageProcessor(
        **{"size": {"height": 8, "width": 12}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, **fields}
    )


def picture(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("head", ["linear", "upsampling"])
def test_the_pipeline_gives_masks_in_the_size_of_the_picture(head: str, channels: int, tmp_path: Path) -> None:
    names = {"id2label": {0: "sky", 1: "sea", 2: "sand", 3: "sun"}, "num_channels": channels}
    model = build(segmentation_head=head, image_size=[8, 12], **names).float()
    model.save_pretrained(tmp_path)
    own = processor(image_mean=[0.5] * channels, image_std=[0.5] * channels)
    own.save_pretrained(tmp_path)
    assert "AutoImageProcessor" in json.loads((tmp_path / "preprocessor_config.json").read_text())["auto_map"]
    image = Image.fromarray(picture(21, 35))
    found = pipeline("image-segmentation", model=str(tmp_path), device="cpu")(image)
    inputs = own(image, return_tensors="pt")
    logits = torch.nn.functional.interpolate(
        model(**inputs).logits, size=(21, 35), mode="bilinear", align_corners=False
    )
    expected = logits[0].argmax(0).numpy()
    assert len(found) > 1
    for part in found:
        label = next(index for index, name in names["id2label"].items() if name == part["label"])  # type: ignore[attr-defined]
        assert np.mean((np.asarray(part["mask"]) > 0) == (expected == label)) > 0.99
    assert sum((np.asarray(part["mask"]) > 0).sum() for part in found) == 21 * 35


def test_masks_are_resized_to_the_nearest_class_and_reduced() -> None:
    mask = np.repeat(np.repeat(np.array([[0, 7, 255], [3, 1, 2]], dtype=np.uint8), 8, 0), 8, 1)
    image = picture(16, 24)
    labels = processor()(image, Image.fromarray(mask), return_tensors="pt")["labels"]
    assert labels.dtype == torch.int64
    assert torch.equal(labels[0], torch.from_numpy(mask[::2, ::2].astype(np.int64)))
    reduced = processor(do_reduce_labels=True)([image], [mask], return_tensors="np")["labels"][0]
    assert reduced[::4, ::4].tolist() == [[255, 6, 255], [2, 0, 1]]
    assert torch.equal(processor()(image, mask, do_reduce_labels=True, return_tensors="pt")["labels"][0],
                       torch.from_numpy(reduced))  # fmt: skip
    indices = Image.fromarray(mask, mode="P")
    indices.putpalette([200, 10, 10] * 256)
    assert torch.equal(processor()(image, indices, return_tensors="pt")["labels"], labels)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (
            Image.fromarray(picture(16, 24)),
            "a mask must have one channel with the class of every pixel, got 3 channels",
        ),
        (picture(15, 24, 1), "a mask must have its image's height and width 16 x 24, got 15 x 24"),
        (np.full((16, 24), 0.5), "a mask must hold integers"),
        ([picture(16, 24, 1)] * 2, "segmentation_maps must be one for each of 1 images, got 2"),
    ],
    ids=["colour", "size", "fractions", "number"],
)
def test_wrong_masks_are_refused_by_the_processor(mask: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        processor()(picture(16, 24), mask, return_tensors="pt")
