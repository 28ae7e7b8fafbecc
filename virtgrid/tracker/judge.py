"""From the place of a connection's readers to a state, a verdict and a reason.

Pure functions of the connection and the time. The verdict of a state comes from the definition;
this file knows what holds for every protocol: what is unknown counts as unsuitable until it has
been silent for long enough, and a connection whose server has closed has nothing to lose.
"""

from __future__ import annotations

from typing import Final

from virtgrid.core.units import format_size
from virtgrid.tracker.connection import Connection, Exchange
from virtgrid.tracker.rules import GREETING, Kind, Pause
from virtgrid.tracker.streams import (
    BLIND,
    COUNTED,
    EITHER,
    HEAD,
    LINE,
    PENDING,
    RECORD,
    UNKNOWN,
    Stream,
)
from virtgrid.tracker.views import Verdict

NEVER: Final = float("inf")
#: A SYN the guest has not answered: a scan of filtered ports must not hold a migration.
CONNECTING_HOLD_S: Final = 1.0
#: Seen mid-stream and silent for this long: judged as idle.
MIDSTREAM_QUIET_S: Final = 3.0
#: Seen mid-stream in the middle of a transfer whose head was missed: its length is not known, but a
#: transfer that has run for so long, with so much sent and nothing asked since, hides a pause as a
#: large one does. Otherwise a download begun before the capture would block a hold to its end.
TRANSFER_S: Final = 5.0
TRANSFER_BYTES: Final = 256 << 10
#: The same where a request was outstanding when frames were lost: an answer may take its time.
LOST_QUIET_S: Final = 30.0

# Before a protocol is known its definition cannot be asked.
_NEW: Final = Pause(Kind.HOLD, 5.0)
#: Whoever spoke last tells a little: a server that did has probably answered.
_OPAQUE: Final = Pause(Kind.QUIET, 2.0, 10.0)
_HELD: Final = Pause(Kind.HOLD)
_PAUSES: Final = {"new": _NEW, "opaque": _OPAQUE, "moving": Pause(Kind.OK)}

#: States whose suitability rests on silence: any traffic ends it.
BY_SILENCE: Final = frozenset({"opaque", "unknown", "busy"})

_IDLE: Final = "keep-alive, nothing outstanding"
_PRINTABLE: Final = bytes(c if 32 <= c <= 126 else ord("?") for c in range(256))

SUITABLE: Final = Verdict.SUITABLE
UNSUITABLE: Final = Verdict.UNSUITABLE

Judgement = tuple[str, Verdict, float]


def state_of(conn: Connection) -> str:
    """The state's name; machine.py has the table."""
    client, server = conn.client, conn.server
    if server.fin_done:
        return "closing"
    if conn.unwatched and not conn.opaque:
        return "unknown"
    if conn.owner is not None:
        return _state_of_derived(conn, conn.owner)
    if conn.opaque:
        return "closing" if client.fin_done else "opaque"
    if client.mode == HEAD and client.buf and server.mode >= BLIND and conn.definition and not server.large:
        return "busy"  # whatever was missed of the server's: a request has begun
    if client.mode >= BLIND or server.mode >= BLIND:
        # An upload whose end may have been missed may be waiting for its answer: that is not known.
        return "moving" if server.large and client.mode != BLIND else "unknown"
    if conn.queue:
        return _state_outstanding(conn, conn.queue[0])
    if client.fin_done:
        return "closing"
    if client.mode != HEAD and client.mode != EITHER:
        return "moving" if client.large and client.seen else "busy"
    if client.buf or client.waiting or server.mode != HEAD or server.buf or server.waiting:
        return "busy"
    if client.in_more or server.in_more or server.upto:
        return "busy"
    if conn.requests or (conn.responses and not _greeted(conn)):
        return "idle"
    return "new"


def _greeted(conn: Connection) -> bool:
    """Whether the server's first words were a greeting, which answers no request."""
    return conn.definition is not None and conn.definition.greeting and not conn.midstream


def _state_outstanding(conn: Connection, oldest: Exchange) -> str:
    client, server = conn.client, conn.server
    if oldest.word == GREETING:
        return "new" if len(conn.queue) == 1 and not client.buf and client.mode == HEAD else "busy"
    if server.exchange is oldest:
        return "moving" if server.large else "busy"
    if oldest.transfer and conn.data is not None and _large_data(conn.data):
        return "moving"
    if client.exchange is oldest:
        if client.large and client.seen:
            return "moving"
        if oldest.waiting and client.mode == LINE and not (client.buf or server.buf or server.mode != HEAD):
            return "waiting"
    return "busy"


