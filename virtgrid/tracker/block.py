"""A block of frames through a tracker: what decides nothing is added up, the rest is handled in its order.

Most segments change nothing that anybody asks about. So the segments of a block are sorted by
connection (flows.py), and each connection is taken as far as that goes without asking what others do:

    messages    of ordinary connections, whole requests and answers at once (messages.py)
    openings    a SYN and the SYN-ACK that follows it; likewise the FINs of both sides of an idle connection
    runs        segments that only move counters, from the connection's state:

    pure ACKs                    run on, unless a segment is waiting behind a hole
    data, expected next, inside  run on, as long as the body's last byte and the threshold of a
    a body                       large transfer are not reached
    data, opaque                 run on, unless the connection is suitable: then the traffic ends that;
                                 of TLS only inside a record
    other SYN, FIN, RST, no ACK  never
    a connection whose state came from elsewhere, until it has been compared    never
    anything else                never

What follows, the connection's *event*, goes through ``Tracker.take`` as a frame fed alone does. Events are
handled in the order of the frames, over all connections, and so are timers. A run is only noted,
and added up when its connection is looked at: by its next event, by a timer, or at the block's end. A
timer looks at a moment between two frames, so it adds up the run as far as that moment, and the run
is judged anew from there. Messages may be taken ahead of what comes earlier on other connections: an
ordinary connection has no relatives, and no timer finds anything to do about it. What they tell is kept, and
told in the order of the frames at the block's end. That makes a block equal to its frames fed one by one.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from heapq import heappop, heappush
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from virtgrid.core.frames import FrameBlock
from virtgrid.tracker.columns import columns_of
from virtgrid.tracker.connection import Connection
from virtgrid.tracker.decode import ACK, FIN, RST, SYN, Segment
from virtgrid.tracker.flows import Flows, Group
from virtgrid.tracker.judge import BY_SILENCE, CONNECTING_HOLD_S, SUITABLE
from virtgrid.tracker.messages import Messages
from virtgrid.tracker.quick import SPECIAL
from virtgrid.tracker.recognise import undecided
from virtgrid.tracker.streams import CHUNK, CLOSE, COUNTED, HEAD, MASK, RECORD, UNKNOWN, Stream
from virtgrid.tracker.verdicts import LINGER_S

if TYPE_CHECKING:
    from virtgrid.tracker.tracker import Tracker

_ENDLESS: Final = 1 << 62
_MOMENT: Final = itemgetter(0)


class BlockRun(Messages):
    """One block on its way through a tracker.

    before: with this added, a moment is the tracker's, which counts on from block to block.
    """

    def __init__(self, tracker: Tracker, block: FrameBlock, macs: frozenset[bytes] | None) -> None:
        times = np.maximum.accumulate(np.maximum(block.times_s, tracker.now_s))
        columns = columns_of(block, macs)
        super().__init__(tracker, block, Flows(columns), array("d", times.tobytes()))
        self._macs = macs
        #: The event's frame, or that with which a timer goes off: those before it have been dealt with.
        self._upto = 0
        self._next = 0
        self._touched: list[Group] = []
        #: Events to come: (frame, position, group).
        self._events: list[tuple[int, int, Group]] = []
        self.before = 2 * (tracker.frames - len(block) + 1)
        self._kept: list[tuple[int, Callable[..., None], tuple[Any, ...]]] = []
        self._slow = columns.slow
        # Every connection has to be there still when its turn comes.
        self._ahead = tracker.total + len(self._flows.groups) <= tracker.connections_max
        #: The connection whose event is being fed.
        self._present: Group | None = None

    # -- the order of events ---------------------------------------------------------------

    def run(self) -> None:
        """Feed the block."""
        tracker, times, events, groups = self._tracker, self._times, self._events, self._flows.groups
        timers = tracker.timers
        for group in groups:
            self._advance(group)
        last = len(times) - 1
        while True:
            number = events[0][0] if events else last
            if timers and timers[0][0] <= times[number] and self._timer(number):
                continue
            if not events:
                break
            number, at, group = heappop(events)
            if at == group.event:
                self._event(group, at, number)
        for group in groups:
            self._catch_up(group, group.stop)
        for _, function, arguments in sorted(self._kept, key=_MOMENT):
            function(*arguments)
        tracker.now_s = times[-1]

    def keep(self, function: Callable[..., None], *arguments: Any) -> None:
        """To be called when all that comes before the present moment has been told."""
        self._kept.append((self.moment, function, arguments))

    def _timer(self, number: int) -> bool:
        """Let the first timer go off if it does so with frame ``number`` or before; whether it is gone."""
        timers = self._tracker.timers
        due, _, conn = timers[0]
        if conn.closed or due != conn.timer_s:
            heappop(timers)
            return True
        # They go off with the first frame at their time or later that has not come yet.
        upto = max(bisect_left(self._times, due), self._next)
        if upto > number:
            return False
        self._upto, self.moment = upto, 2 * upto
        self._tracker.fire(due)
        self._advance_touched()
        return True

    def touch(self, conn: Connection) -> None:
        """A connection is looked at: its run is added up as far as the frames have come."""
        group = self._flows.group(conn.client.key)
        if group is not None and group is not self._present:
            self._catch_up(group, bisect_left(self._flows.index, self._upto, group.at, group.stop))
            self._touched.append(group)

    def _event(self, group: Group, at: int, number: int) -> None:
        """Feed a segment in its turn."""
        self._upto, self._next = number, number + 1
        self._present = group
        if group.fin != UNKNOWN:
            self._close(group, at)
        elif not self._open(group, at):
            self._feed(group, at)
        self._present = None
        self._advance(group)
        if self._touched:
            self._advance_touched()

    def _feed(self, group: Group, at: int) -> None:
        """Feed a segment, whatever it is."""
        tracker, flows, block = self._tracker, self._flows, self._block
        if group.at < at:
            self._catch_up(group, at)
        group.at = at + 1
        group.event = UNKNOWN
        number = flows.index[at]
        self.moment = 2 * number + 1
        at_s = self._times[number]
        segment = self._slow.get(number)
        if segment is None:
            second, length = flows.second[at], flows.length[at]
            payload = block.buffer[flows.start[at] : flows.end[at]].tobytes() if length else b""
            numbers = flows.seq[at], flows.ack[at], flows.flags[at], length, payload
            stream = tracker.streams.get(group.keys[second])
            if stream is not None and not numbers[2] & SYN:
                conn = stream.conn
                # A control connection's messages say what its data connection's bytes mean.
                if conn.owner is not None or conn.data is not None:
                    tracker.together(conn)
                rest = block.rest(number) if self._cut(at) else None
                tracker.arrive(stream, *numbers, at_s, rest)
                return
            segment = Segment(group.keys[second], group.keys[1 - second], *numbers)
        stream = tracker.streams.get(segment.key)
        if stream is not None:
            tracker.together(stream.conn)
        cut = int(block.captured[number]) < int(block.wire_lens[number])
        tracker.take(segment, self._by_guest(number), at_s, block.rest(number) if cut else None)

    def _by_guest(self, number: int) -> bool:
        """Whether the guest sent a frame."""
        if self._macs is None:
            return False
        source = int(self._block.offsets[number]) + 6
        return bytes(self._block.buffer[source : source + 6]) in self._macs

    def _cut(self, at: int) -> bool:
        """Whether of a segment only the beginning is here, and the rest is to be had."""
        flows = self._flows
        return self._block.whole is not None and flows.end[at] - flows.start[at] < flows.length[at]

    # -- beginnings and ends ---------------------------------------------------------------

    def _plain(self, at: int, flags: int, after: int, after_flags: int) -> bool:
        """Whether two segments are nothing but a flag from each side."""
        flows = self._flows
        return (
            flows.flags[at] & SPECIAL == flags
            and flows.flags[after] & SPECIAL == after_flags
            and flows.second[at] != flows.second[after]
            and not flows.length[at]
            and not flows.length[after]
            and not (self._slow and (flows.index[at] in self._slow or flows.index[after] in self._slow))
        )

    def _open(self, group: Group, at: int) -> bool:
        """Open a connection by its client's SYN, if its server's follows; False: nothing was done."""
        tracker, flows, after = self._tracker, self._flows, at + 1
        if after >= group.stop or not self._ahead or not self._plain(at, SYN, after, SYN | ACK):
            return False
        second, number = flows.second[at], flows.index[at]
        keys = group.keys[second], group.keys[1 - second]
        begin_s, answered_s = self._times[number], self._times[flows.index[after]]
        if (
            keys[0] in tracker.streams or not tracker.plain(int.from_bytes(keys[0][-2:], "big"))
            or answered_s >= begin_s + CONNECTING_HOLD_S or self._by_guest(number)
        ):  # fmt: skip
            return False
        self.moment = 2 * number + 1
        begins = (flows.seq[at] + 1) & MASK, (flows.seq[after] + 1) & MASK
        tracker.opened(keys, begins, (begin_s, answered_s), flows.ack[after])
        group.at = after + 1
        group.event = UNKNOWN
        return True

    def _ends(self, group: Group, stream: Stream, at: int) -> int:
        """Where behind one side's end, at ``at``, is the other's, and nothing is decided in between; or 0."""
        flows, conn = self._flows, stream.conn
        if at + 1 >= group.stop or not flows.flags[at] & FIN:
            return 0
        after = flows.work[at + 1]
        if after >= group.stop or not self._plain(at, FIN | ACK, after, FIN | ACK):
            return 0
        sides = (stream, stream.peer)
        one, other = sides[flows.second[at]], sides[flows.second[after]]
        end_s = self._times[flows.index[after]]
        alike = (
            conn.state == "idle" and conn.verdict is SUITABLE and self._tracker.quick.ready(conn)
            and flows.seq[at] == one.nxt and flows.seq[after] == other.nxt
            and end_s < min(conn.timer_s, self._times[flows.index[at]] + LINGER_S)
        )  # fmt: skip
        return after if alike else 0

    def _close(self, group: Group, at: int) -> None:
        """Both sides have closed: one at ``group.fin``, the other at ``at``."""
        tracker, flows = self._tracker, self._flows
        self._catch_up(group, at)
        stream = tracker.streams[group.keys[0]]
        conn, sides = stream.conn, (stream, stream.peer)
        for place in (group.fin, at):
            one = sides[flows.second[place]]
            one.fin, one.fin_done = flows.seq[place], True
        tracker.segments += 1
        number = flows.index[at]
        self.moment = 2 * number + 1
        conn.state = "closing"
        conn.last_s = self._times[number]
        tracker.over(conn, conn.last_s)
        group.at, group.event, group.fin = at + 1, UNKNOWN, UNKNOWN

    # -- as far as it goes -----------------------------------------------------------------

    def _advance_touched(self) -> None:
        for group in self._touched:
            self._advance(group)
        self._touched.clear()

    def _advance(self, group: Group) -> None:
        """Take a connection as far as it goes, and note the event that is behind that."""
        streams, stop, work = self._tracker.streams, group.stop, self._flows.work
        key = group.keys[0]
        while group.at < stop:
            stream = streams.get(key)
            group.fin = UNKNOWN
            if stream is None:
                event = work[group.at]
            else:
                if self._ahead:
                    self._messages(group, stream)
                event = self._event_of(group, stream)
                if event < stop and self._ahead:
                    if behind := self._ends(group, stream, event):
                        group.fin, event = event, behind
                    elif self._alone(stream, event):
                        self._feed(group, event)
                        continue
            if event >= stop:
                break
            if event != group.event:
                group.event = event
                heappush(self._events, (self._flows.index[event], event, group))
            return
        group.event = UNKNOWN

    def _event_of(self, group: Group, stream: Stream) -> int:
        """Which of a connection's segments is its next event, from its state; behind them: none."""
        conn, peer, at = stream.conn, stream.peer, group.at
        if (
            conn.dirty or conn.imported or stream.waiting or peer.waiting or stream.key == peer.key
            or (stream.fin != UNKNOWN and not stream.fin_done) or (peer.fin != UNKNOWN and not peer.fin_done)
        ):  # fmt: skip
            return at  # an acknowledgement may matter, too
        if at < group.stop and (conn.opaque or stream.mode != HEAD or peer.mode != HEAD):
            at = self._run_end(group, stream)
        return self._flows.work[at] if at < group.stop else at

    def _alone(self, stream: Stream, at: int) -> bool:
        """Whether a segment concerns nobody but its connection, and may come before its turn.

        No timer of the connection goes off before, and nothing begins or ends, or is promised, by it.
        """
        flows = self._flows
        conn, flags = stream.conn, flows.flags[at]
        if self._times[flows.index[at]] >= conn.timer_s or conn.owner is not None or conn.data is not None:
            return False
        if flags & SYN:
            server = conn.server
            return (
                flags & SPECIAL == SYN | ACK
                and server.nxt == UNKNOWN
                and server.begin == UNKNOWN
                and conn.client.begin != UNKNOWN
                and (server is stream) == (not flows.second[at])
                and (conn.by_guest or conn.port in self._tracker.server_ports)
            )
        # The rest of a frame that was cut can be asked for in the frame's turn only.
        return (
            conn.quick is not None
            and not flags & RST
            and stream.fin == stream.peer.fin == UNKNOWN
            and not self._cut(at)
        )

    # -- runs ------------------------------------------------------------------------------

    def _run_end(self, group: Group, stream: Stream) -> int:
        """How far nothing is decided by a connection's segments, from its state."""
        conn, at = stream.conn, group.at
        if conn.verdict is SUITABLE and conn.state in BY_SILENCE:
            return at
        stop = min(group.stop, self._flows.breaks[at])
        for side, one in enumerate((stream, stream.peer)):
            stop = self._inside(at, stop, one, side, self._room(conn, one))
        return stop

    def _inside(self, at: int, stop: int, stream: Stream, side: int, room: int) -> int:
        """How far the segments of one direction may run with at most ``room`` bytes of payload."""
        sums = self._flows.sums[side]
        before = sums[at]
        if sums[stop] == before:
            return stop
        data = bisect_right(sums, before, at + 1, stop + 1) - 1
        if not room or self._flows.seq[data] != stream.nxt:
            return data
        return bisect_right(sums, before + room, data + 1, stop + 1) - 1

    def _room(self, conn: Connection, stream: Stream) -> int:
        """Bytes that can come without anything to decide."""
        mode = stream.mode
        if stream.fin_done:
            return 0
        if conn.opaque:
            if conn.client_last and not stream.to_server:
                return 0  # the server has its say: a shorter silence is enough from here on
            # Near its beginning it may yet turn out to be readable.
            if undecided(conn):
                return 0
            if conn.tls:
                return stream.need - 1 if mode == COUNTED else 0 if mode == RECORD else _ENDLESS
            return _ENDLESS
        if mode in (COUNTED, CHUNK):
            room = stream.need - 1
        elif mode == CLOSE:
            room = _ENDLESS if stream.position else 0
        else:
            return 0
        if not stream.large:
            large = conn.large_bytes
            room = 0 if stream.total >= large else min(room, large - 1 - stream.seen)
        return max(0, room)

    def _catch_up(self, group: Group, stop: int) -> None:
        """Add up the run before a position."""
        at = group.at
        if at >= stop:
            return
        group.at = stop
        stream = self._tracker.streams.get(group.keys[0])
        if stream is None:
            return
        self._tracker.segments += stop - at
        conn, flows = stream.conn, self._flows
        sides = (stream, stream.peer)
        self._acknowledge(sides, at, stop)
        newest = UNKNOWN
        for one, sums in zip(sides, flows.sums, strict=True):
            count = sums[stop] - sums[at]
            if not count:
                continue
            one.nxt = (one.nxt + count) & MASK
            one.position += count
            if not conn.opaque:
                one.seen += count
            if one.mode in (COUNTED, CHUNK) and (conn.tls or not conn.opaque):
                one.need -= count
            data = bisect_left(sums, sums[stop], at, stop + 1) - 1
            if data > newest:
                newest = data
                conn.last_s = max(conn.last_s, self._times[flows.index[data]])
                if conn.opaque:
                    conn.client_last = one.to_server
