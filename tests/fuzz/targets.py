"""What is fuzzed: functions of bytes that fail when the tracker breaks a promise.

The promises: no exception but RefusedError where it is documented, no verdict that contradicts
itself, nothing kept beyond its bound, and nobody who certainly waits is called suitable. The same
functions serve hypothesis (tests/property/test_tracker_robust.py) and atheris (run.py).
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Final

from checker import claims, clocked, errors
from tracker_wire import ip_frame

from virtgrid.core.errors import RefusedError
from virtgrid.core.frames import block_of
from virtgrid.tracker.decode import ACK, FIN, RST, SYN, decode, endpoints
from virtgrid.tracker.definition import builtin, parse
from virtgrid.tracker.patterns import PatternError, compile_pattern
from virtgrid.tracker.pcap import Frame, read_frames
from virtgrid.tracker.replay import replay
from virtgrid.tracker.rules import Kind, Pause
from virtgrid.tracker.tracker import Tracker

LARGE_BYTES: Final = 4096
FRAMES_MAX: Final = 400
#: Beyond one connection's greatest buffers: a head of 64 KiB and a frame of 64 KiB.
BUFFER_MAX: Final = 160 << 10
#: Suitable as soon as nothing is outstanding: behind a silence that is asked for faults would hide.
EAGER: Final = [replace(d, pauses={**d.pauses, "idle": Pause(Kind.OK)}) for d in builtin()]
PORTS: Final = (80, 21, 25, 110, 143, 443, 9999, 80)

# What the protocols are made of, so that a fuzzer need not find the words.
WORDS: Final = (
    b"GET /x HTTP/1.1\r\n", b"HEAD /x HTTP/1.1\r\n\r\n", b"POST /x HTTP/1.1\r\nContent-Length: 9\r\n\r\n",
    b"CONNECT h:1 HTTP/1.1\r\n\r\n", b"Transfer-Encoding: chunked\r\n", b"Content-Length: 5000\r\n",
    b"Expect: 100-continue\r\n", b"Upgrade: websocket\r\n", b"\r\n", b"5\r\nabcde\r\n", b"0\r\n\r\n",
    b"ffff\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc", b"HTTP/1.1 100 Continue\r\n\r\n",
    b"HTTP/1.1 204 No\r\n\r\n", b"HTTP/1.1 101 Go\r\n\r\n", b"HTTP/1.0 200 OK\r\n\r\n",
    b"HTTP/1.1 200 OK\r\n", b"GET /y HTTP/1.0\r\n\r\n", b"220 hi\r\n", b"220-a\r\n", b"USER a\r\n",
    b"331 x\r\n", b"PASS b\r\n", b"230 in\r\n", b"PASV\r\n", b"QUIT\r\n", b"227 (10,0,0,1,39,15)\r\n",
    b"RETR f\r\n", b"150 go (9000 bytes)\r\n", b"226 done\r\n", b"EPSV\r\n", b"229 (|||9999|)\r\n",
    b"PORT 10,0,0,9,39,15\r\n", b"200 ok\r\n", b"STOR f\r\n", b"AUTH TLS\r\n", b"234 go\r\n", b"EHLO a\r\n",
    b"250-X\r\n", b"250 ok\r\n", b"MAIL FROM:<a> SIZE=9000\r\n", b"DATA\r\n", b"354 go\r\n", b".\r\n",
    b"\r\n.\r\n", b"BDAT 5 LAST\r\nabcde", b"BDAT 9000\r\n", b"STARTTLS\r\n", b"220 go\r\n",
    b"AUTH LOGIN\r\n", b"334 x\r\n", b"235 in\r\n", b"RSET\r\n", b"421 bye\r\n", b"503 no\r\n",
    b"+OK hi\r\n", b"-ERR no\r\n", b"LIST\r\n", b"1 9000\r\n", b"RETR 1\r\n", b"+OK 9000 octets\r\n",
    b"STAT\r\n", b"+OK 2 9000\r\n", b"STLS\r\n", b"TOP 1 0\r\n", b"CAPA\r\n", b"AUTH\r\n", b"+ x\r\n",
    b"* OK hi\r\n", b"a LOGIN b c\r\n", b"a OK\r\n", b"b NOOP\r\n", b"b OK\r\n",
    b"* 1 FETCH (X {5}\r\nabcde)\r\n", b"c APPEND x {5}\r\n", b"abcde\r\n", b"c APPEND x {5+}\r\nabcde\r\n",
    b"d IDLE\r\n", b"+ idling\r\n", b"DONE\r\n", b"d OK\r\n", b"e AUTHENTICATE PLAIN\r\n", b"e OK\r\n",
    b"c OK\r\n", b"f STARTTLS\r\n", b"f OK\r\n", b"* BYE\r\n", b"{9000}\r\n", b"x" * 5000,
    b"\x16\x03\x01\x00\x05abcde", b"\x17\x03\x03@\x00", b"\x05\x01\x00", b"\xff\xf4",
    b"HTTP/1.1 400 Bad\r\nContent-Length: 0\r\n\r\n", b"x",
)  # fmt: skip


class Bytes:
    """Takes numbers out of the fuzzer's bytes, from the front."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def __bool__(self) -> bool:
        return self.at < len(self.data)

    def byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1] if self.at <= len(self.data) else 0

    def take(self, count: int) -> bytes:
        self.at += count
        return self.data[self.at - count : self.at]


