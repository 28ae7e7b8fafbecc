"""A connection's messages in a block, taken the short way: stretch by stretch, or whole exchanges.

A stretch (flows.py) of an ordinary connection is a request, an answer, or a part of either, and is taken by
quick.py, whatever has to be put together for that. Mostly even that is too much: one request follows the
other, each with the whole of its answer between. Of such a run of exchanges only the heads are read.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from typing import TYPE_CHECKING

from virtgrid.core.frames import FrameBlock
from virtgrid.tracker.connection import Connection
from virtgrid.tracker.definition import Definition
from virtgrid.tracker.flows import Flows, Group
from virtgrid.tracker.judge import SUITABLE
from virtgrid.tracker.plan import CHUNKED, Plan, Told
from virtgrid.tracker.quick import Read, chunks
from virtgrid.tracker.streams import CHUNK_SIZE, HEAD, MASK, UNKNOWN, Stream

if TYPE_CHECKING:
    from virtgrid.tracker.tracker import Tracker


class Messages:
    """Takes the messages of a block.

    times: of its frames, in seconds. moment: of what is happening; of frame n 2n + 1, of what comes between
    it and the frame before 2n.
    """

    def __init__(self, tracker: Tracker, block: FrameBlock, flows: Flows, times: array[float]) -> None:
        self._tracker = tracker
        self._block = block
        self._flows = flows
        self._times = times
        self.moment = 0
        # The stretch at hand, as far as a reader has to ask for more of it.
        self._at = self._last = 0

    def _messages(self, group: Group, stream: Stream) -> None:
        """Take whole messages, as many as follow each other."""
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

    def _acknowledge(self, sides: tuple[Stream, Stream], at: int, stop: int) -> None:
        """What the last segments of each direction among [at, stop) acknowledge."""
        flows, end = self._flows, stop - 1
        one, other = flows.last[0][end], flows.last[1][end]
        if one >= at:
            sides[1].acked = flows.ack[one]
        if other >= at:
            sides[0].acked = flows.ack[other]

    # -- one by one ------------------------------------------------------------------------

    def _message(self, one: Stream, conn: Connection, place: int) -> bool:
        """Take a stretch as a message, or a part of one; False: it is left."""
        quick, stretches = self._tracker.quick, self._flows.stretches
        seq, length, number = stretches.seq[place], stretches.length[place], stretches.number[place]
        at_s = self._times[number]
        if seq != one.nxt or (conn.quick is None and at_s >= conn.timer_s):
            return False
        self.moment = 2 * number + 1
        if one.mode != HEAD:
            done = quick.part(one, conn, length, at_s, self._more(place))
        elif one.to_server:
            done = quick.request(one, conn, self._begin(place), length, at_s)
        else:
            done = quick.answer(one, conn, self._begin(place), length, at_s, self._more(place))
        if done:
            one.nxt = (seq + length) & MASK
            one.position += length
            conn.last_s = at_s
        return done

    def _begin(self, place: int) -> bytes:
        """What was captured of a stretch's first segment, or enough of that."""
        stretches = self._flows.stretches
        return self._block.buffer[stretches.start[place] : stretches.end[place]].tobytes()

    def _more(self, place: int) -> Read:
        """How to get the rest of a stretch."""
        stretches = self._flows.stretches
        self._at, self._last = stretches.first[place], stretches.last[place]
        return self._read

    def _read(self, offset: int) -> bytes:
        """What was captured of the segment in which a place of the stretch at hand lies, from there on."""
        flows = self._flows
        sums = flows.sums[flows.second[self._at]]
        offset += sums[self._at]
        at = bisect_right(sums, offset, self._at, self._last + 1) - 1
        start = flows.start[at] + offset - sums[at]
        return bytes(self._block.buffer[start : max(start, flows.end[at])])

    # -- whole exchanges -------------------------------------------------------------------

    def _exchanges(self, sides: tuple[Stream, Stream], place: int, stop: int) -> int:
        """Take whole exchanges, two stretches each, from ``place`` on; returns the stretch behind them.

        Where nobody asks how verdicts change the heads are read and no more, and what is left behind is
        written down once: 1.5 µs an exchange, which message by message is 5.
        """
        stretches, quick, tells = self._flows.stretches, self._tracker.quick, self._tracker.tells
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
        found = self._known(conn, place)
        if found is None:
            return place
        plan, limit, definition = found
        asked, told, heads, buffer = plan.asked, plan.told, plan.heads, self._block.buffer
        start, end, length = stretches.start, stretches.end, stretches.length
        begun, counted, total, seen = place, 0, UNKNOWN, 0
        while place + 1 < stop:
            data = buffer[start[place] : end[place]].tobytes()
            word = asked(data) if len(data) == length[place] else None
            if word is None:
                break
            reply = buffer[start[place + 1] : end[place + 1]].tobytes()
            # Nearly always a head that has come before, and the body it says: two calls are saved.
            answer = heads.get(reply[: reply.find(b"\n\r\n") + 3])
            if (answer is None or answer[0] != word) and (answer := told(reply, word)) is None:
                break
            _, head, body, counts = answer
            size = length[place + 1] - head
            if size != body:
                size = self._body(answer, place + 1)
            if not 0 <= size < limit:
                break
            if definition is not None:
                quick.adopt(conn, definition)
                definition = None
            if tells:
                self._tell(conn, word, data, place)
            total = body
            counted += counts
            seen = size
            place += 2
        if place > begun:
            at_s = self._times[stretches.number[place - 1]]
            quick.exchanged(conn, (place - begun) // 2, counted, max(total, UNKNOWN), seen, at_s)
            begin, behind = stretches.first[begun], stretches.last[place - 1] + 1
            for one, sums in zip(sides, self._flows.sums, strict=True):
                passed = sums[behind] - sums[begin]
                one.nxt = (one.nxt + passed) & MASK
                one.position += passed
        return place

    def _known(self, conn: Connection, place: int) -> tuple[Plan, int, Definition | None] | None:
        """How to read a connection whose next request is a stretch; None: not this way.

        And from how many bytes on a body is large; and its protocol, where that has not been known.
        """
        if conn.quick is not None:
            idle = conn.state == "idle" and conn.verdict is SUITABLE
            return (conn.quick, conn.large_bytes, None) if idle else None
        quick = self._tracker.quick
        if self._times[self._flows.stretches.number[place]] >= conn.timer_s:
            return None
        definition, plan = quick.recognised(self._begin(place), conn)
        return None if plan is None or definition is None else (plan, quick.limit(definition), definition)

    def _body(self, answer: Told, place: int) -> int:
        """Bytes of an answer's body that ends where the stretch does; UNKNOWN: it does not."""
        _, head, body, _ = answer
        length = self._flows.stretches.length[place]
        if body == CHUNKED:
            found = chunks(CHUNK_SIZE, 0, head, length, self._more(place))
            return found[2] if found is not None and found[0] == HEAD else UNKNOWN
        seen = length - head
        return seen if seen == body or (body == UNKNOWN and not seen) else UNKNOWN

    def _tell(self, conn: Connection, word: str, data: bytes, place: int) -> None:
        """Tell of an exchange's request and, at the next stretch, of its answer."""
        stretches, quick = self._flows.stretches, self._tracker.quick
        number, end = stretches.number[place], stretches.seq[place] + stretches.length[place]
        self.moment = 2 * number + 1
        quick.asked(conn, word, data, end & MASK, self._times[number])
        number = stretches.number[place + 1]
        self.moment = 2 * number + 1
        quick.answered(conn, self._times[number])
