"""A connection and its outstanding exchanges, as the machine keeps them and judge.py reads them."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final

from virtgrid.tracker.decode import endpoints
from virtgrid.tracker.rules import Definition
from virtgrid.tracker.streams import HEAD, UNKNOWN, Stream
from virtgrid.tracker.views import Verdict

if TYPE_CHECKING:
    from virtgrid.tracker.plan import Plan

#: Of a request so much is kept for people.
SHOWN_BYTES: Final = 120


class Exchange:
    """A request and its answer. line: what of the request may be shown, as it came from the wire.

    tag: how its answer names it (IMAP), or empty: answers come in order. transfer: it moves data over a
    derived connection. size: announced bytes of what it moves. waiting: once it has been given leave,
    nobody waits for anybody.
    """

    __slots__ = ("awaits", "end", "line", "since_s", "size", "tag", "transfer", "waiting", "word")

    def __init__(self, word: str, line: bytes, end: int, since_s: float) -> None:
        self.word = word
        self.line = line
        self.end = end
        self.since_s = since_s
        self.awaits = self.transfer = self.waiting = False
        self.tag = b""
        self.size = 0


class Connection:
    """A connection: two streams, the queue, and the verdict last given (by judge.py).

    large_bytes: from where on a transfer is large here. volume: announced bytes of all that is to be
    transferred. owner, data: the control connection of a derived one, and the other way round.
    expects: where derived connections are awaited (keys of Machine.expected). fresh_s: since when the
    state ``new`` counts. hello: the server's first line, until the protocol is beyond doubt. tls: the
    bytes are read as TLS records. client_last: who spoke last, where nothing else is known. imported:
    known from elsewhere, and not seen to be where it was said to be yet; unwatched: since when it was, it
    may have moved on unseen. quick: the definition's short way.
    """

    __slots__ = (
        "answered", "by_guest", "client", "client_last", "closed", "data", "definition", "dirty", "expects",
        "fresh_s", "gaps", "hello", "hint", "imported", "label", "large_bytes", "large_transfers", "last_s",
        "lost_busy", "lost_why", "midstream", "named", "opaque", "opened_s", "owner", "queue", "quick",
        "requests", "responses", "server", "since_s", "state", "synack", "timer_s", "tls", "unwatched",
        "verdict", "volume",
    )  # fmt: skip

    def __init__(self, client: Stream, server: Stream, at_s: float, large_bytes: int = 4 << 20) -> None:
        self.client = client
        self.server = server
        client.conn = server.conn = self
        client.peer, server.peer = server, client
        self.named: tuple[str, str] | None = None
        self.definition: Definition | None = None
        self.hint: Definition | None = None
        self.quick: Plan | None = None
        self.label = "tcp"
        self.hello = b""
        self.opaque = self.tls = self.client_last = False
        self.queue: deque[Exchange] = deque()
        self.answered = UNKNOWN
        self.requests = self.responses = self.large_transfers = self.gaps = 0
        self.large_bytes = large_bytes
        self.volume = 0
        self.owner: Connection | None = None
        self.data: Connection | None = None
        self.expects: list[bytes] = []
        self.opened_s = self.fresh_s = self.last_s = self.since_s = at_s
        self.midstream = self.synack = self.by_guest = self.closed = False
        self.lost_busy = self.imported = self.unwatched = False
        self.lost_why = ""
        self.dirty = True
        self.timer_s = float("inf")
        self.state = ""
        self.verdict: Verdict | None = None

    def part(self) -> None:
        """It is over: let go of each other, or its memory would wait for the collector of cycles."""
        for stream in (self.client, self.server):
            stream.mode = HEAD
            del stream.conn, stream.peer

    @property
    def names(self) -> tuple[str, str]:
        """``address:port`` of client and server; made once, for every change of verdict needs them."""
        if self.named is None:
            self.named = endpoints(self.client.key)
        return self.named

    @property
    def port(self) -> int:
        """The server's."""
        return int.from_bytes(self.server.key[-4:-2], "big")
