"""A server on the loopback that speaks the Hugging Face Hub's protocol to the real client, strictly, without Xet.

It has two addresses, as the Hub has: the Hub's own, and a storage for large files, where only signed addresses count
and to which no client may send its token. Whatever no correct client does is answered with an error and kept in
``violations``: an unknown route or parameter, a wrong hash, size or range, a malformed body, a token sent to the
storage. What is merely forbidden or missing is answered as the Hub does and kept only in the ``transcript``.

    with HubServer() as hub:
        hub.add_account("ann", token="hf_ann")
        subprocess.run([...], env=hub.environment(tmp_path / "home", token="hf_ann"), check=True)
        assert hub.repo("ann/vit").files("v1.0")["config.json"] == ...
        hub.check()

The folder's files, in the order in which they are best read:

| file | what it holds |
|---|---|
| ``store.py`` | what the server keeps: accounts, repositories, branches, tags, commits with whole trees, files |
| ``protocol.py`` | what routes share: the request, the reply, who may do what, the table of routes |
| ``routes.py`` | accounts, cards, repositories, listings, branches, tags, data sets (their cards alone) |
| ``transfer.py`` | upload, commit, download |
| ``listing.py`` | how repositories, files and commits are described in JSON |
| ``card_rules.py`` | what the Hub demands of the front matter of a card |
| ``faults.py`` | what goes wrong when a test asks for it |
| ``server.py`` | this file: the two addresses, the transcript, and how a test plans faults |

``server_tests/`` tests the server itself with the real client. The ``test_*.py`` beside this file use it to test
``hf_imgproc_attn.hub``; ``conftest.py`` has their Hub and their runs.
"""

from __future__ import annotations

import contextlib
import fnmatch
import os
import select
import socket
import struct
import threading
import time
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from unittest import mock
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hub import routes, transfer
from tests.hub.faults import Fault, Faults
from tests.hub.protocol import Hub, Reply, Request, Route, json_reply
from tests.hub.store import Account, HubError, Repository, breach

#: Every route; the one that matches first answers.
ROUTES = [*transfer.ROUTES, *routes.ROUTES]
_GONE = getattr(select, "POLLRDHUP", 0) | select.POLLHUP | select.POLLERR


@dataclass(frozen=True)
class Entry:
    """A line of the transcript; ``status`` is 0 where no answer was sent, ``fault`` the kind that was committed."""

    method: str
    path: str
    route: str
    status: int
    role: str
    range: str | None
    fault: str | None


