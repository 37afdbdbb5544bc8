"""Images and their masks as pixels for a segmentation model: the data set, joint augmentation and batches.

What was done to an image is done to its mask: both are resized once (the mask to the nearest pixel), and scaled,
cropped and mirrored alike. Pixels beyond the image's edge do not count.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hf_imgproc_attn.errors import UsageError, plain_message
from hf_imgproc_attn.models.image_processing_imgproc_segmentation import prepared_mask
from hf_imgproc_attn.training_support.data_loading import content_fingerprint
from hf_imgproc_attn.training_support.image_pixels import NormalizingCollator, PixelDataset
from hf_imgproc_attn.training_support.mask_arguments import MaskDataArguments
from hf_imgproc_attn.training_support.mask_data import mask_array

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers.image_processing_utils import BaseImageProcessor

    from hf_imgproc_attn.training_support.mask_data import MaskSplits

_PADDING_GREY = 127  # about the mean of an image, which becomes 0


class MaskedPixels(PixelDataset):
    """One split as 8-bit pixels and masks.

    An item is ``{"pixel_values": uint8 [channels, height, width], "labels": int64 [height, width]}``.

    Args:
        rows: the split.
        columns: of the images and of the masks.
        processor: resizes, and decides the channels.
        args: the data options.
        description: shown with the progress bar; its last word is the name of the split, of which only ``train`` is
            augmented.
        seed: of the augmentation.
    """

    def __init__(
        self,
        rows: "Dataset",
        columns: tuple[str, str],
        processor: "BaseImageProcessor",
        args: MaskDataArguments,
        *,
        description: str,
        seed: int,
    ) -> None:
        image_column, self.mask_column = columns
        self.mask_rows, self.args = rows.select_columns([self.mask_column]), args
        is_trained = description.endswith(" train")
        self.scale = args.random_scale if is_trained else 1.0
        super().__init__(
            rows,
            np.zeros(0, dtype=np.int64),
            image_column,
            processor,
            description=description,
            crop_padding=args.random_crop_padding if is_trained else 0,
            flip=args.horizontal_flip and is_trained,
            seed=seed,
        )
        self.masks: np.ndarray | None = None
        if self.pixels is not None:
            masks = [self._mask(index) for index in range(len(self))]
            self.masks = np.stack(masks).astype(np.int16 if max(mask.max() for mask in masks) < 2**15 else np.int32)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = self._decode(index, index + 1)[0] if self.pixels is None else self.pixels[index]
        mask = self._mask(index) if self.masks is None else self.masks[index]
        if self.crop_padding or self.flip or self.scale > 1:
            generator = np.random.default_rng((self.seed, int(self._epoch), index))
            image, mask = augment(image, mask, generator, self.args.ignore_index, self)
        return {
            "pixel_values": torch.from_numpy(np.ascontiguousarray(image)),
            "labels": torch.from_numpy(np.ascontiguousarray(mask)).long(),
        }

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Number of rows and a SHA-256 over pixels and masks (of undecoded splits: the library's own fingerprint)."""
        if self.pixels is None or self.masks is None:
            return {"rows": len(self), "datasets_fingerprint": self.rows._fingerprint}
        parts = [self.pixels.tobytes(), self.masks.astype(np.int32).tobytes()]
        return {"rows": len(self), "sha256": content_fingerprint(parts)}

    def _mask(self, index: int) -> np.ndarray:
        """Labels ``[height, width]`` in the size that the images have."""
        try:
            stored = mask_array(self.mask_rows[index][self.mask_column])
            labels = prepared_mask(
                stored, stored.shape, (self.image_shape[1], self.image_shape[2]), self.args.reduce_labels
            )
        except Exception as error:  # files are damaged in many ways
            raise UsageError(
                f"the mask in row {index} of the {self.split} split cannot be used: {plain_message(error)}"
            ) from error
        return labels.numpy()


def augment(
    image: np.ndarray, mask: np.ndarray, generator: np.random.Generator, ignore_index: int, options: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Scale, pad, crop and mirror an image and its mask alike; their size stays.

    Args:
        image: 8 bits, ``[channels, height, width]``.
        mask: labels ``[height, width]``.
        generator: of the random numbers.
        ignore_index: the label of padded pixels.
        options: ``scale`` (up to this factor larger or smaller), ``crop_padding`` (pixels) and ``flip``.
    """
    height, width = mask.shape
    if options.scale > 1:
        factor = options.scale ** generator.uniform(-1, 1)
        image, mask = _resized(image, mask, max(1, round(height * factor)), max(1, round(width * factor)))
    # Padding on all sides, and more where the image has become smaller than it was.
    above, before = (
        options.crop_padding + max(0, -(-(side - now) // 2))
        for side, now in zip((height, width), mask.shape, strict=True)
    )
    if above or before:
        edges = ((above, above), (before, before))
        image = np.pad(image, ((0, 0), *edges), constant_values=_PADDING_GREY)
        mask = np.pad(mask, edges, constant_values=ignore_index)
    top, left = (
        int(generator.integers(0, now - side + 1)) for side, now in zip((height, width), mask.shape, strict=True)
    )
    image, mask = image[:, top : top + height, left : left + width], mask[top : top + height, left : left + width]
    if options.flip and generator.random() < 0.5:
        image, mask = image[:, :, ::-1], mask[:, ::-1]
    return image, mask


def _resized(image: np.ndarray, mask: np.ndarray, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Image, bilinear, and mask, to the nearest pixel, in another size."""
    from PIL import Image

    channels = [
        np.asarray(Image.fromarray(channel).resize((width, height), Image.Resampling.BILINEAR)) for channel in image
    ]
    rows, columns = (
        ((np.arange(new) + 0.5) * old / new).astype(int) for new, old in zip((height, width), mask.shape, strict=True)
    )
    return np.stack(channels), mask[np.ix_(rows, columns)]


def load_masked_pixels(
    splits: "MaskSplits", processor: "BaseImageProcessor", args: MaskDataArguments, seed: int
) -> dict[str, MaskedPixels]:
    """Every split as pixels and masks; only the training split is augmented.

    Args:
        splits: from :func:`.mask_data.load_mask_splits`.
        processor: the model's image processor.
        args: the data options.
        seed: of the augmentation.
    """
    columns = (splits.image_column, splits.mask_column)
    return {
        split: MaskedPixels(rows, columns, processor, args, description=f"decoding {split}", seed=seed)
        for split, rows in splits.rows.items()
    }


class MaskCollator(NormalizingCollator):
    """Items of :class:`MaskedPixels` -> ``pixel_values`` float32, normalised, and ``labels`` int64, each a batch."""

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {**super().__call__([{**item, "labels": 0} for item in items]),
                "labels": torch.stack([item["labels"] for item in items])}  # fmt: skip
