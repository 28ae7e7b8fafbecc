"""The short way for what nearly all messages of a web server are; whatever is not, goes the long way.

On a connection where nothing is out of the ordinary the machine, the judge and the tracker take a
dozen calls to find out that an idle connection is now busy, or a busy one idle. Three kinds of
messages, or parts of them, need none of that:

    a request    whole in its segment and alone in it, without a body, where nothing is outstanding; or the
                 first of a connection -> one more exchange, idle (or new) becomes busy
    an answer    its head whole in its first segment, the body counted or chunked, to the only exchange
                 -> the body begins; where it ends with these bytes, busy becomes idle
    a part       of such a body, short of a large transfer's beginning -> where it ends, idle

Out of the ordinary are gaps, anything waiting for missing segments, an end that has come, relatives
of a data connection, state that came from elsewhere, and whatever the judge has not seen yet (dirty).
The way is open for the definitions of which a ``Plan`` can be made (plan.py). A head that has more to
say is left to the machine, before anything is changed; so both ways do the same, which a property
test holds them to. Bytes that are fed together may be of many segments (messages.py): what matters is
when the last of them came.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from virtgrid.tracker.bodies import HEX
from virtgrid.tracker.connection import SHOWN_BYTES, Connection, Exchange
from virtgrid.tracker.decode import ACK, FIN, RST, SYN
from virtgrid.tracker.plan import CHUNKED, Plan
from virtgrid.tracker.rules import GREETING, Definition
from virtgrid.tracker.skips import SKIP_BYTES_MIN
from virtgrid.tracker.streams import CHUNK, CHUNK_SIZE, COUNTED, HEAD, MASK, TRAILER, UNKNOWN, Stream
from virtgrid.tracker.views import Verdict

if TYPE_CHECKING:
    from virtgrid.tracker.machine import Machine

#: Of a segment's flags: with others than ACK it is no plain one.
SPECIAL: Final = SYN | FIN | RST | ACK
_SUITABLE: Final = Verdict.SUITABLE
_UNSUITABLE: Final = Verdict.UNSUITABLE

#: A chunk's size with its line's end, as servers write it.
_SIZE_BYTES_MAX: Final = 18
_CHUNKS: Final = frozenset({CHUNK_SIZE, CHUNK, TRAILER})

#: What was captured of the segment that a place in the bytes at hand lies in, from there on.
Read = Callable[[int], bytes]


class Quick:
    """Takes messages the short way.

    guests: whether the guest's own connections count. turned: a connection has become suitable, or
    unsuitable (tracker.py).
    """

    def __init__(
        self, machine: Machine, guests: bool, turned: Callable[[Connection, Verdict, float], None]
    ) -> None:
        self._machine = machine
        self._guests = guests
        self._turned = turned

    def ready(self, conn: Connection) -> bool:
        """Whether nothing about a connection is out of the ordinary; what this file does leaves it so."""
        client, server = conn.client, conn.server
        return not (
            (conn.quick is None and not _fresh(conn)) or conn.dirty or conn.gaps or conn.imported
            or client.waiting or server.waiting or client.fin != UNKNOWN or server.fin != UNKNOWN
            or client.mode != HEAD or client.buf or server.buf or client.exchange is not None
            or conn.data is not None or conn.owner is not None or conn.answered != UNKNOWN or not conn.synack
            or (conn.by_guest and not self._guests)
        )  # fmt: skip

    def take(self, stream: Stream, data: bytes, length: int, at_s: float) -> bool:
        """The next segment of a stream whose connection is ready; False: nothing was done about it.

        data: what was captured of its payload.
        """
        conn = stream.conn
        if stream.to_server:
            done = self.request(stream, conn, data, length, at_s)
        elif stream.mode == HEAD:
            done = self.answer(stream, conn, data, length, at_s, lambda at: data[at:])
        else:
            done = self.part(stream, conn, length, at_s, lambda at: data[at:])
        if done:
            stream.nxt = (stream.nxt + length) & MASK
            stream.position += length
            conn.last_s = at_s
        return done

    def request(self, stream: Stream, conn: Connection, data: bytes, length: int, at_s: float) -> bool:
        """A request, whole in its segment. data: what was captured of its ``length`` bytes.

        Here and below, at_s: when the last byte came. False: nothing was done; else the caller moves the
        stream on.
        """
        plan = conn.quick
        definition = None
        if len(data) != length:
            return False
        if plan is None:
            definition, plan = self.recognised(data, conn)
            if plan is None:
                return False
        elif conn.state != "idle" or conn.verdict is not _SUITABLE:
            return False
        word = plan.asked(data)
        if word is None:
            return False
        if definition is not None:
            self._machine.adopt(conn, definition)
        conn.requests += 1
        stream.seen = stream.need = 0
        stream.total = UNKNOWN
        stream.until = b""
        self.asked(conn, word, data, (stream.nxt + length) & MASK, at_s)
        return True

    def answer(
        self, stream: Stream, conn: Connection, data: bytes, length: int, at_s: float, more: Read
    ) -> bool:
        """An answer's head, and what follows of its body: ``length`` bytes.

        data: what was captured of the first segment, or enough of that.
        """
        plan, queue = conn.quick, conn.queue
        if plan is None or len(queue) != 1 or conn.state != "busy" or not conn.requests:
            return False
        exchange = queue[0]
        answer = plan.told(data, exchange.word)
        if answer is None:
            return False
        _, begin, total, counts = answer
        if total == CHUNKED:
            found = chunks(CHUNK_SIZE, 0, begin, length, more)
            if found is None or found[2] >= conn.large_bytes:
                return False
            mode, need, seen = found
            total = UNKNOWN
        else:
            seen = length - begin
            need = total - seen if total > 0 else -seen
            if need < 0 or total >= conn.large_bytes:
                return False
            mode = COUNTED if need else HEAD
        conn.responses += counts
        stream.total, stream.need, stream.seen = total, need, seen
        stream.until = b""
        stream.more = stream.large = False
        stream.mode = mode
        if mode == HEAD:
            self._complete(stream, conn, at_s)
        else:
            stream.exchange, stream.pops = exchange, True
            if mode == COUNTED:
                self._machine.skips.body(stream)
        return True

    def part(self, stream: Stream, conn: Connection, length: int, at_s: float, more: Read) -> bool:
        """More of a body, and perhaps its end."""
        queue = conn.queue
        if (
            len(queue) != 1 or stream.exchange is not queue[0] or stream.more or not stream.pops
            or queue[0].word == GREETING or not conn.requests
        ):  # fmt: skip
            return False
        mode, need, seen = stream.mode, stream.need, length
        if mode == COUNTED:
            need -= length
            if need < 0:
                return False
            if not need:
                mode = HEAD
        elif mode in _CHUNKS:
            found = chunks(mode, need, 0, length, more)
            if found is None:
                return False
            mode, need, seen = found
        else:
            return False
        seen += stream.seen
        if not stream.large and (seen >= conn.large_bytes or stream.total >= conn.large_bytes):
            return False
        stream.seen, stream.need, stream.mode = seen, need, mode
        if mode == HEAD:
            self._complete(stream, conn, at_s)
        return True

    def recognised(self, data: bytes, conn: Connection) -> tuple[Definition | None, Plan | None]:
        """The protocol of a connection whose client begins with such a segment, and its short way."""
        end = data.find(b"\n")
        definition = None if end < 0 else self._machine.first_request(data[:end], conn.port)
        return definition, self._machine.plan(definition)

    def limit(self, definition: Definition) -> int:
        return self._machine.limit(definition)

    def adopt(self, conn: Connection, definition: Definition) -> None:
        self._machine.adopt(conn, definition)

    def asked(self, conn: Connection, word: str, data: bytes, end: int, at_s: float) -> None:
        """A request is outstanding, the only one. end: the sequence number behind it."""
        line = data[: data.find(b"\n")].rstrip(b"\r")
        conn.queue.append(Exchange(word, line[:SHOWN_BYTES], end, at_s))
        conn.state = "busy"
        if conn.verdict is not _UNSUITABLE:
            conn.verdict = _UNSUITABLE
            conn.since_s = at_s
            self._turned(conn, _UNSUITABLE, at_s)

    def answered(self, conn: Connection, at_s: float) -> None:
        """The only answer that was waited for is complete."""
        conn.queue.popleft()
        conn.state = "idle"
        if conn.verdict is not _SUITABLE:
            conn.verdict = _SUITABLE
            conn.since_s = at_s
            self._turned(conn, _SUITABLE, at_s)

    def _complete(self, stream: Stream, conn: Connection, at_s: float) -> None:
        """The answer under way is."""
        stream.large = stream.pops = False
        stream.exchange = None
        conn.lost_busy = False
        self.answered(conn, at_s)

    def exchanged(
        self, conn: Connection, count: int, counted: int, total: int, seen: int, at_s: float
    ) -> None:
        """A run of exchanges has passed, each from its request to the last byte of its answer.

        counted: answers that count. total, seen: of the last one's body, as in Stream. What a run leaves
        behind is what its last exchange leaves, but for sums: so it is written down once.
        """
        client, server = conn.client, conn.server
        conn.requests += count
        conn.responses += counted
        client.seen = client.need = server.need = 0
        client.total = UNKNOWN
        client.until = server.until = b""
        server.total, server.seen = total, seen
        server.more = server.large = False
        conn.lost_busy = False
        conn.state = "idle"
        conn.verdict = _SUITABLE
        conn.since_s = conn.last_s = at_s


def _fresh(conn: Connection) -> bool:
    """Whether a connection's first request is what may come next."""
    return (
        conn.state == "new" and conn.definition is None and not conn.opaque and not conn.midstream
        and not conn.client.position and not conn.server.position
    )  # fmt: skip


def chunks(mode: int, need: int, at: int, length: int, more: Read) -> tuple[int, int, int] | None:
    """From chunk to chunk through bytes [at, length): the mode behind them, a chunk's rest, body bytes seen.

    HEAD: the body's end is theirs. None: the machine knows.
    """
    seen = 0
    while at < length:
        if mode == CHUNK:
            step = min(need, length - at)
            at += step
            seen += step
            need -= step
            if not need:
                mode = CHUNK_SIZE
            continue
        line = more(at)[:_SIZE_BYTES_MAX]
        end = line.find(b"\n") + 1
        if not end:
            return None
        at += end
        digits = line[: end - 1].rstrip(b"\r")
        if mode == TRAILER:
            return (HEAD, 0, seen) if at == length and not digits else None
        if not digits or not HEX.issuperset(digits):
            return None
        size = int(digits, 16)
        if size >= SKIP_BYTES_MIN:
            return None
        mode, need = (CHUNK, size + 2) if size else (TRAILER, 0)
    return mode, need, seen
