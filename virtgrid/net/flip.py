"""Flipping a guest: its frames go through a segment to the other host's bridge, and wait there until it runs.

Without this, what arrives between the guest's stop here and its first frame there is sent to a tap that
nobody reads any more. TCP sends it again after 0.2 s, 0.5 s, 1 s and so on, so a client stands still for
longer than the guest did.

Two things turn the frames round, one for each side they come from: the bridge's entry for the guest's
address points to the segment, and what the segment itself brings for the guest (from clients at the other
host) is sent back through it. What the tap has swallowed in between is sent again. Everything may be said
twice.
"""

from __future__ import annotations

import contextlib
import socket
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from virtgrid.net import filters, forwarding, redirect
from virtgrid.net.addresses import parse_mac
from virtgrid.net.forwarding import Entry
from virtgrid.net.link import Link, Links
from virtgrid.net.packets import ETH_P_ALL, SO_RCVBUFFORCE, SOL_PACKET
from virtgrid.net.redirect import Redirect
from virtgrid.net.segment import of
from virtgrid.net.tap import VNET_HEADER_BYTES
from virtgrid.net.usher import RETURN_RANK

#: A tap of libvirt's holds 1000 frames.
_KEPT_FRAMES: Final = 2048
_KEPT_BYTES: Final = 16 << 20
#: What QEMU may have read of the tap and not given to the guest: one frame while its processors were being
#: stopped, which it drops, and one since, which it would keep until the guest goes on. When it was fewer,
#: frames are sent twice, which IP permits.
_READ_IN_VAIN: Final = 2
_FRAME_BYTES: Final = 70_000  # with a virtio-net header, unsegmented
_PACKET_VNET_HDR: Final = 15


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """Where a guest's frames can be sent: its tap is on ``bridge``, ``port`` is the segment to elsewhere."""

    bridge: str
    port: str
    tap: str
    mac: str


def find_way(links: Sequence[Link], tap: str, mac: str, there: Sequence[str]) -> tuple[Way | None, str]:
    """(The way from a tap's bridge to the host with one of the addresses ``there``, why or why not). Pure."""
    port = next((link for link in links if link.name == tap), None)
    if port is None or port.master is None:
        return None, f"{tap} is not a port of a bridge"
    bridge = next((link for link in links if link.index == port.master), None)
    if bridge is None or bridge.kind != "bridge":
        return None, f"{tap} is not a port of a Linux bridge"
    segments = [link for link, on in of(links) if on.index == bridge.index]
    for link in segments:
        if link.up and link.tunnel is not None and link.tunnel.remote in there:
            way = Way(bridge=bridge.name, port=link.name, tap=tap, mac=mac)
            return way, f"through {link.name} of {bridge.name} to {link.tunnel.remote}"
    if not segments:
        return None, f"{bridge.name} has no segment to another host"
    elsewhere = ", ".join(f"{link.name} to {link.tunnel.remote}" for link in segments if link.tunnel)
    return None, f"no segment of {bridge.name} leads to the destination ({elsewhere})"


def turn(links: Links, way: Way) -> None:
    """Send the guest's frames away. Errors: VirtgridError when an interface is gone, OSError."""
    bridge, port = links.require(way.bridge), links.require(way.port)
    before = forwarding.entry(links, way.mac, bridge)
    # First this one: once the entry points to the segment, the bridge drops what the segment brings.
    redirect.add(links, port, _return(way, port))
    # Sticky: a frame of the guest that is still under way must not move it back.
    forwarding.set_entry(
        links, way.mac, Entry(port=port, sticky=True, static=before is not None and before.static)
    )


def relax(links: Links, way: Way) -> None:
    """Let the entry follow the guest again: its next frame, wherever it runs by then, puts it right.

    So even when whoever turned it dies, a guest that speaks is reached.
    """
    found = forwarding.entry(links, way.mac, links.require(way.bridge))
    if found is not None and found.sticky and found.port == links.index(way.port):
        forwarding.set_entry(links, way.mac, replace(found, sticky=False))


def put_back(links: Links, way: Way) -> bool:
    """The guest runs here: as before. False when nothing was turned."""
    port, tap = links.index(way.port), links.index(way.tap)
    if port is None:
        return False
    changed = redirect.remove(links, port, _return(way, port))
    found = forwarding.entry(links, way.mac, links.require(way.bridge))
    if found is not None and found.port == port and tap is not None:
        forwarding.set_entry(links, way.mac, Entry(port=tap, static=found.static))
        changed = True
    return changed


def settle(links: Links, way: Way) -> bool:
    """The guest runs at the other host: leave the entry to what the bridge learns. False: it was."""
    port = links.index(way.port)
    if port is None:
        return False
    changed = redirect.remove(links, port, _return(way, port))
    found = forwarding.entry(links, way.mac, links.require(way.bridge))
    if found is not None and found.port == port and (found.sticky or found.static):
        forwarding.set_entry(links, way.mac, Entry(port=port))
        changed = True
    return changed


