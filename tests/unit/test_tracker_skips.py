"""A capture that leaves out the inside of bodies tells the same story as one that leaves out nothing."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tracker_wire import Talk, get, response

from virtgrid.tracker.decode import FIN, RST, SYN, decode
from virtgrid.tracker.skips import SKIP_BYTES_MIN, Skip
from virtgrid.tracker.streams import HALF, MASK
from virtgrid.tracker.tracker import Change, Tracker
from virtgrid.tracker.views import Verdict

LARGE_BYTES = 700_000
KIB = 1 << 10


@dataclass
class Skipping:
    """What the kernel's filter does, before a tracker; every ``period``-th frame the two talk."""

    tracker: Tracker
    period: int = 1
    ranges: dict[bytes, list[int]] = field(default_factory=dict)
    frames: int = 0
    left_out: int = 0
    tells_progress: bool = True

    def feed(self, frame: bytes, wire_len: int, at_s: float) -> None:
        self.frames += 1
        if self._drops(frame, wire_len):
            self.left_out += 1
        else:
            self.tracker.feed(frame, wire_len, at_s)
        if self.frames % self.period == 0:
            self.talk(at_s)

    def talk(self, at_s: float) -> None:
        if self.tells_progress:
            for key, (_, _, reached) in list(self.ranges.items()):
                self.tracker.skipped(key, reached, at_s)
        for key, begin, end in self.tracker.skips():
            if begin == end:
                self.ranges.pop(key, None)
            else:
                self.ranges[key] = [begin, end, begin]

    def _drops(self, frame: bytes, wire_len: int) -> bool:
        segment = decode(frame, wire_len)
        assert segment is not None
        found = self.ranges.get(segment.key)
        if found is None or segment.flags & (SYN | FIN | RST) or not segment.length:
            return False
        begin, end, _ = found
        behind = (segment.seq + segment.length) & MASK
        if (behind - begin) & MASK > (end - begin) & MASK:
            return False
        found[2] = behind
        return True


class BothTalk(Talk):
    """A conversation captured twice: whole, and with bodies left out."""

    def __init__(self, *, server_seq: int = 5000, period: int = 1, tells_progress: bool = True) -> None:
        super().__init__(Tracker(large_bytes=LARGE_BYTES), server_seq=server_seq)
        self.skipping = Skipping(
            Tracker(large_bytes=LARGE_BYTES), period=period, tells_progress=tells_progress
        )

    def put(self, to_server: bool, seq: int, ack: int, flags: int, data: bytes = b"") -> Talk:
        one, wire_len = self.frame(to_server, seq, ack, flags, data)
        self.at_s += 1e-4
        self.tracker.feed(one, wire_len, self.at_s)
        self.skipping.feed(one, wire_len, self.at_s)
        return self


def story(changes: list[Change]) -> list[tuple[float, str, str]]:
    return [(round(c.at_s, 6), c.verdict, c.state) for c in changes]


def chunked(lengths: list[int]) -> bytes:
    body = b"".join(b"%x\r\n" % n + b"c" * n + b"\r\n" for n in lengths if n)
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + body + b"0\r\n\r\n"


LENGTHS = st.sampled_from([0, 100, 100 * KIB, SKIP_BYTES_MIN + 2, 300 * KIB, LARGE_BYTES, 1000 * KIB])


@settings(deadline=None)
@given(
    answers=st.lists(
        st.tuples(st.sampled_from(["counted", "chunked", "upload"]), LENGTHS, LENGTHS), max_size=4
    ),
    closes=st.booleans(),
    size=st.sampled_from([1448, 7000, 60_000]),
    server_seq=st.sampled_from([5000, MASK - 200 * KIB]),
    period=st.integers(1, 40),
)
def test_verdicts_and_their_times_are_those_of_a_whole_capture(
    answers: list[tuple[str, int, int]], closes: bool, size: int, server_seq: int, period: int
) -> None:
    talk = BothTalk(server_seq=server_seq, period=period)
    talk.open()
    for kind, length, more in answers:
        if kind == "upload":
            talk.ask(get("/x", "POST", f"Content-Length: {length}") + b"u" * length, size)
            talk.answer(response(0))
        elif kind == "counted":
            talk.ask(get()).answer(response(length) + b"b" * length, size)
        else:
            talk.ask(get()).answer(chunked([length, more]), size)
    if closes:
        talk.ask(get()).answer(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + b"z" * 1500 * KIB, size)
        talk.fin(to_server=False)
    talk.skipping.talk(talk.at_s)
    assert story(talk.tracker.changes()) == story(talk.skipping.tracker.changes())
    (whole,) = talk.tracker.snapshot(talk.at_s).connections
    (skipped,) = talk.skipping.tracker.snapshot(talk.at_s).connections
    assert whole == skipped


def test_of_a_long_body_little_is_seen() -> None:
    talk = BothTalk(period=10)
    talk.open().ask(get()).answer(response(4000 * KIB) + b"b" * 4000 * KIB)
    assert talk.skipping.left_out > 0.98 * talk.skipping.frames
    assert talk.skipping.tracker.snapshot(talk.at_s).connections[0].responses == 1


def test_the_progress_of_a_transfer_is_told_while_nothing_of_it_is_seen() -> None:
    talk = BothTalk(period=10**9)
    talk.open().ask(get()).answer(response(4000 * KIB))
    talk.answer(b"b" * 10_000)
    talk.skipping.talk(talk.at_s)
    for _ in range(5):
        talk.answer(b"b" * 500 * KIB)
        talk.skipping.talk(talk.at_s)
        (whole,) = talk.tracker.snapshot(talk.at_s).connections
        (skipped,) = talk.skipping.tracker.snapshot(talk.at_s).connections
        assert (skipped.reason, skipped.bytes_to_client) == (whole.reason, whole.bytes_to_client)
    assert talk.skipping.left_out > 1000


