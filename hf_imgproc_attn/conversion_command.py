"""The command ``convert`` of ``imgproc-attn``; torch and the library are imported when it runs."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .backbones import OF_MODEL_TYPE, in_words
from .errors import UsageError, did_you_mean, plain_message, refuse_missing_path
from .library_fields import configuration_fields
from .output_paths import check_output_folder


def add_command(commands: Any) -> None:
    """Add the sub-command to ``commands``, the result of ``add_subparsers``."""
    convert = commands.add_parser(
        "convert",
        help=f"turn a stock {in_words('or')} checkpoint into a variant, or put a filter into any other model",
        description=f"Turn a stock {in_words('or')} checkpoint into a variant and account for every tensor. A model "
        "of any other type keeps its class and gets the filter into its layers.",
    )
    convert.add_argument("source", help="a folder or a Hub name")
    convert.add_argument("--preset", required=True, help="the variant (imgproc-attn presets lists them)")
    convert.add_argument("--output", required=True, metavar="DIR", help="a new or empty folder")
    convert.add_argument(
        "--layers",
        metavar="N,N",
        help="the layers that are filtered, counted from either end, such as -2,-1 (of a variant: that are boosted; "
        "default: all)",
    )
    convert.add_argument(
        "--stacks",
        metavar="NAME,NAME",
        help="of a model that keeps its class: the stacks of layers, such as model.decoder.layers (default: all)",
    )
    convert.add_argument(
        "--filtered",
        action="store_true",
        help=f"keep the stock class of a {in_words('or')} checkpoint as well; with --preset softmax a variant gets it "
        "back",
    )
    convert.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="a further configuration field, the value in JSON (may be repeated)",
    )
    convert.set_defaults(run_command=run_convert)


def run_convert(options: argparse.Namespace) -> int:
    """``imgproc-attn convert``: convert, save with the source's tokenizer or image processor, print the report."""
    from .models.spec_fields import preset_fields

    fields = _parse_fields(options.set)
    refuse_missing_path("source", options.source)
    try:
        preset_fields(options.preset)  # before the seconds that importing torch takes
    except ValueError as error:
        raise UsageError(str(error)) from error
    _check_field_names(fields)
    layers, stacks = _parse_layers(options.layers), options.stacks.split(",") if options.stacks else None
    output = check_output_folder(options.output)

    from huggingface_hub.errors import StrictDataclassError

    from .conversion import convert_checkpoint
    from .conversion_any import becomes_filtered

    found = set(output.iterdir()) if output.is_dir() else None
    try:
        filtered = becomes_filtered(options.source, options.filtered or None, options.preset)
        if layers is not None:
            fields["layers" if filtered else "boosted_layers"] = layers
        if stacks is not None and not filtered:
            raise ValueError(f"stacks are chosen in a model that keeps its class (--filtered), got {options.stacks!r}")
        fields |= {} if stacks is None else {"stacks": stacks}
        kept = filtered or options.filtered  # the stock class, which a model of ours may get back
        report = convert_checkpoint(options.source, options.preset, options.output, filtered=kept, **fields)
    except BaseException as error:
        _remove_new(output, found)  # half a checkpoint would be taken for a whole one, and be in the way
        if not isinstance(error, ValueError | OSError | StrictDataclassError):
            raise
        raise UsageError(plain_message(error)) from error
    print(report)
    print(f"saved to {options.output}")
    return 0


def _remove_new(folder: Path, found: set[Path] | None) -> None:
    """Remove what a command that failed has left in a folder; ``found``: what was there before, None: not even it."""
    if found is None:
        shutil.rmtree(folder, ignore_errors=True)
        return
    for path in set(folder.iterdir()) - found:
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _parse_fields(assignments: Sequence[str]) -> dict[str, Any]:
    """``["a=1", "b=gaussian"]`` to ``{"a": 1, "b": "gaussian"}``: JSON where it is JSON, else a string."""
    fields: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or not name.isidentifier():
            raise UsageError(f"--set must be FIELD=VALUE, got {assignment!r}")
        if name in fields:
            raise UsageError(f"--set names {name} twice")
        try:
            fields[name] = json.loads(text)
        except json.JSONDecodeError:
            fields[name] = text
    return fields


def _parse_layers(text: str | None) -> list[int] | None:
    """``"-2,-1"`` to ``[-2, -1]``."""
    if text is None:
        return None
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise UsageError(f"--layers must be integers with commas between them, such as -2,-1, got {text!r}") from None


def _check_field_names(names: Iterable[str]) -> None:
    """Refuse names that no configuration of ours has: Transformers would store them and nobody would read them."""
    known = set().union(*map(configuration_fields, OF_MODEL_TYPE))
    known |= {"num_special_tokens"} if known else set()
    for name in names:
        if known and name not in known:
            raise UsageError(f"--set must name a configuration field, got {name!r}{did_you_mean(name, known)}")
