"""The model a run starts from: a new one of a preset, a checkpoint of ours, or a stock one converted on the way."""

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from hf_imgproc_attn.backbones import BERT, GPT2, OF_TASK, TASKS, VIT, Backbone, Head
from hf_imgproc_attn.errors import UsageError, broken_files, plain_message
from hf_imgproc_attn.models.spec_fields import FILTER_FIELDS, PRESETS
from hf_imgproc_attn.training_support.argument_parser import check_override_names
from hf_imgproc_attn.training_support.arguments import ModelArguments
from hf_imgproc_attn.training_support.foreign_models import check_type, is_own, start_foreign

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
    from transformers.image_processing_utils import BaseImageProcessor

DEFAULT_BLOCK_SIZE = 256
DEFAULT_MAX_LENGTH = 128
_LARGEST_PATCH = 16


def check_start(args: ModelArguments, model_type: str) -> Any:
    """Check that the checkpoint to start from is of the right type, before data are loaded and tokenizers are asked.

    Args:
        args: the model options.
        model_type: the one of ours that is trained.

    Returns:
        The configuration of the checkpoint; None for a new model.

    Raises:
        UsageError: for a checkpoint that cannot be found, or one of another type.
    """
    from transformers import AutoConfig

    name = args.model_name_or_path
    if name is None:
        if args.filter_stacks is not None:
            raise UsageError(f"filter_stacks must be given with model_name_or_path, got {args.filter_stacks!r}")
        return None
    with as_usage_errors(f"model_name_or_path {name!r}"):
        found = AutoConfig.from_pretrained(name)
    check_type(args, found, model_type)
    return found


def check_block_size(
    args: ModelArguments,
    block_size: int | None,
    num_tokens: int,
    vocab_size: int,
    training_args: "TrainingArguments",
    context_parallel: int = 1,
) -> None:
    """Refuse blocks that the training text or the memory has no room for.

    Args:
        args: the model options.
        block_size: as the user gave it; None, and no more than the default, is never refused.
        num_tokens: of the training text.
        vocab_size: of the tokenizer.
        training_args: say how large a batch is, and where it is computed.
        context_parallel: processes that share the tokens of a block.

    Raises:
        UsageError: naming the block size and what is too small for it.
    """
    if block_size is None or block_size <= DEFAULT_BLOCK_SIZE:
        return
    if block_size > num_tokens:
        raise UsageError(f"block_size must not exceed the {num_tokens} tokens of the training text, got {block_size}")
    samples = -(-(num_tokens - 1) // (block_size - 1))
    batch = training_args.train_batch_size * training_args.world_size // context_parallel
    if samples < batch:
        raise UsageError(
            f"block_size {block_size} cuts the training text of {num_tokens} tokens into {samples} samples, fewer "
            f"than one batch of {batch}: choose smaller blocks or a smaller per_device_train_batch_size"
        )
    if args.model_name_or_path is not None:
        return  # its own positions are the limit
    batch = min(training_args.train_batch_size, samples)
    needed = _least_memory(args, block_size, vocab_size, batch / context_parallel)
    free = _free_memory(training_args.device)
    if free is not None and needed > free:
        raise UsageError(
            f"block_size {block_size} needs at least {needed / 2**30:.1f} GiB in training with "
            f"per_device_train_batch_size {batch}, but {free / 2**30:.1f} GiB are free on {training_args.device}"
        )


def _least_memory(args: ModelArguments, block_size: int, vocab_size: int, batch: float) -> int:
    """Bytes that a training step cannot do without: weights with their gradients and Adam's two moments, the logits
    with their softmax and gradient, and a few activations of every layer; for a bias, the dense logits of one sample.
    A batch may be a part of a sample.
    """
    overrides = parse_overrides(args, GPT2.our_class(GPT2.config))
    fields = {**PRESETS[args.preset or "softmax"], **GPT2.new_model, **overrides}
    width, layers, heads = (fields[name] for name in ("n_embd", "n_layer", "n_head"))
    if not all(isinstance(size, int) for size in (width, layers, heads)):
        return 0  # the configuration refuses it in its own words
    weights = (block_size + vocab_size) * width + 12 * layers * width**2
    logits = batch * block_size * vocab_size
    activations = 16 * batch * block_size * width * layers
    biased = fields.get("position_kernel") in ("alibi", "relative_buckets")
    bias = min(batch, 1) * heads * block_size**2 if biased else 0
    return int(4 * (4 * weights + 3 * logits + activations + bias))


def _free_memory(device: "torch.device") -> int | None:
    """Free bytes on a device; None where nobody knows."""
    import psutil
    import torch

    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available) if device.type == "cpu" else None


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


