"""Traffic control as the kernel speaks it (linux/rtnetlink.h): messages and their attributes. Pure."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from typing import Final

NEW_QDISC, DELETE_QDISC, GET_QDISC = 36, 37, 38
NEW_CLASS, DELETE_CLASS, GET_CLASS = 40, 41, 42
NEW_FILTER, DELETE_FILTER, GET_FILTER = 44, 45, 46
# linux/netlink.h
REPLACE, CREATE, EXCLUSIVE, DUMP = 0x100, 0x400, 0x200, 0x300
ROOT: Final = 0xFFFFFFFF  # linux/pkt_sched.h: the parent of an interface's own discipline
TCMSG: Final = struct.Struct("=BxxxiIII")
"""Family, interface, handle, parent, info; of a filter, info is its rank and its protocol."""
KIND, OPTIONS = 1, 2  # TCA_KIND, TCA_OPTIONS
#: tc_u32_sel: flags, offshift, nkeys, offmask, off, offoff, hoff, hmask; its keys follow.
SELECTOR: Final = struct.Struct("=BBBxHHhhI")
TERMINAL: Final = 1

_ATTRIBUTE: Final = struct.Struct("=HH")
_NESTED: Final = 0x3FFF  # the bits of an attribute's kind that are not flags


def head(interface: int, *, parent: int, handle: int = 0, rank: int = 0, protocol: int = 0) -> bytes:
    """What every message begins with. protocol: an Ethernet type, for filters."""
    info = rank << 16 | socket.htons(protocol) if rank else 0
    return TCMSG.pack(socket.AF_UNSPEC, interface, handle, parent, info)


def attribute(kind: int, payload: bytes) -> bytes:
    padding = -len(payload) % 4
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(payload), kind) + payload + b"\0" * padding


def attributes(data: bytes) -> dict[int, bytes]:
    return dict(_each(data))


def _each(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if length < _ATTRIBUTE.size:
            return
        yield kind & _NESTED, data[at + _ATTRIBUTE.size : at + length]
        at += (length + 3) & ~3
