"""HTTP/1.x for the checker, read from whole byte streams (RFC 9112)."""

from __future__ import annotations

import re
from dataclasses import dataclass

from checker_flows import INF, Flow
from checker_text import Asked, Book, Cursor, More, Stop

REQUEST = re.compile(rb"([A-Z][A-Z_-]{1,30}) [^ ]+ +HTTP/1\.[01]")
_STATUS = re.compile(rb"HTTP/1\.[01] +([1-5][0-9][0-9])(?: |$)")


@dataclass(slots=True)
class _Message:
    begin: int
    first: bytes
    fields: dict[bytes, list[bytes]]
    head_end: int
    body_end: int = 0
    whole: bool = True


def _head(cursor: Cursor) -> _Message:
    begin = cursor.at
    first = cursor.line()
    fields: dict[bytes, list[bytes]] = {}
    name = b""
    while line := cursor.line():
        if line[:1] in b" \t":
            if name:
                fields[name][-1] += b" " + line.strip()
            continue
        name, colon, value = line.partition(b":")
        name = name.strip().lower()
        if not colon:
            name = b""
            continue
        fields.setdefault(name, []).append(value.strip(b" \t"))
    return _Message(begin, first, fields, cursor.at)


def _http_body(cursor: Cursor, message: _Message, until_close: bool) -> None:
    coding = message.fields.get(b"transfer-encoding")
    lengths = message.fields.get(b"content-length")
    message.body_end = cursor.at
    if coding:
        if [c.lower() for c in coding] != [b"chunked"]:
            raise Stop(cursor.flow, message.head_end - 1)
        try:
            _chunks(cursor)
        except More:
            message.whole = False
            cursor.at = len(cursor.flow.data)
    elif lengths:
        if len(set(lengths)) != 1 or not lengths[0].isdigit() or len(lengths[0]) > 15:
            raise Stop(cursor.flow, message.head_end - 1)
        message.whole = cursor.skip(int(lengths[0]))
    elif until_close:
        message.whole = False
        cursor.at = len(cursor.flow.data)
    message.body_end = cursor.at


def _chunks(cursor: Cursor) -> None:
    while True:
        begin = cursor.at
        size = cursor.line().partition(b";")[0].strip()
        if not re.fullmatch(rb"[0-9A-Fa-f]{1,12}", size):
            raise Stop(cursor.flow, begin)
        if int(size, 16) == 0:
            break
        if not cursor.skip(int(size, 16)):
            raise More
        at = cursor.at
        if cursor.line():
            raise Stop(cursor.flow, at)
    while cursor.line():
        pass


def http(up: Flow, down: Flow, book: Book) -> None:
    """Requests and answers in order, 1xx left out."""
    client, server = Cursor(up), Cursor(down)
    certain = INF
    requests: list[_Message] = []
    try:
        while client.left:
            if up.data[client.at] in b"\r\n":
                client.at += 1
                continue
            begin = client.at
            try:
                request = _head(client)
            except More:
                client.at = begin
                request = _Message(begin, client.line(), {}, len(up.data), len(up.data), False)
                client.at = len(up.data)
            if not REQUEST.match(request.first):
                raise Stop(up, begin)
            requests.append(request)
            if request.whole:
                _http_body(client, request, until_close=False)
            if request.first.startswith(b"CONNECT ") or b"upgrade" in request.fields:
                raise Stop(up, client.at)
    except Stop as stop:
        certain = stop.at_s
    except More:
        pass
    for request in requests:
        asked = Asked(request.first.decode("latin-1")[:60], up.at(request.begin))
        size = request.body_end - request.head_end
        if size > 0:
            asked.large.append((size, up.at(request.head_end), up.at(request.body_end - 1)))
        if request.head_end == len(up.data) and not request.whole:
            asked.until_s = up.fin_s  # what was never asked to the end is not waited for
        book.asked.append(asked)
    book.certain_until_s = certain
    try:
        for request, asked in zip(requests, book.asked, strict=True):
            _http_answer(server, request, asked, up, book)
        if server.left:
            raise Stop(down, server.at)
    except Stop as stop:
        book.certain_until_s = min(certain, stop.at_s)
    except More:
        pass


def _http_answer(server: Cursor, request: _Message, asked: Asked, up: Flow, book: Book) -> None:
    while True:
        begin = server.at
        if begin < len(server.flow.data) and server.now_s < asked.from_s:
            raise Stop(server.flow, begin)  # an answer to nothing, or the capture's order is wrong
        first = server.line()
        match = _STATUS.match(first)
        if not match:
            raise Stop(server.flow, begin)
        server.at = begin
        answer = _head(server)
        status = int(match[1])
        if status >= 200 or status == 101:
            break
    body_begins_s = up.at(request.head_end)
    if b"expect" in request.fields and server.last_s < body_begins_s:
        asked.until_s = server.last_s
        raise Stop(server.flow, begin)  # refused: the body may never come
    if status == 101 or (request.first.startswith(b"CONNECT ") and status < 300):
        asked.until_s = server.last_s
        raise Stop(server.flow, server.at - 1)
    if not (request.first.startswith(b"HEAD ") or status in (204, 304)):
        _http_body(server, answer, until_close=True)
    end = server.at
    if answer.whole:
        asked.until_s = server.flow.at(end - 1)
    announced = answer.fields.get(b"content-length", [b"0"])[0]
    size = max(end - answer.head_end, int(announced) if announced.isdigit() else 0)
    book.large.append((size, server.flow.at(answer.head_end - 1), asked.until_s))
