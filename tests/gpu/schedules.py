"""The wavefront's programs really side by side: Triton's interpreter runs them one after another, this in threads.

That they can run so is particular to these kernels: they take their number from a counter in memory and never ask for
the place in the grid, which the interpreter keeps in one variable.
"""

from __future__ import annotations

import contextlib
import inspect
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import torch
import triton.language as tl  # noqa: F401  # the interpreter looks for it beside what it runs
from triton.runtime import interpreter

from hf_imgproc_attn.gpu import fused

LENGTH, ITEMS = 200, 2
"""Four blocks of 64 for each of two heads: eight programs."""
_LIMIT = 60.0
"""Seconds after which programs that wait for one another are given up."""


@contextlib.contextmanager
def side_by_side(at_once: int, late: float = 0.0) -> Iterator[list[int]]:
    """Run the wavefront's programs in so many threads; yields how many programs each kernel had.

    All are held up for a moment at every atomic operation, and the one that started first for ``late`` seconds.
    """
    usual, rmw = interpreter.GridExecutor.__call__, interpreter.InterpreterBuilder.create_atomic_rmw
    local, pauses, programs = threading.local(), random.Random(at_once), []

    def execute(self: Any, *args: Any, **kwargs: Any) -> None:
        if not self.fn.__name__.startswith("wavefront"):
            return usual(self, *args, **kwargs)
        one_program, grid, size = self.fn, self.grid, 0

        def every_program(**arguments: Any) -> None:
            with ThreadPoolExecutor(at_once) as pool:
                started = [pool.submit(_of_a_new_program, local, one_program, arguments) for _ in range(size)]
                for program in started:
                    program.result(_LIMIT)
            programs.append(size)

        def one_call(arguments: dict[str, Any]) -> tuple[int]:
            nonlocal size
            (size,) = grid(arguments)
            return (1,)

        every_program.__signature__ = inspect.signature(one_program)  # type: ignore[attr-defined]
        self.fn, self.grid = every_program, one_call
        return usual(self, *args, **kwargs)

    def atomic(self: Any, *args: Any) -> Any:
        time.sleep(pauses.random() * 1e-3)
        found = rmw(self, *args)
        if getattr(local, "is_new", False):
            local.is_new = False
            time.sleep(late * (int(found.data.item()) == 0))
        return found

    with (
        mock.patch.object(interpreter.GridExecutor, "__call__", execute),
        mock.patch.object(interpreter.InterpreterBuilder, "create_atomic_rmw", atomic),
    ):
        yield programs


def _of_a_new_program(local: threading.local, program: Any, arguments: dict[str, Any]) -> None:
    local.is_new = True
    program(**arguments)


@contextlib.contextmanager
def nothing_to_read() -> Iterator[None]:
    """Rows that no program has written hold NaN: W, -H and what is beside them."""

    def poisoned(function: Any) -> Any:
        def empty(*args: Any, **kwargs: Any) -> torch.Tensor:
            rows: torch.Tensor = function(*args, **kwargs)
            return rows.fill_(float("nan")) if rows.is_floating_point() else rows

        return empty

    with (
        mock.patch.object(torch, "empty", poisoned(torch.empty)),
        mock.patch.object(torch, "empty_like", poisoned(torch.empty_like)),
    ):
        yield


def _results() -> list[torch.Tensor]:
    """Output and gradients of one causal call, which the schedule must not change."""
    generator = torch.Generator().manual_seed(5)
    query, key, value, grad = (torch.randn(1, ITEMS, LENGTH, 16, generator=generator) for _ in range(4))
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    out = fused.fused_attention(*leaves, is_causal=True, algorithm="wavefront")
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def _difference(got: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    """The largest; infinite where something is not a number."""
    found = torch.stack([(mine - other).abs().max() for mine, other in zip(got, wanted, strict=True)]).max()
    return float(found) if found.isfinite() else float("inf")


def schedules() -> dict[str, Any]:
    """Largest differences from programs one after another, by threads; and without waiting, which must go wrong."""
    wanted, found = _results(), {}
    programs: list[int] = []
    for at_once in (1, 8):
        with side_by_side(at_once, late=0.05 * (at_once > 1)) as started, nothing_to_read():
            found[str(at_once)] = _difference(_results(), wanted)
        programs += started
    finished = torch.full((1 + ITEMS,), 10**6, dtype=torch.int32)
    finished[0] = 0
    with (
        mock.patch.object(fused, "_flags", side_effect=lambda query: finished.clone()),
        side_by_side(8, late=0.5),
        nothing_to_read(),
    ):
        without_waiting = _difference(_results(), wanted)
    return {"schedules": {"differences": found, "programs": programs, "without_waiting": str(without_waiting)}}
