"""What the tests' Hub server keeps: accounts, repositories, their commits and files, in memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from itertools import pairwise
from typing import Any

#: Files the Hub wants in large-file storage whatever their size (the `.gitattributes` of a new repository).
_SUFFIXES = (
    ".7z .arrow .avro .bin .bz2 .ckpt .ftz .gif .gz .h5 .jpeg .jpg .joblib .mlmodel .model .mp4 .msgpack .npy .npz "
    ".onnx .ot .parquet .pb .pdf .pickle .pkl .png .pt .pth .rar .safetensors .tar .tflite .tgz .wasm .wav .webp .xz "
    ".zip .zst"
)
LFS_SUFFIXES = tuple(_SUFFIXES.split())
#: Larger files go to large-file storage whatever their name, in bytes.
REGULAR_LIMIT = 10 * 2**20

_GITATTRIBUTES = "".join(
    f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in (*LFS_SUFFIXES, "tfevents*")
).encode()


class HubError(Exception):
    """An answer with an error: the status and the two headers that the client reads.

    ``violation`` says that no correct client would have asked, so the test must fail.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        *,
        violation: bool = False,
        headers: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.violation = violation
        line = message.splitlines()[0].encode("ascii", "backslashreplace").decode()
        self.headers = {"X-Error-Message": line, **(headers or {})}
        if code is not None:
            self.headers["X-Error-Code"] = code
        self.body = {"error": message, **(body or {})}


def breach(message: str, status: int = 400) -> HubError:
    """An error that is the client's breach of the protocol."""
    return HubError(status, message, violation=True)


@dataclass(frozen=True)
class Account:
    """One token: whose it is, the organizations beside the own namespace, and its role."""

    name: str
    role: str
    orgs: tuple[str, ...] = ()

    def owns(self, repo_id: str) -> bool:
        return repo_id.partition("/")[0] in (self.name, *self.orgs)


def wants_lfs(path: str, size: int) -> bool:
    """Whether the Hub stores a file of this name and size in large-file storage."""
    return size > 0 and (size >= REGULAR_LIMIT or path.endswith(LFS_SUFFIXES) or "tfevents" in path.split("/")[-1])


def git_oid(content: bytes) -> str:
    """Git's name of a blob."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass(frozen=True)
class Blob:
    """A file's content; git holds a pointer in its place where it is in large-file storage."""

    content: bytes
    lfs: bool

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        head = "version https://git-lfs.github.com/spec/v1"
        return f"{head}\noid sha256:{self.sha256}\nsize {len(self.content)}\n".encode()

    @cached_property
    def oid(self) -> str:
        return git_oid(self.pointer if self.lfs else self.content)

    @property
    def remote_oid(self) -> str:
        """What the client compares its own file with: the large file's hash, or git's of a regular one."""
        return self.sha256 if self.lfs else self.oid


@dataclass(frozen=True)
class Commit:
    """A commit; ``files`` is the whole tree, by path."""

    sha: str
    title: str
    message: str
    author: str
    date: str
    parent: str | None
    files: Mapping[str, Blob]


@dataclass
class Repository:
    """A model repository, with the branch ``main`` and Git's attributes in a first commit, as the Hub creates it."""

    id: str
    private: bool
    author: str
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    lfs: dict[str, bytes] = field(default_factory=dict)
    _commits: dict[str, Commit] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.add_commit("main", {".gitattributes": Blob(_GITATTRIBUTES, lfs=False)}, "initial commit", "", self.author)

    def resolve(self, revision: str = "main") -> Commit:
        """The commit of a branch, a tag or a full hash; an error of the Hub where there is none."""
        sha = self.branches.get(revision.removeprefix("refs/heads/")) or self.tags.get(
            revision.removeprefix("refs/tags/"), revision
        )
        if sha not in self._commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self._commits[sha]

    def add_commit(self, branch: str, files: Mapping[str, Blob], title: str, message: str, author: str) -> Commit:
        """Commits a whole tree to a branch."""
        date = timestamp()
        parent = self.branches.get(branch)
        oids = {path: blob.oid for path, blob in sorted(files.items())}
        sha = hashlib.sha1(json.dumps([parent, oids, title, message, author, date]).encode()).hexdigest()
        self._commits[sha] = Commit(sha, title, message, author, date, parent, dict(files))
        self.branches[branch] = sha
        return self._commits[sha]

    def history(self, revision: str = "main") -> Iterator[Commit]:
        """The commits that lead to a revision, the newest first."""
        commit: Commit | None = self.resolve(revision)
        while commit is not None:
            yield commit
            commit = self._commits[commit.parent] if commit.parent else None

    def commits(self, revision: str = "main") -> list[Commit]:
        """:meth:`history` as a list; the last one is the Hub's own "initial commit"."""
        return list(self.history(revision))

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """The files at a revision, by path."""
        return {path: blob.content for path, blob in self.resolve(revision).files.items()}

    @property
    def head(self) -> str:
        """The hash at the end of ``main``."""
        return self.branches["main"]

    def last_change(self, path: str, revision: str) -> Commit:
        """The commit that last changed a file, or anything in a folder."""

        def below(commit: Commit) -> dict[str, str]:
            return {
                name: blob.oid for name, blob in commit.files.items() if name == path or name.startswith(f"{path}/")
            }

        commits = self.commits(revision)
        for newer, older in pairwise(commits):
            if below(newer) != below(older):
                return newer
        return commits[-1]


def timestamp() -> str:
    """Now, as the Hub writes it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
