"""Which addresses each site's nodes get: ranges that are free there and disjoint over all sites. Pure.

Source: Nakada et al. 2009, section 3.2.1: the sites advertise, the coordinator chooses and sees to it that
no two overlap, the site refuses when somebody was quicker.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Final

from virtgrid.core.errors import RefusedError
from virtgrid.grid.messages.coalloc import Nodes, Path, Paths, Reserve, range_for

_SHORTEST: Final = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """ranges: of each site. without: of the sites that got none, why."""

    ranges: Mapping[str, str]
    without: Mapping[str, str]


def place(wish: Reserve, free: Mapping[str, Sequence[str]]) -> Placed:
    """The first range of each site that overlaps none chosen before. free: what the sites offer, by site."""
    ranges = {one.site: one.addresses for one in wish.sites if one.addresses is not None}
    without: dict[str, str] = {}
    taken = [ipaddress.IPv4Network(range_) for range_ in ranges.values()]
    for one in wish.sites:
        if one.site in ranges or one.site not in free:
            continue
        for candidate in map(ipaddress.IPv4Network, free[one.site]):
            if not any(candidate.overlaps(other) for other in taken):
                ranges[one.site] = str(candidate)
                taken.append(candidate)
                break
        else:
            what = f"/{range_for(one.nodes)}"
            overlapping = " that no other site uses" if free[one.site] else ""
            without[one.site] = f"it has no free range of {what}{overlapping} in this window"
    return Placed(ranges=ranges, without=without)


def nodes_of(wish: Reserve, ranges: Mapping[str, str]) -> dict[str, Nodes]:
    """What each site is asked for."""
    return {
        one.site: Nodes(nodes=one.nodes, addresses=ranges[one.site])
        for one in wish.sites
        if one.site in ranges
    }


def paths_of(wish: Reserve) -> Paths:
    """What the network manager is asked for: one segment, and bandwidth between each two sites."""
    sites = sorted(one.site for one in wish.sites)
    rate = wish.bandwidth_bytes_s
    between = combinations(sites, 2) if rate is not None else ()
    return Paths(
        sites=tuple(sites),
        paths=tuple(Path(between=pair, rate_bytes_s=rate) for pair in between if rate is not None),
        segment=wish.segment,
    )


def common_prefix(ranges: list[str]) -> int:
    """Of the smallest network all ranges lie in: what every sandbox takes for its own. Pure.

    Errors: RefusedError when they have too little in common.
    """
    networks = [ipaddress.IPv4Network(one) for one in ranges]
    common = networks[0]
    while not all(one.subnet_of(common) for one in networks):
        if common.prefixlen <= _SHORTEST:
            raise RefusedError(f"{', '.join(ranges)} lie in no common network of /{_SHORTEST} or longer")
        common = common.supernet()
    return common.prefixlen


def spread(id_: str) -> int:
    """Where a reservation begins to look for addresses: elsewhere than the one beside it."""
    return int.from_bytes(hashlib.sha256(id_.encode()).digest()[:4])
