"""Runs a study: what is not in the ledger yet, one after another or some side by side, until all or a budget ends."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import Any, Protocol

from ..errors import UsageError
from ..records import git_state, package_versions
from .ledger import DIVERGED, Ledger
from .measurements import HEADLINES
from .plan import Run, Study, Variant
from .run import carry_out, check_data, measured
from .sizes import Prepared, Size

Say = Callable[[str], None]


class Engine(Protocol):
    """Carries out runs somewhere, and says of each that it ended."""

    def work(self, jobs: Iterator[Job], done: Callable[[Job, Outcome], None]) -> None:
        """Carry out jobs as they are asked for, and report each."""


@dataclass(frozen=True)
class Job:
    """A run that is to be done, with the size of its model."""

    run: Run
    size: Size

    def to_line(self) -> dict[str, Any]:
        """As plain values, for another process."""
        run = self.run
        return {"task": run.task.name, "variant": vars(run.variant), "seed": run.seed, "size": vars(self.size)}

    @classmethod
    def from_line(cls, study: Study, line: dict[str, Any]) -> Job:
        """The job of :meth:`to_line`; the study says what its task is."""
        task = next(task for task in study.tasks if task.name == line["task"])
        return cls(Run(task, Variant(**line["variant"]), line["seed"]), Size(**line["size"]))


@dataclass(frozen=True)
class Outcome:
    """How a job ended: with a record, with an error in words, or (neither) because another process has the run."""

    record: dict[str, Any] | None = None
    error: str | None = None


@dataclass
class Progress:
    """What is said while a study runs, and how long it will take.

    Args:
        total: runs of the study, of this shard.
        there: those that had ended before.
        say: prints a line.
        side_by_side: runs that are done at once.
    """

    total: int
    there: int
    say: Say
    side_by_side: int = 1
    seconds: dict[str, list[float]] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)
    done: int = 0

    def expected(self, runs: Sequence[Run]) -> float | None:
        """Seconds that runs will take one after another, by the mean of their task; None while no run has ended."""
        every = [seconds for of_task in self.seconds.values() for seconds in of_task]
        return sum(mean(self.seconds.get(run.task.name, every)) for run in runs) if every else None

    def report(self, run: Run, outcome: Outcome, left: Sequence[Run]) -> None:
        """Count the outcome of a run, and print a line on it and on the time left."""
        if outcome.error is not None:
            self.errors.append(f"{run.name}: {outcome.error}")
            self.say(f"failed: {run.name}: {outcome.error}")
            return
        if outcome.record is None:
            self.elsewhere.append(run.name)
            return
        record = outcome.record
        self.done += 1
        seconds = record["seconds"]["training"] + record["seconds"]["measuring"]
        self.seconds.setdefault(run.task.name, []).append(seconds)
        self.say(
            f"{self.there + self.done}/{self.total} {run.name}: {headline(record)}, {seconds:.0f} s; "
            f"{self._time_left(left)}"
        )

    def _time_left(self, left: Sequence[Run]) -> str:
        expected = self.expected(left)
        if not left:
            return "none left"
        return f"{len(left)} left" + (f", about {_in_words(expected / self.side_by_side)}" if expected else "")


def headline(record: dict[str, Any]) -> str:
    """The most telling numbers of a run on one line."""
    if record["status"] == DIVERGED:
        return "diverged"
    split = "test" if "test" in record["metrics"] else "validation"
    values = record["metrics"].get(split, {})
    name = next((name for name in HEADLINES if values.get(name) is not None), None)
    return "finished" if name is None else f"{split} {name.replace('_', ' ')} {values[name]:.4g}"


def run_study(
    study: Study,
    ledger: Ledger,
    engine: Engine,
    *,
    budget_minutes: float | None = None,
    shard: tuple[int, int] = (1, 1),
    side_by_side: int = 1,
    say: Say = print,
) -> tuple[Study, Progress]:
    """Do what is missing in a ledger.

    Args:
        study: what is to be done.
        ledger: where the results are.
        engine: who does it.
        budget_minutes: no run is begun that would not end in this time, by the mean of those before it; None: no end.
        shard: ``(i, n)``: only each n-th run, from the i-th on, is this process's.
        side_by_side: runs that the engine does at once.
        say: prints a line.

    Returns:
        The study with its matched baselines, and what was done.

    Raises:
        UsageError: for a ledger of another study, data that changed, or a task or variant that cannot be used.
    """
    started = time.monotonic()
    ledger.check(study)
    study, sizes, fingerprints = prepare(study, say)
    ledger.open(study)  # not before: what a mistake in the study says must not be the ledger's
    there = ledger.everything(study)
    check_data(study, there, fingerprints)
    mine = study.runs[shard[0] - 1 :: shard[1]]
    left = [run for run in mine if run.name not in there]
    say(f"{len(mine)} runs, {len(mine) - len(left)} of them in {ledger.folder} already")
    _tidy(study, ledger, mine, there, sizes)
    _measure_further(study, ledger, mine, there, say)
    progress = Progress(len(mine), len(mine) - len(left), say, side_by_side)
    for run in mine:
        if run.name in there:
            seconds = there[run.name]["seconds"]
            progress.seconds.setdefault(run.task.name, []).append(seconds["training"] + seconds["measuring"])
    end = None if budget_minutes is None else started + 60 * budget_minutes

    def jobs() -> Iterator[Job]:
        for run in list(left):
            expected = progress.expected([run]) or 0.0
            if end is not None and time.monotonic() + expected > end:
                return
            yield Job(run, sizes[run.task.name][run.variant.name])

    def done(job: Job, outcome: Outcome) -> None:
        left.remove(job.run)
        progress.report(job.run, outcome, left)

    engine.work(jobs(), done)
    if left:
        say(f"the budget of {budget_minutes:g} minutes is used: {len(left)} runs are left; the same command goes on")
    if progress.elsewhere:
        say(f"{len(progress.elsewhere)} runs are being done, or were done meanwhile, by another process")
    return study, progress


def prepare(study: Study, say: Say) -> tuple[Study, dict[str, dict[str, Size]], dict[str, Any]]:
    """Load every task's data, measure every variant, and choose the matched baselines.

    Returns:
        The study with its baselines; task -> variant -> size; task -> fingerprints of its data.
    """
    sizes: dict[str, dict[str, Size]] = {}
    baselines: dict[str, list[Variant]] = {}
    fingerprints = {}
    base = next(variant for variant in study.variants if variant.name == study.baseline)
    for task in study.tasks:
        prepared = Prepared(task, base, study.seeds[0])
        fingerprints[task.name] = prepared.fingerprints
        prepared.check_training(study.variants)
        of_task = {variant.name: prepared.size(variant) for variant in study.variants}
        baselines[task.name] = []
        for match in study.matched:
            baseline, candidates = prepared.match(match, of_task[match.like])
            baselines[task.name].append(baseline)
            of_task[baseline.name] = prepared.size(baseline)
            considered = "; ".join(
                f"{words}: {size.parameters:,} parameters, {size.compute / 1e6:.2f}M" for words, size in candidates
            )
            say(f"{task.name}: {baseline.name}, with the {match.measure} of {match.like}; candidates: {considered}")
        prepared.check_different([*study.variants, *baselines[task.name]])
        sizes[task.name] = of_task
        stock = of_task[base.name]
        say(f"{task.name}: parameters, and operations of a training step a sample")
        for name, size in of_task.items():
            ratios = f"x {size.parameters / stock.parameters:.2f}, x {size.compute / stock.compute:.2f}"
            say(f"  {name:24} {size.parameters:>12,} {size.compute / 1e6:>12.2f}M   {ratios}")
    return study.with_baselines(baselines), sizes, fingerprints


def _tidy(
    study: Study,
    ledger: Ledger,
    runs: Sequence[Run],
    there: dict[str, dict[str, Any]],
    sizes: dict[str, dict[str, Size]],
) -> None:
    """Put away the checkpoints of finished runs whose process was killed before it could.

    Operations that another version of this package counted otherwise are counted anew: a table has one count.
    """
    for run in (run for run in runs if run.name in there):
        record, compute = there[run.name], sizes[run.task.name][run.variant.name].compute
        before = record["operations"]["step_per_sample"]
        if before == compute and not ledger.work_folder(run).is_dir():
            continue
        with ledger.claim(run, done=True) as mine:
            if mine and before != compute:
                samples = record["operations"]["training"] // before
                record["operations"] = {"step_per_sample": compute, "training": compute * samples}
                ledger.write(run, record)
            if mine:
                ledger.clear(run, keep=study.keep_models)


def _measure_further(
    study: Study, ledger: Ledger, runs: Sequence[Run], there: dict[str, dict[str, Any]], say: Say
) -> None:
    """Measure of kept checkpoints what the study asks for now and did not when they were made."""
    for run in runs:
        record = there.get(run.name)
        folder = ledger.models / run.name
        if record is None or record["status"] == DIVERGED or record["measured"] == run.task.measure:
            continue
        if not folder.is_dir():
            continue
        with ledger.claim(run, done=True) as mine:
            if mine:
                record |= {"measurements": measured(study, run, folder, record), "measured": run.task.measure}
                record["measured_later"] = {"versions": package_versions(), "git": git_state()}
                ledger.write(run, record)
                say(f"measured further: {run.name}")


def do_job(study: Study, ledger: Ledger, job: Job) -> Outcome:
    """Do one run in this process and write its record, unless another process has it.

    Raises:
        UsageError: for what a user can mend, which will be the same in the next run.
        OSError: for a disk that cannot be written.
    """
    with ledger.claim(job.run) as mine:
        if not mine:
            return Outcome()
        record = carry_out(study, job.run, ledger.work_folder(job.run), job.size)
        ledger.write(job.run, record)
        ledger.clear(job.run, keep=study.keep_models)
    return Outcome(record)


class InThisProcess:
    """The engine that needs nothing: one run after another, here.

    Args:
        study: of the runs.
        ledger: where the results go.
    """

    def __init__(self, study: Study, ledger: Ledger) -> None:
        self.study, self.ledger = study, ledger

    def work(self, jobs: Iterator[Job], done: Callable[[Job, Outcome], None]) -> None:
        """One job after another."""
        for job in jobs:
            done(job, do_job(self.study, self.ledger, job))


def parse_shard(text: str) -> tuple[int, int]:
    """``2/8`` -> ``(2, 8)``.

    Raises:
        UsageError: for anything but two integers with 1 <= i <= n.
    """
    first, _, second = text.partition("/")
    if first.isdecimal() and second.isdecimal() and 1 <= int(first) <= int(second):
        return int(first), int(second)
    raise UsageError(f"--shard must be i/n with 1 <= i <= n, got {text!r}")


def _in_words(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
