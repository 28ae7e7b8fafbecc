"""Where users find a coordinator: its methods on the wire."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from virtgrid.core.clock import SystemClock
from virtgrid.core.errors import RefusedError
from virtgrid.grid.doors import Doors, Network, caller, identity
from virtgrid.grid.grc import members
from virtgrid.grid.grc.coordinator import Coordinator
from virtgrid.grid.grc.jobs import Jobs
from virtgrid.grid.grc.ledger import Quotas
from virtgrid.grid.grc.members import Members
from virtgrid.grid.grc.parties import WireParty
from virtgrid.grid.messages import coalloc
from virtgrid.grid.messages import job as messages
from virtgrid.grid.messages.coalloc import (
    ADMINISTRATOR_PARAMS,
    COORDINATOR_PARAMS,
    AskList,
    Empty,
    Join,
    Leave,
    Reserve,
    Which,
)
from virtgrid.grid.messages.common import Model
from virtgrid.grid.messages.job import JOB_PARAMS, AskJobs, AskJournal, Submit
from virtgrid.grid.provide import hearing, told_to_end
from virtgrid.grid.store.database import Database
from virtgrid.grid.store.reservations import Reservations
from virtgrid.wire.endpoint import Endpoint
from virtgrid.wire.identity import Right, Role, called
from virtgrid.wire.line import local_user
from virtgrid.wire.message import no_such_method
from virtgrid.wire.pki.places import SYSTEM

#: Users of every site; what its administrator says comes over the socket of its host, from root.
_RIGHTS: Final = {
    **dict.fromkeys({**COORDINATOR_PARAMS, **JOB_PARAMS}, Right(anybodys=frozenset({Role.USER}))),
    **dict.fromkeys(ADMINISTRATOR_PARAMS, Right()),
}
_log = logging.getLogger(__name__)


async def serve(
    *,
    database: Path,
    journals: Path,
    sites: Mapping[str, Endpoint],
    network: tuple[str, Endpoint] | None,
    where: Endpoint,
    ready: Callable[[], None],
    listen: Endpoint | None = None,
    pki: Path | None = None,
    quotas: Quotas | None = None,
) -> None:
    """A coordinator until SIGTERM or SIGINT. sites: by their names, besides those that joined. listen: where
    users find it over the network. pki: where its certificate is, which it has when that is given or needed.

    Errors: RefusedError (file, socket, names, certificate).
    """
    file = database.with_name(f"{database.name}.sites")
    joined = members.read(file)
    if both := sorted(sites.keys() & joined.keys()):
        raise RefusedError(
            f"site {both[0]} is given, and has joined as well", hint=f"leave out --crm, or its line in {file}"
        )
    places = [*sites.values(), *joined.values(), *([network[1]] if network is not None else [])]
    tls = None
    if pki is not None or listen is not None or any(place.is_network for place in places):
        tls = identity(pki or SYSTEM, Role.GRC)
    crms = {name: members.crm_of(name, place, tls) for name, place in {**sites, **joined}.items()}
    nrm = None if network is None else (network[0], WireParty(*network, tls=tls, role=Role.NRM))
    with Database(database) as opened:
        if tls is not None:
            adopt(Reservations(opened), tls.identity.site)
        coordinator = Coordinator(
            database=opened, sites=crms, network=nrm, clock=SystemClock(), quotas=quotas
        )
        known = Members(
            file,
            coordinator=coordinator,
            parties=crms if nrm is None else {**crms, nrm[0]: nrm[1]},
            joined=joined,
            tls=tls,
        )
        jobs = Jobs(
            coordinator=coordinator,
            database=opened,
            reach=known.reach,
            directory=journals,
            clock=SystemClock(),
        )
        desk = Desk(
            coordinator,
            where,
            network=None if listen is None or tls is None else Network(where=listen, tls=tls),
            members=known,
            jobs=jobs,
            site=None if tls is None else tls.identity.site,
        )
        async with coordinator, jobs, desk:
            ready()
            await told_to_end()


def adopt(reservations: Reservations, site: str) -> None:
    """A coordinator that has got a certificate knows the users of its host by name; what they reserved before
    stays theirs.
    """
    for owner in reservations.owners():
        if found := re.fullmatch(r"uid:([1-9][0-9]*)", owner):
            name = called(local_user(int(found[1])), site=site)
            reservations.hand_over(owner, name)
            _log.info("the reservations of %s are those of %s from now on", owner, name)


class Desk:
    """A coordinator that listens, and its jobs where it has some. A context manager.

    site: whose users those of this host are; None: they go by number. members: for who may change them.
    """

    def __init__(
        self,
        coordinator: Coordinator,
        where: Endpoint,
        *,
        mode: int = 0o666,
        network: Network | None = None,
        jobs: Jobs | None = None,
        members: Members | None = None,
        site: str | None = None,
    ) -> None:
        self._coordinator, self._members, self._jobs = coordinator, members, jobs
        models = {**COORDINATOR_PARAMS, **JOB_PARAMS, **(ADMINISTRATOR_PARAMS if members is not None else {})}
        self.doors = Doors(
            where,
            network,
            hearing(models, self._answer, who=functools.partial(caller, site=site)),
            name="a user",
            rights=_RIGHTS,
            mode=mode,
        )

    async def __aenter__(self) -> Desk:
        await self.doors.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.doors.__aexit__(None, None, None)

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
                sites = await self._coordinator.sites()
                return sites if self._members is None else self._members.told(sites)
            case coalloc.JOIN, Join() if self._members is not None:
                return await self._members.join(asked)
            case coalloc.LEAVE, Leave() if self._members is not None:
                return await self._members.leave(asked)
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
