"""Training on images with masks: the composed digits, mean IoU, joint augmentation, a whole run, what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import evaluate_checkpoint
import numpy as np
import pytest
import torch
import train_semantic_segmentation
from evaluate_checkpoint import Settings
from PIL import Image
from transformers import AutoModelForSemanticSegmentation, SegformerConfig, SegformerForSemanticSegmentation

from hf_imgproc_attn import ImgProcViTForSemanticSegmentation, filtered_layers
from hf_imgproc_attn.cards.rendering import load_results, render_card
from hf_imgproc_attn.cards.results import METRICS
from hf_imgproc_attn.errors import UsageError
from hf_imgproc_attn.hub.run_files import contents, read_run
from hf_imgproc_attn.models.modeling_dense import segmentation_loss
from hf_imgproc_attn.training_support import composed_digits
from hf_imgproc_attn.training_support.composed_digits import compose
from hf_imgproc_attn.training_support.data_loading import load_splits
from hf_imgproc_attn.training_support.mask_arguments import MaskDataArguments
from hf_imgproc_attn.training_support.mask_data import load_mask_splits, read_label_names
from hf_imgproc_attn.training_support.mask_pictures import COLOURS, coloured
from hf_imgproc_attn.training_support.mask_pixels import augment
from hf_imgproc_attn.training_support.metrics import SegmentationMetrics, pixel_results
from tests.helpers import ROOT
from tests.training.conftest import TINY_VIT

QUIET = ["--disable_tqdm", "true", "--use_cpu", "--save_strategy", "no", "--eval_strategy", "no", "--max_steps", "3"]


def masks(count: int, height: int = 8, width: int = 8, classes: int = 3, seed: int = 0) -> list[np.ndarray]:
    """Labels in blocks of four pixels, every class in each."""
    rng = np.random.default_rng(seed)
    blocks = [rng.permutation(np.arange(height * width // 16) % classes) for _ in range(count)]
    return [np.kron(block.reshape(height // 4, width // 4), np.ones((4, 4), int)).astype(np.uint8) for block in blocks]


def write(
    folder: Path, pictures: dict[str, list[Any]], names: tuple[str, str] = ("image", "annotation"), size: int = 8
) -> Path:
    """A parquet folder; the colours of an image follow its mask, so that they can be learned."""
    folder.mkdir()
    for split, labels in pictures.items():
        features = datasets.Features({names[0]: datasets.Image(), names[1]: datasets.Image()})
        shown = [np.zeros((size, size), np.uint8) if mask is None else np.asarray(mask) for mask in labels]
        images = [Image.fromarray(np.stack([60 * mask[..., :1].squeeze(-1) if mask.ndim == 3 else 60 * mask] * 3, -1))
                  for mask in shown]  # fmt: skip
        columns = {names[0]: images, names[1]: [mask if mask is None else Image.fromarray(mask) for mask in labels]}
        datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / f"{split}.parquet")
    return folder


# --------------------------------------------------------------------------------------------------------------------
# The embedded data
# --------------------------------------------------------------------------------------------------------------------


def test_composed_digits_are_the_same_however_many_are_drawn() -> None:
    few, more = compose("test", 3), compose("test", 12)
    assert np.array_equal(few.pixels, more.pixels[:3])
    assert np.array_equal(few.masks, more.masks[:3])
    assert not np.array_equal(few.pixels, compose("validation", 3).pixels)
    labels = [set(np.unique(mask)) for mask in more.masks]
    assert all(0 in found and len(found) > 1 and max(found) <= 10 for found in labels)
    assert len(set().union(*labels)) > 6


def test_a_mask_is_where_ink_covers_half_of_a_pixel() -> None:
    """On white paper what is nearer to the ink than to the paper belongs to the digit, and nothing else."""
    digit = np.zeros((8, 8))
    digit[1:7, 2:5] = 1
    for seed in range(8):
        image, mask = np.full((32, 32, 3), 255.0), np.zeros((32, 32), np.uint8)
        composed_digits._ink(image, mask, digit, 4, np.random.RandomState(seed))
        assert set(np.unique(mask)) == {0, 5}
        darkness = (255 - image[..., 0]) / (255 - image[..., 0].min())
        assert np.array_equal(mask > 0, darkness >= 0.5 - 1e-9)


def test_splits_share_neither_digits_nor_photographs() -> None:
    parts = [composed_digits._digits(split)[0] for split in composed_digits.ROWS]
    assert sum(map(len, parts)) == 1797
    names = [name for split in composed_digits.PHOTOGRAPHS.values() for name in split]
    assert len(names) == len(set(names))


# --------------------------------------------------------------------------------------------------------------------
# Metrics
# --------------------------------------------------------------------------------------------------------------------


def test_loss_and_mean_iou_equal_a_confusion_matrix_made_by_hand() -> None:
    """Class 4 occurs nowhere and does not count; 255 does not either; batches together are one set of images."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 5, 3, 2, generator=generator)
    logits[:, 4] -= 100
    labels = torch.randint(0, 4, (5, 6, 4), generator=generator)
    labels[2, :3] = 255
    labels[4] = 255
    full = torch.nn.functional.interpolate(logits, size=(6, 4), mode="bilinear", align_corners=False)
    matrix = [[0] * 5 for _ in range(5)]
    for image in range(5):
        for row in range(6):
            for column in range(4):
                label = int(labels[image, row, column])
                if label != 255:
                    scores = [float(full[image, kind, row, column]) for kind in range(5)]
                    matrix[label][scores.index(max(scores))] += 1
    each = []
    for kind in range(5):
        union = sum(matrix[kind]) + sum(line[kind] for line in matrix) - matrix[kind][kind]
        each += [matrix[kind][kind] / union] if union else []
    assert len(each) == 4
    right, pixels = sum(matrix[kind][kind] for kind in range(5)), sum(map(sum, matrix))
    # The mean over all pixels that count, however many a batch has.
    loss = float(segmentation_loss(logits, labels, 255))
    metrics = SegmentationMetrics()
    counts, losses = pixel_results(logits, labels)
    assert metrics(SimpleNamespace(predictions=(counts[:2], losses[:2])), compute_result=False) == {}
    expected = {"loss": loss, "mean_iou": sum(each) / 4, "pixel_accuracy": right / pixels}
    assert metrics(SimpleNamespace(predictions=(counts[2:], losses[2:]))) == pytest.approx(expected, rel=1e-5)
    # What was counted once is not counted again.
    again = metrics(SimpleNamespace(predictions=(counts.numpy(), losses.numpy())))
    assert again == pytest.approx(expected, rel=1e-5)


