"""A crew at work: the table of ``coalloc.crew`` put into effect on the pilots of one hold.

What the crew is to become is written down (``store.crews``); how far it is, its pilots tell. Both are
looked at whenever something happened, and once a second: a pilot that is missing is started (again), one
that is in a state from which a command leads on is given that command.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import ipaddress
import logging
import pwd
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from virtgrid.core.clock import Clock
from virtgrid.core.errors import PeerUnreachableError, RefusedError, VirtgridError
from virtgrid.grid.coalloc import crew as table
from virtgrid.grid.coalloc.crew import Goal
from virtgrid.grid.crm.backend import Backend, NodesPromised, PilotOrder
from virtgrid.grid.crm.spool import Spool
from virtgrid.grid.messages import ticket as tickets
from virtgrid.grid.messages.common import Model
from virtgrid.grid.messages.job import CrewView, NodeView
from virtgrid.grid.messages.node import Command, Finished, Init, Keys, Output, SetKeys, State
from virtgrid.grid.messages.ticket import Ticket
from virtgrid.grid.pilots import Pilot, Pilots
from virtgrid.grid.store.crews import CrewRecord, Member
from virtgrid.wire.endpoint import Endpoint
from virtgrid.wire.message import BadMessageError

STARTS_LIMIT: Final = 3
"""How often a pilot is started before its node is given up."""
_TICK_S: Final = 1.0
_LOOK_S: Final = 0.5
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What every pilot of the site gets, and how long it may take.

    key: signs tickets. crm: where pilots dial in. over_tls: a certificate comes with each ticket.
    awaited_s: for a pilot's first HELLO. gone_s: for shutting down by itself.
    """

    site: str
    key: Ed25519PrivateKey
    crm: Endpoint
    memory_bytes: int
    processes: int
    awaited_s: float = 60.0
    gone_s: float = 20.0


def members(hold: str, nodes: Sequence[str], range_: str) -> tuple[Member, ...]:
    """Who is in a crew: names that are unique in the whole grid, addresses in the order of the range. Pure,
    but for the tickets' ids.
    """
    mark = hashlib.sha256(hold.encode()).hexdigest()[:6]
    addresses = ipaddress.IPv4Network(range_).hosts()
    return tuple(
        Member(node=node, sandbox=f"{node[:56]}-{mark}", address=str(address), ticket=tickets.new_id())
        for node, address in zip(nodes, addresses, strict=False)
    )


@dataclass(slots=True, eq=False)
class _Node:
    """What this process knows of a member. said: the last command, and the state it was for."""

    keys: Keys | None = None
    problem: str = ""
    starts: int = 0
    started_s: float = 0.0
    said: tuple[Command, State] | None = None
    busy: asyncio.Task[None] | None = None


