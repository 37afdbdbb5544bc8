"""The start of a run's model: a new one of a preset, a checkpoint of ours, or a stock one converted on the way."""

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from hf_imgproc_attn.backbone_row import Backbone, Head
from hf_imgproc_attn.backbones import OF_TASK, TASKS
from hf_imgproc_attn.errors import UsageError, broken_files, plain_message
from hf_imgproc_attn.models.spec_fields import FILTER_FIELDS, PRESETS
from hf_imgproc_attn.training_support.argument_parser import check_override_names
from hf_imgproc_attn.training_support.arguments import ModelArguments
from hf_imgproc_attn.training_support.foreign_models import check_type, is_own, start_foreign

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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


@contextlib.contextmanager
def as_usage_errors(what: str) -> Iterator[None]:
    """Configurations and checkpoints are refused in several ways, by Transformers and by our models: make it one."""
    try:
        yield
    except UsageError:
        raise
    except broken_files() as error:
        raise UsageError(f"{what}: {plain_message(error)}") from error
