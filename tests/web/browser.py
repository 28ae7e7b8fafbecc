"""Chromium without a screen, spoken to over its own protocol (Chrome DevTools Protocol)."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

PROGRAM = shutil.which("chromium")
_QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--remote-debugging-port=0",
)  # fmt: skip


class Page:
    """One page. faults: what its script or its policy complained of."""

    def __init__(self, line: aiohttp.ClientWebSocketResponse) -> None:
        self._line = line
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self.faults: list[str] = []

    async def read(self) -> None:
        async for message in self._line:
            said = json.loads(message.data)
            if (waiting := self._waiting.pop(said.get("id"), None)) is not None:
                waiting.set_result(said)
            elif said.get("method") == "Runtime.exceptionThrown":
                self.faults.append(json.dumps(said["params"]["exceptionDetails"])[:2000])
            elif said.get("method") == "Log.entryAdded" and said["params"]["entry"]["level"] == "error":
                self.faults.append(said["params"]["entry"]["text"])

    async def call(self, method: str, **params: Any) -> Any:
        number = next(self._numbers)
        waiting = self._waiting[number] = asyncio.get_running_loop().create_future()
        await self._line.send_json({"id": number, "method": method, "params": params})
        said = await asyncio.wait_for(waiting, 30)
        assert "error" not in said, said
        return said["result"]

    async def open(self, address: str, *, width: int, height: int = 900) -> None:
        await self.call("Page.enable")
        await self.call("Runtime.enable")
        await self.call("Log.enable")
        await self.resize(width, height)
        await self.call("Page.navigate", url=address)

    async def resize(self, width: int, height: int = 900) -> None:
        await self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    async def value(self, script: str) -> Any:
        """What an expression of the page's script gives."""
        said = await self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in said, said
        return said["result"].get("value")

    async def until(self, script: str, *, deadline_s: float = 30.0) -> Any:
        """Wait until an expression is true."""
        async with asyncio.timeout(deadline_s):
            while not (found := await self.value(script)):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
            return found

    async def picture(self, path: Path) -> None:
        shot = await self.call("Page.captureScreenshot", captureBeyondViewport=False)
        await asyncio.to_thread(path.write_bytes, base64.b64decode(shot["data"]))


@asynccontextmanager
async def browsing() -> AsyncIterator[Page]:
    """A browser of its own with one empty page; ended with whatever it started."""
    if PROGRAM is None:
        pytest.skip("chromium is not installed")
    with tempfile.TemporaryDirectory(prefix="virtgrid-browser-", ignore_cleanup_errors=True) as name:
        process = subprocess.Popen(  # noqa: ASYNC220 - it is only started here
            [PROGRAM, *_QUIET, f"--user-data-dir={name}", "about:blank"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            port = await _port(Path(name), process)
            async with aiohttp.ClientSession() as session:
                async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                    pages = await answer.json()
                address = next(one["webSocketDebuggerUrl"] for one in pages if one["type"] == "page")
                async with session.ws_connect(address, max_msg_size=1 << 26) as line:
                    page = Page(line)
                    reading = asyncio.create_task(page.read())
                    try:
                        yield page
                    finally:
                        reading.cancel()
                        with contextlib.suppress(Exception):
                            await page._line.send_json({"id": 0, "method": "Browser.close"})
        finally:
            with contextlib.suppress(subprocess.TimeoutExpired):
                await asyncio.to_thread(process.wait, 10)
            process.kill()
            await asyncio.to_thread(process.wait)


async def _port(directory: Path, process: subprocess.Popen[bytes]) -> int:
    """Where it listens: it writes that down itself."""
    told = directory / "DevToolsActivePort"
    async with asyncio.timeout(60):
        while True:
            assert process.poll() is None, "chromium ended"
            if told.exists() and (lines := told.read_text().split()):
                return int(lines[0])
            await asyncio.sleep(0.05)