@dataclass(slots=True, eq=False)
class Crew:
    """One hold's pilots and their goal. version: changes whenever its view does.

    save: writes the record down. promise: has the backend keep its nodes, or says why it cannot any more.
    kept: whether the hold still stands.
    """

    record: CrewRecord
    terms: Terms
    backend: Backend
    pilots: Pilots
    clock: Clock
    directory: Path
    save: Callable[[CrewRecord], Awaitable[None]]
    promise: Callable[[NodesPromised], Awaitable[None]]
    kept: Callable[[], Awaitable[bool]]
    version: int = field(default_factory=lambda: time.time_ns() // 1_000_000)
    spool: Spool = field(init=False)
    _nodes: dict[str, _Node] = field(default_factory=dict)
    _members: dict[str, Member] = field(default_factory=dict)
    _ended: set[str] = field(default_factory=set)
    _news: asyncio.Event = field(default_factory=asyncio.Event)
    _changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    _launched: bool = False
    _look_at_s: float = 0.0
    _gone_at_s: float | None = None
    _task: asyncio.Task[None] | None = None
    _writing: asyncio.Lock = field(default_factory=asyncio.Lock)

    def __post_init__(self) -> None:
        self._nodes = {member.sandbox: _Node() for member in self.record.members}
        self._members = {member.sandbox: member for member in self.record.members}
        self.spool = Spool(self.directory / f"{self.record.hold}.out")

    # -- its life ------------------------------------------------------------------------------

    def begin(self) -> None:
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name=f"crew {self.record.reservation}")

    async def close(self) -> None:
        """For the end of the CRM: pilots go on."""
        tasks = [node.busy for node in self._nodes.values() if node.busy is not None]
        tasks += [self._task] if self._task is not None else []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.spool.close()

    async def change(self, **what: Any) -> None:
        """Write down what is to become of it, and get to work on it."""
        async with self._writing:
            changed = self.record.model_copy(update=what)
            if changed != self.record:
                await self.save(changed)
                self.record = changed
        await self._tell()
        self._news.set()

    async def aim(self, goal: Goal, **what: Any) -> None:
        """Another goal; it never goes back."""
        await self.change(goal=table.further(self.record.goal, goal), **what)

    def met(self, pilot: Pilot) -> None:
        """A pilot of ours that this process has not seen dials in."""
        if pilot.ticket.sandbox == self.record.members[0].sandbox:
            pilot.inbox.taken = max(pilot.inbox.taken, self.spool.last)

    def wake(self) -> None:
        self._news.set()

    async def take(self, pilot: Pilot, note: Model) -> None:
        """A notification of one of ours; it is acknowledged when this returns."""
        first = pilot.ticket.sandbox == self.record.members[0].sandbox
        if first and isinstance(note, Output | Finished):
            self.spool.take(pilot.inbox.taken, note)
        await self._tell()
        if isinstance(note, Output):
            return
        if self.record.goal is Goal.GONE:
            self._news.set()
        else:  # nobody else has anything to do for it
            self._lead(self._members[pilot.ticket.sandbox])

    # -- looking -------------------------------------------------------------------------------

    async def view(self, seen: int, after: int, wait_s: float) -> CrewView:
        """How it is, as soon as something is new."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s), self._changed:
                while self.version == seen and self.spool.size <= after:
                    await self._changed.wait()
        output, following = self.spool.read(after)
        return CrewView(
            version=self.version,
            nodes=tuple(self._node(member) for member in self.record.members),
            gone=self.record.gone,
            used_s=self.record.used_s,
            output=output,
            next=following,
        )

    async def until_gone(self, wait_s: float) -> bool:
        """Wait so long at most; whether nothing is left of it."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s), self._changed:
                while not self.record.gone:
                    await self._changed.wait()
        return self.record.gone

    def _node(self, member: Member) -> NodeView:
        node, pilot = self._nodes[member.sandbox], self._pilot(member)
        state = None if pilot is None else pilot.state
        if self.record.gone:
            state = State.DONE
        return NodeView(
            node=member.node,
            sandbox=member.sandbox,
            address=member.address,
            state=state,
            reason="" if pilot is None else pilot.reason[:500],
            problem=node.problem[:500],
            keys=node.keys,
        )

    async def _tell(self) -> None:
        async with self._changed:
            self.version += 1
            self._changed.notify_all()

    def _pilot(self, member: Member) -> Pilot | None:
        return self.pilots.find(member.sandbox, member.ticket)

    # -- work ----------------------------------------------------------------------------------

    async def _run(self) -> None:
        while not self.record.gone:
            self._news.clear()
            try:
                await self._tend()
            except VirtgridError as error:
                _log.warning("crew of %s: %s", self.record.reservation, error.cause or error.what)
            begins_in_s = self.record.window.begins_at_s - self.clock.utc().timestamp()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(_TICK_S, begins_in_s) if begins_in_s > 0 else _TICK_S):
                    await self._news.wait()

    async def _tend(self) -> None:
        """All of it. Who runs is asked seldom, since that is work for the backend."""
        record, now_s = self.record, self.clock.utc().timestamp()
        before = now_s < record.window.begins_at_s
        due = self.clock.monotonic_s() >= self._look_at_s
        if due:
            self._look_at_s = self.clock.monotonic_s() + _LOOK_S
            if record.goal is not Goal.GONE and (now_s >= record.window.ends_at_s or not await self.kept()):
                await self.aim(Goal.GONE)
        if self.record.goal is Goal.GONE:
            if due or self._all_done():
                await self._dismiss(await self.backend.running(record.hold) if due else frozenset())
        elif due and not before:
            running = await self.backend.running(record.hold)
            await self._start([one for one in record.members if one.sandbox not in running])
        for member in record.members:
            self._lead(member)

    def _all_done(self) -> bool:
        pilots = [self._pilot(member) for member in self.record.members]
        return all(pilot is not None and pilot.state is State.DONE for pilot in pilots)

    async def _start(self, missing: Sequence[Member]) -> None:
        """Those whose pilot does not run, and has not told that it is over."""
        orders = []
        for member in missing:
            node, pilot = self._nodes[member.sandbox], self._pilot(member)
            if node.problem or (pilot is not None and pilot.state is State.DONE):
                continue
            if node.starts >= STARTS_LIMIT:
                await self._broken(member, f"its pilot ended {node.starts} times")
                continue
            node.starts += 1
            node.started_s = self.clock.monotonic_s()
            orders.append(self._order(member))
        if not orders:
            await self._late()
            return
        try:
            await self.promise(self._promised())
            await self.backend.start(orders)
        except PeerUnreachableError:
            for order in orders:
                self._nodes[order.sandbox].starts -= 1  # it was not started, or will be found
            raise
        except RefusedError as error:
            for order in orders:
                member = next(one for one in self.record.members if one.sandbox == order.sandbox)
                await self._broken(member, f"{error.what}: {error.cause}" if error.cause else error.what)

    def _promised(self) -> NodesPromised:
        return NodesPromised(
            hold=self.record.hold,
            reservation=self.record.reservation,
            nodes=tuple(member.node for member in self.record.members),
            window=self.record.window,
        )

    async def _late(self) -> None:
        for member in self.record.members:
            node, now_s = self._nodes[member.sandbox], self.clock.monotonic_s()
            node.started_s = node.started_s or now_s  # by a CRM before us
            if self._pilot(member) is None and now_s - node.started_s > self.terms.awaited_s:
                await self._broken(member, f"its pilot did not dial in within {self.terms.awaited_s:g} s")

    def _order(self, member: Member) -> PilotOrder:
        record, terms = self.record, self.terms
        ticket = Ticket(
            id=member.ticket,
            reservation=record.reservation,
            sandbox=member.sandbox,
            uid=_uid(record.account),
            begins_at_s=record.window.begins_at_s,
            ends_at_s=record.window.ends_at_s,
            memory_bytes=terms.memory_bytes,
            processes=terms.processes,
        )
        if terms.crm.is_network:
            text = tickets.issue_file(ticket, terms.key, site=terms.site, now=datetime.now(UTC))
        else:
            text = f"{tickets.issue(ticket, terms.key)}\n"
        return PilotOrder(
            hold=record.hold,
            reservation=record.reservation,
            node=member.node,
            sandbox=member.sandbox,
            account=record.account,
            ticket=text,
            crm=terms.crm,
            window=record.window,
        )

    async def _broken(self, member: Member, why: str) -> None:
        node = self._nodes[member.sandbox]
        if not node.problem:
            node.problem = why
            _log.warning("crew of %s: %s: %s", self.record.reservation, member.sandbox, why)
            await self._tell()

    # -- one pilot -----------------------------------------------------------------------------

    def _lead(self, member: Member) -> None:
        """Whatever is due for a pilot; done again when that was done, until nothing is."""
        node, pilot = self._nodes[member.sandbox], self._pilot(member)
        ending = self.record.goal is Goal.GONE
        if pilot is None or node.busy is not None or (node.problem and not ending):
            return
        command = table.command(self.record.goal, pilot.state)
        if command is not None and node.said == (command, pilot.state):
            command = None  # its answer was had: the state will be told
        keys = node.keys is None and pilot.state in table.KEYED and not ending
        launch = self._to_launch(member, pilot)
        if command is not None or keys or launch:
            node.busy = asyncio.create_task(
                self._say(member, node, pilot, command, keys=keys, launch=launch),
                name=f"{command} to {member.sandbox}",
            )

    def _to_launch(self, member: Member, pilot: Pilot) -> bool:
        return (
            member == self.record.members[0]
            and self.record.program is not None
            and self.record.goal is Goal.UP
            and pilot.state is State.RUNNING
            and not self._launched
            and not self.spool.finished
        )

    async def _say(
        self,
        member: Member,
        node: _Node,
        pilot: Pilot,
        command: Command | None,
        *,
        keys: bool,
        launch: bool,
    ) -> None:
        state = pilot.state
        try:
            if keys:
                node.keys = await pilot.get_keys()
                await self._tell()
            if command is not None:
                await self._command(member, pilot, command)
                node.said = (command, state)
            if launch:
                await self._launch(pilot)
        except PeerUnreachableError as error:
            _log.info("crew of %s: %s", self.record.reservation, error.what)
        except (VirtgridError, BadMessageError) as error:
            why = error.what if isinstance(error, VirtgridError) else str(error)
            with contextlib.suppress(VirtgridError, BadMessageError):
                if (await pilot.get_status()).state is state:  # else it has moved on, and said so
                    await self._broken(member, why)
        else:
            node.busy = None
            self._lead(member)
        finally:
            if node.busy is asyncio.current_task():
                node.busy = None  # again in a while

    async def _command(self, member: Member, pilot: Pilot, command: Command) -> None:
        muster, hosts = self.record.muster, self.record.hosts
        if command is Command.INIT:
            init = Init(address=member.address, prefix=muster.prefix, tag=muster.tag, user=muster.user)
            await pilot.init(init)
        elif command is Command.SET_KEYS:
            assert hosts is not None, "EQUIP sets the goal and the hosts at once"
            await pilot.set_keys(SetKeys(hosts=hosts))
        elif command is Command.RUN:
            await pilot.run()
        else:
            await pilot.shut_down()

    async def _launch(self, pilot: Pilot) -> None:
        """The same key each time: a NodeManager starts it once."""
        program = self.record.program
        assert program is not None
        try:
            await pilot.start_program(program.model_copy(update={"key": f"launch-{self.record.hold}"[:64]}))
        except RefusedError as error:
            note = Finished(exec="", status=None, problem=error.what[:500])
            self.spool.take(pilot.inbox.taken + 1, note)
            await self._tell()
        self._launched = True

    # -- the end -------------------------------------------------------------------------------

    async def _dismiss(self, running: frozenset[str]) -> None:
        """Pilots on the line are told to shut down (by the table). Others are ended, and so is who takes too
        long. One that died before it was done is started again, so that it clears up after itself; what even
        that leaves is virtgridd's to remove.
        """
        if self._gone_at_s is None:
            self._gone_at_s = self.clock.monotonic_s()
        waited_s = self.clock.monotonic_s() - self._gone_at_s
        left = False
        for member in self.record.members:
            pilot, node = self._pilot(member), self._nodes[member.sandbox]
            if pilot is not None and pilot.state is State.DONE:
                continue
            if member.sandbox in running:
                left = True
                absent = (pilot is None or not pilot.connected) and waited_s > _TICK_S
                if absent or waited_s > self.terms.gone_s:
                    self._ended.add(member.sandbox)
                    await self.backend.stop(self.record.hold, [member.sandbox])
            elif pilot is not None and member.sandbox not in self._ended and node.starts < STARTS_LIMIT:
                left = True
                node.starts += 1
                with contextlib.suppress(RefusedError):
                    await self.backend.start([self._order(member)])
        if left:
            return
        usage = await self.backend.usage(self.record.hold)
        await self.change(gone=True, used_s=round(sum(one.elapsed_s for one in usage), 3))

    async def remove(self) -> None:
        """Gone, and nobody will ask any more."""
        await self.close()
        self.spool.remove()
        for member in self.record.members:
            self.pilots.forget(member.sandbox, member.ticket)


def _uid(account: str) -> int:
    try:
        return pwd.getpwnam(account).pw_uid
    except KeyError:
        raise RefusedError(f"this site has no account '{account}'") from None
