"""Where users find a coordinator: its methods on the wire."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from virtgrid.core.clock import SystemClock
from virtgrid.grid.grc.coordinator import Coordinator
from virtgrid.grid.grc.jobs import Jobs
from virtgrid.grid.grc.parties import WireParty
from virtgrid.grid.messages import coalloc
from virtgrid.grid.messages import job as messages
from virtgrid.grid.messages.coalloc import COORDINATOR_PARAMS, AskList, Empty, Reserve, Which
from virtgrid.grid.messages.common import Model
from virtgrid.grid.messages.job import JOB_PARAMS, AskJobs, AskJournal, Submit
from virtgrid.grid.provide import hearing, told_to_end
from virtgrid.grid.store.database import Database
from virtgrid.wire.endpoint import Endpoint, Listener, listen
from virtgrid.wire.message import no_such_method


async def serve(
    *,
    database: Path,
    journals: Path,
    sites: Mapping[str, Endpoint],
    network: tuple[str, Endpoint] | None,
    where: Endpoint,
    ready: Callable[[], None],
) -> None:
    """A coordinator until SIGTERM or SIGINT. Errors: RefusedError (file, socket, names)."""
    with Database(database) as opened:
        coordinator = Coordinator(
            database=opened,
            sites={name: WireParty(name, endpoint) for name, endpoint in sites.items()},
            network=None if network is None else (network[0], WireParty(*network)),
            clock=SystemClock(),
        )
        jobs = Jobs(
            coordinator=coordinator,
            database=opened,
            reach=lambda site: WireParty(site, sites[site]),
            directory=journals,
            clock=SystemClock(),
        )
        async with coordinator, jobs, Desk(coordinator, where, jobs=jobs):
            ready()
            await told_to_end()


class Desk:
    """A coordinator that listens, and its jobs where it has some. A context manager."""

    def __init__(
        self, coordinator: Coordinator, where: Endpoint, *, jobs: Jobs | None = None, mode: int = 0o666
    ) -> None:
        self._coordinator, self._where, self._mode, self._jobs = coordinator, where, mode, jobs
        self._listener: Listener | None = None

    async def __aenter__(self) -> Desk:
        self._listener = await listen(
            self._where,
            hearing({**COORDINATOR_PARAMS, **JOB_PARAMS}, self._answer),
            name="a user",
            mode=self._mode,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._listener is not None:
            await self._listener.close()

    async def _answer(self, asked: Model, method: str, owner: str) -> Model:
        match method, asked:
            case coalloc.RESERVE, Reserve():
                return await self._coordinator.reserve(asked, owner=owner)
            case coalloc.SHOW, Which():
                return await self._coordinator.show(asked.id, owner=owner)
            case coalloc.CANCEL, Which():
                return await self._coordinator.cancel(asked.id, owner=owner)
            case coalloc.LIST, AskList():
                return await self._coordinator.list(asked.after, owner=owner)
            case coalloc.SITES, Empty():
                return await self._coordinator.sites()
        if self._jobs is not None:
            return await self._answer_of_jobs(self._jobs, asked, method, owner)
        raise no_such_method(method)

    async def _answer_of_jobs(self, jobs: Jobs, asked: Model, method: str, owner: str) -> Model:
        match method, asked:
            case messages.SUBMIT, Submit():
                return await jobs.submit(asked, owner=owner)
            case messages.JOB, Which():
                return await jobs.show(asked.id, owner=owner)
            case messages.STOP, Which():
                return await jobs.cancel(asked.id, owner=owner)
            case messages.JOBS, AskJobs():
                return await jobs.list(asked.after, owner=owner)
            case messages.FOLLOW, AskJournal():
                return await jobs.follow(asked.id, asked.after, asked.wait_s, owner=owner)
        raise no_such_method(method)
