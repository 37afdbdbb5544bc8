"""A repository on the Hub as a publication sees it: what a branch holds, and whether and how it may be written.

What was asked for is looked up where it was asked for: a branch holds a run if its newest commit has exactly the run's
files, whatever other branches, earlier commits or tags have. The right to write is asked for only where something is
to be written, and then before anything is uploaded.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # documented, but not in __all__
    get_session,
    hf_raise_for_status,
    validate_repo_id,
)

from ..backbones import SAVED_MODEL_TYPES
from .client import HubError, patiently
from .run_files import CARD, CURVES, TRAVELLING

MAIN = "main"
Files = Mapping[str, Path | bytes]
# Files of an earlier publication that must not stay beside the new ones: another model's shards, its results on
# disturbed data, other code, another tokenizer, pickles.
_STALE = (
    *TRAVELLING,
    "*.safetensors",
    "*.safetensors.index.json",
    "*.bin",
    "*.pt",
    "*.pth",
    "*.pkl",
    "*.ckpt",
    CURVES,
)
# Where one of these is, a repository is ours, even if its configuration was deleted.
_OUR_CODE = frozenset(f"modeling_{model_type}.py" for model_type in SAVED_MODEL_TYPES)
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Found:
    """A repository, seen from one of its branches.

    Attributes:
        exists: whether the repository is there, for this token.
        private: whether it is private.
        tags: name -> commit.
        branches: name -> newest commit.
        head: the newest commit of the branch; None where there is no such branch.
        files: path -> checksum of each file of ``head``: SHA-256 of a large file, else Git's name of the content.
    """

    exists: bool = False
    private: bool = False
    tags: dict[str, str] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    head: str | None = None
    files: dict[str, tuple[str, bool]] = field(default_factory=dict)


def check_repo_id(repo_id: str) -> None:
    """Refuse what cannot be the name of a repository.

    Raises:
        HubError: naming the value and the rule.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise HubError(f"repo_id must be NAME/ID, got {repo_id!r}: {error}") from error


def full_name(api: HfApi, repo_id: str) -> str:
    """``NAME/ID`` for an ``ID`` in the account of the token.

    Raises:
        HubError: if ``repo_id`` is no name, or there is no token to tell whose it is.
    """
    check_repo_id(repo_id)
    return repo_id if "/" in repo_id else f"{_account(api)['name']}/{repo_id}"


def look_at(api: HfApi, repo_id: str, branch: str) -> Found:
    """What is there now.

    Raises:
        HubError: if the Hub cannot be asked, or ``branch`` is the name of something else, which cannot be written to.
    """
    if _COMMIT.fullmatch(branch):
        raise HubError(f"revision must be a branch to publish to, got {branch!r}, which is a commit")
    try:
        info = patiently(f"look at {repo_id}", lambda: api.model_info(repo_id))
    except HubError as error:
        if isinstance(error.__cause__, RepositoryNotFoundError):
            return Found()
        raise
    branches, tags = branches_and_tags(api, repo_id)
    if branch in tags and branch not in branches:
        raise HubError(f"revision must be a branch to publish to, got {branch!r}, which is a tag of {repo_id}")
    head = branches.get(branch)
    files = {} if head is None else list_files(api, repo_id, head)
    return Found(True, bool(info.private), tags, branches, head, files)


def list_files(api: HfApi, repo_id: str, commit: str) -> dict[str, tuple[str, bool]]:
    """Path -> (checksum, whether it is a SHA-256) of the files of a commit; Git's name of the content otherwise."""
    entries = patiently(
        f"list the files of {repo_id}",
        lambda: list(api.list_repo_tree(repo_id, recursive=True, revision=commit)),
    )
    found = {}
    for entry in entries:
        if (blob := getattr(entry, "blob_id", None)) is not None:  # a folder has none
            large = getattr(entry, "lfs", None)
            found[entry.path] = (str(blob), False) if large is None else (str(large.sha256), True)
    return found


