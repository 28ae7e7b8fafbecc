"""Two hosts with a bridge each and a cable between them, without libvirt; and a tap with its QEMU's end."""

from __future__ import annotations

import fcntl
import os
import select
import signal
import socket
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import pytest

from virtgrid.lab import processes
from virtgrid.net import netns, redirect, segment
from virtgrid.net.link import Links
from virtgrid.net.packets import EXPERIMENTAL_ETHERTYPE
from virtgrid.net.redirect import Redirect
from virtgrid.net.segment import Segment

T = TypeVar("T")
BRIDGE = "br0"
WAY = "wan0"
GUEST = "52:54:00:5e:00:01"
TAP = "tap9"
TAP_MAC = "fe:54:00:5e:00:01"
_NUMBER = iter(range(1000))
PAYLOAD = b"\x08\x00" + b"payload of a frame for the guest".ljust(60)


@dataclass(frozen=True)
class Pair:
    """Two hosts with a bridge each and a cable between them; ``left`` is 10.98.0.1, ``right`` 10.98.0.2."""

    left: str
    right: str

    def up(self, where: str, *, bridge: str = BRIDGE, peer: str | None = None, vni: int = 7) -> Segment:
        other = "10.98.0.2" if where == self.left else "10.98.0.1"
        return netns.run_in(where, lambda: segment.up(bridge, peer or other, vni))

    def both_up(self) -> str:
        self.up(self.left)
        return self.up(self.right).name


@pytest.fixture
def pair(lab_possible: None) -> Iterator[Pair]:
    number = next(_NUMBER)
    names = [f"vgseg{os.getpid()}{side}{number}" for side in "lr"]
    try:
        for name in names:
            netns.create(name)
            netns.set_sysctl(name, {"net/ipv6/conf/default/disable_ipv6": "1"})
        with Links(names[0]) as links:
            links.veth(WAY, peer=WAY, peer_namespace=names[1])
        for side, name in enumerate(names, start=1):
            with Links(name) as links:
                links.up("lo")
                links.bridge(BRIDGE, mac=f"02:00:00:00:00:0{side}")
                links.address(BRIDGE, f"10.78.0.{side}", 24)
                links.up(WAY, mtu=1600)
                links.address(WAY, f"10.98.0.{side}", 24)
        yield Pair(*names)
    finally:
        for name in names:
            left_over = ushers(name)
            netns.delete(name)
            for pid in left_over:
                processes.send(pid, signal.SIGKILL, wait_s=5.0)


def ushers(namespace: str) -> list[int]:
    """Processes in a namespace other than ours."""
    here = netns.identity(netns.path(namespace))
    return [pid for pid in processes.parents() if netns.identity(f"/proc/{pid}/ns/net") == here]


def at(namespace: str, work: Callable[[Links], T]) -> T:
    with Links(namespace) as links:
        return work(links)


class Tap:
    """A tap as libvirt makes one, with QEMU's end of it in our hands."""

    def __init__(self, namespace: str) -> None:
        def make() -> int:
            end = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            fcntl.ioctl(
                end, 0x400454CA, struct.pack("16sH22x", TAP.encode(), 0x1002)
            )  # TUNSETIFF: TAP, NO_PI
            return end

        self.end = netns.run_in(namespace, make)
        with Links(namespace) as links:
            links.up(TAP, mac=TAP_MAC)
            links.enslave(TAP, BRIDGE)
            self.index = links.require(TAP)

    def waiting(self) -> bool:
        """Whether a frame waits for the guest, the one that is there to be lost too."""
        return bool(select.select([self.end], [], [], 0)[0])

    def queued(self) -> list[bytes]:
        """What waits for the guest, but for the frame that is there to be lost."""
        return [frame for frame in self.read() if frame[12:14] != EXPERIMENTAL_ETHERTYPE.to_bytes(2, "big")]

    def read(self) -> list[bytes]:
        frames = []
        while True:
            try:
                frames.append(os.read(self.end, 65536))
            except BlockingIOError:
                return frames

    def send(self, frame: bytes) -> None:
        os.write(self.end, frame)


def send(namespace: str, frame: bytes) -> None:
    def send() -> None:
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as raw:
            raw.bind((BRIDGE, 0))
            raw.send(frame)

    netns.run_in(namespace, send)


def rules(namespace: str, name: str) -> set[Redirect]:
    return at(namespace, lambda links: set(redirect.redirects(links, links.require(name))))
