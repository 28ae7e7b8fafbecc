"""A stretched segment: a VXLAN between a bridge here and one at another host, and who ushers guests in.

Made on each of the two hosts by the same command, ahead of migrations and independent of them: a guest that
moves keeps its address because both bridges are one segment. ``virtgrid.migration.flip`` uses what it finds.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from virtgrid.core.errors import DeadlineError, NotFoundError, RefusedError, UsageError, VirtgridError
from virtgrid.core.process import peer_credentials
from virtgrid.net.link import Link, Links, Tunnel
from virtgrid.net.packets import EXPERIMENTAL_ETHERTYPE

#: The note by which an interface is known to be ours.
ALIAS: Final = "virtgrid segment"
VNIS: Final = range(1, 1 << 24)
#: What VXLAN puts around a frame: outer IP header, UDP, VXLAN, the inner Ethernet header.
AROUND_BYTES: Final = {4: 20 + 8 + 8 + 14, 6: 40 + 8 + 8 + 14}
_LOOP_WAIT_S: Final = 1.0
_USHER_DEADLINE_S: Final = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A VXLAN that is a port of a bridge. ours: made by ``up``. ushered: its usher runs."""

    name: str
    bridge: str
    tunnel: Tunnel
    mtu: int
    up: bool
    ours: bool
    ushered: bool


def of(links: Sequence[Link]) -> tuple[tuple[Link, Link], ...]:
    """Every (VXLAN, its bridge) among interfaces, whoever made them. Pure."""
    bridges = {link.index: link for link in links if link.kind == "bridge"}
    return tuple(
        (link, bridges[link.master])
        for link in links
        if link.tunnel is not None and link.master is not None and link.master in bridges
    )


def status() -> tuple[Segment, ...]:
    """The segments of this host that we made."""
    with Links() as links:
        return tuple(_segment(link, bridge) for link, bridge in of(links.all()) if link.alias == ALIAS)


def up(bridge: str, peer: str, vni: int) -> Segment:
    """Make the segment, or mend one that is there: a tunnel to ``peer`` as a port of ``bridge``; its usher.

    Errors: UsageError, NotFoundError (no such bridge or host); RefusedError: frames would not fit, the two
    bridges are one segment already, another segment has this VNI.
    """
    if vni not in VNIS:
        raise UsageError(f"--vni must be between {VNIS.start} and {VNIS.stop - 1}, not {vni}")
    remote = _resolve(peer)
    name = f"vgs{vni}"
    with Links() as links:
        before = links.all()
        here = next((link for link in before if link.name == bridge), None)
        if here is None or here.kind != "bridge":
            bridges = ", ".join(link.name for link in before if link.kind == "bridge")
            raise NotFoundError(
                f"there is no Linux bridge '{bridge}' on this host", hint=f"there are: {bridges or 'none'}"
            )
        local, way = _route(links, before, peer, remote)
        mtu = fitting_mtu(before, here, way, remote)
        wanted = Tunnel(vni=vni, local=local, remote=remote)
        there = next((link for link in before if link.name == name), None)
        if there is not None:
            _check_same(there, wanted, here)
        else:
            links.vxlan(name, wanted, mtu=mtu, alias=ALIAS)
        try:
            links.up(name, mtu=mtu)
            if there is None or there.master is None:
                if closes_loop(bridge, name):
                    raise RefusedError(
                        f"{bridge} and the bridge at {peer} are one segment already, by another way",
                        hint="a second way would be a loop: frames would go round for ever",
                    )
                links.enslave(name, bridge)
            _start_usher(name)
        except BaseException:
            if there is None:
                links.delete(name)
            raise
        made = next(link for link in links.all() if link.name == name)
        return _segment(made, here)


def down(name: str) -> bool:
    """Remove a segment of ours and its usher; False when there is none. Errors: RefusedError."""
    with Links() as links:
        found = next((link for link in links.all() if link.name == name), None)
        if found is None:
            return False
        if found.alias != ALIAS:
            raise RefusedError(
                f"{name} was not made by virtgrid", hint="virtgrid segment status shows those that were"
            )
        links.delete(name)
    deadline_s = time.monotonic() + _USHER_DEADLINE_S
    while ushered(name):  # it ends by itself when its interface is gone
        if time.monotonic() > deadline_s:
            raise DeadlineError(f"{name} is gone, its usher is not within {_USHER_DEADLINE_S:g} s")
        time.sleep(0.02)
    return True


