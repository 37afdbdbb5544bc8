"""Options -> ``transformers.TrainingArguments``: names checked, values converted by the library's own parser."""

import typing
from collections.abc import Mapping
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
_NUMBERS: dict[str, type] = {"int": int, "int | None": int, "float": float, "float | None": float}


def check_trainer_options(arguments: Arguments[Any], known: Mapping[str, str]) -> None:
    """Check the names of the options that are not the scripts' own, and the values of those that are numbers.

    Args:
        arguments: the parsed command line.
        known: fields of ``TrainingArguments`` and their annotations; empty: nothing is known, nothing is checked.

    Raises:
        UsageError: for an option that is no field (with the nearest name that is), one that the scripts refuse, or a
            word that is no number.
    """
    own = {field.name for part in (arguments.model, arguments.data, arguments.run) for field in fields(part)}
    for name, given in arguments.trainer.items() if known else ():
        if name not in known:
            hint = did_you_mean(name, {*known, *own}) or "; --help and --help-trainer list the options"
            raise UsageError(f"unknown option {name}{hint}")
        if name in _REFUSED:
            raise UsageError(f"{name} is not used by this script: {_REFUSED[name]}")
        number = _NUMBERS.get(known[name])
        if number is not None and given is not None and len(given) == 1 and given[0].lower() not in _NONE:
            try:
                number(given[0])
            except ValueError:
                raise UsageError(f"argument --{name}: invalid {number.__name__} value: {given[0]!r}") from None


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
