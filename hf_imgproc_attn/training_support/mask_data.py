"""Images with masks from the Hub, a path or the composed digits: columns, classes and splits, checked pixel by pixel.

Every mask is read once before training begins: what is found wrong then costs a minute and not a night.
"""

import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_imgproc_attn.errors import UsageError, plain_message, require_extras
from hf_imgproc_attn.training_support.arguments import EMBEDDED_MASKS
from hf_imgproc_attn.training_support.composed_digits import LABEL_NAMES, composed_splits
from hf_imgproc_attn.training_support.data_loading import (
    SPLIT_SEED,
    choose_column,
    load_splits,
    refuse_config_name,
    require_column,
)
from hf_imgproc_attn.training_support.image_data import find_images, native_size
from hf_imgproc_attn.training_support.mask_arguments import NO_LABEL, MaskDataArguments

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL import Image

MASK_COLUMNS = ("mask", "annotation", "label", "labels", "segmentation", "segmentation_mask", "semantic_segmentation")
"""Usual names, the first one that there is wins."""
_LARGEST_LABEL = 2**16 - 1


@dataclass
class MaskSplits:
    """Rows of every split with their columns resolved.

    Attributes:
        rows: split name -> rows; ``train`` always, ``validation`` and ``test`` where there are any.
        label_names: class index -> name.
        image_column: the column with the images.
        mask_column: the column with the masks.
        image_size: (height, width) in pixels for a new model.
    """

    rows: dict[str, "Dataset"]
    label_names: list[str]
    image_column: str
    mask_column: str
    image_size: tuple[int, int]


@dataclass
class _Found:
    """Labels that occur in a split, and where the largest one is, for messages."""

    labels: set[int] = field(default_factory=set)
    row_of: dict[int, int] = field(default_factory=dict)


def load_mask_splits(args: MaskDataArguments) -> MaskSplits:
    """Load images and masks, hold out a validation split where there is none, apply the limits, check every mask.

    The held-out part is always the same; a limit takes a fixed random subset.

    Raises:
        UsageError: for data that cannot be loaded, missing or ambiguous columns, empty splits, masks with several
            channels or of another size than their images, labels beyond the classes, or an ``ignore_index`` that is a
            class.
    """
    import datasets

    embedded = args.dataset_name == EMBEDDED_MASKS
    if embedded:
        refuse_config_name(args)
        require_extras("filters")
    rows = composed_splits() if embedded else load_splits(args, EMBEDDED_MASKS)
    mask_column = _mask_column(rows["train"], args)
    for split in rows:
        require_column(rows[split], mask_column, "mask_column_name", split)
    rows, image_column = find_images(rows, args.image_column_name, besides=mask_column)
    rows = {split: part.cast_column(mask_column, datasets.Image()) for split, part in rows.items()}
    rows = _limited(_with_validation(rows, args), args)
    names = LABEL_NAMES if embedded and args.label_names is None else read_label_names(args.label_names)
    label_names = check_masks(rows, image_column, mask_column, args, names)
    size = native_size(rows["train"], image_column) if args.image_size is None else (args.image_size,) * 2
    return MaskSplits(rows, label_names, image_column, mask_column, size)


