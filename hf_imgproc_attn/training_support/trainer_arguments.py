"""Options -> ``transformers.TrainingArguments``: names checked, values converted by the library's own parser."""

import math
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from hf_imgproc_attn.errors import UsageError, did_you_mean, plain_message
from hf_imgproc_attn.training_support.arguments import Arguments

if TYPE_CHECKING:
    from transformers import TrainingArguments

_REFUSED = {
    "resume_from_checkpoint": "use --resume, which picks the newest complete checkpoint of output_dir",
    "do_train": "the script always trains",
    "do_eval": "use --eval_strategy",
    "do_predict": "the test split is evaluated at the end where there is one",
    "hub_strategy": "a run is published once, when it is finished",
    "hub_always_push": "a run is published once, when it is finished",
    "hub_token": "a secret comes from `hf auth login` or the environment variable HF_TOKEN only",
}


_NONE = ("none", "null")
_TRUTH = ("yes", "no", "true", "false", "t", "f", "y", "n", "1", "0")
"""What the library's parser reads as a truth value."""
_LARGEST_SEED = 2**32 - 1
# Rule in words, and whether a number follows it; what the library takes without a word, or refuses with a traceback.
_POSITIVE = ("an integer >= 1", lambda value: value >= 1)
_ABOVE_0 = ("a number > 0", lambda value: 0 < value < math.inf)
_FROM_0 = ("a number >= 0", lambda value: 0 <= value < math.inf)
_PART = ("at least 0 and below 1", lambda value: 0 <= value < 1)
_SEED = (f"an integer from 0 to {_LARGEST_SEED}", lambda value: 0 <= value <= _LARGEST_SEED)
_RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), _POSITIVE),
    **dict.fromkeys(("gradient_accumulation_steps", "save_total_limit", "eval_accumulation_steps"), _POSITIVE),
    **dict.fromkeys(("num_train_epochs", "logging_steps", "eval_steps", "save_steps"), _ABOVE_0),
    **dict.fromkeys(("learning_rate", "weight_decay", "warmup_steps", "max_grad_norm", "adam_epsilon"), _FROM_0),
    **dict.fromkeys(("dataloader_num_workers", "eval_delay"), _FROM_0),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "label_smoothing_factor"), _PART),
    **dict.fromkeys(("seed", "data_seed"), _SEED),
    "max_steps": ("-1 or an integer >= 1", lambda value: value == -1 or value >= 1),
}
_NUMBERS: dict[str, type] = {"int": int, "int | None": int, "float": float, "float | None": float}


def check_trainer_options(arguments: Arguments[Any], known: Mapping[str, str]) -> None:
    """Check the names of the options that are not the scripts' own, and the values of those that are numbers
    or truth values.

    Args:
        arguments: the parsed command line.
        known: fields of ``TrainingArguments`` and their annotations; empty: nothing is known, nothing is checked.

    Raises:
        UsageError: for an option that is no field (with the nearest name that is), one that the scripts refuse, a
            word that is no number or no truth value where one is due, or a number out of its range.
    """
    own = {field.name for part in (arguments.model, arguments.data, arguments.run) for field in fields(part)}
    for name, given in arguments.trainer.items() if known else ():
        if name not in known:
            hint = did_you_mean(name, {*known, *own}) or "; --help and --help-trainer list the options"
            raise UsageError(f"unknown option {name}{hint}")
        if name in _REFUSED:
            raise UsageError(f"{name} is not used by this script: {_REFUSED[name]}")
        if given is not None:
            _check_words(name, given, known[name])


def _check_words(name: str, given: Sequence[str], annotation: str) -> None:
    """Check the words of an option that is a number or a truth value; the library knows the rest."""
    number = _NUMBERS.get(annotation)
    if number is None and annotation != "bool":
        return
    if len(given) > 1 or (number is not None and not given):
        raise UsageError(f"argument --{name}: expected one value, got {' '.join(given) or 'none'}")
    word = given[0].lower() if given else "true"  # --use_cpu alone says yes
    if annotation == "bool" and word not in (*_TRUTH, *_NONE):
        raise UsageError(f"argument --{name}: must be true or false, got {given[0]!r}")
    if number is not None and word not in _NONE:
        try:
            value = number(word)
        except ValueError:
            raise UsageError(f"argument --{name}: invalid {number.__name__} value: {given[0]!r}") from None
        _check_range(name, value)


def _check_range(name: str, value: float) -> None:
    rule, is_kept = _RANGES.get(name, ("", lambda value: True))
    if not is_kept(value):
        raise UsageError(f"{name} must be {rule}, got {value}")


def build_training_arguments(
    arguments: Arguments[Any], defaults: dict[str, Any], output_dir: str
) -> "TrainingArguments":
    """Build the ``TrainingArguments`` of a run.

    Args:
        arguments: the parsed command line.
        defaults: values for fields that the user did not set.
        output_dir: folder of the run.

    Raises:
        UsageError: for an option that is no field (with the nearest name that is), or a value that is refused.
    """
    from transformers import HfArgumentParser, TrainingArguments

    class Parser(HfArgumentParser):
        def error(self, message: str) -> typing.NoReturn:
            raise UsageError(message)

    check_trainer_options(arguments, {field.name: "" for field in fields(TrainingArguments) if field.init})
    hints = typing.get_type_hints(TrainingArguments)
    words: list[str] = []
    values: dict[str, Any] = {}
    for name, given in arguments.trainer.items():
        if given is None or (len(given) == 1 and given[0].lower() in _NONE and name != "report_to"):
            if type(None) not in typing.get_args(hints[name]):
                raise UsageError(f"{name} must have a value, got none")
            values[name] = None
        else:
            words += [f"--{name}={given[0]}"] if len(given) == 1 else [f"--{name}", *given]
    parser = Parser(TrainingArguments, allow_abbrev=False)
    namespace, rest = parser.parse_known_args(words)
    if rest:
        raise UsageError(f"unexpected argument {rest[0]!r}: options are given as --name value")
    values |= {name: getattr(namespace, name) for name in arguments.trainer if name not in values}
    try:
        return TrainingArguments(**{**defaults, **values, "output_dir": output_dir})
    except (TypeError, ValueError, ImportError) as error:
        raise UsageError(plain_message(error)) from error
