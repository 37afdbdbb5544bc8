"""From a finished run to a published checkpoint that has been downloaded again and found to be the same.

The order matters: everything that can be wrong with the run is found before the Hub is asked; one commit holds all
files; the commit is downloaded into an empty cache by a process without this package, and compared; only then is it
tagged. Whatever goes wrong on the way, a tag never names something half-published, and the same call goes on from
where it ended.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import (
    HFValidationError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented, but not in __all__

from . import fresh_process
from .client import HubError, connect, patiently
from .run_files import CARD, Contents, contents, read_run

MAIN = "main"
_VERIFICATIONS = 3
# Files of an earlier publication that must not stay beside the new ones: another model's shards, other code, pickles.
_STALE = ("*.py", "*.safetensors", "*.safetensors.index.json", "*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
# Variables that would lead the verifying process to another cache or login than its own.
_OTHER_PLACES = (
    "HF_ASSETS_CACHE", "HF_HUB_CACHE", "HF_MODULES_CACHE", "HF_TOKEN", "HF_TOKEN_PATH", "HF_XET_CACHE",
    "HUGGINGFACE_HUB_CACHE", "PYTHONPATH", "TRANSFORMERS_CACHE",
)  # fmt: skip


@dataclass(frozen=True)
class Publication:
    """What has been published.

    Attributes:
        repo_id: ``NAME/ID``.
        url: of the repository.
        revision: the commit, 40 hexadecimal digits; nobody can change what it names.
        tag: the tag on it.
        model_class: class that a process without this package loads.
    """

    repo_id: str
    url: str
    revision: str
    tag: str
    model_class: str

    def __str__(self) -> str:
        return (
            f"{self.model_class} loads without this package and gives the run's own outputs\n"
            f"published: {self.url}\nrevision:  {self.revision} (tag {self.tag})"
        )


def publish(
    run: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    endpoint: str | None = None,
    baseline: str | Path | None = None,
    license: str = "apache-2.0",  # noqa: A002  # the Hub's name of the field
    dry_run: bool = False,
) -> Publication | None:
    """Publish a finished training run: weights, code, record, curves and card, verified and tagged.

    Args:
        run: folder of a finished run.
        repo_id: ``NAME/ID``; without ``NAME/`` the account of the token.
        private: create the repository as a private one.
        revision: the branch to commit to, created where it is missing; None: ``main``.
        endpoint: URL of the Hub; None: ``HF_ENDPOINT``, else the public one.
        baseline: folder or results file of a run of the same recipe, to stand beside it in the card.
        license: of the licence, as the Hub knows it.
        dry_run: make the card and list the files; the Hub is not asked.

    Returns:
        What was published; None after a dry run.

    Raises:
        UsageError: if the run or its baseline cannot be published (see :func:`.run_files.read_run`).
        HubError: if the Hub refuses, or what comes back from it is not what was sent.
    """
    from ..cards.rendering import load_results

    check_repo_id(repo_id)
    checked = read_run(run)
    other = None if baseline is None else load_results(baseline)
    if dry_run:
        planned = contents(checked, repo_id, other, license)
        print(f"would publish {repo_id} as {planned.tag}:\n{file_table(planned)}\nnothing was sent")
        return None
    api = connect(endpoint)
    branch = revision or MAIN
    repo_id = prepare_repository(api, repo_id, checked.config["model_type"], private=private, branch=branch)
    planned = contents(checked, repo_id, other, license)
    commit = _tagged_commit(api, repo_id, planned.tag)
    if commit is None:
        print(f"uploading to {api.endpoint}/{repo_id}:\n{file_table(planned)}", flush=True)
        commit = _commit(api, repo_id, planned, branch)
        print(f"committed as {commit}; verifying in a fresh process", flush=True)
        found = verify(api, repo_id, commit, checked.folder)
        patiently(
            f"tag {repo_id} as {planned.tag}",
            lambda: api.create_tag(repo_id, tag=planned.tag, revision=commit, exist_ok=True),
        )
    else:
        print(f"{repo_id} has this content already, as {planned.tag}; verifying it again", flush=True)
        found = verify(api, repo_id, commit, checked.folder)
    return Publication(repo_id, f"{api.endpoint}/{repo_id}", commit, planned.tag, found["class"])


def check_repo_id(repo_id: str) -> None:
    """Refuse what cannot be the name of a repository.

    Raises:
        HubError: naming the value and the rule.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise HubError(f"repo_id must be NAME/ID, got {repo_id!r}: {error}") from error


def prepare_repository(api: HfApi, repo_id: str, model_type: str, *, private: bool, branch: str = MAIN) -> str:
    """Make sure that a token may write, that the repository is there, and that it is for this type of model.

    Args:
        api: from :func:`.client.connect`.
        repo_id: ``NAME/ID``, or ``ID`` in the account of the token.
        model_type: of the checkpoint to come.
        private: what a new repository becomes; an existing public one is refused then.
        branch: is created where it is missing.

    Returns:
        The full ``NAME/ID``.

    Raises:
        HubError: without a token that may write, or for a repository that holds something else.
    """
    check_repo_id(repo_id)
    if get_token() is None:
        raise HubError("there is no token: log in with `hf auth login`, or set HF_TOKEN")
    account = patiently("ask who the token belongs to", api.whoami)
    if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise HubError("the token may only read: publishing needs one that may write")
    if "/" not in repo_id:
        repo_id = f"{account['name']}/{repo_id}"
    _check_holds(api, repo_id, model_type, private, branch)
    patiently(f"create the repository {repo_id}", lambda: api.create_repo(repo_id, private=private, exist_ok=True))
    if branch != MAIN:
        patiently(
            f"create the branch {branch} of {repo_id}",
            lambda: api.create_branch(repo_id, branch=branch, exist_ok=True),
        )
    return repo_id