class HubServer:
    """The server; it runs while the ``with`` block does. Lists longer than ``page_size`` come in pages, objects
    larger than ``part_size`` bytes are uploaded in parts."""

    def __init__(self, *, page_size: int = 1000, part_size: int = 64 * 2**20) -> None:
        self.state = Hub(page_size, part_size)
        self.lock = threading.Lock()
        self.faults = Faults()
        self.transcript: list[Entry] = []
        self.violations: list[str] = []
        self._listeners = [_Listener(self, on_storage) for on_storage in (False, True)]
        self.state.url, self.state.storage_url = (listener.url for listener in self._listeners)

    def __enter__(self) -> HubServer:
        for listener in self._listeners:
            listener.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.heal()
        for listener in self._listeners:
            listener.stop()

    @property
    def url(self) -> str:
        """The endpoint, for ``HF_ENDPOINT`` and ``HfApi(endpoint=…)``."""
        return self.state.url

    def add_account(self, name: str, *, token: str, role: str = "write", orgs: Iterable[str] = ()) -> None:
        """Adds a token of a user, who owns the namespaces ``name`` and ``orgs``; the role is "write" or "read"."""
        if role not in ("write", "read"):
            raise ValueError(f'role must be "write" or "read", got {role!r}')
        self.state.accounts[token] = Account(name, role, tuple(orgs))

    def add_dataset(self, name: str, card: dict[str, Any]) -> None:
        """Adds a data set, of which the server has the front matter of its card alone."""
        self.state.datasets[name] = card

    def repo(self, repo_id: str) -> Repository:
        """A repository, to look into; KeyError where there is none."""
        return self.state.repositories[repo_id]

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """The whole environment of a client process: this endpoint, an own cache and at most this token."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))}
        kept = {key: value for key, value in kept.items() if not key.lower().endswith("_proxy")}
        return {
            **kept,
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            **({"HF_TOKEN": token} if token is not None else {}),
        }

    @contextlib.contextmanager
    def reached_by_this_process(self) -> Iterator[None]:
        """Sets what this process's client took from its environment when it was imported, for as long as it lasts.

        An ``HfApi`` needs its ``endpoint`` all the same, and a token.
        """
        from huggingface_hub import close_session, constants

        template = f"{self.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        with mock.patch.multiple(
            constants,
            HF_HUB_OFFLINE=False,
            HF_HUB_DISABLE_XET=True,
            ENDPOINT=self.url,
            HUGGINGFACE_CO_URL_TEMPLATE=template,
        ):
            try:
                yield
            finally:
                close_session()

    def check(self) -> None:
        """Raises AssertionError with all that no correct client would have done."""
        if self.violations:
            raise AssertionError("the client broke the protocol:\n" + "\n".join(self.violations))

    def requests(self, route: str, method: str = "*") -> list[Entry]:
        """The requests to a route so far, by its name."""
        return [e for e in self.transcript if e.route == route and method in ("*", e.method)]

    # Faults. A route is a name of ROUTES or a pattern of names; a path is a pattern of the decoded path of the
    # address, for which that of a large file's download ends with the file's name.

    def fail(
        self,
        route: str = "*",
        *,
        status: int = 500,
        retry_after: int | None = None,
        times: int | None = 1,
        path: str = "*",
        method: str = "*",
    ) -> Fault:
        """Answers with an error status in place of the work; every route and no ``times`` make a Hub that is down."""
        return self._add("fail", route, path, method, times, status=status, retry_after=retry_after)

    def cut(self, *, after: int, reset: bool = False, times: int | None = 1, path: str = "*") -> Fault:
        """Breaks a download off after so many bytes of its body, by closing the connection or resetting it."""
        return self._add("reset" if reset else "cut", "*", path, "GET", times, offset=after)

    def flip_byte(self, *, at: int = 0, times: int | None = 1, path: str = "*") -> Fault:
        """Changes one byte of a download's body and nothing in its headers."""
        return self._add("flip", "*", path, "GET", times, offset=at)

    def lose_reply(self, route: str, *, times: int | None = 1, path: str = "*") -> Fault:
        """Does the work and closes the connection without an answer."""
        return self._add("lose", route, path, "*", times)

    def stall(self, route: str = "upload", *, times: int | None = 1, path: str = "*") -> Fault:
        """Reads the request, then waits until the client is gone, the fault's ``released`` is set or all is healed."""
        return self._add("stall", route, path, "*", times)

    def heal(self) -> None:
        """Ends all faults."""
        self.faults.heal()

    def _add(self, kind: str, route: str, path: str, method: str, times: int | None, **values: Any) -> Fault:
        if not any(fnmatch.fnmatchcase(known.name, route) for known in ROUTES):
            raise ValueError(f"route must match one of {[known.name for known in ROUTES]}, got {route!r}")
        return self.faults.add(Fault(kind, route, path, method, times, **values))


class _Listener(ThreadingHTTPServer):
    """One of the two addresses. Its threads are joined, so nothing outlives the server."""

    daemon_threads = False
    request_queue_size = 64

    def __init__(self, hub: HubServer, on_storage: bool) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub, self.on_storage = hub, on_storage
        # Another name, not only another port: before version 2, the client tells the storage from the Hub by its host.
        self.url = f"http://{'localhost' if on_storage else '127.0.0.1'}:{self.server_address[1]}"
        self.connections: set[socket.socket] = set()
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self.shutdown()
        self._thread.join()
        for connection in list(self.connections):
            # A connection kept alive ends where its thread reads the end of it.
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.server_close()

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self.connections.add(connection)
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        self.hub.violations.append(f"the server itself failed:\n{traceback.format_exc()}")


