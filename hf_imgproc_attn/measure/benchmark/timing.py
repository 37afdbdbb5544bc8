"""Times that can be compared: candidates take turns, ratios are taken within a round, and memory is watched."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

DIRECTIONS = ("forward", "forward + backward")
MIN_ROUNDS, MAX_ROUNDS = 3, 15
MIB = 2**20

_CLEAR_PEAK, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


@dataclass(frozen=True)
class Row:
    """One measured value, or why there is none.

    Attributes:
        suite: one of ``SUITES``.
        case: what is computed, shape and dtype included.
        length: tokens.
        method: the candidate.
        direction: ``forward``, ``forward + backward``, ``step`` (of decoding, or of training) or ``generate``.
        milliseconds: median over the rounds.
        ratio: median over the rounds of candidate / baseline *of the same round*.
        ratio_low: first quartile.
        ratio_high: third quartile.
        rounds: how many.
        peak_mib: memory beyond what was there before the call, in MiB, at most; None where it was not measured.
        flop_floor: matrix products of the best algorithm known, as a ratio to plain attention's.
        byte_floor_mib: what has to be read and written at least, in MiB.
        skipped: why there is no time.
    """

    suite: str
    case: str
    length: int
    method: str
    direction: str
    milliseconds: float | None = None
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    rounds: int = 0
    peak_mib: float | None = None
    flop_floor: float | None = None
    byte_floor_mib: float | None = None
    skipped: str | None = None


@dataclass(frozen=True)
class Spread:
    """Median time in milliseconds; median and quartiles of the ratio to the baseline."""

    milliseconds: float
    ratio: float
    ratio_low: float
    ratio_high: float
    rounds: int

    def fields(self) -> dict[str, Any]:
        """The values by the names that :class:`Row` has for them."""
        return dict(vars(self))


def interleave(
    calls: Mapping[str, Callable[[], object]],
    baseline: str,
    *,
    budget: float,
    device: str = "cpu",
    clock: Callable[[Callable[[], object]], float] | None = None,
) -> dict[str, Spread]:
    """Time candidates in turns.

    Args:
        calls: candidate -> what to time. Each is called once more, before the rounds, to warm up; not where the budget
            is 0, as where code is only rehearsed and its times mean nothing.
        baseline: the candidate that the others are compared with.
        budget: seconds that all rounds together may take; between 3 and 15 rounds are made of it.
        device: where the work is done; on a GPU it is waited for.
        clock: seconds that a call takes; None: by the processor's clock, waiting for the device before and after.

    Returns:
        candidate -> its times.
    """

    def wall_clock(call: Callable[[], object]) -> float:
        _wait(device)
        start = time.perf_counter()
        call()
        _wait(device)
        return time.perf_counter() - start

    timed = clock or wall_clock

    for call in calls.values() if budget else ():
        timed(call)
    first = {name: timed(call) for name, call in calls.items()}
    rounds = min(max(int(budget / max(sum(first.values()), 1e-9)), MIN_ROUNDS), MAX_ROUNDS)
    seconds = {name: [value] for name, value in first.items()}
    for _ in range(rounds - 1):
        for name, call in calls.items():
            seconds[name].append(timed(call))
    spreads = {}
    for name, times in seconds.items():
        ratios = [mine / base for mine, base in zip(times, seconds[baseline], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        spreads[name] = Spread(1000 * statistics.median(times), middle, low, high, rounds)
    return spreads


def _one_thread_clock() -> Callable[[Callable[[], object]], float] | None:
    """A clock for :func:`interleave`: with one thread the processor's time, which is that of the work whatever else
    runs on the machine; None with several."""
    return _processor_time if torch.get_num_threads() == 1 else None


def _processor_time(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def direction_calls(
    attend: Callable[[], torch.Tensor], leaves: Sequence[torch.Tensor], gradient: torch.Tensor
) -> dict[str, Callable[[], object]]:
    """What to time of an attention, by direction: without a graph, and with the gradients of all leaves.

    Args:
        attend: makes the output of the leaves; those that it leaves out get no gradient.
        leaves: tensors that want gradients.
        gradient: of the output.
    """

    def forward() -> object:
        with torch.no_grad():
            return attend()

    def both() -> object:
        return torch.autograd.grad(attend(), leaves, gradient, allow_unused=True)

    return dict(zip(DIRECTIONS, (forward, both), strict=True))


def direction_rows(
    place: tuple[str, str, int],
    attentions: Mapping[str, Callable[[], torch.Tensor]],
    baseline: str,
    leaves: Sequence[torch.Tensor],
    gradient: torch.Tensor,
    *,
    budget: float,
    say: Callable[[str], None],
) -> Iterator[Row]:
    """Time attentions on the same tensors, in both directions.

    Args:
        place: suite, case and length of the rows.
        attentions: candidate -> what makes its output of the leaves.
        baseline: the candidate that the others are compared with.
        leaves: as :func:`direction_calls` takes them.
        gradient: likewise.
        budget: seconds for all rounds of a direction.
        say: told what is being timed.
    """
    for direction in DIRECTIONS:
        say(f"{place[0]}, {place[1]}, {direction}")
        calls = {name: direction_calls(attend, leaves, gradient)[direction] for name, attend in attentions.items()}
        for name, spread in interleave(calls, baseline, budget=budget, clock=_one_thread_clock()).items():
            yield Row(*place, name, direction, **spread.fields())


def peak_memory(call: Callable[[], object], device: str = "cpu") -> float | None:
    """Memory that a call needs beyond what the process holds before it, at its peak, in MiB.

    On the CPU the system's high-water mark of the process, which is reset first (Linux; elsewhere None): pages that
    the process already holds and uses again are not seen, so small values are too small.
    """
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        call()
        return float(torch.cuda.max_memory_allocated() - held) / MIB
    try:
        _CLEAR_PEAK.write_text("5", encoding="ascii")
        before = _status_mib("VmRSS")
        call()
        return max(_status_mib("VmHWM") - before, 0.0)
    except OSError:
        return None


def available_memory() -> float | None:
    """Memory that new work may take, in MiB, or None where the system does not say."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return None
    lines = meminfo.read_text(encoding="ascii").splitlines()
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _status_mib(name: str) -> float:
    lines = _STATUS.read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