# --------------------------------------------------------------------------------------------------------------------
# Augmentation
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [(1.0, 3, True), (1.0, 0, True), (2.0, 0, False), (1.5, 2, True)])
def test_image_and_mask_are_moved_alike(options: tuple[float, int, bool]) -> None:
    scale, padding, flip = options
    mask = np.kron(np.arange(1, 17).reshape(4, 4), np.ones((16, 16), int)).astype(np.int16)
    image = np.stack([10 * mask, 255 - 10 * mask]).astype(np.uint8)
    kinds = SimpleNamespace(scale=scale, crop_padding=padding, flip=flip)
    moved = set()
    for seed in range(12):
        pixels, labels = augment(image, mask, np.random.default_rng(seed), 255, kinds)
        assert pixels.shape == (2, 64, 64)
        assert labels.shape == (64, 64)
        moved.add(labels.tobytes())
        inside = labels != 255
        assert inside.any()
        # Bilinear pixels between two blocks have values of their own.
        agreed = (pixels[0] == 10 * labels) & (pixels[1] == 255 - 10 * labels)
        assert agreed[inside].mean() > (0.6 if scale > 1 else 0.999)
        assert (pixels[:, ~inside] == 127).all()
    assert len(moved) > 1


# --------------------------------------------------------------------------------------------------------------------
# A run
# --------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained for a few steps on masks that count from 1, with a test split whose masks are kept back."""
    root = tmp_path_factory.mktemp("segmentation")
    labels = [mask + 1 for mask in masks(10)]
    labels[0][:2] = 0
    data = write(root / "rooms", {"train": labels, "validation": [mask + 1 for mask in masks(4, seed=1)],
                                  "test": [None, None]})  # fmt: skip
    (root / "names.json").write_text(json.dumps({"1": "floor", "0": "wall", "2": "door"}))
    words = ["--dataset_name", str(data), "--label_names", str(root / "names.json"), "--reduce_labels", "--preset"]
    words += ["bilateral", "--output_dir", str(root / "run"), "--horizontal_flip", "--random_crop_padding", "1"]
    words += ["--random_scale", "1.3", "--pictures", "3", "--per_device_eval_batch_size", "3", *QUIET]
    words += ["--config_overrides", *TINY_VIT, "segmentation_head=upsampling", "segmentation_channels=8"]
    assert train_semantic_segmentation.main(words) == 0
    return root / "run"


