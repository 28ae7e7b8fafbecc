"""Leading what an interface receives past its bridge: frames for one hardware address go out elsewhere.

A u32 filter on the interface's ingress with a mirred action, put together here: the address lies before
the network header, at negative offsets, which pyroute2's u32 cannot say.
"""

from __future__ import annotations

import errno
import struct
from dataclasses import dataclass
from typing import Final

from virtgrid.net import tcmsg
from virtgrid.net.addresses import parse_mac
from virtgrid.net.link import Links
from virtgrid.net.packets import ETH_P_ALL
from virtgrid.net.tcmsg import KIND, OPTIONS, SELECTOR, TCMSG, TERMINAL, attribute, attributes

_INGRESS: Final = 0xFFFFFFF1  # linux/pkt_sched.h: the parent of the qdisc, whose handle is ffff:
_INGRESS_HANDLE: Final = 0xFFFF0000

_U32_SELECTOR, _U32_ACTION = 5, 7
_ACTION_KIND, _ACTION_OPTIONS = 1, 2
_MIRRED_PARAMETERS: Final = 2
_MIRRED: Final = struct.Struct("=IIiiiiI")  # tc_mirred
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
    for kind, body in links.ask(tcmsg.GET_FILTER, tcmsg.DUMP, _head(interface, parent=_INGRESS_HANDLE)):
        if kind == tcmsg.NEW_FILTER:
            _, _, handle, _, info = TCMSG.unpack_from(body)
            rule = _read(body[TCMSG.size :], rank=info >> 16)
            if rule is not None:
                found[rule] = handle
    return found


def add(links: Links, interface: int, rule: Redirect) -> None:
    """Put a redirect on an interface; one that is there is left alone. Errors: OSError."""
    if rule in redirects(links, interface):
        return
    try:
        qdisc = _head(interface, parent=_INGRESS, handle=_INGRESS_HANDLE) + attribute(KIND, b"ingress\0")
        links.ask(tcmsg.NEW_QDISC, tcmsg.CREATE | tcmsg.EXCLUSIVE, qdisc)
    except OSError as error:
        if error.errno != errno.EEXIST:
            raise
    links.ask(
        tcmsg.NEW_FILTER, tcmsg.CREATE | tcmsg.EXCLUSIVE, _head(interface, rank=rule.rank) + _write(rule)
    )


def remove(links: Links, interface: int, rule: Redirect) -> bool:
    """Take a redirect off an interface; False when it was not there. Errors: OSError."""
    handle = redirects(links, interface).get(rule)
    if handle is None:
        return False
    head = _head(interface, rank=rule.rank, handle=handle)
    links.ask(tcmsg.DELETE_FILTER, 0, head + attribute(KIND, b"u32\0"))
    return True


# --- the messages: pure ---------------------------------------------------------------------


def _head(interface: int, *, parent: int = _INGRESS_HANDLE, handle: int = 0, rank: int = 0) -> bytes:
    return tcmsg.head(interface, parent=parent, handle=handle, rank=rank, protocol=ETH_P_ALL)


def _write(rule: Redirect) -> bytes:
    mac = parse_mac(rule.mac)
    masks = (b"\0\0\xff\xff" if rule.exact else b"\0\0\0\xff", b"\xff\xff\xff\xff")
    words = (b"\0\0" + mac[:2], mac[2:])
    selector = SELECTOR.pack(TERMINAL, 0, len(words), 0, 0, 0, 0, 0)
    for mask, word, offset in zip(masks, words, _OFFSETS, strict=True):
        value = bytes(a & b for a, b in zip(mask, word, strict=True))
        selector += mask + value + struct.pack("=ii", offset, 0)
    mirred = _MIRRED.pack(0, 0, _STOLEN, 0, 0, _EGRESS_REDIRECT, rule.to)
    action = attribute(_ACTION_KIND, b"mirred\0") + attribute(
        _ACTION_OPTIONS, attribute(_MIRRED_PARAMETERS, mirred)
    )
    options = attribute(_U32_SELECTOR, selector) + attribute(_U32_ACTION, attribute(1, action))
    return attribute(KIND, b"u32\0") + attribute(OPTIONS, options)


def _read(data: bytes, *, rank: int) -> Redirect | None:
    """A filter's attributes as the redirect it is; None when it is something else."""
    filter_ = attributes(data)
    options = attributes(filter_.get(OPTIONS, b""))
    selector = options.get(_U32_SELECTOR, b"")
    actions = attributes(options.get(_U32_ACTION, b""))
    action = attributes(actions.get(1, b""))
    mirred = attributes(action.get(_ACTION_OPTIONS, b"")).get(_MIRRED_PARAMETERS, b"")
    size = SELECTOR.size + 2 * 16
    if filter_.get(KIND) != b"u32\0" or len(selector) < size or len(mirred) < _MIRRED.size:
        return None
    high, low = selector[SELECTOR.size :][:16], selector[SELECTOR.size + 16 :][:16]
    if (struct.unpack("=i", high[8:12])[0], struct.unpack("=i", low[8:12])[0]) != _OFFSETS:
        return None
    *_, how, to = _MIRRED.unpack_from(mirred)
    if how != _EGRESS_REDIRECT:
        return None
    return Redirect(mac=(high[6:8] + low[4:8]).hex(":"), to=to, rank=rank, exact=high[2] == 0xFF)
