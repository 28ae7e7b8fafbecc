"""A host's page on a unix socket, journals for it to show, and a way there for programs that speak TCP."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp

from tests.unit.journals import sample_journal, write_journal
from virtgrid.core.events import Record
from virtgrid.core.process import process_started
from virtgrid.host.web.site import Web
from virtgrid.migration import running
from virtgrid.migration.control import ControlServer
from virtgrid.wire.endpoint import Endpoint

#: The sample migration is held from about 23 s on.
HELD_S = 25.0


def held_now(domain: str = "web1", *, until_s: float = HELD_S) -> list[Record]:
    """The records of a migration that this very process drives, and that is held now."""
    began = datetime.now(UTC) - timedelta(seconds=until_s)
    records = sample_journal(domain=domain, start=began, pid=os.getpid(), hold_s=600.0)
    kept = [one for one in records if (one.at - began).total_seconds() <= until_s]
    kept[0].fields["pid_started"] = process_started(os.getpid())
    return kept


@dataclass
class Driver:
    """What answers for a running migration: the control socket of the real thing, and what it was asked."""

    asked: list[tuple[str, str]] = field(default_factory=list)

    async def heard(self, command: str, by: str) -> dict[str, Any]:
        self.asked.append((command, by))
        return {"ok": True, "text": f"{command}: told"}


@asynccontextmanager
async def driving(record: Record) -> AsyncIterator[Driver]:
    """Drive the migration with such a first record."""
    driver = Driver()
    async with ControlServer(running.socket_path(str(record["uuid"])), driver.heard):
        yield driver


@dataclass
class Served:
    """A page that is being served. directory: of the journals."""

    socket: Path
    directory: Path
    web: Web

    def put(self, records: list[Record]) -> Path:
        return write_journal(self.directory, records)

    def append(self, path: Path, *records: Record) -> None:
        with path.open("a") as file:
            file.writelines(json.dumps(one.as_dict()) + "\n" for one in records)

    @asynccontextmanager
    async def client(self) -> AsyncIterator[aiohttp.ClientSession]:
        connector = aiohttp.UnixConnector(str(self.socket))
        async with aiohttp.ClientSession("http://host", connector=connector) as session:
            yield session

    @asynccontextmanager
    async def over_tcp(self) -> AsyncIterator[str]:
        """Its address on the loopback."""
        async with bridged(self.socket) as address:
            yield address


@asynccontextmanager
async def bridged(socket: Path) -> AsyncIterator[str]:
    """A unix socket's place on the loopback, as ssh -L would bring it there; also while nobody listens."""

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, back = await asyncio.open_unix_connection(socket)
        except OSError:
            writer.close()
            return
        async with asyncio.TaskGroup() as both:
            both.create_task(_copy(reader, back))
            both.create_task(_copy(there, writer))

    async with await asyncio.start_server(forward, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    writer.close()


@asynccontextmanager
async def serving(directory: Path, **more: Any) -> AsyncIterator[Served]:
    socket = directory / "web.sock"
    journals = directory / "migrations"
    journals.mkdir(exist_ok=True)
    async with Web(Endpoint(socket), directory=journals, **more) as web:
        yield Served(socket, journals, web)


async def until(true: Callable[[], Any], what: str, *, deadline_s: float = 20.0) -> Any:
    """Wait for something to become true."""
    async with asyncio.timeout(deadline_s):
        while not (found := true()):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    return found