class _ClientGone(Exception):
    """The client went away in the middle of its request."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Listener

    def handle(self) -> None:
        with contextlib.suppress(OSError):  # The client closed the connection: that is its right.
            super().handle()

    def log_message(self, *arguments: Any) -> None:
        pass  # The transcript has it.

    def answer(self) -> None:
        hub, address = self.server.hub, urlsplit(self.path)
        path = self._without_tokens(unquote(address.path))
        route, groups = _find(self.command, address.path, self.server.on_storage)
        name = route.name if route else "unknown"
        fault = hub.faults.take("stall fail lose", name, self.command, path)
        role, reply = "none", Reply()
        try:
            body = self._body()
            if fault and fault.kind == "stall":
                self._wait(fault)
            with hub.lock:
                account, role = self._account()
                request = Request(
                    hub.state,
                    address.path,
                    parse_qs(address.query, keep_blank_values=True),
                    {key.lower(): value for key, value in self.headers.items()},
                    body,
                    account,
                )
                reply = _planned(fault) if fault and fault.kind == "fail" else _reply(route, groups, request, role)
        except HubError as error:
            reply = self._refusal(error)
        except _ClientGone:
            self.close_connection = True
            self._log(path, name, 0, role, fault)
            return
        if fault and fault.kind == "lose":
            self.close_connection = True
            self._log(path, name, 0, role, fault)
            return
        if reply.is_content and self.command == "GET":
            fault = hub.faults.take("cut reset flip", name, self.command, path) or fault
        self._log(path, name, reply.status, role, fault)
        self._send(reply, fault)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = answer

    def _account(self) -> tuple[Account | None, str]:
        header = self.headers.get("Authorization")
        if header is None:
            return None, "none"
        if self.server.on_storage:
            raise breach("a token was sent to the storage")
        account = self.server.hub.state.accounts.get(header.removeprefix("Bearer "))
        return account, account.role if account else "invalid"

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            body = b""
            while size := int(self._line(), 16):
                body += self._exactly(size)
                self._line()
            self._line()
            return body
        return self._exactly(int(self.headers.get("Content-Length", 0)))

    def _line(self) -> bytes:
        line = self.rfile.readline()
        if not line:
            raise _ClientGone
        return line.strip()

    def _exactly(self, size: int) -> bytes:
        content = self.rfile.read(size)
        if len(content) < size:
            raise _ClientGone
        return content

    def _wait(self, fault: Fault) -> None:
        poll = select.poll()
        poll.register(self.connection, _GONE)
        while not fault.released.wait(0.02):
            if poll.poll(0):
                raise _ClientGone

    def _refusal(self, error: HubError) -> Reply:
        if error.violation:
            path = self._without_tokens(urlsplit(self.path).path)
            self.server.hub.violations.append(f"{self.command} {path}: {error}")
        return json_reply(error.body, error.status, error.headers)

    def _without_tokens(self, text: str) -> str:
        for token in self.server.hub.state.accounts:
            text = text.replace(token, "…")
        return text

    def _log(self, path: str, route: str, status: int, role: str, fault: Fault | None) -> None:
        if self._without_tokens(self.path) != self.path:
            self.server.hub.violations.append("a token is in an address")
        kind = fault.kind if fault else None
        self.server.hub.transcript.append(
            Entry(self.command, path, route, status, role, self.headers.get("Range"), kind)
        )

    def _send(self, reply: Reply, fault: Fault | None) -> None:
        self.send_response(reply.status)
        for key, value in {**reply.headers, "Content-Length": str(len(reply.body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        body = reply.body
        if fault and fault.kind == "flip" and fault.offset < len(body):
            body = body[: fault.offset] + bytes([body[fault.offset] ^ 1]) + body[fault.offset + 1 :]
        if fault and fault.kind in ("cut", "reset"):
            body = body[: fault.offset]
            self.close_connection = True
        self.wfile.write(body)
        if fault and fault.kind == "reset":
            time.sleep(0.1)  # The client shall have read what was sent, which a reset would throw away.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()


def _find(method: str, path: str, on_storage: bool) -> tuple[Route | None, dict[str, str]]:
    for route in ROUTES:
        if (groups := route.match(method, path, on_storage)) is not None:
            return route, groups
    return None, {}


def _reply(route: Route | None, groups: dict[str, str], request: Request, role: str) -> Reply:
    if route is None:
        raise breach("unknown route", 404)
    if unknown := set(request.query) - route.parameters:
        raise breach(f"unknown parameters {sorted(unknown)}")
    if role == "invalid":
        raise HubError(401, "Invalid credentials in Authorization header")
    try:
        return route.function(request, **groups)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise breach(f"malformed request ({error!r})") from error


def _planned(fault: Fault) -> Reply:
    headers = {"Retry-After": str(fault.retry_after)} if fault.retry_after is not None else {}
    return json_reply({"error": f"planned failure {fault.status}"}, fault.status, headers)
