"""One direction of a TCP connection: bytes in sequence order, each exactly once.

Retransmissions and overlaps are dropped (the first copy of a byte wins, as in most receivers),
reordered segments wait, bounded, and a hole is stepped over in three cases: the reader does not
need the bytes (the inside of a body is arithmetic), the receiver has acknowledged them (so they
were sent and the capture missed them), or too much is waiting behind it. The last two are gaps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from virtgrid.tracker.connection import Connection, Exchange
    from virtgrid.tracker.rules import Choice

MASK: Final = 0xFFFFFFFF
HALF: Final = 0x80000000
UNKNOWN: Final = -1
WAITING_SEGMENTS_MAX: Final = 256
WAITING_BYTES_MAX: Final = 1 << 20
#: A hole larger than any TCP window is a frame that does not belong here.
HOLE_MAX: Final = 1 << 30

# How the bytes that come next are read. HEAD: collecting a message's head. COUNTED: a body of
# known length. CHUNK_SIZE, CHUNK, TRAILER: the parts of a chunked body. CLOSE: a body until the
# connection ends. EITHER: a body that was announced, or, because the answer came before it, the
# next head. UNTIL: a body that ends with given bytes. PENDING: the client has asked for leave to send
# and waits for it; LINE: it has leave to send one line. RECORD: a TLS record's header. BLIND: inside a
# body (chunked, until) whose end may be among bytes that were not captured. LOST: anywhere.
(HEAD, COUNTED, CHUNK_SIZE, CHUNK, TRAILER, CLOSE, EITHER, UNTIL, PENDING, LINE, RECORD, BLIND, LOST) = range(
    13
)
_STEP_OVER: Final = frozenset({CLOSE, BLIND, LOST})


class Stream:
    """One direction and the place of its reader.

    nxt: the sequence number expected next, or UNKNOWN. need: bytes of the body (or chunk) left.
    seen, total: of the present body, bytes so far and the announced length (UNKNOWN: none).
    position: payload so far; captured or stepped over. until: what ends the body (UNTIL, BLIND).
    ask: how the client goes on once it has leave (PENDING), ask_bytes: for so many bytes. more: the
    message goes on behind its body; in_more: that part is what comes next; upto: the lines up to one
    that begins so are all one message. pops: the message answers its exchange.
    """

    __slots__ = (
        "acked", "ask", "ask_bytes", "begin", "buf", "conn", "exchange", "fin", "fin_done", "imported",
        "in_more", "key",
        "large", "line_checked", "mode", "more", "need", "nxt", "peer", "pops", "position", "resume", "seen",
        "to_server", "total", "until", "upto", "waiting", "waiting_bytes", "waiting_since_s",
    )  # fmt: skip

    conn: Connection
    peer: Stream

    def __init__(self, key: bytes, to_server: bool) -> None:
        self.key = key
        self.to_server = to_server
        self.nxt = UNKNOWN
        self.begin = UNKNOWN
        self.acked = UNKNOWN
        self.fin = UNKNOWN
        self.fin_done = False
        self.position = 0
        self.mode = HEAD
        self.need = 0
        self.seen = 0
        self.total = UNKNOWN
        self.large = False
        self.buf = bytearray()
        self.line_checked = False
        self.resume = COUNTED
        self.exchange: Exchange | None = None
        self.pops = self.more = self.in_more = self.imported = False
        self.upto = self.until = b""
        self.ask: Choice | None = None
        self.ask_bytes = 0
        self.waiting: dict[int, tuple[int, bytes]] | None = None
        self.waiting_bytes = 0
        self.waiting_since_s = 0.0


class Reader(Protocol):
    """What takes the ordered bytes."""

    def deliver(self, stream: Stream, data: bytes, length: int) -> None:
        """``length`` bytes came, of which ``data`` was captured (a prefix)."""

    def part_done(self, stream: Stream) -> None:
        """The present body has ended."""

    def lose(self, stream: Stream, why: str) -> None:
        """Bytes that mattered were missed: the reader no longer knows where it is."""


def accept(stream: Stream, seq: int, length: int, data: bytes, reader: Reader, at_s: float) -> bool:
    """Take one segment with payload; True when it brought anything new."""
    offset = (seq - stream.nxt) & MASK
    if offset >= HALF:
        known = MASK + 1 - offset
        if known >= length:
            return False
        _advance(stream, length - known, data[known:], reader)
    elif offset == 0:
        _advance(stream, length, data, reader)
    elif offset > HOLE_MAX:
        return False
    elif may_step(stream, offset):
        _step(stream, offset)
        _advance(stream, length, data, reader)
    else:
        _wait(stream, seq, length, data, at_s)
        if (
            (stream.acked != UNKNOWN and 0 < ((stream.acked - stream.nxt) & MASK) < HALF)
            or (stream.waiting is not None and len(stream.waiting) > WAITING_SEGMENTS_MAX)
            or stream.waiting_bytes > WAITING_BYTES_MAX
        ):
            resync(stream, reader)
        return True
    if stream.waiting:
        _drain(stream, reader)
    return True


def acknowledged(stream: Stream, ack: int, reader: Reader) -> bool:
    """The peer has everything before ``ack``; True when that turned a hole into a gap."""
    stream.acked = ack
    if stream.waiting and stream.nxt != UNKNOWN and 0 < ((ack - stream.nxt) & MASK) < HALF:
        resync(stream, reader)
        return True
    return False


def finish(stream: Stream) -> bool:
    """Whether the direction's end (FIN) has been reached, stepping over a hole inside a body."""
    if stream.fin == UNKNOWN or stream.fin_done:
        return stream.fin_done
    offset = (stream.fin - stream.nxt) & MASK
    if stream.nxt == UNKNOWN or offset == 0 or offset >= HALF:
        stream.fin_done = True
    elif offset <= HOLE_MAX and not stream.waiting and may_step(stream, offset):
        _step(stream, offset)
        stream.fin_done = True
    return stream.fin_done


