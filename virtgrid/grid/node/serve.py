"""One NodeManager from its start to its end: the process behind ``virtgrid serve node``."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from pathlib import Path

from virtgrid.core.clock import SystemClock
from virtgrid.core.errors import VirtgridError
from virtgrid.grid.messages import ticket as tickets
from virtgrid.grid.messages.node import State
from virtgrid.grid.node.hostline import HostLine
from virtgrid.grid.node.manager import NodeManager
from virtgrid.grid.node.record import Store
from virtgrid.grid.node.states import Event
from virtgrid.grid.node.uplink import Uplink
from virtgrid.wire.endpoint import Endpoint
from virtgrid.wire.pki.places import Places
from virtgrid.wire.tls import Tls, TlsFiles


async def serve(*, ticket_file: Path, directory: Path, crm: Endpoint, host: Endpoint, pki: Places) -> None:
    """Until DONE. SIGTERM (what a queueing system sends first) is a SHUT_DOWN.

    directory: the pilot's own, for what it must not forget. pki: says whom the host trusts.
    Errors: RefusedError (ticket, record); VirtgridError when the CRM could not be told of the end.
    """
    text, ticket = tickets.read(ticket_file)
    tls = None
    if crm.is_network:
        # Certificate and key are in the ticket's file, below it.
        tls = Tls(TlsFiles(certificate=ticket_file, key=ticket_file, trust=pki.trust, revoked=pki.revoked))
    manager: NodeManager
    line = HostLine(
        host, text, seen=lambda view: manager.seen(view), ended=lambda reason: manager.sandbox_ended(reason)
    )
    manager = NodeManager(ticket=ticket, host=line, store=Store(directory), clock=SystemClock())
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, manager.happened, Event.ENDED, f"the pilot got {number.name}")
    tasks = [asyncio.create_task(line.watch()), asyncio.create_task(manager.until_end())]
    try:
        await manager.resume()
        told = await Uplink(manager, crm, text, tls=tls).run()
        if manager.state is State.DONE:
            manager.forget()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await manager.close()
        with contextlib.suppress(VirtgridError):
            await line.close()
    if not told:
        raise VirtgridError("the CRM does not know that this pilot is over", cause=manager.status().reason)
