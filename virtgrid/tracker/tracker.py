"""The tracker: frames in, connections with verdicts out. No clock and no I/O: times are arguments.

Times are seconds on the caller's monotonic clock and should not run backwards; a time that does
is taken as the latest one seen.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Final

from virtgrid.core.frames import FrameBlock, Rest
from virtgrid.tracker import state as saved
from virtgrid.tracker.block import BlockRun
from virtgrid.tracker.changes import Change, Told, view, worded
from virtgrid.tracker.connection import Connection
from virtgrid.tracker.decode import ACK, FIN, RST, SYN, Segment, decode
from virtgrid.tracker.definition import Definition, builtin
from virtgrid.tracker.judge import BY_SILENCE, SUITABLE
from virtgrid.tracker.opening import Openings
from virtgrid.tracker.quick import SPECIAL
from virtgrid.tracker.skips import Skip, in_body
from virtgrid.tracker.streams import (
    HOLE_MAX,
    MASK,
    UNKNOWN,
    Stream,
    accept,
    acknowledged,
    finish,
    may_step,
)
from virtgrid.tracker.views import ConnectionView, Snapshot

__all__ = ["LARGE_BYTES", "Change", "Told", "Tracker", "large_bytes_for", "view", "worded"]

LARGE_BYTES: Final = 4 << 20
#: A pause hides in a transfer that takes at least so many times as long.
_HIDES: Final = 10
HISTORY_S: Final = 30.0
_CONNECTIONS_MAX: Final = 1 << 17
#: Bytes sent again lie no further back than this.
_OLD_BYTES: Final = 1 << 24
#: Below this, a block's columns cost more than they save.
_FEW_FRAMES: Final = 128


def large_bytes_for(downtime_s: float, rate_bytes_s: float) -> int:
    """From how many bytes on a transfer is large, where a pause of ``downtime_s`` is expected.

    rate_bytes_s: the fastest a client can be served, the guest's link for instance. At that rate a
    transfer of so many bytes takes ten pauses; at any lower one it takes longer. So no transfer is
    called large in which the pause would be noticed (Ishikawa et al. 2011, 3.2: small against the
    transfer's own time), and nothing needs to be measured. docs/reference/tracker.md says why not.
    """
    return max(1, math.ceil(_HIDES * max(0.0, downtime_s) * max(0.0, rate_bytes_s)))


class Tracker(Openings):
    """Follows the TCP connections of one guest.

    definitions: protocols to recognise, first match wins (default: the built-in ones).
    guest_macs: hardware addresses, six bytes each; frames of nobody else are looked at. None: all
    frames count, and a connection's server is whoever answered it.
    large_bytes: a body of at least so many bytes is a large transfer, during which stopping hurts nobody;
    ``large_bytes_for`` computes it for an expected pause.
    count_outgoing: whether connections the guest opened count as its clients' do.
    """

    def __init__(
        self,
        definitions: Sequence[Definition] | None = None,
        *,
        guest_macs: Iterable[bytes] | None = None,
        large_bytes: int = LARGE_BYTES,
        count_outgoing: bool = True,
        history_s: float = HISTORY_S,
        connections_max: int = _CONNECTIONS_MAX,
    ) -> None:
        super().__init__(
            builtin() if definitions is None else definitions,
            large_bytes,
            count_outgoing,
            history_s,
            guest_macs,
            connections_max,
        )

    # -- what is asked ---------------------------------------------------------------------

    @property
    def unsuitable(self) -> int:
        """Unsuitable or unknown connections as of the last frame or tick; costs nothing."""
        return self._unsuitable.now

    @property
    def total(self) -> int:
        return len(self.connections)

    def unsuitable_at(self, at_s: float) -> int | None:
        """How many were unsuitable at a moment of the last 30 s; None when that is too long ago.

        Everything up to that moment must have been fed, and ``tick`` called, before asking.
        """
        return self._unsuitable.at(at_s)

    def snapshot(self, now_s: float) -> Snapshot:
        """All connections as they stand at ``now_s``."""
        self.tick(now_s)
        return Snapshot(at_s=now_s, connections=tuple(self._view(c, now_s) for c in self.connections))

    def changes(self) -> list[Change]:
        """The verdict changes since the last call, oldest first (the newest 65,536)."""
        out = [worded(told) for told in self._changes]
        self._changes.clear()
        return out

    def skips(self) -> list[Skip]:
        """Ranges the capture need not hand over any more, and such as it must again, since the last call."""
        return self._machine.skips.told()

    # -- what is told ----------------------------------------------------------------------

    def tick(self, now_s: float) -> None:
        """Let time pass: silences and time-outs up to ``now_s`` take effect, each at its own time."""
        if self.timers and self.timers[0][0] <= now_s:
            self.fire(now_s)
        self.now_s = max(self.now_s, now_s)

    def frames_lost(self, at_s: float) -> None:
        """The capture dropped frames: every connection is unknown until its next head."""
        self.tick(at_s)
        for conn in list(self.connections):
            if conn.opaque:
                continue
            conn.last_s = max(conn.last_s, at_s)
            self._machine.lose(conn.client, "frames were lost by the capture")
            self._machine.lose(conn.server, "frames were lost by the capture")
            self._evaluate(conn, at_s)

    def feed_block(self, block: FrameBlock) -> None:
        """Many frames at once; equal in every respect to feeding them one by one (block.py)."""
        if len(block) < _FEW_FRAMES:
            for frame in block.each():
                self.feed(*frame)
            return
        self.frames += len(block)
        self._run = BlockRun(self, block, self._macs)
        try:
            self._run.run()
        finally:
            self._run = None

    def feed(self, frame: bytes, wire_len: int, at_s: float, rest: Rest | None = None) -> None:
        """One Ethernet frame, perhaps cut short, that was ``wire_len`` bytes long on the wire.

        rest: how to get the rest of one that was cut.
        """
        self.frames += 1
        if at_s < self.now_s:
            at_s = self.now_s
        self.now_s = at_s
        if self.timers and self.timers[0][0] <= at_s:
            self.fire(at_s)
        macs = self._macs
        if macs is not None and frame[6:12] not in macs and frame[0:6] not in macs:
            return
        segment = decode(frame, wire_len)
        if segment is not None:
            self.take(segment, macs is not None and frame[6:12] in macs, at_s, rest)

    def take(self, segment: Segment, by_guest: bool, at_s: float, rest: Rest | None) -> None:
        """A segment, once time has passed up to it. by_guest: the guest sent it."""
        key, _, seq, ack, flags, length, payload = segment
        stream = self.streams.get(key)
        if flags & SYN or stream is None:
            if not length and not flags & SYN:
                return
            stream = self._open(segment, stream, by_guest, at_s)
            if stream is None:
                return
            if flags & SYN:
                seq = (seq + 1) & MASK
        elif (
            length
            and flags & SPECIAL == ACK
            and seq == stream.nxt
            and self.quick.ready(stream.conn)
            and self.quick.take(stream, payload, length, at_s)
        ):
            stream.peer.acked = ack
            self.segments += 1
            return
        self.arrive(stream, seq, ack, flags, length, payload, at_s, rest)

    def arrive(
        self,
        stream: Stream,
        seq: int,
        ack: int,
        flags: int,
        length: int,
        payload: bytes,
        at_s: float,
        rest: Rest | None,
    ) -> None:
        """A segment of a stream that is known, its numbers as in Segment; of a SYN, behind it."""
        self.segments += 1
        conn = stream.conn
        machine = self._machine
        machine.now_s = at_s
        machine.ack = ack if flags & ACK else UNKNOWN
        if conn.imported:
            self._compare(stream, seq, ack if flags & ACK else UNKNOWN, length)
        if flags & ACK:
            if stream.peer.waiting and acknowledged(stream.peer, ack, machine):
                conn.last_s = at_s
            else:
                stream.peer.acked = ack
        if flags & RST:
            self._reset(stream, seq, at_s)
            return
        if length and not stream.fin_done:  # a receiver ignores what comes behind the end
            if stream.nxt == UNKNOWN:
                stream.nxt = stream.begin = seq
            if seq == stream.nxt and not stream.waiting:
                stream.nxt = (seq + length) & MASK
                stream.position += length
                conn.last_s = at_s
                machine.rest = rest
                machine.deliver(stream, payload, length)
                machine.rest = None
            else:
                if rest is not None:  # out of order: it may have to wait, and the rest does not
                    machine.rest = rest
                    payload = machine.with_rest(payload, length)
                if accept(stream, seq, length, payload, machine, at_s):
                    conn.last_s = at_s
        if flags & FIN and stream.fin == UNKNOWN:
            stream.fin = (seq + length) & MASK
            conn.last_s = at_s
        if stream.fin != UNKNOWN and not stream.fin_done and finish(stream):
            machine.end(stream)
            if stream.peer.fin_done:
                self.over(conn, at_s)
                return
        if conn.dirty or (conn.verdict is SUITABLE and conn.state in BY_SILENCE and conn.last_s == at_s):
            self._evaluate(conn, at_s)
            self._related(conn, at_s)

    def skipped(self, key: bytes, seq: int, at_s: float) -> None:
        """The capture left out what ``skips`` allowed, and saw a direction's bytes before ``seq`` go by."""
        self.tick(at_s)
        stream = self.streams.get(key)
        if stream is None or stream.nxt == UNKNOWN:
            return
        conn = stream.conn
        length = (seq - stream.nxt) & MASK
        if 0 < length <= HOLE_MAX and not stream.waiting and may_step(stream, length):
            conn.last_s = at_s
            if in_body(stream):
                self._machine.now_s = at_s
                accept(stream, stream.nxt, length, b"", self._machine, at_s)
            if conn.dirty or (conn.verdict is SUITABLE and conn.state in BY_SILENCE):
                self._evaluate(conn, at_s)
                self._related(conn, at_s)
        self._machine.skips.look(stream)

    # -- the guest comes from elsewhere -----------------------------------------------------

    def export_state(self, now_s: float) -> bytes:
        """What is known of all connections at ``now_s``, for ``import_state`` where the guest goes: JSON."""
        self.tick(now_s)
        return saved.export(list(self.connections), now_s)

    def import_state(self, data: bytes, at_s: float, *, unwatched: bool = False) -> int:
        """Go on from what another tracker knew; returns how many connections were taken over.

        Before the guest runs here. What is followed already stays as it is. Where a connection turns
        out to have moved on meanwhile, it is unknown until its next head. unwatched: the guest has run
        since the state was written, so each is unknown until it is seen where it was said to be, or
        silent for as long as after a gap. Errors: RefusedError.
        """
        self.tick(at_s)
        room = max(0, self.connections_max - len(self.connections))
        taken = 0
        for conn in saved.read(data, self._machine, at_s, room):
            client, server = conn.client, conn.server
            if client.key in self.streams or server.key in self.streams:
                conn.closed = True
                self._machine.expected.forget(conn)
                continue
            self.streams[client.key] = client
            self.streams[server.key] = server
            self.connections[conn] = None
            conn.hint = self._greeters.get(conn.port)
            if conn.synack and not conn.by_guest and conn.owner is None:
                self.server_ports.add(conn.port)
            if unwatched:
                conn.unwatched, conn.last_s = conn.imported, at_s
                conn.lost_busy = bool(conn.queue or client.buf)
                conn.lost_why = "nobody watched it for a while"
            taken += 1
        for conn in self.connections:
            if conn.dirty:
                self._evaluate(conn, at_s)
        return taken

    def _compare(self, stream: Stream, seq: int, ack: int, length: int) -> None:
        """Whether an imported connection stands where it is said to; what it has moved on by was missed."""
        peer = stream.peer
        if length and stream.imported and stream.nxt != UNKNOWN:
            ahead = (seq - stream.nxt) & MASK
            if ahead == 0 or (ahead <= HOLE_MAX and may_step(stream, ahead)):
                stream.imported = False
            elif MASK + 1 - ahead > _OLD_BYTES:
                self._moved_on(stream, seq)
        if ack != UNKNOWN and peer.imported and peer.nxt != UNKNOWN:
            ahead = (ack - peer.nxt) & MASK
            if ahead == 0 or (ahead <= HOLE_MAX and may_step(peer, ahead)):
                peer.imported = ahead != 0
            elif MASK + 1 - ahead > _OLD_BYTES:
                self._moved_on(peer, ack)
        conn = stream.conn
        conn.imported = stream.imported or peer.imported
        if conn.unwatched and not conn.imported:
            conn.unwatched, conn.dirty = False, True

    def _moved_on(self, stream: Stream, to: int) -> None:
        self._machine.lose(stream, "it moved on while nobody looked")
        stream.conn.lost_busy = True
        stream.nxt = to
        stream.imported = False

    def _view(self, conn: Connection, now_s: float) -> ConnectionView:
        return view(conn, now_s)