def resync(stream: Stream, reader: Reader) -> None:
    """Give up on the hole: go on at the first waiting segment."""
    if not stream.waiting:
        return
    first = min(stream.waiting, key=lambda s: (s - stream.nxt) & MASK)
    hole = (first - stream.nxt) & MASK
    if stream.mode == COUNTED and hole >= stream.need and not stream.conn.opaque:
        # The body ended within the hole; only what came behind it is unknown.
        stream.conn.gaps += 1
        rest = hole - stream.need
        _step(stream, stream.need)
        reader.part_done(stream)
        hole = rest
    if hole:
        reader.lose(stream, "frames were missed")
        _step(stream, hole)
    _drain(stream, reader)


def may_step(stream: Stream, offset: int) -> bool:
    """Whether the next ``offset`` bytes need not be seen."""
    mode = stream.mode
    # Strictly inside: the body's last byte must be seen, or a lost tail would look like an answer.
    if mode in _STEP_OVER or (mode in (COUNTED, CHUNK) and offset < stream.need):
        return True
    return stream.conn.opaque and not stream.conn.tls


def _step(stream: Stream, offset: int) -> None:
    if stream.mode in (COUNTED, CHUNK):
        stream.need -= offset
    elif stream.mode == LOST:
        stream.buf.clear()  # the beginning of a head, perhaps, that now lacks its middle
    stream.seen += offset
    stream.position += offset
    stream.nxt = (stream.nxt + offset) & MASK


def _advance(stream: Stream, length: int, data: bytes, reader: Reader) -> None:
    stream.nxt = (stream.nxt + length) & MASK
    stream.position += length
    reader.deliver(stream, data, length)


def _wait(stream: Stream, seq: int, length: int, data: bytes, at_s: float) -> None:
    if stream.waiting is None:
        stream.waiting = {}
    if not stream.waiting:
        stream.waiting_since_s = at_s
        stream.conn.dirty = True
    known = stream.waiting.get(seq)
    if known is None or known[0] < length:
        stream.waiting_bytes += len(data) - (len(known[1]) if known else 0)
        stream.waiting[seq] = (length, data)


def _drain(stream: Stream, reader: Reader) -> None:
    waiting = stream.waiting
    while waiting:
        # A signed distance: segments now wholly or partly in the past come first.
        seq = min(waiting, key=lambda s: (s - stream.nxt + HALF) & MASK)
        offset = (seq - stream.nxt) & MASK
        if offset and offset < HALF:
            if not may_step(stream, offset):
                return
            _step(stream, offset)
            offset = 0
        length, data = waiting.pop(seq)
        stream.waiting_bytes -= len(data)
        known = (MASK + 1 - offset) & MASK
        if known < length:
            _advance(stream, length - known, data[known:], reader)
    stream.conn.dirty = True
