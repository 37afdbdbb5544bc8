"""Images as pixels for a Vision Transformer: the image processor, the data set, augmentation and batches.

Images are decoded and resized once, by the same image processor that is saved with the checkpoint, and kept as 8-bit
pixels; rescaling and normalisation happen a batch at a time. Splits too large for that are decoded as they are read.
"""

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset as TorchDataset
from transformers import TrainerCallback, TrainerState

from hf_imgproc_attn.errors import UsageError, plain_message
from hf_imgproc_attn.training_support.arguments import ImageDataArguments
from hf_imgproc_attn.training_support.data_loading import content_fingerprint

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL import Image
    from transformers.image_processing_utils import BaseImageProcessor

    from hf_imgproc_attn.training_support.image_data import ImageSplits

DECODE_ONCE_BYTES = 2 << 30
"""Splits whose 8-bit pixels need no more memory than this are decoded once."""

_CHUNK = 512


def build_image_processor(image_size: tuple[int, int], num_channels: int) -> "BaseImageProcessor":
    """The ViT image processor (PIL, bilinear) for a model's image size; pixels are normalised to [-1, 1].

    For three channels it is the stock one; for one channel ours, which makes grey of colour.

    Args:
        image_size: (height, width) in pixels.
        num_channels: 3 (every image is converted to RGB) or 1 (every image is converted to grey).

    Raises:
        UsageError: for another number of channels.
    """
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    from hf_imgproc_attn.models.image_processing_imgproc import ImgProcGreyImageProcessor

    if num_channels not in (1, 3):
        raise UsageError(f"num_channels must be 1 or 3, got {num_channels}")
    processor_class = ViTImageProcessorPil if num_channels == 3 else ImgProcGreyImageProcessor
    return processor_class(
        size={"height": image_size[0], "width": image_size[1]},
        image_mean=[0.5] * num_channels,
        image_std=[0.5] * num_channels,
        do_convert_rgb=num_channels == 3,
    )


def eight_bits(image: "Image.Image | None") -> "Image.Image":
    """An image of 8 bits a channel, in whatever mode; others are scaled, since Pillow would clip them to 255.

    - 16-bit grey (``I;16``), 0 to 65535: divided by 257, so that white stays white.
    - 32-bit integers (``I``), in which 16-bit files may be kept: the same, from 0 to 65535.
    - floats (``F``), from 0 to 1: times 255.

    Raises:
        ValueError: for an image that is missing, or whose values lie outside these ranges: what is white is then not
            known. So it is with integers of 32 bits that are all below 256, which may mean 8 or 16 bits.
    """
    from PIL import Image

    if image is None:
        raise ValueError("there is no image")
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    if image.mode == "F":
        if not (values.min() >= 0 and values.max() <= 1):
            raise ValueError(
                f"floating-point pixels must lie in [0, 1], got {values.min():g} to {values.max():g}: save it scaled"
            )
        return Image.fromarray(np.rint(values * 255).astype(np.uint8))
    if image.mode == "I" and (values.min() < 0 or values.max() > 65535 or 0 < values.max() < 256):
        raise ValueError(
            f"integer pixels of 32 bits must lie in 0 to 65535, and not all below 256, got {values.min()} to "
            f"{values.max()}: save it with 8 or 16 bits"
        )
    return Image.fromarray(np.rint(values / 257).astype(np.uint8))


def augmented(image: np.ndarray, seed: tuple[int, ...], crop_padding: int, flip: bool) -> np.ndarray:
    """An image ``[channels, height, width]``, cropped at random and, half of the time, mirrored.

    Args:
        image: of any type.
        seed: of the generator that is drawn from.
        crop_padding: pixels of padding before the crop; 0: no crop.
        flip: whether it may be mirrored.
    """
    generator = np.random.default_rng(seed)
    if crop_padding:
        height, width = image.shape[1:]
        top, left = generator.integers(0, 2 * crop_padding + 1, size=2)
        edge = (crop_padding, crop_padding)
        image = np.pad(image, ((0, 0), edge, edge))[:, top : top + height, left : left + width]
    if flip and generator.random() < 0.5:
        image = image[:, :, ::-1]
    return np.ascontiguousarray(image)


