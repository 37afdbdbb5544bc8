"""What a study is to run: a YAML file -> :class:`Study`, whose runs are variants x seeds x tasks.

Nothing here imports torch: a mistake in the file is found before the seconds that this takes.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from ..backbone_row import Task
from ..backbones import OF_TASK, TASKS
from ..errors import UsageError
from ..shipped_files import shipped_file

WHERE_DATA_LIE = ("dataset_name", "dataset_config_name", "tokenizer_name")
"""Options that another machine may need otherwise: no part of what a run is. Fingerprints tell whether data differ."""


@dataclass(frozen=True)
class Variant:
    """One model that is compared.

    Attributes:
        name: in tables and files.
        preset: of its attention.
        fields: further fields of its configuration; they win over the preset's and the task's.
        options: of its training, such as a learning rate chosen for it; they win over the task's.
    """

    name: str
    preset: str
    fields: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Match:
    """A baseline that is to be made as large or as costly as a variant.

    Attributes:
        name: of the baseline.
        like: the variant.
        measure: ``parameters``, or ``compute``: operations of a training step.
    """

    name: str
    like: str
    measure: str


@dataclass(frozen=True)
class StudyTask:
    """One recipe on one data set.

    Attributes:
        name: in tables and files.
        kind: what is learned; its training script runs it.
        options: of the training script, recipe included: name -> value.
        measure: settings of the measurements on disturbed data (:mod:`.measurements`); empty: clean data only.
    """

    name: str
    kind: Task
    options: dict[str, Any]
    measure: dict[str, Any]

    @property
    def recipe(self) -> dict[str, Any]:
        """What a run of this task is, without where its data lie; equal for equal runs."""
        options = {name: value for name, value in self.options.items() if name not in WHERE_DATA_LIE}
        return {"task": self.kind.name, "options": options}

    def words(self, variant: Variant, seed: int) -> list[str]:
        """The command line of the training script for one run, but for its folder."""
        overrides = {**self.options.get("config_overrides", {}), **variant.fields}
        options = {
            **{name: value for name, value in self.options.items() if name != "config_overrides"},
            **variant.options,
            "preset": variant.preset,
            "seed": seed,
            "data_seed": seed,
        }
        words = [word for name, value in options.items() for word in option_words(name, value)]
        return words + option_words("config_overrides", [f"{key}={_word(value)}" for key, value in overrides.items()])


@dataclass(frozen=True)
class Run:
    """One model of one seed on one task."""

    task: StudyTask
    variant: Variant
    seed: int

    @property
    def name(self) -> str:
        """Of its file in the ledger, without ``.json``."""
        return f"{self.task.name}-{self.variant.name}-seed{self.seed}"

    @property
    def identity(self) -> dict[str, Any]:
        """What makes this run what it is: two runs with the same are the same run."""
        variant = {name: value for name, value in vars(self.variant).items() if name != "options" or value}
        return {"recipe": self.task.recipe, "variant": variant, "seed": self.seed}

    @property
    def digest(self) -> str:
        """A short text that is the same for the same :attr:`identity`."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Study:
    """A study as its file describes it.

    Attributes:
        name: of the study.
        version: of its design. Ledgers of two versions are never mixed.
        baseline: the variant that the others are compared with.
        seeds: of the runs, each of them for every variant.
        variants: what is compared, the baseline included, and after :meth:`with_baselines` the matched ones.
        matched: baselines to be made.
        tasks: recipes on data sets.
        split: the split that the table shows: ``test``, or ``validation`` while something is still to be chosen.
        keep_models: whether checkpoints stay, so that something more can be measured on them later.
    """

    name: str
    version: int
    baseline: str
    seeds: tuple[int, ...]
    variants: tuple[Variant, ...]
    matched: tuple[Match, ...]
    tasks: tuple[StudyTask, ...]
    split: str
    keep_models: bool

    @property
    def runs(self) -> list[Run]:
        """All runs, seed by seed, so that an unfinished study has about as many of every variant."""
        return [
            Run(task, variant, seed) for seed in self.seeds for task in self.tasks for variant in self._of_task(task)
        ]

    def with_baselines(self, baselines: dict[str, list[Variant]]) -> Study:
        """The study with the matched baselines of every task: name of the task -> its baselines."""
        tasks = tuple(_WithBaselines(**vars(task), baselines=tuple(baselines[task.name])) for task in self.tasks)
        return replace(self, tasks=tasks)

    @property
    def variant_names(self) -> list[str]:
        """Of the table's rows: the baselines first."""
        names = [*(match.name for match in self.matched), *(variant.name for variant in self.variants)]
        return [self.baseline, *(name for name in names if name != self.baseline)]

    def _of_task(self, task: StudyTask) -> Iterator[Variant]:
        yield from self.variants
        yield from getattr(task, "baselines", ())


