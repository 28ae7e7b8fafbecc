"""The sessions themselves: asyncio, one small HTTP/1.1 client per connection, little CPU.

The client must not disturb what it measures: no HTTP library, records in memory, nothing written
until the end. A download is read no faster than the client's line, with a receive buffer so
small that the server really waits for it; otherwise the whole file would sit in our kernel at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import urlsplit

from virtgrid.core.errors import UsageError
from virtgrid.lab.load.profile import Profile, Visit, switchings, visits
from virtgrid.lab.load.records import Kind, Request

_HEAD_LIMIT_BYTES: Final = 32 << 10
_CHUNK_BYTES: Final = 64 << 10
_LINE_BUFFER_BYTES: Final = 32 << 10
_SEED_SPREAD_S: Final = 1.0


class _HttpError(Exception):
    """The answer was none, or not whole."""


def _size(text: bytes, base: int) -> int:
    """A length as HTTP writes it: digits only. Errors: _HttpError."""
    digits = b"0123456789" if base == 10 else b"0123456789abcdefABCDEF"
    if not text or text.strip(digits) or len(text) > 15:
        raise _HttpError("a length that is no number")
    return int(text, base)


@dataclass(frozen=True, slots=True)
class Target:
    """Where the load goes."""

    host: str
    port: int

    @classmethod
    def parse(cls, url: str) -> Target:
        """``http://ADDRESS[:PORT]``. Errors: UsageError."""
        parts = urlsplit(url)
        try:
            port = parts.port or 80
        except ValueError:
            port = 0
        if parts.scheme != "http" or not parts.hostname or not port or parts.path not in ("", "/"):
            raise UsageError(f"--url: '{url}' is not http://HOST[:PORT]")
        return cls(parts.hostname, port)


class _Connection:
    """One keep-alive connection, reopened when it broke."""

    _numbers = itertools.count(1)

    def __init__(self, target: Target, timeout_s: float, *, line_bytes_s: float | None = None) -> None:
        self._target = target
        self._timeout_s = timeout_s
        self._line_bytes_s = line_bytes_s
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self.number = 0

    async def get(self, url: str, kind: Kind, session: int) -> Request:
        """Ask and read the whole answer; a failure is a record too, never an exception."""
        start_s = time.monotonic()
        first_byte_s: float | None = None
        status, count_bytes, error = 0, 0, None
        try:
            # A download takes its time by design: what is bounded there is silence, below.
            async with asyncio.timeout(None if kind == "download" else self._timeout_s):
                if self._writer is None:
                    await self._open()
                assert self._writer is not None
                self._writer.write(f"GET {url} HTTP/1.1\r\nHost: {self._target.host}\r\n\r\n".encode())
                async with asyncio.timeout(self._timeout_s):
                    status, headers, first_byte_s = await self._head()
                async for size in self._body(headers):
                    count_bytes += size
        except TimeoutError:
            error = f"no answer within {self._timeout_s:g} s"
        except (OSError, _HttpError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as failure:
            error = f"{type(failure).__name__}: {failure}"
        if error is not None:
            self.close()
        return Request(
            session=session, connection=self.number, kind=kind, url=url, start_s=start_s,
            first_byte_s=first_byte_s, end_s=time.monotonic(), count_bytes=count_bytes, status=status,
            error=error,
        )  # fmt: skip

    async def _open(self) -> None:
        self.number = next(self._numbers)
        loop = asyncio.get_running_loop()
        raw = socket.socket(socket.AF_INET6 if ":" in self._target.host else socket.AF_INET)
        try:
            raw.setblocking(False)
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            limit = _CHUNK_BYTES
            if self._line_bytes_s is not None:
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _LINE_BUFFER_BYTES)
                limit = _LINE_BUFFER_BYTES // 2
            async with asyncio.timeout(self._timeout_s):
                await loop.sock_connect(raw, (self._target.host, self._target.port))
        except BaseException:
            raw.close()
            raise
        self._reader, self._writer = await asyncio.open_connection(sock=raw, limit=limit)

    async def _head(self) -> tuple[int, dict[str, str], float]:
        assert self._reader is not None
        line = await self._reader.readuntil(b"\r\n")
        first_byte_s = time.monotonic()
        words = line.split(None, 2)
        if len(words) < 2 or not words[0].startswith(b"HTTP/1.") or not words[1].isdigit():
            raise _HttpError("not an HTTP answer")
        headers: dict[str, str] = {}
        size = 0
        while (line := await self._reader.readuntil(b"\r\n")) != b"\r\n":
            size += len(line)
            if size > _HEAD_LIMIT_BYTES:
                raise _HttpError("the head is too long")
            name, _, value = line.decode("latin-1").partition(":")
            headers[name.strip().lower()] = value.strip()
        return int(words[1]), headers, first_byte_s

    async def _body(self, headers: dict[str, str]) -> AsyncIterator[int]:
        """Sizes of the body's pieces as they come."""
        assert self._reader is not None
        if headers.get("transfer-encoding", "").lower() == "chunked":
            while size := _size((await self._reader.readuntil(b"\r\n")).partition(b";")[0].strip(), 16):
                yield len(await self._reader.readexactly(size + 2)) - 2
            await self._reader.readuntil(b"\r\n")
        else:
            left = _size(headers.get("content-length", "0").encode("latin-1"), 10)
            free_at_s = time.monotonic()  # when the line has carried all that was read
            while left:
                async with asyncio.timeout(self._timeout_s):
                    piece = await self._reader.read(min(left, _CHUNK_BYTES))
                if not piece:
                    raise _HttpError(f"the connection ended {left} bytes early")
                left -= len(piece)
                yield len(piece)
                if self._line_bytes_s is not None:
                    # A line that stood idle does not run faster afterwards: what a pause cost stays
                    # lost, or the average rate would never show it. What the buffer held is forgiven.
                    now_s = time.monotonic()
                    buffered_s = _LINE_BUFFER_BYTES / self._line_bytes_s
                    free_at_s = max(free_at_s, now_s - buffered_s) + len(piece) / self._line_bytes_s
                    if free_at_s > now_s:
                        await asyncio.sleep(free_at_s - now_s)
        if headers.get("connection", "").lower() == "close":
            self.close()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._reader = self._writer = None


