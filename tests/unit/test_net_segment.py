"""What is decided about segments: does a frame fit, which way leads to a host, who is on the way here."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.unit import plans
from virtgrid.core.errors import RefusedError, UsageError
from virtgrid.lab.felt_pause import felt_pause
from virtgrid.lab.load.prober import echo
from virtgrid.migration.plan import check_request
from virtgrid.net import redirect, usher
from virtgrid.net.flip import Way, find_way
from virtgrid.net.link import Link, Tunnel
from virtgrid.net.redirect import Redirect
from virtgrid.net.segment import fitting_mtu

MAC = "52:54:00:aa:bb:01"


def link(index: int, name: str, kind: str, **changes: Any) -> Link:
    made = Link(
        index=index, name=name, kind=kind, mac="02:00:00:00:00:01", mtu=1500, master=None, up=True,
        rx_packets=9, alias="", tunnel=None,
    )  # fmt: skip
    return replace(made, **changes)


BRIDGE = link(1, "br0", "bridge")
TAP = link(2, "vnet0", "tun", master=1, mac="fe:54:00:aa:bb:01")
SEGMENT = link(3, "vgs1", "vxlan", master=1, tunnel=Tunnel(vni=1, local="10.0.0.1", remote="10.0.0.2"))
WAN = link(4, "eth0", "", mtu=1550)


def test_a_frame_fits_or_the_hint_says_which_mtu_would_do() -> None:
    assert fitting_mtu([BRIDGE, TAP, WAN], BRIDGE, WAN, "10.0.0.2") == 1500
    with pytest.raises(RefusedError) as refused:
        fitting_mtu([BRIDGE, TAP, WAN], BRIDGE, WAN, "2001:db8::2")  # IPv6 takes 20 bytes more
    assert refused.value.hint is not None
    assert "1480" in refused.value.hint
    assert "1570" in refused.value.hint


def test_the_longest_frame_of_any_port_counts_not_the_segments_own() -> None:
    small = replace(BRIDGE, mtu=1450)
    wide = replace(SEGMENT, mtu=9000)
    assert (
        fitting_mtu([small, replace(TAP, mtu=1450), wide], small, replace(WAN, mtu=1500), "10.0.0.2") == 1450
    )
    with pytest.raises(RefusedError):
        fitting_mtu([small, TAP, wide], small, replace(WAN, mtu=1500), "10.0.0.2")


@pytest.mark.parametrize(
    ("links", "found", "why"),
    [
        ((BRIDGE, TAP, SEGMENT), True, "through vgs1 of br0 to 10.0.0.2"),
        ((BRIDGE, TAP), False, "br0 has no segment to another host"),
        ((BRIDGE, SEGMENT), False, "vnet0 is not a port of a bridge"),
        ((BRIDGE, replace(TAP, master=None), SEGMENT), False, "vnet0 is not a port of a bridge"),
        ((replace(BRIDGE, kind="openvswitch"), TAP, SEGMENT), False, "vnet0 is not a port of a Linux bridge"),
        (
            (BRIDGE, TAP, replace(SEGMENT, tunnel=Tunnel(vni=1, local=None, remote="10.0.0.9"))),
            False,
            "no segment of br0 leads to the destination (vgs1 to 10.0.0.9)",
        ),
        ((BRIDGE, TAP, replace(SEGMENT, up=False)), False, "no segment of br0 leads to the destination"),
        ((BRIDGE, TAP, replace(SEGMENT, master=None)), False, "br0 has no segment to another host"),
    ],
)
def test_the_way_to_the_destination_is_found_or_the_reason_told(
    links: tuple[Link, ...], found: bool, why: str
) -> None:
    way, text = find_way(links, "vnet0", MAC, ("10.0.0.2",))
    assert way == (Way(bridge="br0", port="vgs1", tap="vnet0", mac=MAC) if found else None)
    assert text.startswith(why)


def test_who_has_sent_nothing_yet_is_ushered_in_and_nobody_else() -> None:
    coming = replace(TAP, rx_packets=0)
    others = [
        TAP,  # has spoken: the bridge knows where it is
        replace(coming, index=5, master=9),  # of another bridge
        replace(coming, index=6, kind="veth"),
        replace(coming, index=8, up=False),  # what is sent there is lost
        replace(coming, index=7, mac="52:54:00:aa:bb:09"),  # not libvirt's naming
    ]
    assert usher.listen([BRIDGE, SEGMENT, *others], SEGMENT, {}, 0.0) == {}
    everybody = [BRIDGE, SEGMENT, coming, *others]
    heard = usher.listen(everybody, SEGMENT, {}, 0.0)
    assert heard == {2: None}
    (seat,) = usher.seats(everybody, heard)
    assert seat == Redirect(mac="00:54:00:aa:bb:01", to=2, rank=usher.SEAT_RANK, exact=False)
    back = Redirect(mac=MAC, to=3, rank=usher.RETURN_RANK)
    other = replace(back, mac="52:54:00:aa:bb:02")
    assert usher.returns([seat, back, other], [seat]) == {back}


def test_for_a_moment_after_the_first_frame_of_a_guest_its_seat_stays() -> None:
    spoken = [BRIDGE, SEGMENT, replace(TAP, rx_packets=1)]
    heard = usher.listen(spoken, SEGMENT, {2: None}, 100.0)
    assert heard == {2: 100.0}
    assert usher.listen(spoken, SEGMENT, heard, 102.0) == heard
    assert usher.listen(spoken, SEGMENT, heard, 104.0) == {}
    assert usher.listen([BRIDGE, SEGMENT], SEGMENT, heard, 101.0) == {}, "the tap is gone"


@pytest.mark.parametrize("exact", [True, False])
def test_a_redirect_is_read_back_from_its_own_message(exact: bool) -> None:
    rule = Redirect(mac=MAC if exact else "00:54:00:aa:bb:01", to=7, rank=50, exact=exact)
    message = redirect._write(rule)
    assert redirect._read(message, rank=50) == rule
    for cut in range(len(message)):
        redirect._read(message[:cut], rank=50)  # somebody else's filter may look like anything


def test_what_flips_can_be_off_or_auto_only() -> None:
    check_request(plans.request(flip="off"))
    with pytest.raises(UsageError, match="--flip"):
        check_request(plans.request(flip="on"))
    with pytest.raises(UsageError, match="--drain"):
        check_request(plans.request(drain="on"))


# --- what measures it ---------------------------------------------------------------------------


def test_a_pause_is_felt_by_what_was_under_way_in_it() -> None:
    probes = {
        "pings": [(0.0, 0.1), (9.0, 9.1), (10.1, None), (10.2, 10.9), (30.0, None)],
        "kept": [(5.0, 5.9), (9.9, 10.8), (10.4, 10.7), (10.6, 10.9)],
        "new": [(9.0, 9.1), (10.2, None)],
    }
    felt = felt_pause(probes, 10.0, 10.5)
    assert (felt.pings_sent, felt.pings_lost) == (3, 1), "the last one was lost to something else"
    assert felt.awake_s == pytest.approx(0.4)
    assert felt.stall_kept_s == pytest.approx(0.9)
    assert felt.stall_new_s is None, "one was never answered"


def test_an_echo_request_has_the_right_checksum() -> None:
    packet = echo(0x1234, 0xFFFF)
    words = [int.from_bytes(packet[at : at + 2], "big") for at in range(0, len(packet), 2)]
    total = sum(words)
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    assert total == 0xFFFF
