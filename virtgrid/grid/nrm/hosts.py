"""What the network manager promised, put into effect: every host is told what should be on it.

The decision is pure (``orders``); this only carries it. Each host has a task that keeps a line to its
virtgridd and says the last orders: when they change, on every new line, and every ``AGAIN_S``. A host that
does not answer holds up nobody; it is told when it is back.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from types import TracebackType
from typing import Final

from virtgrid.core.errors import VirtgridError
from virtgrid.grid.messages.coalloc import Standing
from virtgrid.grid.messages.common import parse
from virtgrid.grid.messages.network import SEGMENTS, Carried, Orders
from virtgrid.grid.nrm.orders import Host, Topology, orders
from virtgrid.grid.provide import Stored
from virtgrid.grid.store import units
from virtgrid.wire.endpoint import Endpoint, dial
from virtgrid.wire.identity import Role
from virtgrid.wire.line import Line, deaf
from virtgrid.wire.tls import Tls

LEAD_S: Final = 60
"""Segments are made so long before their window: when it opens they are there."""
LOOK_S: Final = 1.0
AGAIN_S: Final = 20.0
_SETTLE_S: Final = 2.0
_DEADLINE_S: Final = 20.0
_BACKOFF_S: Final = (0.1, 5.0)
_log = logging.getLogger(__name__)


class Teller:
    """One host: ``say`` what should be on it, and it is told, now or when it is there."""

    def __init__(self, host: Host, *, name: str, tls: Tls | None = None) -> None:
        """tls: who we are, for a host that is reached over the network."""
        self.host, self._tls = host, tls
        self._where, self._name = Endpoint.parse(host.where), name
        self._orders: Orders | None = None
        self._line: Line | None = None
        self._news = asyncio.Event()
        self._told = asyncio.Event()
        self._problem: str | None = None
        self._problems: dict[str, str] = {}
        self._task = asyncio.create_task(self._work(), name=f"tell {host.address}")

    def say(self, now: Orders) -> None:
        if now != self._orders:
            self._orders = now
            self._told.clear()
            self._news.set()

    @property
    def silent(self) -> bool:
        """Whether it was not heard of when it was asked last."""
        return self._problem is not None

    async def told(self) -> None:
        """Until it has done the last orders, as far as it could."""
        await self._told.wait()

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        if self._line is not None:
            await self._line.close()

    async def _work(self) -> None:
        wait_s = _BACKOFF_S[0]
        await self._news.wait()
        while True:
            self._news.clear()
            try:
                await self._tell()
            except (VirtgridError, ValueError) as error:
                self._heard(str(error))
                await self._pause(wait_s)
                wait_s = min(_BACKOFF_S[1], wait_s * 2)
            else:
                self._heard(None)
                wait_s = _BACKOFF_S[0]
                await self._pause(AGAIN_S)

    async def _pause(self, most_s: float) -> None:
        """Until there is something to say: other orders, a line that was lost, or it was long ago."""
        lost = None if self._line is None else asyncio.create_task(self._line.wait_ended())
        news = asyncio.create_task(self._news.wait())
        waited = {news} if lost is None or self._problem is not None else {news, lost}
        try:
            await asyncio.wait(waited, timeout=most_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (news, lost):
                if task is not None:
                    task.cancel()
        if self._line is not None and self._line.lost is not None:
            # It is being restarted; or there are two of us, who must not hang up on each other all the time.
            await asyncio.sleep(_BACKOFF_S[0])

    async def _tell(self) -> None:
        assert self._orders is not None
        if self._line is None or self._line.lost is not None:
            self._line = await dial(
                self._where, deaf, name=self._name, tls=self._tls, expect=Role.HOST, site=self.host.site
            )
        said = self._orders
        answer = await self._line.call(SEGMENTS, said.model_dump(mode="json"), deadline_s=_DEADLINE_S)
        done = parse(Carried, SEGMENTS, answer)
        names = {one.id: f"segment {one.segment} of {one.reservation}" for one in said.segments}
        for id_, why in done.problems.items():
            if self._problems.get(id_) != why:
                _log.warning("%s: %s: %s", self._name, names.get(id_, id_), why)
        self._problems = dict(done.problems)
        if said is self._orders:
            self._told.set()

    def _heard(self, problem: str | None) -> None:
        if problem != self._problem:
            if problem is None:
                _log.info("%s does what it is told again", self._name)
            else:
                _log.warning("%s cannot be told which segments it should have: %s", self._name, problem)
        self._problem = problem


class Hosts:
    """All hosts of a network manager. A context manager: they are told as long as it is there."""

    def __init__(self, network: str, topology: Topology, promises: Stored, *, tls: Tls | None = None) -> None:
        self._network, self._topology, self._promises, self._tls = network, topology, promises, tls
        self._tellers: Sequence[Teller] = ()
        self._looking: asyncio.Task[None] | None = None
        self._turn = asyncio.Lock()
        self._standing: list[Standing] | None = None

    async def __aenter__(self) -> Hosts:
        self._tellers = [
            Teller(host, name=f"virtgridd of {host.site} at {host.address}", tls=self._tls)
            for host in self._topology.hosts
        ]
        try:
            await self._look()
        except BaseException:
            await self.__aexit__(None, None, None)
            raise
        self._promises.changed = self._changed
        self._looking = asyncio.create_task(self._look_again(), name="segments")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._promises.changed = None
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.gather(self._looking, return_exceptions=True)
        await asyncio.gather(*(teller.close() for teller in self._tellers))

    async def _changed(self) -> None:
        """Something was committed or released: before it is answered, whoever is there has done it."""
        await self._look()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_SETTLE_S):
                await asyncio.gather(*(teller.told() for teller in self._tellers if not teller.silent))

    async def _look(self) -> None:
        async with self._turn:  # what was read first is said first
            standing = await self._promises.committed(units.SEGMENT, ahead_s=LEAD_S)
            if standing == self._standing:
                return
            self._standing = standing
            told = orders(self._network, self._topology, standing)
            for teller in self._tellers:
                teller.say(told[teller.host])

    async def _look_again(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                await self._look()
            except VirtgridError as error:
                _log.warning("what was promised cannot be read: %s", error)