@dataclass(slots=True)
class Load:
    """All sessions of one run. ``ready`` is set when every session has begun; ``records`` grows."""

    target: Target
    profile: Profile
    seed: int
    records: list[Request] = field(default_factory=list)
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    _on: asyncio.Event = field(default_factory=asyncio.Event)
    _begun: int = 0

    async def run(self, duration_s: float, stop: asyncio.Event) -> None:
        """Run until ``stop`` or for ``duration_s``; what is outstanding then is dropped, not recorded."""
        tasks = [asyncio.create_task(self._switch())]
        tasks += [asyncio.create_task(self._session(n)) for n in range(self.profile.sessions)]
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(duration_s):
                    await stop.wait()
        finally:
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
        for result in results:
            if isinstance(result, Exception):
                raise result

    async def _switch(self) -> None:
        for on, for_s in switchings(self.profile, self.seed):
            if on:
                self._on.set()
            else:
                self._on.clear()
            if for_s == float("inf"):
                return
            await asyncio.sleep(for_s)

    async def _session(self, number: int) -> None:
        small = [_Connection(self.target, self.profile.timeout_s) for _ in range(2)]
        try:
            first = True
            for visit in visits(self.profile, self.seed, number):
                think_s = min(visit.think_s, _SEED_SPREAD_S) if first else visit.think_s
                await asyncio.sleep(think_s)
                if not self._on.is_set():
                    await self._on.wait()
                    await asyncio.sleep(visit.jitter_s)
                await self._visit(number, visit, small)
                if first:
                    first = False
                    self._begun += 1
                    if self._begun == self.profile.sessions:
                        self.ready.set()
        finally:
            for connection in small:
                connection.close()

    async def _visit(self, number: int, visit: Visit, small: list[_Connection]) -> None:
        if visit.download is not None:
            if not self.ready.is_set():
                self._begun += 1  # a download takes longer than anybody should wait for
                if self._begun == self.profile.sessions:
                    self.ready.set()
            line = _Connection(self.target, self.profile.timeout_s, line_bytes_s=self.profile.line_bytes_s)
            try:
                self.records.append(await line.get(visit.download, "download", number))
            finally:
                line.close()
            return
        assert visit.page is not None
        self.records.append(await small[0].get(visit.page, "page", number))
        # As browsers do: the images over both connections, each in turn.
        await asyncio.gather(
            *(self._images(number, connection, visit.images[n::2]) for n, connection in enumerate(small))
        )

    async def _images(self, number: int, connection: _Connection, urls: tuple[str, ...]) -> None:
        for url in urls:
            self.records.append(await connection.get(url, "image", number))
