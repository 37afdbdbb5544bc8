"""Options -> ``transformers.TrainingArguments``: names checked, values converted by the library's own parser."""

import difflib
import typing
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from hf_imgproc_attn.errors import UsageError
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

    known = {field.name for field in fields(TrainingArguments) if field.init}
    own = {field.name for part in (arguments.model, arguments.data, arguments.run) for field in fields(part)}
    hints = typing.get_type_hints(TrainingArguments)
    words: list[str] = []
    values: dict[str, Any] = {}
    for name, given in arguments.trainer.items():
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known | own), n=1, cutoff=0.6)
            hint = f"; did you mean {near[0]}?" if near else "; --help and --help-trainer list the options"
            raise UsageError(f"unknown option {name}{hint}")
        if name in _REFUSED:
            raise UsageError(f"{name} is not used by this script: {_REFUSED[name]}")
        if given is None or (len(given) == 1 and given[0].lower() in ("none", "null") and name != "report_to"):
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
        raise UsageError(" ".join(str(error).split())) from error
