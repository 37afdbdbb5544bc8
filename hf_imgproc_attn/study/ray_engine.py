"""The engine that spreads runs over a Ray cluster: each run is a task with its CPUs and GPUs, results come back here.

The nodes need nothing but this package and the data: what a run produces comes back as a value, and the driver alone
writes the ledger. Ray begins a run again when its node dies.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..errors import UsageError, plain_message
from .driver import Job, Outcome
from .ledger import Ledger
from .plan import Study

RETRIES = 5
"""So often a run is begun again after its node or process died."""


class RayTasks:
    """The engine of ``--engine ray``.

    Args:
        study: of the runs.
        ledger: where the results go.
        address: of the cluster; None: the one that the environment names, or a new one on this machine.
        cpus: of one run; also its number of threads.
        gpus: of one run.
    """

    def __init__(self, study: Study, ledger: Ledger, address: str | None, cpus: int, gpus: float) -> None:
        self.study, self.ledger, self.address = study, ledger, address
        self.cpus, self.gpus = cpus, gpus

    def work(self, jobs: Iterator[Job], done: Callable[[Job, Outcome], None]) -> None:
        """Keep as many runs going as the cluster has room for.

        Raises:
            UsageError: what a run says that a user can mend, or a cluster that cannot be reached.
        """
        import ray

        started_here = not ray.is_initialized()
        if started_here:
            try:
                ray.init(address=self.address, log_to_driver=False, include_dashboard=False)
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise UsageError(
                    f"--address {self.address!r}: no Ray cluster answers: {plain_message(error)}"
                ) from error
        try:
            self._work(ray, jobs, done)
        finally:
            if started_here:
                ray.shutdown()

    def _work(self, ray: Any, jobs: Iterator[Job], done: Callable[[Job, Outcome], None]) -> None:
        task = ray.remote(num_cpus=self.cpus, num_gpus=self.gpus, max_retries=RETRIES)(_run_there)
        study = ray.put(self.study)
        running: dict[Any, Job] = {}
        more = True
        while more or running:
            # A few more than there is room for wait in Ray's queue, so that a node that joins gets work at once.
            while more and len(running) < self._room(ray) + 1:
                job = next(jobs, None)
                more = job is not None
                if job is not None:
                    with self.ledger.claim(job.run) as free:
                        if free:
                            running[task.remote(study, job.to_line(), self.cpus)] = job
                        else:
                            done(job, Outcome())
            ready, _ = ray.wait(list(running), num_returns=1, timeout=5)
            for reference in ready:
                job = running.pop(reference)
                done(job, self._outcome(ray, reference, job))

    def _room(self, ray: Any) -> int:
        resources = ray.cluster_resources()
        room = int(resources.get("CPU", 0) // self.cpus)
        return max(1, min(room, int(resources.get("GPU", 0) // self.gpus)) if self.gpus else room)

    def _outcome(self, ray: Any, reference: Any, job: Job) -> Outcome:
        try:
            answer = ray.get(reference)
        except ray.exceptions.RayError as error:
            return Outcome(error=plain_message(error))
        if "refused" in answer:
            raise UsageError(answer["refused"])
        if "error" in answer:
            return Outcome(error=answer["error"])
        with self.ledger.claim(job.run) as mine:
            if not mine:
                return Outcome()
            self.ledger.write(job.run, answer["record"])
        return Outcome(answer["record"])


def _run_there(study: Study, line: dict[str, Any], threads: int) -> dict[str, Any]:
    """One run on a node, in a folder that does not outlive it."""
    import torch

    from hf_imgproc_attn.study.run import be_quiet, carry_out

    torch.set_num_threads(threads)
    be_quiet()
    job = Job.from_line(study, line)
    folder = Path(tempfile.mkdtemp(prefix="hf_imgproc_attn_study_"))
    try:
        return {"record": carry_out(study, job.run, folder / job.run.name, job.size)}
    except UsageError as error:
        return {"refused": plain_message(error)}
    except Exception as error:  # a fault of one run leaves the others
        return {"error": f"{type(error).__name__}: {plain_message(error)}"}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
