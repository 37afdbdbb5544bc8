"""Whether a checkpoint is what it should be, found out in a process of its own: before it is sent, and after.

What that process does is in :mod:`.fresh_process`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token

from ..errors import UsageError
from . import fresh_process
from .client import HubError
from .run_files import RunFolder, travelling_files

_VERIFICATIONS = 3
# Variables that would lead the verifying process to another cache or login than its own.
_OTHER_PLACES = (
    "HF_ASSETS_CACHE", "HF_HUB_CACHE", "HF_MODULES_CACHE", "HF_TOKEN", "HF_TOKEN_PATH", "HF_XET_CACHE",
    "HUGGINGFACE_HUB_CACHE", "PYTHONPATH", "TRANSFORMERS_CACHE",
)  # fmt: skip


def check_loads(run: RunFolder) -> None:
    """Load what would be published in a process without this package, before anything is sent.

    Raises:
        UsageError: if configuration, weights and code do not make a model, or its processor cannot be loaded.
    """
    with _staged(run) as folder:
        found = _run_fresh_process(None, str(folder))
    if "error" in found:
        raise UsageError(f"run {str(run.folder)!r} cannot be published: {found['error']}")


@contextmanager
def _staged(run: RunFolder) -> Iterator[Path]:
    """A folder with the files that travel and no others."""
    with tempfile.TemporaryDirectory(prefix="hf_imgproc_attn_run_") as name:
        for path in travelling_files(run.folder).values():
            place = Path(name) / path.name
            try:
                place.symlink_to(path.resolve())
            except OSError:  # not every system allows links
                shutil.copy(path, place)
        yield Path(name)


def verify(api: HfApi, repo_id: str, commit: str, folder: Path, *, is_tagged: bool = False) -> dict[str, Any]:
    """Download a commit into an empty cache, in a process without this package, and compare it with the run.

    Returns:
        What :func:`.fresh_process.check` found.

    Raises:
        HubError: if the checksums or the outputs on a probe are not those of the run, or it cannot be loaded.
    """
    for _ in range(_VERIFICATIONS):
        found = _run_fresh_process(api.endpoint, repo_id, commit, str(folder.resolve()))
        if not found.get("again"):
            break
    if "error" in found:
        state = "has been published before, but is not verified" if is_tagged else "is not verified and has no tag"
        raise HubError(f"{repo_id} at {commit} {state}: {found['error']}. Publishing again goes on from there")
    return found


def _run_fresh_process(endpoint: str | None, *arguments: str) -> dict[str, Any]:
    """Run :mod:`.fresh_process`; without an endpoint it is offline."""
    token = get_token()
    with tempfile.TemporaryDirectory(prefix="hf_imgproc_attn_verify_") as home:
        offline = "1" if endpoint is None else "0"
        environment = {
            **os.environ, "HF_HOME": home, "HF_HUB_OFFLINE": offline, "TRANSFORMERS_OFFLINE": offline,
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }  # fmt: skip
        for name in _OTHER_PLACES:
            environment.pop(name, None)
        if endpoint is not None:
            environment["HF_ENDPOINT"] = endpoint
            if token is not None:
                environment["HF_TOKEN"] = token  # the login is a file of the usual HF_HOME
        command = [sys.executable, "-I", str(fresh_process.__file__), *arguments]
        done = subprocess.run(
            command, cwd=home, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
    try:
        return dict(json.loads(done.stdout.splitlines()[-1]))
    except (ValueError, IndexError):
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        return {"error": f"it cannot be loaded: {last[0]}", "again": False}
