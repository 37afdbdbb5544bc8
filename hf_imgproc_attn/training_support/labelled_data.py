"""Rows with a class each, images or texts: their labels, a held-out part, and the limits of a run."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hf_imgproc_attn.errors import UsageError
from hf_imgproc_attn.training_support.arguments import LabelledDataArguments
from hf_imgproc_attn.training_support.data_loading import SPLIT_SEED, choose_column, require_column

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass
class LabelledRows:
    """Rows of every split with their classes.

    Attributes:
        rows: split name -> rows; ``train`` always, ``validation`` and ``test`` where there are any.
        labels: split name -> class indices ``[rows]``, int64.
        label_names: class index -> name.
    """

    rows: dict[str, "Dataset"]
    labels: dict[str, np.ndarray]
    label_names: list[str]


def label_splits(rows: dict[str, "Dataset"], args: LabelledDataArguments, what: str) -> LabelledRows:
    """Find the labels, hold out a validation split where there is none, and apply the sample limits.

    The held-out part is stratified by class and always the same; a limit takes a fixed random subset.

    Args:
        rows: of every split.
        args: the data options.
        what: the rows are, for messages: ``"images"`` or ``"texts"``.

    Raises:
        UsageError: for a missing or ambiguous column, missing labels, or a part without rows.
    """
    label_column = label_column_of(rows["train"], args.label_column_name)
    for split in rows:
        require_column(rows[split], label_column, "label_column_name", split)
    label_names, labels = _encode_labels(rows, label_column)
    if "test" in labels and (labels["test"] < 0).all():
        print("the test split has no labels and is left out")
        del rows["test"], labels["test"]
    for split, values in labels.items():
        if (values < 0).any():
            raise UsageError(
                f"column {label_column!r} of the {split} split has {(values < 0).sum()} rows without a label"
            )
    if "validation" not in rows and args.validation_fraction > 0:
        kept, held_out = stratified_split(labels["train"], args.validation_fraction)
        if not len(held_out) or not len(kept):
            raise UsageError(
                f"validation_fraction must leave a row in both parts, got {args.validation_fraction} of "
                f"{len(rows['train'])} training {what}"
            )
        rows["validation"], labels["validation"] = rows["train"].select(held_out), labels["train"][held_out]
        rows["train"], labels["train"] = rows["train"].select(kept), labels["train"][kept]
    for split in rows:
        limit = args.max_train_samples if split == "train" else args.max_eval_samples
        if limit is not None and limit < len(rows[split]):
            chosen = np.sort(np.random.RandomState(SPLIT_SEED).permutation(len(rows[split]))[:limit])
            rows[split], labels[split] = rows[split].select(chosen), labels[split][chosen]
    return LabelledRows(rows, labels, label_names)


def stratified_split(labels: np.ndarray, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Hold out the same fraction of every class, always the same rows.

    Args:
        labels: class indices ``[rows]``.
        fraction: part of each class that is held out, rounded to whole rows.

    Returns:
        Row indices, ascending, of what stays and of what is held out.
    """
    # The legacy generator: its stream is frozen, so the split does not move with the version of NumPy.
    generator = np.random.RandomState(SPLIT_SEED)
    held_out = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        held_out[members[: round(fraction * len(members))]] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def label_column_of(rows: "Dataset", given: str | None) -> str:
    """The column with the labels: the one that was given, else one of class labels, else one that is called so.

    Raises:
        UsageError: if there is none, or several.
    """
    import datasets

    if require_column(rows, given, "label_column_name", "train") is not None:
        return str(given)
    candidates = [name for name, feature in rows.features.items() if isinstance(feature, datasets.ClassLabel)]
    if not candidates:
        candidates = [
            name for name in ("label", "labels", "fine_label", "class", "target") if name in rows.column_names
        ]
    return choose_column(candidates, ("label", "labels", "fine_label"), "label", "label_column_name", rows)


def _encode_labels(rows: dict[str, "Dataset"], column: str) -> tuple[list[str], dict[str, np.ndarray]]:
    """Class names, and class indices for every split; -1 where there is no label."""
    import datasets

    feature = rows["train"].features[column]
    if isinstance(feature, datasets.ClassLabel):
        indices = {split: [-1 if value is None else value for value in part[column]] for split, part in rows.items()}
        return list(feature.names), {split: np.array(values, dtype=np.int64) for split, values in indices.items()}
    if not isinstance(feature, datasets.Value) or feature.dtype.startswith(("float", "double")):
        raise UsageError(f"label_column_name must be a column of class labels, got {column!r} of type {feature}")
    classes = sorted({value for value in rows["train"][column] if value is not None})
    index = {value: position for position, value in enumerate(classes)}
    labels: dict[str, np.ndarray] = {}
    for split, part in rows.items():
        unknown = {value for value in part[column] if value is not None and value not in index}
        if unknown:
            raise UsageError(f"the {split} split has labels that the train split lacks: {sorted(unknown)[:5]}")
        labels[split] = np.array([index.get(value, -1) for value in part[column]], dtype=np.int64)
    return [str(value) for value in classes], labels