def fitting_mtu(links: Sequence[Link], bridge: Link, way: Link, remote: str) -> int:
    """The MTU of a tunnel that takes every frame of the bridge, over interface ``way``. Pure.

    What is too long is lost without a word, and only long transfers notice. Errors: RefusedError.
    """
    ports = [link for link in links if link.master == bridge.index and link.tunnel is None]
    needed = max([bridge.mtu, *(port.mtu for port in ports)])
    around = AROUND_BYTES[ipaddress.ip_address(remote).version]
    if needed + around > way.mtu:
        raise RefusedError(
            f"frames of {bridge.name} (MTU {needed}) do not fit through a tunnel over {way.name}"
            f" (MTU {way.mtu}): {around} bytes come around each",
            hint=f"an MTU of {way.mtu - around} for the guests and {bridge.name},"
            f" or one of {needed + around} for {way.name} and everything between the hosts",
        )
    return needed


def closes_loop(bridge: str, tunnel: str) -> bool:
    """Whether a frame sent on the bridge comes back through the tunnel, which is not its port yet.

    Then the far end's bridge is reached some other way already. Takes a second when all is well.
    """
    nonce = os.urandom(16)
    frame = b"\xff" * 6 + b"\x02vgseg" + EXPERIMENTAL_ETHERTYPE.to_bytes(2, "big") + nonce + b"\0" * 30
    listening = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(EXPERIMENTAL_ETHERTYPE))
    sending = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    with listening, sending:
        listening.bind((tunnel, EXPERIMENTAL_ETHERTYPE))
        sending.bind((bridge, 0))
        end_s = time.monotonic() + _LOOP_WAIT_S
        while (left_s := end_s - time.monotonic()) > 0:
            with contextlib.suppress(OSError):  # a bridge that is down closes no loop
                sending.send(frame)
            while select.select([listening], [], [], min(0.2, left_s))[0]:
                if nonce in listening.recv(2048):
                    return True
                left_s = end_s - time.monotonic()
    return False


def usher_address(name: str) -> str:
    """The abstract socket a segment's usher listens on, in the network namespace of the segment."""
    return f"\0virtgrid-usher-{name}"


def ushered(name: str) -> bool:
    """Whether the usher of a segment runs, as root: anybody may listen on an abstract address."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
        asking.settimeout(1.0)
        try:
            asking.connect(usher_address(name))
        except OSError:
            return False
        return peer_credentials(asking).uid == 0


def _start_usher(name: str) -> None:
    if ushered(name):
        return
    process = subprocess.Popen(
        [sys.executable, "-I", "-m", "virtgrid.net.usher", name],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd="/",
        start_new_session=True,
    )
    assert process.stdout is not None
    with process.stdout:
        if select.select([process.stdout], [], [], _USHER_DEADLINE_S)[0] and process.stdout.readline():
            return
    process.kill()
    process.wait()
    raise VirtgridError(f"the usher of {name} did not start")


def _resolve(peer: str) -> str:
    try:
        found = socket.getaddrinfo(peer, None, type=socket.SOCK_DGRAM)
    except (OSError, UnicodeError) as error:
        raise NotFoundError(f"'{peer}' is no host this one knows", cause=str(error)) from error
    return str(found[0][4][0])


def _route(links: Links, before: Sequence[Link], peer: str, remote: str) -> tuple[str, Link]:
    """How the other host is reached: (our address on that way, the interface)."""
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        route = links.call("route", "get", dst=remote)[0]
    except NetlinkError as error:
        raise NotFoundError(f"there is no route to {peer} ({remote})", cause=str(error)) from error
    way = next(link for link in before if link.index == route.get_attr("RTA_OIF"))
    if way.name == "lo":
        raise RefusedError(f"{peer} ({remote}) is this host", hint="name the other one")
    local = route.get_attr("RTA_PREFSRC")
    if local is None:
        raise RefusedError(f"this host has no address of its own on the way to {peer} ({remote})")
    return str(local), way


def _check_same(there: Link, wanted: Tunnel, bridge: Link) -> None:
    same = there.alias == ALIAS and there.tunnel == wanted and there.master in (None, bridge.index)
    if not same:
        leads = f" and leads to {there.tunnel.remote}" if there.tunnel else ""
        raise RefusedError(
            f"there is an interface {there.name} already, and it is another one{leads}",
            hint=f"another --vni (the same at both hosts), or virtgrid segment down {there.name}",
        )


def _segment(link: Link, bridge: Link) -> Segment:
    assert link.tunnel is not None
    return Segment(
        name=link.name,
        bridge=bridge.name,
        tunnel=link.tunnel,
        mtu=link.mtu,
        up=link.up,
        ours=link.alias == ALIAS,
        ushered=ushered(link.name),
    )
