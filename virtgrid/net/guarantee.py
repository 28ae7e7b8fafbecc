"""Bandwidth that segments are guaranteed on an uplink, by HTB: the tree there should be, and the steps to it.

Pure; ``virtgrid.net.htb`` does it. One tree per interface. Each link (the way to one other site) has a class
with all it can carry, and below it one leaf for each guaranteed segment and one for everything else that
goes to that site. What goes elsewhere passes by the tree.

* Leaves below a link never add up to more than the link, so each has its rate whatever the others do (but
  for the hundredth that everything else keeps in any case, so that nobody is cut off).
* What is left over goes to everything else first, to the segments after that: somebody with a guarantee has
  it, and more only while nobody wants more.
* The tree of links is made anew when links change; segments come and go one by one, and no step lets the
  leaves promise more than the link has.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from virtgrid.net.link import VXLAN_PORT

LINKS_LIMIT: Final = 254
FLOWS_LIMIT: Final = 253
"""Guaranteed segments of one link."""
_OTHERS_PART: Final = 100
_FLOW_RANK, _NETWORK_RANK = 10, 20
_OTHERS, _FIRST = 1, 2
_UDP: Final = 17


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """A filter's test: words of the IP packet, each (mask, value, offset). rank: lower ones are asked first.

    version: of IP, 4 or 6.
    """

    rank: int
    version: int
    keys: tuple[tuple[int, int, int], ...]

    @property
    def order(self) -> int:
        """The rank as the kernel has it: no two protocols share one."""
        return self.rank + (self.version == 6)


@dataclass(frozen=True, slots=True, kw_only=True)
class Flow:
    """A segment's packets to the hosts of another site. peers: their tunnel addresses."""

    vni: int
    peers: tuple[str, ...]
    rate_bytes_s: int

    @property
    def matches(self) -> frozenset[Match]:
        return frozenset(_flow(self.vni, peer) for peer in self.peers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """A host's share of a link: what may go to the other site, all in bytes per second on the wire.

    networks: of the other site, everything that uses the link.
    """

    rate_bytes_s: int
    networks: tuple[str, ...]
    flows: tuple[Flow, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Class:
    """A class of the tree. parent: its minor number, 0 is the root. prio: higher ones get leftovers later.

    smooth: next to nothing is caught up at once, so it does not wait in front of the link; not read back.
    """

    parent: int
    rate_bytes_s: int
    ceil_bytes_s: int
    prio: int = 0
    smooth: bool = field(default=False, compare=False)

    @property
    def leaf(self) -> bool:
        return self.parent != 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Tree:
    """A tree of ours on an interface: classes by minor number, and which filter leads to which of them."""

    classes: Mapping[int, Class] = field(default_factory=dict)
    filters: Mapping[Match, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Plant:
    """Begin an empty tree. others: the class of what no filter knows; 0: it passes by."""

    others: int = 0


@dataclass(frozen=True, slots=True)
class Fell:
    """Take the whole tree away: the interface is as it was."""


@dataclass(frozen=True, slots=True)
class SetClass:
    """Make a class, or change its rates."""

    minor: int
    to: Class


@dataclass(frozen=True, slots=True)
class DropClass:
    minor: int


@dataclass(frozen=True, slots=True)
class AddFilter:
    match: Match
    minor: int


@dataclass(frozen=True, slots=True)
class DropFilter:
    match: Match


Change = Plant | Fell | SetClass | DropClass | AddFilter | DropFilter


def plan(shares: Sequence[Share], present: Tree | None) -> tuple[Change, ...]:
    """The steps from what is there (None: no tree of ours) to what should be. No shares: no tree.

    A share's place in the sequence is its number in the tree. At most ``LINKS_LIMIT`` of them with
    ``FLOWS_LIMIT`` flows each; what is beyond is left out.
    """
    if not shares:
        return () if present is None else (Fell(),)
    shares = shares[:LINKS_LIMIT]
    steps: list[Change] = []
    base = _base(shares)
    if present is None or not _stands(base, present):
        steps += [] if present is None else [Fell()]
        steps.append(Plant())
        steps += [SetClass(minor, base.classes[minor]) for minor in sorted(base.classes)]
        steps += [AddFilter(match, minor) for match, minor in base.filters.items()]
        present = base
    for number, share in enumerate(shares, start=1):
        steps += _flows(number << 8, share, present)
    return tuple(steps)


def guaranteed(tree: Tree) -> dict[int, int]:
    """What each number's packets are guaranteed in a tree, in bytes per second on the wire."""
    leaves = {(_number(match), minor) for match, minor in tree.filters.items() if match.rank == _FLOW_RANK}
    found: dict[int, int] = {}
    for vni, minor in leaves:
        if minor in tree.classes:
            found[vni] = found.get(vni, 0) + tree.classes[minor].rate_bytes_s
    return found


def _number(match: Match) -> int:
    return match.keys[-1][1] >> 8


def _base(shares: Sequence[Share]) -> Tree:
    """The links, everything of them for everything else."""
    classes: dict[int, Class] = {}
    filters: dict[Match, int] = {}
    for number, share in enumerate(shares, start=1):
        link, rate = number << 8, share.rate_bytes_s
        classes[link] = Class(parent=0, rate_bytes_s=rate, ceil_bytes_s=rate)
        classes[link | _OTHERS] = Class(parent=link, rate_bytes_s=rate, ceil_bytes_s=rate)
        for network in share.networks:
            filters.setdefault(match_network(network), link | _OTHERS)
    return Tree(classes=classes, filters=filters)


def _stands(base: Tree, present: Tree) -> bool:
    """Whether the links are there as they should be. Rates of leaves are another matter."""
    links = {minor: one for minor, one in present.classes.items() if not one.leaf}
    networks = {match: minor for match, minor in present.filters.items() if match.rank == _NETWORK_RANK}
    others = {minor: one.parent for minor, one in present.classes.items() if minor & 0xFF == _OTHERS}
    return (
        links == {minor: one for minor, one in base.classes.items() if not one.leaf}
        and networks == base.filters
        and others == {minor: one.parent for minor, one in base.classes.items() if one.leaf}
    )


def _flows(link: int, share: Share, present: Tree) -> Iterator[Change]:
    """From the leaves below one link that are there to those that should be.

    First what goes or gets less, then everything else's own rate, then what gets more or is new.
    """
    rate = share.rate_bytes_s
    leads: dict[int, set[Match]] = {}
    for match, minor in present.filters.items():
        if match.rank == _FLOW_RANK and minor & ~0xFF == link:
            leads.setdefault(minor, set()).add(match)
    leaves = {m: c for m, c in present.classes.items() if c.parent == link and m & 0xFF >= _FIRST}
    there = {frozenset(leads.get(minor, ())): minor for minor in leaves}
    wanted = {flow.matches: flow.rate_bytes_s for flow in share.flows[:FLOWS_LIMIT] if flow.peers}
    keep = {matches: there[matches] for matches in wanted if matches in there}
    for minor in sorted(leaves.keys() | leads.keys()):
        if minor not in keep.values():
            yield from (DropFilter(match) for match in sorted(leads.get(minor, ()), key=_sorting))
            if minor in leaves:
                yield DropClass(minor)
    targets = {minor: _leaf(link, wanted[matches], rate) for matches, minor in keep.items()}
    changed = {minor: to for minor, to in targets.items() if to != leaves[minor]}
    less = {minor for minor, to in changed.items() if to.rate_bytes_s <= leaves[minor].rate_bytes_s}
    yield from (SetClass(minor, changed[minor]) for minor in sorted(less))
    left = max(rate - sum(wanted.values()), rate // _OTHERS_PART, 1)
    others = Class(parent=link, rate_bytes_s=left, ceil_bytes_s=rate)
    if present.classes.get(link | _OTHERS) != others:
        yield SetClass(link | _OTHERS, others)
    yield from (SetClass(minor, changed[minor]) for minor in sorted(changed.keys() - less))
    free = (minor for minor in range(link | _FIRST, link + 0x100) if minor not in keep.values())
    for matches, flow_rate in wanted.items():
        if matches not in keep:
            minor = next(free)
            yield SetClass(minor, _leaf(link, flow_rate, rate))
            yield from (AddFilter(match, minor) for match in sorted(matches, key=_sorting))


def _leaf(link: int, rate_bytes_s: int, most_bytes_s: int) -> Class:
    return Class(
        parent=link,
        rate_bytes_s=rate_bytes_s,
        ceil_bytes_s=max(most_bytes_s, rate_bytes_s),
        prio=1,
    )


def _sorting(match: Match) -> tuple[int, tuple[tuple[int, int, int], ...]]:
    return match.order, match.keys


# -- what filters look at ------------------------------------------------------------------------


def _flow(vni: int, peer: str) -> Match:
    """VXLAN (RFC 7348, section 5) to a host. The kernel's outer headers have no options."""
    address = ipaddress.ip_address(peer)
    protocol, headers = (8, 20) if address.version == 4 else (4, 40)
    shift = 16 if address.version == 4 else 8
    keys = [
        (0xFF << shift, _UDP << shift, protocol),
        *_destination(ipaddress.ip_network(peer)),
        (0xFFFF, VXLAN_PORT, headers),
        (0xFFFFFF00, vni << 8, headers + 12),
    ]
    return Match(rank=_FLOW_RANK, version=address.version, keys=tuple(keys))


def match_network(text: str) -> Match:
    """All that goes to a network."""
    network = ipaddress.ip_network(text)
    keys = tuple(_destination(network)) or ((0, 0, 0),)
    return Match(rank=_NETWORK_RANK, version=network.version, keys=keys)


def _destination(network: ipaddress.IPv4Network | ipaddress.IPv6Network) -> Iterable[tuple[int, int, int]]:
    """The words of a packet's destination address, those that count."""
    at = 16 if network.version == 4 else 24
    mask, address = network.netmask.packed, network.network_address.packed
    for word in range(0, len(mask), 4):
        part = int.from_bytes(mask[word : word + 4])
        if part:
            yield part, int.from_bytes(address[word : word + 4]), at + word