def _large_data(data: Connection) -> bool:
    """Whether the transfer on a data connection is large, and still under way."""
    client, server = data.client, data.server
    return not (data.closed or client.fin_done or server.fin_done) and (client.large or server.large)


def _state_of_derived(conn: Connection, owner: Connection) -> str:
    """A data connection has no messages of its own: its control connection knows what goes on."""
    if conn.client.fin_done:
        return "closing"
    if owner.closed or owner.opaque:
        return "opaque"
    if owner.queue and owner.queue[0].transfer:
        return "moving" if _large_data(conn) else "busy"
    return "opaque" if conn.client.position or conn.server.position else "new"


def judge(conn: Connection, now_s: float, count_outgoing: bool) -> Judgement:
    """State, verdict, and when to judge again if nothing happens until then."""
    state = state_of(conn)
    if conn.by_guest and not count_outgoing:
        return state, SUITABLE, NEVER
    if state == "closing":
        return state, SUITABLE, NEVER
    if state == "unknown":
        if _transfer_under_way(conn):
            begun = conn.opened_s + TRANSFER_S
            return (state, SUITABLE, NEVER) if now_s >= begun else (state, Verdict.UNKNOWN, begun)
        due = conn.last_s + (LOST_QUIET_S if conn.lost_busy else MIDSTREAM_QUIET_S)
        return (state, SUITABLE, NEVER) if now_s >= due else (state, Verdict.UNKNOWN, due)
    if state == "busy" and conn.gaps:
        # What was missed may have been the answer: not for ever.
        due = conn.last_s + LOST_QUIET_S
        return (state, SUITABLE, NEVER) if now_s >= due else (state, UNSUITABLE, due)
    pause = pause_of(conn, state)
    if pause.kind is Kind.OK:
        return state, SUITABLE, NEVER
    if pause.for_s is None:
        return state, UNSUITABLE, NEVER
    if state == "opaque":
        return _judge_opaque(conn, pause, now_s)
    if state == "new" and not conn.synack:
        due = conn.opened_s + min(CONNECTING_HOLD_S, pause.for_s)
    else:
        due = (conn.fresh_s if pause.kind is Kind.HOLD else conn.last_s) + pause.for_s
    return (state, SUITABLE, NEVER) if now_s >= due else (state, UNSUITABLE, due)


def _judge_opaque(conn: Connection, pause: Pause, now_s: float) -> Judgement:
    """By silence, which must be longer when the client spoke last; TLS not inside a record."""
    quiet_s = pause.for_s or 0.0
    if conn.client_last and pause.asked_s is not None:
        quiet_s = pause.asked_s
    due = conn.last_s + quiet_s
    if inside_record(conn):
        if now_s < conn.last_s + LOST_QUIET_S:
            # Looked at again soon: the record's end alone does not cause it.
            return "opaque", UNSUITABLE, min(max(due, now_s + 0.5), conn.last_s + LOST_QUIET_S)
        return "opaque", SUITABLE, NEVER
    return ("opaque", SUITABLE, NEVER) if now_s >= due else ("opaque", UNSUITABLE, due)


def inside_record(conn: Connection) -> bool:
    """Whether a TLS record has begun in either direction and not ended."""
    return conn.tls and any(
        s.mode == COUNTED or (s.mode == RECORD and s.buf) for s in (conn.client, conn.server)
    )


def _transfer_under_way(conn: Connection) -> bool:
    """Whether the server has sent much since the connection was first seen, and the client nothing."""
    return (
        conn.midstream
        and not conn.unwatched
        and not conn.gaps
        and conn.client.position == 0
        and conn.server.position >= TRANSFER_BYTES
    )


def pause_of(conn: Connection, state: str) -> Pause:
    """The verdict a definition gives a state; before one is known, the common rule."""
    definition = conn.definition
    if definition is None and state == "new":
        # Where a server of that port speaks first, its greeting is waited for as its protocol says.
        definition = conn.hint
    if definition is not None and not (conn.tls and state == "opaque"):
        return definition.pauses[state]
    return _PAUSES.get(state, _HELD)


def brief(conn: Connection, state: str, verdict: Verdict, now_s: float) -> str | Exchange:
    """As ``reason_of``; where it is only that an answer is waited for, the exchange.

    That is said with every request, and most of it is never read: ``waiting_for`` puts it into words.
    """
    if state == "idle" and verdict is SUITABLE and not conn.by_guest:
        return _IDLE
    if state == "busy" and len(conn.queue) == 1 and not conn.by_guest and verdict is not SUITABLE:
        oldest = conn.queue[0]
        client, server = conn.client, conn.server
        if (
            conn.owner is None
            and server.exchange is not oldest
            and client.exchange is not oldest
            and not server.buf
        ):
            return oldest
    return reason_of(conn, state, verdict, now_s)