def test_a_run_is_recorded_drawn_and_loads(run: Path) -> None:
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert record["status"] == "finished"
    assert set(record["metrics"]) == {"train", "validation"}
    assert {"loss", "mean_iou", "pixel_accuracy"} <= set(record["metrics"]["validation"])
    assert record["model_config"]["id2label"] in ({0: "wall", 1: "floor", 2: "door"},
                                                  {"0": "wall", "1": "floor", "2": "door"})  # fmt: skip
    model = ImgProcViTForSemanticSegmentation.from_pretrained(run)
    assert model.config.segmentation_head == "upsampling"
    processor = json.loads((run / "preprocessor_config.json").read_text())
    assert (processor["image_processor_type"], processor["do_reduce_labels"]) == (
        "ImgProcSegmentationImageProcessor",
        True,
    )
    picture = np.asarray(Image.open(run / "predictions.png").convert("RGB"))
    # Three rows of image, mask and prediction, each of 8 x 8 pixels enlarged 16 times.
    shown = picture[16 : 16 + 128 : 16, 6 + 134 : 6 + 134 + 128 : 16]
    assert np.array_equal(shown, coloured(masks(4, seed=1)[0], 3))


def test_a_run_is_evaluated_as_it_was_trained(run: Path) -> None:
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    settings = Settings(sigmas=[0.3], epsilons=[16 / 255], split="validation")
    found = evaluate_checkpoint.evaluate(run, settings, force=True)["results"]
    values = {(entry["family"], entry["metric"]): entry["value"] for entry in found}
    for name in ("mean_iou", "pixel_accuracy"):
        assert values["clean", name] == pytest.approx(record["metrics"]["validation"][name])
    assert values["attack", "pixel_accuracy"] <= values["clean", "pixel_accuracy"]
    assert {entry["samples"] for entry in found} == {4}
    with pytest.raises(UsageError, match="split must be one that the data set"):
        evaluate_checkpoint.evaluate(run, Settings(split="test"), force=True)


def test_its_card_and_what_would_be_published(run: Path) -> None:
    card = render_card(load_results(run), revision="v1", repo_id="you/rooms", baseline=None, license={})
    assert "pipeline_tag: image-segmentation" in card
    assert 'segment = pipeline("image-segmentation", model="you/rooms"' in card
    assert "![images, masks and predictions](predictions.png)" in card
    assert re.search(r"\| clean \| mean IoU \| validation \| 4 images \|.* \d+\.\d\d % \|", card)
    assert "imgproc-attn train-segmentation " in card
    assert "(8 pixels a side)" in card
    assert set(load_results(run).record["metrics"]["validation"]) <= set(METRICS)
    files = contents(read_run(run), "you/rooms", None, {}).files
    assert {"predictions.png", "modeling_dense.py", "image_processing_imgproc_segmentation.py"} <= set(files)


# --------------------------------------------------------------------------------------------------------------------
# What is refused, before any training
# --------------------------------------------------------------------------------------------------------------------


