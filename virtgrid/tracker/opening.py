"""Connections coming and going: which segments open one, which way it runs, and what ends it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Final

from virtgrid.tracker.connection import Connection
from virtgrid.tracker.decode import ACK, RST, SYN, Segment
from virtgrid.tracker.definition import Definition
from virtgrid.tracker.ended import Ended
from virtgrid.tracker.judge import CONNECTING_HOLD_S, SUITABLE, UNSUITABLE
from virtgrid.tracker.streams import LOST, MASK, UNKNOWN, Stream
from virtgrid.tracker.verdicts import Verdicts

_RST_WINDOW: Final = 1 << 24


class Openings(Verdicts):
    """Knows the guest's side of a connection. Parameters: as the tracker's."""

    def __init__(
        self,
        definitions: Sequence[Definition],
        large_bytes: int,
        count_outgoing: bool,
        history_s: float,
        guest_macs: Iterable[bytes] | None,
        connections_max: int,
    ) -> None:
        super().__init__(definitions, large_bytes, count_outgoing, history_s)
        self._macs = frozenset(guest_macs) if guest_macs is not None else None
        self.connections_max = connections_max
        self._known_ports = frozenset(p for d in definitions for p in d.ports)
        self._greeters = {p: d for d in reversed(definitions) if d.greeting for p in d.ports}
        self._ended = Ended()
        self.server_ports: set[int] = set()

    def _open(self, segment: Segment, known: Stream | None, by_guest: bool, at_s: float) -> Stream | None:
        """The stream a segment belongs to that opens a connection or belongs to none known."""
        flags = segment.flags
        if flags & RST or segment.key == segment.reverse:
            return None  # nothing opens, or it claims to come from where it goes to
        if not flags & SYN:
            return None if self._ended.late(segment, at_s) else self._midstream(segment, by_guest, at_s)
        begin = (segment.seq + 1) & MASK
        if known is not None:
            if known.begin == begin:
                return known  # retransmitted
            if flags & ACK and known.begin == UNKNOWN and not known.to_server and known.nxt == UNKNOWN:
                self._answered(known, segment, begin, at_s)
                return known
            if flags & ACK and not known.conn.synack and known.nxt != UNKNOWN:
                return known  # captured behind the data it opens
            self._close(known.conn, at_s, "the port was used again")
        if flags & ACK:
            conn = self._new(segment.reverse, segment.key, not by_guest and self._macs is not None, at_s)
            self._answered(conn.server, segment, begin, at_s)
            return conn.server
        conn = self._new(segment.key, segment.reverse, by_guest, at_s)
        conn.client.nxt = conn.client.begin = begin
        return conn.client

    def plain(self, port: int) -> bool:
        """Whether of a connection to such a port only its client's first bytes will tell more."""
        return port in self.server_ports and port not in self._greeters and not self._machine.expected

    def opened(
        self, keys: tuple[bytes, bytes], begins: tuple[int, int], times_s: tuple[float, float], ack: int
    ) -> None:
        """A client's SYN and its server's, next to each other, open a connection to a ``plain`` port.

        It is as ``_open`` and the judge leave it, one after the other, when nothing is due in between; in a
        third of the time. Of each the client's first. keys: of the directions; begins: their first bytes'
        sequence numbers; ack: of the server's SYN.
        """
        conn = self._new(*keys, False, times_s[0])
        client, server = conn.client, conn.server
        client.nxt = client.begin = begins[0]
        self._judged(conn, times_s[0], "new", UNSUITABLE, times_s[0] + CONNECTING_HOLD_S)
        server.nxt = server.begin = begins[1]
        client.acked = ack
        conn.synack = True
        conn.opened_s = conn.fresh_s = times_s[1]
        self.segments += 2

    def _answered(self, server: Stream, segment: Segment, begin: int, at_s: float) -> None:
        server.nxt = server.begin = begin
        conn = server.conn
        conn.synack = conn.dirty = True
        conn.opened_s = conn.fresh_s = at_s
        if not conn.by_guest and conn.owner is None:
            self.server_ports.add(int.from_bytes(segment.key[-4:-2], "big"))
        client = conn.client
        if client.begin == UNKNOWN:
            client.nxt = client.begin = segment.ack

    def _midstream(self, segment: Segment, by_guest: bool, at_s: float) -> Stream | None:
        to_server = self._to_server(segment, by_guest)
        outgoing = by_guest == to_server and self._macs is not None
        if to_server:
            conn = self._new(segment.key, segment.reverse, outgoing, at_s)
        else:
            conn = self._new(segment.reverse, segment.key, outgoing, at_s)
        conn.midstream = conn.synack = True
        if conn.owner is None:
            conn.client.mode = conn.server.mode = LOST
        if not outgoing and conn.owner is None:
            self.server_ports.add(int.from_bytes(conn.server.key[-4:-2], "big"))
        return conn.client if to_server else conn.server

    def _to_server(self, segment: Segment, by_guest: bool) -> bool:
        """Which way a connection seen mid-stream runs: by its bytes, its ports, the guest's side."""
        line = segment.payload[:200].partition(b"\n")[0].rstrip(b"\r")
        source = int.from_bytes(segment.key[-4:-2], "big")
        destination = int.from_bytes(segment.key[-2:], "big")
        machine = self._machine
        if machine.expected.awaits(segment.key) or machine.expected.awaits(segment.reverse):
            return machine.expected.awaits(segment.key)
        for port, to_server in ((destination, True), (source, False)):
            if port in self._known_ports and machine.detect(line, to_server, port):
                return to_server
        # Ports before words: in the middle of a body any line may look like some protocol's.
        for ports in (self.server_ports, self._known_ports):
            if (source in ports) != (destination in ports):
                return destination in ports
        for to_server in (True, False):
            if machine.detect(line, to_server, 0):
                return to_server
        if self._macs is not None:
            return not by_guest
        return destination <= source

    def _new(self, client_key: bytes, server_key: bytes, by_guest: bool, at_s: float) -> Connection:
        if len(self.connections) >= self.connections_max:
            self._evict(at_s)
        client, server = Stream(client_key, True), Stream(server_key, False)
        conn = Connection(client, server, at_s, self._machine.large_bytes)
        conn.by_guest = by_guest
        conn.hint = self._greeters.get(conn.port)
        self._machine.expected.claim(conn, at_s)
        if conn.owner is not None:
            self._machine.skips.body(client)
            self._machine.skips.body(server)
        self.streams[client_key] = client
        self.streams[server_key] = server
        self.connections[conn] = None
        return conn

    def _evict(self, at_s: float) -> None:
        oldest = list(islice(self.connections, 64))
        victim = next((c for c in oldest if c.verdict is SUITABLE), oldest[0])
        self._close(victim, at_s, "too many connections: no longer followed")

    def _reset(self, stream: Stream, seq: int, at_s: float) -> None:
        # A reset far from the window would be ignored by the receiver.
        if stream.nxt != UNKNOWN and (seq - stream.nxt + _RST_WINDOW) & MASK > 2 * _RST_WINDOW and seq:
            return
        peer = stream.peer
        self._close(stream.conn, at_s, "reset")
        self._ended.reset(peer, at_s)

    def _close(self, conn: Connection, at_s: float, reason: str) -> None:
        if conn.closed:
            return
        self.together(conn)
        conn.closed = True
        self._machine.skips.end(conn.client)
        self._machine.skips.end(conn.server)
        self._machine.expected.forget(conn)
        del self.connections[conn]
        self.streams.pop(conn.client.key, None)
        self.streams.pop(conn.server.key, None)
        if conn.verdict is not None and conn.verdict is not SUITABLE:
            self.counted(-1, at_s)
        if conn.verdict is not None:
            conn.since_s = at_s
            self.tell(conn, conn.verdict, reason, at_s)
        self.closed(conn, reason)
        self._related(conn, at_s)
        if conn.owner is not None and conn.owner.data is conn:
            conn.owner.data = None
        conn.part()

    def over(self, conn: Connection, at_s: float) -> None:
        """Both sides have closed."""
        self._close(conn, at_s, "closed")
        self._ended.closed(conn.client, at_s)
        self._ended.closed(conn.server, at_s)

    def closed(self, conn: Connection, reason: str) -> None:
        """A connection has gone; for those who want to keep it (replay.py)."""
