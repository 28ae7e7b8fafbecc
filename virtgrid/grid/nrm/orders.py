"""From what was promised to what each host is told: segments, between which hosts, at which rates. Pure.

What a rate means. A user is promised what programs get: the payload of full-size TCP packets inside the
segment. On the wire there is more around it: the segment's own IP and TCP headers, VXLAN's, Ethernet's frame
and the gap between frames. So of a link only ``promisable`` may be promised, and a guarantee is ``on_wire``.

A link is shared by the hosts of a site: each of n gets the n-th part of the link and of every guarantee. More
would promise a host what another one sends at the same time; what the wire does with too much cannot be
steered from here.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from virtgrid.core.errors import UsageError
from virtgrid.grid.messages.coalloc import Party, Standing
from virtgrid.grid.messages.common import require
from virtgrid.grid.messages.network import (
    HOSTS_LIMIT,
    SEGMENTS_LIMIT,
    Address,
    Network,
    Ordered,
    Orders,
    Reach,
)
from virtgrid.grid.nrm.stock import Link
from virtgrid.wire.endpoint import Endpoint

PATH_MTU: Final = 1500
_ETHERNET_BYTES: Final = 14 + 24  # header; checksum, preamble and gap
_TUNNEL_BYTES: Final = {4: 50, 6: 70}
_HEADERS_BYTES: Final = 20 + 32  # IPv4; TCP with the time stamps everybody uses
_HOSTS_LIMIT: Final = 2048
"""Of all sites: every host is told of all."""
_SLACK_PART: Final = 50
"""Of a link nobody uses the last fiftieth: the queue must be ours, and not the wire's."""
_OTHERS_PART: Final = 100
"""Everything else keeps a hundredth of a link in any case (``virtgrid.net.guarantee``)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """A host of a site. address: for tunnels. where: its virtgridd listens there, as text."""

    site: str
    address: str
    where: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """links: bytes per second on the wire, each way. networks: what else sites have behind their links.

    path_mtu: what the networks between hosts carry.
    """

    links: Mapping[Link, int]
    hosts: tuple[Host, ...] = ()
    networks: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    path_mtu: int = PATH_MTU

    def __post_init__(self) -> None:
        if not 1000 <= self.path_mtu <= 65000:
            raise UsageError(f"--mtu: between 1000 and 65000, not {self.path_mtu}")
        if len(self.hosts) > _HOSTS_LIMIT:
            raise UsageError(f"--host: at most {_HOSTS_LIMIT}, not {len(self.hosts)}")
        for (one, other), rate in self.links.items():
            if not 1000 <= rate <= 10**12:
                raise UsageError(f"--link {one}:{other}: its rate is between 8kbit and 8000gbit")
        seen = [host.address for host in self.hosts] + [host.where for host in self.hosts]
        if twice := next((one for one in seen if seen.count(one) > 1), None):
            raise UsageError(f"--host: {twice} stands there twice")
        if len({self._version(host) for host in self.hosts}) > 1:
            raise UsageError("--host: tunnels are all over IPv4, or all over IPv6")
        for site in {host.site for host in self.hosts}:
            if len(self.of(site)) > HOSTS_LIMIT:
                raise UsageError(f"--host: at most {HOSTS_LIMIT} for a site")
        for site in self.networks:
            if not self.of(site):
                raise UsageError(f"--network: site '{site}' has no --host")

    @staticmethod
    def _version(host: Host) -> int:
        return ipaddress.ip_address(host.address).version

    @property
    def mtu(self) -> int:
        """Of segments: what is left of a packet on the way when a tunnel is around it."""
        version = self._version(self.hosts[0]) if self.hosts else 4
        return self.path_mtu - _TUNNEL_BYTES[version]

    def of(self, site: str) -> tuple[str, ...]:
        """The hosts of a site, by their addresses."""
        return tuple(host.address for host in self.hosts if host.site == site)

    def promisable(self, wire_bytes_s: int) -> int:
        """What of a link may be promised."""
        most = _usable(wire_bytes_s)
        payload = (most - most // _OTHERS_PART) * (self.mtu - _HEADERS_BYTES)
        return payload // (self.path_mtu + _ETHERNET_BYTES)

    def promised(self) -> dict[Link, int]:
        """What of each link may be promised: all of it where no host sees to it, else what fits."""
        if not self.hosts:
            return dict(self.links)
        return {link: self.promisable(rate) for link, rate in self.links.items()}

    def on_wire(self, promised_bytes_s: int) -> int:
        """What a promise takes on the wire, rounded up."""
        payload = self.mtu - _HEADERS_BYTES
        return -(-promised_bytes_s * (self.path_mtu + _ETHERNET_BYTES) // payload)


def _usable(wire_bytes_s: int) -> int:
    return wire_bytes_s - wire_bytes_s // _SLACK_PART


def parse_host(text: str) -> Host:
    """``alpha=192.0.2.1@unix:/run/virtgrid/host.sock``. Errors: UsageError."""
    site, _, rest = text.partition("=")
    address, _, where = rest.partition("@")
    require(Party, "--host", site)
    if not where:
        raise UsageError(
            f"--host: '{text[:80]}' does not say where its virtgridd listens",
            hint="alpha=192.0.2.1@unix:/run/virtgrid/host.sock, for instance",
        )
    require(Address, "--host", address)
    Endpoint.parse(where)
    return Host(site=site, address=str(ipaddress.ip_address(address)), where=where)


def parse_networks(texts: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """``alpha=192.0.2.0/24``, any number of them. Errors: UsageError."""
    found: dict[str, tuple[str, ...]] = {}
    for text in texts:
        site, _, network = text.partition("=")
        require(Party, "--network", site)
        require(Network, "--network", network)
        found[site] = (*found.get(site, ()), str(ipaddress.ip_network(network)))
    return found


def orders(network: str, topology: Topology, standing: Iterable[Standing]) -> dict[Host, Orders]:
    """What each host is told. standing: what is committed, and on now or soon.

    Hosts of sites that a reservation does not use have nothing of it.
    """
    promised = [one for one in standing if one.grant.segment is not None]
    told = {}
    sites = {host.site: topology.of(host.site) for host in topology.hosts}
    for host in topology.hosts:
        reach = dict(_reach(topology, host.site))
        here = [_ordered(topology, one, host.site, reach) for one in promised if host.site in one.grant.sites]
        here.sort(key=lambda one: (one.begins_at_s, one.segment))
        told[host] = Orders(
            network=network,
            site=host.site,
            address=host.address,
            hosts=sites,
            reach=reach,
            segments=tuple(here[:SEGMENTS_LIMIT]),
        )
    return told


def _reach(topology: Topology, site: str) -> Iterable[tuple[str, Reach]]:
    count = len(topology.of(site))
    for link, rate in sorted(topology.links.items()):
        if site in link:
            other = link[0] if link[1] == site else link[1]
            if topology.of(other):
                hosts = (str(ipaddress.ip_network(address)) for address in topology.of(other))
                networks = tuple(dict.fromkeys((*topology.networks.get(other, ()), *hosts)))
                yield other, Reach(rate_bytes_s=max(1, _usable(rate) // count), networks=networks)


def _ordered(topology: Topology, one: Standing, site: str, reach: Mapping[str, Reach]) -> Ordered:
    assert one.grant.segment is not None
    count = len(topology.of(site))
    rates = {}
    for path in one.grant.paths:
        if site in path.between:
            other = path.between[0] if path.between[1] == site else path.between[1]
            if other in reach:
                rates[other] = -(-topology.on_wire(path.rate_bytes_s) // count)
    return Ordered(
        id=hashlib.sha256(one.key.encode()).hexdigest()[:24],  # keys are for who made them
        reservation=one.reservation,
        segment=one.grant.segment,
        begins_at_s=one.window.begins_at_s,
        ends_at_s=one.window.ends_at_s,
        mtu=topology.mtu,
        sites=tuple(other for other in one.grant.sites if topology.of(other)),
        rates=rates,
    )
