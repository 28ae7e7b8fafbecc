"""Interfaces of a network namespace: bridges, veth pairs, tunnels, addresses. Everything may be said twice.

A netlink socket acts where it was opened, whatever its thread does later: hence a thread of its own.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, TypeVar

from virtgrid.core.errors import DeadlineError, LabError, NotFoundError, VirtgridError
from virtgrid.net import netns

T = TypeVar("T")

_TIMEOUT_S: Final = 30.0
VXLAN_PORT: Final = 4789
_IFF_UP: Final = 1

# linux/netlink.h
_HEADER: Final = struct.Struct("=IHHII")
_ERRNO: Final = struct.Struct("=i")
_REQUEST, _ACK = 0x1, 0x4
_ERROR, _DONE = 2, 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Tunnel:
    """What a VXLAN interface is told: addresses of the two hosts, None where it has none."""

    vni: int
    local: str | None
    remote: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """An interface as the kernel has it. master: the index of the bridge it is a port of.

    kind: ``bridge``, ``tun``, ``vxlan``, ``veth`` …, empty for a plain device. alias: a note of its maker.
    rx_packets, tx_packets: of a tap, how many frames its guest has sent, and how many were read for it.
    """

    index: int
    name: str
    kind: str
    mac: str
    mtu: int
    master: int | None
    up: bool
    rx_packets: int
    alias: str
    tunnel: Tunnel | None
    tx_packets: int = 0


class Links:
    """A namespace's interfaces, by name. Use as a context manager; what the kernel refuses is a LabError
    in a named namespace, a VirtgridError in the caller's own (None).

    A thread of its own enters the namespace and does all the talking. (pyroute2's NetNS would fork to get
    there, and the child of a process with threads can hang on a lock that nobody will ever release.)
    """

    def __init__(self, namespace: str | None = None) -> None:
        self.namespace = namespace
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="links")
        try:
            self._netlink: Any = self._thread.submit(self._open).result(_TIMEOUT_S)
        except BaseException:
            self._thread.shutdown(wait=False)
            raise

    def _open(self) -> Any:
        from pyroute2 import IPRoute  # here: it takes a third of a second, and `lab exec` needs none of it

        if self.namespace is not None:
            netns.enter(self.namespace)
        return IPRoute()

    def run(self, work: Callable[[], T]) -> T:
        """Do something in our thread, hence in the namespace. Errors: its own, TimeoutError."""
        return self._thread.submit(work).result(_TIMEOUT_S)

    def ask(self, kind: int, flags: int, body: bytes) -> list[tuple[int, bytes]]:
        """A message of rtnetlink(7) as it stands -> (kind, body) of the answers. Errors: OSError."""

        def send() -> list[tuple[int, bytes]]:
            with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as kernel:
                kernel.settimeout(_TIMEOUT_S)
                kernel.send(
                    _HEADER.pack(_HEADER.size + len(body), kind, _REQUEST | _ACK | flags, 1, 0) + body
                )
                answers: list[tuple[int, bytes]] = []
                while True:
                    for kind_, answer in _messages(kernel.recv(1 << 16)):
                        if kind_ == _DONE or (
                            kind_ == _ERROR and not (code := _ERRNO.unpack_from(answer)[0])
                        ):
                            return answers
                        if kind_ == _ERROR:
                            raise OSError(-code, os.strerror(-code))
                        answers.append((kind_, answer))

        return self._thread.submit(send).result(_TIMEOUT_S)

    @property
    def _where(self) -> str:
        return "this namespace" if self.namespace is None else f"namespace {self.namespace}"

    def call(self, name: str, *arguments: Any, **options: Any) -> tuple[Any, ...]:
        """A method of pyroute2, called in our thread; what it yields is taken there too."""

        def call() -> tuple[Any, ...]:
            return tuple(getattr(self._netlink, name)(*arguments, **options) or ())

        try:
            return self._thread.submit(call).result(_TIMEOUT_S)
        except TimeoutError as error:
            raise DeadlineError(f"the kernel did not answer about interfaces in {self._where}") from error

    def __enter__(self) -> Links:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        from pyroute2.netlink.exceptions import NetlinkError

        self._thread.submit(self._netlink.close).result(_TIMEOUT_S)
        self._thread.shutdown()
        if isinstance(value, NetlinkError):
            kind_of = VirtgridError if self.namespace is None else LabError
            raise kind_of(f"the kernel refused an interface in {self._where}", cause=str(value)) from value

    def index(self, name: str) -> int | None:
        """The interface's index; None when there is none of this name."""
        found = self.call("link_lookup", ifname=name)
        return int(found[0]) if found else None

    def require(self, name: str) -> int:
        """The interface's index. Errors: LabError, NotFoundError."""
        index = self.index(name)
        if index is None:
            kind_of = NotFoundError if self.namespace is None else LabError
            raise kind_of(f"there is no interface '{name}' in {self._where}")
        return index

    def all(self) -> tuple[Link, ...]:
        """Every interface."""
        return tuple(_link(message) for message in self.call("get_links"))

    def bridge(self, name: str, *, mac: str | None = None, up: bool = True) -> bool:
        """A bridge without STP and without delay. False when it was there."""
        made = self.index(name) is None
        if made:
            options = {"address": mac} if mac else {}
            self.call(
                "link",
                "add",
                ifname=name,
                kind="bridge",
                br_stp_state=0,
                br_forward_delay=0,
                br_mcast_snooping=0,  # without a querier it only sends reports and drops groups
                **options,
            )
        if up:
            self.up(name)
        return made

    def rename(self, name: str, to: str) -> None:
        """Give the interface, which is down, another name."""
        self.call("link", "set", index=self.require(name), ifname=to)

    def veth(self, name: str, *, peer: str, peer_namespace: str) -> bool:
        """A veth pair with its far end in another namespace. False when it was there.

        Half a pair cannot exist: when the near end is there, so is the far one.
        """
        if self.index(name) is not None:
            return False
        self.call("link", "add", ifname=name, kind="veth", peer={"ifname": peer, "net_ns_fd": peer_namespace})
        return True

    def vxlan(self, name: str, tunnel: Tunnel, *, mtu: int, alias: str) -> bool:
        """A VXLAN (RFC 7348), not yet up, to one other host, or to those that are told it later.

        False when an interface of this name was there. The kernel takes no two of one VNI.
        """
        if self.index(name) is not None:
            return False
        self.call(
            "link",
            "add",
            ifname=name,
            kind="vxlan",
            vxlan_id=tunnel.vni,
            vxlan_port=VXLAN_PORT,
            **_family(tunnel),
        )
        self.note(name, alias, mtu=mtu)
        return True

    def note(self, name: str, alias: str, *, mtu: int) -> None:
        """Give the interface a note of its maker, and an MTU of its own."""
        self.call("link", "set", index=self.require(name), mtu=mtu, ifalias=alias)

    def enslave(self, name: str, bridge: str) -> None:
        """Make the interface a port of the bridge."""
        self.call("link", "set", index=self.require(name), master=self.require(bridge))

    def up(self, name: str, *, mtu: int | None = None, mac: str | None = None) -> None:
        """Set the interface up, with an MTU and a MAC when given."""
        options: dict[str, Any] = {"mtu": mtu} if mtu else {}
        if mac:
            options["address"] = mac
        self.call("link", "set", index=self.require(name), state="up", **options)

    def address(self, name: str, address: str, prefix: int) -> bool:
        """Add an IPv4 or IPv6 address. False when it was there."""
        from pyroute2.netlink.exceptions import NetlinkError

        try:
            self.call("addr", "add", index=self.require(name), address=address, prefixlen=prefix)
        except NetlinkError as error:
            if error.code != errno.EEXIST:
                raise
            return False
        return True

    def delete(self, name: str) -> bool:
        """Delete the interface. False when there was none."""
        index = self.index(name)
        if index is None:
            return False
        self.call("link", "del", index=index)
        return True

    def counters(self, name: str) -> dict[str, int]:
        """rx/tx packets, bytes and drops of the interface since it was made."""
        (link,) = self.call("get_links", self.require(name))
        stats = link.get_attr("IFLA_STATS64")
        wanted = ("rx_packets", "tx_packets", "rx_bytes", "tx_bytes", "rx_dropped", "tx_dropped")
        return {key: int(stats[key]) for key in wanted}


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    """What one read from a netlink socket holds: (kind, body) of each message."""
    at = 0
    while at + _HEADER.size <= len(data):
        length, kind, *_ = _HEADER.unpack_from(data, at)
        yield kind, data[at + _HEADER.size : at + length]
        at += (length + 3) & ~3


