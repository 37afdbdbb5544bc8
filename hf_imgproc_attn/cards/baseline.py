"""The run that a model card shows beside its own: whether it is of the same recipe, and where it still differs."""

from __future__ import annotations

import re
from typing import Any

from ..errors import UsageError
from ..models.spec_fields import FILTER_FIELDS

# Where a run is kept and computed, which is no part of its recipe.
_OF_THE_FILTER = ("preset", "boosted_layers", "filter_stacks", "peft_filter")
"""Options of the model that say which filter it has and where, as overrides of filter fields do: what a baseline is
compared in, and without a filter cannot have."""

_PLACES = re.compile(r"output_dir|run_name|use_cpu|push_to_hub|hub_\w+")


def check_same_recipe(record: dict[str, Any], other: dict[str, Any]) -> None:
    """Refuse a baseline that differs in anything but its filter and where it is kept.

    Raises:
        UsageError: names the first difference.
    """
    own_parts, other_parts = _recipe(record), _recipe(other)
    for part, own in own_parts.items():
        theirs = other_parts[part]
        for name in dict.fromkeys([*own, *theirs]):
            # An option that is off and one that a record of an earlier version lacks are the same.
            is_off = name not in (own.keys() & theirs.keys()) and not (own.get(name) or theirs.get(name))
            if own.get(name) != theirs.get(name) and not is_off and not _PLACES.fullmatch(name):
                raise UsageError(
                    f"the baseline must be a run of the same recipe, but its {part}{name} is {theirs.get(name)!r} "
                    f"instead of {own.get(name)!r}"
                )


def environment_differences(record: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """What of the baseline's versions, source and device differs, in words."""
    own, theirs = _environment(record), _environment(other)
    return [
        f"{name} {theirs.get(name)} instead of {own.get(name)}"
        for name in dict.fromkeys([*own, *theirs])
        if own.get(name) != theirs.get(name)
    ]


def _recipe(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    arguments = record["arguments"]
    return {
        "": {name: record.get(name) for name in ("task", "seed", "steps", "local_paths")},
        "model option ": _without_filter(arguments["model"]),
        "data option ": arguments["data"],
        "trainer option ": arguments["trainer"],
        "fingerprint of split ": record.get("data_fingerprint", {}),
    }


def _without_filter(options: dict[str, Any]) -> dict[str, Any]:
    """The model options of a run but for those of its filter."""
    kept = {name: value for name, value in options.items() if name not in _OF_THE_FILTER}
    if isinstance(kept.get("config_overrides"), list):
        overrides = kept["config_overrides"]
        kept["config_overrides"] = [
            word for word in overrides if str(word).partition("=")[0].strip() not in FILTER_FIELDS
        ]
    return kept


def _environment(record: dict[str, Any]) -> dict[str, Any]:
    device = {f"device {name}": value for name, value in record.get("device", {}).items()}
    return {**record.get("versions", {}), "git revision": (record.get("git") or {}).get("revision"), **device}
