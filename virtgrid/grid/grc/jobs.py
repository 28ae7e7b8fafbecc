"""Jobs at work: the table of ``coalloc.job`` put into effect over the sites of a reservation.

Each job has a *course*: what is known of it, its journal, and tasks: one that reserves, waits and gives
back, and for each site one that says what the table orders and one that watches the crew. A step that
changes the state is on the disk before it is acted upon, so a coordinator that was killed goes on from
what is written.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import pwd
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

from virtgrid.core.clock import Clock
from virtgrid.core.errors import NotFoundError, PeerUnreachableError, RefusedError, VirtgridError
from virtgrid.grid.coalloc import job as table
from virtgrid.grid.coalloc.job import Event, Job
from virtgrid.grid.grc import journal as journals
from virtgrid.grid.grc import place, words
from virtgrid.grid.grc.coordinator import Coordinator
from virtgrid.grid.grc.journal import JobJournal
from virtgrid.grid.grc.ledger import EVERYBODY
from virtgrid.grid.grc.parties import Transport
from virtgrid.grid.messages.coalloc import Grant, PartyState, ReservationState
from virtgrid.grid.messages.common import Model, UserName, parse, require
from virtgrid.grid.messages.job import (
    CREW,
    AskCrew,
    CrewView,
    Dismiss,
    Equip,
    JobList,
    JobState,
    JobTold,
    JobView,
    Journal,
    Launch,
    Muster,
    Order,
    SiteTold,
    Submit,
)
from virtgrid.grid.store.database import Database
from virtgrid.grid.store.jobs import JobTable, KeptJob
from virtgrid.grid.store.reservations import LIST_LIMIT
from virtgrid.wire.identity import Identity
from virtgrid.wire.message import BadMessageError

T = TypeVar("T")
_log = logging.getLogger(__name__)

JOBS_LIMIT: Final = 256
"""Jobs a user may have under way."""
NODES_LIMIT: Final = 2048
"""Of a job: what everybody's keys and addresses fit into one message for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pace:
    """up_s: for the crews to come up. ask_s: for an order's answer. watch_s: how long CREW waits for news.
    answer_s: for a user who submits.
    """

    up_s: float = 120.0
    ask_s: float = 10.0
    watch_s: float = 10.0
    again_s: float = 0.1
    again_most_s: float = 5.0
    answer_s: float = 25.0
    sweep_s: float = 60.0


@dataclass(slots=True, eq=False)
class _Course:
    """A job under way. ordered: the last order each site has answered. keys: of the holds, by site."""

    kept: KeptJob
    journal: JobJournal
    writing: asyncio.Lock = field(default_factory=asyncio.Lock)
    moved: asyncio.Condition = field(default_factory=asyncio.Condition)
    ordered: dict[str, Order] = field(default_factory=dict)
    silent: set[str] = field(default_factory=set)
    task: asyncio.Task[None] | None = None

    @property
    def now(self) -> Job:
        return self.kept.now


