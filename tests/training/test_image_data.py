"""Labelled images: columns, splits, pixels, augmentation."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch

from hf_imgproc_attn.errors import UsageError
from hf_imgproc_attn.training_support import image_pixels
from hf_imgproc_attn.training_support.arguments import ImageDataArguments
from hf_imgproc_attn.training_support.image_data import load_image_splits, stratified_split
from hf_imgproc_attn.training_support.image_pixels import (
    NormalizingCollator,
    PixelDataset,
    build_image_processor,
    load_pixels,
)
from tests.training.conftest import WriteImages, random_images

LABELS = [0, 1, 2] * 10


def load(folder: Path | str, **options: Any) -> Any:
    return load_image_splits(ImageDataArguments(dataset_name=str(folder), **options))


def pixel_dataset(folder: Path, **options: Any) -> PixelDataset:
    splits = load(folder, validation_fraction=0)
    processor = build_image_processor(splits.image_size, 3)
    rows, labels = splits.rows["train"], splits.labels["train"]
    return PixelDataset(rows, labels, splits.image_column, processor, description="", **options)


@pytest.mark.parametrize("names", [("img", "label"), ("image", "fine_label"), ("photograph", "species")])
def test_columns_are_detected(write_images: WriteImages, names: tuple[str, str]) -> None:
    splits = load(write_images("data", names=names, train=LABELS, test=[0, 2]))
    assert splits.image_column == names[0]
    assert splits.label_names == ["a", "b", "c"]
    assert splits.labels["test"].tolist() == [0, 2]
    assert splits.image_size == (8, 8)


def test_columns_can_be_given(tmp_path: Path) -> None:
    features = datasets.Features(
        left=datasets.Image(),
        right=datasets.Image(),
        coarse=datasets.ClassLabel(names=["x", "y"]),
        fine=datasets.ClassLabel(names=["a", "b"]),
    )
    columns = {"left": random_images(4), "right": random_images(4), "coarse": [0, 0, 1, 1], "fine": [0, 1, 0, 1]}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(UsageError, match=r"several possible image columns \(left, right\).*--image_column_name"):
        load(tmp_path)
    with pytest.raises(UsageError, match=r"several possible label columns \(coarse, fine\).*--label_column_name"):
        load(tmp_path, image_column_name="right")
    splits = load(tmp_path, image_column_name="right", label_column_name="fine", validation_fraction=0)
    assert (splits.image_column, splits.labels["train"].tolist()) == ("right", [0, 1, 0, 1])


def test_encoded_images_and_text_labels_without_metadata(tmp_path: Path) -> None:
    """As pandas writes them: bytes in a struct, classes as strings."""
    rows = []
    for index, image in enumerate(random_images(8)):
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        rows.append({"image": {"bytes": buffer.getvalue(), "path": None}, "label": ["cat", "dog"][index % 2]})
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "train.parquet")
    splits = load(tmp_path, validation_fraction=0)
    assert splits.label_names == ["cat", "dog"]
    assert splits.labels["train"].tolist() == [0, 1] * 4
    assert np.array_equal(np.asarray(splits.rows["train"][3]["image"]), np.asarray(random_images(8)[3]))


def test_image_folder(tmp_path: Path) -> None:
    for index, image in enumerate(random_images(6)):
        folder = tmp_path / "train" / ["cat", "dog"][index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{index}.png")
    splits = load(tmp_path, validation_fraction=0)
    assert splits.label_names == ["cat", "dog"]
    assert sorted(splits.labels["train"].tolist()) == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_column_name": "imgg"}, r"image_column_name must be a column of the train split \(img, label\)"),
        ({"label_column_name": "lable"}, "got 'lable'; did you mean label?"),
        ({"image_column_name": "label"}, "image_column_name must be a column of images, got 'label'"),
        ({"label_column_name": "img"}, "label_column_name must be a column of class labels, got 'img'"),
        ({"validation_fraction": 0.01}, "validation_fraction must leave a row in both parts, got 0.01 of 30"),
        ({"dataset_config_name": "x"}, "cannot be loaded"),
    ],
)
def test_wrong_columns_are_refused(write_images: WriteImages, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load(write_images("data", train=LABELS), **options)


def test_missing_data_sets_are_refused(tmp_path: Path, write_images: WriteImages) -> None:
    with pytest.raises(
        UsageError, match=r"dataset_name must be digits, a local path or a Hub data set, got '.*nowhere'"
    ):
        load(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="has no train split, only test"):
        load(write_images("only_test", test=LABELS))
    with pytest.raises(UsageError, match="the validation split of data set .* is empty"):
        load(write_images("empty", train=LABELS, validation=[]))
    with pytest.raises(UsageError, match="dataset_config_name must be none for data set 'digits', got 'x'"):
        load("digits", dataset_config_name="x")


def test_unlabelled_test_split_is_left_out_but_unlabelled_training_rows_are_refused(write_images: WriteImages) -> None:
    assert "test" not in load(write_images("hidden", train=LABELS, test=[-1, -1])).rows
    with pytest.raises(UsageError, match="column 'label' of the train split has 1 rows without a label"):
        load(write_images("broken", train=[*LABELS, -1]))


def test_validation_is_held_out_of_train_by_class_and_never_of_test(write_images: WriteImages) -> None:
    folder = write_images("data", train=LABELS, test=[0, 1])
    first, second = load(folder, validation_fraction=0.2), load(folder, validation_fraction=0.2)
    assert {split: len(rows) for split, rows in first.rows.items()} == {"train": 24, "test": 2, "validation": 6}
    assert np.bincount(first.labels["validation"]).tolist() == [2, 2, 2]
    for split in first.rows:
        assert first.labels[split].tolist() == second.labels[split].tolist()
        for ours, theirs in zip(first.rows[split]["img"], second.rows[split]["img"], strict=True):
            assert np.array_equal(np.asarray(ours), np.asarray(theirs))
    assert len(load(folder, validation_fraction=0).rows["train"]) == 30


def test_stratified_split_is_a_partition() -> None:
    labels = np.array([0] * 50 + [1] * 10 + [2])
    kept, held_out = stratified_split(labels, 0.1)
    assert sorted([*kept, *held_out]) == list(range(61))
    assert np.bincount(labels[held_out], minlength=3).tolist() == [5, 1, 0]


def test_sample_limits(write_images: WriteImages) -> None:
    folder = write_images("data", train=LABELS, validation=[0, 1, 2], test=[0, 1, 2])
    splits = load(folder, max_train_samples=12, max_eval_samples=2)
    assert {split: len(rows) for split, rows in splits.rows.items()} == {"train": 12, "validation": 2, "test": 2}
    # The files list the classes in turn; a prefix would too.
    assert splits.labels["train"].tolist() != LABELS[:12]


def test_digits_splits_never_move() -> None:
    """These digests change only if the data, the split or its order change: results would not be comparable."""
    splits = load("digits")
    pixels = load_pixels(splits, build_image_processor((8, 8), 3), ImageDataArguments(), seed=0)
    assert {split: len(rows) for split, rows in splits.rows.items()} == {"train": 1259, "validation": 179, "test": 359}
    digests = {split: dataset.fingerprint["sha256"][:16] for split, dataset in pixels.items()}
    assert digests == {"train": "861465b289788faf", "validation": "ad2d09098aee6153", "test": "76c2c06292fdeb42"}


def test_pixels_equal_the_image_processor(write_images: WriteImages) -> None:
    folder = write_images("data", size=12, train=LABELS)
    splits = load(folder, validation_fraction=0)
    processor = build_image_processor((8, 8), 3)  # resizes from 12 x 12
    dataset = PixelDataset(splits.rows["train"], splits.labels["train"], "img", processor, description="")
    batch = NormalizingCollator(processor)([dataset[4], dataset[7]])
    expected = processor([splits.rows["train"][i]["img"] for i in (4, 7)], return_tensors="pt")["pixel_values"]
    assert batch["pixel_values"].shape == (2, 3, 8, 8)
    torch.testing.assert_close(batch["pixel_values"], expected, rtol=0, atol=1e-6)
    assert batch["labels"].tolist() == [LABELS[4], LABELS[7]]


def test_greyscale_and_rgb(write_images: WriteImages) -> None:
    splits = load("digits", max_train_samples=4)
    for channels in (1, 3):
        processor = build_image_processor((8, 8), channels)
        dataset = PixelDataset(splits.rows["train"], splits.labels["train"], "image", processor, description="")
        assert dataset[0]["pixel_values"].shape == (channels, 8, 8)
        grey = np.asarray(splits.rows["train"][0]["image"])
        assert all(np.array_equal(channel, grey) for channel in dataset[0]["pixel_values"].numpy())
    with pytest.raises(UsageError, match="num_channels must be 1 or 3, got 2"):
        build_image_processor((8, 8), 2)


def test_large_splits_are_decoded_when_read(write_images: WriteImages, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_images("data", train=LABELS)
    decoded = pixel_dataset(folder)
    monkeypatch.setattr(image_pixels, "DECODE_ONCE_BYTES", 100)
    lazy = pixel_dataset(folder)
    assert decoded.pixels is not None
    assert lazy.pixels is None
    assert all(torch.equal(lazy[i]["pixel_values"], decoded[i]["pixel_values"]) for i in range(len(decoded)))
    assert set(lazy.fingerprint) == {"rows", "datasets_fingerprint"}


def test_fingerprint_sees_pixels_and_labels(write_images: WriteImages) -> None:
    first = pixel_dataset(write_images("first", train=LABELS)).fingerprint
    assert pixel_dataset(write_images("copy", train=LABELS)).fingerprint == first
    assert pixel_dataset(write_images("relabelled", train=[1, *LABELS[1:]])).fingerprint != first
    # The split's place in the list seeds the pixels.
    assert pixel_dataset(write_images("repainted", test=[0], train=LABELS)).fingerprint != first


def test_augmentation_depends_on_seed_epoch_and_row_alone(write_images: WriteImages) -> None:
    folder = write_images("data", train=LABELS)
    dataset, again = (pixel_dataset(folder, crop_padding=2, flip=True, seed=5) for _ in range(2))
    plain, other_seed = pixel_dataset(folder), pixel_dataset(folder, crop_padding=2, flip=True, seed=6)
    forward = [dataset[i]["pixel_values"] for i in range(30)]
    backward = [again[i]["pixel_values"] for i in reversed(range(30))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(forward, backward, strict=True))
    assert sum(torch.equal(a, plain[i]["pixel_values"]) for i, a in enumerate(forward)) < 5
    assert sum(torch.equal(a, other_seed[i]["pixel_values"]) for i, a in enumerate(forward)) < 5
    again.set_epoch(1)
    assert sum(torch.equal(a, again[i]["pixel_values"]) for i, a in enumerate(forward)) < 5


def test_crop_shifts_and_flip_mirrors(write_images: WriteImages) -> None:
    folder = write_images("data", train=LABELS)
    plain = pixel_dataset(folder)
    flipped = pixel_dataset(folder, flip=True)
    mirrored = [torch.equal(flipped[i]["pixel_values"], plain[i]["pixel_values"].flip(-1)) for i in range(30)]
    same = [torch.equal(flipped[i]["pixel_values"], plain[i]["pixel_values"]) for i in range(30)]
    assert all(a != b for a, b in zip(mirrored, same, strict=True))
    assert 5 < sum(mirrored) < 25
    cropped = pixel_dataset(folder, crop_padding=1)
    for i in range(30):
        padded = torch.nn.functional.pad(plain[i]["pixel_values"], (1, 1, 1, 1))
        windows = [padded[:, top : top + 8, left : left + 8] for top in range(3) for left in range(3)]
        assert any(torch.equal(cropped[i]["pixel_values"], window) for window in windows)
