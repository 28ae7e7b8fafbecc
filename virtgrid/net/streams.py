"""TCP connections of another process (QEMU's): found by whom they lead to, and set from outside.

pidfd_getfd(2) gives the very socket, so that an option is set on this connection and on no other, whatever
ports, NAT or TLS it goes through; and it is gone with the connection: nothing has to be put back.

How much is bounded: a socket takes what its buffer holds, megabytes once the window has grown, and to QEMU
that counts as sent: its figure of a pause ends when the last byte is *in* the buffer. TCP_NOTSENT_LOWAT
(tcp(7), kernel 3.12) bounds what was taken and not yet sent, and leaves alone what is under way.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final

from virtgrid.net import netns, syscalls

_SO_SNDBUFFORCE: Final = 32
_TCP_NOTSENT_LOWAT: Final = 25
_TCP_INFO: Final = 11
_INFO_BYTES: Final = 168
# linux/tcp.h, struct tcp_info: where these are.
_RTT, _MIN_RTT, _DELIVERY_RATE = 68, 148, 160
_ESTABLISHED: Final = 1
#: Never less unsent: QEMU writes up to 32 pages at a time, and is woken when half of it has gone.
UNSENT_MIN_BYTES: Final = 128 << 10
UNSENT_MAX_BYTES: Final = 16 << 20
_UNSENT_S: Final = 0.01
_BUFFER_MAX_BYTES: Final = 256 << 20
_NETWORK: Final = "ns/net"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """What a connection is told. buffer_bytes: what it may hold in all; None: the kernel's choice."""

    unsent_bytes: int
    buffer_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """A connection of the process. inode: its name; delay_s: there and back; rate_bytes_s: seen last."""

    inode: int
    peer: str
    port: int
    delay_s: float
    rate_bytes_s: int


def choose(rate_bytes_s: float, delay_s: float, *, kernel_bytes: int) -> Bound:
    """What a connection of this rate and round trip should hold. kernel_bytes: what it grows to by itself.

    Unsent: a hundredth of a second's worth. In all twice rate x delay, where the kernel's own limit is below
    that and would slow the connection down.
    """
    unsent = round(min(max(rate_bytes_s * _UNSENT_S, UNSENT_MIN_BYTES), UNSENT_MAX_BYTES))
    wanted = round(2 * rate_bytes_s * delay_s) + unsent
    return Bound(
        unsent_bytes=unsent, buffer_bytes=min(wanted, _BUFFER_MAX_BYTES) if wanted > kernel_bytes else None
    )


def kernel_limit_bytes() -> int:
    """What a connection's buffer grows to by itself, in the caller's network namespace."""
    try:
        return int(Path("/proc/sys/net/ipv4/tcp_wmem").read_text().split()[2])
    except (OSError, ValueError, IndexError):
        return 4 << 20


def qemu_of(uuid: str) -> int | None:
    """The process of a domain in the caller's network namespace; None when there is none to be seen."""
    here = netns.identity(Path("/proc/self") / _NETWORK)
    for path in Path("/proc").iterdir():
        if not path.name.isdecimal():
            continue
        with contextlib.suppress(OSError):
            words = (path / "cmdline").read_bytes().split(b"\0")
            # The word after the option, not any: others (ours too) may have the UUID in theirs.
            if (b"-uuid", uuid.encode()) in pairwise(words) and netns.identity(path / _NETWORK) == here:
                return int(path.name)
    return None


class Process:
    """A process whose connections are looked after. Use as a context manager. Errors: OSError."""

    def __init__(self, pid: int) -> None:
        self._files = Path(f"/proc/{pid}/fd")
        self._pidfd = os.pidfd_open(pid)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._pidfd)

    def sockets(self) -> dict[int, int]:
        """inode -> descriptor of each socket, of any kind."""
        found: dict[int, int] = {}
        for path in self._files.iterdir():
            with contextlib.suppress(OSError, ValueError):
                kind, _, inode = str(path.readlink()).partition(":")
                if kind == "socket":
                    found.setdefault(int(inode.strip("[]")), int(path.name))
        return found

    def streams(self, peers: Collection[str], *, without: Collection[int] = ()) -> tuple[Stream, ...]:
        """Its established connections to one of these addresses. without: sockets that are none of ours."""
        found = []
        for inode, descriptor in self.sockets().items():
            if inode not in without:
                with contextlib.suppress(OSError), self._borrow(inode, descriptor) as one:
                    stream = _look(one, inode)
                    if stream is not None and stream.peer in peers:
                        found.append(stream)
        return tuple(found)

    def bind(self, inode: int, bound: Bound, *, priority: int | None = None) -> None:
        """Tell a connection what it may hold. priority: of its packets, a class of a queueing discipline.

        Errors: OSError; ProcessLookupError when the connection is gone.
        """
        descriptor = self.sockets().get(inode)
        if descriptor is None:
            raise ProcessLookupError
        with self._borrow(inode, descriptor) as one:
            if priority is not None:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY, priority)
            one.setsockopt(socket.IPPROTO_TCP, _TCP_NOTSENT_LOWAT, bound.unsent_bytes)
            if bound.buffer_bytes is not None:
                # The kernel doubles what it is told, and counts its own overhead in.
                one.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, bound.buffer_bytes)

    @contextlib.contextmanager
    def _borrow(self, inode: int, descriptor: int) -> Iterator[socket.socket]:
        """The socket itself. Its number may have passed to another file meanwhile: looked at once more."""
        ours = syscalls.pidfd_getfd(self._pidfd, descriptor)
        try:
            if os.fstat(ours).st_ino != inode:
                raise ProcessLookupError
            one = socket.socket(fileno=os.dup(ours))
        finally:
            os.close(ours)
        with one:
            yield one


def _look(one: socket.socket, inode: int) -> Stream | None:
    if one.family not in (socket.AF_INET, socket.AF_INET6) or one.type != socket.SOCK_STREAM:
        return None
    info = one.getsockopt(socket.IPPROTO_TCP, _TCP_INFO, _INFO_BYTES)
    if len(info) < _INFO_BYTES or info[0] != _ESTABLISHED:
        return None
    name = one.getpeername()
    address = ipaddress.ip_address(str(name[0]).partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    least, smoothed = (struct.unpack_from("=I", info, at)[0] for at in (_MIN_RTT, _RTT))
    delay_us = least if least != 0xFFFFFFFF and least else smoothed
    return Stream(
        inode=inode,
        peer=str(address),
        port=int(name[1]),
        delay_s=delay_us / 1e6,
        rate_bytes_s=int(struct.unpack_from("=Q", info, _DELIVERY_RATE)[0]),
    )
