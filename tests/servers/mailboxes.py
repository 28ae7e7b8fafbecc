"""Mailboxes of Dovecot's, and connections to it by hand."""

from __future__ import annotations

from virtgrid.lab.servers import mail
from virtgrid.lab.servers.host import ServerHost

POP3, IMAP = mail.POP3_PORT, mail.IMAP_PORT
#: So small that a stalled reader stops the server after some tens of kilobytes.
STALLED_BYTES = 4096
#: Of every mailbox: one of each kind; the last is above the threshold of 4 MiB.
SIZES = [500, 5000, 100_000, 2 << 20, mail.LARGE_BYTES]
MEDIUM, LARGE = 4, 5


class Lines:
    """A connection by hand: lines out, lines in."""

    def __init__(self, host: ServerHost, port: int, *, stalling: bool = False) -> None:
        self.sock = host.connect(port, receive_bytes=STALLED_BYTES if stalling else 0)
        self.reader = self.sock.makefile("rb")
        self.line()

    def line(self) -> str:
        line = self.reader.readline()
        assert line, "the server closed"
        return line.decode().rstrip("\r\n")

    def until_line(self, start: str) -> str:
        while not (line := self.line()).startswith(start):
            pass
        return line

    def until_dot(self) -> int:
        """Read the lines of an answer up to the lonely dot; their bytes."""
        count = 0
        while (line := self.reader.readline()) != b".\r\n":
            assert line, "the server closed"
            count += len(line)
        return count

    def tell(self, text: str) -> None:
        self.sock.sendall(text.encode() + b"\r\n")

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        self.reader.close()
        self.sock.close()


def pop3(host: ServerHost, user: str, *, stalling: bool = False) -> Lines:
    """Logged in: two commands, and the greeting, are over."""
    lines = Lines(host, POP3, stalling=stalling)
    for command in (f"USER {user}", f"PASS {mail.PASSWORD}"):
        lines.tell(command)
        assert lines.line().startswith("+OK")
    return lines


def imap(host: ServerHost, user: str, *, stalling: bool = False) -> Lines:
    """Logged in and a mailbox selected: two commands are over."""
    lines = Lines(host, IMAP, stalling=stalling)
    lines.tell(f"a1 LOGIN {user} {mail.PASSWORD}")
    lines.until_line("a1 OK")
    lines.tell("a2 SELECT INBOX")
    lines.until_line("a2 OK")
    return lines
