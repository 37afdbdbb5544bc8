"""Training models of any other type: the stock class, with the filter of the preset in its layers."""

from typing import Any

from hf_imgproc_attn.backbones import OF_MODEL_TYPE, TASKS
from hf_imgproc_attn.errors import UsageError
from hf_imgproc_attn.models.spec_fields import FILTER_FIELDS, PRESETS
from hf_imgproc_attn.training_support.arguments import ModelArguments


def check_type(args: ModelArguments, found: Any, model_type: str) -> None:
    """Refuse a checkpoint that the task of a training script cannot be taught.

    Args:
        args: the model options.
        found: configuration of the checkpoint.
        model_type: the one of ours that the script trains.

    Raises:
        UsageError: naming the checkpoint and its type.
    """
    from hf_imgproc_attn.filtered import knows

    row = OF_MODEL_TYPE[model_type]
    auto_class = row.tasks[0].auto_class
    if found.model_type in (model_type, row.name):
        if args.filter_stacks is not None:
            raise UsageError(
                f"filter_stacks is for models that keep their stock class, got {args.filter_stacks!r} with one of "
                f"type {found.model_type}"
            )
        return
    if found.model_type in OF_MODEL_TYPE or not knows(auto_class, found):
        raise UsageError(
            f"model_name_or_path must be a checkpoint of type {model_type} or {row.name}, or of another that "
            f"{auto_class} loads, got {args.model_name_or_path!r} of type {found.model_type}"
        )
    _filter_arguments(args, found, {})


def is_own(found: Any, model_type: str) -> bool:
    """Whether a checkpoint is of the backbone that a script trains, stock or ours."""
    return found.model_type in (model_type, OF_MODEL_TYPE[model_type].name)


def check_foreign(task: str, args: ModelArguments, found: Any, overrides: dict[str, Any]) -> Any:
    """Put the filter into a model without weights, so that a filter it cannot have is refused at once.

    Args:
        task: a key of ``TASKS``.
        args: the model options.
        found: configuration of the checkpoint.
        overrides: fields of the filter.

    Returns:
        The model, or None where it could not be built, or has or needs no other filter.

    Raises:
        UsageError: for options that do not belong to such a model.
        ValueError: for a filter that the model cannot have.
    """
    import copy

    import torch
    import transformers

    from hf_imgproc_attn import apply_filter

    arguments = _filter_arguments(args, found, overrides)
    if arguments is None:
        return None
    with torch.device("meta"):
        try:
            model = getattr(transformers, TASKS[task].auto_class).from_config(copy.deepcopy(found))
        except Exception:  # some models cannot be built without memory: loading the weights will tell
            return None
        return apply_filter(model, **arguments)


def start_foreign(
    task: str, args: ModelArguments, found: Any, overrides: dict[str, Any], labels: dict[str, Any]
) -> Any:
    """Load a checkpoint of another type and put the filter into it. Only a classification head may be new.

    Args:
        task: a key of ``TASKS``.
        args: the model options.
        found: configuration of the checkpoint.
        overrides: fields of the filter.
        labels: of a classifier, else empty.

    Raises:
        UsageError: for options that do not belong to such a model, or tensors that are missing.
        ValueError: for a filter that the model cannot have.
    """
    import torch
    import transformers

    from hf_imgproc_attn import apply_filter
    from hf_imgproc_attn.models.modeling_imgproc_filtered import auto_map

    arguments = _filter_arguments(args, found, overrides)
    model, info = getattr(transformers, TASKS[task].auto_class).from_pretrained(
        args.model_name_or_path,
        **labels,
        # Single precision whatever the file holds: the optimiser needs it; bf16 and fp16 are options of the Trainer.
        dtype=torch.float32,
        output_loading_info=True,
        ignore_mismatched_sizes=bool(labels),
    )
    _check_loaded(str(args.model_name_or_path), model, info, may_have_new_head=bool(labels))
    if arguments is not None:
        apply_filter(model, **arguments)
        auto_map(model)  # what could not be saved is refused before the training
    return model


def _filter_arguments(args: ModelArguments, found: Any, overrides: dict[str, Any]) -> dict[str, Any] | None:
    """What ``apply_filter`` is called with; None for a model that has its filter, or shall have none.

    Raises:
        UsageError: for a checkpoint that has another filter, no preset, or fields that are none of the filter.
    """
    from hf_imgproc_attn.models.configuration_imgproc_filtered import FILTERED_MODEL_TYPE

    for name in overrides:
        if name not in FILTER_FIELDS:
            raise UsageError(
                f"config_overrides must be fields of the filter for a model of type {found.model_type}, got {name!r}"
            )
    fields = dict(overrides)
    layers = fields.pop("boosted_layers", None)
    given = {
        **fields,
        **({} if layers is None else {"layers": layers}),
        **({} if args.filter_stacks is None else {"stacks": args.filter_stacks.split(",")}),
    }
    if found.model_type == FILTERED_MODEL_TYPE:
        _check_same_filter(args, found, given)
        return None
    if args.preset is None and not fields and not args.config_overrides:
        raise UsageError(
            f"preset must be given for a model of type {found.model_type}, which has no filter yet: --preset softmax "
            "trains it as it is"
        )
    if args.preset in (None, "softmax") and not given and not args.config_overrides:
        return None
    return {"preset": args.preset, **given}


def _check_same_filter(args: ModelArguments, found: Any, given: dict[str, Any]) -> None:
    """A filter given with a filtered checkpoint must be its own: training replaces none."""
    from hf_imgproc_attn.filtered import filter_fields

    has = {**found.filter_arguments, **filter_fields(found.filter_arguments)}
    axes = {} if args.preset is None else dict.fromkeys(name for fields in PRESETS.values() for name in fields)
    defaults = filter_fields({})
    wanted = {**{name: PRESETS[args.preset or "softmax"].get(name, defaults[name]) for name in axes}, **given}
    for name, value in wanted.items():
        if has.get(name) != value:
            raise UsageError(
                f"the checkpoint {args.model_name_or_path!r} has a filter with {name}={has.get(name)!r}, and not "
                f"{value!r}: without --preset it goes on as it is; `imgproc-attn convert` puts another in its place"
            )


def _check_loaded(name: str, model: Any, info: dict[str, Any], *, may_have_new_head: bool) -> None:
    """Refuse a checkpoint of which anything but the head of a classifier would start at random."""
    body = f"{model.base_model_prefix}."
    keys = {*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])}
    wrong = sorted(key for key in keys if not may_have_new_head or (key.startswith(body) and "pooler." not in key))
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise UsageError(
            f"model_name_or_path {name!r} does not fit the configuration: missing or of another shape are "
            f"{', '.join(wrong[:5])}{more}"
        )
