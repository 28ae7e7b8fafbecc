"""Slurm as a backend of a CRM (``virtgrid.grid.crm.backend``).

Slurm's own word is asked for everything: which reservations stand, which jobs run, how the nodes are. Beside
it there is a directory that the site's nodes share, with a place for each pilot: its ticket, record and log.
Why it is done so, and what a crash of anybody leaves: docs/design/0014-slurm.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import shutil
import sys
import time
import weakref
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

from virtgrid.core.clock import Clock, SystemClock
from virtgrid.core.errors import DeadlineError, PeerUnreachableError, RefusedError
from virtgrid.grid.crm import place as places
from virtgrid.grid.crm.backend import Node, NodesPromised, PilotOrder, PilotUsage, Taken
from virtgrid.grid.crm.slurm import words
from virtgrid.grid.crm.slurm.tools import Slurm
from virtgrid.grid.crm.slurm.words import Allocation, Job, NodeState, Reservation
from virtgrid.wire.endpoint import Endpoint

DIRECTORY: Final = Path("/var/spool/virtgrid/pilots")
GUARD_S: Final = 60
"""So much longer than its window is a reservation: time for pilots to clear up before Slurm ends them."""
END_S: Final = 20.0
"""How long ``withdraw`` waits for jobs to end before it is to be said again; what was asked for goes on."""
VIRTGRID: Final = (sys.executable, "-m", "virtgrid.cli.main")
_FOR_EVER_S: Final = 1 << 39
_PAUSE_S: Final = 0.1
_PAUSE_MOST_S: Final = 1.0


class SlurmBackend:
    """site: its name, which all reservations and jobs bear; no two CRMs of one Slurm have the same.

    nodes: those that may be given out. host: where pilots reach virtgridd. directory: shared by the nodes,
    and one where this process may give files away. partition: None is Slurm's default. program: virtgrid's
    own command line on the nodes.
    """

    def __init__(
        self,
        *,
        site: str,
        nodes: Sequence[str],
        host: Endpoint,
        slurm: Slurm | None = None,
        directory: Path = DIRECTORY,
        guard_s: int = GUARD_S,
        partition: str | None = None,
        program: Sequence[str] = VIRTGRID,
        clock: Clock | None = None,
    ) -> None:
        """Errors: RefusedError."""
        if len(set(nodes)) != len(nodes):
            raise RefusedError("a node stands there twice")
        self.names, self.guard_s = tuple(nodes), guard_s
        self._site, self._host = site, host
        self._slurm, self._directory, self._clock = slurm or Slurm(), directory, clock or SystemClock()
        self._partition, self._program = partition, tuple(program)
        self._us = pwd.getpwuid(os.geteuid()).pw_name
        self._turns: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()

    async def prepare(self) -> None:
        """Before the first promise. Errors: RefusedError for a node that Slurm does not have, or when the
        directory cannot be used; PeerUnreachableError: Slurm has not been asked, and may be later.
        """
        for name in sorted(set(self.names) - (await self._states(self.names)).keys()):
            raise RefusedError(f"Slurm has no node {name}", hint="sinfo --Node lists those it has")
        try:
            self._directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        except OSError as error:
            raise RefusedError(
                f"{self._directory} cannot be used for pilots", cause=error.strerror
            ) from error

    async def close(self) -> None:
        """For the end of the CRM: reservations stand, pilots go on."""

    # -- nodes ---------------------------------------------------------------------------------

    async def nodes(self) -> tuple[Node, ...]:
        states, reservations, allocations = await asyncio.gather(
            self._states(self.names), self._reservations(), self._allocations()
        )
        others = [one for one in reservations if words.hold_of(self._site, one.name) is None]
        return tuple(
            Node(
                name=name,
                problem=_problem(states, name),
                taken=tuple(_taken(name, others, [one for one in allocations if not self._ours(one)])),
            )
            for name in self.names
        )

    async def problems(self) -> tuple[str, ...]:
        states = await self._states(self.names)
        return tuple(f"node {name}: {why}" for name in self.names if (why := _problem(states, name)))

    def _ours(self, allocation: Allocation) -> bool:
        return words.hold_of(self._site, allocation.reservation) is not None

    # -- promises ------------------------------------------------------------------------------

    async def promise(self, what: NodesPromised) -> None:
        """Said again for what stands already it looks at the nodes again."""
        now_s = self._now_s()
        if strange := sorted(set(what.nodes) - set(self.names)):
            raise RefusedError(f"there is no node {strange[0]}")
        if what.window.ends_at_s <= now_s:
            return
        async with self._turn(what.hold):
            states, reservations = await asyncio.gather(self._states(what.nodes), self._reservations())
            _require_fit(states, what.nodes)
            await self._reserve(what, reservations, now_s)

    async def _reserve(self, what: NodesPromised, there: Iterable[Reservation], now_s: int) -> None:
        name = words.reservation_name(self._site, what.hold)
        standing = next((one for one in there if one.name == name), None)
        if standing is not None:
            if standing.covers(what.nodes, what.window, now_s):
                return
            await self._slurm.ask(words.delete(name))
        try:
            await self._slurm.ask(
                words.create(
                    name,
                    what.nodes,
                    # Slurm takes none that began more than ten minutes ago.
                    begins_at_s=max(what.window.begins_at_s, now_s - 60),
                    ends_at_s=what.window.ends_at_s + self.guard_s,
                    users=[self._us],
                )
            )
        except RefusedError:
            # Of two of us that asked at the same time, one is told that somebody has the nodes.
            for one in await self._reservations():
                if one.name == name and one.covers(what.nodes, what.window, now_s):
                    return
            raise

    async def restore(self, promised: Sequence[NodesPromised]) -> Mapping[str, str]:
        """slurmctld answers before it writes down: killed within a moment of it, it forgets."""
        now_s = self._now_s()
        there = await self._reservations()
        lost = {}
        for what in promised:
            if what.window.ends_at_s > now_s:
                try:
                    async with self._turn(what.hold):
                        await self._reserve(what, there, now_s)
                except RefusedError as error:
                    lost[what.hold] = f"the nodes of reservation {what.reservation} are lost: {error.what}"
        return lost

    async def withdraw(self, hold: str) -> None:
        async with self._turn(hold):
            await self._cancel([job.id for job in await self._jobs(hold)])
            until_s = time.monotonic() + END_S
            pause_s = _PAUSE_S
            while jobs := await self._jobs(hold):
                if time.monotonic() > until_s:
                    raise DeadlineError(f"job {jobs[0].id} of {jobs[0].name} does not end")
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, _PAUSE_MOST_S)
            name = words.reservation_name(self._site, hold)
            if await self._reservation(name) is not None:
                try:
                    await self._slurm.ask(words.delete(name))
                except RefusedError as error:
                    if await self._reservation(name) is not None:  # it had not ended meanwhile
                        raise PeerUnreachableError(
                            f"Slurm keeps the reservation {name}", cause=error.what
                        ) from error
            await asyncio.to_thread(shutil.rmtree, self._directory / hold, ignore_errors=True)

    async def holds(self) -> frozenset[str]:
        names = [words.hold_of(self._site, one.name) for one in await self._reservations()]
        return frozenset([name for name in names if name is not None] + places.names_below(self._directory))

    # -- pilots --------------------------------------------------------------------------------

    async def start(self, orders: Sequence[PilotOrder]) -> None:
        for hold in sorted({order.hold for order in orders}):
            async with self._turn(hold):
                await self._start([order for order in orders if order.hold == hold])

    async def _start(self, orders: Sequence[PilotOrder]) -> None:
        accounts = {order.account: places.account_of(order.account) for order in orders}
        name = words.reservation_name(self._site, orders[0].hold)
        jobs, reservation, states = await asyncio.gather(
            self._jobs(orders[0].hold),
            self._reservation(name),
            self._states([order.node for order in orders]),
        )
        twice = _younger_twins(jobs)
        if twice:
            await self._cancel(twice)
        there = {job.name for job in jobs}
        missing = [order for order in orders if self._job_name(order) not in there]
        if not missing:
            return
        if reservation is None:
            raise RefusedError(f"Slurm has no reservation {name} (any more)")
        _require_fit(states, [order.node for order in missing])
        users = {*reservation.users, *(order.account for order in missing)}
        if users != set(reservation.users):
            await self._slurm.ask(words.let_in(name, sorted(users)))
        for order in missing:
            await asyncio.to_thread(places.furnish, self._directory, order, accounts[order.account])
        asked = (self._submit(order, accounts[order.account]) for order in missing)
        for problem in await asyncio.gather(*asked, return_exceptions=True):
            if isinstance(problem, BaseException):
                raise problem

    async def _submit(self, order: PilotOrder, account: pwd.struct_passwd) -> None:
        place = places.place_of(self._directory, order)
        program = places.command(self._program, order, place, self._host)
        left_s = order.window.ends_at_s + self.guard_s - self._now_s()
        await self._slurm.submit(
            words.submit(
                name=self._job_name(order),
                reservation=words.reservation_name(self._site, order.hold),
                node=order.node,
                user=order.account,
                group=account.pw_gid,
                minutes=max(1, -(-left_s // 60)),
                log=str(places.log_of(place)),
                comment=order.reservation,
                partition=self._partition,
            ),
            words.script(program),
            {"HOME": account.pw_dir, "LANG": "C.UTF-8"},
        )

    async def running(self, hold: str) -> frozenset[str]:
        return frozenset(self._sandbox(job) for job in await self._jobs(hold))

    async def stop(self, hold: str, sandboxes: Sequence[str]) -> None:
        await self._cancel([job.id for job in await self._jobs(hold) if self._sandbox(job) in sandboxes])

    async def usage(self, hold: str) -> tuple[PilotUsage, ...]:
        """Slurm remembers jobs that are over for its MinJobAge, 5 minutes by default."""
        elapsed_s: dict[str, int] = {}
        now_s = self._now_s()
        for job in await self._jobs(hold, ended=True):
            if job.began_s is not None:
                until_s = now_s if job.active or job.ended_s is None else job.ended_s
                sandbox = self._sandbox(job)
                elapsed_s[sandbox] = elapsed_s.get(sandbox, 0) + max(0, until_s - job.began_s)
        return tuple(PilotUsage(sandbox=name, elapsed_s=float(used)) for name, used in elapsed_s.items())

    # ------------------------------------------------------------------------------------------

    def _now_s(self) -> int:
        return int(self._clock.utc().timestamp())

    def _turn(self, hold: str) -> asyncio.Lock:
        """One thing after the other for each hold."""
        found = self._turns.get(hold)
        if found is None:
            found = self._turns[hold] = asyncio.Lock()
        return found

    def _job_name(self, order: PilotOrder) -> str:
        return words.job_name(self._site, order.hold, order.sandbox)

    @staticmethod
    def _sandbox(job: Job) -> str:
        return job.name.rpartition("_")[2]

    async def _jobs(self, hold: str, *, ended: bool = False) -> list[Job]:
        """The jobs of a hold's pilots, in the order they were submitted.

        Anybody may call a job as they like; ours are in our reservation, or, when Slurm has forgotten which
        one it was, of the user whose place it is.
        """
        names = {
            words.job_name(self._site, hold, sandbox): sandbox
            for sandbox in places.names_below(self._directory / hold)
        }
        if not names:
            return []
        reservation = words.reservation_name(self._site, hold)
        told = words.read_jobs(await self._slurm.ask(words.ask_jobs(names, ended=ended)))
        found = []
        for job in told:
            mine = job.reservation == reservation
            if not mine and job.name in names:
                with contextlib.suppress(OSError):
                    mine = (self._directory / hold / names[job.name]).stat().st_uid == job.uid
            if mine and (ended or job.active):
                found.append(job)
        return found

    async def _cancel(self, jobs: Sequence[int]) -> None:
        if jobs:
            with contextlib.suppress(RefusedError):  # they have ended meanwhile; ``_jobs`` tells
                await self._slurm.ask(words.cancel(jobs))

    async def _reservations(self) -> list[Reservation]:
        return words.read_reservations(await self._slurm.ask(words.ask_reservations()))

    async def _reservation(self, name: str) -> Reservation | None:
        return next((one for one in await self._reservations() if one.name == name), None)

    async def _allocations(self) -> list[Allocation]:
        return words.read_allocations(await self._slurm.ask(words.ask_allocations(self.names)))

    async def _states(self, nodes: Iterable[str]) -> dict[str, NodeState]:
        return words.read_nodes(await self._slurm.ask(words.ask_nodes(nodes)))


def _problem(states: Mapping[str, NodeState], name: str) -> str | None:
    state = states.get(name)
    return "Slurm has no such node" if state is None else state.problem


def _require_fit(states: Mapping[str, NodeState], nodes: Iterable[str]) -> None:
    """Errors: RefusedError naming the node; PeerUnreachableError when Slurm does not know (yet)."""
    for name in nodes:
        state = states.get(name)
        if state is not None and not state.known:
            raise PeerUnreachableError(f"Slurm has not heard of node {name} yet")
        if problem := _problem(states, name):
            raise RefusedError(f"node {name}: {problem}")


def _taken(
    name: str, reservations: Iterable[Reservation], allocations: Iterable[Allocation]
) -> Iterable[Taken]:
    """When a node is somebody else's, and whose."""
    for one in reservations:
        if name in one.nodes:
            yield Taken(
                begins_at_s=one.begins_at_s, ends_at_s=one.ends_at_s, why=f"Slurm's reservation {one.name}"
            )
    for job in allocations:
        if name in job.nodes:
            until_s = _FOR_EVER_S if job.ends_at_s is None else job.ends_at_s
            yield Taken(begins_at_s=0, ends_at_s=until_s, why=f"Slurm's job {job.job}")


def _younger_twins(jobs: Iterable[Job]) -> list[int]:
    """A submission that was given up may have been heard after all: then there are two, and one is enough."""
    seen: set[str] = set()
    twins = []
    for job in jobs:
        if job.name in seen:
            twins.append(job.id)
        seen.add(job.name)
    return twins
