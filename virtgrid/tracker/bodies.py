"""The bytes behind a head: counted, chunked, until a terminator, until the end; and TLS records.

Bodies are lengths, never buffers: of what a body holds only the few bytes are kept that may be the
first half of what ends it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Final

from virtgrid.core.frames import Rest
from virtgrid.tracker.rules import Body, Rule
from virtgrid.tracker.skips import Skips
from virtgrid.tracker.streams import (
    BLIND,
    CHUNK,
    CHUNK_SIZE,
    CLOSE,
    COUNTED,
    HEAD,
    LOST,
    RECORD,
    TRAILER,
    UNKNOWN,
    UNTIL,
    Stream,
)

_CHUNK_LINE_MAX: Final = 4096
DIGITS_MAX: Final = 18
HEX: Final = frozenset(b"0123456789abcdefABCDEF")
_RECORD_HEAD: Final = 5
#: TLS record types: change cipher spec, alert, handshake, application data, heartbeat.
_RECORD_TYPES: Final = frozenset({20, 21, 22, 23, 24})
#: 2^14 plus what encryption may add (RFC 5246, 6.2.3).
_RECORD_MAX: Final = (1 << 14) + 2048


class Bodies(ABC):
    """Reads bodies; the machine (machine.py) says what they belong to."""

    def __init__(self) -> None:
        #: What lies behind the run at hand, if the capture cut it and can still give that.
        self.rest: Rest | None = None
        self.skips = Skips()

    @abstractmethod
    def complete(self, stream: Stream) -> None:
        """The present message has ended."""

    @abstractmethod
    def lose(self, stream: Stream, why: str) -> None:
        """The reader no longer knows where it is."""

    def count(self, stream: Stream, length: int) -> None:
        """So much more of a body has come."""
        stream.seen += length
        if not stream.large:
            limit = stream.conn.large_bytes
            if stream.total >= limit or stream.seen >= limit:
                self.mark_large(stream)

    def mark_large(self, stream: Stream) -> None:
        """The transfer under way is a large one."""
        conn = stream.conn
        stream.large = True
        conn.large_transfers += 1
        conn.dirty = True
        if conn.owner is not None:
            conn.owner.large_transfers += 1

    def with_rest(self, data: bytes, length: int) -> bytes:
        """What was captured of a run of this length, with the rest of it if that is to be had."""
        rest, self.rest = self.rest, None
        return data if rest is None or len(data) >= length else (data + rest())[:length]

    # -- where it begins and ends ------------------------------------------------------------

    def begin_body(
        self, stream: Stream, rule: Rule, groups: dict[str, bytes], fields: dict[bytes, bytes]
    ) -> None:
        definition = stream.conn.definition
        assert definition is not None
        stream.seen = stream.need = 0
        stream.total = UNKNOWN
        stream.large = False
        stream.more = rule.more
        stream.until = b""
        for choice in rule.bodies:
            if choice.group:
                value = groups[choice.name]
            else:
                value = fields.get(definition.fields[choice.name], b"") if choice.name else b""
            if choice.kind is Body.CHUNKED:
                if value.rpartition(b",")[2].strip().lower() != b"chunked":
                    continue
                stream.mode = CHUNK_SIZE
                return
            if choice.kind is Body.BYTES:
                digits = value.partition(b",")[0].strip()
                if not digits.isdigit() or len(digits) > DIGITS_MAX:
                    continue
                self.counted(stream, int(digits))
                return
            if choice.kind is Body.UNTIL:
                self.begin_until(stream, choice.end)
                return
            if choice.kind is Body.CLOSE:
                stream.mode = CLOSE
                self.skips.body(stream)
                return
            break
        self.part_done(stream)

    def counted(self, stream: Stream, length: int) -> None:
        stream.total = stream.need = length
        if not length:
            self.part_done(stream)
            return
        stream.mode = COUNTED
        self.skips.body(stream)
        if not stream.to_server and length >= stream.conn.large_bytes:
            self.mark_large(stream)

    def begin_until(self, stream: Stream, end: bytes) -> None:
        stream.mode = UNTIL
        stream.until = end
        # An empty body ends with the rest of its terminator: the line's end before it was the head's.
        stream.buf[:] = b"\r\n" if end.startswith(b"\r\n") else b""
        announced = stream.exchange.size if stream.exchange else 0
        if announced:
            stream.total = announced
            if not stream.to_server and announced >= stream.conn.large_bytes:
                self.mark_large(stream)

    def part_done(self, stream: Stream) -> None:
        """The body has ended; the message may go on behind it."""
        if stream.conn.opaque:
            stream.mode = RECORD
        elif stream.more:
            stream.mode = HEAD
            stream.more = stream.large = False
            stream.in_more = True
            stream.conn.dirty = True
        else:
            self.complete(stream)

    # -- until a terminator ----------------------------------------------------------------

    def until(self, stream: Stream, data: bytes, at: int, length: int) -> int:
        """Look for the body's end from ``at`` on; returns how far the run is used up.

        stream.buf holds the last bytes before, so that a terminator split over segments is found.
        """
        term, buf = stream.until, stream.buf
        kept = len(term) - 1
        # Two searches, for a run may be long and joining it to what came before would copy it.
        across = (bytes(buf) + data[at : at + kept]).find(term)
        within = data.find(term, at) if across < 0 else across + at - len(buf)
        if across >= 0 or within >= 0:
            end = within + len(term)
            buf.clear()
            self.count(stream, end - at)
            self.part_done(stream)
            return end
        self.count(stream, length - at)
        if len(data) == length:
            buf += data[max(at, length - kept) :]
            del buf[: max(0, len(buf) - kept)]
            return length
        buf.clear()
        if stream.mode != BLIND:
            self.blind(stream, "a body's end may not have been captured")
        return length

    def blind(self, stream: Stream, why: str) -> None:
        """The body may have ended among bytes that were not captured."""
        stream.mode = BLIND
        stream.buf.clear()
        stream.conn.lost_why = why
        stream.conn.dirty = True

    # -- chunked bodies --------------------------------------------------------------------

    def chunk_size(self, stream: Stream, data: bytes, at: int) -> int:
        line, used = next_line(stream.buf, data, at)
        if line is None:
            if len(stream.buf) > _CHUNK_LINE_MAX:
                self.lose(stream, "a chunk's size is too long")
            return used
        digits = line.partition(b";")[0].strip()
        if not digits or len(digits) > 15 or not HEX.issuperset(digits):
            self.lose(stream, "a chunk's size could not be read")
            return used
        size = int(digits, 16)
        if size:
            stream.need = size + 2  # and the line's end behind the chunk
            stream.mode = CHUNK
            self.skips.body(stream)
        else:
            stream.mode = TRAILER
        return used

    def trailer(self, stream: Stream, data: bytes, at: int) -> int:
        line, used = next_line(stream.buf, data, at)
        if line is None:
            if len(stream.buf) > _CHUNK_LINE_MAX:
                self.lose(stream, "a trailer is too long")
        elif not line:
            self.complete(stream)
        return used

    # -- TLS -------------------------------------------------------------------------------

    def records(self, stream: Stream, data: bytes, length: int) -> None:
        """Follow a TLS stream from record to record (RFC 8446, 5.1)."""
        at = 0
        buf = stream.buf
        while at < length:
            if stream.mode == COUNTED:
                take = min(stream.need, length - at)
                at += take
                stream.need -= take
                if not stream.need:
                    stream.mode = RECORD
            elif stream.mode != RECORD:
                return
            elif at >= len(data):
                stream.mode = LOST
                buf.clear()
                return
            else:
                part = data[at : at + _RECORD_HEAD - len(buf)]
                at += len(part)
                buf += part
                if len(buf) < _RECORD_HEAD:
                    continue
                size = buf[3] << 8 | buf[4]
                known = buf[0] in _RECORD_TYPES and buf[1] == 3 and size <= _RECORD_MAX
                buf.clear()
                if not known:
                    stream.mode = LOST
                    return
                if size:
                    stream.need = size
                    stream.mode = COUNTED


def next_line(buf: bytearray, data: bytes, at: int) -> tuple[bytes | None, int]:
    """The next line without its end, or None while it is incomplete; and how far data is used up."""
    newline = data.find(b"\n", at)
    if newline < 0:
        buf += data[at:]
        return None, len(data)
    line = bytes(buf) + data[at:newline]
    buf.clear()
    return line.rstrip(b"\r"), newline + 1


def number(digits: bytes) -> int:
    """A number as a message announces it; 0 when it is none."""
    return int(digits) if digits.isdigit() and len(digits) <= DIGITS_MAX else 0


def looks_like_tls(data: bytes | bytearray) -> bool:
    """Whether the bytes begin like a TLS record."""
    return len(data) > 1 and data[0] in (20, 21, 22, 23) and data[1] == 3
