"""A site with pilots in one process: real NodeManagers over real sockets, on hosts that are scripts."""

from __future__ import annotations

import asyncio
import base64
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from tests.unit.scripted_host import KEYS, ScriptedHost
from virtgrid.core.clock import SystemClock
from virtgrid.core.errors import RefusedError
from virtgrid.grid.crm.backend import Node, NodesPromised, PilotOrder, PilotUsage
from virtgrid.grid.crm.crew import Terms
from virtgrid.grid.crm.site import Site
from virtgrid.grid.crm.stock import SiteStock
from virtgrid.grid.messages import job as jobs
from virtgrid.grid.messages import ticket as tickets
from virtgrid.grid.messages.coalloc import Hold, HoldState, Nodes, Window
from virtgrid.grid.messages.job import AskCrew, CrewView, Order
from virtgrid.grid.messages.node import HostEntry, State, Tell
from virtgrid.grid.node.manager import NodeManager
from virtgrid.grid.node.record import Store
from virtgrid.grid.node.uplink import Uplink
from virtgrid.grid.provide import Stored
from virtgrid.grid.store.database import Database
from virtgrid.wire import seal
from virtgrid.wire.endpoint import Endpoint

USER = "nobody"
GRC = f"uid:{os.geteuid()}"
KEY = "k" * 24


class InProcess:
    """A backend whose pilots run in this process. mute: those that never dial in; brief: that end at once."""

    def __init__(self, directory: Path) -> None:
        self.names, self.guard_s = ("n1", "n2"), 0
        self.directory = directory
        self.hosts: dict[str, ScriptedHost] = {}
        self.tasks: dict[tuple[str, str], asyncio.Task[Any]] = {}
        self.promised: set[str] = set()
        self.mute = self.brief = self.unwilling = False
        self.starts = 0
        self.told_problems: tuple[str, ...] = ()

    async def nodes(self) -> tuple[Node, ...]:
        return tuple(Node(name=name) for name in self.names)

    async def problems(self) -> tuple[str, ...]:
        return self.told_problems

    async def promise(self, what: NodesPromised) -> None:
        if self.unwilling:
            raise RefusedError("node n1 is down")
        self.promised.add(what.hold)

    async def restore(self, promised: Sequence[NodesPromised]) -> Mapping[str, str]:
        return {}

    async def withdraw(self, hold: str) -> None:
        await self.stop(hold, [sandbox for one, sandbox in self.tasks if one == hold])
        self.promised.discard(hold)

    async def start(self, orders: Sequence[PilotOrder]) -> None:
        for order in orders:
            if order.sandbox not in await self.running(order.hold):
                self.starts += 1
                self.tasks[order.hold, order.sandbox] = asyncio.create_task(self._pilot(order))

    async def running(self, hold: str) -> frozenset[str]:
        return frozenset(
            sandbox for (one, sandbox), task in self.tasks.items() if one == hold and not task.done()
        )

    async def stop(self, hold: str, sandboxes: Sequence[str]) -> None:
        for sandbox in sandboxes:
            if (task := self.tasks.get((hold, sandbox))) is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    async def usage(self, hold: str) -> tuple[PilotUsage, ...]:
        return tuple(PilotUsage(sandbox=sandbox, elapsed_s=2.0) for one, sandbox in self.tasks if one == hold)

    async def holds(self) -> frozenset[str]:
        return frozenset(self.promised)

    def kill(self, sandbox: str) -> None:
        """kill -9: its record stays."""
        for (_, name), task in self.tasks.items():
            if name == sandbox:
                task.cancel()

    async def _pilot(self, order: PilotOrder) -> None:
        if self.mute:
            await asyncio.sleep(1000)
        if self.brief:
            return
        place = self.directory / order.sandbox
        place.mkdir(exist_ok=True)
        (place / "ticket").unlink(missing_ok=True)
        seal.write_private(place / "ticket", order.ticket)
        text, ticket = tickets.read(place / "ticket")
        host = self.hosts.setdefault(order.sandbox, ScriptedHost())
        manager = NodeManager(ticket=ticket, host=host, store=Store(place / "record"), clock=SystemClock())
        try:
            await manager.resume()
            await Uplink(manager, order.crm, text).run()
        finally:
            await manager.close()


