"""FTP, SMTP, POP3 and IMAP for the checker: commands and replies in lines, from whole byte streams.

Sources: RFC 959 and 2428 (FTP), 5321 and 3030 (SMTP), 1939 and 2449 (POP3), 9051 (IMAP).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from checker_flows import INF, Flow
from checker_text import Asked, Book, Cursor, More, Stop

# -- replies of three digits: FTP and SMTP ----------------------------------------------------


@dataclass(slots=True)
class _Reply:
    code: int
    text: bytes
    from_s: float
    until_s: float
    flow: Flow
    end: int

    def stop(self) -> Stop:
        """Certain up to this reply's last byte and no further."""
        return Stop(self.flow, self.end - 1)


def _replies(server: Cursor) -> Iterator[_Reply]:
    while server.left:
        begin, from_s = server.at, server.now_s
        line = server.line()
        match = re.match(rb"([1-5][0-9][0-9])(?:([ -])|$)", line)
        if not match:
            raise Stop(server.flow, begin)
        last = line
        while match[2] == b"-" and not re.match(match[1] + rb"(?: |$)", last):
            last = server.line()
        yield _Reply(int(match[1]), line[4:], from_s, server.last_s, server.flow, server.at)


class _Dialogue:
    """Replies taken one after the other, each behind the command it answers."""

    def __init__(self, up: Flow, down: Flow) -> None:
        self.up = up
        self.replies = _replies(Cursor(down))
        self.ended = False

    def next(self) -> _Reply | None:
        """The next reply; None when there is none."""
        if self.ended:
            return None
        try:
            return next(self.replies)
        except (StopIteration, More):
            self.ended = True
            return None

    def final(self, asked: Asked) -> _Reply | None:
        """The answer to what was asked."""
        reply = self.next()
        if reply is None:
            return None
        if reply.from_s < asked.from_s or reply.code < 200:
            raise reply.stop()  # an answer to nothing, or one that SMTP does not know
        if reply.code == 421:
            asked.until_s = reply.until_s
            raise reply.stop()
        return reply

    def greeting(self) -> None:
        while (reply := self.next()) and reply.code < 200:
            pass
        if reply is not None and reply.code != 220:
            raise reply.stop()


_DATA_VERBS = frozenset({b"RETR", b"STOR", b"STOU", b"APPE", b"LIST", b"NLST", b"MLSD"})


def _command(client: Cursor, book: Book, pattern: bytes) -> tuple[Asked, bytes, bytes]:
    """The next command as (what was asked, verb, line)."""
    begin = client.at
    from_s = client.now_s
    line = client.line()
    match = re.match(pattern, line)
    if not match:
        raise Stop(client.flow, begin)
    asked = Asked(line.decode("latin-1")[:60], from_s)
    book.asked.append(asked)
    return asked, match[1].upper(), line


def ftp(up: Flow, down: Flow, book: Book) -> None:
    """Commands and final replies in order; 1yz is preliminary."""
    client, talk = Cursor(up), _Dialogue(up, down)
    talk.greeting()
    while client.left:
        asked, verb, _ = _command(client, book, rb"([A-Za-z]{3,40})(?: |$)")
        reply = _ftp_final(talk, asked, verb)
        if reply is None:
            continue
        asked.until_s = reply.until_s
        if verb == b"AUTH" and reply.code == 234:
            raise reply.stop()
    _unasked(talk)


def _ftp_final(talk: _Dialogue, asked: Asked, verb: bytes) -> _Reply | None:
    size, preliminary_s = 0, INF
    reply = talk.next()
    while reply and reply.code < 200:
        preliminary_s = min(preliminary_s, reply.until_s)
        announced = re.search(rb"\(([0-9]{1,15}) bytes", reply.text)
        size = int(announced[1]) if announced else 0
        reply = talk.next()
    if preliminary_s < INF and verb in _DATA_VERBS:
        asked.data = (preliminary_s, reply.until_s if reply else INF, size)
    if reply is None:
        return None
    if reply.from_s < asked.from_s or reply.code == 421:
        raise reply.stop()
    return reply


