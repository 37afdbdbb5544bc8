"""The runner: parts in order, the time they get, and a record that is whole after every case.

The runner imports no torch and touches no GPU. Each part runs in worker processes; a case that outlasts its limit is
killed with its process, one that ends its process is recorded as crashed, and a new process goes on with the next.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ...errors import UsageError
from ...records import write_json
from .child import Child
from .parts import BAD, CRASHED, PARTS, TOO_SLOW, Part

FORMAT = 1
START_LIMIT = 120.0
"""Seconds for a worker to import its libraries and find the device."""
MARGIN = 5.0
"""Seconds kept for the end of the run."""
_STARTS = 2
_LEAST = 2.0


def run(
    *,
    output: Path,
    device: str = "cuda",
    minutes: float = 9.0,
    letters: Sequence[str] | None = None,
    resume: bool = False,
    retry: bool = False,
    force: bool = False,
    data: Path | None = None,
    parts: Sequence[Part] = PARTS,
    workers: int | None = None,
) -> dict[str, Any]:
    """Run the check.

    Args:
        output: the record, a JSON file, written after every case. Results of parts that are not run stay in it.
        device: ``"cuda"``, or ``"cpu"`` for the rehearsal.
        minutes: for everything, the start of the processes included.
        letters: of the parts to run; None: all.
        resume: keep the cases of these parts that have a verdict, and run the others.
        retry: likewise, but run again what failed, crashed, was wrong or too slow.
        force: forget what the output has of these parts.
        data: the folder of part e's images.
        parts: the table of parts.
        workers: processes at a time, at most; None: what the part and the processor's cores allow.

    Returns:
        The record.

    Raises:
        UsageError: for an unknown part, a device that is not there, or an output that holds something else, or
            (without ``resume``, ``retry`` and ``force``) results of these parts.
    """
    deadline = time.monotonic() + 60 * minutes - min(MARGIN, 6 * minutes)
    known = [part.letter for part in parts]
    for letter in letters or ():
        if letter not in known:
            raise UsageError(f"--parts must be among {','.join(sorted(known))}, got {letter!r}")
    chosen = [part for part in parts if letters is None or part.letter in letters]
    record = _Record(output, device, _earlier(output, device))
    if not resume and not retry:
        there = [part.letter for part in chosen if record.content["parts"].get(part.letter, {}).get("cases")]
        if there and not force:
            raise UsageError(
                f"--output {str(output)!r} has results of part {', '.join(there)} already; --resume goes on with "
                "them, --force replaces them"
            )
        record.forget({part.letter for part in chosen})
    elif retry:
        record.forget({part.letter for part in chosen}, statuses=BAD)
    for index, part in enumerate(chosen):
        left = deadline - time.monotonic()
        share = 1.0 if index == len(chosen) - 1 else part.share
        _PartRun(part, record, data, time.monotonic() + share * left, workers).run()
    return record.content


def _earlier(output: Path, device: str) -> dict[str, Any] | None:
    """What an output file holds already.

    Raises:
        UsageError: if it is no record of this command, or a GPU's and this is a rehearsal.
    """
    if not output.exists():
        return None
    try:
        earlier = json.loads(output.read_text(encoding="utf-8"))
        found = earlier["environment"]["device"]["type"]
        if earlier["format"] != FORMAT or not isinstance(earlier["parts"], dict):
            raise KeyError("format")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"--output must be new or a record of gpu-check, got {str(output)!r}: {error!r}") from error
    if found != device:
        raise UsageError(f"--output must be new or a record of device {device!r}, got {str(output)!r}, of {found!r}")
    return dict(earlier)


class _Record:
    """The record, shared by the threads that serve the workers; on disk it is always whole."""

    def __init__(self, path: Path, device: str, earlier: dict[str, Any] | None) -> None:
        self.path, self.device = path, device
        self.lock = threading.RLock()
        self._earlier = earlier
        self.content: dict[str, Any] = {"format": FORMAT, "environment": None, "parts": {}}
        if earlier is not None:
            self.content["parts"] = earlier["parts"]

    def forget(self, letters: set[str], statuses: Sequence[str] | None = None) -> None:
        """Drop parts, or only those of their verdicts; on disk they stay until there is something to write."""
        for letter in letters & set(self.content["parts"]):
            if statuses is None:
                del self.content["parts"][letter]
                continue
            cases = self.content["parts"][letter]["cases"]
            for name in [name for name, case in cases.items() if case["status"] in statuses]:
                del cases[name]

    def meet(self, environment: dict[str, Any]) -> None:
        """Take note of what is measured on.

        Raises:
            UsageError: if earlier results that are to be kept are of another device or another torch.
        """
        with self.lock:
            if self._earlier is not None:
                before, now = (_identity(found) for found in (self._earlier["environment"], environment))
                kept = [letter for letter, part in self.content["parts"].items() if part["cases"]]
                if before != now and kept:
                    raise UsageError(
                        f"--output {str(self.path)!r} holds parts {','.join(sorted(kept))} of {before}, and this is "
                        f"{now}: choose another file"
                    )
                self._earlier = None
            self.content["environment"] = environment

    def cases(self, part: Part) -> dict[str, dict[str, Any]]:
        """The cases of a part that have a verdict, by name."""
        # Whole from the start: a run that is killed leaves a record that can be rendered.
        new = {"title": part.title, "cases": {}, "seconds": 0.0, "not_reached": None, "failure": None}
        entry = self.content["parts"].setdefault(part.letter, new)
        cases: dict[str, dict[str, Any]] = entry["cases"]
        return cases

    def write(self) -> None:
        """Write the file, whole or not at all."""
        with self.lock:
            if self.content["environment"] is not None:
                write_json(self.path, self.content)


def _identity(environment: dict[str, Any]) -> str:
    return f"{environment['device']['name']} with torch {environment['versions']['torch']}"


class _PartRun:
    """One part: a queue of cases, and a thread for each worker process."""

    def __init__(self, part: Part, record: _Record, data: Path | None, end: float, workers: int | None) -> None:
        self.part, self.record, self.data, self.end = part, record, data, end
        cores = max(1, (os.cpu_count() or 1) // 2)
        self.workers = max(1, min(part.workers, cores if workers is None else workers))
        self.queue: deque[dict[str, Any]] | None = None
        self.children: set[Child] = set()
        self.stopping = False
        self.failure: str | None = None

    def run(self) -> None:
        """Run the part until its cases or its time are at an end, and write what became of it."""
        started = time.monotonic()
        print(f"part {self.part.letter}, {self.part.title}: {self.end - started:.0f} s at most", flush=True)
        self.record.cases(self.part)
        try:
            self._serve_all()
        except UsageError:
            raise  # nothing was run
        except BaseException:  # an interrupt, too
            self._finish(time.monotonic() - started)
            raise
        self._finish(time.monotonic() - started)

    def _serve_all(self) -> None:
        with ThreadPoolExecutor(self.workers) as pool:
            threads = [pool.submit(self._serve) for _ in range(self.workers)]
            try:
                for thread in threads:
                    thread.result()
            finally:
                self.stopping = True
                for child in list(self.children):
                    child.stop()

    def _finish(self, seconds: float) -> None:
        with self.record.lock:
            entry = self.record.content["parts"][self.part.letter]
            not_reached = None if self.queue is None else [case["name"] for case in self.queue]
            entry["not_reached"] = not_reached
            entry["seconds"] = round(entry.get("seconds", 0.0) + seconds, 1)
            entry["failure"] = self.failure
            self.record.write()
            counts = Counter(case["status"] for case in entry["cases"].values())
        words = [f"{count} {status}" for status, count in sorted(counts.items())]
        words += [f"{len(not_reached or ())} not reached"] * bool(not_reached)
        words += [f"a worker could not be started: {self.failure}"] * bool(self.failure)
        print(f"part {self.part.letter}: {', '.join(words) or 'no cases'}; {seconds:.0f} s", flush=True)

    def _serve(self) -> None:
        """Keep one worker process busy, and replace it when it ends."""
        child, failed_starts = None, 0
        try:
            while not self.stopping and self._left() >= _LEAST:
                if child is None:
                    if self.queue is not None and not self.queue:
                        return
                    child, failure = self._start()
                    if child is None:
                        failed_starts += 1
                        if failed_starts == _STARTS and not self.stopping:
                            self.failure = failure
                            return
                        continue
                    failed_starts = 0
                case = self._next()
                if case is None:
                    return
                if not self._serve_case(child, case):
                    self._end(child)
                    child = None
        finally:
            if child is not None:
                self._end(child)

    def _left(self) -> float:
        return self.end - time.monotonic()

    def _start(self) -> tuple[Child | None, str]:
        """A worker that is ready; or None, and why not."""
        order = {
            "module": self.part.module,
            "device": self.record.device,
            "data": None if self.data is None else str(self.data),
            "earlier": self._values(),
        }
        child = Child(order, self.workers)
        self.children.add(child)
        try:
            ready = child.receive(min(START_LIMIT, self._left()))
        except TimeoutError:
            failure = f"it was not ready in time; it had printed: {child.printed()}"
        else:
            if ready is not None:
                if "unusable" in ready:
                    self._end(child)
                    raise UsageError(ready["unusable"])
                self._take_note(ready)
                return child, ""
            failure = child.how_it_ended()
        self._end(child)
        return None, failure

    def _take_note(self, ready: dict[str, Any]) -> None:
        with self.record.lock:
            self.record.meet(ready["environment"])
            if self.queue is None:
                done = self.record.cases(self.part)
                self.queue = deque(case for case in ready["cases"] if case["name"] not in done)

    def _values(self) -> dict[str, Any]:
        with self.record.lock:
            return {
                name: case["values"]
                for name, case in self.record.cases(self.part).items()
                if case["status"] == "measured"
            }

    def _next(self) -> dict[str, Any] | None:
        with self.record.lock:
            return self.queue.popleft() if self.queue and self._left() >= _LEAST else None

    def _serve_case(self, child: Child, case: dict[str, Any]) -> bool:
        """Run a case; returns whether the process can go on."""
        started = time.monotonic()
        limit = min(case["seconds"], self._left())
        child.send({"case": case["name"], "seconds_left": self._left()})
        goes_on = False
        try:
            answer = child.receive(limit)
        except TimeoutError:
            if limit < case["seconds"]:  # the part's end, no verdict on the case
                with self.record.lock:
                    if self.queue is not None:
                        self.queue.appendleft(case)
                return False
            reason = f"killed after {limit:.0f} s; it had printed: {child.printed()}"
            result = {"status": TOO_SLOW, "seconds": round(limit, 2), "reason": reason}
        else:
            if answer is None:
                seconds = round(time.monotonic() - started, 2)
                result = {"status": CRASHED, "seconds": seconds, "reason": child.how_it_ended()}
            else:
                result, goes_on = answer["result"], not answer["lost"]
        if self.stopping:
            return False
        with self.record.lock:
            self.record.cases(self.part)[case["name"]] = {"about": case["about"], **result}
            self.record.write()
        reason = f": {result['reason'].splitlines()[0]}" if result.get("reason") else ""
        print(f"  {case['name']}  {result['status']}  {result['seconds']:.1f} s{reason}", flush=True)
        return goes_on

    def _end(self, child: Child) -> None:
        self.children.discard(child)
        child.stop()
