"""Who carries out the runs of a study when they go side by side: worker processes of this machine."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import UsageError
from .driver import Job, Outcome

_START_ANEW = 2
"""So often a worker that dies during one run is replaced before the run is given up."""


class Workers:
    """The engine of ``--jobs N``: N processes, each of which does one run after another.

    A worker ends when the pipe to this process closes, so that none outlives it, however it ends. A worker that dies,
    as for lack of memory, is replaced, and its run begun again; after the second time the run counts as failed.

    Args:
        study_file: YAML file of the study, which workers read themselves.
        places: of its data, as in :func:`.plan.place_data`.
        ledger: folder of the ledger.
        count: of the processes.
        threads: CPU threads of each.
    """

    def __init__(self, study_file: Path, places: Sequence[str], ledger: Path, count: int, threads: int) -> None:
        self.count, self.threads = count, threads
        self._start = {"study": str(study_file.resolve()), "places": list(places), "ledger": str(ledger.resolve())}

    def work(self, jobs: Iterator[Job], done: Callable[[Job, Outcome], None]) -> None:
        """Keep every worker busy until there are no more jobs.

        Raises:
            UsageError: what a worker says that a user can mend; runs that others are at are abandoned.
        """
        results: queue.Queue[tuple[_Worker, dict[str, Any] | None]] = queue.Queue()
        workers: list[_Worker] = []
        try:
            for _ in range(self.count):
                job = next(jobs, None)
                if job is None:
                    break
                workers.append(_Worker(self._start, self.threads, results))
                workers[-1].give(job)
            busy = len(workers)
            while busy:
                worker, answer = results.get()
                job = worker.job
                if answer is None:
                    fresh = _Worker(self._start, self.threads, results)
                    workers[workers.index(worker)] = fresh
                    ended, tries = worker.status(), worker.tries
                    worker.close()
                    worker = fresh
                    if tries < _START_ANEW:
                        worker.give(job, tries + 1)
                        continue
                    done(job, Outcome(error=f"its process died {tries} times, the last time with {ended}"))
                elif answer.get("refused"):
                    raise UsageError(answer["refused"])
                else:
                    done(job, Outcome(answer.get("record"), answer.get("error")))
                following = next(jobs, None)
                if following is None:
                    busy -= 1
                else:
                    worker.give(following)
        finally:
            for worker in workers:
                worker.close()


class _Worker:
    """One process and the thread that reads its answers."""

    job: Job
    tries: int

    def __init__(
        self, start: dict[str, Any], threads: int, results: queue.Queue[tuple[_Worker, dict[str, Any] | None]]
    ) -> None:
        command = [sys.executable, "-m", "hf_imgproc_attn.study.worker", json.dumps({**start, "threads": threads})]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._results = results
        threading.Thread(target=self._read, daemon=True).start()

    def give(self, job: Job, tries: int = 1) -> None:
        """Let the process do a job, the ``tries``-th time."""
        self.job, self.tries = job, tries
        with contextlib.suppress(BrokenPipeError):  # it died: the thread will say so
            _open(self.process.stdin).write(json.dumps(job.to_line()) + "\n")
            _open(self.process.stdin).flush()

    def status(self) -> str:
        """How the process ended."""
        code = self.process.wait()
        return f"signal {-code}" if code < 0 else f"exit status {code}"

    def close(self) -> None:
        """End the process, whatever it does."""
        with contextlib.suppress(BrokenPipeError):
            _open(self.process.stdin).close()
        self.process.kill()
        self.process.wait()
        _open(self.process.stdout).close()

    def _read(self) -> None:
        with contextlib.suppress(ValueError):  # the pipe was closed on this side
            for line in _open(self.process.stdout):
                self._results.put((self, json.loads(line)))
            self._results.put((self, None))


def _open(pipe: Any) -> Any:
    """A pipe of a process that was started with it."""
    if pipe is None:
        raise ValueError("the process has no such pipe")
    return pipe
