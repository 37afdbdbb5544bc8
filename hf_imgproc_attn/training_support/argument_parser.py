"""Command line and YAML file -> :class:`~hf_imgproc_attn.training_support.arguments.Arguments`.

The scripts' own options are parsed here; everything else is kept as words and must name a field of
``transformers.TrainingArguments``. What is misspelt is found here, before the seconds that importing the library
takes; the library itself converts and checks the values once a run starts (:mod:`.trainer_arguments`).
"""

import argparse
import dataclasses
import json
import sys
import types
import typing
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from hf_imgproc_attn.errors import OneLineParser, UsageError, did_you_mean, refuse_missing_path, with_values_joined
from hf_imgproc_attn.library_fields import configuration_fields, training_fields
from hf_imgproc_attn.training_support.arguments import (
    EXPLAINED_TRAINER_DEFAULTS,
    LOCAL_OR_HUB,
    Arguments,
    DataT,
    ModelArguments,
    RunArguments,
)
from hf_imgproc_attn.training_support.trainer_arguments import check_trainer_options
from hf_imgproc_attn.yaml_files import read_yaml_mapping

_LISTS_OF_NUMBERS = ("boosted_layers",)
"""Options whose value is one word with commas, in a YAML file a list."""
_TRUE, _FALSE, _NONE = ("true", "yes", "1"), ("false", "no", "0"), ("none", "null")


def parse_arguments(
    argv: Sequence[str] | None, data_class: type[DataT], trainer_defaults: dict[str, Any], description: str
) -> Arguments[DataT]:
    """Read the command line, and the YAML file that ``--config`` names; the command line overrides the file.

    Args:
        argv: the words after the script's name; None for those of this process.
        data_class: the dataclass of the data options.
        trainer_defaults: the script's defaults for fields of ``TrainingArguments``, shown by ``--help``.
        description: first paragraph of ``--help``.

    Raises:
        UsageError: for an unknown option, a wrong value, an unreadable file or a word that belongs to no option.
    """
    words = [_underscores(word) for word in (sys.argv[1:] if argv is None else argv)]
    words = with_values_joined(words, [f"--{name}" for name in _LISTS_OF_NUMBERS])
    groups: dict[str, type[Any]] = {"model": ModelArguments, "data": data_class, "run": RunArguments}
    parser = _build_parser(groups, trainer_defaults, description)
    if "--help_trainer" in words:
        print_trainer_help()
        raise SystemExit(0)
    config = parser.parse_known_args(words)[0].config
    own_names = {field.name for group in groups.values() for field in dataclasses.fields(group)}
    file_words, trainer = ([], {}) if config is None else _read_yaml(Path(config), own_names)
    namespace, rest = parser.parse_known_args([*file_words, *words])
    trainer.update(_pairs(rest))
    parts = {
        name: group(**{field.name: getattr(namespace, field.name) for field in dataclasses.fields(group)})
        for name, group in groups.items()
    }
    arguments: Arguments[DataT] = Arguments(trainer=trainer, argv=words, **parts)
    check_trainer_options(arguments, training_fields())
    known = configuration_fields(data_class.model_type)
    if known:
        check_override_names(arguments.model.config_overrides, known)
    for name in LOCAL_OR_HUB:
        value = getattr(arguments.model, name, None) or getattr(arguments.data, name, None)
        refuse_missing_path(name, value)
    return arguments


def check_override_names(words: Sequence[str], known: Collection[str]) -> None:
    """Check that every word is ``key=value`` with the name of a configuration field.

    Args:
        words: of ``config_overrides``.
        known: the names there are.

    Raises:
        UsageError: names the word, and the nearest field.
    """
    for word in words:
        key, separator, _ = word.partition("=")
        if not separator:
            raise UsageError(f"config_overrides must be key=value, got {word!r}")
        if key not in known:
            hint = did_you_mean(key, known)
            raise UsageError(f"config_overrides must name fields of the model's configuration, got {key!r}{hint}")


def command_words(arguments: Arguments[Any]) -> list[str]:
    """The options of a run as one command line that needs no YAML file, without those at their defaults.

    ``--config`` is left out, since what it says stands here, and so is ``--resume``.
    """
    words: list[str] = []
    for part in (arguments.model, arguments.data, arguments.run):
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            if field.name not in ("config", "resume") and value not in (field.default, []):
                values = value if isinstance(value, list) else [value]
                words += _option_words(field.name, ["none" if item is None else _word(item) for item in values])
    for name, given in arguments.trainer.items():
        words += _option_words(name, ["none"] if given is None else given)
    return words


def print_trainer_help() -> None:
    """Print every field of ``transformers.TrainingArguments`` with its type, default and help text."""
    from transformers import TrainingArguments

    for field in dataclasses.fields(TrainingArguments):
        if not field.init:
            continue
        type_name = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type))
        default = None if field.default is dataclasses.MISSING else getattr(field.default, "value", field.default)
        print(f"--{field.name}  ({type_name}, default {default})\n    {field.metadata.get('help', '')}")


