"""Training adapters instead of weights, by the library PEFT: what they are put on, and what is saved of them."""

import warnings
from pathlib import Path
from typing import Any

from hf_imgproc_attn import records
from hf_imgproc_attn.backbones import TASKS
from hf_imgproc_attn.errors import UsageError, plain_message, require_extras
from hf_imgproc_attn.training_support.arguments import LORA_RANK, ModelArguments

BASE_FOLDER = "base"
"""Of a run's folder: the model that the adapters belong to, with its filter."""


def check_adapters(args: ModelArguments, training_args: Any) -> None:
    """Refuse what adapters cannot be trained with, before data are loaded.

    Args:
        args: the model options.
        training_args: the ``TrainingArguments`` of the run.

    Raises:
        UsageError: if PEFT is not installed, there is no checkpoint to adapt, or the adapters cannot be merged.
    """
    if args.peft is None:
        return
    require_extras("peft")
    if args.model_name_or_path is None:
        raise UsageError(f"model_name_or_path must be given with peft {args.peft}: adapters adapt a trained model")
    if args.peft_merge and training_args.fsdp:
        raise UsageError("peft_merge must be off with fsdp, which shards the weights: merge the saved adapter later")


def with_adapters(run: Any, model: Any) -> Any:
    """The model that is trained: the given one, or, where the run asks for adapters, that with them.

    The model below the adapters is saved in the run's folder first, since a stock checkpoint would lack the filter.

    Args:
        run: from ``begin_run``.
        model: the model as it starts.

    Raises:
        UsageError: if the model has no module for an adapter.
    """
    args: ModelArguments = run.arguments.model
    if args.peft is None:
        return model
    import peft
    from transformers.pytorch_utils import Conv1D

    if args.peft_filter and not _numbers_of_the_filter(model):
        raise UsageError(
            "peft_filter must be off for a filter without numbers of its own, got true: what is to be trained is in a "
            "preset such as learned_twicing"
        )
    base = Path(run.training_args.output_dir) / BASE_FOLDER
    if not args.peft_merge and run.training_args.process_index == 0 and not (base / "config.json").is_file():
        records.write_record(run.training_args.output_dir, run.record)  # the folder is this run's from here on
        model.save_pretrained(base)
    targets = args.peft_targets
    rank = args.peft_rank or LORA_RANK
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=2 * rank if args.peft_alpha is None else args.peft_alpha,  # type: ignore[arg-type]
        lora_dropout=args.peft_dropout or 0.0,
        target_modules=targets if targets in (None, "all-linear") else targets.split(","),
        modules_to_save=[*_numbers_of_the_filter(model, args.peft_filter), *_new_heads(run, model)] or None,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        task_type="CAUSAL_LM" if model.can_generate() else None,
    )
    checkpointing = run.training_args.gradient_checkpointing_kwargs or {}
    if run.training_args.gradient_checkpointing and checkpointing.get("use_reentrant"):
        model.enable_input_require_grads()
    try:
        with warnings.catch_warnings():
            # PEFT asks Transformers by a name that the newest versions call deprecated.
            warnings.filterwarnings("ignore", ".*gradient_checkpointing.* is deprecated", FutureWarning)
            adapted: Any = peft.get_peft_model(model, config)
    except ValueError as error:
        raise UsageError(f"peft_targets: {plain_message(error)}") from error
    below = args.model_name_or_path if args.peft_merge else str(base.resolve())
    adapted.peft_config["default"].base_model_name_or_path = below
    return adapted


def merged(model: Any) -> Any:
    """The model with its adapters in the weights, as a model without any."""
    return model.merge_and_unload()


def base_model(model: Any) -> Any:
    """The model below the adapters, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _numbers_of_the_filter(model: Any, wanted: bool | None = None) -> list[str]:
    """Names of the modules that hold the filter's own numbers; empty where there are none or they are not wanted."""
    from hf_imgproc_attn.models.any_attention import PART

    if wanted is False:
        return []
    names = [name for name, _ in model.named_parameters() if ".scalar_bias." in name]
    if not names:
        return []
    return [PART] if any(f".{PART}." in name for name in names) else ["scalar_bias"]


def _new_heads(run: Any, model: Any) -> list[str]:
    """The head of a classifier, which may be new and is trained as it is."""
    if TASKS[run.record["task"]].auto_class == "AutoModelForCausalLM":
        return []
    heads = [name for name, child in model.named_children() if name != model.base_model_prefix]
    return [name for name in heads if any(True for _ in model.get_submodule(name).parameters())]
