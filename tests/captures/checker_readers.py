"""Who asked for what, from when to when: which protocol a connection speaks, and its reader.

Each reader takes the two directions of one connection and walks from message to message. It lists
what was asked (from the request's first byte) and where the answer's last byte was. Written for
clarity over finished captures, unlike the tracker.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from checker_flows import Flow
from checker_http import REQUEST, http
from checker_lines import ftp, imap, pop3, smtp
from checker_text import Book, More, Stop

_READERS: dict[str, Callable[[Flow, Flow, Book], None]] = {
    "http": http,
    "ftp": ftp,
    "smtp": smtp,
    "pop3": pop3,
    "imap": imap,
}


def _protocol(up: Flow, down: Flow, server_port: int) -> str:
    """Both sides must speak it: what a client asks before it is greeted is not known by its greeting."""
    asked, said = bytes(up.data[:4096]).lstrip(b"\r\n"), bytes(down.data[:200])
    if REQUEST.match(asked):
        return "http"
    if said.startswith(b"+OK") and re.match(
        rb"(?i)(?:USER|APOP|CAPA|AUTH|STLS|STAT|LIST|QUIT|NOOP)\b", asked
    ):
        return "pop3"
    if re.match(rb"\* (?:OK|PREAUTH)", said) and re.match(
        rb"(?i)[^\s+*]+ +(?:CAPABILITY|LOGIN|AUTHENTICATE|STARTTLS|NOOP|LOGOUT|ID|SELECT|LIST)\b", asked
    ):
        return "imap"
    if re.match(rb"220[ -]|120 ", said):
        if re.match(rb"(?i)(?:EHLO|HELO|MAIL|RSET|NOOP) ?", asked) and server_port != 21:
            return "smtp"
        if re.match(rb"(?i)(?:USER|AUTH|FEAT|SYST|PORT|PASV|HELP|OPTS) ?", asked) and server_port == 21:
            return "ftp"
    return ""


def read(up: Flow, down: Flow, server_port: int) -> Book:
    """What one connection's client asked for; an empty book for protocols that cannot be read."""
    book = Book(protocol=_protocol(up, down, server_port))
    if book.protocol:
        try:
            _READERS[book.protocol](up, down, book)
        except Stop as stop:
            book.certain_until_s = min(book.certain_until_s, stop.at_s)
        except More:
            pass
    return book
