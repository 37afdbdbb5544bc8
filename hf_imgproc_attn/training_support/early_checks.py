"""What is refused of a model before any data are read: the configuration is built, and its model without memory."""

from typing import Any

from hf_imgproc_attn.backbone_row import Backbone
from hf_imgproc_attn.backbones import GPT2, OF_TASK, TASKS, VIT
from hf_imgproc_attn.errors import UsageError
from hf_imgproc_attn.training_support.arguments import Arguments, ModelArguments
from hf_imgproc_attn.training_support.block_size import DEFAULT_BLOCK_SIZE
from hf_imgproc_attn.training_support.foreign_models import check_foreign, is_own
from hf_imgproc_attn.training_support.model_setup import DEFAULT_MAX_LENGTH, default_patch_size, pair
from hf_imgproc_attn.training_support.model_start import (
    as_usage_errors,
    check_preset,
    check_start,
    label_fields,
    parse_overrides,
    what_chooses,
)
from hf_imgproc_attn.training_support.shared_tokens import check_shareable

_ANY_PATCHES = 8
"""Patches a side of a model whose images are not known yet."""
_ANY_PATCH_SIZE = 4


def check_model(task: str, arguments: Arguments[Any]) -> None:
    """Refuse a start, a preset or an override that makes no sense, before data are loaded and tokenizers are asked.

    What only the data decide (classes, vocabulary, sizes of images) is left open; building the model checks it again.
    No random number is drawn and no memory of the model's size is used.

    Args:
        task: a key of ``TASKS``.
        arguments: the parsed command line.

    Raises:
        UsageError: for a checkpoint that cannot be found or is of another type, or a configuration that cannot be
            used.
    """
    import torch

    args, row = arguments.model, OF_TASK[task]
    found = check_start(args, row.model_type)
    config_class = row.our_class(row.config)
    model_class = row.our_class(row.head(TASKS[task].auto_class).variant)
    overrides = parse_overrides(args, config_class)
    check_ignored(overrides, arguments.data)
    start = what_chooses(args) if found is None else f"model_name_or_path {args.model_name_or_path!r}"
    with torch.random.fork_rng(devices=[]), torch.device("meta"), as_usage_errors(start):
        if found is None:
            fields = {**row.new_model, **_known_sizes(row, arguments.data, overrides), **overrides}
            config = config_class.from_preset(args.preset or "softmax", **fields)
            model = model_class(config)
        elif is_own(found, row.model_type):
            config = _own_configuration(row, args, found, overrides)
            model = model_class(config)
        else:
            config = found
            model = check_foreign(task, args, found, overrides)
        check_pairs(config, found, overrides, arguments.data)
        if model is not None:
            check_shareable(model, getattr(arguments.data, "context_parallel", 1))
    size = getattr(arguments.data, "image_size", None)
    if size is not None:
        check_whole_patches(pair(size), config)


def check_ignored(overrides: dict[str, Any], data: Any) -> None:
    """Refuse an override that says something else than ``ignore_index``, from which the field is set.

    Args:
        overrides: fields of the configuration.
        data: the data options, of any task.

    Raises:
        UsageError: naming both.
    """
    ignored = getattr(data, "ignore_index", None)
    given = overrides.get("semantic_loss_ignore_index", ignored)
    if ignored is not None and given != ignored:
        raise UsageError(
            f"ignore_index {ignored} differs from semantic_loss_ignore_index of config_overrides, {given!r}: set "
            "ignore_index alone"
        )


def check_pairs(config: Any, found: Any, overrides: dict[str, Any], data: Any) -> None:
    """Refuse a classifier of texts for pairs of them, and the other way round.

    Args:
        config: of the model.
        found: of the checkpoint that it starts from; None for a new model, which gets what the data need.
        overrides: fields of the configuration.
        data: the data options, of any task.

    Raises:
        UsageError: naming ``classifier_pairs``.
    """
    wanted, has = getattr(data, "is_pairs", False), getattr(config, "classifier_pairs", False)
    if has != wanted and (found is not None or "classifier_pairs" in overrides):
        raise UsageError(
            f"classifier_pairs must be {wanted} for {'pairs of texts' if wanted else 'data that are no pairs'}, got "
            f"{has}: a run on pairs starts from a new model or from a checkpoint that was trained on pairs"
        )


def check_whole_patches(sides: tuple[int, int], config: Any) -> None:
    """Refuse images that patches do not fill.

    Args:
        sides: height and width in pixels.
        config: of the model; not every type has patches of one size.

    Raises:
        UsageError: naming both sizes.
    """
    patch = pair(getattr(config, "patch_size", 1))
    if sides[0] % patch[0] or sides[1] % patch[1]:
        raise UsageError(
            f"image_size must be a multiple of the patches' {patch[0]} x {patch[1]} pixels, got "
            f"{' x '.join(map(str, sides))}"
        )


def _own_configuration(row: Backbone, args: ModelArguments, found: Any, overrides: dict[str, Any]) -> Any:
    """What a stock checkpoint of the usual type is converted to, or one of ours goes on as."""
    from hf_imgproc_attn.conversion_weights import check_structure, variant_fields

    config_class = row.our_class(row.config)
    # A checkpoint's own classes make way for those of the data; what they must not be is not to be asked of them.
    labels = {} if row is GPT2 else label_fields(["0", "1"])
    if found.model_type == row.name:
        fields, _ = variant_fields(found, args.preset or "softmax", overrides)
        config = config_class(**{**fields, **labels})
        check_structure(found, config, overrides)
        return config
    if args.preset is not None:
        check_preset(args.preset, found)
    return config_class.from_pretrained(args.model_name_or_path, **labels, **overrides)


def _known_sizes(row: Backbone, data: Any, overrides: dict[str, Any]) -> dict[str, Any]:
    """Fields of a new model that its data will decide: as far as the options tell, else values that refuse nothing."""
    if row is not VIT:
        special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
        if row is GPT2:
            return {"n_positions": getattr(data, "block_size", None) or DEFAULT_BLOCK_SIZE, **special}
        return {
            "max_position_embeddings": getattr(data, "max_length", None) or DEFAULT_MAX_LENGTH,
            "pad_token_id": special["pad_token_id"],
        }
    size, patch = overrides.get("image_size", getattr(data, "image_size", None)), overrides.get("patch_size")
    if size is None:
        patch = _ANY_PATCH_SIZE if patch is None else patch
        sides = [side * _ANY_PATCHES for side in pair(patch)] if _is_size(patch) else _ANY_PATCH_SIZE * _ANY_PATCHES
        return {"patch_size": patch, "image_size": sides}
    if patch is None and _is_size(size):
        patch = default_patch_size(pair(size))
    return {"image_size": size, **({} if patch is None else {"patch_size": patch})}


def _is_size(value: Any) -> bool:
    """Whether it is one length in pixels, or two; anything else the configuration refuses in its own words."""
    sides = value if isinstance(value, list) and len(value) == 2 else [value]
    return all(type(side) is int and side > 0 for side in sides)
