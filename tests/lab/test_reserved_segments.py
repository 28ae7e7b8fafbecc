"""What the network manager promised is there at both sites, is nobody else's, and goes when it is over."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import pytest
from migrating import until
from netsites import NetSites, net_sites

from virtgrid.grid.messages.network import bridge_of
from virtgrid.lab.lab import Lab
from virtgrid.lab.layout import WAN_INTERFACE
from virtgrid.lab.network import VIRTGRID
from virtgrid.net.link import Links

pytestmark = pytest.mark.lab

RATE_BYTES_S = 12_500_000


@pytest.fixture(scope="module")
def all_tests_net(lab: Lab) -> Iterator[NetSites]:
    with net_sites(lab) as made:
        yield made


@pytest.fixture
def net(all_tests_net: NetSites) -> Iterator[NetSites]:
    """Everybody runs; whom a test kills is started again for the next."""
    all_tests_net.mend()
    yield all_tests_net
    all_tests_net.mend()


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
    net.release(blue)
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
    one = net.reserve("with-a-rate", rate_bytes_s=RATE_BYTES_S)
    guaranteed(RATE_BYTES_S)
    other = net.reserve("with-another", rate_bytes_s=2 * RATE_BYTES_S)
    guaranteed(RATE_BYTES_S, 2 * RATE_BYTES_S)
    net.release(one)
    guaranteed(2 * RATE_BYTES_S)
    net.release(other)
    until(net.free, "nobody is held back any more")


def test_what_is_killed_and_removed_by_hand_is_put_back(net: NetSites) -> None:
    alice, _ = net.sites
    segment = net.reserve("to-be-kept", rate_bytes_s=RATE_BYTES_S)
    before = until(lambda: net.whole(segment) and net.guaranteed(alice), "all is there")
    (shown,) = json.loads(alice.run([*VIRTGRID, "segment", "reserved", "--json"]).stdout)
    assert shown["segment"] == segment
    assert shown["reservation"].startswith("to-be-kept")
    assert [shown["guaranteed_bytes_s"]] == before
    assert "to-be-kept" in alice.run([*VIRTGRID, "segment", "reserved"]).stdout
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
    net.release(segment)
    until(lambda: bridge_of(segment) not in net.links(alice), "gone where it could be told")
    assert bridge_of(segment) in net.links(bob), "nobody there could be told"
    net.start("bob")
    until(lambda: net.absent(segment), "gone from the host that was away")
    until(net.free, "and its guarantee")
    assert net.whole(kept)


def test_a_segment_is_there_before_its_window_and_its_rate_is_not(net: NetSites) -> None:
    begins_s = time.time() + 30
    segment = net.reserve("comes-later", begins_in_s=30, rate_bytes_s=RATE_BYTES_S)
    until(lambda: net.whole(segment), "there, so that it is there when its window opens")
    free = net.free()
    assert free or time.time() >= begins_s - 1


def test_a_window_ends_although_the_manager_is_dead(net: NetSites) -> None:
    segment = net.reserve("ends-soon", lasts_s=6, rate_bytes_s=RATE_BYTES_S)
    until(lambda: all(net.knows(site, segment) for site in net.sites), "both were told")
    net.kill("nrm")
    until(lambda: net.absent(segment) and net.free(), "gone at its end, with its rate")


def test_somebody_elses_interface_is_left_alone_and_told(net: NetSites) -> None:
    alice, bob = net.sites
    with Links(alice.netns) as links:
        links.bridge(bridge_of(3000))
    alice.run(["tc", "qdisc", "add", "dev", WAN_INTERFACE, "root", "handle", "7:", "htb"])
    try:
        first = net.reserve("has-no-place", segment=3000)
        second = net.reserve("has-no-rate", rate_bytes_s=RATE_BYTES_S)
        for text in (
            "there is an interface br3000 that virtgrid did not make",
            "wan0: it has a queueing discipline that virtgrid did not make",
        ):
            until(lambda: text in net.log("nrm"), text)  # noqa: B023 - called at once
        until(lambda: net.whole(second), "the segment that can be")
        until(lambda: len(net.guaranteed(bob)) == 1, "each end does what it can")
        net.release(first)
        net.release(second)
        until(lambda: net.absent(second), "what was made is gone")
        with Links(alice.netns) as links:
            assert links.index(bridge_of(3000)) is not None
        assert "htb 7:" in alice.run(["tc", "qdisc", "show", "dev", WAN_INTERFACE]).stdout
    finally:
        with Links(alice.netns) as links:
            links.delete(bridge_of(3000))
        alice.run(["tc", "qdisc", "del", "dev", WAN_INTERFACE, "root"])
