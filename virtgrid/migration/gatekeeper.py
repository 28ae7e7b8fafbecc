"""Holding and gating a migration that somebody else calls (Nova), in a process of its own.

The caller starts this process before it calls libvirt, waits for ``ready``, and tells how its call
ended. Everything between is as in a migration of our own: the same capture, hold, gate, journal and control
socket (``virtgrid migration show|release|abort``). What is the caller's stays the caller's: images, the
call itself and what follows from its end.

Protocol, JSON lines. Standard input: the request (``plan.MigrationRequest``), then any of
    {"say": "release"}                            end it now -> {"state": "release", "held": true|false}
    {"say": "ended", "error": null|text, "number": libvirt's}   the call has come back
Standard output: {"state": "ready", "id"}; the answers; at last {"state": "over", and the fields of the
journal's last line}. Where not even a journal was begun: {"state": "refused", and an error}.

Whoever dies: a caller that is gone without a word gets its migration aborted, since nobody would follow the
guest to the destination. When this process is gone, the caller must abort: nobody would let go.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any, Final

from pydantic import TypeAdapter, ValidationError

from virtgrid.core.clock import Clock, SystemClock
from virtgrid.core.errors import AbortedError, UsageError, VirtgridError
from virtgrid.core.events import TERMINAL, Record
from virtgrid.core.journal import Journal
from virtgrid.migration import facts as gathering
from virtgrid.migration import running
from virtgrid.migration.control import ControlServer
from virtgrid.migration.driver import Driver, OpenWatch
from virtgrid.migration.flip import Flip
from virtgrid.migration.guestname import GuestName
from virtgrid.migration.outcome import Place
from virtgrid.migration.plan import MigrationPlan, MigrationRequest, check_request, make_plan
from virtgrid.migration.preflight import Check, preflight
from virtgrid.migration.prepare import HoldLimits
from virtgrid.migration.tapwatch import open_watch
from virtgrid.migration.worker import begin_journal, connected
from virtgrid.virt.connection import Hypervisor, LibvirtError
from virtgrid.virt.domain import Domain, look

_REQUEST: Final = TypeAdapter(MigrationRequest)
_LINE_LIMIT_BYTES: Final = 1 << 20
_TEXT_LIMIT: Final = 2000
#: How often it is looked whether the job of a caller that is gone has ended.
_POLL_S: Final = 0.3
#: The checks that are ours to make: whether host, CPU and storage fit is the caller's business.
_OURS: Final = frozenset({"hosts", "domain", "connections"})


class Gatekeeper(Driver):
    """A driver whose migrate call is somebody else's.

    call: returns, or raises, when that call has; ready: called when it may begin.
    """

    def __init__(
        self,
        request: MigrationRequest,
        journal: Journal,
        clock: Clock,
        migration_id: str,
        *,
        open_watch: OpenWatch,
        caller: Caller,
    ) -> None:
        super().__init__(request, journal, clock, migration_id, open_watch=open_watch)
        self._caller = caller
        self._unheld = False

    def request_end(self, by: str) -> bool:
        """End it now -> whether it was held and is let go; otherwise it will not be held."""
        self._journal.write("user", action="release", by=by)
        self._unheld = self._copy is None
        return self._copy is not None and self._copy.ask_unheld(by)

    async def plan(self, source: Hypervisor, destination: Hypervisor, domain: Domain) -> MigrationPlan:
        """As any plan, but without a look at the images: they are made by the caller."""
        asked = replace(self._request, copy_storage=None)
        found = await gathering.gather(asked, source, destination, domain, own_id=self._id)
        return make_plan(self._request, found)

    def _checks(self, plan: MigrationPlan) -> tuple[Check, ...]:
        return tuple(check for check in preflight(plan) if check.name in _OURS)

    async def _migrate(
        self, undo: AsyncExitStack, source: Hypervisor, destination: Hypervisor, domain: Domain
    ) -> dict[str, Any]:
        undo.enter_context(running.exclusive(domain.uuid, self._id))
        self._journal.write("phase", phase="preflight")
        plan = self._plan = await self.plan(source, destination, domain)
        self._check(plan)
        self._journal.write("phase", phase="prepare")
        await undo.enter_async_context(ControlServer(running.socket_path(domain.uuid), self._on_command))
        self._begin_watch(undo, plan)
        # No fence: in a peer-to-peer migration it is the source's libvirtd that decides who runs.
        await self._listen(source, destination, domain)
        limits = await undo.enter_async_context(HoldLimits(self._journal, domain, self._request.source_uri))
        flip = await undo.enter_async_context(Flip(plan, self._journal))
        self._copy = self._copier(plan, source, destination, domain, flip.let_go)
        if self._unheld:
            self._copy.ask_unheld("")
        self._stop_if_asked()
        self._caller.tell(state="ready", id=self._id)
        try:
            await self._copy.run(self._caller.call(lambda: self._job_over(domain)))
        except Exception as error:
            self._situation = await self._settle(domain)
            await flip.leave(self._situation.place)
            if self._situation.place is not Place.DESTINATION or self._situation.repairs:
                raise
            self._arrived_after(error)
        limits.keep()
        await flip.arrived()
        self._arrived(plan)
        return await self._finish(
            plan, destination, domain, GuestName(self._journal, self._clock, plan, self._id)
        )

    async def _job_over(self, domain: Domain) -> bool:
        here = await look(self._request.source_uri, domain.uuid)
        return here is not None and not here.job


class Caller:
    """Whoever calls libvirt: its lines on our standard input, ours on standard output."""

    def __init__(self, lines: asyncio.StreamReader) -> None:
        self._lines = lines
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._gone = False

    async def request(self) -> MigrationRequest:
        """The first line. Errors: UsageError."""
        try:
            request = _REQUEST.validate_json(await self._lines.readline())
        except (ValidationError, ValueError) as error:
            raise UsageError("the request cannot be understood", cause=str(error)[:_TEXT_LIMIT]) from error
        check_request(request)
        return request

    async def listen(self, driver: Gatekeeper) -> None:
        """Until the caller ends or is gone; gone without a word, its migration is aborted."""
        with contextlib.suppress(ValueError, OSError):  # nonsense, or a line without end: as if it were gone
            while line := await self._lines.readline():
                match json.loads(line):
                    case {"say": "release"}:
                        self.tell(state="release", held=driver.request_end("nova"))
                    case {"say": "ended", "error": None}:
                        self._end(None)
                    case {"say": "ended", "error": str(text), "number": int(number)}:
                        text = text[:_TEXT_LIMIT]
                        self._end(
                            LibvirtError("libvirt did not migrate the domain", number=number, cause=text)
                        )
                    case _:
                        raise ValueError("not one of ours")
        if not self._ended.done():
            self._gone = True
            what = "whoever called this migration has ended: nobody would follow the guest"
            driver.request_abort("its caller is gone", AbortedError(what))

    def _end(self, error: VirtgridError | None) -> None:
        if self._ended.done():
            return
        if error is None:
            self._ended.set_result(None)
        else:
            self._ended.set_exception(error)

    async def call(self, over: Callable[[], Awaitable[bool]]) -> None:
        """The caller's migrate call, as ours would be. over: has the job ended? Asked once it is gone."""
        while not self._ended.done():
            await asyncio.wait([self._ended], timeout=_POLL_S)
            if self._gone and not self._ended.done() and await over():
                raise AbortedError("whoever called this migration has ended")
        await self._ended

    def tell(self, **answer: Any) -> None:
        with contextlib.suppress(OSError):
            os.write(1, json.dumps(answer).encode() + b"\n")


