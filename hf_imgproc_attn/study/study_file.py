"""A study's YAML file, checked: every mistake is one line that names the field, the rule and what was got."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..backbones import TASKS
from ..errors import UsageError, did_you_mean
from ..models.spec_fields import PRESETS
from ..shipped_files import shipped_file
from ..yaml_files import read_yaml_mapping
from .measurements import check_settings
from .plan import Match, Study, StudyTask, Variant, check_runs, meaning, place_data

MEASURES = ("parameters", "compute")
SPLITS = ("test", "validation")
_FIELDS = ("name", "version", "baseline", "seeds", "variants", "matched", "tasks", "split", "keep_models")
_MOST_SEEDS = 10_000
_OF_TRAINING = (
    "learning_rate", "weight_decay", "warmup_steps", "lr_scheduler_type", "num_train_epochs", "max_steps",
    "max_grad_norm", "adam_beta1", "adam_beta2", "adam_epsilon", "optim",
)  # fmt: skip
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_]*")
# What the study says itself, or what has no place in one.
_NOT_OPTIONS = {
    "preset": "variants says it",
    "seed": "seeds says it",
    "data_seed": "seeds says it",
    "output_dir": "the ledger says it",
    "resume": "a study always goes on",
    "config": "recipe says it",
    "push_to_hub": "the models of a study are not published",
    "evaluate_test": "split says it",
    "paired_start": "it is always on",
    "stop_diverged": "it is always on",
    "on_nan_loss": "stop_diverged is always on",
    "prepare_only": "a study trains",
    "model_name_or_path": "a study trains new models",
}


def read_study(path: str | Path, places: Sequence[str] = ()) -> Study:
    """Read and check the file of a study.

    Args:
        path: the YAML file.
        places: where data lie on this machine, as in :func:`.plan.place_data`.

    Raises:
        UsageError: for a file that cannot be read, an unknown or missing field, a wrong value, an unknown preset or
            option, an empty list, or two equal runs.
    """
    content = read_yaml_mapping(Path(path), "study")
    try:
        study = _study(content, Path(path).parent)
        study = place_data(study, places)
        check_runs(study)
    except UsageError as error:
        raise UsageError(f"study {str(path)!r}: {error}") from error
    return study


def _study(content: dict[str, Any], folder: Path) -> Study:
    _known(content, _FIELDS, "field")
    for required in ("name", "variants", "tasks", "seeds"):
        _check(required in content, f"{required} must be given")
    version = content.get("version", 1)
    _check(_is_integer(version, 1), f"version must be an integer >= 1, got {version!r}")
    variants = _variants(content["variants"])
    names = [variant.name for variant in variants]
    baseline = content.get("baseline", "softmax")
    _check(baseline in names, f"baseline must be one of the variants ({', '.join(names)}), got {baseline!r}")
    matched = _matched(_given(content, "matched", []), names)
    split, keep = content.get("split", "test"), content.get("keep_models", False)
    _check(split in SPLITS, f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    _check(isinstance(keep, bool), f"keep_models must be true or false, got {keep!r}")
    return Study(
        name=_name(content["name"], "name"),
        version=version,
        baseline=baseline,
        seeds=_seeds(content["seeds"]),
        variants=variants,
        matched=matched,
        tasks=_tasks(content["tasks"], folder, split),
        split=split,
        keep_models=keep,
    )


def _seeds(value: Any) -> tuple[int, ...]:
    rule = f"seeds must be a number of seeds from 1 to {_MOST_SEEDS:,} or a list of different integers >= 0"
    if _is_integer(value, 1):
        _check(value <= _MOST_SEEDS, f"{rule}, got {value!r}")
        return tuple(range(value))
    _check(
        isinstance(value, list) and bool(value) and all(_is_integer(seed, 0) for seed in value),
        f"{rule}, got {value!r}",
    )
    _check(len(set(value)) == len(value), f"{rule}, got {value!r}: two runs would be equal")
    return tuple(value)


def _variants(value: Any) -> tuple[Variant, ...]:
    _check(isinstance(value, list) and bool(value), f"variants must be a list that is not empty, got {value!r}")
    variants = [_variant(entry) for entry in value]
    for index, variant in enumerate(variants):
        for other in variants[:index]:
            _check(other.name != variant.name, f"variants must have different names, got {variant.name!r} twice")
            same = replace(other, name=variant.name) == variant
            _check(not same, f"variants {other.name!r} and {variant.name!r} are equal: their runs would be the same")
    return tuple(variants)


def _variant(entry: Any) -> Variant:
    if isinstance(entry, str):
        entry = {"name": entry, "preset": entry}
    _check(isinstance(entry, dict), f"a variant must be the name of a preset or a mapping, got {entry!r}")
    _known(entry, ("name", "preset", "fields", "options"), "field of a variant")
    preset, fields, options = entry.get("preset"), _given(entry, "fields", {}), _given(entry, "options", {})
    which = "preset" + (f" of variant {entry['name']}" if "name" in entry and entry["name"] != preset else "")
    _check(
        preset is not None,
        f"{which} must be given: softmax for stock attention with the variant's own fields, or the preset that they "
        "change",
    )
    hint = did_you_mean(str(preset), PRESETS)
    _check(
        isinstance(preset, str) and preset in PRESETS,
        f"{which} must be one of {', '.join(PRESETS)}, got {preset!r}{hint}",
    )
    _check(isinstance(fields, dict), f"fields of a variant must be a mapping, got {fields!r}")
    name = _name(entry.get("name", preset), "name of a variant")
    _check(isinstance(options, dict), f"options of variant {name} must be a mapping, got {options!r}")
    _known(options, _OF_TRAINING, f"option of variant {name}")
    return Variant(name, str(preset), dict(fields), dict(options))


def _matched(value: Any, names: list[str]) -> tuple[Match, ...]:
    _check(isinstance(value, list), f"matched must be a list, got {value!r}")
    matches: list[Match] = []
    for entry in value:
        _check(isinstance(entry, dict), f"an entry of matched must be a mapping, got {entry!r}")
        _known(entry, ("name", "like", "in"), "field of matched")
        name = _name(entry.get("name"), "name of a matched baseline")
        taken = [*names, *(match.name for match in matches)]
        _check(name not in taken, f"names of matched baselines must be new, got {name!r}")
        like, measure = entry.get("like"), entry.get("in")
        _check(like in names, f"like must name one of the variants ({', '.join(names)}), got {like!r}")
        _check(measure in MEASURES, f"in must be one of {', '.join(MEASURES)}, got {measure!r}")
        _check(
            all((match.like, match.measure) != (like, measure) for match in matches),
            f"two matched baselines are equal: like {like} in {measure}",
        )
        matches.append(Match(name, str(like), str(measure)))
    return tuple(matches)


def _tasks(value: Any, folder: Path, split: str) -> tuple[StudyTask, ...]:
    _check(isinstance(value, dict) and bool(value), f"tasks must be a mapping that is not empty, got {value!r}")
    tasks = [_task(name, entry, folder, split) for name, entry in value.items()]
    for index, task in enumerate(tasks):
        for other in tasks[:index]:
            _check(
                not _is_same(task, other),
                f"tasks {other.name} and {task.name} are equal: their runs would be the same",
            )
    return tuple(tasks)


def _is_same(one: StudyTask, other: StudyTask) -> bool:
    """Whether two tasks mean the same, however their options are written (``3`` or ``"3"``)."""
    stock = Variant("softmax", "softmax")
    words = [meaning(task.words(stock, 0)) for task in (one, other)]
    return (one.kind, one.measure) == (other.kind, other.measure) and words[0] == words[1]


def _task(name: Any, entry: Any, folder: Path, split: str) -> StudyTask:
    name = _name(name, "name of a task")
    _check(isinstance(entry, dict), f"task {name} must be a mapping, got {entry!r}")
    _known(entry, ("task", "recipe", "options", "measure"), f"field of task {name}")
    kind = entry.get("task")
    _check(isinstance(kind, str) and kind in TASKS, f"task of {name} must be one of {', '.join(TASKS)}, got {kind!r}")
    recipe = _recipe(entry["recipe"], folder, name) if "recipe" in entry else {}
    given = _given(entry, "options", {})
    _check(isinstance(given, dict), f"options of task {name} must be a mapping, got {given!r}")
    for option in given:
        _check(
            option not in _NOT_OPTIONS, f"options of task {name} must not have {option}: {_NOT_OPTIONS.get(option)}"
        )
    overrides = {**_overrides(recipe, name), **_overrides(given, name)}
    options = {**{key: item for key, item in recipe.items() if key not in _NOT_OPTIONS}, **given}
    options = {key: item for key, item in options.items() if key != "config_overrides"}
    options |= {"config_overrides": overrides} if overrides else {}
    measure = check_settings(_given(entry, "measure", {}), TASKS[str(kind)], name)
    return StudyTask(name, TASKS[str(kind)], options, measure)


def _overrides(options: dict[str, Any], name: str) -> dict[str, Any]:
    overrides = _given(options, "config_overrides", {})
    _check(isinstance(overrides, dict), f"config_overrides of task {name} must be a mapping, got {overrides!r}")
    return dict(overrides)


def _recipe(value: Any, folder: Path, name: str) -> dict[str, Any]:
    """A recipe beside the study, or one of the package's own."""
    _check(isinstance(value, str), f"recipe of task {name} must be a file, got {value!r}")
    path = folder / value
    if not path.is_file():
        try:
            path = shipped_file(f"training/configs/{value}")
        except FileNotFoundError:
            raise UsageError(
                f"recipe of task {name} must be a file beside the study or one of the package's recipes, got {value!r}"
            ) from None
    return read_yaml_mapping(path, f"recipe of task {name}")


def _name(value: Any, what: str) -> str:
    rule = f"{what} must consist of letters, digits and _, got {value!r}"
    _check(isinstance(value, str) and _NAME.fullmatch(value) is not None, rule)
    return str(value)


def _known(content: dict[Any, Any], fields: Sequence[str], what: str) -> None:
    for name in content:
        if name not in fields:
            hint = did_you_mean(str(name), fields)
            raise UsageError(f"unknown {what} {name!r}: it must be one of {', '.join(fields)}{hint}")


def _given(content: dict[str, Any], name: str, default: Any) -> Any:
    """A field's value; the default where it is left out or has none."""
    value = content.get(name)
    return default if value is None else value


def _is_integer(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise UsageError(message)
