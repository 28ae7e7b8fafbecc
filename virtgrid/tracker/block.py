"""A block of frames through a tracker: what decides nothing is added up, the rest is handled in its order.

Most segments change nothing that anybody asks about. So the segments of a block are sorted by
connection (flows.py), and each connection is taken as far as that goes without asking what others do:

    messages    of ordinary connections, whole requests and answers at once (quick.py)
    runs        segments that only move counters, from the connection's state:

    pure ACKs                    run on, unless a segment is waiting behind a hole
    data, expected next, inside  run on, as long as the body's last byte and the threshold of a
    a body                       large transfer are not reached
    data, opaque                 run on, unless the connection is suitable: then the traffic ends that;
                                 of TLS only inside a record
    SYN, FIN, RST, no ACK flag   never
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
from virtgrid.tracker.plan import CHUNKED
from virtgrid.tracker.quick import SPECIAL, chunks
from virtgrid.tracker.recognise import undecided
from virtgrid.tracker.streams import CHUNK, CHUNK_SIZE, CLOSE, COUNTED, HEAD, MASK, RECORD, UNKNOWN, Stream
from virtgrid.tracker.verdicts import LINGER_S

if TYPE_CHECKING:
    from virtgrid.tracker.tracker import Tracker

_ENDLESS: Final = 1 << 62
_MOMENT: Final = itemgetter(0)


class BlockRun:
    """One block on its way through a tracker.

    moment: of what is happening; of frame n 2n + 1, of what comes between it and the frame before 2n.
    before: with this added, it is the tracker's, which counts on from block to block.
    """

    def __init__(self, tracker: Tracker, block: FrameBlock, macs: frozenset[bytes] | None) -> None:
        self._tracker = tracker
        self._block = block
        self._macs = macs
        times = np.maximum.accumulate(np.maximum(block.times_s, tracker.now_s))
        self._times = array("d", times.tobytes())
        #: The event's frame, or that with which a timer goes off: those before it have been dealt with.
        self._upto = 0
        self._next = 0
        self._touched: list[Group] = []
        #: Events to come: (frame, position, group).
        self._events: list[tuple[int, int, Group]] = []
        self.moment = 0
        self.before = 2 * (tracker.frames - len(block) + 1)
        self._kept: list[tuple[int, Callable[..., None], tuple[Any, ...]]] = []
        columns = columns_of(block, macs)
        self._slow = columns.slow
        self._flows = Flows(columns)
        # Every connection has to be there still when its turn comes.
        self._ahead = tracker.total + len(self._flows.groups) <= tracker.connections_max
        #: The connection whose event is being fed.
        self._present: Group | None = None
        self._at = self._last = 0

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

    def _messages(self, group: Group, stream: Stream) -> None:
        """Take whole messages, the short way."""
        flows, conn = self._flows, stream.conn
        stretches, at = flows.stretches, group.at
        place, stop = group.stretch, group.stretch_stop
        while place < stop and stretches.first[place] < at:
            place += 1
        group.stretch = place
        if (
            place == stop or stretches.odd[place] or flows.work[at] != stretches.first[place]
            or not self._tracker.quick.ready(conn)
        ):  # fmt: skip
            return
        sides = (stream, stream.peer)
        begun = place
        while place < stop and not stretches.odd[place]:
            behind = place
            if not conn.queue:
                behind = self._exchanges(sides, place, stop)
            if behind == place:
                if not self._message(sides[stretches.second[place]], conn, place):
                    break
                behind += 1
            place = behind
        if place == begun:
            return
        group.stretch = place
        group.at = stretches.last[place - 1] + 1
        self._tracker.segments += group.at - at
        self._acknowledge(sides, at, group.at)

    def _message(self, one: Stream, conn: Connection, place: int) -> bool:
        """Take a stretch as a message, or a part of one; False: it is left."""
        quick, stretches = self._tracker.quick, self._flows.stretches
        seq, length, number = stretches.seq[place], stretches.length[place], stretches.number[place]
        at_s = self._times[number]
        if seq != one.nxt or (conn.quick is None and at_s >= conn.timer_s):
            return False
        self.moment = 2 * number + 1
        self._at, self._last = stretches.first[place], stretches.last[place]
        if one.mode == HEAD:
            data = self._block.buffer[stretches.start[place] : stretches.end[place]].tobytes()
            if one.to_server:
                done = quick.request(one, conn, data, length, at_s)
            else:
                done = quick.answer(one, conn, data, length, at_s, self._read)
        else:
            done = quick.part(one, conn, length, at_s, self._read)
        if done:
            one.nxt = (seq + length) & MASK
            one.position += length
            conn.last_s = at_s
        return done

    def _exchanges(self, sides: tuple[Stream, Stream], place: int, stop: int) -> int:
        """Take whole exchanges, two stretches each, from ``place`` on; returns the stretch behind them.

        Of most connections they are nearly all there is. So where nobody asks how verdicts change this
        reads the heads and no more: 1.4 µs an exchange, which message by message is 5.
        """
        tracker, stretches = self._tracker, self._flows.stretches
        side = stretches.second[place]
        client, server = sides[side], sides[1 - side]
        conn = client.conn
        if place + 1 < stop:
            stop = min(stop, stretches.apart[place + 1])
        if (
            place + 1 >= stop or not client.to_server
            or stretches.seq[place] != client.nxt or stretches.seq[place + 1] != server.nxt
        ):  # fmt: skip
            return place
        quick, tells, buffer = tracker.quick, tracker.tells, self._block.buffer
        start, end, length = stretches.start, stretches.end, stretches.length
        plan, limit, definition = conn.quick, conn.large_bytes, None
        if plan is None:
            if self._times[stretches.number[place]] >= conn.timer_s:
                return place
            definition, plan = quick.recognised(buffer[start[place] : end[place]].tobytes(), conn)
            if plan is None or definition is None:
                return place
            limit = quick.limit(definition)
        elif conn.state != "idle" or conn.verdict is not SUITABLE:
            return place
        asked, told, begun, counted, total, seen = plan.asked, plan.told, place, 0, UNKNOWN, 0
        while place + 1 < stop:
            data = buffer[start[place] : end[place]].tobytes()
            word = asked(data) if len(data) == length[place] else None
            if word is None:
                break
            place += 1
            answer = told(buffer[start[place] : end[place]].tobytes(), word)
            place -= 1
            if answer is None:
                break
            _, head, body, counts = answer
            size = length[place + 1] - head
            if body == CHUNKED:
                self._at, self._last = stretches.first[place + 1], stretches.last[place + 1]
                found = chunks(CHUNK_SIZE, 0, head, length[place + 1], self._read)
                if found is None or found[0] != HEAD:
                    break
                size, body = found[2], UNKNOWN
            elif size != body and (size or body > 0):
                break
            if size >= limit:
                break
            if definition is not None:
                quick.adopt(conn, definition)
                definition = None
            if tells:
                self._told(conn, word, data, place)
            counted += counts
            total, seen = body, size
            place += 2
        if place > begun:
            count = (place - begun) // 2
            at_s = self._times[stretches.number[place - 1]]
            quick.exchanged(conn, count, counted, total, seen, at_s)
            begin, behind = stretches.first[begun], stretches.last[place - 1] + 1
            for one, sums in zip(sides, self._flows.sums, strict=True):
                passed = sums[behind] - sums[begin]
                one.nxt = (one.nxt + passed) & MASK
                one.position += passed
        return place

    def _told(self, conn: Connection, word: str, data: bytes, place: int) -> None:
        """Tell of an exchange's request and, at the next stretch, of its answer."""
        stretches, quick = self._flows.stretches, self._tracker.quick
        number, end = stretches.number[place], stretches.seq[place] + stretches.length[place]
        self.moment = 2 * number + 1
        quick.asked(conn, word, data, end & MASK, self._times[number])
        number = stretches.number[place + 1]
        self.moment = 2 * number + 1
        quick.answered(conn, self._times[number])

    def _read(self, offset: int) -> bytes:
        """What was captured of the segment in which a place of the stretch at hand lies, from there on."""
        flows = self._flows
        sums = flows.sums[flows.second[self._at]]
        offset += sums[self._at]
        at = bisect_right(sums, offset, self._at, self._last + 1) - 1
        start = flows.start[at] + offset - sums[at]
        return bytes(self._block.buffer[start : max(start, flows.end[at])])

    def _acknowledge(self, sides: tuple[Stream, Stream], at: int, stop: int) -> None:
        """What the last segments of each direction among [at, stop) acknowledge."""
        for one, last in zip(sides, self._flows.last, strict=True):
            if last[stop - 1] >= at:
                one.peer.acked = self._flows.ack[last[stop - 1]]

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