def _family(tunnel: Tunnel) -> dict[str, str]:
    six = "6" if ":" in (tunnel.remote or tunnel.local or "") else ""
    ends = {f"vxlan_local{six}": tunnel.local, f"vxlan_group{six}": tunnel.remote}
    return {name: address for name, address in ends.items() if address is not None}


def _link(message: Any) -> Link:
    info = message.get_attr("IFLA_LINKINFO")
    kind = (info.get_attr("IFLA_INFO_KIND") if info is not None else None) or ""
    stats = message.get_attr("IFLA_STATS64")
    return Link(
        index=int(message["index"]),
        name=message.get_attr("IFLA_IFNAME"),
        kind=kind,
        mac=(message.get_attr("IFLA_ADDRESS") or "").lower(),
        mtu=int(message.get_attr("IFLA_MTU") or 0),
        master=message.get_attr("IFLA_MASTER"),
        up=bool(message["flags"] & _IFF_UP),
        rx_packets=int(stats["rx_packets"]) if stats is not None else 0,
        tx_packets=int(stats["tx_packets"]) if stats is not None else 0,
        alias=message.get_attr("IFLA_IFALIAS") or "",
        tunnel=_tunnel(info.get_attr("IFLA_INFO_DATA")) if kind == "vxlan" else None,
    )


def _tunnel(data: Any) -> Tunnel:
    return Tunnel(
        vni=int(data.get_attr("IFLA_VXLAN_ID") or 0),
        local=data.get_attr("IFLA_VXLAN_LOCAL") or data.get_attr("IFLA_VXLAN_LOCAL6"),
        remote=data.get_attr("IFLA_VXLAN_GROUP") or data.get_attr("IFLA_VXLAN_GROUP6"),
    )
