"""What a site has to give: nodes, and ranges of the addresses it advertises.

The nodes are the backend's (``backend``); which hold has them when is written down here whatever the
backend is, so two holds can never have one node. Addresses are the site's own affair: its ranges, cut into
granules.
"""

from __future__ import annotations

import copy
import ipaddress
from collections.abc import Mapping, Sequence
from typing import Final

from sqlalchemy import Connection

from virtgrid.core.errors import RefusedError
from virtgrid.grid.coalloc.windows import Times, beginnings, common, without
from virtgrid.grid.crm.backend import Node, Taken
from virtgrid.grid.messages.coalloc import (
    LONGEST_PREFIX,
    AskOffer,
    Grant,
    Hold,
    Nodes,
    Offer,
    Span,
    Wanted,
    Window,
)
from virtgrid.grid.store import units
from virtgrid.grid.store.promises import UnavailableError

RANGES_LIMIT: Final = 64
_OFFERED: Final = 16
_REASONS: Final = 4
"""Of nodes that cannot be had, told in a refusal."""
_LOOKED_AT: Final = 512
"""Ranges looked at for an offer: enough to find some that are free, not so many that asking is work."""


class SiteStock:
    """nodes: those there are, in the order they are given out. ranges: what is advertised, as networks.
    guard_s: so long after a window nobody else gets what was promised for it.

    Errors: RefusedError for ranges that overlap or are no private networks of /8 to /30.
    """

    def __init__(self, *, nodes: Sequence[str], ranges: Sequence[str], guard_s: int = 0) -> None:
        self._nodes, self._guard_s = tuple(nodes), guard_s
        self._unfit: Mapping[str, str] = {}
        self._taken: Mapping[str, Sequence[Taken]] = {}
        if len(set(self._nodes)) != len(self._nodes):
            raise RefusedError("a node stands there twice")
        self.ranges = tuple(_networks(ranges))

    def seen(self, nodes: Sequence[Node]) -> SiteStock:
        """The same stock, with its nodes as they are now: what is unfit or somebody else's is not given."""
        seen = copy.copy(self)
        seen._unfit = {node.name: node.problem for node in nodes if node.problem is not None}
        seen._taken = {node.name: node.taken for node in nodes if node.taken}
        return seen

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
        wanted, window = asked.wanted, self._guarded(asked.window)
        assert isinstance(wanted, Nodes)
        nodes = units.free(connection, units.NODE, self._willing(window), window, want=wanted.nodes)
        if len(nodes) < wanted.nodes:
            raise UnavailableError(
                f"{_asked(wanted.nodes)}, and {len(nodes)} {'is' if len(nodes) == 1 else 'are'} free"
                f"{self._reasons(window)}"
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
        fit = [name for name in self._nodes if name not in self._unfit]
        lasts_s += self._guard_s
        nodes = [
            without(free, ((one.begins_at_s, one.ends_at_s) for one in self._taken.get(name, ())))
            for name, free in zip(
                fit, units.timetable(connection, units.NODE, fit, near_s, within), strict=True
            )
        ]
        granules = units.granules(wanted.addresses)
        addresses = units.timetable(connection, units.RANGE, granules, near_s, within)
        return common(
            beginnings(nodes, need=wanted.nodes, lasts_s=lasts_s),
            beginnings(addresses, need=len(granules), lasts_s=lasts_s),
        )

    def offer(self, connection: Connection, asked: AskOffer) -> Offer:
        """What is there, and some ranges that are free, from a place on that ``spread`` chooses."""
        window = self._guarded(asked.window)
        free = units.free(connection, units.NODE, self._willing(window), window)
        return Offer(
            nodes=len(self._nodes),
            nodes_free=len(free),
            advertised=tuple(str(network) for network in self.ranges),
            free=tuple(self._free_ranges(connection, asked)),
        )

    def _guarded(self, window: Window) -> Window:
        """Until when what is promised for a window is nobody else's."""
        return Window.model_construct(
            begins_at_s=window.begins_at_s, ends_at_s=window.ends_at_s + self._guard_s
        )

    def _willing(self, window: Window) -> list[str]:
        return [name for name in self._nodes if self._why_not(name, window) is None]

    def _why_not(self, name: str, window: Window) -> str | None:
        """What keeps a node from being promised, besides other promises."""
        if name in self._unfit:
            return self._unfit[name]
        for one in self._taken.get(name, ()):
            if one.begins_at_s < window.ends_at_s and window.begins_at_s < one.ends_at_s:
                return one.why
        return None

    def _reasons(self, window: Window) -> str:
        reasons = {name: self._why_not(name, window) for name in self._nodes}
        told = [f"{name} {why}" for name, why in reasons.items() if why is not None]
        more = ["…"] if len(told) > _REASONS else []
        return f" ({'; '.join(told[:_REASONS] + more)})" if told else ""

    def _free_ranges(self, connection: Connection, asked: AskOffer) -> list[str]:
        window = self._guarded(asked.window)
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
            if len(units.free(connection, units.RANGE, granules, window)) == len(granules):
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
