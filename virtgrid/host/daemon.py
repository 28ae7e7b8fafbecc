"""virtgridd, the root agent of a host: makes sandboxes for pilots that hold a ticket, has the segments that
network managers want here, hears what hooks tell, and migrates domains away (``mover``).

It is restarted without harm: sandboxes and the programs in them run on, and what it knows is read from
files and looked at (``tenancies``, ``guests``). It removes what nobody else removes: sandboxes whose
reservation has ended, and those whose pilot has been gone for ``orphan_s``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from virtgrid.core.errors import RefusedError, VirtgridError
from virtgrid.grid.doors import Network
from virtgrid.grid.messages import moves
from virtgrid.grid.messages import ticket as tickets
from virtgrid.grid.messages.common import Model, parse
from virtgrid.grid.messages.host import METHODS, Entries, HelloHost, Prepare
from virtgrid.grid.messages.network import SEGMENTS, Carried, Orders
from virtgrid.grid.messages.node import Exec
from virtgrid.grid.node.hook import NOTICE_SOCKET
from virtgrid.host.guests import GRACE_S, Guest, Libvirt
from virtgrid.host.mover import Mover
from virtgrid.host.networks import Networks
from virtgrid.host.notices import Notice, NoticeSocket
from virtgrid.host.queue import Entry
from virtgrid.host.tenancies import Tenancies
from virtgrid.wire.endpoint import Endpoint, Listener, listen
from virtgrid.wire.identity import Right, authorise
from virtgrid.wire.line import HandedOverError, Line
from virtgrid.wire.message import bad_parameters, no_such_method

_HELLO_DEADLINE_S: Final = 10.0
_SWEEP_S: Final = 1.0
_log = logging.getLogger(__name__)


class Virtgridd:
    """The daemon; use as an async context manager. bridge: of the network with a tag, ``br{tag}``.

    keys: of those whose tickets are good here. orphan_s: a pilot that was killed has so long to come back.
    """

    def __init__(
        self,
        *,
        where: Endpoint,
        keys: Iterable[Ed25519PublicKey],
        bridge: str,
        libvirt: Libvirt,
        tenancies: Tenancies,
        networks: Networks,
        orphan_s: float,
        notices: Path = Path(NOTICE_SOCKET),
        network: Network | None = None,
        managers: frozenset[str] = frozenset(),
        mover: Mover | None = None,
    ) -> None:
        """mover: of migrations, which only root asks for; None: it migrates none.

        network: where network managers reach us from other hosts; managers: those that are heard
        (``doors.told_of``), besides root of this host.
        """
        self._where, self._keys, self._bridge = where, tuple(keys), bridge
        self._libvirt, self._tenancies = libvirt, tenancies
        self._notices, self._orphan_s, self._networks = notices, orphan_s, networks
        self._network, self.network = network, None if network is None else network.where
        self._rights = {SEGMENTS: Right(named=managers)} | dict.fromkeys(moves.METHODS, Right())
        self._mover = mover
        self._guests: dict[str, Guest] = {}
        self._of_line: dict[Line, Guest] = {}
        self._managers: dict[str, Line] = {}
        self._runners: list[subprocess.Popen[str]] = []
        self._stack = contextlib.AsyncExitStack()
        self._sweeping: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[Any]] = set()

    async def __aenter__(self) -> Virtgridd:
        async with contextlib.AsyncExitStack() as stack:
            # The socket first: there is only one of us, so what follows has nobody beside it.
            listener: Listener = await listen(
                self._where, self._heard, name="a pilot", mode=0o666, serve=self._serve
            )
            stack.push_async_callback(listener.close)
            if self._network is not None:
                there = await listen(
                    self._network.where,
                    self._heard,
                    name="a network manager",
                    tls=self._network.tls,
                    rights=self._rights,
                    serve=self._serve,
                )
                stack.push_async_callback(there.close)
                self.network = there.where
            stack.push_async_callback(self._libvirt.close)
            await stack.enter_async_context(self._networks)
            if self._mover is not None:
                await stack.enter_async_context(self._mover)
            for tenancy in self._tenancies.all():
                self._guests[tenancy.ticket.sandbox] = self._guest(tenancy.ticket)
            stack.push_async_callback(self._close_guests)
            notices = NoticeSocket(self._notices, self._noticed)
            stack.callback(notices.close)
            self._sweeping = asyncio.create_task(self._sweep(), name="sweep")
            self._stack = stack.pop_all()
        for guest in list(self._guests.values()):
            self._begin(self._look_again(guest))
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._sweeping is not None:
            self._sweeping.cancel()
            await asyncio.gather(self._sweeping, return_exceptions=True)
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._stack.aclose()

    async def _close_guests(self) -> None:
        for guest in self._guests.values():
            await guest.close()

    def _guest(self, ticket: tickets.Ticket) -> Guest:
        return Guest(ticket, libvirt=self._libvirt, tenancies=self._tenancies, bridge=self._bridge)

    def _begin(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _look_again(self, guest: Guest) -> None:
        """After our restart, or a notice: is it still there, and hear of its end from now on."""
        with contextlib.suppress(VirtgridError):
            await guest.look()

    # -- pilots ----------------------------------------------------------------------------------

    async def _serve(self, line: Line) -> None:
        ended = asyncio.create_task(line.wait_ended())
        try:
            await asyncio.wait({ended}, timeout=_HELLO_DEADLINE_S)
            if line in self._of_line or line in self._managers.values():
                await ended
        finally:
            ended.cancel()
            for name in [name for name, one in self._managers.items() if one is line]:
                del self._managers[name]
            guest = self._of_line.pop(line, None)
            if guest is not None:
                guest.lines.discard(line)
                guest.left_s = time.monotonic()

    async def _heard(self, line: Line, method: str, params: Mapping[str, Any]) -> Any:
        if method == SEGMENTS:
            return (await self._ordered(line, params)).model_dump(mode="json")
        if method in moves.METHODS:
            return (await self._move(line, method, params)).model_dump(mode="json")
        if method not in METHODS:
            raise no_such_method(method)
        asked = parse(METHODS[method], method, params)
        guest = self._of_line.get(line)
        if method == "hello" and guest is None:
            assert isinstance(asked, HelloHost)
            guest = self._admit(line, asked)
            return (await guest.look()).model_dump(mode="json")
        if guest is None:
            raise bad_parameters(method, "say hello with a ticket first")
        return await self._do(guest, line, method, asked)

    async def _ordered(self, line: Line, params: Mapping[str, Any]) -> Carried:
        """What a network manager wants here. Of two lines of one manager the newer one counts."""
        authorise(line.peer, SEGMENTS, rights=self._rights, site=None)
        orders = parse(Orders, SEGMENTS, params)
        before = self._managers.get(orders.network)
        if before is not line:
            self._managers[orders.network] = line
            if before is not None:
                before.hang_up("the network manager has dialled again")
        return await self._networks.told(orders)

    async def _move(
        self, line: Line, method: str, params: Mapping[str, Any]
    ) -> moves.Moves | moves.Evacuated:
        """What root asks about migrations."""
        authorise(line.peer, method, rights=self._rights, site=None)
        if self._mover is None:
            raise RefusedError("this virtgridd migrates nothing", hint="its log says why")
        match parse(moves.METHODS[method], method, params):
            case moves.Evacuate(to=to):
                asked, left = await self._mover.evacuate(to)
                return moves.Evacuated(asked=tuple(entry.id for entry in asked), left=tuple(left))
            case moves.Withdraw(id=id_):
                return moves.Moves(entries=(_shown(self._mover.withdraw(id_)),))
            case moves.Look(after=after):
                entries = self._mover.entries()
                begin = next((n + 1 for n, entry in enumerate(entries) if entry.id == after), 0)
                page = entries[begin : begin + moves.PAGE]
                return moves.Moves(entries=tuple(map(_shown, page)), more=len(entries) > begin + moves.PAGE)
        raise no_such_method(method)

    def _admit(self, line: Line, hello: HelloHost) -> Guest:
        ticket = tickets.admit(hello.ticket, self._keys, bearer=line.peer, now_s=time.time())
        guest = self._guests.get(ticket.sandbox)
        if guest is None or guest.ticket.id != ticket.id:
            if guest is not None:
                raise RefusedError(
                    f"sandbox '{ticket.sandbox}' belongs to another ticket, and is not gone yet"
                )
            guest = self._guests[ticket.sandbox] = self._guest(ticket)
        self._of_line[line] = guest
        guest.lines.add(line)
        return guest

    async def _do(self, guest: Guest, line: Line, method: str, asked: Model) -> Any:
        match method, asked:
            case "prepare", Prepare():
                self._make_room(guest.name)
                return (await guest.prepare(asked.init)).model_dump()
            case "set_keys", Entries():
                await guest.set_keys(asked.hosts)
            case "exec", Exec():
                self._runners.append(await guest.run_program(line, asked))
                raise HandedOverError
            case "look", _:
                return (await guest.look()).model_dump(mode="json")
            case "start", _:
                await guest.start()
            case "stop", _:
                await guest.stop()
            case "remove", _:
                await guest.remove()
            case _:
                raise bad_parameters(method, "hello is said once")
        return {}

    # -- notices and time ------------------------------------------------------------------------

    def _noticed(self, notice: Notice) -> None:
        _log.info("notice: %s %s %s", notice.driver, notice.domain, notice.operation)
        if notice.driver != "lxc":
            return
        guest = self._guests.get(notice.domain)
        if guest is not None:
            self._begin(self._look_again(guest))
        elif notice.operation == "prepare":
            self._make_room(notice.domain)

    def _make_room(self, sandbox: str) -> None:
        """Begun when a sandbox is prepared, well before its job: guests that yield to jobs leave."""
        if self._mover is not None:
            self._begin(self._mover.make_room(sandbox))

    async def _sweep(self) -> None:
        """Every second: what nobody else removes."""
        while True:
            await asyncio.sleep(_SWEEP_S)
            self._runners = [process for process in self._runners if process.poll() is None]
            for name, guest in list(self._guests.items()):
                why = self._overdue(guest)
                if why is None:
                    continue
                try:
                    await guest.remove()
                except VirtgridError as error:
                    _log.warning("%s cannot be removed yet: %s", name, error.cause or error.what)
                    continue
                _log.info("%s was removed: %s", name, why)
                await guest.close()
                if not guest.lines:
                    self._guests.pop(name, None)

    def _overdue(self, guest: Guest) -> str | None:
        """Why a sandbox must go now, or None. What is gone for good is forgotten at once."""
        if time.time() > guest.ticket.ends_at_s + GRACE_S:
            return "its reservation has ended"
        if not guest.lines:
            if self._tenancies.load(guest.name) is None:
                return "its pilot is done with it"
            if time.monotonic() - guest.left_s > self._orphan_s:
                return f"its pilot has been gone for {self._orphan_s:g} s"
        return None


def _shown(entry: Entry) -> dict[str, Any]:
    """An entry as it is told and printed."""
    return {**entry.model_dump(mode="json"), "migration": entry.migration}


async def serve(daemon: Virtgridd, *, ready: Callable[[], None] = lambda: None) -> None:
    """Until SIGTERM or SIGINT; sandboxes stay."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with daemon:
        ready()
        await stop.wait()
