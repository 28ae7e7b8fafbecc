"""Two sites, a network and a coordinator in one process, on real files and sockets; and a line that
misbehaves.
"""

from __future__ import annotations

import functools
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import wire_ends

from virtgrid.core.clock import SystemClock
from virtgrid.core.errors import DeadlineError, NotFoundError
from virtgrid.grid.crm.stock import SiteStock
from virtgrid.grid.grc.coordinator import Coordinator, Timing
from virtgrid.grid.grc.parties import Transport, WireParty
from virtgrid.grid.messages.coalloc import ReservationState, Reserve, SiteWish, Window
from virtgrid.grid.nrm.stock import NetworkStock
from virtgrid.grid.provide import Counter, Stored
from virtgrid.grid.store.database import Database
from virtgrid.grid.store.promises import Promises
from virtgrid.grid.store.reservations import Reservations
from virtgrid.wire.endpoint import Endpoint
from virtgrid.wire.line import LineLostError

#: What becomes so in a thread or in another process.
until = functools.partial(wire_ends.until, timeout_s=20.0, pause_s=0.02)
QUICK = Timing(ttl_s=20, hold_s=1.0, ask_s=1.0, answer_s=8.0, again_s=0.02, again_most_s=0.1, sweep_s=0.2)
RANGES = {"alpha": ["10.1.0.0/24"], "beta": ["10.1.0.0/24", "10.2.0.0/24"]}
NODES = {"alpha": ["a1", "a2", "a3", "a4"], "beta": ["b1", "b2"]}
LINK_BYTES_S = 125_000_000
ME = "uid:1000"


def end_programs(programs: Collection[subprocess.Popen[bytes]]) -> None:
    """SIGTERM to all at once, and -9 to who has not ended within 20 s of it."""
    for program in programs:
        program.send_signal(signal.SIGTERM)
    for program in programs:
        try:
            program.wait(20)
        except subprocess.TimeoutExpired:
            program.kill()
            program.wait()


class Flaky:
    """A transport that loses what a test tells it to: before it arrives, or the answer.

    like: another one to the same place, which says what is lost.
    """

    def __init__(self, inner: Transport, *, like: Flaky | None = None) -> None:
        self._inner, self._like = inner, like
        self.unsaid: set[str] = set()
        self.unheard: set[str] = set()
        self.said: list[str] = []
        self.before: dict[str, Any] = {}

    async def call(self, method: str, params: Mapping[str, Any], *, deadline_s: float) -> Any:
        if method in (self._like or self).unsaid:
            raise LineLostError("the line is gone")
        if method in self.before:
            self.before.pop(method)()
        self.said.append(method)
        answer = await self._inner.call(method, params, deadline_s=deadline_s)
        if method in self.unheard:
            raise DeadlineError("no answer came")
        return answer

    async def close(self) -> None:
        await self._inner.close()


@dataclass
class Parts:
    """directory: of files and sockets. lines: of the coordinator to its parties."""

    directory: Path
    coordinator: Coordinator
    lines: dict[str, Flaky]
    providers: dict[str, Stored]
    databases: dict[str, Database] = field(default_factory=dict)

    def state(self, id_: str) -> ReservationState | None:
        """As the coordinator has written it down."""
        try:
            return Reservations(self.databases["grc"]).find(id_).state
        except NotFoundError:
            return None

    def kept(self) -> dict[str, int]:
        """How many holds each provider keeps something for."""
        now_s = int(time.time())
        stock = NetworkStock(links={}, segments=(1, 1))
        return {
            name: len(Promises(database, name, stock).standing(now_s))
            for name, database in self.databases.items()
            if name != "grc"
        }


def soon(hours: float = 1, lasts: float = 1) -> Window:
    at_s = int(time.time()) + round(hours * 3600)
    return Window(begins_at_s=at_s, ends_at_s=at_s + round(lasts * 3600))


def wish(id_: str = "r1", **changed: Any) -> Reserve:
    what: dict[str, Any] = {
        "id": id_,
        "window": soon(),
        "sites": (SiteWish(site="alpha", nodes=2), SiteWish(site="beta", nodes=2)),
        "bandwidth_bytes_s": 12_500_000,
    }
    return Reserve(**{**what, **changed})


@asynccontextmanager
async def providers(directory: Path) -> AsyncIterator[tuple[dict[str, Stored], dict[str, Database]]]:
    """alpha, beta and net, listening at NAME.sock."""
    network = NetworkStock(links={("alpha", "beta"): LINK_BYTES_S}, segments=(100, 110))
    stocks = {site: SiteStock(nodes=NODES[site], ranges=RANGES[site]) for site in NODES}
    async with AsyncExitStack() as stack:
        databases = {
            name: stack.enter_context(Database(directory / f"{name}.db")) for name in (*NODES, "net")
        }
        with databases["net"].write() as connection:
            network.prepare(connection)
        made: dict[str, Stored] = {}
        for name, stock in {**stocks, "net": network}.items():
            made[name] = Stored(party=name, database=databases[name], stock=stock, clock=SystemClock())
            stack.callback(made[name].close)
            await stack.enter_async_context(Counter(made[name], Endpoint(directory / f"{name}.sock")))
        yield made, databases


@asynccontextmanager
async def coordinating(directory: Path, *, timing: Timing = QUICK, **more: Any) -> AsyncIterator[Parts]:
    """The providers listen already."""
    lines = {name: Flaky(WireParty(name, Endpoint(directory / f"{name}.sock"))) for name in (*NODES, "net")}
    with Database(directory / "grc.db") as database:
        coordinator = Coordinator(
            database=database,
            sites={site: lines[site] for site in NODES},
            network=("net", lines["net"]),
            clock=SystemClock(),
            timing=timing,
            **more,
        )
        async with coordinator:
            yield Parts(directory, coordinator, lines, {}, {"grc": database})


@asynccontextmanager
async def grid(directory: Path, *, timing: Timing = QUICK) -> AsyncIterator[Parts]:
    async with (
        providers(directory) as (made, databases),
        coordinating(directory, timing=timing) as parts,
    ):
        parts.providers = made
        parts.databases |= databases
        yield parts
