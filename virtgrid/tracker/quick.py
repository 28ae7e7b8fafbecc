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
The way is open for the definitions of which a ``Plan`` can be made: heads up to an empty line, busy
is unsuitable and idle is suitable whatever the time, and all a rule does is push, pop and tell a
body's length. A head that has more to say is left to the machine, before anything is changed; so
both ways do the same, which a property test holds them to. Bytes that are fed together may be of
many segments (block.py): what matters is when the last of them came.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NamedTuple

from virtgrid.tracker.bodies import HEX
from virtgrid.tracker.connection import SHOWN_BYTES, Connection, Exchange
from virtgrid.tracker.decode import ACK, FIN, RST, SYN
from virtgrid.tracker.rules import EMPTY, GREETING, Body, Choice, Definition, Kind, Rule
from virtgrid.tracker.skips import SKIP_BYTES_MIN
from virtgrid.tracker.streams import CHUNK, CHUNK_SIZE, COUNTED, HEAD, MASK, TRAILER, UNKNOWN, Stream
from virtgrid.tracker.views import Verdict

if TYPE_CHECKING:
    from virtgrid.tracker.machine import Machine

#: Of a segment's flags: with others than ACK it is no plain one.
SPECIAL: Final = SYN | FIN | RST | ACK
_LINE_ENDS: Final = b"\r\n"
_LINES_MAX: Final = 1024
_LINE_BYTES_MAX: Final = 64
_SUITABLE: Final = Verdict.SUITABLE
_UNSUITABLE: Final = Verdict.UNSUITABLE

_RESTS_MAX: Final = 256
_REST_BYTES_MAX: Final = 1024
#: A chunk's size with its line's end, as servers write it.
_SIZE_BYTES_MAX: Final = 18
_CHUNKS: Final = frozenset({CHUNK_SIZE, CHUNK, TRAILER})
#: Instead of a body's length; and one that is never small.
_CHUNKED: Final = -2
_NOT_HERE: Final = 1 << 62

#: What was captured of the segment that a place in the bytes at hand lies in, from there on.
Read = Callable[[int], bytes]
#: Where a field is told: what its line begins with; how it reads where this file knows what it says. A
#: length is its group, without one the body is chunked.
Mark = tuple[bytes, re.Pattern[bytes]]


class Ask:
    """What a request's first line says. group: of the pattern, its word; or ``word`` itself.

    marks: what a line begins with that tells more, of a body for instance.
    """

    __slots__ = ("_alone", "_marks", "group", "pattern", "word")

    def __init__(
        self, pattern: re.Pattern[bytes], group: str | None, word: str, marks: tuple[bytes, ...]
    ) -> None:
        self.pattern = pattern
        self.group = group
        self.word = word
        self._marks = marks
        self._alone: set[bytes] = set()

    def alone(self, rest: bytes) -> bool:
        """Whether behind its first line a head goes on to the end of ``rest``, and tells nothing more.

        Of a client's requests the first lines differ, and the rest is mostly the same: it is remembered.
        """
        if rest in self._alone:
            return True
        if not rest.endswith(b"\n\r\n") or rest.find(b"\n\r\n") != len(rest) - 3 or b"\n\n" in rest:
            return False
        low = rest.lower()
        for mark in self._marks:
            if mark in low:
                return False
        if len(rest) <= _REST_BYTES_MAX:
            if len(self._alone) >= _RESTS_MAX:
                self._alone.clear()
            self._alone.add(rest)
        return True


class Answer(NamedTuple):
    """What a response's first line says. ends: where none of the marks is found, there is no body."""

    counts: bool
    marks: tuple[Mark, ...]
    ends: bool


class Plan:
    """A definition, as far as the short way knows it.

    asks: by a line's first byte. fitting: the server's rules that fit a line, in their order.
    answers: what is known of lines (and the words they answer) that have come; bounded.
    """

    __slots__ = ("answers", "asks", "definition", "head_max")

    def __init__(self, definition: Definition) -> None:
        self.definition = definition
        self.head_max = definition.head_max
        self.asks = tuple(
            None if first in _LINE_ENDS else _ask(definition, rules)
            for first, rules in enumerate(definition.client_table[:EMPTY])
        )
        self.answers: dict[tuple[bytes, str], Answer | None] = {}

    def answer(self, line: bytes, word: str) -> Answer | None:
        """What a line answers to a request of that word; None: the machine knows."""
        found = None
        whole, line = line, line.rstrip(b"\r")
        for rule in self.definition.server_table[line[0]]:
            if rule.tail or rule.tag:
                break
            if rule.pattern.match(line) and (not rule.guard or word in rule.guard):
                found = _answer(self.definition, rule)
                break
        if len(whole) <= _LINE_BYTES_MAX and len(word) <= _LINE_BYTES_MAX:
            if len(self.answers) >= _LINES_MAX:
                self.answers.clear()
            self.answers[whole, word] = found
        return found


def plan_of(definition: Definition) -> Plan | None:
    """The short way of a definition; None where it has none."""
    busy, idle = definition.pauses["busy"], definition.pauses["idle"]
    rules = (*definition.client, *definition.server)
    if (
        definition.lines or definition.greeting or definition.client_more or definition.server_more
        or busy.kind is not Kind.HOLD or busy.for_s is not None or idle.kind is not Kind.OK
        or any(rule.expect or rule.more or rule.upto for rule in rules)
    ):  # fmt: skip
        return None
    return Plan(definition)


