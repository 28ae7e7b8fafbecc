"""Segments of reservations in the kernel: what is there, and the steps of ``virtgrid.net.reserved``.

In the caller's network namespace, or in a named one.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import socket
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from virtgrid.core.errors import NotFoundError, RefusedError
from virtgrid.net import guarantee, htb
from virtgrid.net.link import Link, Links, Tunnel
from virtgrid.net.reserved import (
    MARK,
    AddPeer,
    DropPeer,
    Join,
    MakeBridge,
    MakeTunnel,
    Present,
    Remove,
    Step,
    ours,
)
from virtgrid.net.segment import AROUND_BYTES
from virtgrid.net.tcmsg import DUMP, attributes

_EVERYBODY: Final = "00:00:00:00:00:00"
"""The entry of a VXLAN that says where frames for all and for unknown addresses go."""
_GET_NEIGHBOUR, _NEW_NEIGHBOUR = 30, 28  # RTM_*
_INTERFACE: Final = struct.Struct("=BxHiII")
_NEIGHBOUR: Final = struct.Struct("=BxxxiHBB")
_DESTINATION, _HARDWARE = 1, 2  # NDA_*
#: The host is no member of a segment: it says nothing there, hears nothing, and passes nothing on.
_DEAF: Final = {
    "net/ipv6/conf/{}/disable_ipv6": "1",
    "net/ipv4/conf/{}/arp_ignore": "8",
    "net/ipv4/conf/{}/rp_filter": "1",
    "net/ipv4/conf/{}/forwarding": "0",
}


@dataclass(frozen=True, slots=True)
class Uplink:
    """How other hosts are reached from here: the interface on the way, and our address there."""

    interface: Link
    local: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """A segment that is there. guaranteed_bytes_s: on the wire, to all other sites together."""

    segment: int
    bridge: str
    reservation: str
    local: str | None
    peers: tuple[str, ...]
    mtu: int
    up: bool
    guaranteed_bytes_s: int


def status() -> tuple[Standing, ...]:
    """The segments of reservations on this host, as the kernel has them."""
    with Links() as links:
        present = look(links)
        guaranteed: dict[int, int] = {}
        for index, root in htb.roots(links).items():
            tree = htb.read(links, index) if root == htb.ROOT else None
            for vni, rate in guarantee.guaranteed(tree).items() if tree is not None else ():
                guaranteed[vni] = guaranteed.get(vni, 0) + rate
    bridges = {link.index: link for link in present.links if ours(link)}
    found = []
    for link in present.links:
        bridge = None if link.master is None else bridges.get(link.master)
        if ours(link) and link.tunnel is not None and bridge is not None:
            found.append(
                Standing(
                    segment=link.tunnel.vni,
                    bridge=bridge.name,
                    reservation=link.alias.removeprefix(MARK).partition(" ")[2],
                    local=link.tunnel.local,
                    peers=tuple(sorted(present.peers.get(link.name, ()))),
                    mtu=link.mtu,
                    up=link.up and bridge.up,
                    guaranteed_bytes_s=guaranteed.get(link.tunnel.vni, 0),
                )
            )
    return tuple(sorted(found, key=lambda one: one.segment))


def look(links: Links) -> Present:
    """What the kernel has."""
    found = links.all()
    tunnels = [link for link in found if ours(link) and link.tunnel is not None]
    return Present(links=found, peers={link.name: _peers(links, link.index) for link in tunnels})


def addresses(links: Links) -> frozenset[str]:
    """All of this host."""
    # Of a point-to-point interface the address is the other end's, and the local one ours.
    told = (one.get_attr("IFA_LOCAL") or one.get_attr("IFA_ADDRESS") for one in links.call("get_addr"))
    return frozenset(map(str, told))


def uplink(links: Links, present: Present, to: str) -> Uplink:
    """The way to another host. Errors: NotFoundError."""
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        route = links.call("route", "get", dst=to)[0]
    except NetlinkError as error:
        raise NotFoundError(f"there is no route to {to}", cause=str(error)) from error
    index, local = route.get_attr("RTA_OIF"), route.get_attr("RTA_PREFSRC")
    way = next((link for link in present.links if link.index == index), None)
    if way is None or local is None or str(local) == to:
        raise NotFoundError(f"{to} is no other host")
    return Uplink(way, str(local))


def require_fit(way: Uplink, to: str, mtu: int) -> None:
    """Errors: RefusedError when frames of a segment would not fit: they would be lost without a word."""
    around = AROUND_BYTES[ipaddress.ip_address(to).version]
    if mtu + around > way.interface.mtu:
        raise RefusedError(
            f"packets of {mtu} bytes do not fit through a tunnel over {way.interface.name}"
            f" (MTU {way.interface.mtu}): {around} bytes come around each",
            hint="virtgrid serve nrm --mtu: what the networks between the hosts carry",
        )


def take(links: Links, step: Step) -> None:
    """Take one step. What is done already is left so. Errors: VirtgridError's kin, OSError."""
    match step:
        case Remove(name):
            links.delete(name)
        case MakeBridge(one):
            # Under a name of our own until it bears its note, which cannot be given with the making.
            links.bridge(one.draft, up=False)
            links.run(lambda: _deafen(one.draft))
            links.note(one.draft, one.note, mtu=one.mtu)
            links.rename(one.draft, one.bridge)
        case MakeTunnel(one):
            tunnel = Tunnel(vni=one.vni, local=one.local, remote=None)
            links.vxlan(one.port, tunnel, mtu=one.mtu, alias=one.note)
        case AddPeer(one, address):
            _flood(links, "append", one.port, address)
        case DropPeer(one, address):
            _flood(links, "del", one.port, address)
        case Join(one):
            links.enslave(one.port, one.bridge)
            links.up(one.port)
            links.up(one.bridge)


def _deafen(bridge: str) -> None:
    for name, value in _DEAF.items():
        with contextlib.suppress(FileNotFoundError):  # a kernel without IPv6
            Path("/proc/sys", name.format(bridge)).write_text(value)


def _flood(links: Links, verb: str, port: str, address: str) -> None:
    from pyroute2.netlink.exceptions import NetlinkError

    done = {"append": errno.EEXIST, "del": errno.ENOENT}[verb]
    try:
        links.call("fdb", verb, ifindex=links.require(port), lladdr=_EVERYBODY, dst=address)
    except NetlinkError as error:
        if error.code != done:
            raise


def _peers(links: Links, index: int) -> frozenset[str]:
    found = set()
    for kind, body in links.ask(_GET_NEIGHBOUR, DUMP, _INTERFACE.pack(socket.AF_BRIDGE, 0, index, 0, 0)):
        if kind != _NEW_NEIGHBOUR or _NEIGHBOUR.unpack_from(body)[1] != index:
            continue
        told = attributes(body[_NEIGHBOUR.size :])
        where = told.get(_DESTINATION, b"")
        if told.get(_HARDWARE) == bytes(6) and len(where) in (4, 16):
            found.add(str(ipaddress.ip_address(where)))
    return frozenset(found)
