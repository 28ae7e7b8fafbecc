"""Which protocol a connection speaks, and finding the way again after bytes were missed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from virtgrid.tracker.bodies import Bodies, looks_like_tls
from virtgrid.tracker.connection import Connection, Exchange
from virtgrid.tracker.derived import Expected
from virtgrid.tracker.plan import Plan, plan_of
from virtgrid.tracker.rules import GREETING, Definition
from virtgrid.tracker.streams import BLIND, HEAD, LOST, RECORD, Stream

_DETECT_BYTES_MAX: Final = 8192
_HELLO_BYTES_MAX: Final = 512
_PORTS_KNOWN_MAX: Final = 4096
#: Where a head is looked for: so much of a segment, and so much of what came before it without a line's end.
_SEARCHED_BYTES: Final = 4096
_HEAD_PIECE_MAX: Final = 256
#: So far into a direction a connection whose first bytes no definition knew is looked at again.
RECONSIDER_BYTES: Final = 1024
#: Unless the other direction has come so far meanwhile: what moves one way only is no dialogue.
_RECONSIDER_PEER_BYTES: Final = 64 << 10


class Recogniser(Bodies):
    """Knows the definitions and finds the one that fits.

    large_bytes: a body of at least so many bytes is a large transfer, where a definition does not say.
    """

    def __init__(self, definitions: Sequence[Definition], large_bytes: int) -> None:
        super().__init__()
        self.definitions = tuple(definitions)
        self.large_bytes = large_bytes
        self.expected = Expected()
        self._ports = frozenset(port for d in definitions for port in d.ports)
        self._by_port: dict[int, tuple[Definition, ...]] = {}
        self._plans = {id(d): plan_of(d) for d in self.definitions}
        #: Of the segment at hand; set by the tracker before it hands over the bytes.
        self.now_s = 0.0

    def recognise(self, stream: Stream) -> Definition | None:
        """Find the protocol of a connection by its first line."""
        conn = stream.conn
        buf = stream.buf
        newline = buf.find(b"\n", 0, _DETECT_BYTES_MAX)
        if newline < 0:
            if b"\0" in buf or len(buf) > _DETECT_BYTES_MAX or (conn.client.buf and conn.server.buf):
                self.become_opaque(conn, _opaque_label(conn.client.buf or buf))
            return None
        line = bytes(buf[:newline]).rstrip(b"\r")
        definition = self.detect(line, stream.to_server, conn.port)
        if definition is None:
            self.become_opaque(conn, _opaque_label(buf))
            return None
        self.adopt(conn, definition)
        if definition.greeting:
            if not stream.to_server:
                conn.hello = line[:_HELLO_BYTES_MAX]
            if not conn.midstream:
                conn.queue.appendleft(Exchange(GREETING, b"", 0, self.now_s))
        return definition

    def detect(self, line: bytes, to_server: bool, port: int) -> Definition | None:
        """The protocol whose client (or server) may send such a line; those usual on the port come first."""
        known = self._by_port.get(port)
        if known is None:
            known = tuple(sorted(self.definitions, key=lambda d: port not in d.ports))
            if len(self._by_port) < _PORTS_KNOWN_MAX:
                self._by_port[port] = known
        for definition in known:
            for pattern in definition.detect_client if to_server else definition.detect_server:
                if pattern.match(line):
                    return definition
        return None

    def first_request(self, line: bytes, port: int) -> Definition | None:
        """The protocol whose client may begin with such a line."""
        return self.detect(line.rstrip(b"\r"), True, port) if len(line) < _DETECT_BYTES_MAX else None

    def plan(self, definition: Definition | None) -> Plan | None:
        """A definition's short way."""
        return self._plans.get(id(definition))

    def adopt(self, conn: Connection, definition: Definition) -> None:
        conn.definition = definition
        conn.quick = self._plans.get(id(definition))
        conn.label = definition.name
        conn.large_bytes = self.limit(definition)

    def limit(self, definition: Definition) -> int:
        """From how many bytes on a transfer is large."""
        return self.large_bytes if definition.large_bytes is None else definition.large_bytes

    def second_thought(self, conn: Connection, line: bytes) -> None:
        """Several protocols greet alike (``220 ready``): on a strange port the client's first line tells."""
        hello, conn.hello = conn.hello, b""
        present = conn.definition
        assert present is not None
        if conn.port in present.ports or any(p.match(line) for p in present.detect_client):
            return
        for other in self.definitions:
            if (
                other.greeting
                and any(p.match(hello) for p in other.detect_server)
                and any(p.match(line) for p in other.detect_client)
            ):
                self.adopt(conn, other)
                return

    def become_opaque(self, conn: Connection, label: str) -> None:
        """Give up reading: from here on silence on the wire decides, and TLS's records."""
        conn.opaque = True
        conn.label = label
        conn.queue.clear()
        conn.dirty = True
        conn.tls = label == "tls"
        self.expected.forget(conn)
        for stream in (conn.client, conn.server):
            kept = bytes(stream.buf)
            stream.buf.clear()
            stream.exchange = None
            if conn.tls:
                stream.mode = RECORD if stream.mode != LOST else LOST
                self.records(stream, kept, len(kept))

    def reconsider(self, stream: Stream, data: bytes, first: bool) -> None:
        """Read on after all, when a segment near the beginning starts like a known protocol.

        A server whose first words are understood tells what it is, whatever its client began with; and
        behind a proxy's handshake (SOCKS, RFC 1928) stands the request it is made for.
        first: these are the direction's first bytes.
        """
        conn = stream.conn
        if not undecided(conn):
            return
        line, newline, _ = data.partition(b"\n")
        if not newline or first == stream.to_server:
            return
        definition = self.detect(line.rstrip(b"\r"), stream.to_server, conn.port)
        if definition is None or (stream.to_server and definition.lines):
            return
        self.adopt(conn, definition)
        if definition.greeting:
            conn.queue.appendleft(Exchange(GREETING, b"", 0, self.now_s))
        conn.opaque, conn.dirty = False, True
        stream.mode, stream.peer.mode = HEAD, LOST
        conn.lost_why = "the first bytes could not be read"

    def unreadable(self, stream: Stream) -> None:
        conn = stream.conn
        if conn.requests or conn.responses:
            self.lose(stream, "a message could not be read")
        else:
            self.become_opaque(conn, _opaque_label(stream.buf))

    def either(self, stream: Stream, data: bytes) -> None:
        definition = stream.conn.definition
        assert definition is not None
        line = data.split(b"\n", 1)[0]
        if any(p.match(line) for p in definition.detect_client):
            stream.mode = HEAD
            stream.exchange = None
        else:
            stream.mode = stream.resume
        stream.conn.dirty = True

    def _begins(self, conn: Connection, to_server: bool, text: bytes) -> Definition | None:
        """The protocol, the connection's if it is known, of which ``text`` begins a message."""
        line = text.partition(b"\n")[0].rstrip(b"\r")
        definition = conn.definition
        if definition is None:
            found = self.detect(line, to_server, conn.port)
            # On a port that is usual for one protocol, a line of a body must not pass for another's.
            stray = found is not None and conn.port in self._ports and conn.port not in found.ports
            return None if stray else found
        patterns = definition.resume_client if to_server else definition.resume_server
        return definition if any(p.match(line) for p in patterns) else None

    def search(self, stream: Stream, data: bytes, at: int, length: int) -> int:
        """LOST or BLIND: look for a head, or a body's end; returns how far the run is used up."""
        conn = stream.conn
        if stream.mode == BLIND:
            if stream.until:
                return self.until(stream, data, at, length)
            self.count(stream, length - at)
            if len(data) == length and (data.endswith(b"\r\n0\r\n\r\n") or data[at:] == b"0\r\n\r\n"):
                self.complete(stream)
            return length
        buf = stream.buf
        start = data[at : at + _SEARCHED_BYTES]
        definition = self._begins(conn, stream.to_server, start)
        if definition is not None:
            buf.clear()
        elif buf:
            # A head may come in pieces: what the last segments ended with may be its first.
            definition = self._begins(conn, stream.to_server, bytes(buf) + start)
        if definition is not None:
            if conn.definition is None:
                self.adopt(conn, definition)
            stream.mode = HEAD
            conn.dirty = True
            return at
        if b"\n" in start or len(buf) + len(start) > _HEAD_PIECE_MAX or len(data) < length:
            buf.clear()
        else:
            buf += start
        stream.seen += length - at
        if stream.to_server and stream.peer.mode == LOST:
            stream.peer.seen = 0
            stream.peer.large = False
        if not stream.large and stream.seen >= conn.large_bytes:
            self.mark_large(stream)
        return length


def undecided(conn: Connection) -> bool:
    """Whether an opaque connection's next segment may still show what it is."""
    if conn.label != "opaque" or conn.definition is not None or conn.owner is not None or conn.midstream:
        return False
    low, high = sorted((conn.client.position, conn.server.position))
    return low <= RECONSIDER_BYTES and high <= _RECONSIDER_PEER_BYTES


def _opaque_label(data: bytes | bytearray) -> str:
    return "tls" if looks_like_tls(data) else "opaque"
