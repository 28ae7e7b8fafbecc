"""Where a Linux bridge sends the frames for one hardware address."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import Final

from virtgrid.net.link import Links

# linux/neighbour.h: states and flags of a bridge's entries
_REACHABLE: Final = 0x02
_NOARP: Final = 0x40
_TO_MASTER: Final = 0x04
_STICKY: Final = 0x40


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A bridge's entry for an address; port is an interface's index.

    static: it does not age. sticky: a frame *from* the address at another port does not move it there.
    """

    port: int
    static: bool = False
    sticky: bool = False


def entry(links: Links, mac: str, bridge: int) -> Entry | None:
    """The entry for an address; None when there is none: then frames for it go to every port."""
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        found = links.call("fdb", "get", lladdr=mac, master=bridge)
    except NetlinkError as error:
        if error.code == errno.ENOENT:
            return None
        raise
    message = found[0]
    return Entry(
        port=int(message["ifindex"]),
        static=bool(message["state"] & _NOARP),
        sticky=bool(message["flags"] & _STICKY),
    )


def set_entry(links: Links, mac: str, to: Entry) -> None:
    """Make this the entry for an address, in place of whatever there is, on the bridge of that port."""
    links.call(
        "fdb",
        "replace",
        ifindex=to.port,
        lladdr=mac,
        state=_NOARP if to.static else _REACHABLE,
        flags=_TO_MASTER | (_STICKY if to.sticky else 0),
    )
