"""A part of the check for the runner's tests: its cases do what a GPU's worst cases do, in worker processes."""

from __future__ import annotations

import os
import time
from functools import partial
from typing import Any

from hf_imgproc_attn.measure.gpu_check import worker
from hf_imgproc_attn.measure.gpu_check.parts import Bench, Case, Refused, Wrong

ENDING = ("lost", "killed", "hangs")


def cases(bench: Bench) -> list[Case]:
    """One of each kind of ending, then cases that wait, read what was measured before, and count.

    A folder with a file ``calm`` leaves out those that end their process.
    """
    assert bench.data is not None
    calm = (bench.data / "calm").exists()
    worker._device_is_lost = lambda device: (bench.data / "device lost").exists()  # type: ignore[operator]
    found = [
        Case("good", partial(count, bench, "good"), about={"kind": "fine"}),
        Case("nan", lambda seconds_left: {"values": [float("nan"), 0.123456789, float("inf")]}),
        Case("wrong", wrong),
        Case("refused", refused),
        Case("no kernel", no_kernel),
        Case("exception", partial(fail, bench)),
        Case("lost", partial(lose_device, bench)),
        Case("killed", lambda seconds_left: os.abort()),  # type: ignore[arg-type]
        Case("hangs", partial(hang, bench), seconds=0.5),
        Case("waits", partial(wait, bench)),
        Case("earlier", partial(earlier, bench)),
        Case("last", partial(count, bench, "last")),
    ]
    return [case for case in found if not (calm and case.name in ENDING)]


def count(bench: Bench, name: str, seconds_left: float) -> dict[str, Any]:
    """How often this case has been run."""
    assert bench.data is not None
    runs = bench.data / f"runs of {name}"
    runs.write_text(runs.read_text(encoding="utf-8") + "x" if runs.exists() else "x", encoding="utf-8")
    return {"runs": len(runs.read_text(encoding="utf-8")), "seconds_left": seconds_left}


def wrong(seconds_left: float) -> dict[str, Any]:
    raise Wrong("three times too large", {"error": 3.0})


def refused(seconds_left: float) -> dict[str, Any]:
    raise Refused("cannot be had")


def no_kernel(seconds_left: float) -> dict[str, Any]:
    raise RuntimeError("No available kernel. Aborting execution.")


def fail(bench: Bench, seconds_left: float) -> dict[str, Any]:
    assert bench.data is not None
    if (bench.data / "mended").exists():
        return {}
    raise ValueError(f"what is in {__file__} is broken\nin two lines")


def lose_device(bench: Bench, seconds_left: float) -> dict[str, Any]:
    """An error after which every call of the process would fail."""
    assert bench.data is not None
    (bench.data / "device lost").touch()
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def hang(bench: Bench, seconds_left: float) -> dict[str, Any]:
    """The process after the one that lost its device is a fresh one; here it hangs until it is killed."""
    assert bench.data is not None
    (bench.data / "device lost").unlink(missing_ok=True)
    print("compiling ...", flush=True)
    time.sleep(600)
    return {}


def wait(bench: Bench, seconds_left: float) -> dict[str, Any]:
    """Waits, if it is asked to, for a file."""
    assert bench.data is not None
    (bench.data / "beginning").write_text(str(os.getpid()), encoding="utf-8")
    (bench.data / "beginning").rename(bench.data / "waiting")
    while (bench.data / "wait").exists():
        time.sleep(0.02)
    return {}


def earlier(bench: Bench, seconds_left: float) -> dict[str, Any]:
    """What a case can know of those before it."""
    return {"known": sorted(bench.earlier)}