def differences(found: Mapping[str, tuple[str, bool]], wanted: Files) -> list[str]:
    """In which files a commit is not what is to be published: ``config.json``, or ``old.py (to be deleted)``.

    Files that people added (a licence text, pictures) are none. The picture of the curves only has to be there: its
    bytes depend on the version of the drawing library.
    """
    wrong = [
        name
        for name, content in wanted.items()
        if name not in found or (name != CURVES and not same_content(content, *found[name]))
    ]
    return sorted(wrong) + [f"{name} (to be deleted)" for name in stale_files(found, wanted)]


def stale_files(found: Mapping[str, Any], wanted: Files) -> list[str]:
    """What an earlier publication left that does not belong to this one."""
    return sorted(name for name in found if name not in wanted and any(fnmatch(name, pattern) for pattern in _STALE))


def same_content(content: Path | bytes, checksum: str, is_sha256: bool) -> bool:
    """Whether a file has a checksum of the Hub: a SHA-256, or Git's SHA-1 of a blob."""
    if is_sha256:
        total = hashlib.sha256()
    else:
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        total = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    if isinstance(content, bytes):
        total.update(content)
    else:
        with content.open("rb") as file:
            while block := file.read(1 << 20):
                total.update(block)
    return total.hexdigest() == checksum


def read_text(api: HfApi, repo_id: str, name: str, revision: str) -> str | None:
    """A text file of a repository; None where there is none."""

    def read() -> str | None:
        with tempfile.TemporaryDirectory() as folder:
            try:
                path = api.hf_hub_download(repo_id, name, revision=revision, local_dir=folder)
            except (RemoteEntryNotFoundError, RevisionNotFoundError):
                return None
            return Path(path).read_bytes().decode("utf-8", errors="replace")

    return patiently(f"read the {name} of {repo_id}", read)


def repository_model_type(api: HfApi, repo_id: str, revision: str) -> str | None:
    """The ``model_type`` that a repository's ``config.json`` names; None without that file."""
    text = read_text(api, repo_id, "config.json", revision)
    if text is None:
        return None
    try:
        return str(json.loads(text).get("model_type"))
    except (ValueError, AttributeError):
        return "a config.json that cannot be read"


def check_purpose(api: HfApi, repo_id: str, found: Found, model_type: str, *, private: bool) -> None:
    """Refuse a repository of something else, or a public one where a private one is wanted.

    Raises:
        HubError: naming the repository and what it holds.
    """
    if not found.exists:
        return
    if private and not found.private:
        raise HubError(f"{repo_id} is public, but private was asked for: choose another repo_id, or change it there")
    head = found.head or found.branches.get(MAIN)  # a new branch starts where main is
    if head is None:
        return
    files = found.files if found.head else list_files(api, repo_id, head)
    holds = repository_model_type(api, repo_id, head) if "config.json" in files else None
    if holds is not None and holds != model_type:
        raise HubError(f"{repo_id} belongs to another model type: it holds {holds}, this run is {model_type}")
    others = set(files) - {".gitattributes", CARD}
    if holds is None and others and _OUR_CODE.isdisjoint(files):
        raise HubError(f"{repo_id} holds files that are no checkpoint of ours ({', '.join(sorted(others)[:3])})")


def check_card(api: HfApi, card: str) -> None:
    """Ask the Hub whether it takes a card, so that a wrong one is found before anything is created or uploaded.

    Raises:
        HubError: with what the Hub finds wrong, e.g. an identifier of a licence that it does not know.
    """

    def ask() -> list[str]:
        response = get_session().post(f"{api.endpoint}/api/validate-yaml", json={"content": card, "repoType": "model"})
        if response.status_code != 400:
            hf_raise_for_status(response)
            return []
        return [str(error.get("message")) for error in response.json().get("errors", [])] or ["no reason given"]

    errors = patiently("have the card checked", ask)
    if errors:
        raise HubError(f"the Hub does not take the card: {' '.join('; '.join(errors).split())}")


