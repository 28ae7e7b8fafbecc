"""A block is its frames: whatever the traffic, fed together or one by one, nothing is different."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tracker_wire import GUEST_MAC, OTHER_MAC, get, ip_frame, response

from virtgrid.core.frames import FrameBlock, block_of
from virtgrid.tracker.columns import columns_of
from virtgrid.tracker.decode import ACK, FIN, RST, SYN, decode
from virtgrid.tracker.tracker import Tracker

SETTINGS = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
MASK = 0xFFFFFFFF
CHUNKED = "Transfer-Encoding: chunked"


@dataclass(frozen=True)
class Packet:
    """A frame to be: data, flags and numbers as its sender would have them."""

    ports: tuple[int, int]
    to_server: bool
    seq: int
    ack: int
    flags: int
    data: bytes = b""


@dataclass
class Ends:
    """A connection's addresses and ports; ``next``: sequence numbers, the client's at True."""

    six: bool
    by_guest: bool
    ports: tuple[int, int]
    next: dict[bool, int] = field(default_factory=dict)
    out: list[Packet] = field(default_factory=list)

    def put(self, to_server: bool, flags: int, data: bytes = b"") -> None:
        seq, ack = self.next[to_server], self.next[not to_server]
        self.out.append(Packet(self.ports, to_server, seq & MASK, ack & MASK, flags, data))
        self.next[to_server] = seq + len(data) + (1 if flags & (SYN | FIN) else 0)

    def say(self, to_server: bool, data: bytes, size: int, rng: Random) -> None:
        for at in range(0, len(data), size):
            self.put(to_server, ACK, data[at : at + size])
            if not rng.randint(0, 2):
                self.put(not to_server, ACK)


Row = tuple[float, int, bytes]

TLS = b"".join(b"\x17\x03\x03" + struct.pack("!H", n) + b"t" * n for n in (300, 2500, 1, 16_000))

answers = st.one_of(
    st.builds(lambda n: response(n) + b"d" * n, st.integers(0, 9000)),
    st.builds(
        lambda sizes: (
            response(None, "200 OK", CHUNKED)
            + b"".join(b"%x\r\n" % n + b"x" * n + b"\r\n" for n in sizes)
            + b"0\r\n\r\n"
        ),
        st.lists(st.integers(1, 4000), max_size=3),
    ),
    st.builds(lambda n: response(None) + b"c" * n, st.integers(0, 9000)),
    st.just(response(700, "304 Not Modified")),
    st.sampled_from([TLS, TLS + b"nothing known" * 200]),
    st.just(b""),
)
requests = st.one_of(
    st.just(get("/x")),
    st.just(get("/head", "HEAD")),
    st.builds(lambda n: get("/u", "POST", f"Content-Length: {n}") + b"u" * n, st.integers(0, 6000)),
    st.just(get("/e", "POST", "Content-Length: 3000", "Expect: 100-continue")),
    st.just(TLS),
    st.just(b"SSH-2.0-x\r\n"),
)
mail = st.sampled_from(
    [
        (25, [b"220 a ESMTP", b"EHLO b", b"250 a", b"DATA", b"354 go", b"x" * 5000 + b"\r\n.", b"250 ok"]),
        (110, [b"+OK POP3", b"STAT", b"+OK 1 5000", b"RETR 1", b"+OK 5000\r\n" + b"y" * 5000 + b"\r\n."]),
        (143, [b"* OK IMAP4", b"a FETCH 1 BODY[]", b"* 1 FETCH {4000}\r\n" + b"z" * 4000 + b")\r\na OK"]),
    ]
)


@st.composite
def traffic(draw: st.DrawFn) -> list[Row]:
    """Some connections' frames, interleaved, with what networks and captures do to them."""
    rng = Random(draw(st.integers(0, 1 << 32)))
    count = draw(st.integers(1, 4))
    ends = []
    for number in range(count):
        near = draw(st.sampled_from([1000, MASK - 2000]))
        one = Ends(
            draw(st.booleans()), draw(st.booleans()), (40000 + number, 80), {True: near, False: near + 7000}
        )
        ends.append(one)
        draw(st.sampled_from([web, web, letters, files]))(draw, rng, one)
        for _ in range(draw(st.sampled_from([0, 0, 1, 3]))):
            spoil(draw(st.integers(0, 3)), rng, one.out)
    pauses = draw(
        st.sampled_from([[0.0, 0.001], [0.0, 0.01, -0.5, 1.0], [0.0, 0.0, 1.0, 3.0, 6.0, 31.0, 61.0]])
    )
    snaps = draw(st.sampled_from([[1 << 17], [1 << 17, 300, 60], [400]]))
    return woven(ends, pauses, snaps, rng)


