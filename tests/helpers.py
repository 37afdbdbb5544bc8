"""What several test files share."""

from __future__ import annotations

import atexit
import contextlib
import functools
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent


def pairwise_cover(axes: Sequence[Sequence[Any]]) -> list[tuple[Any, ...]]:
    """Few combinations in which every pair of values of two axes occurs; the same whenever it is asked for."""
    sizes = [len(values) for values in axes]
    everything = np.array(list(itertools.product(*map(range, sizes))), dtype=int).reshape(-1, len(axes))
    pairs = [
        (everything[:, one] * sizes[other] + everything[:, other], np.ones(sizes[one] * sizes[other], dtype=int))
        for one, other in itertools.combinations(range(len(axes)), 2)
    ]
    rows = []
    while any(missing.any() for _, missing in pairs):
        best = int(np.argmax(sum(missing[of_row] for of_row, missing in pairs)))
        for of_row, missing in pairs:
            missing[of_row[best]] = 0
        rows.append(tuple(values[index] for values, index in zip(axes, everything[best], strict=True)))
    return rows


def each_value_once(rows: Sequence[Sequence[Hashable]]) -> set[int]:
    """The indices of few rows in which each value of a row occurs; pairs of values that were chosen seldom come first.

    A value that may stand at several places of a row must say at which it stands. All rows have as many values.
    """
    numbers: dict[Hashable, int] = {}
    values = np.array([[numbers.setdefault(value, len(numbers)) for value in row] for row in rows], dtype=int)
    one, other = np.triu_indices(values.shape[1] if rows else 0, 1)
    pairs = values[:, one] * len(numbers) + values[:, other] if rows else values
    pairs = np.unique(pairs, return_inverse=True)[1].reshape(pairs.shape)
    missing, chosen = np.ones(len(numbers), dtype=bool), set()
    uses, uses_of_pairs = np.zeros(len(numbers), dtype=int), np.zeros(pairs.size, dtype=int)
    while missing.any():
        new = missing[values].sum(1)
        candidates = np.flatnonzero(new == new.max())
        keys = uses_of_pairs[pairs[candidates]].sum(1), uses[values[candidates]].sum(1)
        best = int(candidates[np.lexsort((keys[1], keys[0]))[0]])
        chosen.add(best)
        missing[values[best]] = False
        uses[values[best]] += 1
        uses_of_pairs[pairs[best]] += 1
    return chosen


def readable_id(value: Any) -> str | None:
    """A parametrised value in a test's name, the same in every process; None where pytest has a good name itself."""
    if value is None or isinstance(value, (bool, int, float, complex, str, type)) or hasattr(value, "__name__"):
        return None
    return " ".join(_word(value).split())[:70]


def _word(value: Any) -> str:
    if isinstance(value, dict):
        return ",".join(f"{_word(name)}={_word(part)}" for name, part in value.items()) or "{}"
    if isinstance(value, (list, tuple)):
        separator = "x" if value and all(type(part) is int for part in value) else ","
        return separator.join(map(_word, value)) or ("[]" if isinstance(value, list) else "()")
    if isinstance(value, (set, frozenset)):
        return ",".join(sorted(map(_word, value))) or "{}"
    if isinstance(value, slice):
        return f"{value.start}:{value.stop}"
    if hasattr(value, "dtype") and hasattr(value, "shape"):  # an array or a tensor
        return f"{_word(value.dtype)}[{_word(tuple(value.shape))}]"
    if hasattr(value, "__name__"):
        return str(value.__name__)
    word = str(value).removeprefix("torch.")
    return type(value).__name__ if " at 0x" in word else word


def site_pages() -> list[str]:
    """The pages of the documentation's site, in the order of its navigation."""
    import yaml

    def pages_of(entry: Any) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        parts = entry.values() if isinstance(entry, dict) else entry
        return [page for part in parts for page in pages_of(part)]

    return pages_of(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])


RunPython = Callable[..., "subprocess.CompletedProcess[str]"]
"""The type of the fixture ``run_python``."""


@contextlib.contextmanager
def started(command: Sequence[str | Path], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A process with its output in pipes; it and everything that it started end with the block, however that ends."""
    options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    process = subprocess.Popen(command, text=True, start_new_session=True, **options)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()


def run_command(
    command: Sequence[str | Path], *, timeout: float = 300, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run a command without standard input and return its status and output.

    Unlike :func:`subprocess.run`, which at the end of the time kills one process and then waits for as long as another
    that it started holds the pipes, this fails in time, with what was printed.
    """
    with started(command, **options) as process:
        try:
            out, error = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, error = process.communicate()
            pytest.fail(f"{command} ran for more than {timeout} s\n{out[-3000:]}\n{error[-3000:]}")
    return subprocess.CompletedProcess(command, process.returncode, out, error)


@functools.cache
def prepared_python() -> str:
    """The path of an interpreter, for command lines, that has what is slow to import already.

    Its processes have never heard of Transformers, of huggingface_hub or of this package, and cost a second where
    those of ``sys.executable`` cost five. ``tests/prepared/server.py`` forks them; where it cannot, for the options or
    the environment asked for, a real interpreter does the work. Not for tests of memory, of start-up or of signals.
    """
    python = contextlib.ExitStack()
    atexit.register(python.close)
    return python.enter_context(interpreter_that_knows((), {}))


@contextlib.contextmanager
def interpreter_that_knows(modules: Sequence[str], changes: Mapping[str, str]) -> Iterator[str]:
    """Likewise, of an interpreter whose processes have imported more, in another environment, while the block lasts.

    Args:
        modules: what is imported beside what is slow, if need be Transformers and this package.
        changes: of this process's environment. A command in which a variable that these modules read has another value
            gets what :func:`prepared_python` gives.
    """
    if not sys.platform.startswith("linux"):
        yield sys.executable
        return
    code = ROOT / "tests" / "prepared"
    folder = Path(tempfile.mkdtemp(prefix="hf_imgproc_attn_python_"))
    environment = {**os.environ, **changes}
    other = prepared_python() if modules else sys.executable
    settings = {"python": other, "environment": environment, "knows_more": bool(modules)}
    (folder / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
    file = folder / "python"
    file.write_text(f'#!/bin/sh\nexec {sys.executable} -IS {code / "client.py"} {folder} "$@"\n', encoding="utf-8")
    file.chmod(0o755)
    if "PYTHONPATH" not in changes:
        environment = {name: value for name, value in environment.items() if name != "PYTHONPATH"}
    environment["JE_ARROW_MALLOC_CONF"] = "background_thread:false"  # a process that forks has no other thread
    # It ends with its standard input, at the latest when this process ends.
    server = subprocess.Popen(
        [sys.executable, "-P", code / "server.py", folder / "socket", *modules],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 300
        while not (folder / "socket").exists():
            assert server.poll() is None, "the process that forks has ended"
            assert time.monotonic() < deadline, "the process that forks has not started in 300 s"
            time.sleep(0.05)
        yield str(file)
    finally:
        assert server.stdin is not None
        server.stdin.close()
        server.wait(60)
        shutil.rmtree(folder, ignore_errors=True)
