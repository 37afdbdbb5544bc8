"""The segmentation model a run starts from, and its image processor."""

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from hf_imgproc_attn.backbones import VIT
from hf_imgproc_attn.training_support.arguments import ModelArguments
from hf_imgproc_attn.training_support.early_checks import check_ignored, check_whole_patches
from hf_imgproc_attn.training_support.foreign_models import is_own
from hf_imgproc_attn.training_support.mask_arguments import MaskDataArguments
from hf_imgproc_attn.training_support.mask_data import MaskSplits
from hf_imgproc_attn.training_support.model_setup import default_patch_size, image_processor, pair
from hf_imgproc_attn.training_support.model_start import (
    check_start,
    label_fields,
    new_model,
    parse_overrides,
    start_from,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.image_processing_utils import BaseImageProcessor

_TASK = "semantic-segmentation"


def build_segmenter(
    args: ModelArguments, splits: MaskSplits, data: MaskDataArguments
) -> tuple["PreTrainedModel", "BaseImageProcessor"]:
    """The segmentation model and the image processor that belongs to it.

    A checkpoint gets a new head, unless it has one for as many classes, and keeps its positions: they are interpolated
    to the size that the data options ask for.

    Args:
        args: the model options.
        splits: the data: names of the classes, and the size of a new model's images.
        data: the data options.

    Raises:
        UsageError: for a checkpoint or configuration that cannot be used, or a size of other than whole patches.
    """
    from hf_imgproc_attn.models.image_processing_imgproc_segmentation import ImgProcSegmentationImageProcessor
    from hf_imgproc_attn.training_support.image_pixels import channel_statistics

    overrides = parse_overrides(args, VIT.our_class(VIT.config))
    check_ignored(overrides, data)
    labels, found = label_fields(splits.label_names), check_start(args, VIT.model_type)
    if found is None or is_own(found, VIT.model_type):
        overrides["semantic_loss_ignore_index"] = data.ignore_index
    if found is None:
        size = overrides.setdefault("image_size", _one_or_two(splits.image_size))
        if "patch_size" not in overrides:
            overrides["patch_size"] = default_patch_size(pair(size))
        model = new_model(_TASK, args, {**labels, **overrides})
    else:
        model = start_from(_TASK, args, overrides, labels)
        model.config.semantic_loss_ignore_index = data.ignore_index
    sides = pair(_image_size(model.config, splits) if data.image_size is None else data.image_size)
    check_whole_patches(sides, model.config)
    # Not every type of model has a size of its own.
    needed = SimpleNamespace(image_size=list(sides), num_channels=model.config.num_channels)
    own = image_processor(args.model_name_or_path, needed)
    channel_statistics(own)  # refuses other normalisations
    processor = ImgProcSegmentationImageProcessor(
        size={"height": sides[0], "width": sides[1]},
        image_mean=list(own.image_mean),
        image_std=list(own.image_std),
        do_convert_rgb=model.config.num_channels == 3,
        do_reduce_labels=data.reduce_labels,
    )
    return model, processor


def _one_or_two(size: tuple[int, int]) -> int | list[int]:
    return size[0] if size[0] == size[1] else list(size)


def _image_size(config: Any, splits: MaskSplits) -> Any:
    return getattr(config, "image_size", splits.image_size)