def _return(way: Way, port: int) -> Redirect:
    return Redirect(mac=way.mac, to=port, rank=RETURN_RANK)


def _on(interface: str, program: Sequence[tuple[int, int, int, int]] | None) -> socket.socket:
    """A packet socket on an interface, not blocking, frames with their virtio-net headers.

    It gets what the program keeps; None: it only sends. Errors: OSError.
    """
    end = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    try:
        if program is not None:
            filters.attach(end, program)
            with contextlib.suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, _KEPT_BYTES)
        end.setsockopt(SOL_PACKET, _PACKET_VNET_HDR, 1)
        end.setblocking(False)
        end.bind((interface, 0 if program is None else ETH_P_ALL))
    except BaseException:
        end.close()
        raise
    return end


class Diverted:
    """What goes to the guest through the segment while its frames are turned: to be given back.

    The first frames are kept, as by the destination's tap; what comes when it is full is lost there as well.
    Errors: OSError when an interface is gone. ``close`` it.
    """

    def __init__(self, way: Way) -> None:
        self._kept: deque[bytes] = deque()
        self._kept_bytes = 0
        self._port = _on(way.port, filters.sent_by_host_to(parse_mac(way.mac)))
        try:
            self._tap = _on(way.tap, None)
        except BaseException:
            self._port.close()
            raise

    def fileno(self) -> int:
        """Readable when there is something to ``take``."""
        return self._port.fileno()

    def take(self) -> None:
        """Keep what has come."""
        with contextlib.suppress(BlockingIOError):
            while True:
                frame = self._port.recv(_FRAME_BYTES)
                if len(self._kept) < _KEPT_FRAMES and self._kept_bytes + len(frame) <= _KEPT_BYTES:
                    self._kept.append(frame)
                    self._kept_bytes += len(frame)

    def give_back(self) -> int:
        """Send what was kept to the guest's tap here, in its order -> how many frames."""
        self.take()
        given = 0
        while self._kept:
            with contextlib.suppress(OSError):  # the tap's queue is full: as lost as it would have been
                self._tap.send(self._kept.popleft())
                given += 1
        self._kept_bytes = 0
        return given

    def close(self) -> None:
        self._port.close()
        self._tap.close()


class Swallowed:
    """What the host hands to the guest's tap and the guest's QEMU has not read: to be sent again elsewhere.

    A tap counts what was read of it, so what waits in it is known to the frame, however late QEMU was
    when it stopped. What waited before the counting is told by ``look``ing now and then: from a tap that is
    empty more was read by just that than was handed over since. Only frames to the guest's own address are
    sent again: what goes to all has gone through the segment as well. Errors: OSError when the tap or the
    segment is gone. ``close`` it.
    """

    def __init__(self, links: Links, way: Way) -> None:
        self._links, self._way = links, way
        self._mac = parse_mac(way.mac)
        #: The last frames handed over, as to be sent again; empty ones for those that went to all.
        self._kept: deque[bytes] = deque()
        self._kept_bytes = 0
        self._handed = self._waited = 0
        self._port = _on(way.port, None)
        try:
            self._tap = _on(way.tap, filters.sent_by_host())
        except BaseException:
            self._port.close()
            raise
        try:
            self._read_before = self._read()
        except BaseException:
            self.close()
            raise

    def _read(self) -> int:
        return self._links.counters(self._way.tap)["tx_packets"]

    def fileno(self) -> int:
        """Readable when there is something to ``take``."""
        return self._tap.fileno()

    def take(self) -> None:
        """Keep what has come, and forget what no tap holds any more."""
        with contextlib.suppress(BlockingIOError):
            while True:
                frame = self._tap.recv(_FRAME_BYTES)
                kept = frame if frame[VNET_HEADER_BYTES:][:6] == self._mac else b""
                self._handed += 1
                self._kept.append(kept)
                self._kept_bytes += len(kept)
        while len(self._kept) > _KEPT_FRAMES or self._kept_bytes > _KEPT_BYTES:
            self._kept_bytes -= len(self._kept.popleft())

    def look(self) -> None:
        """Whether more was read than has been handed over since the counting began: that waited before."""
        read = self._read() - self._read_before
        self.take()  # after the reading: whatever was read has been handed over by now
        self._waited = max(self._waited, read - self._handed)

    def send_again(self) -> int:
        """Send what was not read through the segment; the guest has stopped -> how many frames."""
        self.take()
        read = self._read() - self._read_before
        unread = max(0, self._waited + self._handed - read + _READ_IN_VAIN)
        sent = 0
        for frame in list(self._kept)[-unread:] if unread else ():
            if frame:
                with contextlib.suppress(OSError):  # its queue is full: as lost as it would have been
                    self._port.send(frame)
                    sent += 1
        self._forget()
        return sent

    def _forget(self) -> None:
        """What was kept has been dealt with; what comes from now on will not be read at all."""
        self._kept.clear()
        self._kept_bytes = self._handed = self._waited = 0
        self._read_before = self._read()

    def close(self) -> None:
        self._tap.close()
        self._port.close()