def woven(ends: list[Ends], pauses: list[float], snaps: list[int], rng: Random) -> list[Row]:
    """The packets of some connections as frames, each connection's in their order."""
    rows: list[Row] = []
    at_s = 100.0
    packets = [one.out for one in ends]
    todo = [conn for conn in range(len(ends)) if packets[conn]]
    while todo:
        conn = rng.choice(todo)
        for _ in range(rng.randint(1, 8)):
            if not packets[conn]:
                todo.remove(conn)
                break
            at_s += rng.choice(pauses)
            frame = framed(packets[conn].pop(0), ends[conn], rng)
            rows.append((at_s, len(frame), frame[: rng.choice(snaps)]))
    return rows


def web(draw: st.DrawFn, rng: Random, ends: Ends) -> None:
    size = draw(st.sampled_from([100, 1448, 60_000]))
    for _ in range(draw(st.integers(1, 2))):
        if draw(st.integers(0, 4)):
            ends.put(True, SYN)
            ends.put(False, SYN | ACK)
        for _ in range(draw(st.integers(0, 4))):
            ends.say(True, draw(requests), size, rng)
            ends.say(False, draw(answers), size, rng)
        for _ in range(draw(st.integers(0, 2))):
            ends.put(draw(st.booleans()), draw(st.sampled_from([FIN | ACK, RST | ACK, RST, ACK, 0])))


def letters(draw: st.DrawFn, rng: Random, ends: Ends) -> None:
    port, lines = draw(mail)
    ends.ports = (ends.ports[0], port)
    ends.put(True, SYN)
    ends.put(False, SYN | ACK)
    for number, line in enumerate(lines):
        ends.say(bool(number & 1), line + b"\r\n", draw(st.sampled_from([700, 1448])), rng)


def files(draw: st.DrawFn, rng: Random, ends: Ends) -> None:
    """A control connection, and data connections that begin before or behind the answer to RETR."""
    ends.ports = (ends.ports[0], 21)
    ends.put(True, SYN)
    ends.put(False, SYN | ACK)
    ends.say(False, b"220 FTP\r\n", 1448, rng)
    for number in range(draw(st.integers(1, 2))):
        ends.say(True, b"EPSV\r\n", 1448, rng)
        ends.say(False, b"229 Passive (|||%d|)\r\n" % (50000 + number), 1448, rng)
        data = Ends(
            ends.six, ends.by_guest, (ends.ports[0], 50000 + number), {True: 5, False: MASK - 900}, ends.out
        )
        data.put(True, SYN)
        data.put(False, SYN | ACK)
        ends.say(True, b"RETR a\r\n", 1448, rng)
        begin = len(ends.out)
        ends.say(False, b"150 Opening (%d bytes)\r\n" % draw(st.sampled_from([9000, 90])), 1448, rng)
        before = ends.out[begin:]
        del ends.out[begin:]
        data.say(False, b"f" * 9000, draw(st.sampled_from([1448, 60_000])), rng)
        middle = rng.randint(begin, len(ends.out))
        ends.out[middle:middle] = before
        data.put(False, FIN | ACK)
        data.put(True, FIN | ACK)
        ends.say(False, b"226 Done\r\n", 1448, rng)


def spoil(how: int, rng: Random, out: list[Packet]) -> None:
    """Lose, repeat or move packets, or repeat some bytes of one."""
    if not out:
        return
    at = rng.randrange(len(out))
    one = out[at]
    match how:
        case 0:
            del out[at : at + rng.randint(1, 3)]
        case 1:
            out.insert(min(len(out), at + rng.randint(0, 5)), one)
        case 2:
            del out[at]
            out.insert(min(len(out), at + rng.randint(0, 5)), one)
        case 3:
            out.insert(at, replace(one, seq=(one.seq - 50) & MASK, data=b"r" * 50 + one.data))


