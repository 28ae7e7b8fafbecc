"""The steps of a plan, taken in a real kernel: afterwards nothing is left to do. Over IPv4 and IPv6."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from pair import WAY, Pair, at

from virtgrid.core.errors import NotFoundError, RefusedError
from virtgrid.net import guarantee, htb, netns, reserved, reserving
from virtgrid.net.guarantee import Flow, Share
from virtgrid.net.link import Links
from virtgrid.net.reserved import Present, Reserved

pytestmark = pytest.mark.lab

V4 = ("10.98.0.1", "10.98.0.2", "10.98.0.3")
V6 = ("2001:db8::1", "2001:db8::2", "2001:db8::3")


@pytest.fixture
def both(pair: Pair) -> Pair:
    """The pair with IPv6 between the hosts as well."""
    for side, name in enumerate((pair.left, pair.right), start=1):
        # Usable at once, and not when nobody has objected to them for a second.
        netns.set_sysctl(name, {f"net/ipv6/conf/{WAY}/accept_dad": "0"})
        netns.set_sysctl(name, {f"net/ipv6/conf/{WAY}/disable_ipv6": "0"})
        with Links(name) as links:
            links.call("addr", "add", index=links.require(WAY), address=f"2001:db8::{side}", prefixlen=64)
    return pair


def _segment(vni: int, addresses: Sequence[str], *, peers: int = 1, id_: str = "one") -> Reserved:
    others = frozenset(addresses[1 : peers + 1])
    return Reserved(id=id_, name="r", vni=vni, bridge=f"br{vni}", local=addresses[0], peers=others, mtu=1400)


def _establish(links: Links, segments: Sequence[Reserved]) -> Present:
    plan = reserved.plan(segments, reserving.look(links))
    for step in plan.steps:
        reserving.take(links, step)
    present = reserving.look(links)
    assert reserved.plan(segments, present).steps == (), "nothing is left to do"
    return present


@pytest.mark.parametrize("addresses", [V4, V6])
def test_segments_come_change_and_go(both: Pair, addresses: Sequence[str]) -> None:
    with Links(both.left) as links:
        before = {link.name for link in links.all()}
        _establish(links, [_segment(5, addresses), _segment(6, addresses)])
        bridge = links.require("br5")
        _establish(links, [_segment(5, addresses, peers=2), _segment(6, addresses)])
        assert links.require("br5") == bridge, "another peer is no reason to make it anew"
        _establish(links, [_segment(5, addresses, id_="two"), _segment(6, addresses)])
        assert links.require("br5") != bridge, "another reservation is"
        links.delete("vgx6")
        links.bridge("vgb7", up=False)  # as a kill in the middle leaves it
        present = _establish(links, [_segment(6, addresses)])
        mtus = {link.name: link.mtu for link in present.links if reserved.ours(link)}
        assert mtus == {"br6": 1400, "vgx6": 1400}
        _establish(links, [])
        assert {link.name for link in links.all()} == before


@pytest.mark.parametrize("addresses", [V4, V6])
def test_guarantees_come_change_and_go(both: Pair, addresses: Sequence[str]) -> None:
    def shares(*rates: int) -> list[Share]:
        flows = tuple(
            Flow(vni=vni, peers=tuple(addresses[1:]), rate_bytes_s=rate) for vni, rate in enumerate(rates, 1)
        )
        length = 128 if ":" in addresses[0] else 32
        networks = tuple(f"{address}/{length}" for address in addresses[1:])
        return [Share(rate_bytes_s=10_000_000, networks=networks, flows=flows)]

    with Links(both.left) as links:
        way = links.require(WAY)
        for wanted in (shares(1_000_000), shares(2_000_000, 3_000_000), shares(3_000_000), [], shares(1), []):
            htb.apply(links, way, guarantee.plan(wanted, htb.read(links, way)))
            assert guarantee.plan(wanted, htb.read(links, way)) == ()
        assert htb.read(links, way) is None


def test_ways_are_judged_before_anything_is_made(both: Pair) -> None:
    with Links(both.left) as links:
        present = reserving.look(links)
        assert {V4[0], V6[0]} <= reserving.addresses(links)
        for other in (V4[1], V6[1]):
            assert reserving.uplink(links, present, other).interface.name == WAY
        for nobody in (V4[0], "192.0.2.1"):
            with pytest.raises(NotFoundError):
                reserving.uplink(links, present, nobody)
        way = reserving.uplink(links, present, V4[1])
        reserving.require_fit(way, V4[1], 1550)
        with pytest.raises(RefusedError, match="packets of 1551 bytes do not fit"):
            reserving.require_fit(way, V4[1], 1551)
    at(both.left, lambda links: links.call("tc", "add", "pfifo", links.require(WAY), 0x70000))
    with Links(both.left) as links, pytest.raises(RefusedError, match="did not make"):
        htb.read(links, links.require(WAY))