@dataclass(frozen=True)
class _WithBaselines(StudyTask):
    baselines: tuple[Variant, ...] = ()


def training_script(kind: Task) -> ModuleType:
    """The module of a task's training script."""
    folder = str(shipped_file(f"training/{kind.script}.py").parent)
    if folder not in sys.path:  # scripts import each other as siblings
        sys.path.insert(0, folder)
    return importlib.import_module(kind.script)


def option_words(name: str, value: Any) -> list[str]:
    """An option of a YAML file as words of a command line; an empty list is left out."""
    if isinstance(value, list):
        return [f"--{name}", *map(_word, value)] if value else []
    return [f"--{name}={_word(value)}"]


def meaning(words: Sequence[str]) -> list[str]:
    """Words of options that are equal where the options mean the same: in one order, and each number in one form."""
    parts = (word.partition("=") for word in words)
    return sorted(f"{name}{equals}{_one_form(value)}" for name, equals, value in parts)


def _one_form(value: str) -> str:
    try:
        return repr(float(value))
    except ValueError:
        return value


def _word(value: Any) -> str:
    if value is None:
        return "none"
    return json.dumps(value) if isinstance(value, bool | dict | list) else str(value)


def check_runs(study: Study) -> None:
    """Check every run's options with the parser of its training script.

    Raises:
        UsageError: naming the task, the variant and what is wrong.
    """
    for task in study.tasks:
        script = training_script(task.kind)
        for run in (Run(task, variant, study.seeds[0]) for variant in study.variants):
            try:
                script.read_arguments(task.words(run.variant, run.seed))
            except UsageError as error:
                raise UsageError(f"task {task.name}, variant {run.variant.name}: {error}") from error
            if run.variant.preset in OF_TASK[task.kind.name].refused_presets:
                raise UsageError(f"task {task.name}: its model cannot have preset {run.variant.preset}")


def place_data(study: Study, places: Sequence[str]) -> Study:
    """The study with its data where they lie on this machine.

    Args:
        study: as its file describes it.
        places: ``TASK.OPTION=VALUE``, the option one of :data:`WHERE_DATA_LIE`.

    Raises:
        UsageError: for another form, or a task that there is not.
    """
    tasks = {task.name: task for task in study.tasks}
    for place in places:
        left, equals, value = place.partition("=")
        name, dot, option = left.rpartition(".")
        if not (equals and dot) or option not in WHERE_DATA_LIE:
            raise UsageError(
                f"--data must be TASK.OPTION=VALUE, OPTION one of {', '.join(WHERE_DATA_LIE)}, got {place!r}"
            )
        if name not in tasks:
            raise UsageError(f"--data must name a task of the study ({', '.join(tasks)}), got {place!r}")
        if option == "dataset_name" and Path(value).expanduser().exists():
            value = str(Path(value).expanduser().resolve())
        tasks[name] = replace(tasks[name], options={**tasks[name].options, option: value})
    return replace(study, tasks=tuple(tasks.values()))


def all_tasks() -> str:
    """The kinds of tasks that there are, for a message."""
    return ", ".join(TASKS)
