"""The ledger of a study: a folder with one JSON file for every run that has ended, and the study that they are of.

A file is written whole or not at all, by the one process that holds the run's lock; the lock falls with its process,
however that ends. So a kill at any moment loses no finished run, and no run is done twice.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..errors import UsageError
from ..output_paths import writing
from ..records import write_json
from .plan import Run, Study, Variant

FORMAT = 1
HEADER = "study.json"
FINISHED, DIVERGED = "finished", "diverged"
_FIELDS: dict[str, type] = {
    "study": str, "version": int, "identity": dict, "status": str, "metrics": dict, "measured": dict,
    "measurements": list, "parameters": dict, "operations": dict, "seconds": dict, "data_fingerprint": dict,
}  # fmt: skip
"""What tables and further measurements read of a record."""
_NUMBERS = (
    ("parameters", "total"), ("operations", "step_per_sample"), ("operations", "training"), ("seconds", "training"),
    ("seconds", "measuring"),
)  # fmt: skip


class Ledger:
    """The results of one version of one study.

    Args:
        folder: of the ledger; made when something is written.

    Attributes:
        folder: as given.
        running: where runs are trained; nothing in it is a result.
        models: where the checkpoints of finished runs are, if the study keeps them.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.running = self.folder / ".running"
        self.models = self.folder / ".models"

    def open(self, study: Study) -> None:
        """Mark the folder as this study's, or check that it is. Variants, seeds and tasks may be added to a study.

        Raises:
            UsageError: if it holds another study or another version of it, or a run of it means something else now;
                nothing is changed then.
        """
        path, header = self.folder / HEADER, self.check(study)
        if not path.is_file() or self._read(path) != header:
            write_json(path, header)

    def check(self, study: Study) -> dict[str, Any]:
        """Check that the folder is this study's, or nobody's yet; nothing is written.

        Returns:
            What its header is to say.

        Raises:
            UsageError: as :meth:`open`.
        """
        path, header = self.folder / HEADER, self._header(study)
        if path.is_file():
            earlier = self._read(path)
            if not isinstance(earlier.get("tasks"), dict):
                raise UsageError(f"{str(path)!r} must say the tasks of the study, got {earlier.get('tasks')!r}")
            for field in ("format", "name", "version", "split"):
                if earlier.get(field) != header[field]:
                    raise UsageError(
                        f"ledger {str(self.folder)!r} is of a study with {field} {earlier.get(field)!r}, not "
                        f"{header[field]!r}: results of two studies are never mixed; choose another folder"
                    )
            with_runs = {name.partition("-")[0] for name in self.names()}
            for name, recipe in earlier["tasks"].items():
                now = header["tasks"].setdefault(name, recipe)
                if name in with_runs:  # a task that nothing was made of yet may still be mended
                    self._same(f"task {name}", recipe, now)
        elif self.folder.is_dir() and self.names():
            raise UsageError(f"ledger {str(self.folder)!r} has runs but no {HEADER} that says of which study")
        return header

    def _header(self, study: Study) -> dict[str, Any]:
        tasks = {task.name: json.loads(json.dumps(task.recipe)) for task in study.tasks}
        return {"format": FORMAT, "name": study.name, "version": study.version, "split": study.split, "tasks": tasks}

    def _same(self, what: str, before: Any, now: Any) -> None:
        difference = _first_difference(before, now)
        if difference is not None:
            place, old, new = difference
            raise UsageError(
                f"ledger {str(self.folder)!r} is of another version of the study: {what} has {place} {old!r} there "
                f"and {new!r} here; give the study a new version and another ledger"
            )

    def names(self) -> list[str]:
        """Names of all runs in the ledger."""
        return sorted(path.stem for path in self.folder.glob("*-seed*.json") if not path.name.startswith("."))

    def read(self, run: Run) -> dict[str, Any] | None:
        """The record of a run; None if it has not ended.

        Raises:
            UsageError: if the file is damaged, or of a run that meant something else.
        """
        path = self._file(run)
        if not path.is_file():
            return None
        record = self._record(run)
        self._same(f"run {run.name}", record.get("identity"), json.loads(json.dumps(run.identity)))
        return record

    def everything(self, study: Study) -> dict[str, dict[str, Any]]:
        """Name of a run -> its record, for those of a study's runs that have ended.

        Matched baselines whose size is not known yet are read as they are.

        Raises:
            UsageError: as :meth:`read`, or if runs of one task were made with different data.
        """
        found = {run.name: record for run in study.runs if (record := self.read(run)) is not None}
        for task in study.tasks:
            for name, seed in [(match.name, seed) for match in study.matched for seed in study.seeds]:
                run = Run(task, Variant(name, ""), seed)
                if run.name not in found and self._file(run).is_file():
                    found[run.name] = record = self._record(run)
                    self._same(f"run {run.name}", record["identity"].get("recipe"), run.identity["recipe"])
        data: dict[str, tuple[str, Any]] = {}
        for run_name, record in found.items():
            for field, wanted in (("study", study.name), ("version", study.version)):
                if record[field] != wanted:
                    raise UsageError(
                        f"ledger {str(self.folder)!r}: run {run_name} is of a study with {field} {record[field]!r}, "
                        f"not {wanted!r}: results of two studies are never mixed; remove its file"
                    )
            name, fingerprint = data.setdefault(record["task"], (run_name, record["data_fingerprint"]))
            if record["data_fingerprint"] != fingerprint:
                raise UsageError(
                    f"ledger {str(self.folder)!r}: runs {name} and {run_name} were made with different data; they "
                    "cannot be compared"
                )
        return found

    def write(self, run: Run, record: dict[str, Any]) -> None:
        """Keep the record of a run that has ended; only while :meth:`claim` is held."""
        write_json(self._file(run), record)

    @contextlib.contextmanager
    def claim(self, run: Run, *, done: bool = False) -> Iterator[bool]:
        """Whether this process has a run until the block ends: nobody else has it, and it is not ``done``, or is."""
        with writing(self.running, "ledger"):
            self.running.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.running / f"{run.name}.lock", timeout=0):
                for left in self.folder.glob(f".{run.name}.json.*"):  # of a process that was killed while it wrote
                    left.unlink(missing_ok=True)
                yield (self.read(run) is not None) == done
        except Timeout:
            yield False

    def work_folder(self, run: Run) -> Path:
        """Where a run is trained; another run of the same name, as after a change of the study, has another one."""
        return self.running / f"{run.name}-{run.digest}"

    def clear(self, run: Run, *, keep: bool) -> None:
        """Remove what a finished run needed, or keep its checkpoint in :attr:`models`."""
        folder = self.work_folder(run)
        if keep and folder.is_dir():
            target = self.models / run.name
            shutil.rmtree(target, ignore_errors=True)
            self.models.mkdir(exist_ok=True)
            for checkpoint in folder.glob("checkpoint-*"):
                shutil.rmtree(checkpoint, ignore_errors=True)
            folder.rename(target)
        shutil.rmtree(folder, ignore_errors=True)

    def _file(self, run: Run) -> Path:
        return self.folder / f"{run.name}.json"

    def _record(self, run: Run) -> dict[str, Any]:
        """The record of a run whose file there is, with all that tables and later measurements read."""
        path = self._file(run)
        record = self._read(path)
        fault = _fault(record, run)
        if fault is not None:
            raise UsageError(
                f"{str(path)!r} in the ledger must be the record of the run {run.name}, but {fault}; remove it to "
                "repeat it"
            )
        return record

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UsageError(
                f"{str(path)!r} in the ledger cannot be read ({error}); remove it to repeat it"
            ) from error
        if not isinstance(content, dict):
            raise UsageError(f"{str(path)!r} in the ledger must hold a mapping")
        return content


