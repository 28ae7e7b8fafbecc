"""What a definition's rules do to a connection: heads are matched, bodies are counted.

A connection has one queue of outstanding exchanges, oldest first. A client's head that pushes adds
one; a server's head that pops answers the oldest, or the one its tag names, which leaves the queue
when the answer's body is complete. From the queue and the place of both readers follows the state
(judge.py):

    new      connected, no message yet                       -> busy, opaque
    busy     a request outstanding, or a message incomplete  -> idle, moving, waiting, opaque, unknown
    moving   as busy, but what is under way is large and
             belongs to the oldest exchange                  -> busy, idle, unknown
    waiting  a request outstanding that the client itself
             ends when it likes (IMAP's IDLE)                -> busy, unknown
    idle     nothing outstanding                             -> busy, closing
    opaque   not readable: TLS, a tunnel, another protocol   -> closing
    unknown  bytes were missed or the start was not seen     -> any, with the next head
    closing  an end has been seen, nothing is outstanding    -> (gone)
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from virtgrid.tracker.bodies import number
from virtgrid.tracker.connection import SHOWN_BYTES, Connection, Exchange
from virtgrid.tracker.derived import announce
from virtgrid.tracker.recognise import RECONSIDER_BYTES, Recogniser
from virtgrid.tracker.rules import EMPTY, GREETING, Body, Choice, Definition, Rule, Table
from virtgrid.tracker.streams import (
    BLIND,
    CHUNK,
    CHUNK_SIZE,
    CLOSE,
    COUNTED,
    EITHER,
    HALF,
    HEAD,
    LINE,
    LOST,
    MASK,
    PENDING,
    TRAILER,
    UNKNOWN,
    UNTIL,
    Stream,
)  # fmt: skip

__all__ = ["Connection", "Exchange", "Machine"]

_QUEUE_MAX: Final = 4096
_TAIL_BYTES: Final = 64
_FITS_MAX: Final = 1024
_FITS_BYTES_MAX: Final = 64
#: Of what a client sends without waiting for leave.
_KEPT_MAX: Final = 8192

Match = re.Match[bytes]


class Machine(Recogniser):
    """Runs definitions over the ordered bytes of connections.

    ack: the acknowledgement number of the segment at hand; set by the tracker, as ``now_s`` is.
    """

    def __init__(self, definitions: Sequence[Definition], large_bytes: int) -> None:
        super().__init__(definitions, large_bytes)
        self.ack = 0
        # By the definition's table, which lives as long as the definition, and the line.
        self._fits: dict[tuple[int, bytes], list[tuple[Rule, Match]]] = {}
        # How many bytes of the run at hand lie behind what was captured of it.
        self._behind = 0

    # -- bytes -----------------------------------------------------------------------------

    def deliver(self, stream: Stream, data: bytes, length: int) -> None:
        """The next bytes of a stream (streams.Reader)."""
        conn = stream.conn
        if conn.opaque and stream.position - length <= RECONSIDER_BYTES:
            self.reconsider(stream, data, stream.position == length)
        self._behind = length - len(data)
        at = 0
        while at < length and not conn.opaque:
            mode = stream.mode
            if mode in (COUNTED, CHUNK):
                take = min(stream.need, length - at)
                at += take
                stream.need -= take
                self.count(stream, take)
                if not stream.need:
                    if mode == CHUNK:
                        stream.mode = CHUNK_SIZE
                    else:
                        self.part_done(stream)
            elif mode == CLOSE:
                if stream.position == length:
                    conn.dirty = True
                self.count(stream, length - at)
                return
            elif self.rest is not None and mode != LOST and (at >= len(data) or mode in (UNTIL, BLIND)):
                data = self.with_rest(data, length)
                self._behind = length - len(data)
            elif mode == UNTIL:
                at = self.until(stream, data, at, length)
            elif at >= len(data):
                # A head or a chunk's size lies beyond what the snap length kept.
                if mode in (CHUNK_SIZE, TRAILER):
                    self.blind(stream, "a chunk's boundary was not captured")
                else:
                    self.lose(stream, "a message's head was not captured whole")
                return
            elif mode == HEAD:
                definition = conn.definition
                if definition is not None and definition.lines:
                    at = self._collect_line(stream, data, at)
                else:
                    at = self._collect(stream, data, at)
            elif mode == CHUNK_SIZE:
                at = self.chunk_size(stream, data, at)
            elif mode == TRAILER:
                at = self.trailer(stream, data, at)
            elif mode == LINE:
                at = self._collect_line(stream, data, at)
            elif mode == PENDING:
                at = self._keep(stream, data, at)
            elif mode == EITHER:
                self.either(stream, data[at:])
            else:
                at = self.search(stream, data, at, length)
        if conn.opaque:
            if conn.client_last is not stream.to_server:
                conn.client_last = stream.to_server
                conn.dirty = True
            if conn.tls and at < length:
                if stream.mode != LOST and length - at > stream.need:
                    data = self.with_rest(data, length)
                self.records(stream, data[at:], length - at)

    def lose(self, stream: Stream, why: str) -> None:
        """Bytes that mattered were missed (streams.Reader)."""
        conn = stream.conn
        conn.gaps += 1
        if conn.opaque:
            if conn.tls:
                stream.mode = LOST
                stream.buf.clear()
            return
        conn.lost_busy = conn.lost_busy or bool(conn.queue)
        conn.lost_why = why
        conn.dirty = True
        if stream.mode == UNTIL:
            # Its end is still to be recognised, or was among what was missed.
            self.blind(stream, why)
            return
        self._astray(stream)
        if stream.peer.mode in (PENDING, LINE):
            # Leave to send, or its refusal, may have been among what was missed.
            self._astray(stream.peer)

    def _astray(self, stream: Stream) -> None:
        stream.mode = LOST
        stream.buf.clear()
        stream.line_checked = stream.in_more = stream.more = stream.large = False
        stream.upto = b""
        stream.need = stream.seen = 0

    def end(self, stream: Stream) -> None:
        """The stream's last byte has come (FIN)."""
        stream.conn.dirty = True
        if stream.mode == CLOSE or stream.mode == BLIND:
            self.complete(stream)

    # -- heads -----------------------------------------------------------------------------

    def _collect(self, stream: Stream, data: bytes, at: int) -> int:
        """Collect a head that ends with an empty line; returns how far ``data`` is used up."""
        conn = stream.conn
        buf = stream.buf
        if not buf:
            # Empty lines before a request are to be ignored (RFC 9112, 2.2).
            while at < len(data) and data[at] in b"\r\n":
                at += 1
            if at == len(data):
                return at
            conn.dirty = True
            definition = conn.definition
            if definition is not None and not definition.lines:
                end = _head_end(data, at)
                if 0 < end <= at + definition.head_max:
                    self._head_whole(stream, data[at:end], self._place(stream, data, end))
                    return end
        before = len(buf)
        buf += data[at:] if at else data
        definition = conn.definition
        if definition is None:
            definition = self.recognise(stream)
            if definition is None:
                return len(data)
            if definition.lines:
                kept = bytes(buf)
                buf.clear()
                return at + self._collect_line(stream, kept, 0) - before
        end = _head_end(buf, max(0, before - 3))
        if end < 0 or end > definition.head_max:
            if end > 0 or len(buf) > definition.head_max:
                self.lose(stream, "a head is longer than its limit")
            elif not stream.line_checked and (newline := buf.find(b"\n")) >= 0:
                stream.line_checked = True
                line = bytes(buf[:newline])
                rules = definition.client if stream.to_server else definition.server
                if not any(rule.pattern.match(line) for rule in rules):
                    self.unreadable(stream)
            return len(data)
        used = at + end - before
        head = bytes(buf[:end])
        buf.clear()
        stream.line_checked = False
        self._head_whole(stream, head, self._place(stream, data, used))
        return used

    def _head_whole(self, stream: Stream, head: bytes, end: int) -> None:
        self._head(stream, head[: head.find(b"\n")].rstrip(b"\r"), head, end)

    def _place(self, stream: Stream, data: bytes, used: int) -> int:
        """The sequence number behind what is used up: the stream stands behind the whole run."""
        return (stream.nxt - self._behind - (len(data) - used)) & MASK

    def _collect_line(self, stream: Stream, data: bytes, at: int) -> int:
        """Collect a line; returns how far ``data`` is used up."""
        conn = stream.conn
        buf = stream.buf
        assert conn.definition is not None
        newline = data.find(b"\n", at)
        end = newline if newline >= 0 else len(data)
        if not buf:
            conn.dirty = True
        # Of a line that is longer than its limit the beginning counts, and where it ends.
        buf += data[at : min(end, at + conn.definition.head_max - len(buf))]
        if newline < 0:
            return len(data)
        line = bytes(buf).rstrip(b"\r")
        buf.clear()
        if stream.mode == LINE:
            self._line_given(stream)
        else:
            self._line(stream, line, self._place(stream, data, newline + 1))
        return newline + 1

    def _line(self, stream: Stream, line: bytes, end: int) -> None:
        if upto := stream.upto:
            if line[: len(upto)] != upto or line[len(upto) : len(upto) + 1] not in (b"", b" "):
                return
            stream.upto = b""
        if stream.in_more:
            self._more(stream, line, end)
        elif line:
            self._head(stream, line, line, end)

    def _more(self, stream: Stream, line: bytes, end: int) -> None:
        """A line that continues the message under way; one that no rule knows is the next message's."""
        definition = stream.conn.definition
        assert definition is not None
        stream.in_more = False
        table = definition.client_more_table if stream.to_server else definition.server_more_table
        for rule in table[line[0] if line else EMPTY]:
            match = rule.pattern.match(line)
            if not match or (rule.tail and not rule.tail.search(line, max(0, len(line) - _TAIL_BYTES))):
                continue
            groups = _groups(rule, match, line)
            self._announced(stream, rule, groups)
            if rule.ask and stream.exchange is not None:
                self._ask(stream, rule, groups)
            else:
                self.begin_body(stream, rule, groups, {})
            return
        self.complete(stream)
        if line:
            self._head(stream, line, line, end)

    def _head(self, stream: Stream, line: bytes, head: bytes, end: int) -> None:
        conn = stream.conn
        if stream.to_server and conn.hello:
            self.second_thought(conn, line)
        definition = conn.definition
        assert definition is not None
        table: Table = definition.client_table if stream.to_server else definition.server_table
        oldest = conn.queue[0].word if conn.queue else ""
        for rule, match in self._fitting(table, line):
            if rule.guard:
                target = _tagged(conn, match[rule.tag]) if rule.tag else None
                if (target.word if target else "" if rule.tag else oldest) not in rule.guard:
                    continue
            break
        else:
            self.unreadable(stream)
            return
        conn.dirty = True
        if stream.peer.mode >= BLIND and (rule.push or rule.pop):
            self._between_messages(stream, rule)
        groups = _groups(rule, match, line)
        fields = _fields(definition, head)
        if stream.to_server:
            # Of a command only what its pattern names is shown: what follows may be a password.
            shown = match[0].strip() or b"(unknown command)" if definition.lines else line
            self._request(stream, rule, groups, shown, end, fields)
        else:
            self._response(stream, rule, groups)
        if conn.opaque:
            return
        if rule.upto:
            stream.upto = groups[rule.upto]
        elif rule.ask:
            if stream.exchange is not None:
                self._ask(stream, rule, groups)
        elif rule.bodies or rule.more or rule.push or rule.pop:
            self.begin_body(stream, rule, groups, fields)

    def _fitting(self, table: Table, line: bytes) -> list[tuple[Rule, Match]]:
        """The rules that fit a line, with what they matched; status lines come again and again."""
        known = self._fits.get((id(table), line))
        if known is not None:
            return known
        out = []
        for rule in table[line[0] if line else EMPTY]:
            match = rule.pattern.match(line)
            if match and (not rule.tail or rule.tail.search(line, max(0, len(line) - _TAIL_BYTES))):
                out.append((rule, match))
        if len(line) <= _FITS_BYTES_MAX:
            if len(self._fits) >= _FITS_MAX:
                self._fits.clear()
            self._fits[id(table), line] = out
        return out

    def _between_messages(self, stream: Stream, rule: Rule) -> None:
        """A head that asks or answers says where the other side is: between messages."""
        peer = stream.peer
        if peer.mode == LOST:
            if stream.to_server:
                stream.conn.queue.clear()
            elif stream.conn.queue and not rule.tag:
                # Which request is answered is not known: there may have been more among what was missed. What
                # the answer means depends on it, so the client's next head has to come first.
                return
            peer.mode = HEAD
            peer.buf.clear()
        elif peer.mode == BLIND:
            peer.buf.clear()
            self.complete(peer)

    def _request(
        self,
        stream: Stream,
        rule: Rule,
        groups: dict[str, bytes],
        line: bytes,
        end: int,
        fields: dict[bytes, bytes],
    ) -> None:
        conn = stream.conn
        assert conn.definition is not None
        if rule.push:
            conn.requests += 1
            word = groups[rule.push].decode("ascii", "replace") if rule.push_group else rule.push
            exchange = Exchange(word, line[:SHOWN_BYTES], end, self.now_s)
            exchange.transfer, exchange.waiting = rule.transfer, rule.waiting
            if rule.tag:
                exchange.tag = groups[rule.tag]
            if rule.ask and rule.ask.kind is Body.UNTIL:
                exchange.size = conn.volume
            if rule.awaits:
                name, value = rule.awaits
                exchange.awaits = fields.get(conn.definition.fields[name], b"").strip().lower() == value
            stream.exchange = exchange
            # The capture may show an answer before its request; the acknowledgement tells.
            if conn.answered != UNKNOWN and (conn.answered - end) & MASK < HALF:
                conn.answered = UNKNOWN
                if rule.ask:
                    # Whether it was given leave is not known any more.
                    stream.exchange = None
                    self.lose(stream, "an answer came before its request")
                    return
            elif len(conn.queue) < _QUEUE_MAX:
                conn.queue.append(exchange)
            else:
                self.become_opaque(conn, "opaque")
        self._announced(stream, rule, groups)
        if rule.opaque:
            self.become_opaque(conn, rule.opaque)

    def _response(self, stream: Stream, rule: Rule, groups: dict[str, bytes]) -> None:
        conn = stream.conn
        conn.responses += rule.counts
        if rule.pop:
            target = _tagged(conn, groups[rule.tag]) if rule.tag else None
            if not rule.tag and conn.queue:
                target = conn.queue[0]
            elif target is None and not conn.queue:
                conn.answered = self.ack
                target = Exchange("", b"", 0, self.now_s)
                conn.queue.append(target)
            stream.exchange, stream.pops = target, True
        elif rule.bodies or rule.more:
            stream.exchange, stream.pops = (conn.queue[0] if conn.queue else None), False
        self._announced(stream, rule, groups)
        if rule.go:
            if not conn.queue:
                conn.answered = self.ack
            self._leave(conn.client)
        if rule.opaque:
            self.become_opaque(conn, "tunnel" if rule.opaque == "opaque" else rule.opaque)

    def _announced(self, stream: Stream, rule: Rule, groups: dict[str, bytes]) -> None:
        """Sizes that a message announces, and connections it promises."""
        conn = stream.conn
        if rule.size and conn.queue:
            exchange = stream.exchange if stream.to_server and stream.exchange else conn.queue[0]
            exchange.size = max(number(groups[rule.size]), conn.volume)
            if exchange.transfer and conn.data is not None:
                announce(conn.data, exchange.size)
        if rule.volume is not None:
            conn.volume = rule.volume if isinstance(rule.volume, int) else number(groups[rule.volume])
        if rule.add:
            conn.volume += number(groups[rule.add])
        if rule.expect:
            active, ports = rule.expect
            self.expected.add(conn, active, [number(groups[p]) for p in ports], self.now_s)

    def complete(self, stream: Stream) -> None:
        """A message has ended (streams.Reader)."""
        conn = stream.conn
        conn.dirty = True
        stream.mode = HEAD
        stream.large = stream.more = stream.in_more = False
        exchange, stream.exchange = stream.exchange, None
        pops, stream.pops = stream.pops, False
        if stream.to_server or not pops or exchange is None:
            return
        if conn.queue and conn.queue[0] is exchange:
            conn.queue.popleft()
        elif exchange in conn.queue:
            conn.queue.remove(exchange)
        if not conn.queue:
            conn.lost_busy = False
        if exchange.transfer and conn.data is not None:
            announce(conn.data, 0)
        if exchange.word == GREETING:
            conn.fresh_s = self.now_s
        client = conn.client
        if client.exchange is not exchange:
            return
        if client.mode in (PENDING, LINE):
            # Answered without leave: what the client sends next is a request.
            client.exchange = None
            client.more = False
            self._go_on(client, HEAD)
        elif exchange.awaits and not client.seen and client.mode != HEAD:
            # Answered without asking for the body: it may come all the same, or the next request.
            client.resume = client.mode
            client.mode = EITHER

    # -- leave to send ---------------------------------------------------------------------

    def _ask(self, stream: Stream, rule: Rule, groups: dict[str, bytes]) -> None:
        """The client asks for leave to send; until the server answers, what it sends is kept."""
        stream.ask = rule.ask
        stream.more = rule.more
        assert rule.ask is not None
        stream.ask_bytes = number(groups[rule.ask.name]) if rule.ask.group else 0
        stream.mode = PENDING
        stream.seen = 0

    def _keep(self, stream: Stream, data: bytes, at: int) -> int:
        stream.buf += data[at:]
        if len(stream.buf) > _KEPT_MAX:
            self.lose(stream, "the client did not wait for leave to send")
        return len(data)

    def _leave(self, client: Stream) -> None:
        ask = client.ask
        if client.mode != PENDING or ask is None:
            return
        client.conn.dirty = True
        client.seen = client.need = 0
        client.total = UNKNOWN
        client.large = False
        self._go_on(client, LINE, ask)

    def _go_on(self, stream: Stream, mode: int, ask: Choice | None = None) -> None:
        """Leave PENDING and read what was kept meanwhile."""
        kept = bytes(stream.buf)
        stream.buf.clear()
        stream.mode = mode
        if ask is not None and ask.kind is Body.UNTIL:
            self.begin_until(stream, ask.end)
        elif ask is not None and ask.kind is Body.BYTES:
            self.counted(stream, stream.ask_bytes)
        if kept:
            behind, rest = self._behind, self.rest
            self.rest = None
            self.deliver(stream, kept, len(kept))
            self._behind, self.rest = behind, rest

    def _line_given(self, stream: Stream) -> None:
        """The line that was asked for has come."""
        stream.conn.dirty = True
        if stream.ask is not None and stream.ask.kind is Body.LINES:
            stream.mode = PENDING
        else:
            self.part_done(stream)