def parse_overrides(args: ModelArguments, config_class: type[Any]) -> dict[str, Any]:
    """``["n_layer=2", "boosted_layers=[-1]"]`` -> ``{"n_layer": 2, "boosted_layers": [-1]}``.

    Args:
        args: their ``config_overrides`` are ``key=value``, the value in YAML; a later word wins over an earlier one.
            ``boosted_layers`` is one of the fields too.
        config_class: its fields, and their common names such as ``hidden_size``, are the keys there are.

    Raises:
        UsageError: for a word that is not ``key=value``, or an unknown key.
    """
    import yaml

    words = args.config_overrides
    fields = {field.name for field in dataclasses.fields(config_class)}
    check_override_names(words, fields | set(config_class.attribute_map))
    overrides: dict[str, Any] = {}
    for word in words:
        key, _, text = word.partition("=")
        key = config_class.attribute_map.get(key, key)
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UsageError(f"config_overrides must have values in YAML, got {word!r}") from error
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                value = float(value)  # YAML takes 1e-3 for a text
        overrides[key] = value
    if args.boosted_layers is not None:
        if overrides.get("boosted_layers") not in (None, args.layers()):
            raise UsageError(
                f"boosted_layers {args.boosted_layers!r} differs from that of config_overrides, "
                f"{overrides['boosted_layers']!r}"
            )
        overrides["boosted_layers"] = args.layers()
    return overrides


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


def label_fields(label_names: list[str]) -> dict[str, Any]:
    """The fields of a configuration that name the classes."""
    return {
        "id2label": dict(enumerate(label_names)),
        "label2id": {name: index for index, name in enumerate(label_names)},
    }


def what_chooses(args: ModelArguments) -> str:
    """The options that chose the configuration of a new model, for messages about it.

    Args:
        args: the model options.
    """
    words = [f"preset {args.preset!r}"] if args.preset else []
    words += ["config_overrides"] if args.config_overrides or not words else []
    return " with ".join(words)


def new_model(task: str, args: ModelArguments, fields: dict[str, Any]) -> Any:
    """A new, small model of a task's backbone.

    Args:
        task: a key of ``TASKS``.
        args: the model options.
        fields: of the configuration; they win over the backbone's ``new_model``.

    Raises:
        UsageError: for a configuration that cannot be used.
    """
    row = OF_TASK[task]
    model_class = row.our_class(row.head(TASKS[task].auto_class).variant)
    with as_usage_errors(what_chooses(args)):
        config = row.our_class(row.config).from_preset(args.preset or "softmax", **{**row.new_model, **fields})
        model = model_class(config)
        if args.paired_start:
            start_as_softmax(model)
        return model


def start_as_softmax(model: "PreTrainedModel") -> None:
    """Give a new model the start of a new softmax model of its sizes, in every parameter of equal name and shape.

    The random numbers begin anew with the seed that was set last, for the softmax model and for what follows: the
    start of a variant does not depend on what it drew for parameters of its own. Two variants with the same further
    parameters draw these alike too.

    Args:
        model: one of ours, just made.
    """
    import torch

    sizes = {name: value for name, value in model.config.to_dict().items() if name not in FILTER_FIELDS}
    seed = torch.initial_seed()
    torch.manual_seed(seed)
    start = type(model)(type(model.config).from_dict(sizes)).state_dict()
    own = model.state_dict()
    shared = {name: value for name, value in start.items() if name in own and own[name].shape == value.shape}
    model.load_state_dict(shared, strict=False)
    torch.manual_seed(seed)


