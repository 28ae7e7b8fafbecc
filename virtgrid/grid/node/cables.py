"""The host's end of a sandbox's cable: up or down, into its bridge, away.

Ioctls and one netlink message, each a fraction of a millisecond and without a library, because the hook
uses them too. In the caller's network namespace. Errors: OSError, ENODEV when there is none of the name.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import time

_SIOCGIFFLAGS, _SIOCSIFFLAGS, _SIOCBRADDIF = 0x8913, 0x8914, 0x89A2
_SIOCGIFHWADDR, _SIOCSIFHWADDR = 0x8927, 0x8924
_IFF_UP, _IFF_RUNNING = 1, 0x40
_FLAGS = "16sH22x"
_RTM_DELLINK, _NLM_F_REQUEST, _NLM_F_ACK, _RTMGRP_LINK = 17, 1, 4, 1
_HEADER = "=IHHII"


def _control() -> socket.socket:
    return socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)


def _flags(control: socket.socket, name: str) -> int:
    asked = struct.pack(_FLAGS, name.encode()[:15], 0)
    return int(struct.unpack(_FLAGS, fcntl.ioctl(control, _SIOCGIFFLAGS, asked))[1])


def is_up(name: str) -> bool | None:
    """Whether it is set up; None when there is none of this name."""
    with _control() as control:
        try:
            return bool(_flags(control, name) & _IFF_UP)
        except OSError:
            return None


def set_up(name: str, *, up: bool) -> None:
    """Set it up or down."""
    with _control() as control:
        flags = _flags(control, name)
        wanted = flags | _IFF_UP if up else flags & ~_IFF_UP
        if wanted != flags:
            fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack(_FLAGS, name.encode()[:15], wanted))


def is_running(name: str) -> bool:
    """Is it up with a carrier, and has the kernel noticed?"""
    with _control() as control:
        return bool(_flags(control, name) & _IFF_RUNNING)


def wait_running(name: str, timeout_s: float) -> bool:
    """Until it is up with a carrier and the kernel has noticed; False when that takes longer."""
    deadline_s = time.monotonic() + timeout_s
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC) as changes:
        changes.bind((0, _RTMGRP_LINK))
        while not is_running(name):
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                return False
            changes.settimeout(left_s)
            try:
                changes.recv(65536)  # of whichever link: looking costs less than reading
            except OSError:  # too late, or more changes than it holds
                continue
    return True


def announce(name: str, family: str) -> None:
    """Have the kernel tell the segment whose addresses these are; to be called where the interface is.

    A neighbour that asked in vain asks again only after a second; this ends its waiting. The kernel sends
    gratuitous ARP (RFC 5227, section 3) or unsolicited neighbour advertisements (RFC 4861, 7.2.6) when a
    hardware address is set and it has been asked to notify, so the address is set to what it is. An IPv6
    address that is still being checked for duplicates is told as soon as that is over. Sent by ourselves
    it would take ten times as long: the end of a packet socket waits for all readers in the kernel.
    """
    notify = {"ipv4": "arp_notify", "ipv6": "ndisc_notify"}[family]
    with open(f"/proc/sys/net/{family}/conf/{name}/{notify}", "w") as file:
        file.write("1")
    with _control() as control:
        hardware = fcntl.ioctl(control, _SIOCGIFHWADDR, struct.pack("16s24x", name.encode()[:15]))
        fcntl.ioctl(control, _SIOCSIFHWADDR, hardware)


def plug(bridge: str, name: str) -> None:
    """Put a cable back into its bridge when that was made anew since; one that is gone is left so."""
    where = f"/sys/class/net/{name}"
    if "/" in name or not os.path.isdir(where) or os.path.lexists(f"{where}/master"):
        return
    with _control() as control:
        asked = struct.pack("16si20x", bridge.encode()[:15], socket.if_nametoindex(name))
        fcntl.ioctl(control, _SIOCBRADDIF, asked)
    set_up(name, up=True)


def delete(name: str) -> bool:
    """Delete it, and its other end with it; False when there is none."""
    try:
        index = socket.if_nametoindex(name)
    except OSError:
        return False
    body = struct.pack("=BxHiII", 0, 0, index, 0, 0)
    head = struct.pack(_HEADER, 16 + len(body), _RTM_DELLINK, _NLM_F_REQUEST | _NLM_F_ACK, 1, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0) as line:
        line.settimeout(10)
        line.send(head + body)
        answer = line.recv(4096)
    number = -struct.unpack_from("=i", answer, 16)[0]
    if number:
        raise OSError(number, f"delete {name}: {os.strerror(number)}")
    return True
