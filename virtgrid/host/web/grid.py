"""What the page shows of the grid: asked of the coordinator, and not more often than every other second."""

from __future__ import annotations

import asyncio
import time
from typing import Final, TypeVar

from virtgrid.core.errors import VirtgridError
from virtgrid.grid.messages.coalloc import LIST, AskList, Listed
from virtgrid.grid.messages.coalloc import Line as Reservation
from virtgrid.grid.messages.common import Model, parse
from virtgrid.grid.messages.job import JOBS, AskJobs, JobList, JobView
from virtgrid.host.web.model import Jobs, Reservations
from virtgrid.wire.endpoint import Endpoint, dial
from virtgrid.wire.identity import Role
from virtgrid.wire.line import Line, deaf
from virtgrid.wire.tls import Tls

_FRESH_S: Final = 2.0
_DEADLINE_S: Final = 5.0
#: Pages of a list, of 500 each.
_PAGES_MAX: Final = 10

A = TypeVar("A", bound=Model)


class Grid:
    """The coordinator's lists. where: of the coordinator; tls: as whom, over the network."""

    def __init__(self, where: Endpoint, tls: Tls | None = None) -> None:
        self._where, self._tls = where, tls
        self._lock = asyncio.Lock()
        self._jobs = Jobs(jobs=(), why="not asked yet")
        self._reservations = Reservations(reservations=(), why="not asked yet")
        self._asked_s = float("-inf")

    async def jobs(self) -> Jobs:
        """Everybody's that we may see."""
        await self._ask()
        return self._jobs

    async def reservations(self) -> Reservations:
        await self._ask()
        return self._reservations

    async def _ask(self) -> None:
        async with self._lock:
            if time.monotonic() - self._asked_s < _FRESH_S:
                return
            try:
                async with asyncio.timeout(_DEADLINE_S * 2):
                    await self._ask_both()
            except (VirtgridError, TimeoutError) as error:
                why = error.what if isinstance(error, VirtgridError) else f"{self._where} does not answer"
                self._jobs = Jobs(jobs=(), why=why)
                self._reservations = Reservations(reservations=(), why=why)
            self._asked_s = time.monotonic()

    async def _ask_both(self) -> None:
        line = await dial(
            self._where, deaf, name="the coordinator", tls=self._tls, expect=Role.GRC, deadline_s=_DEADLINE_S
        )
        try:
            jobs = await _all_jobs(line)
            reservations = await _all_reservations(line)
        finally:
            await line.close()
        self._jobs = Jobs(jobs=tuple(jobs), why=None)
        self._reservations = Reservations(reservations=tuple(reservations), why=None)


async def _all_jobs(line: Line) -> list[JobView]:
    found: list[JobView] = []
    for _ in range(_PAGES_MAX):
        asked = AskJobs(after=found[-1].id if found else None)
        page = await _call(line, JOBS, asked, JobList)
        found += page.jobs
        if not page.more:
            break
    return found


async def _all_reservations(line: Line) -> list[Reservation]:
    found: list[Reservation] = []
    for _ in range(_PAGES_MAX):
        asked = AskList(after=found[-1].id if found else None)
        page = await _call(line, LIST, asked, Listed)
        found += page.reservations
        if not page.more:
            break
    return found


async def _call(line: Line, method: str, asked: Model, answer: type[A]) -> A:
    said = await line.call(method, asked.model_dump(mode="json"), deadline_s=_DEADLINE_S)
    return parse(answer, method, said)