async def _serve() -> int:
    lines = asyncio.StreamReader(limit=_LINE_LIMIT_BYTES)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    caller, clock = Caller(lines), SystemClock()

    async def drive(source: Hypervisor, destination: Hypervisor, domain: Domain) -> int:
        migration_id, opened = await begin_journal(request, clock, source, destination, domain)
        with opened as journal:
            ended: list[Record] = []
            journal.listen(lambda record: ended.append(record) if record.event in TERMINAL else None)
            driver = Gatekeeper(request, journal, clock, migration_id, open_watch=open_watch, caller=caller)
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, driver.request_abort, "SIGTERM")
            listening = asyncio.ensure_future(caller.listen(driver))
            try:
                await driver.run(source, destination, domain)
                return 0
            except VirtgridError as error:
                return error.exit_status
            finally:
                listening.cancel()
                for record in ended:
                    caller.tell(state="over", event=record.event, id=migration_id, **record.fields)

    try:
        request = await caller.request()
        return int(await connected(request, drive))
    except VirtgridError as error:
        caller.tell(state="refused", **error.as_dict())
        return error.exit_status


def main() -> None:
    """``virtgrid-gatekeeper``: see the top of this module."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, -10)
    # As in the worker: a libvirt call that hangs must not keep the process.
    os._exit(asyncio.run(_serve()))


if __name__ == "__main__":
    main()
