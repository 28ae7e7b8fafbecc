"""A migration's way over the WAN: its connections bounded, the link shared with the service, both undone.

Neither ever fails a migration. What could not be done stands in the journal, with the reason.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable
from typing import Any, Final, TypeVar

from virtgrid.core.errors import VirtgridError
from virtgrid.core.journal import Journal
from virtgrid.core.units import format_duration, format_rate, format_size
from virtgrid.migration.plan import MigrationPlan, MigrationRequest, WanFacts
from virtgrid.net import share, streams
from virtgrid.net.link import Links
from virtgrid.net.streams import Bound, Process, Stream

T = TypeVar("T")

_LOOK_EVERY_S: Final = 0.2
#: A bound is changed when it is off by more than this.
_OFF: Final = 1.25


def look_at_wan(request: MigrationRequest, destinations: tuple[str, ...]) -> WanFacts:
    """The destination's addresses, and whether the way there can be shared; asks this host's kernel."""
    peers: dict[str, None] = {}
    for name in destinations:
        with contextlib.suppress(OSError, UnicodeError):
            for found in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM):
                peers[str(found[4][0]).partition("%")[0]] = None
    known = tuple(peers)
    if request.sharing is None:
        return WanFacts(peers=known)
    if os.geteuid() != 0:
        return WanFacts(
            peers=known,
            problem="setting up classes needs root",
            hint="run virtgrid on the source host as root",
        )
    if not known:
        return WanFacts(problem="the destination's address is not known", hint="--migrateuri names one")
    try:
        with Links() as links:
            uplink = share.find(links, known[0])
            if (found_there := share.obstacle(links, uplink.interface)) is not None:
                return WanFacts(peers=known, problem=found_there[0], hint=found_there[1])
            return WanFacts(peers=known, uplink=uplink)
    except (VirtgridError, OSError) as error:
        return WanFacts(peers=known, problem=str(error))


class Wan:
    """The way of one migration: ready on entering, looked after meanwhile, as it was on leaving."""

    def __init__(self, plan: MigrationPlan, journal: Journal) -> None:
        self._facts, self._sharing = plan.facts.wan, plan.request.sharing
        self._rate_bytes_s = float(plan.request.release_bytes_s or 0.0)
        self._uuid = plan.uuid
        self._journal = journal
        self._process: Process | None = None
        self._before: frozenset[int] = frozenset()
        self._bound: dict[int, Bound] = {}
        self._task: asyncio.Task[None] | None = None
        self._over = asyncio.Event()
        self._interface: str | None = None
        self._kernel_bytes = streams.kernel_limit_bytes()

    async def __aenter__(self) -> Wan:
        try:
            await asyncio.to_thread(self._find)
        except OSError as error:
            self._journal.write("stream", state="off", text=f"not bounded: QEMU's connections: {error}")
        if self._process is not None:
            await self._share()
            self._task = asyncio.create_task(self._watch(self._process))
        elif self._sharing is not None:
            self._off("QEMU's connections cannot be told from others")
        return self

    def _find(self) -> None:
        pid = streams.qemu_of(self._uuid)
        if pid is None:
            self._journal.write(
                "stream", state="off", text="not bounded: QEMU is not to be seen on this host"
            )
            return
        process = Process(pid)
        try:
            # What is there before the migration (a console, a network disk) is none of its connections.
            self._before = frozenset(process.sockets())
        except OSError:
            process.__exit__()
            raise
        self._process = process

    async def _share(self) -> None:
        """Make the tree, if it is wanted and there can be one."""
        if self._sharing is None:
            return
        uplink = self._facts.uplink
        if uplink is None:
            self._off(self._facts.problem or "the way to the destination is not known")
            return
        sharing = self._sharing
        # Before it is made: whoever recovers must know where to look.
        self._journal.write(
            "share",
            sync=True,
            state="set",
            text=f"{format_rate(sharing.service_bytes_s)} of {format_rate(sharing.link_bytes_s)} are the"
            f" service's, on {uplink.interface}",
            interface=uplink.interface,
            link_bytes_s=round(sharing.link_bytes_s),
            service_bytes_s=sharing.service_bytes_s,
            migration_bytes_s=sharing.migration_bytes_s,
        )
        try:
            await asyncio.to_thread(_with_links, lambda links: share.share(links, uplink, sharing))
        except (VirtgridError, OSError) as error:
            self._journal.write("share", state="removed", text="it was not made", interface=uplink.interface)
            self._off(f"the kernel refused a class on {uplink.interface}: {error}")
        else:
            self._interface = uplink.interface

    def _off(self, why: str) -> None:
        self._journal.write(
            "share", state="off", text=f"only QEMU's own limit keeps the service's part: {why}"
        )

    async def _watch(self, process: Process) -> None:
        """Look for connections of the migration, and bound each; a wish of ours never ends anything."""
        failed = False
        fastest: dict[int, int] = {}
        while not self._over.is_set():
            try:
                found = await asyncio.to_thread(process.streams, self._facts.peers, without=self._before)
                for one in found:
                    fastest[one.inode] = max(one.rate_bytes_s, fastest.get(one.inode, 0))
                    rate = self._rate_bytes_s or fastest[one.inode]
                    bound = streams.choose(rate, one.delay_s, kernel_bytes=self._kernel_bytes)
                    if _differs(self._bound.get(one.inode), bound):
                        await self._bind(process, one, bound)
            except OSError as error:
                if not failed:
                    failed = True
                    self._journal.write("stream", state="off", text=f"not bounded: {error}")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_EVERY_S):
                    await self._over.wait()

    async def _bind(self, process: Process, one: Stream, bound: Bound) -> None:
        priority = share.PRIORITY if self._interface is not None else None
        try:
            await asyncio.to_thread(process.bind, one.inode, bound, priority=priority)
        except ProcessLookupError:
            return  # it has ended
        new = one.inode not in self._bound
        self._bound[one.inode] = bound
        if new:
            larger = {"buffer_bytes": bound.buffer_bytes} if bound.buffer_bytes is not None else {}
            told: dict[str, Any] = {"unsent_bytes": bound.unsent_bytes, "delay_s": one.delay_s, **larger}
            self._journal.write(
                "stream",
                state="bounded",
                text=f"at most {format_size(bound.unsent_bytes)} unsent, {format_duration(one.delay_s)} there"
                " and back",
                peer=f"{one.peer}:{one.port}" if ":" not in one.peer else f"[{one.peer}]:{one.port}",
                **told,
            )

    async def release(self) -> None:
        """The guest is about to be stopped: what the service leaves is the migration's now."""
        interface, sharing = self._interface, self._sharing
        if interface is None or sharing is None:
            return
        try:
            await asyncio.to_thread(
                _with_links, lambda links: share.raise_migration(links, interface, sharing)
            )
        except (VirtgridError, OSError) as error:
            self._journal.write("note", text=f"the migration's class on {interface} was not raised: {error}")
        else:
            self._journal.write(
                "share",
                state="raised",
                text="for the pause: what the service leaves is the migration's",
                interface=interface,
                migration_bytes_s=round(sharing.link_bytes_s),
            )

    async def end(self) -> None:
        """The interface as it was; may be said twice."""
        if self._task is not None:
            # Not cancelled: a thread would go on with a pidfd that is closed.
            self._over.set()
            await self._task
            self._task = None
        if self._process is not None:
            self._process.__exit__()
            self._process = None
        interface, self._interface = self._interface, None
        if interface is not None:
            with contextlib.suppress(VirtgridError, OSError):
                await unshare(interface, self._journal)

    async def __aexit__(self, *_: object) -> None:
        await self.end()


async def unshare(interface: str, journal: Journal) -> bool:
    """Take a migration's tree away, and say so in its journal -> whether there was one.

    Errors: VirtgridError, OSError; then the journal has it as left.
    """
    try:
        was = await asyncio.to_thread(_with_links, lambda links: share.remove(links, interface))
    except (VirtgridError, OSError) as error:
        journal.write("left", kind="class", name=interface, reason=str(error))
        raise
    text = f"{interface} is as it was" if was else f"nothing of it was on {interface} any more"
    journal.write("share", sync=True, state="removed", text=text, interface=interface)
    return was


def _with_links(work: Callable[[Links], T]) -> T:
    with Links() as links:
        return work(links)


def _differs(was: Bound | None, now: Bound) -> bool:
    if was is None or (was.buffer_bytes is None) is not (now.buffer_bytes is None):
        return True
    pairs = ((was.unsent_bytes, now.unsent_bytes), (was.buffer_bytes or 1, now.buffer_bytes or 1))
    return any(max(a, b) > _OFF * min(a, b) for a, b in pairs)
