"""The environment of every test: offline, a private Hugging Face cache, single-threaded processes.

It is set before anything imports transformers or torch, and sub-processes that a test starts inherit it.
"""

from __future__ import annotations

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.helpers import ROOT, RunPython

# A private cache: tests neither see nor change what the user has downloaded, nor another worker's dynamic modules.
_HF_HOME = tempfile.mkdtemp(prefix="hf_imgproc_attn_tests_")
atexit.register(shutil.rmtree, _HF_HOME, ignore_errors=True)
os.environ.update(
    HF_HOME=_HF_HOME,
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    MPLBACKEND="Agg",
    TOKENIZERS_PARALLELISM="false",
)
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def run_python(tmp_path: Path) -> RunPython:
    """``run_python(*arguments, path=ROOT)``: a fresh interpreter in an empty folder; ``path`` is first on sys.path."""

    def run(
        *arguments: str, path: Path = ROOT, cwd: Path | None = None, timeout: float = 300
    ) -> subprocess.CompletedProcess[str]:
        folder = cwd or tmp_path / "cwd"
        folder.mkdir(exist_ok=True)
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(path)},
            capture_output=True,
            text=True,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
        )

    return run