class Place:
    """A site's disk and backend, and its CRM, which can be killed and started again."""

    def __init__(
        self, directory: Path, *, name: str = "alpha", addresses: str = "10.1.0.0/28", **terms: Any
    ) -> None:
        self.directory, self.terms, self.name, self.addresses = directory, terms, name, addresses
        self.key = seal.new_key()
        self.backend = InProcess(directory)
        self.stack = AsyncExitStack()

    async def start(self) -> None:
        self.stack = AsyncExitStack()
        self.database = self.stack.enter_context(Database(self.directory / "crm.db"))
        stock = SiteStock(nodes=self.backend.names, ranges=[self.addresses])
        self.stored = Stored(party=self.name, database=self.database, stock=stock, clock=SystemClock())
        self.stack.callback(self.stored.close)
        terms: dict[str, Any] = {"memory_bytes": 256 << 20, "processes": 512, "gone_s": 5.0, **self.terms}
        self.site = Site(
            stored=self.stored,
            stock=stock,
            database=self.database,
            backend=self.backend,
            terms=Terms(site=self.name, key=self.key, crm=Endpoint(self.directory / "p"), **terms),
            directory=self.directory / "crm",
        )
        await self.stack.enter_async_context(self.site)

    async def again(self) -> None:
        await self.stack.aclose()
        await self.start()

    async def committed(self, key: str = KEY) -> None:
        now_s = int(time.time())
        hold = Hold(
            key=key, reservation="r1", window=Window(begins_at_s=now_s, ends_at_s=now_s + 600), ttl_s=60,
            asked_at_s=now_s, wanted=Nodes(nodes=2, addresses="10.1.0.0/28"),
        )  # fmt: skip
        answer = await self.site.hold(hold, owner=GRC)
        assert answer.standing is not None
        assert (await self.site.commit(key, owner=GRC)).state is HoldState.COMMITTED

    async def say(self, order: Order, **more: Any) -> None:
        kind = jobs.CREW_PARAMS[order]
        assert await self.site.answer(kind(key=KEY, **more), order, GRC) is None

    async def muster(self) -> None:
        await self.say(Order.MUSTER, user=USER, tag=7, prefix=28)

    async def view(self, **more: Any) -> CrewView:
        found = await self.site.answer(AskCrew(key=KEY, **more), jobs.CREW, GRC)
        assert isinstance(found, CrewView)
        return found

    async def until(self, *states: State | None) -> CrewView:
        """All nodes are in one of these states."""
        async with asyncio.timeout(30):
            view = await self.view()
            while not all(node.state in states for node in view.nodes):
                view = await self.view(seen=view.version, wait_s=5)
        return view

    async def until_gone(self) -> CrewView:
        async with asyncio.timeout(30):
            view = await self.view()
            while not view.gone:
                view = await self.view(seen=view.version, after=view.next, wait_s=5)
        return view

    async def equip(self) -> None:
        view = await self.until(State.HOST_READY)
        await self.say(
            Order.EQUIP,
            hosts=tuple(
                HostEntry(hostname=node.sandbox, address=node.address, **KEYS.model_dump())
                for node in view.nodes
            ),
        )

    async def output(self) -> list[str]:
        view = await self.view()
        tells = [Tell.model_validate_json(line) for line in view.output.splitlines()]
        return [
            base64.b64decode(one.body["data"]).decode() if one.kind == "output" else str(one.body["status"])
            for one in tells
        ]

    async def eventually(self, true: Callable[[CrewView], bool]) -> CrewView:
        """As soon as the crew is so."""
        async with asyncio.timeout(30):
            view = await self.view()
            while not true(view):
                await asyncio.sleep(0.02)
                view = await self.view()
        return view

    async def until_written(self, *pieces: str) -> None:
        async with asyncio.timeout(30):
            while tuple(await self.output()) != pieces:  # noqa: ASYNC110
                await asyncio.sleep(0.02)

    @property
    def first(self) -> ScriptedHost:
        return self.backend.hosts[next(name for name in self.backend.hosts if name.startswith("n1-"))]

    async def close(self) -> None:
        for task in self.backend.tasks.values():
            task.cancel()
        await asyncio.gather(*self.backend.tasks.values(), return_exceptions=True)
        await self.stack.aclose()


@asynccontextmanager
async def placed(directory: Path, **terms: Any) -> AsyncIterator[Place]:
    made = Place(directory, **terms)
    await made.start()
    try:
        yield made
    finally:
        await made.close()
