"""The image processor of a model with one channel: it converts every image to grey.

Pipelines give every image processor a colour image, also where the file is grey, and the stock processors leave three
channels where a model needs one. Models with three channels use the stock processor, and this file does not travel
with them.
"""

from typing import Any

from transformers import ViTImageProcessorPil

# Of red, green and blue: ITU-R 601, in units of 2^-16, as Pillow has them for its mode "L".
_LUMA = (19595, 38470, 7471)


class ImgProcGreyImageProcessor(ViTImageProcessorPil):
    """The stock ViT image processor, but every image becomes grey first, ``[1, height, width]``.

    Args:
        **kwargs: those of the stock processor; ``image_mean`` and ``image_std`` have one entry.

    Example:
        >>> from PIL import Image
        >>> from hf_imgproc_attn.models.image_processing_imgproc import ImgProcGreyImageProcessor
        >>> processor = ImgProcGreyImageProcessor(size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5])
        >>> processor(Image.new("RGB", (9, 7)), return_tensors="pt")["pixel_values"].shape
        torch.Size([1, 1, 8, 8])
    """

    def process_image(self, image: Any, **kwargs: Any) -> Any:
        """A PIL image, array or tensor -> pixels of one channel, ``[1, height, width]`` in the values it had.

        Pictures of 16 bits become pictures of 8, as in training.
        """
        if hasattr(image, "convert"):
            if image.mode.startswith("I;16"):
                image = image.point(lambda value: value * (1 / 257) + 0.5)
            image = image.convert("L")
        pixels = super().process_image(image, **{**kwargs, "do_convert_rgb": False})
        if pixels.shape[0] < 3:
            return pixels[:1]
        is_integer = pixels.dtype.kind in "iu"
        wide = pixels.astype("int64") if is_integer else pixels
        grey = sum(weight * wide[channel] for channel, weight in enumerate(_LUMA))
        grey = (grey + 2**15) >> 16 if is_integer else grey / 2**16
        return grey[None].astype(pixels.dtype)


ImgProcGreyImageProcessor.register_for_auto_class()