def read_label_names(file: str | None) -> list[str] | None:
    """The names of the classes in a file: a JSON list, a JSON object class -> name, or a name a line.

    Raises:
        UsageError: if it cannot be read, or the classes are not 0, 1, 2 and so on.
    """
    if file is None:
        return None
    try:
        text = Path(file).expanduser().read_text(encoding="utf-8")
        content = json.loads(text) if file.endswith(".json") else [line for line in text.splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UsageError(
            f"label_names must be a readable file of names, got {file!r}: {plain_message(error)}"
        ) from error
    if isinstance(content, dict):
        if {str(key) for key in content} != {str(index) for index in range(len(content))}:
            raise UsageError(f"label_names {file!r} must name the classes 0 to {len(content) - 1}, each once")
        content = [content[str(index)] for index in range(len(content))]
    if not isinstance(content, list) or len(content) < 2 or len(set(map(str, content))) != len(content):
        raise UsageError(f"label_names {file!r} must hold at least two different names")
    return [str(name).strip() for name in content]


def mask_array(mask: "Image.Image | None") -> np.ndarray:
    """The labels of a mask, ``[height, width]``; of a picture with a palette its indices.

    Raises:
        ValueError: for a mask that is missing, has several channels, or holds no integers.
    """
    if mask is None:
        raise ValueError("there is no mask")
    if len(mask.getbands()) > 1:
        raise ValueError(
            f"a mask must have one channel with the class of every pixel, got mode {mask.mode} with "
            f"{len(mask.getbands())}"
        )
    values = np.asarray(mask)
    if values.dtype.kind == "f":
        raise ValueError(f"a mask must hold integers, got mode {mask.mode}")
    return values


def check_masks(
    rows: dict[str, "Dataset"],
    image_column: str,
    mask_column: str,
    args: MaskDataArguments,
    names: list[str] | None,
) -> list[str]:
    """Read every mask of every split; the names of the classes, of which there are as many as the masks need.

    Args:
        rows: the splits; a test split without any class is taken out.
        image_column: the column with the images, of which only the sizes are read.
        mask_column: the column with the masks.
        args: the data options.
        names: of the classes; None: one for each label from 0 to the largest.

    Raises:
        UsageError: naming the first row that cannot be used and why.
    """
    found = {}
    for split, part in list(rows.items()):
        found[split] = _labels_of(part, split, image_column, mask_column, args)
        if split == "test" and not found[split].labels:  # as in a challenge whose answers are kept back
            print("the masks of the test split show no class: it is left out")
            del rows[split], found[split]
    listed = names or [str(index) for index in range(max(found["train"].labels, default=-1) + 1)]
    if len(listed) < 2:
        raise UsageError(f"the masks must show at least two classes, got {len(listed)} in column {mask_column!r}")
    if 0 <= args.ignore_index < len(listed):
        raise UsageError(
            f"ignore_index must be none of the classes 0 to {len(listed) - 1}, which would not be learned, got "
            f"{args.ignore_index}"
        )
    absent = sorted(set(range(len(listed))) - found["train"].labels)
    if names is None and absent:
        raise UsageError(
            f"label_names must be given where not all classes occur: of 0 to {len(listed) - 1} in column "
            f"{mask_column!r} of the train split {_some(absent)} do not; a label that is no class belongs into "
            f"ignore_index, got {args.ignore_index}"
        )
    for split, labels in found.items():
        beyond = sorted(label for label in labels.labels if label >= len(listed))
        if beyond:
            lowered = " after reduce_labels" if args.reduce_labels else ""
            raise UsageError(
                f"the masks must hold classes 0 to {len(listed) - 1} or ignore_index {args.ignore_index}, got "
                f"{_some(beyond)}{lowered} in row {labels.row_of[beyond[0]]} of the {split} split"
            )
    return listed


def _labels_of(part: "Dataset", split: str, image_column: str, mask_column: str, args: MaskDataArguments) -> _Found:
    """The labels of a split, without those that are ignored."""
    import datasets
    from datasets.utils import tqdm

    found = _Found()
    encoded = part.select_columns([image_column, mask_column])
    for column in (image_column, mask_column):
        encoded = encoded.cast_column(column, datasets.Image(decode=False))
    reader = datasets.Image()
    bar = tqdm(encoded, desc=f"checking masks of {split}", unit="mask", leave=False, delay=1.0)
    for row, entry in enumerate(bar):
        where = f"the mask in row {row} of the {split} split"
        if entry[mask_column] is None and split == "test":
            continue
        try:
            values = mask_array(entry[mask_column] and reader.decode_example(entry[mask_column]))
            size = _size_of(entry[image_column])
            if values.shape != size:
                raise ValueError(
                    f"it has {values.shape[0]} x {values.shape[1]} pixels (height x width), its image "
                    f"{size[0]} x {size[1]}"
                )
        except Exception as error:  # files are damaged in many ways
            raise UsageError(f"{where} cannot be used: {plain_message(error)}") from error
        labels = {int(label) for label in np.unique(values)}
        if args.reduce_labels:
            labels = {label - 1 for label in labels if label not in (0, NO_LABEL)}
        labels.discard(args.ignore_index)
        if labels and not 0 <= min(labels) <= max(labels) <= _LARGEST_LABEL:
            raise UsageError(
                f"{where} must hold labels from 0 to {_LARGEST_LABEL}, got {min(labels)} to {max(labels)}"
            )
        for label in labels - found.labels:
            found.row_of[label] = row
        found.labels |= labels
    return found


def _size_of(entry: dict[str, Any] | None) -> tuple[int, int]:
    """Height and width of an image, which is not decoded for it.

    Raises:
        ValueError: if there is none.
    """
    from PIL import Image, ImageOps

    if entry is None:
        raise ValueError("it has no image")
    with Image.open(io.BytesIO(entry["bytes"]) if entry["bytes"] is not None else entry["path"]) as image:
        width, height = ImageOps.exif_transpose(image).size if _is_turned(image) else image.size
    return height, width


def _is_turned(image: "Image.Image") -> bool:
    """Whether a camera has noted that width and height are to be exchanged, which reading the image heeds."""
    return image.getexif().get(0x0112, 1) > 4


def _mask_column(rows: "Dataset", args: MaskDataArguments) -> str:
    import datasets

    given = require_column(rows, args.mask_column_name, "mask_column_name", "train")
    if given is None:
        pictures = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Image)]
        others = [name for name in pictures if name not in ("image", "img", args.image_column_name)]
        encoded = [name for name in MASK_COLUMNS if name in rows.column_names]
        given = choose_column(others or encoded, MASK_COLUMNS, "mask", "mask_column_name", rows)
    if not isinstance(rows.features[given], datasets.Image):
        kind = rows.features[given]
        if not isinstance(kind, dict) or not {"bytes", "path"} <= set(kind):
            raise UsageError(f"mask_column_name must be a column of images, got {given!r} of type {kind}")
    return given


def _with_validation(rows: dict[str, "Dataset"], args: MaskDataArguments) -> dict[str, "Dataset"]:
    if "validation" in rows or args.validation_fraction == 0:
        return rows
    train = rows["train"]
    held_out = round(args.validation_fraction * len(train))
    if not 0 < held_out < len(train):
        raise UsageError(
            f"validation_fraction must leave a row in both parts, got {args.validation_fraction} of {len(train)} "
            "training images"
        )
    # The legacy generator: its stream is frozen, so the split does not move with the version of NumPy.
    order = np.random.RandomState(SPLIT_SEED).permutation(len(train))
    parts = {"train": np.sort(order[held_out:]), "validation": np.sort(order[:held_out])}
    return {**rows, **{split: train.select(chosen) for split, chosen in parts.items()}}


def _limited(rows: dict[str, "Dataset"], args: MaskDataArguments) -> dict[str, "Dataset"]:
    for split, part in rows.items():
        limit = args.max_train_samples if split == "train" else args.max_eval_samples
        if limit is not None and limit < len(part):
            rows[split] = part.select(np.sort(np.random.RandomState(SPLIT_SEED).permutation(len(part))[:limit]))
    return rows


def _some(labels: list[int]) -> str:
    """Up to five numbers in words."""
    more = f" and {len(labels) - 5} more" if len(labels) > 5 else ""
    return ", ".join(map(str, labels[:5])) + more