def _underscores(word: str) -> str:
    """``--max-steps=1`` -> ``--max_steps=1``."""
    if not word.startswith("--"):
        return word
    name, separator, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + separator + value


def _build_parser(
    groups: dict[str, type[Any]], trainer_defaults: dict[str, Any], description: str
) -> argparse.ArgumentParser:
    changed = ", ".join(f"{name} {value}" for name, value in trainer_defaults.items())
    parser = OneLineParser(
        description=description,
        allow_abbrev=False,
        usage="%(prog)s [--option value ...]",
        epilog="Every field of transformers.TrainingArguments is an option too (--num_train_epochs, --max_steps, "
        "--learning_rate, --seed, --use_cpu ...). Defaults that differ from the library's: "
        f"{changed}, {EXPLAINED_TRAINER_DEFAULTS}.",
    )
    parser.add_argument("--help-trainer", action="store_true", help="list the fields of TrainingArguments and stop")
    for title, group in groups.items():
        section = parser.add_argument_group(title)
        hints = typing.get_type_hints(group)
        for field in dataclasses.fields(group):
            _add_option(section, field, hints[field.name])
    return parser


def _add_option(section: Any, field: "dataclasses.Field[Any]", hint: Any) -> None:
    optional = isinstance(hint, types.UnionType) and type(None) in typing.get_args(hint)
    kind = next(arg for arg in typing.get_args(hint) if arg is not type(None)) if optional else hint
    is_list = typing.get_origin(kind) is list
    default = None if is_list else field.default
    shown = "" if default is None or is_list else f" (default: {default})"
    options: dict[str, Any] = {"help": field.metadata["help"].replace("%", "%%") + shown, "default": default}
    if is_list:
        options |= {"default": [], "nargs": "+", "action": "extend", "type": str, "metavar": "KEY=VALUE"}
    else:
        options |= {"type": _converter(kind, optional), "metavar": kind.__name__}
        if kind is bool:
            options |= {"nargs": "?", "const": True}
    if "choices" in field.metadata:
        options |= {"choices": field.metadata["choices"], "metavar": None}
    section.add_argument(f"--{field.name}", **options)


def _converter(kind: type, optional: bool) -> Callable[[str], Any]:
    rules = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}

    def convert(word: str) -> Any:
        if optional and word.lower() in _NONE:
            return None
        if kind is bool and word.lower() in _TRUE + _FALSE:
            return word.lower() in _TRUE
        try:
            if kind is not bool:
                return kind(word)
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"must be {rules[kind]}{' or none' if optional else ''}, got {word!r}")

    return convert


def _pairs(words: list[str]) -> dict[str, list[str] | None]:
    """``["--a", "1", "--b=2"]`` -> ``{"a": ["1"], "b": ["2"]}``."""
    pairs: dict[str, list[str] | None] = {}
    values: list[str] | None = None
    for word in words:
        if word.startswith("--"):
            name, separator, value = word[2:].partition("=")
            values = [value] if separator else []
            pairs[name] = values
        elif values is None:
            raise UsageError(f"unexpected argument {word!r}: options are given as --name value")
        else:
            values.append(word)
    return pairs


def _read_yaml(path: Path, own_names: set[str]) -> tuple[list[str], dict[str, list[str] | None]]:
    """The options of a YAML file: command-line words for our own, name -> words for the rest."""
    content = read_yaml_mapping(path, "config")
    if not all(isinstance(name, str) for name in content):
        raise UsageError(f"config {str(path)!r} must hold a mapping of option names to values")
    own: list[str] = []
    others: dict[str, list[str] | None] = {}
    for name, value in content.items():
        if name == "config":
            raise UsageError(f"config {str(path)!r} names a further config; a file cannot include another")
        if isinstance(value, dict) and name in own_names:
            value = [f"{key}={json.dumps(item)}" for key, item in value.items()]
        if name in _LISTS_OF_NUMBERS and isinstance(value, list):
            value = ",".join(map(str, value))
        values = None if value is None else [_word(item) for item in (value if isinstance(value, list) else [value])]
        if name not in own_names:
            others[name] = values
        elif values:  # an empty list or a null leaves the default
            own += [f"--{name}={values[0]}"] if not isinstance(value, list) else [f"--{name}", *values]
    return own, others


def _option_words(name: str, values: list[str]) -> list[str]:
    if len(values) == 1 and values[0].startswith("-"):
        return [f"--{name}={values[0]}"]
    return [f"--{name}", *values]


def _word(value: Any) -> str:
    """A YAML value as it would be written on the command line."""
    if isinstance(value, bool | dict):
        return json.dumps(value)
    return str(value)
