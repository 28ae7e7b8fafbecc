"""Leading what an interface receives past its bridge: frames for one hardware address go out elsewhere.

A u32 filter on the interface's ingress with a mirred action, put together here: the address lies before
the network header, at negative offsets, which pyroute2's u32 cannot say.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from virtgrid.net.addresses import parse_mac
from virtgrid.net.link import Links
from virtgrid.net.packets import ETH_P_ALL

# linux/rtnetlink.h
_NEW_QDISC, _NEW_FILTER, _DELETE_FILTER, _GET_FILTER = 36, 44, 45, 46
# linux/netlink.h
_CREATE, _EXCLUSIVE, _DUMP = 0x400, 0x200, 0x300
_TCMSG: Final = struct.Struct("=BxxxiIII")
_INGRESS: Final = 0xFFFFFFF1  # linux/pkt_sched.h: the parent of the qdisc, whose handle is ffff:
_INGRESS_HANDLE: Final = 0xFFFF0000

_ATTRIBUTE: Final = struct.Struct("=HH")
_NESTED: Final = 0x3FFF  # the bits of an attribute's kind that are not flags
_KIND, _OPTIONS = 1, 2  # TCA_KIND, TCA_OPTIONS
_U32_SELECTOR, _U32_ACTION = 5, 7
_ACTION_KIND, _ACTION_OPTIONS = 1, 2
_MIRRED_PARAMETERS: Final = 2
_SELECTOR: Final = struct.Struct("=BBBxHHhhI")  # tc_u32_sel
_MIRRED: Final = struct.Struct("=IIiiiiI")  # tc_mirred
_TERMINAL: Final = 1
_STOLEN: Final = 4
_EGRESS_REDIRECT: Final = 1
#: The words that end with the first two and with the last four bytes of the destination address.
_OFFSETS: Final = (-16, -12)


@dataclass(frozen=True, slots=True, kw_only=True)
class Redirect:
    """Frames for ``mac`` that an interface receives go out of interface ``to`` (an index).

    The first byte of the address counts only when ``exact``. rank: lower ones are asked first, 1 to 65535.
    """

    mac: str
    to: int
    rank: int
    exact: bool = True


def redirects(links: Links, interface: int) -> dict[Redirect, int]:
    """The redirects on an interface, each with the kernel's handle; other people's filters are left out."""
    found: dict[Redirect, int] = {}
    for kind, body in links.ask(_GET_FILTER, _DUMP, _head(interface, parent=_INGRESS_HANDLE)):
        if kind == _NEW_FILTER:
            _, _, handle, _, info = _TCMSG.unpack_from(body)
            rule = _read(body[_TCMSG.size :], rank=info >> 16)
            if rule is not None:
                found[rule] = handle
    return found


def add(links: Links, interface: int, rule: Redirect) -> None:
    """Put a redirect on an interface; one that is there is left alone. Errors: OSError."""
    if rule in redirects(links, interface):
        return
    try:
        qdisc = _head(interface, parent=_INGRESS, handle=_INGRESS_HANDLE) + _attribute(_KIND, b"ingress\0")
        links.ask(_NEW_QDISC, _CREATE | _EXCLUSIVE, qdisc)
    except OSError as error:
        if error.errno != errno.EEXIST:
            raise
    links.ask(_NEW_FILTER, _CREATE | _EXCLUSIVE, _head(interface, rank=rule.rank) + _write(rule))


def remove(links: Links, interface: int, rule: Redirect) -> bool:
    """Take a redirect off an interface; False when it was not there. Errors: OSError."""
    handle = redirects(links, interface).get(rule)
    if handle is None:
        return False
    head = _head(interface, rank=rule.rank, handle=handle)
    links.ask(_DELETE_FILTER, 0, head + _attribute(_KIND, b"u32\0"))
    return True


# --- the messages: pure ---------------------------------------------------------------------


def _head(interface: int, *, parent: int = _INGRESS_HANDLE, handle: int = 0, rank: int = 0) -> bytes:
    info = rank << 16 | socket.htons(ETH_P_ALL) if rank else 0
    return _TCMSG.pack(socket.AF_UNSPEC, interface, handle, parent, info)


def _attribute(kind: int, payload: bytes) -> bytes:
    padding = -len(payload) % 4
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(payload), kind) + payload + b"\0" * padding


def _write(rule: Redirect) -> bytes:
    mac = parse_mac(rule.mac)
    masks = (b"\0\0\xff\xff" if rule.exact else b"\0\0\0\xff", b"\xff\xff\xff\xff")
    words = (b"\0\0" + mac[:2], mac[2:])
    selector = _SELECTOR.pack(_TERMINAL, 0, len(words), 0, 0, 0, 0, 0)
    for mask, word, offset in zip(masks, words, _OFFSETS, strict=True):
        value = bytes(a & b for a, b in zip(mask, word, strict=True))
        selector += mask + value + struct.pack("=ii", offset, 0)
    mirred = _MIRRED.pack(0, 0, _STOLEN, 0, 0, _EGRESS_REDIRECT, rule.to)
    action = _attribute(_ACTION_KIND, b"mirred\0") + _attribute(
        _ACTION_OPTIONS, _attribute(_MIRRED_PARAMETERS, mirred)
    )
    options = _attribute(_U32_SELECTOR, selector) + _attribute(_U32_ACTION, _attribute(1, action))
    return _attribute(_KIND, b"u32\0") + _attribute(_OPTIONS, options)


def _attributes(data: bytes) -> dict[int, bytes]:
    return dict(_each(data))


def _each(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if length < _ATTRIBUTE.size:
            return
        yield kind & _NESTED, data[at + _ATTRIBUTE.size : at + length]
        at += (length + 3) & ~3


def _read(data: bytes, *, rank: int) -> Redirect | None:
    """A filter's attributes as the redirect it is; None when it is something else."""
    filter_ = _attributes(data)
    options = _attributes(filter_.get(_OPTIONS, b""))
    selector = options.get(_U32_SELECTOR, b"")
    actions = _attributes(options.get(_U32_ACTION, b""))
    action = _attributes(actions.get(1, b""))
    mirred = _attributes(action.get(_ACTION_OPTIONS, b"")).get(_MIRRED_PARAMETERS, b"")
    size = _SELECTOR.size + 2 * 16
    if filter_.get(_KIND) != b"u32\0" or len(selector) < size or len(mirred) < _MIRRED.size:
        return None
    high, low = selector[_SELECTOR.size :][:16], selector[_SELECTOR.size + 16 :][:16]
    if (struct.unpack("=i", high[8:12])[0], struct.unpack("=i", low[8:12])[0]) != _OFFSETS:
        return None
    *_, how, to = _MIRRED.unpack_from(mirred)
    if how != _EGRESS_REDIRECT:
        return None
    return Redirect(mac=(high[6:8] + low[4:8]).hex(":"), to=to, rank=rank, exact=high[2] == 0xFF)
