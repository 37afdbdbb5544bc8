"""The runner's end of a worker process: start, ask, wait for so long, kill."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[3]
_CODE = "from hf_imgproc_attn.measure.gpu_check.worker import main; main()"
_TAIL = 3000


class Child:
    """A worker process.

    Args:
        order: the first line for it, see :mod:`.worker`.
        workers: how many run at a time, among whom the processor's cores are shared.
    """

    def __init__(self, order: dict[str, Any], workers: int) -> None:
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CODE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            encoding="utf-8",
            env=_environment(order["device"], workers),
            process_group=0,  # compilers that it starts end with it
        )
        self._answers: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.send(order)

    def _read(self) -> None:
        stdout = self._process.stdout
        with contextlib.suppress(ValueError, OSError):  # closed by `stop`
            for line in stdout or ():
                self._answers.put(line)
        self._answers.put(None)

    def send(self, message: dict[str, Any]) -> None:
        """Send a line; a process that has ended shows at the next :meth:`receive`."""
        stdin = self._process.stdin
        with contextlib.suppress(BrokenPipeError, ValueError):
            if stdin is not None:
                stdin.write(json.dumps(message) + "\n")
                stdin.flush()

    def receive(self, seconds: float) -> dict[str, Any] | None:
        """The next line.

        Returns:
            None if the process has ended.

        Raises:
            TimeoutError: if nothing came in time.
        """
        try:
            line = self._answers.get(timeout=max(seconds, 0.0))
        except queue.Empty:
            raise TimeoutError from None
        if line is None:
            return None
        answer: dict[str, Any] = json.loads(line)
        return answer

    def how_it_ended(self) -> str:
        """Exit status of a process that has ended, and the end of what it and its libraries printed."""
        try:
            status = self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            return "closed its output and runs on"
        words = f"exit status {status}" if status >= 0 else f"killed by signal {signal.Signals(-status).name}"
        return f"{words}\n{self.printed()}".strip()

    def printed(self) -> str:
        """The end of what the process printed."""
        self._log.seek(0)
        return self._log.read()[-_TAIL:]

    def stop(self) -> None:
        """End the process and those that it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may hold on to it: then nothing waits for it
            self._process.wait(timeout=10)
        self._reader.join(timeout=5)
        for stream in (self._process.stdin, self._process.stdout, self._log):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()


def _environment(device: str, workers: int) -> dict[str, str]:
    environment = dict(os.environ)
    # The package need not be installed: it is found where this file is.
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    cores = max(1, (os.cpu_count() or 1) // workers)
    environment.setdefault("OMP_NUM_THREADS", str(cores))
    environment.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(cores))
    if device == "cpu":
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    else:
        environment.pop("TRITON_INTERPRET", None)
    return environment
