"""A stretched segment: two hosts' bridges become one, nothing goes in circles, guests are ushered in."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from typing import Any

import pytest
from migrating import until
from pair import BRIDGE, GUEST, PAYLOAD, TAP_MAC, WAY, Pair, Tap, at, rules, send, ushers

from virtgrid.core.errors import NotFoundError, RefusedError, UsageError
from virtgrid.lab import processes
from virtgrid.net import netns, redirect, segment
from virtgrid.net.forwarding import Entry, entry, set_entry
from virtgrid.net.link import Links
from virtgrid.net.redirect import Redirect
from virtgrid.net.usher import RETURN_RANK, SEAT_RANK

pytestmark = pytest.mark.lab


def _carried(pair: Pair, size: int) -> bool:
    """Whether an IP packet of this size, not to be fragmented, gets from the left to the right host."""
    payload = os.urandom(size - 28)

    def sockets() -> socket.socket:
        made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        made.setsockopt(socket.IPPROTO_IP, 10, 2)  # IP_MTU_DISCOVER, IP_PMTUDISC_DO
        made.settimeout(5)
        return made

    with netns.run_in(pair.left, sockets) as sending, netns.run_in(pair.right, sockets) as listening:
        listening.bind(("10.78.0.2", 0))
        sending.sendto(payload, listening.getsockname())
        try:
            return listening.recv(2048) == payload
        except TimeoutError:
            return False


def test_two_bridges_become_one_segment_and_full_frames_pass(pair: Pair) -> None:
    name = pair.both_up()
    assert _carried(pair, 100)
    assert _carried(pair, 1500), "a frame of the bridge's full size"
    found = netns.run_in(pair.left, segment.status)
    assert [(one.name, one.bridge, one.up, one.ushered) for one in found] == [(name, BRIDGE, True, True)]
    assert (found[0].tunnel.local, found[0].tunnel.remote) == ("10.98.0.1", "10.98.0.2")


def test_up_twice_changes_nothing_and_mends_a_dead_usher(pair: Pair) -> None:
    name = pair.both_up()
    before = ushers(pair.left)
    index = at(pair.left, lambda links: links.index(name))
    assert pair.up(pair.left).ushered
    assert (ushers(pair.left), at(pair.left, lambda links: links.index(name))) == (before, index)
    for pid in before:
        processes.send(pid, signal.SIGKILL, wait_s=5.0)
    assert not netns.run_in(pair.left, segment.status)[0].ushered
    assert pair.up(pair.left).ushered


def test_down_leaves_no_interface_and_no_process(pair: Pair) -> None:
    name = pair.both_up()
    assert netns.run_in(pair.left, lambda: segment.down(name))
    assert at(pair.left, lambda links: links.index(name)) is None
    until(lambda: not ushers(pair.left), "no process any more", deadline_s=5)
    assert not netns.run_in(pair.left, lambda: segment.down(name)), "nothing to remove any more"
    assert netns.run_in(pair.left, segment.status) == ()


def test_frames_that_would_not_fit_are_refused_beforehand(pair: Pair) -> None:
    at(pair.left, lambda links: links.up(WAY, mtu=1500))
    with pytest.raises(RefusedError, match=r"MTU 1500.*50 bytes") as refused:
        pair.up(pair.left)
    assert "1450" in (refused.value.hint or "")
    assert "1550" in (refused.value.hint or "")
    assert at(pair.left, lambda links: links.index("vgs7")) is None


def test_a_second_way_between_two_bridges_is_refused(pair: Pair) -> None:
    pair.both_up()
    pair.up(pair.left, vni=8)  # which cannot be known to become a circle,
    with pytest.raises(RefusedError, match="one segment already"):
        pair.up(pair.right, vni=8)  # but here it would be closed
    assert at(pair.right, lambda links: links.index("vgs8")) is None
    assert _carried(pair, 100)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"bridge": "br9"}, NotFoundError),
        ({"bridge": WAY}, NotFoundError),
        ({"vni": 0}, UsageError),
        ({"vni": 1 << 24}, UsageError),
        ({"peer": "no.such.host.invalid"}, NotFoundError),
        ({"peer": "10.98.0.1"}, RefusedError),
        ({"peer": "192.0.2.1"}, NotFoundError),
    ],
)
def test_what_cannot_be_is_said_and_changes_nothing(
    pair: Pair, changes: dict[str, Any], error: type[Exception]
) -> None:
    before = at(pair.left, lambda links: {link.name for link in links.all()})
    with pytest.raises(error):
        pair.up(pair.left, **changes)
    assert at(pair.left, lambda links: {link.name for link in links.all()}) == before
    assert ushers(pair.left) == []


def test_a_number_that_another_segment_has_is_refused(pair: Pair) -> None:
    pair.up(pair.left)
    at(pair.left, lambda links: links.bridge("br1"))
    with pytest.raises(RefusedError, match="another one"):
        pair.up(pair.left, bridge="br1")


def test_somebody_elses_tunnel_is_not_removed(pair: Pair) -> None:
    at(pair.left, lambda links: links.bridge("vgs9"))
    with pytest.raises(RefusedError, match="not made by virtgrid"):
        netns.run_in(pair.left, lambda: segment.down("vgs9"))


def test_the_command_speaks_to_people_and_programs(pair: Pair) -> None:
    def virtgrid(*words: str) -> subprocess.CompletedProcess[str]:
        program = [sys.executable, "-c", "from virtgrid.cli.main import main; main()"]
        argv = ["nsenter", f"--net={netns.path(pair.left)}", "--", *program, "segment", *words]
        return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)

    assert virtgrid("up", BRIDGE, "10.98.0.2", "--vni", "7").returncode == 0
    shown = virtgrid("status").stdout
    assert "vgs7" in shown
    assert "10.98.0.2" in shown
    assert virtgrid("up", "br9", "10.98.0.2").returncode == 4
    assert virtgrid("down", "vgs7").returncode == 0
    assert "nothing to remove" in virtgrid("down", "vgs7").stderr


# --- guests on their way ---------------------------------------------------------------------


def test_frames_for_a_guest_on_its_way_wait_at_its_tap(pair: Pair) -> None:
    name = pair.both_up()
    at_left = at(pair.left, lambda links: links.require(name))
    frame = bytes.fromhex(GUEST.replace(":", "")) + b"\x02client" + PAYLOAD

    def seen_at_segment(links: Links) -> None:
        # The guest runs at the left, so the right one has learned its address at the segment.
        set_entry(links, GUEST, Entry(port=links.require(name)))

    at(pair.left, lambda links: set_entry(links, GUEST, Entry(port=at_left, sticky=True)))
    at(pair.right, seen_at_segment)
    tap = Tap(pair.right)
    until(lambda: len(rules(pair.right, name)) == 1, "the tap being noticed", deadline_s=10)
    until(tap.waiting, "the frame that is to be lost", deadline_s=10)
    send(pair.left, frame)
    found: list[bytes] = []

    def both() -> bool:
        found.extend(tap.read())
        return frame in found

    until(both, "the frame in the tap's queue", deadline_s=10)
    assert found[0] != frame, "QEMU spoils the first one"
    assert found.count(frame) == 1

    # Its first frame: from now on the bridge knows where it is, and nothing is led past it any more.
    tap.send(b"\xff" * 6 + bytes.fromhex(GUEST.replace(":", "")) + b"\x08\x06" + bytes(46))
    until(lambda: not rules(pair.right, name), "the redirect taken away", deadline_s=10)
    at(pair.left, lambda links: set_entry(links, GUEST, Entry(port=at_left)))
    tap.queued()
    send(pair.left, frame)
    assert until(tap.queued, "the frame, by way of the bridge", deadline_s=10) == [frame]
    os.close(tap.end)


def test_a_tap_that_goes_takes_its_redirect_along(pair: Pair) -> None:
    name = pair.both_up()
    tap = Tap(pair.right)
    until(lambda: len(rules(pair.right, name)) == 1, "the tap being noticed", deadline_s=10)
    os.close(tap.end)
    until(lambda: not rules(pair.right, name), "no redirect any more", deadline_s=10)


def test_a_guest_that_comes_back_is_not_sent_away_by_what_its_leaving_left(pair: Pair) -> None:
    name = pair.both_up()
    index = at(pair.right, lambda links: links.require(name))
    left_over = Redirect(mac=GUEST, to=index, rank=RETURN_RANK)
    other = Redirect(mac="52:54:00:5e:00:02", to=index, rank=RETURN_RANK)
    with Links(pair.right) as links:
        for rule in (left_over, other):
            redirect.add(links, index, rule)
    tap = Tap(pair.right)
    seat = Redirect(mac=f"00{TAP_MAC[2:]}", to=tap.index, rank=SEAT_RANK, exact=False)
    until(lambda: rules(pair.right, name) == {other, seat}, "left-over out, seat in", deadline_s=10)
    os.close(tap.end)


def test_entries_are_put_and_read_back(pair: Pair) -> None:
    name = pair.up(pair.left).name
    with Links(pair.left) as links:
        bridge, port = links.require(BRIDGE), links.require(name)
        assert entry(links, GUEST, bridge) is None
        for wanted in (Entry(port=port, sticky=True), Entry(port=port), Entry(port=port, static=True)):
            set_entry(links, GUEST, wanted)
            assert entry(links, GUEST, bridge) == wanted