def _check_holds(api: HfApi, repo_id: str, model_type: str, private: bool, branch: str) -> None:
    """Refuse an existing repository of something else, or a public one where a private one is wanted."""
    try:
        info = patiently(f"look at {repo_id}", lambda: api.model_info(repo_id))
    except HubError as error:
        if isinstance(error.__cause__, RepositoryNotFoundError):
            return
        raise
    if private and not info.private:
        raise HubError(f"{repo_id} is public, but private was asked for: choose another repo_id, or change it there")
    found = repository_model_type(api, repo_id, branch)
    if found is not None and found != model_type:
        raise HubError(f"{repo_id} belongs to another model type: it holds {found}, this run is {model_type}")
    if found is None:
        others = set(_files(api, repo_id, branch)) - {".gitattributes", CARD}
        if others:
            raise HubError(f"{repo_id} holds files that are no checkpoint of ours ({', '.join(sorted(others)[:3])})")


def repository_model_type(api: HfApi, repo_id: str, revision: str) -> str | None:
    """The ``model_type`` that a repository's ``config.json`` names; None without that file."""

    def read() -> str | None:
        with tempfile.TemporaryDirectory() as folder:
            try:
                path = api.hf_hub_download(repo_id, "config.json", revision=revision, local_dir=folder)
            except (RemoteEntryNotFoundError, RevisionNotFoundError):
                return None
            try:
                return str(json.loads(Path(path).read_text(encoding="utf-8")).get("model_type"))
            except (ValueError, AttributeError):
                return "a config.json that cannot be read"

    return patiently(f"read the config.json of {repo_id}", read)


def _files(api: HfApi, repo_id: str, branch: str) -> list[str]:
    def read() -> list[str]:
        try:
            return api.list_repo_files(repo_id, revision=branch)
        except RevisionNotFoundError:
            return []

    return patiently(f"list the files of {repo_id}", read)


def _tagged_commit(api: HfApi, repo_id: str, tag: str) -> str | None:
    refs = patiently(f"list the tags of {repo_id}", lambda: api.list_repo_refs(repo_id))
    return next((ref.target_commit for ref in refs.tags if ref.name == tag), None)


def _commit(api: HfApi, repo_id: str, planned: Contents, branch: str) -> str:
    """One commit of all files; what is there already is not uploaded again, so it may be repeated after a failure."""
    stale = [
        path
        for path in _files(api, repo_id, branch)
        if path not in planned.files and any(fnmatch(path, pattern) for pattern in _STALE)
    ]

    def send() -> str:
        operations: list[Any] = [
            CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
            for name, content in planned.files.items()
        ]
        operations += [CommitOperationDelete(path) for path in stale if path in _files(api, repo_id, branch)]
        return str(api.create_commit(repo_id, operations, commit_message=planned.tag, revision=branch).oid)

    return patiently(f"upload to {repo_id}", send)


def verify(api: HfApi, repo_id: str, commit: str, folder: Path) -> dict[str, Any]:
    """Download a commit into an empty cache, in a process without this package, and compare it with the run.

    Returns:
        What :func:`.fresh_process.check` found.

    Raises:
        HubError: if the checksums or the outputs on a probe are not those of the run, or it cannot be loaded.
    """
    for _ in range(_VERIFICATIONS):
        found = _run_fresh_process(api.endpoint, repo_id, commit, folder)
        if not found.get("again"):
            break
    if "error" in found:
        raise HubError(
            f"{repo_id} at {commit} was uploaded, but is not verified and has no tag: {found['error']}. Publishing "
            "again goes on from there"
        )
    return found


def _run_fresh_process(endpoint: str, repo_id: str, commit: str, folder: Path) -> dict[str, Any]:
    token = get_token()
    with tempfile.TemporaryDirectory(prefix="hf_imgproc_attn_verify_") as home:
        environment = {
            **os.environ, "HF_HOME": home, "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }  # fmt: skip
        for name in _OTHER_PLACES:
            environment.pop(name, None)
        if token is not None:
            environment["HF_TOKEN"] = token  # the login is a file of the usual HF_HOME
        command = [sys.executable, "-I", str(fresh_process.__file__), repo_id, commit, str(folder.resolve())]
        done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True)
    try:
        return dict(json.loads(done.stdout.splitlines()[-1]))
    except (ValueError, IndexError):
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        return {"error": f"it cannot be loaded: {last[0]}", "again": False}


def file_table(planned: Contents) -> str:
    """The files of a publication with their sizes, one a line."""
    sizes = {
        name: len(content) if isinstance(content, bytes) else content.stat().st_size
        for name, content in planned.files.items()
    }
    return "\n".join(f"  {size:>13,}  {name}" for name, size in sorted(sizes.items()))
