"""From what network managers said to what should be on this host at a moment. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from virtgrid.grid.messages.network import Ordered, Orders, Reach, bridge_of
from virtgrid.net.guarantee import Flow, Share
from virtgrid.net.reserved import Reserved

Way = tuple[str, str]
"""A network manager, and the other site of one of its links."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """segments: at most one of each number. ways: the links as far as this host has a part in them, with
    what is guaranteed now; each is reached by way of one of the other site's hosts. problems: by id.
    """

    segments: tuple[Reserved, ...]
    ways: Mapping[Way, Share]
    via: Mapping[Way, str]
    problems: Mapping[str, str]


def wanted(said: Iterable[Orders], now_s: float, *, bridge: str) -> Wanted:
    """What should be there at ``now_s`` (seconds since the epoch). bridge: the pattern of names.

    A segment is there as soon as it is ordered, if nobody else has its number, and until its window ends; its
    guarantee begins with the window. Of two with one number it is whose window is open, else who comes first.
    """
    orders = sorted(said, key=lambda one: one.network)
    if "{tag}" not in bridge:
        why = f"there is one bridge for all networks here, {bridge} (virtgrid serve host --bridge)"
        refused = {one.id: why for order in orders for one in order.segments}
        return Wanted(segments=(), ways={}, via={}, problems=refused)
    claims: dict[int, list[tuple[Ordered, Orders]]] = {}
    for order in orders:
        for one in order.segments:
            if now_s < one.ends_at_s:
                claims.setdefault(one.segment, []).append((one, order))
    chosen: list[tuple[Ordered, Orders]] = []
    problems: dict[str, str] = {}
    for segment, rivals in claims.items():
        rivals.sort(key=lambda rival: (rival[0].begins_at_s, rival[1].network))
        chosen.append(rivals[0])
        for late, _ in rivals[1:]:
            if late.begins_at_s <= now_s:
                problems[late.id] = f"segment {segment} is another reservation's, says {rivals[0][1].network}"
    flows: dict[Way, list[Flow]] = {}
    for one, order in chosen:
        for site, rate in sorted(one.rates.items()) if one.begins_at_s <= now_s else ():
            flow = Flow(vni=one.segment, peers=order.hosts[site], rate_bytes_s=rate)
            flows.setdefault((order.network, site), []).append(flow)
    return Wanted(
        segments=tuple(_reserved(one, order, bridge) for one, order in chosen),
        ways={
            (order.network, site): _share(reach, flows.get((order.network, site), []))
            for order in orders
            for site, reach in sorted(order.reach.items())
        },
        via={(order.network, site): order.hosts[site][0] for order in orders for site in order.reach},
        problems=problems,
    )


def next_change_s(said: Iterable[Orders], now_s: float) -> float | None:
    """When what should be there changes by itself; None: never."""
    times = [at_s for order in said for one in order.segments for at_s in (one.begins_at_s, one.ends_at_s)]
    return min((at_s for at_s in times if at_s > now_s), default=None)


def _reserved(one: Ordered, order: Orders, bridge: str) -> Reserved:
    hosts = {address for site in one.sites for address in order.hosts[site]}
    return Reserved(
        id=one.id,
        name=one.reservation,
        vni=one.segment,
        bridge=bridge_of(one.segment, bridge),
        local=order.address,
        peers=frozenset(hosts - {order.address}),
        mtu=one.mtu,
    )


def _share(reach: Reach, flows: Iterable[Flow]) -> Share:
    return Share(rate_bytes_s=reach.rate_bytes_s, networks=reach.networks, flows=tuple(flows))
