"""What a tracker knows of its connections, as JSON: it travels with the guest.

Without it every keep-alive connection would be unknown where the guest arrives. What is read back
is not trusted: every value is checked against its kind and bounds before anything is made of it,
and what was written under other definitions counts as seen mid-stream. Only what differs from a
fresh connection is written, so an idle connection takes some 200 bytes.

Times travel as ages at the moment of export: the pause itself is nobody's silence. Reordered
segments that wait for a hole do not travel; the hole does.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final

from virtgrid.core.errors import RefusedError
from virtgrid.tracker.connection import Connection, Exchange
from virtgrid.tracker.recognise import Recogniser
from virtgrid.tracker.rules import Body, Choice, Definition
from virtgrid.tracker.streams import (
    CHUNK_SIZE,
    COUNTED,
    EITHER,
    HEAD,
    LINE,
    LOST,
    MASK,
    PENDING,
    RECORD,
    UNKNOWN,
    UNTIL,
    Stream,
)

VERSION: Final = 1
BYTES_MAX: Final = 256 << 20
_QUEUE_MAX: Final = 4096
_EXPECTS_MAX: Final = 16
_COUNT_MAX: Final = 1 << 62
#: An incomplete head longer than this is not worth its bytes.
_BUFFER_MAX: Final = 4096
_AGE_MAX_S: Final = 1e7

# Name -> kind: a sequence number (or UNKNOWN), a count, yes or no, bytes of at most so many.
_Kind = str | int
_STREAM: Final[dict[str, _Kind]] = {
    "nxt": "sequence", "begin": "sequence", "acked": "sequence", "fin": "sequence", "fin_done": "flag",
    "position": "count", "mode": "mode", "need": "count", "seen": "count", "total": "length", "large": "flag",
    "buf": _BUFFER_MAX, "line_checked": "flag", "resume": "mode", "pops": "flag", "more": "flag",
    "in_more": "flag", "upto": 64, "until": 16, "ask_bytes": "count",
}  # fmt: skip
_CONNECTION: Final[dict[str, _Kind]] = {
    "label": "text", "hello": 512, "opaque": "flag", "tls": "flag", "client_last": "flag",
    "answered": "sequence", "requests": "count", "responses": "count", "large_transfers": "count",
    "gaps": "count", "volume": "count", "midstream": "flag", "synack": "flag", "by_guest": "flag",
    "lost_busy": "flag", "lost_why": "text", "unwatched": "flag",
}  # fmt: skip
_EXCHANGE: Final[dict[str, _Kind]] = {
    "word": "text", "line": 120, "end": "sequence", "awaits": "flag", "transfer": "flag", "waiting": "flag",
    "tag": 64, "size": "count",
}  # fmt: skip
_AGES: Final = ("opened_s", "fresh_s", "last_s")


class _Malformed(ValueError):
    pass


def export(connections: Sequence[Connection], now_s: float) -> bytes:
    """All connections as they stand at ``now_s``: JSON, UTF-8."""
    place = {conn: index for index, conn in enumerate(connections)}
    rows = [_connection(conn, place, now_s) for conn in connections]
    return json.dumps({"version": VERSION, "connections": rows}, separators=(",", ":")).encode()


def read(data: bytes, machine: Recogniser, at_s: float, most: int) -> list[Connection]:
    """The connections in ``data``, as if they had stood so at ``at_s``; at most ``most``.

    Errors: RefusedError when it is not what ``export`` wrote, or of another version.
    """
    hint = "both sides need the same version; without the state, connections begin as unknown"
    try:
        if len(data) > BYTES_MAX:
            raise _Malformed(f"larger than {BYTES_MAX >> 20} MiB")
        whole = json.loads(data)
        if not isinstance(whole, dict) or whole.get("version") != VERSION:
            raise _Malformed(f"not of version {VERSION}")
        rows = whole.get("connections")
        if not isinstance(rows, list):
            raise _Malformed("no list of connections")
        known = {d.name: d for d in machine.definitions}
        rows = rows[:most]
        made = [_restored(_object(row), machine, known, at_s) for row in rows]
        for conn, row in zip(made, rows, strict=True):
            _relate(conn, row, made, machine, at_s)
    except (_Malformed, UnicodeDecodeError, RecursionError, json.JSONDecodeError) as error:
        raise RefusedError("the tracker's state cannot be read", cause=str(error)[:200], hint=hint) from error
    return made


# -- writing -------------------------------------------------------------------------------


def _plain(value: object) -> object:
    return value.hex() if isinstance(value, bytes | bytearray) else value


def _differing(item: object, fresh: object, names: dict[str, _Kind]) -> dict[str, Any]:
    return {n: _plain(v) for n in names if (v := getattr(item, n)) != getattr(fresh, n)}


_FRESH_STREAM: Final = Stream(b"", True)
_FRESH: Final = Connection(Stream(b"", True), Stream(b"", False), 0.0)
_FRESH_EXCHANGE: Final = Exchange("", b"", 0, 0.0)


def _connection(conn: Connection, place: dict[Connection, int], now_s: float) -> dict[str, Any]:
    out: dict[str, Any] = {"key": conn.client.key.hex(), **_differing(conn, _FRESH, _CONNECTION)}
    out |= {name: round(max(0.0, now_s - getattr(conn, name)), 3) for name in _AGES}
    if conn.definition is not None:
        out["protocol"] = [conn.definition.name, conn.definition.digest]
    queue = list(conn.queue)
    if queue:
        out["queue"] = [
            {**_differing(e, _FRESH_EXCHANGE, _EXCHANGE), "age_s": round(max(0.0, now_s - e.since_s), 3)}
            for e in queue
        ]
    for name, stream in (("c", conn.client), ("s", conn.server)):
        row = _differing(stream, _FRESH_STREAM, _STREAM)
        if stream.ask is not None:
            row["ask"] = [stream.ask.kind.value, stream.ask.end.hex()]
        if stream.exchange in queue:
            row["exchange"] = queue.index(stream.exchange)
        if len(stream.buf) > _BUFFER_MAX:
            row |= {"mode": LOST, "buf": ""}
        out[name] = row
    if conn.owner is not None and conn.owner in place:
        out["owner"] = place[conn.owner]
    if conn.expects:
        out["expects"] = [key.hex() for key in conn.expects]
    return out


# -- reading -------------------------------------------------------------------------------


def _object(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _Malformed("an object is missing")
    return value


def _list(value: object, most: int) -> list[Any]:
    if not isinstance(value, list) or len(value) > most:
        raise _Malformed(f"a list of at most {most} is missing")
    return value


def _bytes(value: object, most: int) -> bytes:
    if not isinstance(value, str) or len(value) > 2 * most:
        raise _Malformed(f"{most} bytes at most, as hexadecimal digits")
    try:
        return bytes.fromhex(value)
    except ValueError as error:
        raise _Malformed(str(error)) from error


def _number(value: object, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise _Malformed(f"a number from {low} to {high} is missing")
    return value


def _age(row: dict[str, Any], name: str) -> float:
    value = row.get(name, 0.0)
    if type(value) not in (int, float) or not 0 <= value <= _AGE_MAX_S:
        raise _Malformed(f"'{name}' is no age")
    return float(value)


def _checked(value: object, kind: _Kind) -> object:
    match kind:
        case int():
            return _bytes(value, kind)
        case "flag":
            if not isinstance(value, bool):
                raise _Malformed("true or false is missing")
            return value
        case "text":
            if not isinstance(value, str) or len(value) > 200 or not value.isprintable():
                raise _Malformed("a short text is missing")
            return value
        case "sequence":
            return _number(value, UNKNOWN, MASK)
        case "length":
            return _number(value, UNKNOWN, _COUNT_MAX)
        case "mode":
            return _number(value, HEAD, LOST)
    return _number(value, 0, _COUNT_MAX)


def _fill(item: object, row: dict[str, Any], names: dict[str, _Kind]) -> None:
    for name, kind in names.items():
        if name in row:
            value = _checked(row[name], kind)
            setattr(item, name, bytearray(value) if name == "buf" else value)  # type: ignore[call-overload]


def _restored(
    row: dict[str, Any], machine: Recogniser, known: dict[str, Definition], at_s: float
) -> Connection:
    key = _bytes(row.get("key"), 36)
    if len(key) not in (12, 36):
        raise _Malformed("a connection's key has 12 or 36 bytes")
    half = (len(key) - 4) // 2
    reverse = key[half : 2 * half] + key[:half] + key[-2:] + key[-4:-2]
    conn = Connection(Stream(key, True), Stream(reverse, False), at_s, machine.large_bytes)
    for name in _AGES:
        setattr(conn, name, at_s - _age(row, name))
    for item in _list(row.get("queue", []), _QUEUE_MAX):
        exchange = Exchange("", b"", 0, at_s - _age(_object(item), "age_s"))
        _fill(exchange, item, _EXCHANGE)
        conn.queue.append(exchange)
    same = True
    if "protocol" in row:
        name, digest = (*_list(row["protocol"], 2), None, None)[:2]
        definition = known.get(name) if isinstance(name, str) else None
        same = definition is not None and definition.digest == digest
        if same and definition is not None:
            machine.adopt(conn, definition)
    _fill(conn, row, _CONNECTION)
    for name, stream in (("c", conn.client), ("s", conn.server)):
        _stream(stream, _object(row.get(name, {})), same)
    if not same:
        # Read by other rules: where its messages stand is not known here.
        conn.queue.clear()
        conn.label, conn.midstream = "tcp", True
        conn.opaque = conn.tls = False
    for stream in (conn.client, conn.server):
        stream.imported = stream.nxt != UNKNOWN
    conn.imported = conn.client.imported or conn.server.imported
    return conn


def _stream(stream: Stream, row: dict[str, Any], same: bool) -> None:
    conn = stream.conn
    _fill(stream, row, _STREAM)
    if "ask" in row:
        kind, end = (*_list(row["ask"], 2), None, None)[:2]
        kinds = {b.value: b for b in (Body.BYTES, Body.UNTIL, Body.LINE, Body.LINES)}
        if kind not in kinds:
            raise _Malformed("'ask' names no way to go on")
        stream.ask = Choice(kinds[kind], "", kinds[kind] is Body.BYTES, _bytes(end, 16))
    if "exchange" in row:
        stream.exchange = conn.queue[_number(row["exchange"], 0, len(conn.queue) - 1)]
    if not same or not _sound(stream, conn):
        stream.mode = LOST
        stream.exchange = None
        stream.buf.clear()
        stream.large = stream.pops = stream.more = stream.in_more = False
        stream.upto = stream.until = b""


def _sound(stream: Stream, conn: Connection) -> bool:
    """Whether the reader can stand where it is said to."""
    mode, definition, ask = stream.mode, conn.definition, stream.ask
    if conn.opaque:
        return True
    if mode == RECORD or (stream.mode == UNTIL and not 0 <= len(stream.buf) < len(stream.until)):
        return False
    if mode == EITHER:
        return definition is not None and stream.to_server and stream.resume in (COUNTED, CHUNK_SIZE)
    of_lines = mode in (UNTIL, PENDING, LINE) or stream.upto or stream.in_more
    if of_lines and (definition is None or not definition.lines):
        return False
    if mode in (PENDING, LINE):
        return ask is not None and stream.to_server and (ask.kind is not Body.UNTIL or bool(ask.end))
    return True


def _relate(
    conn: Connection, row: dict[str, Any], made: list[Connection], machine: Recogniser, at_s: float
) -> None:
    if "owner" in row:
        owner = made[_number(row["owner"], 0, len(made) - 1)]
        if owner is not conn and owner.owner is None and owner.data is None and not owner.opaque:
            conn.owner, owner.data = owner, conn
            conn.large_bytes = owner.large_bytes
    for item in _list(row.get("expects", []), _EXPECTS_MAX):
        key = _bytes(item, 34)
        half = (len(conn.client.key) - 4) // 2
        addresses = {conn.client.key[:-4], conn.server.key[:-4]}
        if len(key) == 2 * half + 2 and key[:-2] in addresses:
            machine.expected.add(
                conn, key[:-2] == conn.server.key[:-4], [int.from_bytes(key[-2:], "big")], at_s
            )
