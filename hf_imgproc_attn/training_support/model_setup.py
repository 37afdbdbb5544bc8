"""The model that a task trains: sizes for its data, and what belongs beside it."""

from typing import TYPE_CHECKING, Any

from hf_imgproc_attn.backbones import BERT, GPT2, VIT
from hf_imgproc_attn.errors import UsageError
from hf_imgproc_attn.training_support.arguments import ModelArguments
from hf_imgproc_attn.training_support.block_size import DEFAULT_BLOCK_SIZE
from hf_imgproc_attn.training_support.foreign_models import is_own
from hf_imgproc_attn.training_support.model_start import (
    as_usage_errors,
    label_fields,
    new_model,
    parse_overrides,
    start_from,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.image_processing_utils import BaseImageProcessor

DEFAULT_MAX_LENGTH = 128
_LARGEST_PATCH = 16


def build_image_classifier(
    args: ModelArguments, label_names: list[str], image_size: tuple[int, int]
) -> tuple["PreTrainedModel", "BaseImageProcessor"]:
    """The classifier and the image processor that belongs to it.

    Args:
        args: the model options.
        label_names: class index -> name. A checkpoint with another number of classes gets a new classification head.
        image_size: (height, width) in pixels of a new model; a checkpoint keeps its own.

    Raises:
        UsageError: for a checkpoint or configuration that cannot be used.
    """
    overrides = parse_overrides(args, VIT.our_class(VIT.config))
    labels = label_fields(label_names)
    if args.model_name_or_path is None:
        size = overrides.get("image_size", image_size[0] if image_size[0] == image_size[1] else list(image_size))
        fields = {"image_size": size, "patch_size": default_patch_size(pair(size)), **labels, **overrides}
        model = new_model("image-classification", args, fields)
    else:
        model = start_from("image-classification", args, overrides, labels)
    return model, image_processor(args.model_name_or_path, model.config)


def build_causal_lm(
    args: ModelArguments, tokenizer: "PreTrainedTokenizerBase", block_size: int | None
) -> tuple["PreTrainedModel", int]:
    """The language model, and the block size it is trained with.

    Args:
        args: the model options.
        tokenizer: decides the vocabulary of a new model; a checkpoint whose vocabulary is too small is enlarged.
        block_size: tokens in a sample; None for 256 or the model's positions, whichever is less.

    Raises:
        UsageError: for a checkpoint or configuration that cannot be used, or blocks longer than the model's positions.
    """
    from hf_imgproc_attn.conversion_probe import longest_text
    from hf_imgproc_attn.filtered import refuse_what_sees_ahead

    overrides = parse_overrides(args, GPT2.our_class(GPT2.config))
    if args.model_name_or_path is None:
        special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        fields = {
            "n_positions": block_size or DEFAULT_BLOCK_SIZE,
            "vocab_size": len(tokenizer),
            **special,
            **overrides,
        }
        model = new_model("causal-lm", args, fields)
    else:
        model = start_from("causal-lm", args, overrides)
        refuse_what_sees_ahead(model, f"model_name_or_path {args.model_name_or_path!r}")
    own, text_config = is_own(model.config, GPT2.model_type), model.config.get_text_config()
    if len(tokenizer) > text_config.vocab_size:
        if args.model_name_or_path is None:
            raise UsageError(
                f"vocab_size must hold the tokenizer's {len(tokenizer)} entries, got {model.config.vocab_size}"
            )
        model.resize_token_embeddings(len(tokenizer))
    positions = longest_text(text_config)
    if own:
        # Without it a pipeline asks for 256 tokens more than the prompt has, which may be more than there are
        # positions.
        longest = model.generation_config.to_diff_dict().get("max_length")
        model.generation_config.max_length = positions if longest is None else min(longest, positions)
    block_size = min(positions, DEFAULT_BLOCK_SIZE) if block_size is None else block_size
    if block_size > positions:
        raise UsageError(f"block_size must not exceed the model's {positions} positions, got {block_size}")
    return model, block_size


def build_text_classifier(
    args: ModelArguments,
    tokenizer: "PreTrainedTokenizerBase",
    label_names: list[str],
    max_length: int | None,
    *,
    pairs: bool = False,
) -> tuple["PreTrainedModel", int]:
    """The classifier, and the length at which its texts are cut.

    Args:
        args: the model options.
        tokenizer: decides the vocabulary of a new model; a checkpoint whose vocabulary is too small is refused.
        label_names: class index -> name. A checkpoint with another number of classes gets a new classification head.
        max_length: tokens of a text; None for 128 or the model's positions, whichever is less.
        pairs: whether a new model classifies pairs of texts.

    Raises:
        UsageError: for a checkpoint or configuration that cannot be used, or texts longer than the model's positions.
    """
    from hf_imgproc_attn.conversion_probe import longest_text

    overrides, labels = parse_overrides(args, BERT.our_class(BERT.config)), label_fields(label_names)
    if args.model_name_or_path is None:
        fields = {
            "max_position_embeddings": max_length or DEFAULT_MAX_LENGTH,
            **({"classifier_pairs": True} if pairs else {}),
            "vocab_size": len(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
            **labels,
            **overrides,
        }
        model = new_model("text-classification", args, fields)
    else:
        model = start_from("text-classification", args, overrides, labels)
    text_config = model.config.get_text_config()
    positions, vocabulary = longest_text(text_config), text_config.vocab_size
    if text_config.pad_token_id is None:  # a decoder looks for the last token of a text before the padding
        text_config.pad_token_id = tokenizer.pad_token_id
    if len(tokenizer) > vocabulary:
        raise UsageError(f"vocab_size must hold the tokenizer's {len(tokenizer)} entries, got {vocabulary}")
    max_length = min(positions, DEFAULT_MAX_LENGTH) if max_length is None else max_length
    if max_length > positions:
        raise UsageError(f"max_length must not exceed the model's {positions} positions, got {max_length}")
    return model, max_length


def default_patch_size(image_size: tuple[int, int]) -> int:
    """The largest patch side, up to 16 pixels, that gives at least 7 patches a side (4 for images below 16 pixels).

    That is 2 for 8 pixels, 4 for 28 and 32, 8 for 64, 16 for 224.

    Raises:
        UsageError: if no whole number of patches fits.
    """
    for patch in range(_LARGEST_PATCH, 1, -1):
        if all(side % patch == 0 and side // patch >= (4 if side < 16 else 7) for side in image_size):
            return patch
    raise UsageError(f"patch_size must be given for images of {image_size[0]} x {image_size[1]} pixels: nothing fits")


def pair(size: Any) -> tuple[int, int]:
    """Height and width of a field that is one number where they are equal."""
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def image_processor(name: str | None, config: Any) -> "BaseImageProcessor":
    """The image processor of a checkpoint where it has one, else a new one for a model's images.

    Args:
        name: of the checkpoint, or None for a new model.
        config: of the model.

    Raises:
        UsageError: if it does not belong to a model with so many channels.
    """
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    from hf_imgproc_attn.conversion_files import fitting_processor, has_image_processor
    from hf_imgproc_attn.training_support.image_pixels import build_image_processor

    if name is not None and has_image_processor(name):
        with as_usage_errors(f"the image processor of model_name_or_path {name!r}"):
            return fitting_processor(AutoImageProcessor.from_pretrained(name), getattr(config, "num_channels", 3))
    return build_image_processor(pair(config.image_size), config.num_channels)
