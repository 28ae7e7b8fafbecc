"""A site: its promises (``provide``), whose nodes they are (``backend``), and the crews that work on them.

What a coordinator finds here besides the commands of a provider is in ``messages.job``. A hold is backed by
its backend before HOLD is answered, and is given back only when no pilot of it is left.
"""

from __future__ import annotations

import asyncio
import logging
import os
import pwd
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final, TypeVar

from virtgrid.core.clock import Clock, SystemClock
from virtgrid.core.errors import NotFoundError, PeerUnreachableError, RefusedError
from virtgrid.grid.claims import Claims
from virtgrid.grid.coalloc.crew import Goal
from virtgrid.grid.crm.backend import Backend, NodesPromised
from virtgrid.grid.crm.crew import Crew, Terms, members
from virtgrid.grid.crm.stock import SiteStock
from virtgrid.grid.doors import Network
from virtgrid.grid.messages import job as jobs
from virtgrid.grid.messages.coalloc import (
    PROBLEMS_MAX,
    AskFit,
    AskOffer,
    Fit,
    Hold,
    HoldAnswer,
    HoldState,
    Offer,
    Refusal,
    Standing,
)
from virtgrid.grid.messages.common import Model
from virtgrid.grid.messages.job import AskCrew, CrewView, Dismiss, Equip, Launch, Muster, Order
from virtgrid.grid.pilots import Pilot, Pilots
from virtgrid.grid.provide import Counter, Stored, told_to_end
from virtgrid.grid.store.crews import CrewRecord, Crews
from virtgrid.grid.store.database import Database
from virtgrid.wire.endpoint import Endpoint
from virtgrid.wire.identity import Identity, Role
from virtgrid.wire.message import no_such_method
from virtgrid.wire.tls import Tls

T = TypeVar("T")
_log = logging.getLogger(__name__)

_GONE_S: Final = 3.0
"""How long RELEASE waits for a crew to go; its coordinator asks again."""


