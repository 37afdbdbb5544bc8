"""The image processor of semantic segmentation: images with their masks in, a mask in the image's size out."""

from typing import Any

import torch
from transformers import BeitImageProcessorPil, ViTImageProcessorPil
from transformers.image_processing_utils import BatchFeature
from transformers.models.beit.image_processing_pil_beit import BeitImageProcessorKwargs

from .image_processing_imgproc import ImgProcGreyImageProcessor

_NO_LABEL = 255


class ImgProcSegmentationImageProcessor(ImgProcGreyImageProcessor):
    """The stock ViT image processor for models of three channels, and the grey one for models of one, with masks.

    Masks are resized to the nearest pixel; BEiT's processor, whose options these are, interpolates between classes.

    Args:
        **kwargs: those of the stock processor; ``image_mean`` and ``image_std`` have an entry for each channel.
            ``do_reduce_labels``: whether masks count from 1 and 0 is no class, as in ADE20K; 0 becomes 255.

    Example:
        >>> from PIL import Image
        >>> from hf_imgproc_attn.models.image_processing_imgproc_segmentation import ImgProcSegmentationImageProcessor
        >>> processor = ImgProcSegmentationImageProcessor(size={"height": 8, "width": 8})
        >>> inputs = processor(Image.new("RGB", (9, 7)), Image.new("L", (9, 7), 3), return_tensors="pt")
        >>> inputs["pixel_values"].shape, inputs["labels"].unique().tolist()
        (torch.Size([1, 3, 8, 8]), [3])
    """

    valid_kwargs = BeitImageProcessorKwargs
    do_reduce_labels = False

    post_process_semantic_segmentation = BeitImageProcessorPil.post_process_semantic_segmentation

    def preprocess(self, images: Any, segmentation_maps: Any = None, **kwargs: Any) -> BatchFeature:
        """Images and masks of their sizes: ``pixel_values`` and, with masks, ``labels`` ``[batch, height, width]``.

        Args:
            images: one or several, as the stock processor takes them.
            segmentation_maps: as many masks, integers of one channel; 255 is no class.
            **kwargs: options of this call, as those of the constructor.

        Raises:
            ValueError: for another number of masks than images, masks of another size or with several channels.
        """
        features = super().preprocess(images, **kwargs)
        if segmentation_maps is None:
            return features
        wanted = tuple(features["pixel_values"][0].shape[-2:])
        pictures = self._prepare_images_structure(images)
        masks = self._prepare_images_structure(segmentation_maps, expected_ndims=2)
        if len(masks) != len(pictures):
            raise ValueError(f"segmentation_maps must be one for each of {len(pictures)} images, got {len(masks)}")
        reduce = kwargs.get("do_reduce_labels")
        labels = [
            prepared_mask(mask, _size(image), wanted, self.do_reduce_labels if reduce is None else reduce)
            for image, mask in zip(pictures, masks, strict=True)
        ]
        return BatchFeature({**features, "labels": [mask.numpy() for mask in labels]}, kwargs.get("return_tensors"))

    def process_image(self, image: Any, **kwargs: Any) -> Any:
        """A PIL image, array or tensor -> its pixels ``[channels, height, width]``, one channel for a grey model."""
        if len(self.image_mean) == 1:
            return super().process_image(image, **kwargs)
        return ViTImageProcessorPil.process_image(self, image, **kwargs)


def prepared_mask(mask: Any, image_size: tuple[int, int], wanted: tuple[int, int], reduce: bool) -> torch.Tensor:
    """A mask as labels ``[height, width]``, int64, in the size that the image is brought to.

    Args:
        mask: a PIL image, array or tensor of integers; of a palette the indices count.
        image_size: height and width of its image.
        wanted: height and width of the result.
        reduce: whether it counts from 1, see the processor.

    Raises:
        ValueError: for several channels, floating-point values, or another size than the image's.
    """
    values = torch.from_numpy(ViTImageProcessorPil().process_image(mask, do_convert_rgb=False).astype("float64"))
    if values.shape[0] != 1:
        raise ValueError(f"a mask must have one channel with the class of every pixel, got {values.shape[0]} channels")
    if not bool((values == values.round()).all()):
        raise ValueError("a mask must hold integers, the class of every pixel, got others")
    if tuple(values.shape[1:]) != image_size:
        raise ValueError(
            f"a mask must have its image's height and width {image_size[0]} x {image_size[1]}, got "
            f"{values.shape[1]} x {values.shape[2]}"
        )
    if tuple(values.shape[1:]) != wanted:
        values = torch.nn.functional.interpolate(values[None], size=wanted, mode="nearest-exact")[0]
    labels = values[0].long()
    if reduce:
        labels = torch.where((labels == 0) | (labels == _NO_LABEL), _NO_LABEL, labels - 1)
    return labels


def _size(image: Any) -> tuple[int, int]:
    """Height and width of a PIL image, array or tensor."""
    if hasattr(image, "convert"):
        return image.height, image.width
    shape = tuple(image.shape)
    if len(shape) == 2:
        return shape
    return shape[:2] if shape[0] not in (1, 3, 4) else shape[1:]


ImgProcSegmentationImageProcessor.register_for_auto_class()