class Jobs:
    """The jobs of a coordinator. A context manager: takes up what it had under way.

    reach: another line to a site, for watching. directory: of journals.
    """

    def __init__(
        self,
        *,
        coordinator: Coordinator,
        database: Database,
        reach: Callable[[str], Transport],
        directory: Path,
        clock: Clock,
        pace: Pace | None = None,
    ) -> None:
        self._coordinator, self._table, self._reach = coordinator, JobTable(database), reach
        self._directory, self._clock, self._pace = directory, clock, pace or Pace()
        self._courses: dict[str, _Course] = {}
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="jobs")
        self._sweeper: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Jobs:
        for id_ in await self._store(self._table.under_way):
            kept = await self._store(partial(self._table.find, id_))
            self._drive(kept)
        self._sweeper = asyncio.create_task(self._sweep())
        return self

    async def __aexit__(self, *_: object) -> None:
        tasks = [course.task for course in self._courses.values() if course.task is not None]
        tasks += [self._sweeper] if self._sweeper is not None else []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._thread.shutdown()

    # -- what users ask ------------------------------------------------------------------------

    async def submit(self, asked: Submit, *, owner: str) -> JobView:
        """Errors: RefusedError (no user of this host, too many, a used id), nothing changed then."""
        id_ = asked.reserve.id
        try:
            kept = await self._known(id_)
        except NotFoundError:
            kept = await self._begin(asked, owner)
        if kept.owner != owner or kept.wish != asked.reserve or kept.program != asked.program:
            raise RefusedError(f"the id {id_} was used for another job", hint="make a new id for each one")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._pace.answer_s):
                await self._until(id_, lambda now: now.state is not JobState.RESERVING)
        return (await self._known(id_)).view()

    async def _begin(self, asked: Submit, owner: str) -> KeptJob:
        user = _user(owner)
        if not self._coordinator.network:
            raise RefusedError(
                "this coordinator has no network manager, and a job's sandboxes need a segment",
                hint="virtgrid serve grc --nrm NAME=ENDPOINT",
            )
        if asked.program.key is not None:
            raise RefusedError("a job's program has no key of its own")
        self._coordinator.check(asked.reserve)
        if (nodes := sum(site.nodes for site in asked.reserve.sites)) > NODES_LIMIT:
            raise RefusedError(f"a job has at most {NODES_LIMIT} nodes, not {nodes}")
        if len(await self._store(lambda: self._table.under_way(owner))) >= JOBS_LIMIT:
            raise RefusedError(f"{user} has {JOBS_LIMIT} jobs under way", hint="virtgrid job list")
        kept = KeptJob(
            wish=asked.reserve,
            program=asked.program,
            owner=owner,
            user=user,
            submitted_at_s=int(self._now_s()),
            now=table.begin(site.site for site in asked.reserve.sites),
        )
        try:
            await self._store(lambda: self._table.begin(kept))
        except RefusedError:  # the same words a moment ago, over another line
            return await self._known(kept.id)
        course = self._drive(kept)
        await course.journal.write(self._told(course.now))
        return kept

    async def show(self, id_: str, *, owner: str) -> JobView:
        """Errors: NotFoundError."""
        return (await self._own(id_, owner)).view()

    async def list(self, after: str | None, *, owner: str) -> JobList:
        """The caller's own, in the order of ids."""
        whose = None if owner == EVERYBODY else owner
        found = await self._store(lambda: self._table.after(after or "", owner=whose))
        views = tuple(one.view() for one in found)
        return JobList(jobs=views, more=len(found) == LIST_LIMIT)

    async def cancel(self, id_: str, *, owner: str) -> JobView:
        """End it, and wait a while until nothing is left. Errors: NotFoundError."""
        await self._own(id_, owner)
        if (course := self._courses.get(id_)) is not None:
            await self._happened(course, Event.CANCELLED, "cancelled by its user")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._pace.answer_s):
                    await self._until(id_, lambda now: now.over)
        return (await self._known(id_)).view()

    async def follow(self, id_: str, after: int, wait_s: float, *, owner: str) -> Journal:
        """Its journal from a place on. Errors: NotFoundError."""
        await self._own(id_, owner)
        if (course := self._courses.get(id_)) is not None:
            return await course.journal.follow(after, wait_s)
        return await asyncio.to_thread(journals.read, self._path(id_), after, closed=True)

    async def _known(self, id_: str) -> KeptJob:
        """Errors: NotFoundError."""
        if (course := self._courses.get(id_)) is not None:
            return course.kept
        return await self._store(lambda: self._table.find(id_))

    async def _own(self, id_: str, owner: str) -> KeptJob:
        kept = await self._known(id_)
        if owner not in (kept.owner, EVERYBODY):
            raise NotFoundError(f"there is no job {id_}", hint="virtgrid job list")
        return kept

    async def _until(self, id_: str, true: Callable[[Job], bool]) -> None:
        if (course := self._courses.get(id_)) is not None:
            async with course.moved:
                while not true(course.now):
                    await course.moved.wait()

    # -- its course ----------------------------------------------------------------------------

    def _drive(self, kept: KeptJob) -> _Course:
        course = self._courses[kept.id] = _Course(kept, JobJournal(self._path(kept.id)))
        course.task = asyncio.create_task(self._run(course), name=f"job {kept.id}")
        return course

    async def _run(self, course: _Course) -> None:
        while not course.now.over:
            try:
                if course.now.state is JobState.RESERVING:
                    await self._reserve(course)
                elif course.now.state is JobState.WAITING:
                    await self._wait(course)
                else:
                    await self._work(course)
            except (VirtgridError, OSError) as error:
                _log.error("job %s could not go on: %s", course.kept.id, error)
                await asyncio.sleep(self._pace.again_most_s)
        await course.journal.close()
        self._courses.pop(course.kept.id, None)

    async def _reserve(self, course: _Course) -> None:
        """Until it is decided, or somebody ends the job."""
        kept = course.kept
        while course.now.state is JobState.RESERVING:
            try:
                view = await self._coordinator.reserve(kept.wish, owner=kept.owner)
            except RefusedError as error:
                await self._happened(course, Event.REFUSED, error.what)
                return
            if view.state is ReservationState.COMMITTED:
                await self._happened(course, Event.RESERVED, "it is reserved")
            elif view.state not in (ReservationState.HOLDING, ReservationState.COMMITTING):
                why = words.refusal(view)
                await self._happened(course, Event.REFUSED, why)

    async def _wait(self, course: _Course) -> None:
        begins_s = course.kept.wish.window.begins_at_s
        while course.now.state is JobState.WAITING and (left_s := begins_s - self._now_s()) > 0:
            await self._pause(course, min(left_s, 30.0))  # the wall clock may be set meanwhile
        await self._happened(course, Event.BEGUN, "its window has begun")

    async def _work(self, course: _Course) -> None:
        """From the beginning of the window until nothing is left."""
        await self._finished(course)  # killed between the journal's line and the step
        try:
            view = await self._coordinator.show(course.kept.id, owner=course.kept.owner)
        except NotFoundError:  # ended before it was asked for
            await self._happened(course, Event.BROKEN, "nothing was reserved")
            await self._give_back(course)
            return
        holds = await self._coordinator.holds(course.kept.id)
        grants = {one.party: one.grant for one in view.parties if one.state is PartyState.COMMITTED}
        try:
            musters = {
                site: self._muster(course.kept, holds[site], grants, self._coordinator.network)
                for site in course.now.sites
            }
        except (RefusedError, KeyError) as error:
            why = error.what if isinstance(error, RefusedError) else "it is not reserved any more"
            await self._happened(course, Event.BROKEN, why)
            musters = {}
        beside: list[Coroutine[Any, Any, None]] = [self._end_in_time(course)]
        for site, muster in musters.items():
            beside += [self._order(course, site, muster), self._watch(course, site, muster.key)]
        tasks = [asyncio.create_task(one) for one in beside]
        try:
            while not (course.now.state is JobState.DISMISSING and self._left(course, musters)):
                if (problem := _problem(tasks)) is not None:
                    # Nobody says or hears anything for it any more; RELEASE ends the crews as well.
                    await self._happened(course, Event.BROKEN, f"its coordinator failed: {problem}")
                    break
                await self._pause(course, 1.0)
        finally:
            for task in tasks:
                task.cancel()
            for problem in await asyncio.gather(*tasks, return_exceptions=True):
                if isinstance(problem, Exception):
                    _log.error("job %s", course.kept.id, exc_info=problem)
        await self._give_back(course)

    def _left(self, course: _Course, musters: Mapping[str, Muster]) -> bool:
        """Whether nothing of it is left at the sites that answer: the others hear of it by RELEASE."""
        left = {site for site, crew in course.now.sites.items() if not crew.gone}
        return not musters or left <= course.silent

    async def _give_back(self, course: _Course) -> None:
        """The reservation: until nobody keeps anything for it."""
        kept, wait_s = course.kept, self._pace.again_s
        while True:
            try:
                view = await self._coordinator.cancel(kept.id, owner=kept.owner)
            except NotFoundError:
                break
            if view.state in (ReservationState.RELEASED, ReservationState.OVER):
                break
            await asyncio.sleep(wait_s)
            wait_s = min(wait_s * 2, self._pace.again_most_s)
        reason = course.now.reason
        await self._happened(course, Event.GONE, reason)

    async def _end_in_time(self, course: _Course) -> None:
        """The window's end, and the time the crews have for coming up."""
        ends_s = course.kept.wish.window.ends_at_s
        up_s = self._clock.monotonic_s() + self._pace.up_s
        while course.now.state is not JobState.DISMISSING:
            if self._now_s() >= ends_s:
                await self._happened(course, Event.ENDED, "its window has ended")
            elif course.now.state in table.COMING_UP and self._clock.monotonic_s() > up_s:
                why = f"not everybody was up within {self._pace.up_s:g} s: {table.late(course.now)}"
                await self._happened(course, Event.BROKEN, why)
            await self._pause(course, min(1.0, max(0.05, ends_s - self._now_s())))

    def _muster(
        self, kept: KeptJob, key: str, grants: Mapping[str, Grant | None], network: str | None
    ) -> Muster:
        """Errors: RefusedError."""
        segment = grants[network or ""]
        ranges = [grants[site.site] for site in kept.wish.sites]
        addresses = [str(one.addresses) for one in ranges if one is not None]
        if segment is None or segment.segment is None:
            raise RefusedError("the network manager has granted no segment")
        who = None if kept.owner.startswith("uid:") else kept.owner
        prefix = place.common_prefix(addresses)
        return Muster(key=key, user=kept.user, tag=segment.segment, prefix=prefix, who=who)

    # -- a site --------------------------------------------------------------------------------

    async def _order(self, course: _Course, site: str, muster: Muster) -> None:
        """Say what the table orders, until it is answered; again when it orders something else."""
        wait_s = self._pace.again_s
        while not course.now.over:
            order = table.order(course.now, site)
            if order is None or course.ordered.get(site) is order:
                await self._pause(course, 1.0)
                continue
            if order is Order.EQUIP and not table.keyed(course.now):
                await self._pause(course, 1.0)  # a coordinator that was restarted has not heard of all yet
                continue
            try:
                await self._coordinator.ask(
                    site, order, self._words(course, order, muster), deadline_s=self._pace.ask_s
                )
            except PeerUnreachableError as error:
                await self._silent(course, site, error.cause or error.what)
                await self._pause(course, wait_s)
                wait_s = min(wait_s * 2, self._pace.again_most_s)
                continue
            except (VirtgridError, BadMessageError) as error:
                what = error.what if isinstance(error, VirtgridError) else str(error)
                if order is Order.DISMISS:
                    await self._step(course, lambda now: table.unknown(now, site))
                why = f"{site}: {what}"
                await self._happened(course, Event.BROKEN, why)
                await self._pause(course, wait_s)
                continue
            wait_s = self._pace.again_s
            await self._silent(course, site, None)
            course.ordered[site] = order
            await self._step(course, partial(table.told, site=site, said=order))
            await self._announce(course)

    def _words(self, course: _Course, order: Order, muster: Muster) -> dict[str, Any]:
        said: Model
        match order:
            case Order.MUSTER:
                said = muster
            case Order.EQUIP:
                said = Equip(key=muster.key, hosts=table.hosts(course.now))
            case Order.LAUNCH:
                said = Launch(key=muster.key, program=words.program(course.kept))
            case Order.DISMISS:
                said = Dismiss(key=muster.key)
        return said.model_dump(mode="json")

    async def _watch(self, course: _Course, site: str, key: str) -> None:
        """Hear what a site tells of its crew, and the output."""
        line, seen, wait_s = self._reach(site), 0, self._pace.again_s
        first = site == course.now.first
        try:
            while not (course.now.over or course.now.sites[site].gone):
                if course.now.state is JobState.MUSTERING and site not in course.ordered:
                    await self._pause(course, 1.0)  # it has no crew yet
                    continue
                after = course.journal.cursor if first else 0
                asked = AskCrew(key=key, seen=seen, after=after, wait_s=self._pace.watch_s)
                try:
                    raw = await line.call(
                        CREW, asked.model_dump(), deadline_s=self._pace.watch_s + self._pace.ask_s
                    )
                    view = parse(CrewView, CREW, raw)
                except NotFoundError:
                    await self._step(course, lambda now: table.unknown(now, site))
                    await self._pause(course, wait_s)
                    continue
                except (VirtgridError, BadMessageError) as error:
                    what = (error.cause or error.what) if isinstance(error, VirtgridError) else str(error)
                    await self._silent(course, site, what)
                    await asyncio.sleep(wait_s)
                    wait_s = min(wait_s * 2, self._pace.again_most_s)
                    continue
                seen, wait_s = view.version, self._pace.again_s
                await self._silent(course, site, None)
                await self._heard(course, site, view, first=first)
        finally:
            await line.close()

    async def _heard(self, course: _Course, site: str, view: CrewView, *, first: bool) -> None:
        at_s = self._now_s()
        before = course.journal.nodes
        told = [line for node in view.nodes if (line := words.node_line(before, site, node, at_s))]
        await course.journal.write(*told)
        if first:
            await self._output(course, view, at_s)
        if at_s >= course.kept.wish.window.ends_at_s - 1:  # a pilot's clock may be ahead: it is the end
            await self._happened(course, Event.ENDED, "its window has ended")
        if not (view.gone and view.output):  # the last of it first: it is gone when there is none left
            await self._step(course, lambda now: table.heard(now, site, view))

    async def _output(self, course: _Course, view: CrewView, at_s: float) -> None:
        await course.journal.write(*words.output_lines(view.output, course.journal.cursor, at_s))
        await self._finished(course)

    async def _finished(self, course: _Course) -> None:
        """What the journal says of the program's end."""
        if (end := course.journal.finished) is not None:
            status, usage, problem = end.status, end.usage, end.problem
            await self._step(course, lambda now: table.finished(now, status, usage, problem))

    async def _silent(self, course: _Course, site: str, problem: str | None) -> None:
        """A site does not answer, or does again: told once."""
        if (problem is not None) == (site in course.silent):
            return
        if problem is None:
            course.silent.discard(site)
        else:
            course.silent.add(site)
        told = None if problem is None else problem[:400]
        await course.journal.write(SiteTold(at_s=self._now_s(), site=site, problem=told))

    # -- steps ---------------------------------------------------------------------------------

    async def _step(self, course: _Course, step: Callable[[Job], Job]) -> None:
        """One step of the table; when it changes the state it is written down before it counts."""
        async with course.writing:
            before = course.now
            after = step(before)
            if after == before:
                return
            moved = course.kept.moved(after)
            if replace(after, sites=before.sites) != before or moved.used_s != course.kept.used_s:
                await self._store(lambda: self._table.write(moved))
            course.kept = moved
            if after.state is not before.state:
                _log.info("job %s is %s: %s", moved.id, after.state, after.reason)
                await course.journal.write(self._told(after))
        await self._announce(course)

    async def _happened(self, course: _Course, event: Event, reason: str) -> None:
        await self._step(course, partial(table.happened, event=event, reason=reason))

    def _told(self, now: Job) -> JobTold:
        return JobTold(at_s=self._now_s(), state=now.state, verdict=now.verdict, reason=now.reason)

    async def _announce(self, course: _Course) -> None:
        async with course.moved:
            course.moved.notify_all()

    async def _pause(self, course: _Course, wait_s: float) -> None:
        """Until the job moves, at most so long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s), course.moved:
                await course.moved.wait()

    async def _sweep(self) -> None:
        while True:
            try:
                now_s = int(self._now_s())
                for id_ in await self._store(partial(self._table.forget, now_s)):
                    self._path(id_).unlink(missing_ok=True)
            except VirtgridError as error:
                _log.warning("old jobs could not be cleared: %s", error)
            await self._clock.sleep(self._pace.sweep_s)

    def _path(self, id_: str) -> Path:
        return self._directory / f"{id_}.jsonl"

    def _now_s(self) -> float:
        return self._clock.utc().timestamp()

    async def _store(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


def _problem(tasks: Sequence[asyncio.Task[None]]) -> BaseException | None:
    """Why one of them has failed, if one has."""
    ended = [task for task in tasks if task.done() and not task.cancelled()]
    return next((problem for task in ended if (problem := task.exception()) is not None), None)


def _user(owner: str) -> str:
    """The account of who asks, or the name of a member of the grid. Errors: RefusedError."""
    if not owner.startswith("uid:"):
        name = Identity.parse(owner).name
        require(UserName, "your name", name)
        return name
    uid = int(owner.removeprefix("uid:"))
    if uid == 0:
        raise RefusedError("root has no sandboxes: a job is a user's", hint="submit it as a user")
    try:
        name = pwd.getpwuid(uid).pw_name
    except KeyError:
        raise RefusedError(f"user {uid} has no account on the coordinator's host") from None
    require(UserName, "your account's name", name)
    return name
