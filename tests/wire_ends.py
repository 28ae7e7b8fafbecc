"""Two ends of a line in one process, and raw sockets to misbehave on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from virtgrid.wire.endpoint import Endpoint, dial, listen
from virtgrid.wire.line import Line


async def nothing(line: Line, method: str, params: Mapping[str, Any]) -> Any:
    return {}


@asynccontextmanager
async def listening(path: Path, handler: Any) -> AsyncIterator[Endpoint]:
    where = Endpoint(path)
    listener = await listen(where, handler, name="the caller")
    try:
        yield where
    finally:
        await listener.close()


@asynccontextmanager
async def dialled(where: Endpoint, handler: Any = nothing) -> AsyncIterator[Line]:
    line = await dial(where, handler, name="the other side")
    try:
        yield line
    finally:
        await line.close()


class Raw:
    """A socket without manners."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def say(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def hear(self) -> bytes:
        """One line, or b"" when the other side has hung up."""
        async with asyncio.timeout(10):
            try:
                return await self.reader.readline()
            except ConnectionResetError:
                return b""


@asynccontextmanager
async def raw(where: Endpoint) -> AsyncIterator[Raw]:
    reader, writer = await asyncio.open_unix_connection(where.path)
    try:
        yield Raw(reader, writer)
    finally:
        writer.transport.abort()


async def until(true: Callable[[], bool], *, timeout_s: float = 10.0, pause_s: float = 0.0) -> None:
    """Wait for a state of things, in this process or, with a pause between two looks, in another."""
    async with asyncio.timeout(timeout_s):
        while not true():  # noqa: ASYNC110 - the state is of any kind
            await asyncio.sleep(pause_s)
