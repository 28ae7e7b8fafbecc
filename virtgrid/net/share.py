"""A link between a migration and everybody else, by HTB on the interface towards the destination.

One class for the link, and below it two: the service, which is all that goes that way and is not the
migration's, and the migration. Its packets are known by their priority, which is set on its sockets
(``virtgrid.net.streams``) and names the class: no ports, no addresses. Before the release the migration has
its part and never more, and what the service wants comes first. At the release that is turned about: the
migration has all the service leaves of its own part, and first, because a guest stands still.

What the interface itself reaches, when the destination lies behind a router, passes by: that is not the link.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
from dataclasses import dataclass
from typing import Final

from virtgrid.core.errors import NotFoundError
from virtgrid.net import htb
from virtgrid.net.guarantee import AddFilter, Change, Class, Fell, Plant, SetClass, match_network
from virtgrid.net.link import Links

ROOT: Final = 0x56530000  # "VS"
"""The handle by which such a tree is known."""
LINK, SERVICE, MIGRATION = 0x100, 0x101, 0x102
PRIORITY: Final = ROOT | MIGRATION
"""Of the migration's packets: HTB takes a priority that names a class for what it says (tc-htb(8))."""
#: Of a full packet of 1,500 bytes on Ethernet, with its frame and gap, 1,448 are payload.
_PAYLOAD: Final = (1448, 1538)


@dataclass(frozen=True, slots=True, kw_only=True)
class Uplink:
    """Where the tree goes. beside: networks the interface reaches itself, which are not the link's."""

    interface: str
    beside: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharing:
    """link_bytes_s: what the link carries, on the wire. service: the part of it that is the service's."""

    link_bytes_s: float
    service: float

    @property
    def service_bytes_s(self) -> int:
        return max(1, round(self.link_bytes_s * self.service))

    @property
    def migration_bytes_s(self) -> int:
        return max(1, round(self.link_bytes_s) - self.service_bytes_s)


def payload(wire_bytes_s: float) -> int:
    """What of a rate on the wire a bulk TCP connection carries."""
    return round(wire_bytes_s * _PAYLOAD[0] / _PAYLOAD[1])


def shared(sharing: Sharing, beside: tuple[str, ...] = ()) -> tuple[Change, ...]:
    """The steps to the tree before the release. Pure."""
    link = round(sharing.link_bytes_s)
    return (
        Plant(SERVICE),
        SetClass(LINK, Class(parent=0, rate_bytes_s=link, ceil_bytes_s=link, smooth=True)),
        SetClass(
            SERVICE, Class(parent=LINK, rate_bytes_s=sharing.service_bytes_s, ceil_bytes_s=link, prio=0)
        ),
        SetClass(MIGRATION, _migration(sharing, sharing.migration_bytes_s, prio=1)),
        *(AddFilter(match_network(network), 0) for network in beside),
    )


def raised(sharing: Sharing) -> tuple[Change, ...]:
    """The steps at the release: the migration has what is left, first. Pure."""
    link = round(sharing.link_bytes_s)
    service = Class(parent=LINK, rate_bytes_s=sharing.service_bytes_s, ceil_bytes_s=link, prio=1)
    return SetClass(MIGRATION, _migration(sharing, link, prio=0)), SetClass(SERVICE, service)


def _migration(sharing: Sharing, most_bytes_s: int, *, prio: int) -> Class:
    return Class(
        parent=LINK,
        rate_bytes_s=sharing.migration_bytes_s,
        ceil_bytes_s=most_bytes_s,
        prio=prio,
        smooth=True,
    )


# -- the kernel ----------------------------------------------------------------------------------


def find(links: Links, to: str) -> Uplink:
    """The interface towards an address. Errors: NotFoundError, OSError."""
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        route = links.call("route", "get", dst=to)[0]
    except NetlinkError as error:
        raise NotFoundError(f"there is no route to {to}", cause=str(error)) from error
    index = route.get_attr("RTA_OIF")
    name = next((link.name for link in links.all() if link.index == index), None)
    if name is None or name == "lo":
        raise NotFoundError(f"{to} is no other host")
    if route.get_attr("RTA_GATEWAY") is None and route.get_attr("RTA_VIA") is None:
        return Uplink(interface=name)
    networks = {
        str(ipaddress.ip_interface(f"{one.get_attr('IFA_ADDRESS')}/{one['prefixlen']}").network)
        for one in links.call("get_addr", index=index)
    }
    return Uplink(interface=name, beside=tuple(sorted(networks)))


def obstacle(links: Links, interface: str) -> tuple[str, str] | None:
    """Why there can be no tree on this interface -> (a sentence, a hint); None when there can be."""
    root = htb.roots(links).get(links.require(interface))
    if root is None:
        return None
    if root == ROOT:
        return (
            f"{interface} is shared with another migration already",
            "one that was killed left it: virtgrid migration recover",
        )
    if root == htb.ROOT:
        return f"{interface} has bandwidth guaranteed to reservations", "that tree is left as it is"
    return (
        f"{interface} has a queueing discipline that virtgrid did not make",
        f"it is left as it is: tc qdisc show dev {interface}",
    )


def share(links: Links, uplink: Uplink, sharing: Sharing) -> None:
    """Make the tree; all of it or nothing. Never in another's place. Errors: OSError, NotFoundError."""
    index = links.require(uplink.interface)
    first, *rest = shared(sharing, uplink.beside)
    htb.apply(links, index, [first], root=ROOT)
    try:
        htb.apply(links, index, rest, root=ROOT)
    except BaseException:
        with contextlib.suppress(OSError):
            htb.apply(links, index, [Fell()], root=ROOT)
        raise


def raise_migration(links: Links, interface: str, sharing: Sharing) -> None:
    """Errors: OSError, NotFoundError."""
    htb.apply(links, links.require(interface), raised(sharing), root=ROOT)


def remove(links: Links, interface: str) -> bool:
    """Take such a tree away; the interface is as it was. False when there is none. Errors: OSError."""
    index = links.index(interface)
    if index is None or htb.roots(links).get(index) != ROOT:
        return False
    try:
        htb.apply(links, index, [Fell()], root=ROOT)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.EINVAL):
            raise
        return False
    return True
