"""What a site has to give: nodes, and ranges of the addresses it advertises.

The nodes are the backend's (``backend``); which hold has them when is written down here whatever the
backend is, so two holds can never have one node. Addresses are the site's own affair: its ranges, cut into
granules.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from typing import Final

from sqlalchemy import Connection

from virtgrid.core.errors import RefusedError
from virtgrid.grid.coalloc.windows import Times, beginnings, common
from virtgrid.grid.messages.coalloc import LONGEST_PREFIX, AskOffer, Grant, Hold, Nodes, Offer, Span, Wanted
from virtgrid.grid.store import units
from virtgrid.grid.store.promises import UnavailableError

RANGES_LIMIT: Final = 64
_OFFERED: Final = 16
_LOOKED_AT: Final = 512
"""Ranges looked at for an offer: enough to find some that are free, not so many that asking is work."""


class SiteStock:
    """nodes: those there are, in the order they are given out. ranges: what is advertised, as networks.

    Errors: RefusedError for ranges that overlap or are no private networks of /8 to /30.
    """

    def __init__(self, *, nodes: Sequence[str], ranges: Sequence[str]) -> None:
        self._nodes = tuple(nodes)
        if len(set(self._nodes)) != len(self._nodes):
            raise RefusedError("a node stands there twice")
        self.ranges = tuple(_networks(ranges))

    def prepare(self, connection: Connection) -> None:
        """Nodes and ranges are known by their names; there is nothing to write down."""

    def check(self, wanted: Wanted) -> None:
        if not isinstance(wanted, Nodes):
            raise RefusedError("a site has nodes and addresses, and no paths")
        if wanted.nodes > len(self._nodes):
            raise RefusedError(f"{_asked(wanted.nodes)}, and there are {len(self._nodes)}")
        asked = ipaddress.IPv4Network(wanted.addresses)
        if not any(asked.subnet_of(network) for network in self.ranges):
            advertised = ", ".join(str(network) for network in self.ranges)
            raise RefusedError(
                f"{asked} is not among the advertised ranges", hint=f"advertised: {advertised}"
            )

    def take(self, connection: Connection, asked: Hold) -> Grant:
        wanted, window = asked.wanted, asked.window
        assert isinstance(wanted, Nodes)
        nodes = units.free(connection, units.NODE, self._nodes, window, want=wanted.nodes)
        if len(nodes) < wanted.nodes:
            raise UnavailableError(
                f"{_asked(wanted.nodes)}, and {len(nodes)} {'is' if len(nodes) == 1 else 'are'} free"
            )
        granules = units.granules(wanted.addresses)
        if len(units.free(connection, units.RANGE, granules, window)) < len(granules):
            raise UnavailableError(f"addresses {wanted.addresses} are taken")
        units.take(connection, asked.key, units.NODE, nodes, window)
        units.take(connection, asked.key, units.RANGE, granules, window)
        return Grant(nodes=tuple(nodes), addresses=wanted.addresses)

    def begins(
        self, connection: Connection, wanted: Wanted, lasts_s: int, near_s: int, within: Times
    ) -> list[Span]:
        assert isinstance(wanted, Nodes)
        nodes = units.timetable(connection, units.NODE, self._nodes, near_s, within)
        granules = units.granules(wanted.addresses)
        addresses = units.timetable(connection, units.RANGE, granules, near_s, within)
        return common(
            beginnings(nodes, need=wanted.nodes, lasts_s=lasts_s),
            beginnings(addresses, need=len(granules), lasts_s=lasts_s),
        )

    def offer(self, connection: Connection, asked: AskOffer) -> Offer:
        """What is there, and some ranges that are free, from a place on that ``spread`` chooses."""
        free = units.free(connection, units.NODE, self._nodes, asked.window)
        return Offer(
            nodes=len(self._nodes),
            nodes_free=len(free),
            advertised=tuple(str(network) for network in self.ranges),
            free=tuple(self._free_ranges(connection, asked)),
        )

    def _free_ranges(self, connection: Connection, asked: AskOffer) -> list[str]:
        size = 1 << (32 - asked.prefix)
        fitting = [network for network in self.ranges if network.prefixlen <= asked.prefix]
        total = sum(network.num_addresses // size for network in fitting)
        found: list[str] = []
        for step in range(min(total, _LOOKED_AT)):
            at = (asked.spread + step) % total
            for network in fitting:
                here = network.num_addresses // size
                if at < here:
                    break
                at -= here
            candidate = f"{network.network_address + at * size}/{asked.prefix}"
            granules = units.granules(candidate)
            if len(units.free(connection, units.RANGE, granules, asked.window)) == len(granules):
                found.append(candidate)
                if len(found) == _OFFERED:
                    break
        return found


def _networks(ranges: Sequence[str]) -> list[ipaddress.IPv4Network]:
    if not 1 <= len(ranges) <= RANGES_LIMIT:
        raise RefusedError(f"a site advertises 1 to {RANGES_LIMIT} ranges of addresses, not {len(ranges)}")
    found: list[ipaddress.IPv4Network] = []
    for text in ranges:
        try:
            network = ipaddress.IPv4Network(text)
        except ValueError as error:
            raise RefusedError(f"'{text[:40]}' is no range of addresses", cause=str(error)) from None
        if not 8 <= network.prefixlen <= LONGEST_PREFIX or not network.is_private or network.is_loopback:
            raise RefusedError(f"{network} cannot be advertised", hint="a private network between /8 and /30")
        for other in found:
            if network.overlaps(other):
                raise RefusedError(f"the advertised ranges {other} and {network} overlap")
        found.append(network)
    return found


def _asked(nodes: int) -> str:
    return f"{nodes} nodes were asked for" if nodes > 1 else "1 node was asked for"