def _unasked(talk: _Dialogue) -> None:
    if reply := talk.next():
        raise reply.stop()


def smtp(up: Flow, down: Flow, book: Book) -> None:
    """Commands and replies in order; DATA and BDAT with their text, AUTH with its lines."""
    client, talk = Cursor(up), _Dialogue(up, down)
    talk.greeting()
    announced, size = 0, None
    while client.left:
        asked, verb, line = _command(client, book, rb"([A-Za-z]{4,10})(?: |$)")
        if verb == b"MAIL":
            size_given = re.search(rb"(?i) SIZE=([0-9]{1,12})", line)
            announced = int(size_given[1]) if size_given else 0
        if verb == b"BDAT":
            size = re.fullmatch(rb"(?i)BDAT +([0-9]{1,12})(?: +LAST)? *", line)
            begin = client.at
            # Without a size it is refused, and nothing of it follows.
            whole = client.skip(int(size[1]) if size else 0)
            asked.large.append((client.at - begin, up.at(begin), up.at(client.at - 1)))
            if not whole:
                return
        reply = talk.final(asked)
        while reply and 300 <= reply.code < 400:
            if verb == b"DATA" and reply.code == 354:
                begin = client.at
                whole = client.dotted()
                length = max(client.at - begin, announced)
                asked.large.append((length, up.at(begin), up.at(client.at - 1)))
                if not whole:
                    return
            elif verb == b"AUTH" and reply.code == 334:
                asked.until_s = reply.until_s
                if not client.left:
                    break
                asked = Asked("AUTH, a line of it", client.now_s)
                book.asked.append(asked)
                client.line()
            else:
                raise reply.stop()
            reply = talk.final(asked)
        if reply is None:
            continue
        asked.until_s = reply.until_s
        if (verb == b"BDAT" and size and reply.code != 250) or (verb == b"STARTTLS" and reply.code == 220):
            raise reply.stop()
    _unasked(talk)


# -- POP3 ------------------------------------------------------------------------------------


def pop3(up: Flow, down: Flow, book: Book) -> None:
    """Commands in order; RETR, TOP, CAPA and bare LIST, UIDL, AUTH have answers of many lines.

    A message fetched out of a large maildrop is part of a large transfer (Ishikawa et al. 2011, 3.2):
    the sizes come from STAT and LIST.
    """
    client, server = Cursor(up), Cursor(down)
    if not server.line().startswith(b"+OK"):
        raise Stop(down, 0)
    maildrop = 0
    while client.left:
        asked, verb, line = _command(client, book, rb"([A-Za-z]{3,12})(?: |$)")
        words = line.split()
        while True:
            if not server.left:
                break
            if server.now_s < asked.from_s:
                raise Stop(down, server.at)
            begin = server.at
            answer = server.line()
            if verb == b"AUTH" and answer.startswith(b"+ "):
                asked.until_s = server.last_s
                if not client.left:
                    return
                asked = Asked("AUTH, a line of it", client.now_s)
                book.asked.append(asked)
                client.line()
                continue
            if not answer.startswith((b"+OK", b"-ERR")):
                raise Stop(down, begin)
            good = answer.startswith(b"+OK")
            many = verb in (b"RETR", b"TOP", b"CAPA") or (
                verb in (b"LIST", b"UIDL", b"AUTH") and len(words) == 1
            )
            if verb == b"STLS" and good:
                asked.until_s = server.last_s
                raise Stop(down, server.at - 1)
            if verb == b"STAT" and (stat := re.match(rb"\+OK \d{1,9} (\d{1,12})", answer)):
                maildrop = int(stat[1])
            if not (good and many):
                asked.until_s = server.last_s
                break
            body, from_s = server.at, server.last_s
            asked.until_s = server.last_s if server.dotted() else INF
            if verb == b"LIST":
                listed = re.findall(rb"(?m)^\d{1,9} (\d{1,12})", bytes(down.data[body : server.at]))
                maildrop = sum(map(int, listed))
            announced = 0
            if verb == b"RETR":
                octets = re.search(rb"(\d{1,12}) octets", answer)
                announced = max(maildrop, int(octets[1]) if octets else 0)
            book.large.append((max(server.at - body, announced), from_s, asked.until_s))
            break
    if server.left:
        raise Stop(down, server.at)


