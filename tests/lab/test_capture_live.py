"""The ring and the watcher on a real interface, with a real web server, in namespaces of this test's own."""

from __future__ import annotations

import os
import socket
import time

import numpy as np
import pytest
from capture_site import GUEST, Site, Watcher, ask, in_namespace, read_answer, until

from virtgrid.core.errors import NotFoundError
from virtgrid.net.ring import PacketRing
from virtgrid.tracker.tracker import Change
from virtgrid.tracker.views import Verdict

pytestmark = [
    pytest.mark.lab,
    pytest.mark.skipif(os.geteuid() != 0, reason="capturing on an interface needs root"),
]


def test_a_real_connection_goes_through_its_verdicts(site: Site, watcher: Watcher) -> None:
    sock = site.connect()
    until(lambda: watcher.snapshot().total == 1, "the connection is seen")
    assert watcher.unsuitable() == 1
    ask(sock, "/small")
    read_answer(sock)
    until(lambda: watcher.unsuitable() == 0, "the answer is complete")
    ask(sock, "/slow/page")
    until(lambda: "response," in watcher.snapshot().connections[0].reason, "the slow answer is under way")
    between = time.monotonic()
    (view,) = watcher.snapshot().connections
    assert view.verdict is Verdict.UNSUITABLE
    assert view.reason.endswith(" left")
    read_answer(sock)
    until(lambda: watcher.unsuitable() == 0, "the slow answer is complete")
    (view,) = watcher.snapshot().connections
    assert (view.protocol, view.requests, view.responses, view.state, view.gaps) == ("http", 2, 2, "idle", 0)
    assert view.server == f"{GUEST}:80"
    assert watcher.unsuitable_at(between) == 1
    sock.close()
    until(lambda: any(c.verdict == "closed" for c in watcher.drain_events()), "the connection's end")
    assert GUEST in watcher.guest_addresses
    assert watcher.server_ports == {80}
    assert watcher.dropped == 0


def test_the_verdicts_are_journalled_in_their_order(site: Site, watcher: Watcher) -> None:
    sock = site.connect()
    ask(sock, "/slow/page")
    read_answer(sock)
    sock.close()
    changes: list[Change] = []

    def over() -> bool:
        changes.extend(watcher.drain_events())
        return bool(changes) and changes[-1].verdict == "closed"

    until(over, "the connection's end")
    assert [c.verdict for c in changes] == ["unsuitable", "suitable", "closed"]
    assert [c.at_s for c in changes] == sorted(c.at_s for c in changes)
    # 40 KB at 20 KB/s: time stamps are the kernel's, on the clock that durations are measured with.
    assert changes[1].at_s - changes[0].at_s > 0.2
    assert abs(changes[2].at_s - time.monotonic()) < 60


def test_a_large_download_is_suitable_while_it_runs(site: Site, watcher: Watcher) -> None:
    sock = site.connect()
    ask(sock, "/paced/large")
    until(lambda: [c.state for c in watcher.snapshot().connections] == ["moving"], "the download runs")
    (view,) = watcher.snapshot().connections
    assert view.suitable
    assert view.reason.startswith("large download, ")
    read_answer(sock)
    until(lambda: [c.state for c in watcher.snapshot().connections] == ["idle"], "the download is complete")
    assert watcher.snapshot().connections[0].large_transfers == 1
    sock.close()


def test_a_tap_that_goes_away_is_reported_and_nothing_fails(site: Site, watcher: Watcher) -> None:
    sock = site.connect()
    ask(sock, "/small")
    read_answer(sock)
    until(lambda: watcher.unsuitable() == 0, "the answer is complete")
    site.ip("link", "del", "tap0", where=site.host)
    until(lambda: watcher.state == "gone", "the interface's end is noticed")
    assert watcher.snapshot().total == 1
    sock.close()


def test_chunked_answers_in_large_frames_are_followed_to_their_end(site: Site, watcher: Watcher) -> None:
    sock = site.connect()
    for number in range(1, 6):
        ask(sock, "/mixed", "Accept-Encoding: gzip")
        data = b""
        while not data.endswith(b"\r\n0\r\n\r\n"):
            data += sock.recv(1 << 20)
        assert b"chunked" in data[:500]
        until(lambda: watcher.unsuitable() == 0, "the answer is complete", 2.0)
        (view,) = watcher.snapshot().connections
        assert (view.state, view.requests, view.responses) == ("idle", number, number)
    sock.close()


def test_the_rest_of_a_long_frame_is_to_be_had_in_order_or_goes_with_its_block(site: Site) -> None:
    with in_namespace(site.host, lambda: PacketRing("tap0")) as ring:
        sock = site.connect()
        asked = 0
        for _ in range(10):
            ask(sock, "/page")
            read_answer(sock)
            while (block := ring.read_block()) is not None:
                for number in range(len(block)):
                    captured, wire_len = int(block.captured[number]), int(block.wire_lens[number])
                    assert captured == min(wire_len, 2048 - 66)
                    # Every third is passed over.
                    if captured == wire_len or (asked := asked + 1) % 3 == 0:
                        continue
                    assert block.whole is not None
                    whole = block.whole(number)
                    assert (len(whole), bytes(whole[:captured])) == (wire_len, block.frame(number))
                    assert whole.tobytes().endswith(b"x")
        assert asked >= 10
        sock.close()


def test_long_frames_that_find_no_room_beside_the_ring_are_cut(site: Site) -> None:
    with in_namespace(site.host, lambda: PacketRing("tap0")) as ring:
        ring._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        sock = site.connect()
        for _ in range(10):
            ask(sock, "/page")
            read_answer(sock)
        had = []
        while (block := ring.read_block()) is not None:
            for number in np.flatnonzero(block.captured < block.wire_lens).tolist():
                had.append(bool(block.whole(number)) if block.whole else False)
        assert len(had) >= 10
        assert had.count(False) >= 5
        assert ring.drops() == 0
        sock.close()


def test_an_interface_that_goes_away_with_long_frames_unread_is_told(site: Site) -> None:
    with in_namespace(site.host, lambda: PacketRing("tap0")) as ring:
        sock = site.connect()
        ask(sock, "/page")
        read_answer(sock)
        site.ip("link", "del", "tap0", where=site.host)
        block = ring.read_block()
        assert block is not None
        for number in np.flatnonzero(block.captured < block.wire_lens).tolist():
            assert block.whole is not None
            assert len(block.whole(number)) == int(block.wire_lens[number])
        with pytest.raises(OSError, match="Network is down"):
            list(iter(ring.read_block, None))
        sock.close()


def test_many_sessions_leave_nothing_unsuitable_and_lose_no_frame(site: Site, watcher: Watcher) -> None:
    sockets = [site.connect() for _ in range(40)]
    for _ in range(5):
        for sock in sockets:
            ask(sock, "/page")
        for sock in sockets:
            read_answer(sock)
    until(lambda: watcher.unsuitable() == 0, "all answers are complete")
    snapshot = watcher.snapshot()
    assert snapshot.total == 40
    assert {(c.requests, c.responses, c.gaps) for c in snapshot.connections} == {(5, 5, 0)}
    assert watcher.dropped == 0
    for sock in sockets:
        sock.close()


def test_an_unknown_interface_is_refused_with_a_sentence(site: Site) -> None:
    with pytest.raises(NotFoundError, match="no network interface 'nosuch0'"):
        in_namespace(site.host, lambda: PacketRing("nosuch0"))
