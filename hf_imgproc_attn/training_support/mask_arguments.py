"""The data options of ``train_semantic_segmentation.py`` (no torch, no transformers: ``--help`` is instant)."""

from dataclasses import dataclass
from typing import Any

from hf_imgproc_attn.backbones import OF_TASK
from hf_imgproc_attn.errors import UsageError
from hf_imgproc_attn.training_support.arguments import (
    EMBEDDED_MASKS,
    IMAGE_TRAINER_DEFAULTS,
    DataArguments,
    _check,
    _option,
)

NO_LABEL = 255
"""The usual label of pixels that do not count, and what 0 becomes with ``reduce_labels``."""

MASK_TRAINER_DEFAULTS: dict[str, Any] = {
    **IMAGE_TRAINER_DEFAULTS,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 32,
    "batch_eval_metrics": True,  # masks and predictions of a whole split need not fit into memory
}


@dataclass(kw_only=True)
class MaskDataArguments(DataArguments):
    """Images with a mask each, which holds the class of every pixel."""

    model_type = OF_TASK["semantic-segmentation"].model_type

    dataset_name: str = _option(
        EMBEDDED_MASKS,
        "data set: a Hub name, a local path (parquet, image folder, saved data set) with a column of images and one "
        "of masks, or composed_digits (scikit-learn's digits on photographs of scikit-image, 32 x 32)",
    )
    image_column_name: str | None = _option(None, "column with the images. Default: detected")
    mask_column_name: str | None = _option(None, "column with the masks. Default: detected")
    label_names: str | None = _option(
        None,
        "file with the names of the classes: JSON (a list, or class -> name as the Hub's label files have it) or a "
        "name a line. Default: the numbers from 0 to the largest that occurs",
    )
    reduce_labels: bool = _option(
        False, "masks count from 1 and 0 is no class (ADE20K): classes are lowered by one, and 0 is ignored"
    )
    ignore_index: int = _option(NO_LABEL, "label of the pixels that do not count")
    image_size: int | None = _option(
        None,
        "side in pixels that images and masks are resized to, a multiple of the patches'. Default: the model's own, "
        "or that of small images",
    )
    random_scale: float = _option(
        1.0, "augmentation: enlarge or shrink by up to this factor, then crop or pad to the size; 1: off"
    )
    random_crop_padding: int = _option(0, "augmentation: pad by so many pixels, crop back at a random place; 0: off")
    horizontal_flip: bool = _option(False, "augmentation: mirror half of the images")
    pictures: int = _option(8, "draw so many evaluated images with mask and prediction into predictions.png; 0: none")

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self.image_size is None or self.image_size >= 1, "image_size", "an integer >= 1", self.image_size)
        _check(1.0 <= self.random_scale <= 8.0, "random_scale", "from 1 to 8", self.random_scale)
        for name in ("random_crop_padding", "pictures"):
            _check(getattr(self, name) >= 0, name, "an integer >= 0", getattr(self, name))
        if self.reduce_labels and self.ignore_index != NO_LABEL:
            raise UsageError(
                f"ignore_index must be {NO_LABEL} with reduce_labels, which makes it of 0, got {self.ignore_index}"
            )