def _simple(rule: Rule) -> bool:
    return not (
        rule.tail or rule.tag or rule.note or rule.go or rule.opaque or rule.ask or rule.waiting
        or rule.transfer or rule.size or rule.volume is not None or rule.add
    )  # fmt: skip


def _ask(definition: Definition, rules: tuple[Rule, ...]) -> Ask | None:
    if len(rules) != 1:
        return None
    rule = rules[0]
    if not _simple(rule) or rule.guard or not rule.push or rule.pop or rule.counts:
        return None
    names = {rule.awaits[0]} if rule.awaits else set()
    for choice in rule.bodies:
        if choice.kind is Body.NONE:
            break
        if not _by_field(choice):
            return None
        names.add(choice.name)
    if rule.awaits and not rule.awaits[1]:
        return None
    marks = tuple(sorted(b"\n" + definition.fields[name] for name in names))
    return Ask(rule.pattern, rule.push if rule.push_group else None, rule.push, marks)


def _answer(definition: Definition, rule: Rule) -> Answer | None:
    if not _simple(rule) or not rule.pop or rule.push or rule.awaits:
        return None
    marks: list[Mark] = []
    for choice in rule.bodies:
        if choice.kind is Body.NONE:
            break
        if not _by_field(choice):
            return Answer(rule.counts, tuple(marks), False)
        name = definition.fields[choice.name]
        value = rb"([0-9]{1,18})" if choice.kind is Body.BYTES else rb"chunked"
        marks.append((b"\n" + name, re.compile(rb"\n%b:[ \t]*%b[ \t]*\r?\n" % (re.escape(name), value))))
    return Answer(rule.counts, tuple(marks), True)


def _by_field(choice: Choice) -> bool:
    return choice.kind in (Body.BYTES, Body.CHUNKED) and bool(choice.name) and not choice.group


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
        begin = data.find(b"\n")
        if begin < 0 or len(data) != length:
            return False
        line = data[:begin]
        definition = None
        if plan is None:
            definition = self._machine.first_request(line, conn.port)
            plan = self._machine.plan(definition)
            if plan is None:
                return False
        elif conn.state != "idle" or conn.verdict is not _SUITABLE:
            return False
        ask = plan.asks[data[0]]
        if ask is None or length > plan.head_max or not ask.alone(data[begin:]):
            return False
        line = line.rstrip(b"\r")
        match = ask.pattern.match(line)
        if match is None:
            return False
        word = ask.word if ask.group is None else (match[ask.group] or b"").decode("ascii", "replace")
        if word == GREETING:
            return False
        if definition is not None:
            self._machine.adopt(conn, definition)
        conn.requests += 1
        conn.queue.append(Exchange(word, line[:SHOWN_BYTES], (stream.nxt + length) & MASK, at_s))
        stream.seen = stream.need = 0
        stream.total = UNKNOWN
        stream.until = b""
        conn.state = "busy"
        if conn.verdict is not _UNSUITABLE:
            conn.verdict = _UNSUITABLE
            conn.since_s = at_s
            self._turned(conn, _UNSUITABLE, at_s)
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
        word = exchange.word
        begin = data.find(b"\n\r\n") + 3
        if (
            begin < 3 or data[0] in _LINE_ENDS or begin > plan.head_max or word == GREETING
            or data.find(b"\n\n", 0, begin) >= 0
        ):  # fmt: skip
            return False
        key = data[: data.find(b"\n")], word
        answer = plan.answers[key] if key in plan.answers else plan.answer(*key)
        if answer is None:
            return False
        total = _total(answer, data[:begin].lower())
        if total == _CHUNKED:
            found = _chunks(CHUNK_SIZE, 0, begin, length, more)
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
        conn.responses += answer.counts
        stream.total, stream.need, stream.seen = total, need, seen
        stream.until = b""
        stream.more = stream.large = False
        stream.mode = mode
        if mode == HEAD:
            self._answered(stream, conn, at_s)
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
            found = _chunks(mode, need, 0, length, more)
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
            self._answered(stream, conn, at_s)
        return True

    def _answered(self, stream: Stream, conn: Connection, at_s: float) -> None:
        """The only answer that was waited for is complete."""
        stream.large = stream.pops = False
        stream.exchange = None
        conn.queue.popleft()
        conn.lost_busy = False
        conn.state = "idle"
        if conn.verdict is not _SUITABLE:
            conn.verdict = _SUITABLE
            conn.since_s = at_s
            self._turned(conn, _SUITABLE, at_s)


def _fresh(conn: Connection) -> bool:
    """Whether a connection's first request is what may come next."""
    return (
        conn.state == "new" and conn.definition is None and not conn.opaque and not conn.midstream
        and not conn.client.position and not conn.server.position
    )  # fmt: skip


def _total(answer: Answer, low: bytes) -> int:
    """How long an answer's body is, from its head in lower case. UNKNOWN: there is none."""
    for mark, reads in answer.marks:
        at = low.find(mark)
        if at >= 0:
            match = reads.match(low, at)
            if match is None:
                return _NOT_HERE
            return int(match[1]) if match.lastindex else _CHUNKED
    return UNKNOWN if answer.ends else _NOT_HERE


def _chunks(mode: int, need: int, at: int, length: int, more: Read) -> tuple[int, int, int] | None:
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