def _tagged(conn: Connection, tag: bytes) -> Exchange | None:
    return next((e for e in conn.queue if e.tag == tag), None)


def _groups(rule: Rule, match: Match, line: bytes) -> dict[str, bytes]:
    """What the rule's patterns captured, by name."""
    out = match.groupdict(b"") if match.re.groups else {}
    if rule.tail and (tail := rule.tail.search(line, max(0, len(line) - _TAIL_BYTES))):
        out |= tail.groupdict(b"")
    return out


def _head_end(buf: bytearray | bytes, start: int) -> int:
    """Where the head ends: behind its empty line; -1 while it is incomplete."""
    crlf = buf.find(b"\n\r\n", start)
    bare = buf.find(b"\n\n", start, crlf + 1 if crlf >= 0 else len(buf))
    if bare >= 0:
        return bare + 2
    return crlf + 3 if crlf >= 0 else -1


def _fields(definition: Definition, head: bytes) -> dict[bytes, bytes]:
    """The fields a definition reads, from a head: name (lower case) -> the first value."""
    out: dict[bytes, bytes] = {}
    if definition.headers is not None:
        low = head.lower()
        for mark in definition.marks:
            at = low.find(mark)
            while at >= 0:
                match = definition.headers.match(head, at)
                if match and len(match[1]) + 1 == len(mark):
                    out[mark[1:]] = match[2]
                    break
                at = low.find(mark, at + 1)
    return out
