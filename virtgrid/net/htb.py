"""HTB trees in the kernel (tc-htb(8)): read those of ours, and take the steps of ``virtgrid.net.guarantee``.

The messages are put together here: pyroute2's say neither what the link layer is nor words of a filter by
their offset.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterable
from typing import Any, Final

from virtgrid.core.errors import RefusedError
from virtgrid.net import tcmsg
from virtgrid.net.guarantee import (
    AddFilter,
    Change,
    Class,
    DropClass,
    DropFilter,
    Fell,
    Match,
    Plant,
    SetClass,
    Tree,
)
from virtgrid.net.link import Links
from virtgrid.net.tcmsg import KIND, OPTIONS, SELECTOR, TCMSG, TERMINAL, attribute, attributes

ROOT: Final = 0x56470000  # "VG"
"""The handle by which a tree is known to be ours."""
FRAMING_BYTES: Final = 24
"""Preamble, checksum and gap: what Ethernet adds to a frame, and nobody counts."""
_BURST_S: Final = 0.02
"""What may be caught up when the processor was elsewhere."""
_BURST_BYTES: Final = 64 << 10
_SMOOTH_S: Final = 0.002
_SMOOTH_BYTES: Final = 2 << 10
_QUEUE_S: Final = 0.1
_TICK_S: Final = 64e-9  # PSCHED_SHIFT

# linux/pkt_sched.h
_PARAMETERS, _INIT, _DIRECT, _RATE64, _CEIL64 = 1, 2, 5, 6, 7
_GLOBAL: Final = struct.Struct("=IIIII")
_RATE: Final = struct.Struct("=BBHhHI")
_CLASS: Final = struct.Struct("=IIIII")
_ETHERNET: Final = 1  # TC_LINKLAYER_ETHERNET: the kernel reckons, and needs no table of ours
_DIRECT_PACKETS: Final = 1000
_U32_CLASS, _U32_SELECTOR = 1, 5
_KEY: Final = struct.Struct(">II")
_OFFSETS: Final = struct.Struct("=ii")
_PROTOCOLS: Final = {4: 0x0800, 6: 0x86DD}
_MOST: Final = 0xFFFFFFFF


def roots(links: Links) -> dict[int, int]:
    """Interfaces with a queueing discipline of their own, and its handle; not those with the kernel's."""
    found = {}
    for kind, body in links.ask(tcmsg.GET_QDISC, tcmsg.DUMP, tcmsg.head(0, parent=0)):
        if kind == tcmsg.NEW_QDISC:
            _, index, handle, parent, _ = TCMSG.unpack_from(body)
            if parent == tcmsg.ROOT and handle != 0:
                found[index] = handle
    return found


def read(links: Links, interface: int) -> Tree | None:
    """The tree of ours on an interface (an index); None when there is none.

    Errors: RefusedError when somebody else has put a discipline there: theirs is not replaced. OSError.
    """
    root = roots(links).get(interface)
    if root is None:
        return None
    if root != ROOT:
        raise RefusedError(
            "it has a queueing discipline that virtgrid did not make",
            hint="tc qdisc show; remove it, or guarantee no bandwidth over this interface",
        )
    classes = classes_of(links, interface)
    filters = {match: minor for match, (minor, _) in _filters(links, interface).items()}
    return Tree(classes=classes, filters=filters)


def classes_of(links: Links, interface: int) -> dict[int, Class]:
    """The classes of HTB on an interface, by minor number. Errors: OSError."""
    classes = {}
    for kind, body in links.ask(tcmsg.GET_CLASS, tcmsg.DUMP, tcmsg.head(interface, parent=0)):
        if kind == tcmsg.NEW_CLASS and (found := read_class(body)) is not None:
            classes[found[0]] = found[1]
    return classes


def apply(links: Links, interface: int, changes: Iterable[Change], *, root: int = ROOT) -> None:
    """Take the steps, in their order. root: the tree's handle. Errors: OSError."""
    for change in changes:
        _apply(links, interface, change, root)


def _apply(links: Links, interface: int, change: Change, root: int) -> None:
    match change:
        case Plant(others):
            body = tcmsg.head(interface, parent=tcmsg.ROOT, handle=root)
            options = attribute(_INIT, _GLOBAL.pack(3, 10, others, 0, 0))
            options += attribute(_DIRECT, struct.pack("=I", _DIRECT_PACKETS))
            body += attribute(KIND, b"htb\0") + attribute(OPTIONS, options)
            links.ask(tcmsg.NEW_QDISC, tcmsg.CREATE | tcmsg.EXCLUSIVE, body)
        case Fell():
            body = tcmsg.head(interface, parent=tcmsg.ROOT, handle=root)
            links.ask(tcmsg.DELETE_QDISC, 0, body)
        case SetClass(minor, to):
            links.ask(tcmsg.NEW_CLASS, tcmsg.CREATE, write_class(interface, minor, to, root=root))
            if to.leaf:
                _queue(links, interface, root | minor, to)
        case DropClass(minor):
            links.ask(tcmsg.DELETE_CLASS, 0, tcmsg.head(interface, parent=0, handle=root | minor))
        case AddFilter(what, minor):
            body = write_filter(interface, what, minor, root=root)
            links.ask(tcmsg.NEW_FILTER, tcmsg.CREATE | tcmsg.EXCLUSIVE, body)
        case DropFilter(what):
            found = _filters(links, interface, root=root).get(what)
            if found is not None:
                body = _filter_head(interface, what, root=root, handle=found[1])
                body += attribute(KIND, b"u32\0")
                links.ask(tcmsg.DELETE_FILTER, 0, body)


