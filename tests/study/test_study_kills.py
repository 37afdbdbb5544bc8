"""Studies in processes of their own: killed at any moment, side by side, with a worker that dies."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from hf_imgproc_attn.study.driver import Job, Outcome, run_study
from hf_imgproc_attn.study.engines import Workers
from hf_imgproc_attn.study.ledger import Ledger
from hf_imgproc_attn.study.study_file import read_study
from tests.helpers import ROOT, run_command, started
from tests.study.conftest import TINY_TASK, WriteStudy

LIMIT = 240
"""Seconds for one process; on a busy machine, imports alone may take thirty."""


def wait_for(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + LIMIT
    while not condition():
        if time.monotonic() > end:
            pytest.fail(f"waited {LIMIT} s for {what}")
        time.sleep(0.02)


def command(study: Path, ledger: Path, jobs: int) -> list[str]:
    return [
        sys.executable, "-m", "hf_imgproc_attn.cli", "study", str(study), "--ledger", str(ledger), "--jobs", str(jobs),
    ]  # fmt: skip


def finished_files(ledger: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in ledger.glob("[!.]*-seed*.json")}


@pytest.mark.long
def test_kills_lose_no_finished_run_and_double_none(
    write_study: WriteStudy, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    """SIGKILL at random moments, of the process alone: what it started has to end by itself."""
    kills = 10 if pytestconfig.getoption("--full") else 2
    options = {**TINY_TASK["options"], "max_steps": 2}
    path = write_study(seeds=2 * kills, tasks={"digits": {**TINY_TASK, "options": options}})
    ledger, chance = tmp_path / "ledger", random.Random(7)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    before: dict[str, bytes] = {}
    for kill in range(kills):
        # Side by side in every second round, so that workers are orphaned too.
        with started(command(path, ledger, 1 + kill % 2), env=environment, cwd=tmp_path) as process:
            wait_for(lambda: finished_files(ledger).keys() > before.keys(), "a further run")  # noqa: B023
            time.sleep(chance.uniform(0, 0.5))
            children = psutil.Process(process.pid).children(recursive=True)
            os.kill(process.pid, signal.SIGKILL)
            wait_for(lambda: not any(child.is_running() for child in children), "the workers' end")  # noqa: B023
        now = finished_files(ledger)
        assert {name: now.get(name) for name in before} == before
        before = now
    end = run_command(command(path, ledger, 1), env=environment, cwd=tmp_path, timeout=LIMIT)
    assert end.returncode == 0, end.stderr[-2000:]
    assert f"{4 * kills} runs, {len(before)} of them" in end.stdout
    after = finished_files(ledger)
    assert {name: after[name] for name in before} == before
    assert sorted(after) == sorted(f"{run.name}.json" for run in read_study(path).runs)
    assert not list(ledger.glob(".*.json.*"))  # nor is anything left of half-written files
    assert not [folder for folder in (ledger / ".running").iterdir() if folder.is_dir()]


@pytest.mark.long
@pytest.mark.usefixtures("prepared_processes")
def test_a_worker_that_dies_is_replaced_and_its_run_done_again(write_study: WriteStudy, tmp_path: Path) -> None:
    path, said = write_study(), []
    study, ledger = read_study(path), Ledger(tmp_path / "ledger")
    killed: list[int] = []

    class Killing(Workers):
        def work(self, jobs: Any, done: Callable[[Job, Outcome], None]) -> None:
            def then_kill(job: Job, outcome: Outcome) -> None:
                done(job, outcome)
                if not killed:
                    processes = psutil.Process().children()
                    (worker,) = (each for each in processes if "hf_imgproc_attn.study.worker" in each.cmdline())
                    killed.append(worker.pid)
                    worker.kill()

            super().work(jobs, then_kill)

    _, progress = run_study(study, ledger, Killing(path, [], ledger.folder, 1, 1), say=said.append)
    assert len(killed) == 1
    assert (progress.done, progress.errors, progress.elsewhere) == (4, [], [])
    assert len(ledger.names()) == 4


@pytest.mark.long
def test_ray_does_the_runs_of_a_node_that_was_killed_again(write_study: WriteStudy, tmp_path: Path) -> None:
    """Two nodes of one machine. Ray's own processes end with the group that ``run_command`` starts."""
    path = write_study(seeds=2)
    ended = run_command(
        [sys.executable, "-m", "tests.study.ray_cluster", str(path), str(tmp_path / "ledger")],
        env={**os.environ, "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"},
        cwd=tmp_path,
        timeout=2 * LIMIT,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    told = json.loads(ended.stdout.strip().splitlines()[-1])
    names = sorted(run.name for run in read_study(path).runs)
    assert (sorted(told["finished"]), told["errors"], told["left"]) == (names, [], 1)
    assert Ledger(tmp_path / "ledger").names() == names