def _fault(record: dict[str, Any], run: Run) -> str | None:
    """What is wrong with the record of a run, in words; None if tables and further measurements can read it."""
    if record.get("format") != FORMAT:
        return f"its format is {record.get('format')!r}, not {FORMAT}"
    for name, wanted in (("task", run.task.name), ("variant", run.variant.name), ("seed", run.seed)):
        if record.get(name) != wanted:
            return f"its {name} is {record.get(name)!r}"
    for name, kind in _FIELDS.items():
        if not isinstance(record.get(name), kind):
            return f"its {name} is {record.get(name)!r}" if name in record else f"it has no {name}"
    if record["status"] not in (FINISHED, DIVERGED):
        return f"its status is {record['status']!r}"
    lacks = [name for part, name in _NUMBERS if not isinstance(record[part].get(name), int | float)]
    if lacks:
        return f"it has no number of {', '.join(lacks)}"
    if not all(isinstance(result, dict) for result in record["measurements"]):
        return "its measurements are no mappings"
    return None


def _first_difference(before: Any, now: Any, place: str = "") -> tuple[str, Any, Any] | None:
    """Where two JSON values differ first: the place, and what stands there."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in sorted({*before, *now}):
            inner = f"{place}.{name}" if place else name
            found = _first_difference(before.get(name), now.get(name), inner)
            if found is not None:
                return found
        return None
    return None if before == now else (place, before, now)