def _queue(links: Links, interface: int, parent: int, to: Class) -> None:
    """A leaf's queue: fair between connections where the kernel has that, and a tenth of a second long."""
    head = tcmsg.head(interface, parent=parent)
    flags = tcmsg.CREATE | tcmsg.EXCLUSIVE
    limit = struct.pack("=I", max(4 * _BURST_BYTES, round(to.rate_bytes_s * _QUEUE_S)))
    for kind, options in ((b"fq_codel\0", b""), (b"bfifo\0", attribute(OPTIONS, limit))):
        try:
            links.ask(tcmsg.NEW_QDISC, flags, head + attribute(KIND, kind) + options)
        except OSError as error:
            if error.errno == errno.EEXIST:  # the class was only changed
                return
            if error.errno != errno.ENOENT:
                raise
        else:
            return


# -- messages ------------------------------------------------------------------------------------


def write_class(interface: int, minor: int, to: Class, *, root: int = ROOT) -> bytes:
    """NEW_CLASS."""
    parent = root | to.parent
    words = b"".join(
        _RATE.pack(0, _ETHERNET, FRAMING_BYTES, 0, 0, min(rate, _MOST))
        for rate in (to.rate_bytes_s, to.ceil_bytes_s)
    )
    quantum = min(60_000, max(2_000, to.rate_bytes_s // 100))
    bursts = (_ticks(rate, smooth=to.smooth) for rate in (to.rate_bytes_s, to.ceil_bytes_s))
    words += _CLASS.pack(*bursts, quantum, 0, to.prio)
    options = attribute(_PARAMETERS, words)
    for kind, rate in ((_RATE64, to.rate_bytes_s), (_CEIL64, to.ceil_bytes_s)):
        if rate >= _MOST:
            options += attribute(kind, struct.pack("=Q", rate))
    body = tcmsg.head(interface, parent=parent, handle=root | minor)
    return body + attribute(KIND, b"htb\0") + attribute(OPTIONS, options)


def _ticks(rate_bytes_s: int, *, smooth: bool) -> int:
    """How long a burst takes at this rate, in the kernel's unit."""
    burst_s, burst_bytes = (_SMOOTH_S, _SMOOTH_BYTES) if smooth else (_BURST_S, _BURST_BYTES)
    return min(_MOST, round((burst_s + burst_bytes / rate_bytes_s) / _TICK_S))


def read_class(body: bytes) -> tuple[int, Class] | None:
    """The inverse of ``write_class``, with its minor number; None for what is no class of HTB."""
    _, _, handle, parent, _ = TCMSG.unpack_from(body)
    found = attributes(body[TCMSG.size :])
    options = attributes(found.get(OPTIONS, b""))
    words = options.get(_PARAMETERS, b"")
    if found.get(KIND) != b"htb\0" or len(words) < 2 * _RATE.size + _CLASS.size:
        return None
    rates = [_RATE.unpack_from(words, at)[5] for at in (0, _RATE.size)]
    for place, kind in enumerate((_RATE64, _CEIL64)):
        if kind in options:
            rates[place] = struct.unpack("=Q", options[kind])[0]
    prio = _CLASS.unpack_from(words, 2 * _RATE.size)[4]
    above = 0 if parent == tcmsg.ROOT else parent & 0xFFFF
    return handle & 0xFFFF, Class(parent=above, rate_bytes_s=rates[0], ceil_bytes_s=rates[1], prio=prio)


def _filter_head(interface: int, what: Match, *, root: int, handle: int = 0) -> bytes:
    protocol = _PROTOCOLS[what.version]
    return tcmsg.head(interface, parent=root, handle=handle, rank=what.order, protocol=protocol)


def write_filter(interface: int, what: Match, minor: int, *, root: int = ROOT) -> bytes:
    """NEW_FILTER."""
    selector = SELECTOR.pack(TERMINAL, 0, len(what.keys), 0, 0, 0, 0, 0)
    for mask, value, offset in what.keys:
        selector += _KEY.pack(mask, value) + _OFFSETS.pack(offset, 0)
    options = attribute(_U32_CLASS, struct.pack("=I", root | minor))
    options += attribute(_U32_SELECTOR, selector)
    return _filter_head(interface, what, root=root) + attribute(KIND, b"u32\0") + attribute(OPTIONS, options)


def _filters(links: Links, interface: int, *, root: int = ROOT) -> dict[Match, tuple[int, int]]:
    """Each filter of the tree: (the class it leads to, its handle)."""
    found: dict[Match, tuple[int, int]] = {}
    for kind, body in links.ask(tcmsg.GET_FILTER, tcmsg.DUMP, tcmsg.head(interface, parent=root)):
        if kind == tcmsg.NEW_FILTER and (one := read_filter(body)) is not None:
            found[one[0]] = one[1:]
    return found


def read_filter(body: bytes) -> tuple[Match, int, int] | None:
    """The inverse of ``write_filter``, with the handle; None for a table of filters and other kinds."""
    _, _, handle, _, info = TCMSG.unpack_from(body)
    found = attributes(body[TCMSG.size :])
    options = attributes(found.get(OPTIONS, b""))
    selector, leads = options.get(_U32_SELECTOR, b""), options.get(_U32_CLASS, b"")
    if found.get(KIND) != b"u32\0" or len(selector) < SELECTOR.size or len(leads) != 4:
        return None
    keys: list[tuple[Any, ...]] = []
    for number in range(SELECTOR.unpack_from(selector)[2]):
        at = SELECTOR.size + 16 * number
        keys.append((*_KEY.unpack_from(selector, at), _OFFSETS.unpack_from(selector, at + 8)[0]))
    order = info >> 16
    version = 6 if order % 2 else 4
    what = Match(rank=order - (version == 6), version=version, keys=tuple(keys))
    return what, struct.unpack("=I", leads)[0] & 0xFFFF, handle