# -- IMAP ------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Unit:
    """A response of an IMAP server: its first line, and where its literals are."""

    first: bytes
    until_s: float
    end: int
    literals: list[tuple[int, float, float]]
    taken: bool = False


def _imap_units(server: Cursor) -> list[_Unit]:
    out: list[_Unit] = []
    try:
        while server.left:
            first = line = server.line()
            literals: list[tuple[int, float, float]] = []
            while found := re.search(rb"\{([0-9]{1,12})\}$", line):
                from_s = server.last_s
                whole = server.skip(int(found[1]))
                literals.append((int(found[1]), from_s, server.last_s if whole else INF))
                if not whole:
                    out.append(_Unit(b"", INF, server.at, literals))
                    return out
                line = server.line()
            out.append(_Unit(first, server.last_s, server.at, literals))
    except More:
        pass
    return out


def imap(up: Flow, down: Flow, book: Book) -> None:
    """Commands by their tags, which may be answered in any order."""
    client = Cursor(up)
    units = _imap_units(Cursor(down))
    if not units or not re.match(rb"\* (?:OK|PREAUTH)", units[0].first):
        raise Stop(down, 0)
    book.large += [literal for unit in units for literal in unit.literals]

    def take(wanted: Callable[[_Unit], bool], from_s: float) -> _Unit | None:
        for unit in units:
            if not unit.taken and unit.until_s > from_s and wanted(unit):
                unit.taken = True
                return unit
        return None

    def leave(tag: bytes, from_s: float) -> _Unit | None:
        """The server's ``+`` that comes before the command's tagged answer."""
        for unit in units:
            if unit.taken or unit.until_s <= from_s:
                continue
            if unit.first.startswith(tag + b" "):
                return None
            if unit.first.startswith(b"+"):
                unit.taken = True
                return unit
        return None

    while client.left:
        asked, _, line = _command(client, book, rb"([^\s+*(){%\"\\]+) +[A-Za-z]")
        tag, verb = line.split()[0], line.split()[1].upper()
        while found := re.search(rb"\{([0-9]{1,12})(\+?)\}$", line):
            if not found[2] and not leave(tag, asked.from_s):
                break
            from_s = client.last_s
            if not client.skip(int(found[1])):
                asked.large.append((int(found[1]), from_s, INF))
                return
            asked.large.append((int(found[1]), from_s, client.last_s))
            line = client.line()
        if verb == b"IDLE" and (plus := leave(tag, asked.from_s)):
            asked.until_s = plus.until_s
            if not client.left:
                return
            begin = client.at
            asked = Asked("DONE", client.now_s)
            if client.line().upper() != b"DONE":
                raise Stop(up, begin)
            book.asked.append(asked)
        if verb == b"AUTHENTICATE":
            while plus := leave(tag, asked.from_s):
                asked.until_s = plus.until_s
                if not client.left:
                    return
                asked = Asked("AUTHENTICATE, a line of it", client.now_s)
                book.asked.append(asked)
                client.line()
        done = take(lambda u, t=tag: bool(re.match(re.escape(t) + rb" (?:OK|NO|BAD)", u.first)), asked.from_s)  # type: ignore[misc]
        if done is None:
            continue
        asked.until_s = done.until_s
        if verb in (b"STARTTLS", b"COMPRESS") and b" OK" in done.first[: len(tag) + 4]:
            raise Stop(down, done.end - 1)
