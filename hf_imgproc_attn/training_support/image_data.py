"""Labelled images from the Hub, a path or scikit-learn: their columns, classes and splits."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hf_imgproc_attn.errors import UsageError
from hf_imgproc_attn.training_support.arguments import EMBEDDED_IMAGES, ImageDataArguments, ImageSourceArguments
from hf_imgproc_attn.training_support.data_loading import (
    choose_column,
    load_splits,
    refuse_config_name,
    require_column,
)
from hf_imgproc_attn.training_support.labelled_data import label_splits, stratified_split

if TYPE_CHECKING:
    from datasets import Dataset

LARGEST_NATIVE_SIDE = 96
"""Images up to this many pixels a side are used at their own size; larger ones are resized to 224 x 224."""
DIGITS_TEST_FRACTION = 0.2


@dataclass
class ImageSplits:
    """Rows of every split with their columns resolved.

    Attributes:
        rows: split name -> rows; ``train`` always, ``validation`` and ``test`` where there are any.
        labels: split name -> class indices ``[rows]``, int64.
        label_names: class index -> name.
        image_column: the column with the images.
        image_size: (height, width) in pixels for a new model.
    """

    rows: dict[str, "Dataset"]
    labels: dict[str, np.ndarray]
    label_names: list[str]
    image_column: str
    image_size: tuple[int, int]


def load_image_splits(args: ImageSourceArguments) -> ImageSplits:
    """Load images and labels, hold out a validation split where there is none, and apply the sample limits.

    With ``streaming`` the training split is left out.

    The held-out part is stratified by class and always the same; a limit takes a fixed random subset.

    Raises:
        UsageError: for data that cannot be loaded, missing or ambiguous columns, empty splits, or missing labels.
    """
    if isinstance(args, ImageDataArguments) and args.streaming:
        from hf_imgproc_attn.training_support.image_streams import load_image_stream

        return load_image_stream(args, seed=0)[1]
    if args.dataset_name == EMBEDDED_IMAGES:
        refuse_config_name(args)
    rows = _digits() if args.dataset_name == EMBEDDED_IMAGES else load_splits(args, EMBEDDED_IMAGES)
    rows, image_column = find_images(rows, args.image_column_name)
    labelled = label_splits(rows, args, "images")
    rows = labelled.rows
    return ImageSplits(
        rows, labelled.labels, labelled.label_names, image_column, native_size(rows["train"], image_column)
    )


def native_size(rows: "Dataset", image_column: str) -> tuple[int, int]:
    """(height, width) of the first image that can be opened, or 224 x 224 where it is large."""
    for index in range(len(rows)):
        try:
            image = rows[index][image_column]
            small = max(image.size) <= LARGEST_NATIVE_SIDE
        except Exception:  # damaged in one of many ways: who decodes all images names it
            continue
        return (image.height, image.width) if small else (224, 224)
    raise UsageError(f"none of the {len(rows)} images of the train split can be opened")


def _digits() -> dict[str, "Dataset"]:
    """Scikit-learn's digits (1,797 images, 8 x 8, greyscale) in fixed, stratified splits of 70, 10 and 20 %.

    Grey values 0..16 become 0..255, rounded, as an image file would hold them.
    """
    import datasets
    from PIL import Image
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    grey = np.rint(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=[str(digit) for digit in range(10)])
    )
    rows = datasets.Dataset.from_dict(
        {"image": [Image.fromarray(image) for image in grey], "label": labels.tolist()}, features=features
    )
    rest, test = stratified_split(labels, DIGITS_TEST_FRACTION)
    train, validation = stratified_split(labels[rest], 0.125)
    return {
        "train": rows.select(rest[train]),
        "validation": rows.select(rest[validation]),
        "test": rows.select(test),
    }


def find_images(
    rows: dict[str, "Dataset"], given: str | None, *, besides: str | None = None
) -> tuple[dict[str, "Dataset"], str]:
    """The splits with their image column decoded as images, and its name.

    Args:
        rows: the splits.
        given: the column that the user named, None to detect it.
        besides: a column of other pictures.

    Raises:
        UsageError: for a column that does not exist or holds no images, or if none or several may be meant.
    """
    import datasets

    train = rows["train"]
    column = require_column(train, given, "image_column_name", "train")
    if column is None:
        candidates = [name for name, feature in train.features.items() if isinstance(feature, datasets.Image)]
        candidates = [name for name in candidates if name != besides]
        # Encoded images without the library's metadata, as other programs write them to parquet.
        encoded = [name for name in ("image", "img") if name in train.column_names]
        column = choose_column(candidates or encoded, ("image", "img"), "image", "image_column_name", train)
    for split in rows:
        require_column(rows[split], column, "image_column_name", split)
    if not isinstance(train.features[column], datasets.Image):
        kind = train.features[column]
        try:
            rows = {split: part.cast_column(column, datasets.Image()) for split, part in rows.items()}
            if not any(_is_image(rows["train"], column, index) for index in range(min(len(train), 10))):
                raise ValueError("none of the first rows is an image")
        except Exception as error:  # whatever the column holds: casting and decoding fail in many ways
            raise UsageError(f"image_column_name must be a column of images, got {column!r} of type {kind}") from error
    return rows, column


def _is_image(rows: "Dataset", column: str, index: int) -> bool:
    try:
        rows[index][column].load()
    except Exception:  # damaged in one of many ways
        return False
    return True
