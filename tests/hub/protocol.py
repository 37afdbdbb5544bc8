"""What the routes of the tests' Hub server share: the request, the reply, who may do what, and the table of routes."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

from tests.hub.store import Account, HubError, Repository, breach

#: Parts of a route's pattern.
ID = r"(?P<repo_id>[^/]+(?:/[^/]+)?)"
REVISION = r"(?P<revision>[^/]+)"


@dataclass
class Grant:
    """A signed address of the storage: the object that may be written or read there, and its parts so far."""

    repository: Repository
    oid: str
    size: int
    part_size: int
    parts: dict[int, bytes] = field(default_factory=dict)


@dataclass
class Hub:
    """All that the routes read and change."""

    page_size: int
    part_size: int
    url: str = ""
    storage_url: str = ""
    accounts: dict[str, Account] = field(default_factory=dict)
    repositories: dict[str, Repository] = field(default_factory=dict)
    datasets: dict[str, dict[str, Any]] = field(default_factory=dict)
    grants: dict[str, Grant] = field(default_factory=dict)

    def grant(self, repository: Repository, oid: str, size: int) -> str:
        name = secrets.token_hex(8)
        self.grants[name] = Grant(repository, oid, size, self.part_size)
        return name


@dataclass
class Request:
    """A request with its whole body, after its token was looked up; the names of headers are in lower case."""

    hub: Hub
    path: str
    query: dict[str, list[str]]
    headers: Mapping[str, str]
    body: bytes
    account: Account | None

    def json(self) -> dict[str, Any]:
        try:
            value = json.loads(self.body)
        except ValueError:
            raise breach("the body is not JSON") from None
        if not isinstance(value, dict):
            raise breach("the body must be a JSON object")
        return value

    def flag(self, name: str) -> bool:
        return self.query.get(name, ["false"])[0].lower() in ("true", "1")

    def readable(self, repo_id: str) -> Repository:
        """A repository that this account may read; the Hub does not tell apart what is hidden and what is missing."""
        repository = self.hub.repositories.get(repo_id)
        if repository is None or (repository.private and not (self.account and self.account.owns(repo_id))):
            raise HubError(404 if self.account else 401, "Repository not found", "RepoNotFound")
        return repository

    def writable(self, repo_id: str) -> Repository:
        repository = self.readable(repo_id)
        self.may_write(repo_id)
        return repository

    def may_write(self, repo_id: str) -> Account:
        if self.account is None:
            raise HubError(401, "Invalid username or password.")
        if self.account.role != "write":
            raise HubError(403, "Forbidden: you must use a write token to upload to a repository")
        if not self.account.owns(repo_id):
            raise HubError(403, f'You don\'t have the rights to create a model under the namespace of "{repo_id}"')
        return self.account


@dataclass
class Reply:
    """What is sent back; ``is_content`` marks a file's bytes, which the faults of downloads change."""

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    is_content: bool = False


def json_reply(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Reply:
    own = {"Content-Type": "application/json", **(headers or {})}
    return Reply(json.dumps(value, default=str).encode(), status, own)


@dataclass(frozen=True)
class Route:
    """Where a function answers, and the query parameters that it knows."""

    name: str
    on_storage: bool
    methods: tuple[str, ...]
    pattern: re.Pattern[str]
    parameters: frozenset[str]
    function: Callable[..., Reply]

    def match(self, method: str, path: str, on_storage: bool) -> dict[str, str] | None:
        found = self.pattern.fullmatch(path) if method in self.methods and on_storage == self.on_storage else None
        return {key: unquote(value) for key, value in found.groupdict("").items()} if found else None


class Routes(list[Route]):
    """Routes in the order in which they are tried; :meth:`add` registers a function under its name."""

    def add(
        self, methods: str, pattern: str, parameters: str = "", *, on_storage: bool = False
    ) -> Callable[[Callable[..., Reply]], Callable[..., Reply]]:
        known = frozenset(parameters.split())

        def register(function: Callable[..., Reply]) -> Callable[..., Reply]:
            found = Route(function.__name__, on_storage, tuple(methods.split()), re.compile(pattern), known, function)
            self.append(found)
            return function

        return register
