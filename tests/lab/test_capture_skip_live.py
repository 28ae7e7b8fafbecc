"""The eBPF filter in the kernel: bodies stay there, and the tracker's story is the same without them."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
from capture_site import GUEST, GUEST_6, GUEST_MAC, Site, Watcher, ask, in_namespace, read_answer, until
from tracker_wire import Talk, get, response

from virtgrid.core.clock import SystemClock
from virtgrid.core.frames import FrameBlock
from virtgrid.net import skipfilter
from virtgrid.net.addresses import parse_mac
from virtgrid.net.capture import TapWatcher
from virtgrid.net.ring import PacketRing
from virtgrid.tracker.decode import ACK, FIN, RST, SYN, decode
from virtgrid.tracker.tracker import Tracker
from virtgrid.tracker.views import Verdict

pytestmark = [
    pytest.mark.lab,
    pytest.mark.skipif(os.geteuid() != 0, reason="capturing on an interface needs root"),
]

MASK = 0xFFFFFFFF
NOW = struct.pack("ii", 1, 0)  # linger for no time: a reset
ADDRESSES = [("10.9.0.9", "10.9.0.1"), ("2001:db8:9::9", "2001:db8:9::1")]


class Reader:
    """A ring read to the end of what was sent: a marker frame tells."""

    def __init__(self, site: Site) -> None:
        self.ring = in_namespace(site.host, lambda: PacketRing("tap0", ring_bytes=1 << 20))
        self.wire = site.wire()
        self._marks = 0

    def send(self, frame: bytes) -> None:
        self.wire.send(frame)

    def kept(self) -> list[bytes]:
        """What came through since the last call, of connections with port 80."""
        self._marks += 1
        mark = Talk(Tracker(), client="198.51.100.7", server_port=1024 + self._marks).frame(
            True, 1, 1, SYN, b""
        )[0]
        self.wire.send(mark)
        out: list[bytes] = []
        end = time.monotonic() + 10
        while mark not in out:
            assert time.monotonic() < end, "the marker did not come"
            block: FrameBlock | None
            while (block := self.ring.read_block()) is not None:
                out += [block.frame(i) for i in range(len(block))]
        # Frames of the interface's own (neighbour discovery) come when they like.
        return [f for f in out if (s := decode(f, len(f))) and b"\0P" in (s.key[-4:-2], s.key[-2:])]

    def close(self) -> None:
        self.ring.close()
        self.wire.close()


@pytest.fixture
def reader(site: Site) -> Iterator[Reader]:
    reader = Reader(site)
    yield reader
    reader.close()


@pytest.mark.parametrize("pair", ADDRESSES)
@pytest.mark.parametrize("begin", [1000, MASK - 2000])
def test_the_kernel_leaves_out_what_ends_inside_the_range_and_nothing_else(
    reader: Reader, pair: tuple[str, str], begin: int
) -> None:
    assert reader.ring.capture == "ebpf"
    talk = Talk(Tracker(), client=pair[0], server=pair[1])

    def segment(at: int, length: int, flags: int = ACK) -> bytes:
        return talk.frame(False, (begin + at) & MASK, 1, flags, b"x" * length)[0]

    known = decode(segment(0, 1), 1500)
    assert known is not None
    reader.ring.skip(known.key, begin, (begin + 5000) & MASK)
    inside = [
        segment(0, 1000),
        segment(1000, 1000),
        segment(4000, 1000),
        segment(-500, 1000),
        segment(4999, 1),
    ]
    outside = [segment(4001, 1000), segment(5000, 10), segment(-1000, 999), segment(1 << 20, 100)]
    flagged = [segment(10, 100, FIN | ACK), segment(10, 0, RST), segment(10, 0, SYN | ACK)]
    other = talk.frame(False, 7, 1, ACK, b"")[0]
    for one in (*inside, other):
        reader.send(one)
    assert reader.kept() == []
    assert reader.ring.skipped() == [(known.key, (begin + 5000) & MASK)]
    for one in (*outside, *flagged):
        reader.send(one)
    assert reader.kept() == [*outside, *flagged]
    reader.ring.skip(known.key, 0, 0)
    assert reader.ring.skipped() == []
    for one in inside:
        reader.send(one)
    assert reader.kept() == inside


def test_a_ring_that_ran_over_says_how_many_were_lost(reader: Reader) -> None:
    talk = Talk(Tracker())
    for number in range(600):  # the ring has 512 slots
        reader.send(talk.frame(False, number, 1, ACK, b"x" * 100)[0])
    lost = read = 0

    def all_accounted_for() -> bool:
        nonlocal lost, read
        while (block := reader.ring.read_block()) is not None:
            read += sum(block.frame(i)[12:14] == b"\x08\x00" for i in range(len(block)))
        lost += reader.ring.drops()
        return read + lost >= 600

    until(all_accounted_for, "every frame is read or counted as lost")
    assert read <= 512
    assert lost >= 88


@pytest.mark.parametrize("address", [GUEST, GUEST_6])
def test_of_a_large_download_only_its_edges_are_delivered(site: Site, watcher: Watcher, address: str) -> None:
    assert watcher.capture == "ebpf"
    tracker: Tracker = watcher._tracker  # type: ignore[assignment]
    sock = site.connect(address)
    ask(sock, "/paced/large")
    lengths: list[int] = []
    client = threading.Thread(target=lambda: lengths.append(read_answer(sock)))
    client.start()
    until(lambda: [c.state for c in watcher.snapshot().connections] == ["moving"], "the download runs")
    seen: list[int] = []

    def told() -> bool:
        seen.append(watcher.snapshot().connections[0].bytes_to_client)
        return len(set(seen)) > 4

    until(told, "its progress is told again and again")
    assert seen == sorted(seen)
    client.join(30)
    assert lengths == [8 << 20]
    until(lambda: [c.state for c in watcher.snapshot().connections] == ["idle"], "the download is complete")
    (view,) = watcher.snapshot().connections
    assert (view.requests, view.responses, view.gaps, view.large_transfers) == (1, 1, 0, 1)
    # Body and head: nothing is lost to the counter.
    assert (8 << 20) + 100 < view.bytes_to_client < (8 << 20) + 1000
    for _ in range(3):
        ask(sock, "/small")
        read_answer(sock)
    until(lambda: watcher.snapshot().connections[0].responses == 4, "what comes behind it is followed")
    # 8 MiB at 2 MB/s in frames of 64 KB or less: well over 128 of them.
    assert tracker.frames < 60
    sock.close()


def test_the_classic_filter_serves_where_the_kernel_refuses_ebpf(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(program: object) -> int:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(skipfilter.ebpf, "load", refused)

    def start() -> Watcher:
        return TapWatcher("tap0", GUEST_MAC, Tracker(guest_macs=[parse_mac(GUEST_MAC)]), SystemClock())

    with in_namespace(site.host, start) as watcher:
        assert watcher.capture == "classic: Operation not permitted"
        sock = site.connect()
        ask(sock, "/large")
        read_answer(sock)
        until(
            lambda: [c.responses for c in watcher.snapshot().connections] == [1], "the download is complete"
        )
        (view,) = watcher.snapshot().connections
        assert (view.state, view.gaps, view.verdict) == ("idle", 0, Verdict.SUITABLE)
        assert view.bytes_to_client > 8 << 20
        sock.close()


def test_without_the_privilege_for_ebpf_the_capture_falls_back_by_itself(site: Site) -> None:
    code = "from virtgrid.net.ring import PacketRing; print(PacketRing('tap0').capture)"
    less = "-bpf,-sys_admin,-perfmon"
    without = ["setpriv", "--bounding-set", less, "--inh-caps", less]
    told = subprocess.run(
        ["ip", "netns", "exec", site.host, *without, sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert told.stdout == "classic: Operation not permitted\n", told.stderr


def test_a_port_used_again_is_a_new_connection_and_nothing_of_it_is_left_out(
    site: Site, watcher: Watcher
) -> None:
    tracker: Tracker = watcher._tracker  # type: ignore[assignment]
    for number in range(3):
        sock = site.connect(port=40_077)
        ask(sock, "/large")
        # Ended in the middle of a body that is being skipped: by a reset, so the port is free at once.
        sock.recv(200_000)
        until(lambda: [c.state for c in watcher.snapshot().connections] == ["moving"], "the download runs")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NOW)
        sock.close()
        until(lambda: watcher.snapshot().total == 0, "the reset is seen")
        before = tracker.frames
        sock = site.connect(port=40_077)
        ask(sock, "/small")
        read_answer(sock)
        until(lambda: [c.responses for c in watcher.snapshot().connections] == [1], "the answer is seen")
        (view,) = watcher.snapshot().connections
        assert (view.state, view.gaps, view.verdict) == ("idle", 0, Verdict.SUITABLE), number
        assert tracker.frames - before >= 4
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NOW)
        sock.close()
        until(lambda: watcher.snapshot().total == 0, "the second reset is seen")


def test_a_vlan_tag_is_taken_off_by_the_kernel_and_the_frame_followed(reader: Reader) -> None:
    plain, tagged = Talk(Tracker()), Talk(Tracker(), vlan=7)
    for talk in (plain, tagged):
        talk.open().ask(get()).answer(response(3000) + b"x" * 3000)
    for frame, _ in tagged.sent:
        reader.send(frame)
    kept = reader.kept()
    assert kept == [frame for frame, _ in plain.sent]