def waiting_for(exchange: Exchange) -> str:
    return f"waiting for the response to {_line(exchange)}"


def reason_of(conn: Connection, state: str, verdict: Verdict, now_s: float) -> str:
    """Why, for people; what comes from the wire is cut short and stripped of control characters."""
    text = _reason(conn, state, verdict, now_s)
    return f"{text} (opened by the guest)" if conn.by_guest else text


def _reason(conn: Connection, state: str, verdict: Verdict, now_s: float) -> str:
    silent = f"{max(0.0, now_s - conn.last_s):.1f} s"
    ok = verdict is SUITABLE
    match state:
        case "closing":
            return "closing, nothing outstanding" if not conn.queue else "closed by the server"
        case "new":
            if not conn.synack:
                return "connecting, not answered by the server yet"
            return (
                f"connected for {max(0.0, now_s - conn.fresh_s):.1f} s, {_not_yet(conn)}"
                if ok
                else f"just connected, {_not_yet(conn)} yet"
            )
        case "idle":
            return _IDLE if ok else f"nothing outstanding, last traffic {silent} ago"
        case "opaque":
            what = {"tls": "TLS", "tunnel": "tunnel or upgraded connection"}.get(
                conn.label, "unknown protocol"
            )
            if conn.owner is not None:
                what = "data connection, no transfer known"
            if not ok and inside_record(conn):
                return f"{what}, inside a record"
            return f"{what}, quiet for {silent}" if ok else f"{what}, last traffic {silent} ago"
        case "unknown":
            why = (
                "seen mid-stream" if conn.midstream and not conn.gaps else conn.lost_why or "seen mid-stream"
            )
            if ok and _transfer_under_way(conn):
                sent = format_size(conn.server.position)
                return f"a transfer seen mid-stream, {sent} so far, nothing asked since"
            return f"no traffic for {silent} ({why})" if ok else f"state unknown ({why})"
        case "moving":
            return _moving(conn)
        case "waiting":
            return "the client waits for news, nothing else outstanding"
    if ok:
        return f"no traffic for {silent} (frames were missed before)"
    return _busy(conn)


def _not_yet(conn: Connection) -> str:
    if conn.owner is not None:
        return "no transfer"
    greets = conn.definition or conn.hint
    if not conn.responses and greets is not None and greets.greeting:
        return "no greeting"
    return "no request"


def _moving(conn: Connection) -> str:
    download = conn.server.large
    stream = conn.server if download else conn.client
    data = conn if conn.owner is not None else conn.data
    if data is not None:
        sent, received = data.server.position, data.client.position
        size = conn.queue[0].size if conn.queue else conn.owner.queue[0].size if conn.owner else 0
        of = f" of {format_size(size)}" if size else ""
        return f"large transfer over a data connection, {format_size(sent + received)}{of} so far"
    name = "large download" if download else "large upload"
    if stream.mode == COUNTED and stream.total != UNKNOWN:
        return f"{name}, {format_size(stream.need)} of {format_size(stream.total)} left"
    return f"{name}, {format_size(stream.seen)} so far"


def _body(stream: Stream, name: str) -> str:
    if stream.mode == COUNTED:
        return f"{name}, {format_size(stream.need)} left"
    return f"{name}, {format_size(stream.seen)} so far"


def _busy(conn: Connection) -> str:
    client, server = conn.client, conn.server
    if conn.owner is not None:
        return f"data connection, {format_size(client.position + server.position)} so far"
    more = f" ({len(conn.queue) - 1} more waiting)" if len(conn.queue) > 1 else ""
    if conn.queue:
        oldest = conn.queue[0]
        if server.exchange is oldest:
            return _body(server, "response") + more
        if server.buf:
            return "response, head incomplete" + more
        if client.exchange is oldest and client.mode == LINE:
            return f"the client's turn to go on with {_line(oldest)}{more}"
        if client.exchange is oldest and client.mode not in (HEAD, PENDING):
            return _body(client, "request body") + more
        return waiting_for(oldest) + more
    if client.mode != HEAD:
        return _body(client, "request body")
    if client.waiting or server.waiting:
        return "segments missing, waiting for their retransmission"
    return "request, head incomplete" if client.buf else "response, head incomplete"


def _line(exchange: Exchange) -> str:
    """``GET /x``: the request's first two words, printable and at most 60 characters."""
    text = b" ".join(exchange.line.split(b" ", 2)[:2]).translate(_PRINTABLE).decode("ascii")
    if exchange.word == GREETING:
        return "nothing, before the server's greeting"
    if not text:
        return "a request that was not seen"
    return text if len(text) <= 60 else text[:57] + "..."