def check_licence(api: HfApi, identifier: str) -> None:
    """Ask the Hub whether it knows a licence.

    Raises:
        HubError: if it does not.
    """
    check_card(api, f"---\nlicense: {json.dumps(identifier)}\n---\n")


def check_may_write(api: HfApi, repo_id: str, found: Found) -> None:
    """Refuse a token that may not write.

    Raises:
        HubError: if there is no token, or it may only read, or may not write to this repository.
    """
    if _account(api).get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise HubError("the token may only read: publishing needs one that may write")
    if found.exists:
        patiently(f"write to {repo_id}", lambda: api.auth_check(repo_id, write=True))


def create(api: HfApi, repo_id: str, found: Found, *, private: bool, branch: str) -> str:
    """Create what is missing of repository and branch.

    Returns:
        The newest commit of the branch.
    """
    if not found.exists:
        patiently(f"create the repository {repo_id}", lambda: api.create_repo(repo_id, private=private, exist_ok=True))
    if found.head is None and branch != MAIN:
        patiently(
            f"create the branch {branch} of {repo_id}",
            lambda: api.create_branch(repo_id, branch=branch, exist_ok=True),
        )
    return found.head or head_of(api, repo_id, branch)


def head_of(api: HfApi, repo_id: str, branch: str) -> str:
    """The newest commit of a branch.

    Raises:
        HubError: if there is no such branch.
    """
    branches, _ = branches_and_tags(api, repo_id)
    if branch not in branches:
        raise HubError(f"{repo_id} has no branch {branch}")
    return branches[branch]


def branches_and_tags(api: HfApi, repo_id: str) -> tuple[dict[str, str], dict[str, str]]:
    """Name -> commit of the branches, and of the tags."""
    refs = patiently(f"list the branches and tags of {repo_id}", lambda: api.list_repo_refs(repo_id))
    branches, tags = ({ref.name: str(ref.target_commit) for ref in kind} for kind in (refs.branches, refs.tags))
    return branches, tags


def commit_files(api: HfApi, repo_id: str, wanted: Files, *, branch: str, head: str, title: str) -> str:
    """Make a branch hold exactly these files, in one commit on top of ``head``.

    What is on the Hub already is not uploaded again, so it may be repeated after a failure. Where somebody else has
    committed meanwhile, nothing is changed.

    Returns:
        The commit, which has been looked at: it holds the files.

    Raises:
        HubError: if the Hub refuses, or makes something else of the files.
    """

    def send() -> str:
        now = head_of(api, repo_id, branch)
        if now != head and not differences(list_files(api, repo_id, now), wanted):
            return now  # an earlier attempt, whose answer was lost
        operations: list[Any] = [
            CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
            for name, content in wanted.items()
        ]
        operations += [CommitOperationDelete(path) for path in stale_files(list_files(api, repo_id, head), wanted)]
        try:
            made = api.create_commit(repo_id, operations, commit_message=title, revision=branch, parent_commit=head)
        except ValueError as error:
            if isinstance(error, HfHubHTTPError):
                raise  # `patiently` words it
            raise HubError(f"could not upload to {repo_id}: {' '.join(str(error).split())}") from error
        return str(made.oid)

    commit = patiently(f"upload to {repo_id}", send)
    if wrong := differences(list_files(api, repo_id, commit), wanted):
        raise HubError(
            f"{repo_id} at {commit} does not hold what was sent: {', '.join(wrong)} (is there a .gitignore?); it is "
            "not verified and has no tag"
        )
    return commit


def _account(api: HfApi) -> dict[str, Any]:
    if get_token() is None:
        raise HubError("there is no token: log in with `hf auth login`, or set HF_TOKEN")
    return dict(patiently("ask who the token belongs to", api.whoami))