def test_without_word_of_the_progress_the_end_and_the_counts_are_right() -> None:
    talk = BothTalk(period=3, tells_progress=False)
    talk.open().ask(get()).answer(response(900 * KIB) + b"b" * 900 * KIB)
    (whole,) = talk.tracker.snapshot(talk.at_s).connections
    assert talk.skipping.tracker.snapshot(talk.at_s).connections == (whole,)
    assert whole.suitable


def test_short_bodies_and_those_before_their_first_byte_are_left_alone() -> None:
    tracker = Tracker()
    talk = Talk(tracker).open().ask(get())
    talk.answer(response(SKIP_BYTES_MIN))
    assert tracker.skips() == []
    talk = Talk(tracker, client_port=40_023).open()
    talk.ask(get("/x", "POST", "Content-Length: 900000", "Expect: 100-continue"))
    assert tracker.skips() == []


def test_a_connection_that_ends_takes_its_range_with_it() -> None:
    tracker = Tracker()
    talk = Talk(tracker).open().ask(get()).answer(response(900 * KIB) + b"b")
    (skip,) = tracker.skips()
    assert skip.end - skip.begin == 900 * KIB - 2
    talk.reset(to_server=False)
    assert tracker.skips() == [Skip(skip.key, 0, 0)]
    assert tracker.skips() == []


def test_a_body_longer_than_the_sequence_space_is_skipped_piece_by_piece() -> None:
    tracker = Tracker()
    talk = Talk(tracker).open().ask(get()).answer(response(9 << 30) + b"b")
    sent = 1
    (skip,) = tracker.skips()
    pieces = 0
    while sent < (9 << 30) - 1:
        size = (skip.end - skip.begin) & MASK
        assert 0 < size < HALF
        tracker.skipped(skip.key, skip.end, talk.at_s)
        sent += size
        pieces += 1
        told = tracker.skips()
        assert told[0] == Skip(skip.key, 0, 0)
        if len(told) > 1:
            skip = told[1]
    assert pieces > 4
    assert talk.view.bytes_to_client == sent + len(response(9 << 30))
    talk.server_seq = (skip.end) & MASK
    talk.answer(b"b")
    assert talk.view.state == "idle"


def test_frames_lost_end_the_skipping_and_silence_is_not_mistaken() -> None:
    tracker = Tracker()
    talk = Talk(tracker).open().ask(get()).answer(response(9000 * KIB) + b"b")
    (skip,) = tracker.skips()
    tracker.frames_lost(talk.at_s)
    talk.later(2.9)
    tracker.skipped(skip.key, (skip.begin + 1000) & MASK, talk.at_s)
    assert tracker.skips() == [Skip(skip.key, 0, 0)]
    talk.later(0.2)
    assert talk.view.verdict is Verdict.UNKNOWN


def test_word_of_a_connection_nobody_knows_is_ignored() -> None:
    tracker = Tracker()
    tracker.skipped(b"k" * 12, 7, 1.0)
    talk = Talk(tracker).open().ask(get())
    before = talk.view
    tracker.skipped(tracker_key(talk), 777, talk.at_s)
    assert talk.view == before


def tracker_key(talk: Talk) -> bytes:
    segment = decode(*talk.sent[-1])
    assert segment is not None
    return segment.reverse


@pytest.mark.parametrize("many", [5000])
def test_asking_stays_cheap_with_many_bodies_under_way(many: int) -> None:
    tracker = Tracker()
    for port in range(many):
        Talk(tracker, client_port=1024 + port).open().ask(get()).answer(response(900 * KIB))
    # None has begun its body: each call looks at a few.
    for _ in range(1000):
        assert tracker.skips() == []


@pytest.mark.parametrize("period", [1, 7])
def test_a_large_ftp_transfer_is_left_out_but_for_its_edges_and_judged_the_same(period: int) -> None:
    control = BothTalk(period=period)
    control.server_port = 21
    control.open().answer(b"220 ready\r\n")
    for command, reply in (("USER a", "331 pass"), ("PASS b", "230 in"), ("TYPE I", "200 binary")):
        control.ask(f"{command}\r\n".encode()).answer(f"{reply}\r\n".encode())
    control.ask(b"PASV\r\n").answer(b"227 Entering (10,0,0,1,200,1).\r\n")
    data = BothTalk()
    data.tracker, data.skipping = control.tracker, control.skipping
    data.client_port, data.server_port, data.at_s = 41_000, 200 << 8 | 1, control.at_s
    data.open()
    control.at_s = data.at_s
    control.ask(b"RETR big\r\n").answer(b"150 Opening (3000000 bytes).\r\n")
    data.at_s = control.at_s
    data.answer(b"d" * 3_000_000, 7000).fin(to_server=False).fin(to_server=True)
    control.at_s = data.at_s
    control.answer(b"226 done\r\n")
    control.skipping.talk(control.at_s)
    assert control.skipping.left_out > 200
    assert story(control.tracker.changes()) == story(control.skipping.tracker.changes())
    whole = control.tracker.snapshot(control.at_s).connections
    assert control.skipping.tracker.snapshot(control.at_s).connections == whole
    assert [(c.state, c.large_transfers) for c in whole] == [("idle", 1)]