def spoiled(kind: str) -> list[Any]:
    labels: list[Any] = masks(4)
    labels[2] = {
        "colour": np.zeros((8, 8, 3), np.uint8),
        "size": np.zeros((8, 12), np.uint8),
        "beyond": np.full((8, 8), 9, np.uint8),
        "fractions": np.zeros((8, 8), np.float32),
        "missing": None,
    }.get(kind, labels[2])
    return labels


@pytest.mark.parametrize(
    ("kind", "words", "message"),
    [
        ("colour", [], "the mask in row 2 of the train split cannot be used: a mask must have one channel with the"),
        ("size", [], "it has 8 x 12 pixels (height x width), its image 8 x 8"),
        ("fractions", [], "a mask must hold integers, got mode F"),
        ("missing", [], "the mask in row 2 of the train split cannot be used: there is no mask"),
        ("beyond", [], "label_names must be given where not all classes occur: of 0 to 9 in column"),
        ("beyond", ["--label_names", "NAMES"],
         "the masks must hold classes 0 to 2 or ignore_index 255, got 9 in row 2 of the train split"),
        ("none", ["--ignore_index", "1"], "ignore_index must be none of the classes 0 to 2, which would not be"),
        ("none", ["--reduce_labels", "--ignore_index", "0"], "ignore_index must be 255 with reduce_labels"),
        ("none", ["--label_names", "ONE"], "must hold at least two different names"),
        ("none", ["--mask_column_name", "mask"], "mask_column_name must be a column of the train split"),
        ("none", ["--image_size", "9", "--config_overrides", "patch_size=2"],
         "image_size must be a multiple of the patches' 2 x 2 pixels, got 9 x 9"),
        ("none", ["--random_scale", "0.5"], "random_scale must be from 1 to 8, got 0.5"),
        ("none", ["--dataset_revision", "v1"], "dataset_revision must be none for the local data set"),
        ("none", ["--config_overrides", "segmentation_head=conv"], "segmentation_head must be one of linear"),
    ],
)  # fmt: skip
def test_wrong_data_and_options_are_one_line(
    kind: str, words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = spoiled(kind)
    images = [np.zeros((8, 8), np.uint8)] * 4
    features = datasets.Features(image=datasets.Image(), annotation=datasets.Image())
    columns = {
        "image": [Image.fromarray(image) for image in images],
        "annotation": [mask if mask is None else Image.fromarray(mask) for mask in labels],
    }
    data = tmp_path / "data"
    data.mkdir()
    datasets.Dataset.from_dict(columns, features=features).to_parquet(data / "train.parquet")
    for name, lines in (("NAMES", "a\nb\nc\n"), ("ONE", "a\n")):
        (tmp_path / name).write_text(lines)
        words = [str(tmp_path / name) if word == name else word for word in words]
    words = ["--dataset_name", str(data), "--validation_fraction", "0", *words]
    assert train_semantic_segmentation.main([*words, "--output_dir", str(tmp_path / "run"), *QUIET]) == 2
    *_, last = capsys.readouterr().err.splitlines()  # after the bars of the library that reads the data
    assert last.startswith("error: ")
    assert message in last
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_columns_splits_and_names_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "data", {"train": masks(10)}, names=("img", "mask"))
    splits = load_mask_splits(MaskDataArguments(dataset_name=str(folder), max_train_samples=5))
    assert (splits.image_column, splits.mask_column, splits.label_names) == ("img", "mask", ["0", "1", "2"])
    assert {split: len(rows) for split, rows in splits.rows.items()} == {"train": 5, "validation": 1}
    assert splits.image_size == (8, 8)
    monkeypatch.setattr(composed_digits, "ROWS", {"train": 40, "validation": 3, "test": 3})
    splits = load_mask_splits(MaskDataArguments(image_size=64))
    assert splits.label_names == ["background", *map(str, range(10))]
    assert {split: len(rows) for split, rows in splits.rows.items()} == {"train": 40, "validation": 3, "test": 3}
    assert splits.image_size == (64, 64)
    (tmp_path / "list.json").write_text('["sky", "sea"]')
    assert read_label_names(str(tmp_path / "list.json")) == ["sky", "sea"]


