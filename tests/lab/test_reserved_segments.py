"""What the network manager promised is there at both sites, is nobody else's, and goes when it is over."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from migrating import until
from netsites import NetSites, net_sites

from virtgrid.grid.messages.network import bridge_of
from virtgrid.lab.lab import Lab
from virtgrid.lab.layout import WAN_INTERFACE
from virtgrid.net.link import Links

pytestmark = pytest.mark.lab

RATE_BYTES_S = 12_500_000


@pytest.fixture
def net(mended_lab: Lab) -> Iterator[NetSites]:
    with net_sites(mended_lab) as made:
        yield made


def test_a_segment_joins_its_nodes_and_nobody_else(net: NetSites) -> None:
    alice, bob = net.sites
    red, blue = net.reserve("reservation-red"), net.reserve("reservation-blue")
    until(lambda: net.whole(red) and net.whole(blue), "both are at both sites")
    # As bad as can be: the same addresses, and another segment's node at the same host.
    red_a, red_b = net.node(alice, red, "10.5.0.1"), net.node(bob, red, "10.5.0.2")
    blue_a, blue_b = net.node(alice, blue, "10.5.0.3"), net.node(bob, blue, "10.5.0.2")
    assert red_a.reaches(red_b, size=1450), "a packet of the segment's full size"
    assert red_b.reaches(red_a)
    assert blue_a.reaches(blue_b)
    assert not red_a.reaches(blue_a, timeout_s=1.0)
    assert not blue_a.reaches(red_b, timeout_s=1.0)
    host = net.towards(red_a, alice, red)
    assert not red_a.reaches(host, timeout_s=1.0), "the host itself is no member"
    net.release("reservation-blue")
    until(lambda: net.absent(blue), "the other's segment is gone")
    assert red_a.reaches(red_b), "and nothing else"


def test_a_guarantee_is_at_both_ends_of_the_link_and_ends_with_its_reservation(net: NetSites) -> None:
    def guaranteed(*rates: int) -> None:
        # 1398 bytes of payload take 1538 on the wire.
        expected = [-(-rate * 1538 // 1398) for rate in rates]
        until(lambda: [net.guaranteed(site) for site in net.sites] == [expected] * 2, f"{rates} at both")

    segment = net.reserve("without-any")
    until(lambda: net.whole(segment), "a segment without a rate")
    assert net.free(), "nobody is held back for nothing"
    net.reserve("with-a-rate", rate_bytes_s=RATE_BYTES_S)
    guaranteed(RATE_BYTES_S)
    net.reserve("with-another", rate_bytes_s=2 * RATE_BYTES_S)
    guaranteed(RATE_BYTES_S, 2 * RATE_BYTES_S)
    net.release("with-a-rate")
    guaranteed(2 * RATE_BYTES_S)
    net.release("with-another")
    until(net.free, "nobody is held back any more")


def test_what_is_killed_and_removed_by_hand_is_put_back(net: NetSites) -> None:
    alice, _ = net.sites
    segment = net.reserve("to-be-kept", rate_bytes_s=RATE_BYTES_S)
    before = until(lambda: net.whole(segment) and net.guaranteed(alice), "all is there")
    net.kill("alice")
    net.kill("nrm")
    assert net.whole(segment), "a segment does not need its makers"
    with Links(alice.netns) as links:
        links.delete(bridge_of(segment))
    alice.run(["tc", "qdisc", "del", "dev", WAN_INTERFACE, "root"])
    net.start("alice")  # which knows what it was told last, although nobody says it again
    until(lambda: net.whole(segment), "the segment is back")
    until(lambda: net.guaranteed(alice) == before, "and its guarantee")


def test_what_was_released_meanwhile_is_taken_away(net: NetSites) -> None:
    alice, bob = net.sites
    segment = net.reserve("to-be-released", rate_bytes_s=RATE_BYTES_S)
    kept = net.reserve("to-be-kept")
    until(lambda: net.whole(segment) and net.whole(kept), "both are at both sites")
    net.kill("bob")
    net.release("to-be-released")
    until(lambda: bridge_of(segment) not in net.links(alice), "gone where it could be told")
    assert bridge_of(segment) in net.links(bob), "nobody there could be told"
    net.start("bob")
    until(lambda: net.absent(segment), "gone from the host that was away")
    until(net.free, "and its guarantee")
    assert net.whole(kept)


def test_a_window_ends_although_the_manager_is_dead(net: NetSites) -> None:
    ahead = net.reserve("comes-later", begins_in_s=4, lasts_s=4, rate_bytes_s=RATE_BYTES_S)
    net.kill("nrm")
    until(lambda: all(net.guaranteed(site) for site in net.sites), "its window opens")
    until(lambda: net.absent(ahead), "and ends")
    until(net.free, "with its rate")


def test_somebody_elses_interface_is_left_alone_and_told(net: NetSites) -> None:
    alice, bob = net.sites
    with Links(alice.netns) as links:
        links.bridge(bridge_of(1000))
    try:
        alice.run(["tc", "qdisc", "add", "dev", WAN_INTERFACE, "root", "handle", "7:", "htb"])
        assert net.reserve("has-no-place") == 1000
        second = net.reserve("has-no-rate", rate_bytes_s=RATE_BYTES_S)
        for text in (
            "segment 1000 of has-no-place: there is an interface br1000 that virtgrid did not make",
            "wan0: it has a queueing discipline that virtgrid did not make",
        ):
            until(lambda: text in net.log("nrm"), text)  # noqa: B023 - called at once
        until(lambda: net.whole(second), "the segment that can be")
        until(lambda: len(net.guaranteed(bob)) == 1, "each end does what it can")
        net.release("has-no-place")
        net.release("has-no-rate")
        until(lambda: net.absent(second), "what was made is gone")
        with Links(alice.netns) as links:
            assert links.index(bridge_of(1000)) is not None
        assert "htb 7:" in alice.run(["tc", "qdisc", "show", "dev", WAN_INTERFACE]).stdout
    finally:
        with Links(alice.netns) as links:
            links.delete(bridge_of(1000))
