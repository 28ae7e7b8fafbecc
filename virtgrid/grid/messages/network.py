"""What a network manager (NRM) says to the hosts of its sites: these segments should be on you now.

It is always the whole of it, said again whenever something changes, on every new line, and now and then. So a
message that was lost, a host that was restarted and one that was told something else before all come to the
same. The host keeps the last word on its disk, and knows from it when each segment ends: it takes that away
by its own clock, whether or not anybody tells it to.

Rates are bytes per second on the wire, with all that is around a packet there.
"""

from __future__ import annotations

import ipaddress
from typing import Annotated, Final

from pydantic import AfterValidator, Field, StringConstraints, model_validator

from virtgrid.grid.messages.coalloc import SITES_LIMIT, Party, Rate, Seconds
from virtgrid.grid.messages.common import Key, Model, Name, Tag

SEGMENTS: Final = "segments"
"""The method; of virtgridd, for network managers."""
HOSTS_LIMIT: Final = 256
"""Of one site."""
ALL_SITES_LIMIT: Final = 256
SEGMENTS_LIMIT: Final = 2048
_NETWORKS_LIMIT: Final = 512

BRIDGE: Final = "br{tag}"
"""How the bridge of a segment is called on every host, where nothing else was chosen."""


def bridge_of(segment: int, pattern: str = BRIDGE) -> str:
    """The bridge on a host that sandboxes of a segment are plugged into."""
    return pattern.replace("{tag}", str(segment))


def _host(text: str) -> str:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        raise ValueError("it should be an IPv4 or IPv6 address") from None
    if address.is_loopback or address.is_multicast or address.is_unspecified or "%" in text:
        raise ValueError("not an address a host can have")
    return str(address)


def _network(text: str) -> str:
    try:
        return str(ipaddress.ip_network(text))
    except ValueError:
        raise ValueError("it should be a network, as 192.0.2.0/24") from None


#: Of a host, IPv4 or IPv6.
Address = Annotated[str, StringConstraints(max_length=45), AfterValidator(_host)]
#: What a site has behind a link, as CIDR, IPv4 or IPv6.
Network = Annotated[str, StringConstraints(max_length=49), AfterValidator(_network)]
Mtu = Annotated[int, Field(ge=576, le=65000)]


class Reach(Model):
    """The way to another site. rate_bytes_s: this host's share of what the link carries. networks: what of
    the other site is reached over it.
    """

    rate_bytes_s: Rate
    networks: Annotated[tuple[Network, ...], Field(max_length=_NETWORKS_LIMIT)]


class Ordered(Model):
    """One segment. id: of this reservation's alone. rates: to each other site, guaranteed in the window."""

    id: Key
    reservation: Name
    segment: Tag
    begins_at_s: Seconds
    ends_at_s: Seconds
    mtu: Mtu
    sites: Annotated[tuple[Party, ...], Field(min_length=1, max_length=SITES_LIMIT)]
    rates: Annotated[dict[Party, Rate], Field(max_length=SITES_LIMIT)] = Field(default_factory=dict)


class Orders(Model):
    """``segments``: everything that should be on this host. network: who says it.

    address: this host's own, for tunnels. hosts: of every site, their tunnel addresses.
    """

    network: Party
    site: Party
    address: Address
    hosts: Annotated[
        dict[Party, Annotated[tuple[Address, ...], Field(min_length=1, max_length=HOSTS_LIMIT)]],
        Field(max_length=ALL_SITES_LIMIT),
    ]
    reach: Annotated[dict[Party, Reach], Field(max_length=ALL_SITES_LIMIT)]
    segments: Annotated[tuple[Ordered, ...], Field(max_length=SEGMENTS_LIMIT)]

    @model_validator(mode="after")
    def _whole(self) -> Orders:
        if self.address not in self.hosts.get(self.site, ()):
            raise ValueError(f"{self.address} is not among the hosts of {self.site}")
        ids = {one.id for one in self.segments}
        if len(ids) != len(self.segments):
            raise ValueError("two segments have the same id")
        for one in self.segments:
            if unknown := sorted({*one.sites, *one.rates} - self.hosts.keys()):
                raise ValueError(f"segment {one.segment} is of site {unknown[0]}, of which no host is told")
            if one.ends_at_s <= one.begins_at_s:
                raise ValueError(f"segment {one.segment} ends before it begins")
            if unreached := sorted(one.rates.keys() - self.reach.keys()):
                raise ValueError(f"segment {one.segment} has a rate to {unreached[0]}, and there is no link")
        return self


class Carried(Model):
    """The answer: which segments are not as they should be, by id, and why."""

    problems: dict[str, Annotated[str, StringConstraints(max_length=500)]] = Field(default_factory=dict)