def start_from(
    task: str, args: ModelArguments, overrides: dict[str, Any], labels: dict[str, Any] | None = None
) -> Any:
    """Load a checkpoint of ours, convert a stock one, or filter one of another type. Only a head may be new.

    Args:
        task: a key of ``TASKS``.
        args: the model options.
        overrides: further fields of the configuration.
        labels: of a classifier, from :func:`label_fields`.

    Raises:
        UsageError: for a checkpoint that cannot be used.
    """
    import torch

    from hf_imgproc_attn import convert

    row, name, head = OF_TASK[task], args.model_name_or_path, labels or {}
    wanted = row.head(TASKS[task].auto_class)
    model_class, stock_class = row.our_class(wanted.variant), row.stock_class(_stock_start(row, wanted))
    config_class, stock_type = row.our_class(row.config), row.name
    with as_usage_errors(f"model_name_or_path {name!r}"):
        found = check_start(args, config_class.model_type)
        if not is_own(found, config_class.model_type):
            return start_foreign(task, args, found, overrides, head)
        # Single precision whatever the file holds: the optimiser needs it; bf16 and fp16 are options of the Trainer.
        options = {"dtype": torch.float32, "output_loading_info": True, "ignore_mismatched_sizes": bool(head)}
        if found.model_type == stock_type:
            stock, report = stock_class.from_pretrained(name, **head, **options)
            _check_loaded(str(name), report["missing_keys"], report["mismatched_keys"])
            converted = convert(stock, args.preset or "softmax", **overrides)
            return converted if wanted.stock else _with_new_head(converted, model_class)
        if args.preset is not None:
            check_preset(args.preset, found)
        config = config_class.from_pretrained(name, **head, **overrides)
        model, report = model_class.from_pretrained(name, config=config, **options)
        _check_loaded(str(name), report["missing_keys"], report["mismatched_keys"], report["unexpected_keys"])
        return model


def _stock_start(row: Backbone, head: Head) -> str:
    """The stock class that a stock checkpoint is read as; where none has the head, any other of those with labels."""
    return head.stock or next(str(other.stock) for other in row.heads if other.stock and other.measured)


def _with_new_head(converted: Any, model_class: type[Any]) -> Any:
    """The body of a model below the new head of another class."""
    model = model_class(converted.config)
    model.base_model.load_state_dict(converted.base_model.state_dict())
    return model


def check_preset(preset: str, found: Any) -> None:
    """A preset given with one of our checkpoints must be its own: training converts nothing but stock checkpoints."""
    wanted = type(found).from_preset(preset)
    for field in sorted({name for fields in PRESETS.values() for name in fields}):
        if getattr(found, field) != getattr(wanted, field):
            raise UsageError(
                f"preset {preset} has {field}={getattr(wanted, field)!r}, but the checkpoint was made with "
                f"{getattr(found, field)!r}; without --preset it goes on as it is, and `imgproc-attn convert` makes a "
                f"{preset} of it where that is defined"
            )


def _check_loaded(name: str, missing: Any, mismatched: Any, unexpected: Any = ()) -> None:
    """Refuse a checkpoint of which anything but the classification head would start at random or be dropped."""
    keys = {*missing, *(entry[0] for entry in mismatched), *unexpected}
    # A pretrained text encoder may come with the head of its pretraining, and without the pooler of a classifier.
    wrong = sorted(key for key in keys if not re.match(r"classifier\.|decode_head\.|cls\.|(\w+\.)?pooler\.", key))
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise UsageError(
            f"model_name_or_path {name!r} does not fit the configuration: missing, unexpected or of another shape are "
            f"{', '.join(wrong[:5])}{more}"
        )


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


@contextlib.contextmanager
def as_usage_errors(what: str) -> Iterator[None]:
    """Configurations and checkpoints are refused in several ways, by Transformers and by our models: make it one."""
    try:
        yield
    except UsageError:
        raise
    except broken_files() as error:
        raise UsageError(f"{what}: {plain_message(error)}") from error
