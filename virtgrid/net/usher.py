"""Ushering guests in: what comes through a segment for a guest on its way to this host waits at its tap.

While a guest is being migrated here, the bridge knows its address at the segment's port, where it still runs;
what comes from there for it the bridge drops, since it would have to go back. But the other host only sends
such frames when the guest has stopped there. So they are led straight to the tap that libvirt has made for
it, whose queue keeps them until it runs. That needs no word from the other host and no moment to be met.

A tap counts as one of a guest on its way until the guest has sent its first frame, which is also when the
bridge learns where it is. The guest's address is known from the tap's: libvirt gives both the same but
for the first byte.

A process of its own for each segment. It ends when its interface goes, and holds no state but the kernel's.
"""

from __future__ import annotations

import contextlib
import select
import socket
import sys
from collections.abc import Collection, Sequence
from typing import Final

from virtgrid.core.process import let_go_of_stdout
from virtgrid.net import redirect
from virtgrid.net.link import Link, Links
from virtgrid.net.redirect import Redirect
from virtgrid.net.segment import usher_address

#: Frames for a guest that has left go back through the segment: before those that are led to a tap.
RETURN_RANK: Final = 50
SEAT_RANK: Final = 100
_LINK_GROUP: Final = 1  # RTMGRP_LINK
#: That a guest has sent its first frame is told by nobody.
_LOOK_EVERY_S: Final = 0.5


def seats(links: Sequence[Link], segment: Link) -> frozenset[Redirect]:
    """What must be led past the bridge: one redirect per tap whose guest has not sent a frame yet. Pure."""
    return frozenset(
        Redirect(mac=f"00{link.mac[2:]}", to=link.index, rank=SEAT_RANK, exact=False)
        for link in links
        if link.master == segment.master
        and link.kind == "tun"
        and link.mac.startswith(("fe:", "fa:"))  # fa: where the guest's own begins with fe
        and link.rx_packets == 0
    )


def returns(found: Collection[Redirect], coming: Collection[Redirect]) -> frozenset[Redirect]:
    """Of the redirects found, those that would send away what is meant for a guest on its way here. Pure."""
    tails = {rule.mac[2:] for rule in coming}
    return frozenset(rule for rule in found if rule.rank == RETURN_RANK and rule.mac[2:] in tails)


def reconcile(links: Links, name: str) -> int | None:
    """Make the segment's redirects what they must be -> how many there are; None when the segment is gone."""
    everything = links.all()
    segment = next((link for link in everything if link.name == name), None)
    if segment is None:
        return None
    wanted = seats(everything, segment)
    found = redirect.redirects(links, segment.index)
    standing = {rule for rule in found if rule.rank == SEAT_RANK}
    for rule in returns(found, wanted) | (standing - wanted):
        redirect.remove(links, segment.index, rule)
    for rule in wanted - standing:
        redirect.add(links, segment.index, rule)
    return len(wanted)


def _main(name: str) -> None:
    with (
        Links() as links,
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener,
        socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as news,
    ):
        listener.bind(usher_address(name))  # one per segment
        listener.listen(8)
        listener.setblocking(False)
        news.bind((0, _LINK_GROUP))
        news.setblocking(False)
        ready = False
        while True:
            try:
                seated = reconcile(links, name)
            except OSError:
                seated = 1  # a tap went while we looked: look again soon
            if seated is None:
                return
            if not ready:
                ready = _say_ready()
            select.select([news, listener], [], [], _LOOK_EVERY_S if seated else None)
            with contextlib.suppress(BlockingIOError):
                while True:
                    listener.accept()[0].close()  # somebody asks whether we are here
            with contextlib.suppress(
                OSError
            ):  # nothing more, or more than fits: all is looked at again anyway
                while news.recv(1 << 16):
                    pass


def _say_ready() -> bool:
    print("ready", flush=True)
    let_go_of_stdout()
    return True


if __name__ == "__main__":
    _main(sys.argv[1])