class Site:
    """A provider whose nodes have pilots. A context manager: takes up the crews it had under way.

    accounts: of the site, for users who are called otherwise elsewhere. directory: for output on its way.
    """

    def __init__(
        self,
        *,
        stored: Stored,
        stock: SiteStock,
        database: Database,
        backend: Backend,
        terms: Terms,
        directory: Path,
        accounts: Mapping[str, str] | None = None,
        tls: Tls | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.party = stored.party
        self._stored, self._stock, self._backend, self._terms = stored, stock, backend, terms
        self._directory, self._accounts = directory, dict(accounts or {})
        self._table = Crews(database)
        self._clock = clock or SystemClock()
        self._crews: dict[str, Crew] = {}
        #: By the ids of its members' tickets, which stay what they were made.
        self._of_ticket: dict[str, Crew] = {}
        self._mustering = asyncio.Lock()
        self._said: dict[str, str] = {}
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="crews")
        self.pilots = Pilots(
            terms.crm,
            [terms.key.public_key()],
            taker=self._take,
            tls=tls,
            claims=Claims(directory / "claims"),
            met=self._met,
            here=self._here,
            collects=False,
        )

    async def __aenter__(self) -> Site:
        for record in await self._do(self._table.all):
            self._crews[record.hold] = self._crew(record)
        await self.pilots.__aenter__()
        for crew in self._crews.values():
            crew.begin()
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.gather(*(crew.close() for crew in self._crews.values()))
        await self.pilots.__aexit__()
        self._thread.shutdown()

    # -- promises ------------------------------------------------------------------------------

    async def hold(self, asked: Hold, *, owner: str) -> HoldAnswer:
        answer = await self._stored.hold(asked, owner=owner, stock=await self._seen())
        if answer.standing is None:
            return answer
        try:
            await self._promise(_promised(answer.standing))
        except RefusedError as error:
            await self._stored.release(asked.key, owner=owner)
            return HoldAnswer(refusal=Refusal(party=self.party, why=error.what[:500]))
        return answer

    async def commit(self, key: str, *, owner: str) -> Standing:
        """The nodes are looked at once more; who has committed already is told so, whatever they are like."""
        standing = await self._stored.status(key, owner=owner)
        if standing.state is HoldState.HELD:
            try:
                await self._promise(_promised(standing))
            except RefusedError as error:
                # Whoever hears this takes it that nothing is kept any more.
                await self._stored.release(key, owner=owner)
                raise RefusedError(f"its nodes cannot be had any more: {error.what}") from error
        return await self._stored.commit(key, owner=owner)

    async def _promise(self, what: NodesPromised) -> None:
        """Errors: RefusedError."""
        try:
            await self._backend.promise(what)
        except RefusedError:
            # Perhaps what is in the way is our own: of a hold that lapsed a moment ago, or one that was
            # withdrawn and came back with a backend that was restarted.
            if not await self._sweep_orphans():
                raise
            await self._backend.promise(what)

    async def _seen(self) -> SiteStock:
        return self._stock.seen(await self._backend.nodes())

    async def release(self, key: str, *, owner: str) -> None:
        """Errors: PeerUnreachableError while pilots of it are left: it is to be said again."""
        crew = self._crews.get(key)
        if crew is not None and crew.record.owner == owner:
            await crew.aim(Goal.GONE)
            if not (await crew.until_gone(_GONE_S)):
                raise PeerUnreachableError(f"the sandboxes of {crew.record.reservation} are not gone yet")
        await self._stored.release(key, owner=owner)
        await self._clear(key)

    async def status(self, key: str, *, owner: str) -> Standing:
        return await self._stored.status(key, owner=owner)

    async def fit(self, asked: AskFit) -> Fit:
        return await self._stored.fit(asked, stock=await self._seen())

    async def offer(self, asked: AskOffer) -> Offer:
        offer = await self._stored.offer(asked, stock=await self._seen())
        found = [one[:300] for one in await self._backend.problems()]
        if len(found) > PROBLEMS_MAX:
            found[PROBLEMS_MAX - 1 :] = [f"and {len(found) - PROBLEMS_MAX + 1} more"]
        return offer.model_copy(update={"problems": tuple(found)})

    async def sweep(self) -> None:
        """What lapsed or ended, and what a crash left at the backend, or took from it."""
        await self._stored.sweep()
        try:
            await self._sweep_orphans()
            lost = await self._backend.restore(
                [_promised(one) for one in await self._stored.standing() if one.grant.nodes]
            )
        except PeerUnreachableError as error:
            lost = {"": f"the backend could not be swept: {error.what}"}
        for why in (why for key, why in lost.items() if self._said.get(key) != why):
            _log.warning("%s: %s", self.party, why)
        self._said = dict(lost)

    async def _sweep_orphans(self) -> bool:
        """Clear away what no hold stands for; whether there was something."""
        # In this order: what is kept for a hold there was written down before, so what is there now and not
        # written down afterwards is nobody's.
        there = await self._backend.holds()
        orphans = [key for key in {*self._crews, *there} if not await self._stored.keeps(key)]
        for problem in await asyncio.gather(*map(self._clear, orphans), return_exceptions=True):
            if isinstance(problem, BaseException):
                raise problem
        return bool(orphans)

    async def _clear(self, key: str) -> None:
        """Of a hold that keeps nothing any more."""
        crew = self._crews.get(key)
        if crew is not None:
            if not crew.record.gone:
                return
            del self._crews[key]
            for member in crew.record.members:
                self._of_ticket.pop(member.ticket, None)
            await crew.remove()
            await self._do(lambda: self._table.remove(key))
        await self._backend.withdraw(key)

    # -- crews ---------------------------------------------------------------------------------

    async def answer(self, asked: Model, method: str, owner: str) -> Model | None:
        """What a coordinator says of crews."""
        match method, asked:
            case Order.MUSTER, Muster():
                await self._muster(asked, owner)
            case Order.EQUIP, Equip():
                await self._own(asked.key, owner).aim(Goal.UP, hosts=asked.hosts)
            case Order.LAUNCH, Launch():
                await self._own(asked.key, owner).change(program=asked.program)
            case Order.DISMISS, Dismiss():
                if asked.key in self._crews:
                    await self._own(asked.key, owner).aim(Goal.GONE)
            case jobs.CREW, AskCrew():
                return await self._view(asked, owner)
            case _:
                raise no_such_method(method)
        return None

    async def _view(self, asked: AskCrew, owner: str) -> CrewView:
        return await self._own(asked.key, owner).view(asked.seen, asked.after, asked.wait_s)

    def _own(self, key: str, owner: str) -> Crew:
        """Errors: NotFoundError, also for somebody else's."""
        crew = self._crews.get(key)
        if crew is None or crew.record.owner != owner:
            raise NotFoundError("this hold has no crew (any more)")
        return crew

    async def _muster(self, asked: Muster, owner: str) -> None:
        """Errors: RefusedError: no such account, not a user's to ask; NotFoundError, or not committed."""
        async with self._mustering:
            if (known := self._crews.get(asked.key)) is not None:
                if known.record.owner != owner or known.record.muster != asked:
                    raise RefusedError("this hold has a crew that was mustered otherwise")
                return
            standing = await self._stored.status(asked.key, owner=owner)
            if standing.state is not HoldState.COMMITTED:
                raise RefusedError(f"the hold of reservation {standing.reservation} is {standing.state}")
            account = self._account(asked, owner)
            grant = standing.grant
            assert grant.addresses is not None, "a site grants addresses with its nodes"
            record = CrewRecord(
                muster=asked,
                owner=owner,
                reservation=standing.reservation,
                account=account,
                window=standing.window,
                members=members(asked.key, grant.nodes, grant.addresses),
            )
            await self._save(record)
            crew = self._crews[asked.key] = self._crew(record)
            crew.begin()

    def _account(self, asked: Muster, owner: str) -> str:
        name = account_of(asked, owner=owner, site=self.party, accounts=self._accounts)
        try:
            uid = pwd.getpwnam(name).pw_uid
        except KeyError:
            raise RefusedError(
                f"{self.party} has no account '{name}'", hint=f"--account {asked.user}=NAME at its manager"
            ) from None
        if uid == 0:
            raise RefusedError("root has no sandboxes: a job is a user's")
        if owner.startswith("uid:") and owner not in ("uid:0", f"uid:{os.geteuid()}", f"uid:{uid}"):
            raise RefusedError(f"{owner} may not muster a crew for {asked.user}")
        return name

    def _crew(self, record: CrewRecord) -> Crew:
        crew = Crew(
            record=record,
            terms=self._terms,
            backend=self._backend,
            pilots=self.pilots,
            clock=self._clock,
            directory=self._directory,
            save=self._save,
            promise=self._promise,
            kept=lambda: self._stored.keeps(record.hold),
        )
        self._of_ticket |= dict.fromkeys((member.ticket for member in record.members), crew)
        return crew

    async def _save(self, record: CrewRecord) -> None:
        await self._do(lambda: self._table.save(record))

    # -- pilots --------------------------------------------------------------------------------

    def _of(self, pilot: Pilot) -> Crew | None:
        """Whose it is; asked at everything that a thousand pilots tell."""
        crew = self._of_ticket.get(pilot.ticket.id)
        return crew if crew is not None and self._crews.get(crew.record.hold) is crew else None

    def _met(self, pilot: Pilot) -> None:
        crew = self._of(pilot)
        if crew is None:
            raise RefusedError(f"nobody waits for a pilot of {pilot.ticket.sandbox} (any more)")
        crew.met(pilot)

    def _here(self, pilot: Pilot) -> None:
        if (crew := self._of(pilot)) is not None:
            crew.wake()

    async def _take(self, pilot: Pilot, note: Model) -> None:
        if (crew := self._of(pilot)) is not None:
            await crew.take(pilot, note)

    async def _do(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


def account_of(asked: Muster, *, owner: str, site: str, accounts: Mapping[str, str]) -> str:
    """The site's account of a user. One of another site has the account that was named for them, and no
    other: the same name there is another person's.

    owner: the coordinator. Errors: RefusedError.
    """
    if asked.who is None:
        if not owner.startswith("uid:"):
            raise RefusedError(f"{owner} does not say who its user {asked.user} is")
        return accounts.get(asked.user, asked.user)
    who = Identity.parse(asked.who)
    if (name := accounts.get(asked.who)) is not None:
        return name
    if who.role is not Role.USER or who.site != site:
        raise RefusedError(
            f"{who} is of another site and has no account at {site}",
            hint=f"--account {who}=NAME at its manager names one",
        )
    return accounts.get(who.name, who.name)


def _promised(standing: Standing) -> NodesPromised:
    return NodesPromised(
        hold=standing.key,
        reservation=standing.reservation,
        nodes=standing.grant.nodes,
        window=standing.window,
    )


async def no_jobs(asked: Model, method: str, owner: str) -> Model | None:
    """What a site without pilots answers to all that is said of crews."""
    if method == Order.DISMISS:
        return None
    raise RefusedError("this site runs no jobs, it only promises", hint="virtgrid serve crm --key FILE")


async def serve(
    *,
    party: str,
    database: Path,
    backend: Backend,
    ranges: list[str],
    terms: Terms,
    directory: Path,
    accounts: Mapping[str, str],
    tls: Tls | None,
    where: Endpoint,
    ready: Callable[[], None],
    network: Network | None = None,
    told: frozenset[str] = frozenset(),
) -> None:
    """A site until SIGTERM or SIGINT; its pilots go on. Errors: RefusedError (file, socket)."""
    stock = SiteStock(nodes=backend.names, ranges=ranges, guard_s=backend.guard_s)
    async with AsyncExitStack() as stack:
        opened = stack.enter_context(Database(database))
        with opened.write() as connection:
            stock.prepare(connection)
        stored = Stored(party=party, database=opened, stock=stock, clock=SystemClock())
        stack.callback(stored.close)
        site = Site(
            stored=stored,
            stock=stock,
            database=opened,
            backend=backend,
            terms=terms,
            directory=directory,
            accounts=accounts,
            tls=tls,
        )
        await stack.enter_async_context(site)
        more = (jobs.CREW_PARAMS, site.answer)
        await stack.enter_async_context(Counter(site, where, network=network, told=told, more=more))
        ready()
        await told_to_end()