class Line:
    """One of the connections of a story, with the sequence numbers both sides have come to."""

    def __init__(self, number: int, port: int) -> None:
        self.client_port = 40000 + number
        self.port = port
        self.seq = {True: 0xFFFFF000 + number * 7919, False: 5000 + number}

    def frame(self, up: bool, seq: int, flags: int, data: bytes, wire: int, ack: int | None = None) -> bytes:
        ports = (self.client_port, self.port) if up else (self.port, self.client_port)
        hosts = ("10.0.0.9", "10.0.0.1") if up else ("10.0.0.1", "10.0.0.9")
        ack = self.seq[not up] if ack is None else ack
        tcp = struct.pack("!HHIIHHHH", *ports, seq & 0xFFFFFFFF, ack & 0xFFFFFFFF, 0x5000 | flags, 9, 0, 0)
        return bytes(12) + ip_frame(*hosts, tcp, payload_on_wire=wire) + data


def story(data: bytes, *, honest: bool = False) -> list[Frame]:
    """Frames of a few connections, as the bytes tell. honest: nothing is cut, reordered or made up."""
    take = Bytes(data)
    out: list[Frame] = []
    lines: dict[int, Line] = {}
    now_s = 1.0

    def send(frame: bytes, wire: int = 0) -> None:
        out.append(Frame(now_s, len(frame) + wire, frame))

    while take and len(out) < FRAMES_MAX:
        op = take.byte()
        up, kind, number = bool(op & 1), op >> 1 & 15, op >> 5
        line = lines.get(number)
        if line is None:
            line = lines[number] = Line(number, PORTS[number])
            if honest or kind != 15:
                send(line.frame(True, line.seq[True] - 1, SYN, b"", 0, 0))
                send(line.frame(False, line.seq[False] - 1, SYN | ACK, b"", 0))
        seq = line.seq[up]
        if kind <= 7 or (honest and kind <= 10):
            word = b"".join(WORDS[take.byte() % len(WORDS)] for _ in range(1 + kind % 3))
        elif kind == 8:
            word = take.take(take.byte())
        else:
            word = b""
        if word:
            step = (len(word), 1, 7, 60_000)[kind % 4] if len(word) < 300 else len(word)
            for at in range(0, len(word), step):
                part = word[at : at + step]
                send(line.frame(up, seq + at, ACK, part, len(part)))
            line.seq[up] += len(word)
        elif kind == 9 and not honest:  # from anywhere: a hole, an overlap, another copy
            word = WORDS[take.byte() % len(WORDS)]
            offset = struct.unpack("!h", take.take(2).ljust(2, b"\0"))[0]
            send(line.frame(up, seq + offset, ACK, word, len(word)))
            if offset >= 0:
                line.seq[up] += offset + len(word)
        elif kind == 10 and not honest:  # cut by the snap length
            word, more = WORDS[take.byte() % len(WORDS)], take.byte() * 17
            send(line.frame(up, seq, ACK, word, len(word) + more), more)
            line.seq[up] += len(word) + more
        elif kind == 11:
            now_s += 0.01 * 2.0 ** (take.byte() % 16)
        elif kind == 12:
            send(
                line.frame(
                    up, seq, (FIN | ACK, RST, SYN, SYN | ACK)[take.byte() % (1 if honest else 4)], b"", 0
                )
            )
        elif kind == 13 and not honest:  # an acknowledgement of what may not have been sent
            send(
                line.frame(
                    up,
                    seq,
                    ACK,
                    b"x",
                    1,
                    line.seq[not up] + struct.unpack("!h", take.take(2).ljust(2, b"\0"))[0],
                )
            )
            line.seq[up] += 1
        elif kind == 14:
            lines.pop(number)
    return out


