"""The process of a server host: it carries the frames, stops the guest, and clears up.

It makes both namespaces and a TAP in each, and hands the frames over between them as QEMU and a wire
do for a guest. Orders come as lines on standard input, each answered by a line; the end of the input
means that the owner is gone, however it went: then every process in the namespaces is ended, and
they and the directory are removed.

``hold`` stops the guest: no frame is taken from it or given to it, so what the clients send waits
as it does before a stopped guest (what had left the guest still arrives), and the servers are frozen
(freezer.py), so that none works on meanwhile. Only the TCP timers of the guest's
kernel run on, as they would not in a stopped guest; what they send again waits too.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import sys
import time
from typing import Final

from virtgrid.lab import processes
from virtgrid.lab.servers import layout
from virtgrid.lab.servers.freezer import Freezer
from virtgrid.lab.servers.layout import HostLayout
from virtgrid.lab.wan import Direction
from virtgrid.net import netns
from virtgrid.net.link import Links
from virtgrid.net.tap import open_tap

_FRAME_MAX_BYTES: Final = 70_000
#: Frames taken from one end before the other gets its turn.
_BURST: Final = 64
_SYSCTLS: Final = {
    # An address is usable at once, and nobody asks for routers.
    "net/ipv6/conf/default/accept_dad": "0",
    "net/ipv6/conf/default/router_solicitations": "0",
    "net/ipv6/conf/default/accept_ra": "0",
}


class Keeper:
    """The host's namespaces and cable while it lives."""

    def __init__(self, where: HostLayout) -> None:
        self._where = where
        self._freezer = Freezer(where.guest)
        self._freezer.make()
        self._client = self._end(
            where.client, layout.TAP, layout.CLIENT_MAC, layout.CLIENT_V4, layout.CLIENT_V6
        )
        self._guest = self._end(
            where.guest, layout.GUEST_INTERFACE, layout.GUEST_MAC, layout.GUEST_V4, layout.GUEST_V6
        )
        self._to_guest, self._to_client = Direction(spec=where.link), Direction(spec=where.link)

    def _end(self, namespace: str, interface: str, mac: str, four: str, six: str) -> int:
        netns.create(namespace)
        netns.set_sysctl(namespace, _SYSCTLS)
        tap = open_tap(namespace, interface, offload=self._where.offload)
        with Links(namespace) as links:
            links.up("lo")
            links.up(interface, mac=mac)
            links.address(interface, four, layout.V4_PREFIX)
            links.address(interface, six, layout.V6_PREFIX)
        return tap

    def serve(self, orders: int, answers: int) -> None:
        """Carry frames and take orders until the owner is gone."""
        poller = select.poll()
        for descriptor in (orders, self._client, self._guest):
            poller.register(descriptor, select.POLLIN)
        holding = False
        while True:
            for descriptor, _ in poller.poll(self._wait_ms(holding)):
                if descriptor == self._client:
                    self._take(self._client, self._to_guest)
                elif descriptor == self._guest:
                    self._take(self._guest, self._to_client)
                else:
                    order = os.read(orders, 100).strip()
                    if not order:
                        return
                    holding = order == b"hold"
                    poller.modify(self._guest, 0 if holding else select.POLLIN)
                    if holding:
                        self._freezer.freeze()
                    else:
                        self._freezer.thaw()
                    os.write(answers, b"done\n")
            self._give(self._client, self._to_client)
            if not holding:
                self._give(self._guest, self._to_guest)

    def _wait_ms(self, holding: bool) -> float | None:
        """Until the next frame is due; None: until something comes."""
        due = [self._to_client.due_s(), None if holding else self._to_guest.due_s()]
        next_s = min((at_s for at_s in due if at_s is not None), default=None)
        return None if next_s is None else max(0.0, (next_s - time.monotonic()) * 1000)

    @staticmethod
    def _take(tap: int, path: Direction) -> None:
        with contextlib.suppress(BlockingIOError):
            for _ in range(_BURST):
                path.push(time.monotonic(), os.read(tap, _FRAME_MAX_BYTES))

    @staticmethod
    def _give(tap: int, path: Direction) -> None:
        now_s = time.monotonic()
        while path.in_flight and path.in_flight[0][0] <= now_s:
            with contextlib.suppress(OSError):  # its queue is full: lost, as on any wire
                os.write(tap, path.in_flight.popleft()[1])


def clear(where: HostLayout) -> None:
    """End every process in the namespaces, and remove them and the directory."""
    identities = (netns.identity(netns.path(name)) for name in (where.guest, where.client))
    processes.kill_all(processes.Signs(namespaces={one for one in identities if one}))
    for name in (where.guest, where.client):
        netns.delete(name)
    Freezer(where.guest).remove()
    shutil.rmtree(where.directory, ignore_errors=True)


def main() -> None:
    where = HostLayout.from_json(sys.argv[1])
    # The owner's terminal may send these to us too; the end of the input is what counts.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    try:
        keeper = Keeper(where)
        os.write(1, b"done\n")
        keeper.serve(0, 1)
    finally:
        clear(where)


if __name__ == "__main__":
    main()