def framed(packet: Packet, ends: Ends, rng: Random) -> bytes:
    client, server = ("fd00::9", "fd00::1") if ends.six else ("10.0.0.9", "10.0.0.1")
    ports = packet.ports
    if not packet.to_server:
        client, server, ports = server, client, ports[::-1]
    options = b"\x01\x01\x08\x0a" + bytes(8) if packet.ports[0] & 1 else b""
    word = (5 + len(options) // 4) << 12 | packet.flags
    tcp = struct.pack("!HHIIHHHH", *ports, packet.seq, packet.ack, word, 65535, 0, 0) + options
    kind = rng.randint(0, 60)
    if kind == 0:
        return OTHER_MAC + GUEST_MAC + b"\x08\x06" + bytes(28)
    if kind == 1:
        return OTHER_MAC + OTHER_MAC + b"\x08\x00\x45" + bytes(40)
    macs = OTHER_MAC + GUEST_MAC if packet.to_server == ends.by_guest else GUEST_MAC + OTHER_MAC
    whole = ip_frame(
        client,
        server,
        tcp,
        payload_on_wire=len(packet.data),
        vlan=7 if kind == 2 else None,
        offload=kind == 3,
    )
    return macs + whole + packet.data


class Recording(Tracker):
    """A tracker that keeps what has gone. tells: as the tracker's."""

    def __init__(self, tells: bool = True, **options: Any) -> None:
        super().__init__(**options)
        self.tells = tells
        self.gone: list[tuple[Any, ...]] = []

    def closed(self, conn: Any, reason: str) -> None:
        self.gone.append((self._view(conn, conn.last_s), reason))


def everything(tracker: Recording) -> dict[str, Any]:
    """All there is to see of a tracker, and of its streams' insides."""
    streams = {}
    for key, stream in tracker.streams.items():
        streams[key] = [
            getattr(stream, name)
            for name in (
                "acked", "begin", "fin", "fin_done", "large", "mode", "need", "nxt", "position",
                "seen", "total", "waiting", "waiting_bytes", "waiting_since_s", "buf",
                "pops", "more", "in_more", "until", "upto", "line_checked",
            )
        ]  # fmt: skip
        streams[key] += [
            stream.conn.last_s,
            stream.conn.timer_s,
            stream.conn.state,
            stream.conn.dirty,
            stream.conn.client_last,
            stream.conn.owner is None,
            [(e.word, e.line, e.end, e.awaits, e.since_s) for e in stream.conn.queue],
            (stream.conn.requests, stream.conn.responses, stream.conn.gaps, stream.conn.large_transfers),
            (stream.conn.verdict, stream.conn.since_s, stream.conn.lost_busy, stream.exchange is None),
        ]
    return {
        "changes": tracker.changes(),
        "gone": tracker.gone,
        "streams": streams,
        "unsuitable": tracker.unsuitable,
        "history": (tracker._unsuitable.times, tracker._unsuitable.counts),
        "counts": (tracker.frames, tracker.segments, tracker.total),
        "ports": tracker.server_ports,
        "now": tracker.now_s,
    }


#: The rest of a frame that was cut. What it was is not known; this has ends and heads in it.
_REST = b"\r\n0\r\n\r\n\r\n.\r\nHTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n" * 2000


def assert_equal(
    rows: list[Row], rests: list[bool], sizes: list[int], options: dict[str, Any], before: int = 0
) -> None:
    """rests: the frames, if they were cut, of which the rest is to be had.

    before: so many of the rows another tracker has seen, and handed over what it knew.
    """
    one_by_one, together = Recording(**options), Recording(**options)
    if before:
        first = Recording(**options)
        for at_s, wire_len, data in rows[:before]:
            first.feed(data, wire_len, at_s)
        state = first.export_state(first.now_s)
        for tracker in (one_by_one, together):
            tracker.import_state(state, first.now_s, unwatched=bool(before & 1))
    at = before
    with pytest.MonkeyPatch.context() as patched:
        # Short blocks are fed frame by frame; here they show what long ones would.
        patched.setattr("virtgrid.tracker.tracker._FEW_FRAMES", 1)
        compare(rows, rests, sizes, one_by_one, together, at)


def whole_of(rows: list[Row], rests: list[bool]) -> Callable[[int], memoryview]:
    """What a block calls its ``whole``: asked in the frames' order, once for each."""
    asked = [-1]

    def whole(index: int) -> memoryview:
        assert index > asked[-1]
        asked.append(index)
        _, wire_len, data = rows[index]
        return memoryview(data + _REST[: wire_len - len(data)] if rests[index] else b"")

    return whole


def compare(
    rows: list[Row], rests: list[bool], sizes: list[int], one_by_one: Recording, together: Recording, at: int
) -> None:
    while at < len(rows):
        for size in sizes:
            part, to_be_had = rows[at : at + size], rests[at : at + size]
            for (at_s, wire_len, data), had in zip(part, to_be_had, strict=True):
                rest = _REST[: wire_len - len(data)] if had else b""
                one_by_one.feed(data, wire_len, at_s, partial(bytes, rest) if rest else None)
            whole = whole_of(part, to_be_had) if any(to_be_had) else None
            together.feed_block(replace(block_of(part), whole=whole))
            assert everything(together) == everything(one_by_one)
            at += size
    end_s = one_by_one.now_s + 1000
    assert together.snapshot(end_s) == one_by_one.snapshot(end_s)
    assert everything(together) == everything(one_by_one)


@SETTINGS
@given(
    rows=traffic(),
    sizes=st.lists(st.sampled_from([1, 3, 10, 1000]), min_size=1, max_size=3),
    large_bytes=st.sampled_from([1, 500, 3000, 4 << 20]),
    mine=st.booleans(),
    outgoing=st.booleans(),
    room=st.sampled_from([2, 1000]),
    data=st.data(),
)
def test_frames_fed_together_do_what_they_do_one_by_one(
    rows: list[Row],
    sizes: list[int],
    large_bytes: int,
    mine: bool,
    outgoing: bool,
    room: int,
    data: st.DataObject,
) -> None:
    marked = data.draw(st.sets(st.integers(0, max(0, len(rows) - 1)), max_size=20))
    options = {
        "large_bytes": large_bytes,
        "count_outgoing": outgoing,
        "connections_max": room,
        "guest_macs": [GUEST_MAC] if mine else None,
        "tells": data.draw(st.booleans()),
    }
    before = data.draw(st.sampled_from([0, 0, 0, len(rows) // 3]))
    assert_equal(rows, [number in marked for number in range(len(rows))], sizes, options, before)


@pytest.mark.parametrize("six", [False, True])
def test_a_connection_with_itself_is_no_trouble(six: bool) -> None:
    address = "fd00::1" if six else "10.0.0.1"
    rows: list[Row] = []
    for number, (flags, data) in enumerate([(SYN, b""), (ACK, b"x" * 20), (ACK, b""), (ACK, b"y" * 20)]):
        tcp = struct.pack("!HHIIHHHH", 80, 80, number * 20, 0, 0x5000 | flags, 0, 0, 0)
        frame = GUEST_MAC + OTHER_MAC + ip_frame(address, address, tcp, payload_on_wire=len(data)) + data
        rows.append((float(number), len(frame), frame))
    assert_equal(rows, [False] * 4, [4], {})


_ETHERNET = OTHER_MAC + GUEST_MAC
kinds = st.sampled_from(
    [b"\x08\x00\x45", b"\x08\x00\x46", b"\x86\xdd\x60", b"\x81\x00\x00\x01\x08\x00\x45", b""]
)


@SETTINGS
@given(
    parts=st.lists(
        st.tuples(
            kinds,
            st.binary(max_size=120),
            st.sampled_from([None, (6, 9), (6, 6), (0, 6), (44, 6)]),
            st.integers(-5, 200),
        ),
        max_size=20,
    ),
    macs=st.sampled_from([None, [GUEST_MAC], [bytes(6), OTHER_MAC], [b"\xff" * 6]]),
)
def test_the_headers_of_a_block_are_those_of_its_frames(
    parts: list[tuple[bytes, bytes, tuple[int, int] | None, int]], macs: list[bytes] | None
) -> None:
    rows: list[Row] = []
    for kind, rest, proto, more in parts:
        body = bytearray(_ETHERNET + kind + rest)
        if proto and len(body) > 14 + proto[1]:
            body[14 + proto[1]] = proto[0]
            if kind[:2] == b"\x08\x00" and len(body) > 22:
                body[16:18] = struct.pack("!H", max(0, len(body) - 14 + more % 7 - 3))
                body[20:22] = b"\x40\x00" if more % 3 else b"\x20\x01"
        rows.append((0.0, max(len(body), len(body) + more), bytes(body)))
    block: FrameBlock = block_of(rows)
    found = columns_of(block, None if macs is None else frozenset(macs))
    expected = {
        number: segment
        for number, (_, wire_len, data) in enumerate(rows)
        if (macs is None or data[:6] in macs or data[6:12] in macs)
        and (segment := decode(data, wire_len)) is not None
    }
    assert found.index.tolist() == list(expected)
    for at, (number, segment) in enumerate(expected.items()):
        numbers = (int(column[at]) for column in (found.seq, found.ack, found.flags, found.length))
        assert (bytes(found.keys[at]), *numbers) == (
            segment.key, segment.seq, segment.ack, segment.flags, segment.length,
        )  # fmt: skip
        if number in found.slow:
            assert found.slow[number] == segment
        else:
            assert bytes(block.buffer[int(found.start[at]) : int(found.end[at])]) == segment.payload
