"""The coordinator at work: the table of ``coalloc.coordinator`` put into effect.

Each reservation has a *course*: what is known of it, and a task that asks the parties what the table says
is to be asked, until nothing is. A step that changes the state is on the disk before it is acted upon, so a
coordinator that was killed goes on from what is written there.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeVar

from virtgrid.core.clock import Clock
from virtgrid.core.errors import (
    NotAdmittedError,
    NotFoundError,
    PeerUnreachableError,
    RefusedError,
    VirtgridError,
)
from virtgrid.grid.coalloc import coordinator as table
from virtgrid.grid.coalloc import provider, windows
from virtgrid.grid.coalloc.coordinator import Coordination, Event
from virtgrid.grid.grc import place
from virtgrid.grid.grc.ledger import EVERYBODY, Ledger, Quotas
from virtgrid.grid.grc.parties import Transport, said
from virtgrid.grid.messages.coalloc import (
    FIT,
    OFFER,
    AskFit,
    AskOffer,
    Command,
    Fit,
    Hold,
    HoldAnswer,
    Line,
    Listed,
    Nodes,
    Offer,
    Promise,
    ReservationState,
    Reserve,
    SiteList,
    SiteView,
    Span,
    View,
    Wanted,
    Window,
    range_for,
)
from virtgrid.grid.messages.common import parse
from virtgrid.grid.store.database import Database
from virtgrid.grid.store.reservations import LIST_LIMIT, Kept, KeptParties, Reservation, Reservations
from virtgrid.wire import message
from virtgrid.wire.message import BadMessageError, RemoteError

T = TypeVar("T")
_log = logging.getLogger(__name__)

_AGAIN_MOST_S: Final = 1.0
"""Between two HOLDs of the same to a party that cannot be reached."""
_TIDY_EVERY_S: Final = 600.0
_WHY_LIMIT: Final = 500
SITES_LIMIT: Final = 256
"""Sites one coordinator may know."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """ttl_s: of a hold. hold_s: how long a party may take to answer HOLD; much less than ttl_s. ask_s: any
    other question. answer_s: how long a user waits for the outcome before being told to ask again.
    """

    ttl_s: int = 30
    hold_s: float = 5.0
    ask_s: float = 5.0
    answer_s: float = 15.0
    again_s: float = 0.1
    again_most_s: float = 5.0
    sweep_s: float = 5.0


@dataclass(slots=True, eq=False)
class _Course:
    now: Reservation
    writing: asyncio.Lock = field(default_factory=asyncio.Lock)
    moved: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None


class Coordinator:
    """A GRC. A context manager: takes up what it had under way, and drives it meanwhile.

    sites: the CRMs by the names of their sites. network: the NRM and its name, where there is one.
    quotas: what each user may have at a time.
    """

    def __init__(
        self,
        *,
        database: Database,
        sites: Mapping[str, Transport],
        network: tuple[str, Transport] | None,
        clock: Clock,
        timing: Timing | None = None,
        quotas: Quotas | None = None,
    ) -> None:
        self._reservations = Reservations(database)
        self._ledger = Ledger(quotas or Quotas())
        self._sites = dict(sites)
        self._parties = {**sites, **({network[0]: network[1]} if network else {})}
        self._network = network[0] if network else None
        if self._network in self._sites:
            raise RefusedError(f"'{self._network}' is the name of a site and of the network manager")
        self._clock, self._timing = clock, timing or Timing()
        self._courses: dict[str, _Course] = {}
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="store of the coordinator")
        self._sweeper: asyncio.Task[None] | None = None
        self._tidied_s: float | None = None

    async def __aenter__(self) -> Coordinator:
        for owner, wish in await self._store(self._reservations.open):
            self._ledger.known(owner, wish)
        for id_ in await self._store(self._reservations.under_way):
            await self._happened(id_, Event.RESTARTED, "the coordinator was restarted before it decided")
        await self._end_what_is_over()
        self._sweeper = asyncio.create_task(self._sweep())
        return self

    async def __aexit__(self, *_: object) -> None:
        tasks = [course.task for course in self._courses.values() if course.task is not None]
        tasks += [self._sweeper] if self._sweeper is not None else []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for party in self._parties.values():
            await party.close()
        self._thread.shutdown()

    # -- what jobs ask -------------------------------------------------------------------------

    @property
    def network(self) -> str | None:
        """The name of the network manager."""
        return self._network

    async def holds(self, id_: str) -> dict[str, str]:
        """The keys of a reservation's holds, by party. Errors: NotFoundError."""
        parties = (await self._known(id_)).now.kept.parties
        return {name: one.hold.key for name, one in parties.items() if one.hold is not None}

    async def ask(self, party: str, method: str, params: Mapping[str, Any], *, deadline_s: float) -> Any:
        """Say something to a party. Errors: its own; PeerUnreachableError: not known whether it was done."""
        return await self._call(party, method, params, deadline_s)

    def check(self, wish: Reserve) -> None:
        """Errors: RefusedError: a reservation that cannot be, whoever is asked."""
        provider.require_window(wish.window, self._now_s())
        self._require_known(wish)
        if self._network is None and (wish.bandwidth_bytes_s is not None or wish.segment is not None):
            raise RefusedError(
                "this coordinator has no network manager", hint="reserve without bandwidth and segment"
            )

    # -- what users ask ------------------------------------------------------------------------

    async def reserve(self, wish: Reserve, *, owner: str) -> View:
        """All or nothing. A view that is still HOLDING or COMMITTING means: not known yet, ask again.

        Errors: RefusedError (unknown site, past, an id that was used), nothing changed then.
        """
        try:
            known = await self._known(wish.id)
        except NotFoundError:
            known = await self._begin(wish, owner)
        if known.now.owner != owner or known.now.wish != wish:
            raise RefusedError(
                f"the id {wish.id} was used for another reservation", hint="make a new id for each one"
            )
        return await self._outcome(known)

    async def show(self, id_: str, *, owner: str) -> View:
        """Errors: NotFoundError."""
        return (await self._own(id_, owner)).now.view()

    async def cancel(self, id_: str, *, owner: str) -> View:
        """Give everything back. Errors: NotFoundError."""
        await self._own(id_, owner)
        return await self._outcome(await self._happened(id_, Event.CANCELLED, "cancelled by its user"))

    async def list(self, after: str | None, *, owner: str) -> Listed:
        """The caller's own, in the order of ids."""
        whose = None if owner == EVERYBODY else owner
        found = await self._store(lambda: self._reservations.after(after or "", owner=whose))
        lines = [
            Line(
                id=one.wish.id,
                state=one.state,
                reason=one.reason[:200],
                window=one.wish.window,
                sites=tuple(wish.site for wish in one.wish.sites),
                nodes=sum(wish.nodes for wish in one.wish.sites),
            )
            for one in found
        ]
        return Listed(reservations=tuple(lines), more=len(found) == LIST_LIMIT)

    async def sites(self) -> SiteList:
        """Everybody the coordinator knows, and what they offer for the next hour."""
        now_s = self._now_s()
        asked = AskOffer(window=Window(begins_at_s=now_s, ends_at_s=now_s + 3600), prefix=30)
        names = list(self._sites)
        offers = await asyncio.gather(*(self._offer(site, asked) for site in names))
        views = [site_view(site, offer) for site, offer in zip(names, offers, strict=True)]
        if self._network is not None:
            problem = None
            try:
                await self._parties[self._network].call("PING", {}, deadline_s=self._timing.ask_s)
            except VirtgridError as error:
                problem = said(error)
            views.append(SiteView(party=self._network, kind="nrm", problem=problem))
        return SiteList(sites=tuple(views))

    def take_in(self, site: str, party: Transport) -> None:
        """One more site."""
        self.require_room(site)
        self._sites[site] = self._parties[site] = party

    def require_room(self, site: str) -> None:
        """Whether a site of this name can be taken in. Errors: RefusedError."""
        if site in self._parties:
            raise RefusedError(f"there is a party '{site}' already", hint="virtgrid site list")
        if len(self._sites) >= SITES_LIMIT:
            raise RefusedError(f"this coordinator knows {SITES_LIMIT} sites, which is all it may")

    def require_unused(self, site: str) -> None:
        """Whether a site keeps nothing for us. Errors: RefusedError."""
        if kept := self._ledger.at(site):
            some = "1 open reservation has" if kept == 1 else f"{kept} open reservations have"
            raise RefusedError(
                f"{some} nodes of {site}",
                hint="virtgrid reservation list; cancel them, or wait for their end",
            )

    async def let_go(self, site: str) -> None:
        """One site less. A reservation that is just being asked for there is told that it is unknown."""
        del self._sites[site]
        await self._parties.pop(site).close()

    # -- a new reservation ---------------------------------------------------------------------

    async def _begin(self, wish: Reserve, owner: str) -> _Course:
        self.check(wish)
        self._ledger.require(owner, wish, now_s=self._now_s())
        wanted, without = await self._wanted(wish)
        now = table.begin([*wanted, *without])
        for party, why in without.items():
            now = table.refused(now, party, Command.HOLD, why)
        kept = {name: Kept(hold=self._hold(wish, what)) for name, what in wanted.items()}
        kept |= {name: Kept(hold=None) for name in without}
        new = Reservation(
            wish=wish, owner=owner, state=now.state, reason=now.reason, kept=KeptParties(parties=kept)
        ).moved(now)
        self._require_known(wish)  # a site may have left meanwhile; from here on it cannot
        charged = self._ledger.charge(owner, wish, now_s=self._now_s())
        try:
            await self._store(lambda: self._reservations.begin(new))
        except BaseException as error:
            if charged:
                self._ledger.give_back(owner, wish.id)
            if isinstance(error, RefusedError):  # the same words a moment ago, over another line
                return await self._known(wish.id)
            raise
        course = self._courses[wish.id] = _Course(new)
        self._drive(course)
        return course

    def _require_known(self, wish: Reserve) -> None:
        unknown = [one.site for one in wish.sites if one.site not in self._sites]
        if unknown:
            known = ", ".join(sorted(self._sites)) or "none yet: virtgrid site join"
            raise RefusedError(f"there is no site '{unknown[0]}'", hint=f"the sites are {known}")

    async def _wanted(self, wish: Reserve) -> tuple[dict[str, Wanted], dict[str, str]]:
        """What each party is asked for; and of those that cannot be asked, why."""

        async def offered(site: str, nodes: int) -> Offer | str:
            asked = AskOffer(window=wish.window, prefix=range_for(nodes), spread=place.spread(wish.id))
            return await self._offer(site, asked)

        open_ = [one for one in wish.sites if one.addresses is None]
        answers = await asyncio.gather(*(offered(one.site, one.nodes) for one in open_))
        offers = dict(zip((one.site for one in open_), answers, strict=True))
        free = {site: offer.free for site, offer in offers.items() if isinstance(offer, Offer)}
        placed = place.place(wish, free)
        wanted: dict[str, Wanted] = dict(place.nodes_of(wish, placed.ranges))
        if self._network is not None:
            wanted[self._network] = place.paths_of(wish)
        silent = {site: offer for site, offer in offers.items() if isinstance(offer, str)}
        return wanted, {**placed.without, **silent}

    def _hold(self, wish: Reserve, wanted: Wanted) -> Hold:
        return Hold(
            key=secrets.token_urlsafe(18),
            reservation=wish.id,
            window=wish.window,
            ttl_s=self._timing.ttl_s,
            asked_at_s=self._now_s(),
            wanted=wanted,
        )

    async def _offer(self, site: str, asked: AskOffer) -> Offer | str:
        try:
            answer = await self._call(site, OFFER, asked.model_dump(), self._timing.ask_s)
            return parse(Offer, OFFER, answer)
        except (VirtgridError, BadMessageError) as error:
            return said(error)

    # -- its course ----------------------------------------------------------------------------

    def _drive(self, course: _Course) -> None:
        if course.task is None or course.task.done():
            course.task = asyncio.create_task(self._run(course), name=f"reservation {course.now.wish.id}")

    async def _run(self, course: _Course) -> None:
        wait_s = self._timing.again_s
        while asks := table.todo(course.now.coordination):
            course.moved.clear()
            asked = (self._ask(course, party, command) for party, command in asks.items())
            for problem in await asyncio.gather(*asked, return_exceptions=True):
                if isinstance(problem, BaseException):
                    _log.error("reservation %s could not go on", course.now.wish.id, exc_info=problem)
            if table.todo(course.now.coordination) == asks:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait_s):
                        await course.moved.wait()
                wait_s = min(wait_s * 2, self._timing.again_most_s)
            else:
                wait_s = self._timing.again_s
        self._rest(course)

    async def _ask(self, course: _Course, party: str, command: Command) -> None:
        hold = course.now.kept.parties[party].hold
        assert hold is not None
        try:
            if command is Command.HOLD:
                await self._ask_hold(course, party, hold)
                return
            await self._call(party, command, Promise(key=hold.key).model_dump(), self._timing.ask_s)
        except (VirtgridError, BadMessageError) as error:
            if command is Command.COMMIT and isinstance(error, RefusedError | NotFoundError):
                await self._refused(course, party, command, error.what)
                return
            _log.info("reservation %s: %s of %s: %s", course.now.wish.id, command, party, error)
            return
        await self._step(course, lambda now: table.did(now, party, command))

    async def _ask_hold(self, course: _Course, party: str, hold: Hold) -> None:
        """The same question with the same key until it is answered or the time is up."""
        loop = asyncio.get_running_loop()
        until_s = loop.time() + self._timing.hold_s
        why, wait_s = "", self._timing.again_s
        while (left_s := until_s - loop.time()) > 0:
            try:
                raw = await self._call(party, Command.HOLD, hold.model_dump(mode="json"), left_s)
                answer = parse(HoldAnswer, Command.HOLD, raw)
                require_sense(hold, answer)
            except NotAdmittedError as error:
                await self._refused(course, party, Command.HOLD, said(error))
                return
            except (PeerUnreachableError, BadMessageError) as error:
                why = said(error)
                await asyncio.sleep(min(wait_s, max(0.0, until_s - loop.time())))
                wait_s = min(wait_s * 2, _AGAIN_MOST_S)
                continue
            except VirtgridError as error:
                await self._refused(course, party, Command.HOLD, error.what[:_WHY_LIMIT])
                return
            if answer.standing is not None:
                held = {"grant": answer.standing.grant}
                await self._step(course, lambda now: table.did(now, party, Command.HOLD), party, held)
            elif answer.refusal is not None:
                told = {"nearest": answer.refusal.nearest}
                await self._refused(course, party, Command.HOLD, answer.refusal.why, told)
            return
        what = why or f"did not answer within {self._timing.hold_s:g} s"
        await self._step(course, lambda now: table.silent(now, party, what))

    async def _refused(
        self,
        course: _Course,
        party: str,
        command: Command,
        why: str,
        told: Mapping[str, Any] | None = None,
    ) -> None:
        await self._step(course, lambda now: table.refused(now, party, command, why), party, told)

    async def _call(self, party: str, method: str, params: Mapping[str, Any], deadline_s: float) -> Any:
        """Errors: PeerUnreachableError when it is not known whether it was done."""
        try:
            return await self._parties[party].call(method, params, deadline_s=deadline_s)
        except RemoteError as error:
            if error.fault.code in (message.BUSY, message.INTERNAL_ERROR):
                raise PeerUnreachableError(f"{party} could not answer {method}", cause=error.what) from error
            raise
        except KeyError:
            raise PeerUnreachableError(f"this coordinator does not know {party} any more") from None

    async def _step(
        self,
        course: _Course,
        step: Callable[[Coordination], Coordination],
        party: str = "",
        told: Mapping[str, Any] | None = None,
    ) -> None:
        """One step of the table; when it changes the state it is written down before it counts.

        told: what the party said besides yes or no.
        """
        async with course.writing:
            before = course.now.coordination
            after = step(before)
            if after == before:
                return
            moved = course.now.moved(after)
            if told:
                moved = moved.told(party, **told)
            if moved.state is not course.now.state:
                if moved.state is ReservationState.RELEASED:
                    moved = await self._with_nearest(moved)
                await self._store(lambda: self._reservations.write(moved))
                if moved.state in (ReservationState.RELEASED, ReservationState.OVER):
                    self._ledger.give_back(moved.owner, moved.wish.id)
                _log.info("reservation %s is %s: %s", moved.wish.id, moved.state, moved.reason)
            course.now = moved
            course.moved.set()

    async def _happened(self, id_: str, event: Event, reason: str) -> _Course:
        """Something that no party said. Errors: NotFoundError."""
        course = self._courses.get(id_)
        if course is None:
            found = await self._store(lambda: self._reservations.find(id_))
            course = self._courses.setdefault(id_, _Course(found))
        await self._step(course, lambda now: table.happened(now, event, reason))
        if table.todo(course.now.coordination):
            self._drive(course)
        else:
            self._rest(course)
        return course

    def _rest(self, course: _Course) -> None:
        """Nobody is asked anything: what is on the disk is all there is to know."""
        if table.todo(course.now.coordination) == {}:
            self._courses.pop(course.now.wish.id, None)

    async def _with_nearest(self, refused: Reservation) -> Reservation:
        """With the windows in which all parties could; everybody has given back what was held for it."""
        begins, lasts = refused.wish.window.begins_at_s, refused.wish.window.lasts_s

        async def fits(party: str, hold: Hold | None) -> list[Span]:
            if hold is None:
                return []
            asked = AskFit(near_s=begins, lasts_s=lasts, wanted=hold.wanted)
            try:
                raw = await self._call(party, FIT, asked.model_dump(mode="json"), self._timing.ask_s / 2)
                return list(parse(Fit, FIT, raw).begins)
            except (VirtgridError, BadMessageError):
                return []

        if not any(one.nearest for one in refused.kept.parties.values()):
            return refused
        parties = refused.kept.parties.items()
        found = await asyncio.gather(*(fits(name, one.hold) for name, one in parties))
        spans = found[0]
        for more in found[1:]:
            spans = windows.common(spans, more)
        near = windows.nearest(spans, begins, lasts)
        kept = refused.kept.model_copy(update={"nearest": near})
        return replace(refused, kept=kept)

    # -- knowing -------------------------------------------------------------------------------

    async def _known(self, id_: str) -> _Course:
        """Errors: NotFoundError."""
        if (course := self._courses.get(id_)) is not None:
            return course
        found = await self._store(lambda: self._reservations.find(id_))
        return self._courses.get(id_) or _Course(found)

    async def _own(self, id_: str, owner: str) -> _Course:
        """The caller's own. Errors: NotFoundError, also for somebody else's."""
        course = await self._known(id_)
        if owner not in (course.now.owner, EVERYBODY):
            raise NotFoundError(f"there is no reservation {id_}", hint="virtgrid reservation list")
        return course

    async def _outcome(self, course: _Course) -> View:
        """The view when it is decided what becomes of it, or when the user has waited long enough."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._timing.answer_s):
                while not course.now.coordination.settled:
                    course.moved.clear()
                    await course.moved.wait()
        return course.now.view()

    async def _sweep(self) -> None:
        while True:
            await self._clock.sleep(self._timing.sweep_s)
            try:
                await self._end_what_is_over()
            except VirtgridError as error:
                _log.warning("ended reservations could not be cleared: %s", error)

    async def _end_what_is_over(self) -> None:
        now_s = self._now_s()
        for id_ in await self._store(lambda: self._reservations.ended(now_s)):
            await self._happened(id_, Event.ENDED, "its window has ended")
        await self._store(lambda: self._reservations.forget(now_s))
        if self._tidied_s is None or self._clock.monotonic_s() - self._tidied_s >= _TIDY_EVERY_S:
            self._tidied_s = self._clock.monotonic_s()
            await self._store(self._reservations.forget_beyond)

    def _now_s(self) -> int:
        return int(self._clock.utc().timestamp())

    async def _store(self, work: Callable[[], T]) -> T:
        waiting: Awaitable[T] = asyncio.get_running_loop().run_in_executor(self._thread, work)
        return await waiting


def require_sense(asked: Hold, answer: HoldAnswer) -> None:
    """Whether what a party says it holds is what it was asked for: a promise of something else is none.

    Errors: BadMessageError.
    """
    if (told := answer.standing) is None:
        return
    wanted, grant = asked.wanted, told.grant
    if isinstance(wanted, Nodes):
        right = (
            len(grant.nodes) == len(set(grant.nodes)) == wanted.nodes and grant.addresses == wanted.addresses
        )
    else:
        right = grant.segment is not None and wanted.segment in (None, grant.segment)
    if not right or (told.key, told.window) != (asked.key, asked.window):
        raise message.bad_parameters(Command.HOLD, "the answer promises something else than was asked for")


def site_view(site: str, offer: Offer | str) -> SiteView:
    """A site in a list: what it offers, or why it does not answer."""
    if isinstance(offer, str):
        return SiteView(party=site, kind="crm", problem=offer)
    return SiteView(
        party=site,
        kind="crm",
        nodes=offer.nodes,
        nodes_free=offer.nodes_free,
        advertised=offer.advertised,
        problems=offer.problems,
    )