class PixelDataset(TorchDataset[dict[str, Any]]):
    """One split as 8-bit pixels.

    An item is ``{"pixel_values": uint8 [channels, height, width], "labels": class index}``. Augmentation draws from a
    generator seeded by (seed, epoch, row), so it depends neither on the number of processes and workers nor on where a
    run was interrupted.

    Args:
        rows: the split.
        labels: class indices ``[rows]``.
        image_column: the column with the images.
        processor: resizes, and decides the channels.
        description: shown with the progress bar; its last word is the name of the split.
        crop_padding: pixels of padding before a random crop; 0 for none.
        flip: whether half of the images are mirrored.
        seed: of the augmentation.
    """

    def __init__(
        self,
        rows: "Dataset",
        labels: np.ndarray,
        image_column: str,
        processor: "BaseImageProcessor",
        *,
        description: str,
        crop_padding: int = 0,
        flip: bool = False,
        seed: int = 0,
    ) -> None:
        self.rows, self.labels, self.image_column = rows.select_columns([image_column]), labels, image_column
        self.processor, self.crop_padding, self.flip, self.seed = processor, crop_padding, flip, seed
        self.split = description.rpartition(" ")[2]
        self._brightest = 0  # of the images with 16 bits
        # In shared memory, so that data-loader workers that live on see it change.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self.image_shape: tuple[int, ...] = self._decode(0, 1).shape[1:]
        self.pixels: np.ndarray | None = None
        if len(rows) * np.prod(self.image_shape) <= DECODE_ONCE_BYTES:
            self.pixels = self._decode_all(description)
            self._warn_of_dark_images()

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the augmentation is drawn for."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = self._decode(index, index + 1)[0] if self.pixels is None else self.pixels[index]
        if self.crop_padding or self.flip:
            image = self._augment(image, index)
        return {"pixel_values": torch.from_numpy(image), "labels": int(self.labels[index])}

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Number of rows and a SHA-256 over pixels and labels (of undecoded splits: the library's own fingerprint)."""
        if self.pixels is None:
            return {"rows": len(self), "datasets_fingerprint": self.rows._fingerprint}
        return {"rows": len(self), "sha256": content_fingerprint([self.pixels.tobytes(), self.labels.tobytes()])}

    def _augment(self, image: np.ndarray, index: int) -> np.ndarray:
        return augmented(image, (self.seed, int(self._epoch), index), self.crop_padding, self.flip)

    def _decode(self, start: int, stop: int) -> np.ndarray:
        # Stock processors may leave the mode of a file as it is, and clip what has more than 8 bits.
        mode = "L" if len(self.processor.image_mean) == 1 else "RGB"
        try:
            stored = self.rows[start:stop][self.image_column]
            images = [eight_bits(image).convert(mode) for image in stored]
            wide = [int(np.asarray(image).max()) for image in stored if image.mode.startswith("I")]
            self._brightest = max([self._brightest, *wide])
        except Exception as error:  # files are damaged in many ways
            self._name_unreadable(start, stop, mode)
            raise UsageError(f"images of the {self.split} split cannot be read: {plain_message(error)}") from error
        encoded = self.processor(images=images, do_rescale=False, do_normalize=False, return_tensors="np")
        return np.asarray(encoded["pixel_values"], dtype=np.uint8)

    def _warn_of_dark_images(self) -> None:
        """Tell of 16-bit files that hold 12 bits or fewer: few grey levels are left of them."""
        if 0 < self._brightest < 4096:
            warnings.warn(
                f"the 16-bit images of the {self.split} split have no pixel above {self._brightest} of 65535: "
                f"{round(self._brightest / 257) + 1} of 256 grey levels are left; stretch the images first",
                stacklevel=3,
            )

    def _name_unreadable(self, start: int, stop: int, mode: str) -> None:
        """Refuse the first image of some rows that cannot be read, by its file or row.

        Raises:
            UsageError: naming the file, or the row where there is none.
        """
        import datasets

        stored = self.rows.cast_column(self.image_column, datasets.Image(decode=False))
        for index in range(start, stop):
            try:
                eight_bits(self.rows[index][self.image_column]).convert(mode)
            except Exception as error:
                entry = stored[index][self.image_column] or {}
                row = f"row {index} of the {self.split} split"
                name = f"{entry['path']!r} ({row})" if entry.get("path") else row
                raise UsageError(f"the image {name} cannot be used: {plain_message(error)}") from error

    def _decode_all(self, description: str) -> np.ndarray:
        from datasets.utils import tqdm

        pixels = np.empty((len(self), *self.image_shape), dtype=np.uint8)
        with tqdm(total=len(self), desc=description, unit="image", leave=False, delay=1.0) as bar:
            for start in range(0, len(self), _CHUNK):
                stop = min(start + _CHUNK, len(self))
                pixels[start:stop] = self._decode(start, stop)
                bar.update(stop - start)
        return pixels


def load_pixels(
    splits: "ImageSplits", processor: "BaseImageProcessor", args: ImageDataArguments, seed: int
) -> dict[str, PixelDataset]:
    """Every split as pixels; only the training split is augmented.

    Args:
        splits: from :func:`.image_data.load_image_splits`.
        processor: the model's image processor.
        args: the data options, for the augmentation.
        seed: of the augmentation.
    """
    return {
        split: PixelDataset(
            rows,
            splits.labels[split],
            splits.image_column,
            processor,
            description=f"decoding {split}",
            crop_padding=args.random_crop_padding if split == "train" else 0,
            flip=args.horizontal_flip and split == "train",
            seed=seed,
        )
        for split, rows in splits.rows.items()
    }


class EpochCallback(TrainerCallback):
    """Tells a :class:`PixelDataset` which epoch begins.

    The Trainer's own ``set_epoch`` reaches a data set in one process, but not behind the sharded sampler of several.
    """

    def __init__(self, dataset: PixelDataset) -> None:
        self.dataset = dataset

    def on_epoch_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.dataset.set_epoch(int(state.epoch or 0))


class NormalizingCollator:
    """Items of :class:`PixelDataset` -> ``pixel_values`` float32 ``[batch, channels, height, width]`` and ``labels``.

    Args:
        processor: its rescaling and normalisation are applied.
    """

    def __init__(self, processor: "BaseImageProcessor") -> None:
        self.mean, self.std = channel_statistics(processor)

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        pixels = torch.stack([item["pixel_values"] for item in items]).float() / 255
        return {
            "pixel_values": (pixels - self.mean) / self.std,
            "labels": torch.tensor([item["labels"] for item in items]),
        }


def channel_statistics(processor: "BaseImageProcessor") -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation that the processor normalises images in [0, 1] with, each ``[channels, 1, 1]``.

    Raises:
        UsageError: if the processor does not scale 8-bit pixels to [0, 1] and normalise them.
    """
    if not (processor.do_rescale and processor.do_normalize and abs(processor.rescale_factor * 255 - 1) < 1e-6):
        raise UsageError(
            "the image processor of model_name_or_path must rescale by 1/255 and normalise, got "
            f"do_rescale={processor.do_rescale}, rescale_factor={processor.rescale_factor}, "
            f"do_normalize={processor.do_normalize}"
        )
    return tuple(torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))  # type: ignore[return-value]