def check_bounds(tracker: Tracker) -> None:
    """Nothing that one connection, or all, make the tracker keep is beyond its bound."""
    assert len(tracker.streams) == 2 * tracker.total
    assert len(tracker._machine.expected) <= 1 << 16
    assert len(tracker._changes) <= 1 << 16
    assert len(tracker._unsuitable.times) <= 1 << 17
    assert len(tracker.timers) <= 1025 + 2 * tracker.total
    for conn in tracker.connections:
        assert len(conn.queue) <= 4097
        assert len(conn.expects) <= 4
        assert len(conn.hello) <= 512
        for stream in (conn.client, conn.server):
            waiting = stream.waiting or {}
            assert len(waiting) <= 257
            assert stream.waiting_bytes == sum(len(data) for _, data in waiting.values())
            assert stream.waiting_bytes <= (1 << 20) + (64 << 10)
            assert len(stream.buf) <= BUFFER_MAX
            assert stream.need >= 0
            assert stream.position >= 0


def check_verdicts(tracker: Tracker, now_s: float) -> None:
    """The snapshot, the count and the reasons agree."""
    snapshot = tracker.snapshot(now_s)
    assert snapshot.unsuitable == tracker.unsuitable
    assert snapshot.total == tracker.total
    assert all(c.reason.isprintable() for c in snapshot.connections)
    assert all(c.bytes_to_client >= 0 and c.bytes_to_server >= 0 for c in snapshot.connections)


def missing(frame: Frame) -> bytes:
    """The rest of a frame that was cut; what it was is not known, this has ends and heads in it."""
    return (b"\r\n0\r\n\r\n\r\n.\r\nGET / HTTP/1.1\r\n\r\n" * 400)[: frame.wire_len - len(frame.data)]


def tracker(data: bytes) -> None:
    """Any order of any segments, frames lost in between, the state carried over at some moment."""
    if not data:
        return
    follows = Tracker(large_bytes=LARGE_BYTES)
    frames = story(data[1:])
    now_s = 1.0
    for number, frame in enumerate(frames, start=1):
        rest = missing(frame) if number % 3 == 0 else b""
        follows.feed(frame.data, frame.wire_len, frame.at_s, partial(bytes, rest) if rest else None)
        now_s = frame.at_s
        if number % 31 == data[0] % 31:
            follows.frames_lost(now_s)
        if number == data[0]:
            other = Tracker(large_bytes=LARGE_BYTES)
            known = follows.export_state(now_s)
            assert other.import_state(known, now_s, unwatched=bool(data[0] & 1)) == follows.total
            follows = other
        if number % 16 == 0:
            check_bounds(follows)
    check_bounds(follows)
    check_verdicts(follows, now_s)
    times = [c.at_s for c in follows.changes()]
    assert times == sorted(times)
    check_verdicts(follows, now_s + 1e6)


def blocks(data: bytes) -> None:
    """Frames fed together do what they do one by one."""
    size = 1 + (data[0] if data else 0)
    frames = story(data[1:])
    alone, together = Tracker(large_bytes=LARGE_BYTES), Tracker(large_bytes=LARGE_BYTES)
    for at in range(0, len(frames), size):
        part = frames[at : at + size]
        for frame in part:
            rest = missing(frame)
            alone.feed(frame.data, frame.wire_len, frame.at_s, partial(bytes, rest) if rest else None)
        wholes = [memoryview(frame.data + missing(frame)) for frame in part]
        block = block_of((f.at_s, f.wire_len, f.data) for f in part)
        together.feed_block(replace(block, whole=wholes.__getitem__))
        assert together.unsuitable == alone.unsuitable
    assert together.changes() == alone.changes()
    end_s = 1e3 + (frames[-1].at_s if frames else 0.0)
    assert together.snapshot(end_s) == alone.snapshot(end_s)
    assert together.changes() == alone.changes()


def waiting(data: bytes) -> None:
    """Whoever certainly waits is never called suitable: the independent checker over any story."""
    if not data:
        return
    frames = clocked(story(data[1:], honest=bool(data[0] & 1)))
    lines: dict[tuple[str, str], list] = {}  # type: ignore[type-arg]
    for connection in replay(frames, EAGER, large_bytes=LARGE_BYTES):
        lines.setdefault((connection.view.client, connection.view.server), []).extend(connection.timeline)
    for line in lines.values():
        line.sort(key=lambda change: change.at_s)
    found = errors(claims(frames, LARGE_BYTES), lines)
    assert not found, found[0]


