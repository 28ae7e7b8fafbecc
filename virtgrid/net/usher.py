"""Ushering guests in: what comes through a segment for a guest on its way to this host waits at its tap.

While a guest is being migrated here, the bridge knows its address at the segment's port, where it still runs;
what comes from there for it the bridge drops, since it would have to go back. But the other host only sends
such frames when the guest has stopped there. So they are led straight to the tap that libvirt has made for
it, whose queue keeps them until it runs. That needs no word from the other host and no moment to be met.

A tap counts as one of a guest on its way until the guest has sent its first frame, which is also when the
bridge learns where it is. The guest's address is known from the tap's: libvirt gives both the same but
for the first byte.

QEMU takes one frame from its tap before the guest's state has come, and spoils it: that one has a header for
a driver that has not spoken yet, and is read with the header of the one that has. So the first frame of
every such tap is one that nobody misses.

A process of its own for each segment. It ends when its interface goes, and holds no state but the kernel's.
"""

from __future__ import annotations

import contextlib
import select
import socket
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Final

from virtgrid.core.process import let_go_of_stdout
from virtgrid.net import redirect
from virtgrid.net.link import Link, Links
from virtgrid.net.redirect import Redirect
from virtgrid.net.segment import usher_address
from virtgrid.net.tickle import frame

#: Frames for a guest that has left go back through the segment: before those that are led to a tap.
RETURN_RANK: Final = 50
SEAT_RANK: Final = 100
_LINK_GROUP: Final = 1  # RTMGRP_LINK
#: That a guest has sent its first frame is told by nobody.
_LOOK_EVERY_S: Final = 0.5
#: After a guest's first frame; nothing that was sent back is under way for so long.
_LINGER_S: Final = 3.0

#: By a tap's index: when its guest was first found to have sent a frame, None: not yet.
Heard = Mapping[int, float | None]


def listen(links: Sequence[Link], segment: Link, before: Heard, now_s: float) -> Heard:
    """Whose guests are on their way here or have just come; others are left out. Pure."""
    heard: dict[int, float | None] = {}
    for link in links:
        if (
            link.master == segment.master
            and link.kind == "tun"
            and link.up
            and link.mac.startswith(("fe:", "fa:"))  # fa: where the guest's own begins with fe
        ):
            if link.rx_packets == 0:
                heard[link.index] = None
            elif link.index in before:
                since_s = before[link.index]
                since_s = now_s if since_s is None else since_s
                if now_s - since_s < _LINGER_S:
                    heard[link.index] = since_s
    return heard


def seats(links: Sequence[Link], heard: Collection[int]) -> frozenset[Redirect]:
    """What must be led past the bridge: one redirect per tap whose guest is coming. Pure."""
    return frozenset(
        Redirect(mac=f"00{link.mac[2:]}", to=link.index, rank=SEAT_RANK, exact=False)
        for link in links
        if link.index in heard
    )


def returns(found: Collection[Redirect], coming: Collection[Redirect]) -> frozenset[Redirect]:
    """Of the redirects found, those that would send away what is meant for a guest on its way here. Pure."""
    tails = {rule.mac[2:] for rule in coming}
    return frozenset(rule for rule in found if rule.rank == RETURN_RANK and rule.mac[2:] in tails)


def reconcile(links: Links, name: str, before: Heard) -> Heard | None:
    """Make the segment's redirects what they must be -> for whom they are; None when the segment is gone."""
    everything = links.all()
    segment = next((link for link in everything if link.name == name), None)
    if segment is None:
        return None
    heard = listen(everything, segment, before, time.monotonic())
    wanted = seats(everything, heard)
    found = redirect.redirects(links, segment.index)
    standing = {rule for rule in found if rule.rank == SEAT_RANK}
    # A guest that has come may leave at once: its way out is not ours to take.
    coming = seats(everything, {index for index, since_s in heard.items() if since_s is None})
    for rule in returns(found, coming) | (standing - wanted):
        redirect.remove(links, segment.index, rule)
    for link in everything:
        # A tap may lose it at first: again until one was read.
        if heard.get(link.index, 0.0) is None and link.tx_packets == 0:
            _spend_first(link.name, link.mac)
    for rule in wanted - standing:
        redirect.add(links, segment.index, rule)
    return heard


def _spend_first(tap: str, mac: str) -> None:
    """Put a frame into a tap that is to be lost. Errors: OSError when the tap is gone."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as raw:
        raw.setblocking(False)
        raw.bind((tap, 0))
        raw.send(frame(mac))


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
        heard: Heard = {}
        while True:
            again = False
            try:
                found = reconcile(links, name, heard)
            except OSError:
                again = True  # a tap went while we looked: look again soon
            else:
                if found is None:
                    return
                heard = found
            if not ready:
                ready = _say_ready()
            select.select([news, listener], [], [], _LOOK_EVERY_S if heard or again else None)
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
