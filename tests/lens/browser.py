"""A browser without a window, driven over its debugging protocol: what a user does, and what is then there."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import re
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.helpers import started

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr")


def browser() -> str:
    """An installed browser.

    Where there is none, a page is checked as text alone: that is all that can be done.
    """
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser is installed: none of {', '.join(BROWSERS)} is on the path")
    return found


class Tab:
    """One page. messages: what it wrote to its console, and errors that it did not catch."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket, self.numbers = socket, itertools.count(1)
        self.messages: list[str] = []

    async def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol and return its result."""
        number = next(self.numbers)
        await self.socket.send_json({"id": number, "method": method, "params": parameters})
        while True:
            message = json.loads((await self.socket.receive(timeout=60)).data)
            if message.get("method") == "Runtime.exceptionThrown":
                self.messages.append(str(message["params"]["exceptionDetails"]))
            if message.get("method") == "Runtime.consoleAPICalled" and message["params"]["type"] == "error":
                self.messages.append(str(message["params"]["args"]))
            if message.get("id") == number:
                assert "error" not in message, f"{method}: {message.get('error')}"
                result: dict[str, Any] = message["result"]
                return result

    async def value(self, script: str) -> Any:
        """The value of an expression of JavaScript."""
        result = await self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    async def until(self, script: str, seconds: float = 60) -> Any:
        """Wait until an expression is true, and return it."""
        end = time.monotonic() + seconds
        while not (found := await self.value(script)):
            assert time.monotonic() < end, f"{script} was never true\n{await self.value('document.body.innerText')}"
            await asyncio.sleep(0.2)
        return found

    async def picture(self, path: Path, width: int = 1280, height: int = 900) -> None:
        """Write a screenshot."""
        await self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )
        data = await self.send("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(data["data"]))


@asynccontextmanager
async def _opened(address: str, folder: Path) -> AsyncIterator[Tab]:
    command = [browser(), *OPTIONS, "--remote-debugging-port=0", f"--user-data-dir={folder}", "about:blank"]
    with started(command) as process:
        assert process.stderr is not None
        port = None
        for line in process.stderr:
            if found := re.search(r"DevTools listening on ws://[\d.]+:(\d+)/", line):
                port = found[1]
                break
        assert port is not None, "the browser did not start"
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                pages = [each for each in await answer.json() if each["type"] == "page"]
            async with session.ws_connect(pages[0]["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                tab = Tab(socket)
                await tab.send("Runtime.enable")
                await tab.send("Page.enable")
                await tab.send("Page.navigate", url=address)
                yield tab


def use(address: str, folder: Path, visit: Callable[[Tab], Awaitable[None]]) -> list[str]:
    """Open a page, do what ``visit`` does with it, and return what went wrong in its console."""

    async def run() -> list[str]:
        async with _opened(address, folder) as tab:
            await visit(tab)
            return tab.messages

    return asyncio.run(asyncio.wait_for(run(), timeout=240))