def frames(data: bytes) -> None:
    """Any bytes as a frame, with any length on the wire."""
    wire_len = len(data) + (data[0] if data else 0)
    for frame in (data, bytes(12) + b"\x08\x00E" + data, bytes(12) + b"\x86\xdd`" + data):
        segment = decode(frame, max(wire_len, len(frame)))
        if segment is not None:
            assert 0 <= segment.length <= max(wire_len, len(frame))
            assert len(segment.payload) <= segment.length
            assert endpoints(segment.key) == endpoints(segment.reverse)[::-1]
        follows = Tracker()
        follows.feed(frame, max(wire_len, len(frame)), 1.0)
        check_bounds(follows)


_PCAP: Final = (
    b"\xd4\xc3\xb2\xa1" + struct.pack("<HHIIII", 2, 4, 0, 0, 65535, 1),
    b"\x0a\x0d\x0d\x0a" + struct.pack("<IIHHqI", 28, 0x1A2B3C4D, 1, 0, -1, 28)
    + struct.pack("<IIHHII", 1, 20, 1, 0, 0, 20),
)  # fmt: skip


def capture(data: bytes) -> None:
    """Any bytes as a capture file."""
    for file in (data, _PCAP[0] + data, _PCAP[1] + data):
        seen = kept = 0
        try:
            for frame in read_frames(io.BytesIO(file), "f", damaged=lambda text: None):
                seen += 1
                kept += len(frame.data)
                assert frame.wire_len >= len(frame.data)
        except RefusedError:
            continue
        # A record has a head of at least twelve bytes.
        assert seen <= len(file) / 12 + 1
        assert kept <= len(file) + 14 * seen


_HEADS: Final = (
    "", "protocol x\n", "protocol x\nunit line max 1KiB\ncase ignore\ngreeting\ndetect server /^a/\n"
    "pause new hold 5s\npause idle ok\npause busy hold\npause moving ok\npause opaque quiet 2s\n"
    "client /^a/ -> push a\nserver /^a/ -> pop\n",
)  # fmt: skip


def definition(data: bytes) -> None:
    """Any text as a definition; one that is accepted is played."""
    text = data.decode("latin-1")
    for head in _HEADS:
        try:
            made = parse(head + text, "f.pdl")
        except RefusedError as error:
            if not error.what.startswith("f.pdl:"):
                raise
            continue
        follows = Tracker([made], large_bytes=LARGE_BYTES)
        for frame in story(bytes(range(1, 250)))[:60]:
            follows.feed(frame.data, frame.wire_len, frame.at_s)
        check_bounds(follows)


def pattern(data: bytes) -> None:
    """Any text as a pattern; one that is accepted matches in linear time."""
    text = data.decode("latin-1")
    try:
        made = compile_pattern(text)
    except PatternError:
        return
    for word in (data * 20, b"a" * 5000, b"0" * 5000, b" " * 5000, b"ab0 " * 1000):
        made.match(word[:5000])


def state(data: bytes) -> None:
    """Any bytes as another tracker's state; what is taken over is followed."""
    follows = Tracker(large_bytes=LARGE_BYTES)
    try:
        follows.import_state(data, 10.0, unwatched=len(data) % 2 == 1)
    except RefusedError:
        return
    check_bounds(follows)
    for frame in story(bytes(range(1, 250)))[:40]:
        follows.feed(frame.data, frame.wire_len, frame.at_s + 10)
    check_bounds(follows)
    check_verdicts(follows, 1e6)


TARGETS: Final[dict[str, Callable[[bytes], None]]] = {
    f.__name__: f for f in (tracker, blocks, waiting, frames, capture, definition, pattern, state)
}


def seeds(name: str) -> Iterable[bytes]:
    """Where a fuzzer may begin."""
    if name in ("tracker", "blocks", "waiting"):
        for number in range(7):
            yield bytes([0, *(b for word in range(0, 60) for b in (number << 5 | word % 2, word))])
    elif name == "definition":
        yield b"server more /^[a-z]+ (?P<n>[0-9]{1,9})$/ -> add n ; more\n"
    elif name == "pattern":
        yield b"^(?P<tag>[^ ]{1,64}) +(?:OK|NO)\\b"
    elif name == "state":
        follows = Tracker()
        for frame in story(bytes(range(1, 250)))[:200]:
            follows.feed(frame.data, frame.wire_len, frame.at_s)
        yield follows.export_state(1.0)
    else:
        yield from (f.data for f in story(bytes(range(64))))
