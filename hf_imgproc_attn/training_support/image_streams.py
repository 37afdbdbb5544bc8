"""Labelled images whose training split is read as it is needed (``--streaming``)."""

import dataclasses
import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hf_imgproc_attn.errors import UsageError, plain_message
from hf_imgproc_attn.training_support.arguments import EMBEDDED_IMAGES, ImageDataArguments
from hf_imgproc_attn.training_support.data_loading import load_splits
from hf_imgproc_attn.training_support.image_data import ImageSplits, find_images, native_size
from hf_imgproc_attn.training_support.image_pixels import augmented, eight_bits
from hf_imgproc_attn.training_support.labelled_data import label_column_of, label_splits
from hf_imgproc_attn.training_support.streams import Stream, StreamedSamples

if TYPE_CHECKING:
    from transformers import TrainingArguments
    from transformers.image_processing_utils import BaseImageProcessor

_FIRST_IMAGES = 20
"""Of a stream: what tells it from another one, and how large its images are."""


@dataclasses.dataclass
class StreamedImages:
    """The training split as a stream.

    Attributes:
        stream: its rows.
        image_column: with the images.
        label_column: with the classes, as integers.
        sha256: over the pixels and classes of the first rows.
    """

    stream: Stream
    image_column: str
    label_column: str
    sha256: str

    def pixels(
        self, processor: "BaseImageProcessor", args: ImageDataArguments, training_args: "TrainingArguments"
    ) -> StreamedSamples:
        """The samples of one process, as ``PixelDataset`` makes them, without an end."""
        place = training_args.process_index
        mode = "L" if len(processor.image_mean) == 1 else "RGB"

        def samples(rows: Iterator[dict[str, Any]], number: int) -> Iterator[dict[str, Any]]:
            for index, row in enumerate(rows):
                try:
                    image = eight_bits(row[self.image_column]).convert(mode)
                except Exception as error:  # files are damaged in many ways
                    raise UsageError(
                        f"row {index} of process {place} in the train split cannot be used: {plain_message(error)}"
                    ) from error
                label = row[self.label_column]
                if label is None or label < 0:
                    raise UsageError(f"row {index} of process {place} in the train split has no label")
                encoded = processor(images=[image], do_rescale=False, do_normalize=False, return_tensors="np")
                pixels = np.asarray(encoded["pixel_values"], dtype=np.uint8)[0]
                if args.random_crop_padding or args.horizontal_flip:
                    seed = (self.stream.seed, number, place, index)
                    pixels = augmented(pixels, seed, args.random_crop_padding, args.horizontal_flip)
                yield {"pixel_values": torch.from_numpy(pixels), "labels": int(label)}

        return StreamedSamples(self.stream, samples, training_args, self.sha256)


def load_image_stream(args: ImageDataArguments, seed: int) -> tuple[StreamedImages, ImageSplits]:
    """The training split as a stream, and the others in memory, where there are any.

    Args:
        args: the data options.
        seed: of the order of rows, and of augmentation.

    Raises:
        UsageError: for data that cannot be loaded, missing or ambiguous columns, an empty split, or labels whose
            classes the data set does not name.
    """
    import datasets

    parts = load_splits(args, EMBEDDED_IMAGES, streaming=True)
    stream = Stream(parts.pop("train"), args.dataset_name, seed, args.shuffle_buffer)
    if args.max_train_samples is not None:
        stream = stream._replace(rows=stream.rows.take(args.max_train_samples))
    rows = {"train": datasets.Dataset.from_list(stream.first(_FIRST_IMAGES), features=stream.rows.features)}
    label_column = label_column_of(rows["train"], args.label_column_name)
    if not isinstance(rows["train"].features[label_column], datasets.ClassLabel):
        raise UsageError(
            f"label_column_name must be a column whose classes the data set names (ClassLabel) with streaming, got "
            f"{label_column!r} of type {rows['train'].features[label_column]}"
        )
    for split, part in parts.items():
        taken = list(part if args.max_eval_samples is None else part.take(args.max_eval_samples))
        if not taken:
            raise UsageError(f"the {split} split of data set {args.dataset_name!r} is empty")
        rows[split] = datasets.Dataset.from_list(taken, features=part.features)
    rows, image_column = find_images(rows, args.image_column_name)
    if not isinstance((stream.rows.features or {}).get(image_column), datasets.Image):
        stream = stream._replace(rows=stream.rows.cast_column(image_column, datasets.Image()))
    all_of_them = dataclasses.replace(args, max_train_samples=None, max_eval_samples=None, validation_fraction=0.0)
    labelled = label_splits(rows, all_of_them, "images")
    size, first = native_size(rows["train"], image_column), hashlib.sha256()
    train = labelled.rows.pop("train")
    for image, label in zip(train[image_column], labelled.labels.pop("train"), strict=True):
        first.update(np.asarray(image).tobytes() + bytes(str(label), "ascii"))
    images = StreamedImages(stream, image_column, label_column, first.hexdigest())
    return images, ImageSplits(labelled.rows, labelled.labels, labelled.label_names, image_column, size)