def test_data_that_come_as_a_script_are_read_in_the_hubs_own_form(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(*args: Any, **kwargs: Any) -> Any:
        asked.append((args, kwargs))
        return datasets.DatasetDict(train=datasets.Dataset.from_dict({"image": [1]}))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    names = {"dataset_name": "ann/rooms", "dataset_config_name": "parsing"}
    load_splits(MaskDataArguments(**names, dataset_revision="refs/convert/parquet"), "none")
    load_splits(MaskDataArguments(**names, dataset_revision="v2"), "none")
    assert asked == [
        (("ann/rooms",), {"data_dir": "parsing", "revision": "refs/convert/parquet", "streaming": False}),
        (("ann/rooms", "parsing"), {"revision": "v2", "streaming": False}),
    ]


def test_what_is_no_class_has_a_colour_of_no_class() -> None:
    found = coloured(np.array([[0, 1, 255], [2, 11, 255]]), 12)
    assert found[0, 1].tolist() == list(COLOURS[1])
    assert found[1, 1].tolist() == list(COLOURS[0])
    assert len(set(map(tuple, found[:, 2].tolist())) & set(COLOURS)) == 0
    assert len(set(COLOURS)) == 11


def test_the_recipe_takes_a_few_steps_and_its_checkpoint_gets_other_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(composed_digits, "ROWS", {"train": 40, "validation": 3, "test": 3})
    recipe = str(ROOT / "training" / "configs" / "composed_vit_seg.yaml")
    first = tmp_path / "first"
    assert train_semantic_segmentation.main(["--config", recipe, "--output_dir", str(first), *QUIET]) == 0
    data = write(tmp_path / "data", {"train": masks(6, 16, 16), "test": masks(2, 16, 16)}, size=16)
    words = ["--model_name_or_path", str(first), "--dataset_name", str(data), "--image_size", "16", *QUIET]
    assert train_semantic_segmentation.main([*words, "--output_dir", str(tmp_path / "second")]) == 0
    start = ImgProcViTForSemanticSegmentation.from_pretrained(first)
    model = ImgProcViTForSemanticSegmentation.from_pretrained(tmp_path / "second")
    assert (start.num_labels, model.num_labels) == (11, 3)
    assert model.config.image_size == 32, "positions are interpolated"
    moved = (model.vit.layers[0].mlp.fc1.weight - start.vit.layers[0].mlp.fc1.weight).abs().max()
    assert 0 < moved < 1e-2, "it starts from the checkpoint"
    assert (tmp_path / "second" / "predictions.png").is_file()


def test_a_segmenter_of_another_type_gets_the_filter(tmp_path: Path) -> None:
    config = SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[1, 1], hidden_sizes=[8, 16], patch_sizes=[3, 3],
        strides=[2, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=8,
    )  # fmt: skip
    SegformerForSemanticSegmentation(config).save_pretrained(tmp_path / "segformer")
    data = write(tmp_path / "data", {"train": masks(6), "test": masks(2)})
    words = ["--model_name_or_path", str(tmp_path / "segformer"), "--preset", "twicing", "--dataset_name", str(data)]
    words += ["--image_size", "16", "--ignore_index", "254", "--output_dir", str(tmp_path / "run"), *QUIET]
    assert train_semantic_segmentation.main(words) == 0
    found = evaluate_checkpoint.evaluate(tmp_path / "run", Settings(sigmas=[], epsilons=[]))["results"]
    record = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert {entry["metric"]: entry["value"] for entry in found} == pytest.approx(
        {name: record["metrics"]["test"][name] for name in ("mean_iou", "pixel_accuracy")}
    )
    model = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "run")
    assert len(filtered_layers(model)) == 2
    assert model.config.semantic_loss_ignore_index == 254
