"""Faults that the tests' Hub server commits when told to."""

from __future__ import annotations

import fnmatch
import threading
from dataclasses import dataclass, field


@dataclass
class Fault:
    """What goes wrong with the next ``times`` matching requests (None: with all, until ``heal``).

    ``hits`` counts them; ``reached`` is set with the first, for a test that waits for it.
    """

    kind: str
    route: str
    path: str
    method: str
    times: int | None
    status: int = 0
    retry_after: int | None = None
    offset: int = 0
    hits: int = 0
    reached: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)


class Faults:
    """The faults still to come, in the order in which they were asked for."""

    def __init__(self) -> None:
        self._pending: list[Fault] = []
        self._taken: list[Fault] = []
        self._lock = threading.Lock()

    def add(self, fault: Fault) -> Fault:
        with self._lock:
            self._pending.append(fault)
        return fault

    def take(self, kinds: str, route: str, method: str, path: str) -> Fault | None:
        """The first fault of these kinds that matches a request; it has one time less to come."""
        with self._lock:
            for fault in self._pending:
                if (
                    fault.kind in kinds.split()
                    and fnmatch.fnmatchcase(route, fault.route)
                    and fnmatch.fnmatchcase(method, fault.method)
                    and fnmatch.fnmatchcase(path, fault.path)
                ):
                    fault.hits += 1
                    fault.reached.set()
                    self._taken.append(fault)
                    if fault.hits == fault.times:
                        self._pending.remove(fault)
                    return fault
        return None

    def heal(self) -> None:
        """No further faults, and what hangs goes on."""
        with self._lock:
            for fault in self._pending + self._taken:
                fault.released.set()
            self._pending.clear()
